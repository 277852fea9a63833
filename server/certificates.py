"""The server's own certificates: load them, verify them as a client will, reload them when they change.

The files may change at any time, one after the other. So a new set is used only if all of it loads
and matches, and no file has changed meanwhile; until then, the server keeps the former set. Each set
is loaded into a new context, and each connection keeps the context that it began with.
"""

import contextlib
import re
import ssl
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from problems import Unusable, in_words, load, next_step, read

FILES = ("ca.crt", "server.crt", "server.key")
PATIENCE = 5.0   # seconds before the log says that a new set is unusable: moving files takes less

NO_CHECK_TIME = 0x200000   # X509_V_FLAG_NO_CHECK_TIME, for which Python has no name


class CertificateSet(NamedTuple):
    """A set of files that match."""

    ca: bytes               # ca.crt: one CA or several
    certificate: bytes      # server.crt
    cas: frozenset[bytes]   # the CAs in ca.crt, in DER
    issuer: bytes           # the one that signed server.crt, in PEM
    valid_until: str        # the end of server.crt's validity, as OpenSSL writes it
    warning: str | None     # why clients will refuse server.crt, and what to do


class Certificates:
    """The context for new connections, replaced when ca.crt, server.crt or server.key changes.

    ``make_context`` takes the folder and returns a server's context with its files loaded. Raises
    Unusable if they cannot be used. ``warning`` says why clients will refuse server.crt; None if
    they will not.
    """

    context: ssl.SSLContext
    in_use: CertificateSet

    def __init__(self, folder: Path, make_context: Callable[[Path], ssl.SSLContext]) -> None:
        self.folder, self.make_context = folder, make_context
        self.stamps: list[tuple[int, ...] | None] = []   # of the files in use
        self.problem, self.since, self.reported = "", 0.0, ""   # why files are unusable, since when, what was logged
        self.take_up()

    def look(self) -> str | None:
        """Load the files if they have changed. Returns a line for the log, or None. Call it once a second."""
        former, reported = self.in_use, self.reported
        try:
            if self.stamps != file_stamps(self.folder):
                self.take_up()
        except Unusable as error:
            return self.complaint(str(error))
        self.problem, self.reported = "", ""
        state = "new ones are in use"
        if (former.ca, former.certificate) == (self.in_use.ca, self.in_use.certificate):   # then the key is the same
            if not reported:
                return None
            state = "the former ones are back"
        line = f"CERTIFICATES | {state} | server.crt valid until {self.in_use.valid_until}"
        if former.ca != self.in_use.ca:
            line += " | ca.crt has changed" if former.cas & self.in_use.cas else " | the CA is new"
        return f"{line} | WARNING: {self.warning}" if self.warning else line

    def take_up(self) -> None:
        """Load what is in the folder and use it from now on. If it raises Unusable, nothing has changed."""
        stamps = file_stamps(self.folder)
        try:
            new = verified(self.folder)
            context = self.make_context(self.folder)
            send_with_ca(context, self.folder, new)
        except OSError as error:   # ssl.SSLError is one; or a file vanished after it was read
            raise Unusable(f"{self.folder}: cannot load the certificates ({in_words(error)}); try again") from None
        if file_stamps(self.folder) != stamps:
            raise Unusable(f"{self.folder}: the certificates are being replaced; try again when that is done")
        self.stamps, self.in_use, self.context, self.warning = stamps, new, context, new.warning

    def complaint(self, problem: str) -> str | None:
        """The log line about a problem, once, when it has lasted for some time; otherwise None."""
        if problem != self.problem:
            self.problem, self.since = problem, time.monotonic()
        if problem == self.reported or time.monotonic() - self.since < PATIENCE:
            return None
        self.reported = problem
        return f"CERTIFICATES | the former ones stay in use | {problem}"


def file_stamps(folder: Path) -> list[tuple[int, ...] | None]:
    """For each file, what changes when it is replaced or written to; None if it is missing."""
    stamps: list[tuple[int, ...] | None] = []
    for name in FILES:
        try:
            status = (folder / name).stat()
            stamps.append((status.st_ino, status.st_size, status.st_mtime_ns))
        except OSError:
            stamps.append(None)
    return stamps


def send_with_ca(context: ssl.SSLContext, folder: Path, new: CertificateSet) -> None:
    """Load our certificate once more, together with the CA's in one file.

    OpenSSL sends both in any case. But if it is not given the whole chain, it builds and verifies
    one in every handshake, which takes 6 % of the CPU time. If we cannot make a temporary file, we
    accept that.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as temporary:
        chain = Path(temporary) / "chain.pem"
        chain.write_bytes(new.certificate + b"\n" + new.issuer)
        context.load_cert_chain(chain, folder / "server.key", password="")


# --- Verify them as a client will ----------------------------------------------------------

def verified(folder: Path) -> CertificateSet:
    """The set in the folder. Raises Unusable if a client that trusts ca.crt would not accept it, dates aside."""
    contents = [read(folder / name) for name in FILES]
    ca, certificate, key = (folder / name for name in FILES)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    load(ca, lambda: client.load_verify_locations(ca))
    load(certificate, lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(certificate))
    if not client.get_ca_certs():
        raise Unusable(f"{ca} is not a CA certificate; {next_step(ca)}")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # The empty password makes an encrypted key an error; without it, OpenSSL would ask for one.
        server.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):   # the latter: RSA beside EC
            raise Unusable(f"{key} does not match server.crt; {next_step(certificate)}") from None
        if error.reason and error.reason.startswith(("EE_", "CA_")):   # it is too weak for OpenSSL's security level
            raise Unusable(f"{certificate}: {in_words(error)}; {next_step(key)}") from None
        raise Unusable(f"{key} is damaged; {next_step(key)}") from None
    try:
        leaf = handshake(client, server)
    except ssl.SSLError as error:
        words = getattr(error, "verify_message", None) or in_words(error)
        problem = PROBLEMS.get(getattr(error, "verify_code", 0), f"does not verify with ca.crt ({words})")
        raise Unusable(f"{certificate} {problem}; {next_step(certificate)}") from None
    issuer, about_issuer = the_issuer(contents[0], server)
    warning = (problem_with_dates(ca, about_issuer) or problem_with_dates(certificate, leaf)
               or problem_with_names(certificate, leaf))
    return CertificateSet(contents[0], contents[1], frozenset(client.get_ca_certs(binary_form=True)), issuer,
                          str(leaf["notAfter"]), warning)


PROBLEMS = dict.fromkeys((7, 18, 19, 20, 21), "is not signed by the CA in ca.crt") | {
    26: "is not for a server (see its extendedKeyUsage)",
}
"""What is wrong with server.crt, by the code of OpenSSL's verification error."""


def handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> dict[str, Any]:
    """The server's certificate as this client sees it in an in-memory handshake, whatever its dates and names.

    Raises ssl.SSLError.
    """
    client.check_hostname = False
    client.verify_flags |= NO_CHECK_TIME
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server)
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    with contextlib.suppress(ssl.SSLWantReadError):
        theirs.do_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        ours.do_handshake()
    theirs.do_handshake()
    return theirs.getpeercert() or {}


def the_issuer(ca: bytes, server: ssl.SSLContext) -> tuple[bytes, dict[str, Any]]:
    """The CA in ca.crt (several may have the same name) that signed server.crt: its PEM, and its fields."""
    for block in re.findall(rb"-----BEGIN [A-Z0-9 ]+-----.+?-----END [A-Z0-9 ]+-----\n?", ca, re.DOTALL):
        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN   # it need not be a root
        with contextlib.suppress(ssl.SSLError, UnicodeError):
            client.load_verify_locations(cadata=block.decode("ascii"))
            handshake(client, server)
            for about in client.get_ca_certs():   # none if it is server.crt itself
                return block, about
    return b"", {}


def problem_with_dates(file: Path, about: dict[str, Any]) -> str | None:
    """Why a client will refuse this certificate today, and what to do; None if it will not."""
    start, end = about.get("notBefore"), about.get("notAfter")
    if start and time.time() < ssl.cert_time_to_seconds(start):
        return (f"{file}: certificate is not yet valid (before {start}): clients will refuse it; "
                f"set this machine's clock, or {next_step(file)}")
    if end and time.time() > ssl.cert_time_to_seconds(end):
        return f"{file}: certificate has expired ({end}): clients will refuse it; {next_step(file)}"
    return None


def problem_with_names(file: Path, certificate: dict[str, Any]) -> str | None:
    """The same for a certificate that was signed without the extensions from server.cnf."""
    if "subjectAltName" in certificate:
        return None
    return f"{file} has no names (subjectAltName): clients will refuse it; {next_step(file)}"
