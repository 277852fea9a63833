"""The mistakes people make with mTLS, each one an experiment: python3 -m tests.mistakes

Every experiment makes one mistake with real certificates, lets a client and a server meet over
loopback, and tells what each of them saw. The certificates come from the lab's own certs/*.cnf,
with one setting changed, and live in a temporary folder that is removed at the end.

How to read an outcome: "hello, NAME" is the answer to a request that got in. "alert ..." is what
the *other* side had to say about the mistake; everything else is a side's own verdict. The words
are OpenSSL's.

Read an experiment's title (what you do wrong), its explanation with the cure, and what it does.
The tools that they all use come first: certificates, then how client and server meet.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0
"""Seconds after which a side gives up waiting for the other. Only a defect here makes it wait."""


class Missing(Exception):
    """This machine lacks something that an experiment needs."""


# --- Certificates --------------------------------------------------------------------------


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed. Raises CalledProcessError with that if it fails."""
    if not shutil.which(command[0]):
        raise Missing(f"the {command[0]} command is missing")
    result = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=True)
    return result.stdout


def altered(config: str, section: str, changes: dict[str, str | None]) -> str:
    """The text of certs/CONFIG with some settings of one section changed (None: left out)."""
    lines = []
    left = dict(changes)
    within = ""
    for line in (ROOT / "certs" / config).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            within = line.strip("[] ")
        setting = line.partition("=")[0].strip()
        if within == section and setting in left:
            value = left.pop(setting)
            if value is None:
                continue
            line = f"{setting} = {value}"
        lines.append(line)
    if left:
        raise RuntimeError(f"certs/{config} has no {', '.join(left)} in [ {section} ]")
    return "\n".join(lines) + "\n"


class Bench:
    """A folder of certificates to experiment with: a good CA, server and client to begin with.

    A certificate called NAME is NAME.crt, with its key in NAME.key. Keys are of the P-256 kind,
    made in no time; none of the mistakes has to do with the kind of key.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.make_ca("ca")
        self.issue("server", like="server")
        self.issue("client", like="client")

    def openssl(self, *arguments: str) -> str:
        """Run openssl in the folder."""
        return run(["openssl", *arguments], self.folder)

    def make_key(self, name: str) -> None:
        """Make NAME.key."""
        self.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")

    def make_ca(self, name: str, common_name: str = "mTLS Lab Root CA", **changes: str | None) -> None:
        """Make a CA as certs/ca.cnf has it, but for the changes to its [ v3_ca ]."""
        config = altered("ca.cnf", "v3_ca", changes).replace("CN = mTLS Lab Root CA", f"CN = {common_name}")
        (self.folder / f"{name}.cnf").write_text(config, encoding="utf-8")
        self.make_key(name)
        self.openssl("req", "-new", "-x509", "-days", "3650", "-key", f"{name}.key", "-out", f"{name}.crt",
                     "-config", f"{name}.cnf")

    def make_request(self, name: str, like: str, common_name: str | None = None, **changes: str | None) -> None:
        """Make a key and NAME.csr as certs/LIKE.cnf has it, and NAME.cnf with the changes to its [ v3_LIKE ]."""
        config = altered(f"{like}.cnf", f"v3_{like}", changes)
        if common_name:   # not with -subj: LibreSSL ignores it where the file says "prompt = no"
            config = config.replace("CN = mtls-client", f"CN = {common_name}")
        (self.folder / f"{name}.cnf").write_text(config, encoding="utf-8")
        self.make_key(name)
        self.openssl("req", "-new", "-key", f"{name}.key", "-out", f"{name}.csr", "-config", f"{name}.cnf")

    def issue(self, name: str, like: str, ca: str = "ca", common_name: str | None = None,
              **changes: str | None) -> None:
        """Make a certificate as certs/LIKE.cnf has it, but for the changes to its [ v3_LIKE ]."""
        self.make_request(name, like, common_name, **changes)
        self.openssl("x509", "-req", "-days", "365", "-in", f"{name}.csr", "-CA", f"{ca}.crt", "-CAkey", f"{ca}.key",
                     "-CAcreateserial", "-out", f"{name}.crt", "-extensions", f"v3_{like}", "-extfile", f"{name}.cnf")

    def issue_dated(self, name: str, like: str, start: str, end: str) -> None:
        """Make a certificate that is valid from and to a date, given as YYYYMMDD.

        ``openssl x509 -req`` takes no dates before version 3.4, and refuses ``-days -1`` since 3.5;
        ``openssl ca`` takes dates in all versions.
        """
        self.make_request(name, like)
        (self.folder / "database").write_text("")
        (self.folder / "serial").write_text("01\n")
        (self.folder / "dated.cnf").write_text(
            "[ ca ]\ndefault_ca = bench\n"
            "[ bench ]\ndatabase = database\nserial = serial\nnew_certs_dir = .\ndefault_md = sha256\npolicy = names\n"
            "[ names ]\ncommonName = supplied\n")
        self.openssl("ca", "-batch", "-config", "dated.cnf", "-cert", "ca.crt", "-keyfile", "ca.key", "-notext",
                     "-startdate", f"{start}000000Z", "-enddate", f"{end}000000Z", "-in", f"{name}.csr",
                     "-out", f"{name}.crt", "-extensions", f"v3_{like}", "-extfile", f"{name}.cnf")

    def server(self, certificate: str = "server", trust: str = "ca") -> ssl.SSLContext:
        """A server's settings, as server/server.py has them."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(self.folder / f"{trust}.crt")
        context.load_cert_chain(self.folder / f"{certificate}.crt", self.folder / f"{certificate}.key")
        return context

    def client(self, certificate: str | None = "client", trust: str = "ca") -> ssl.SSLContext:
        """A client's settings, Python's defaults for the rest; None for no certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.folder / f"{trust}.crt")
        if certificate is not None:
            context.load_cert_chain(self.folder / f"{certificate}.crt", self.folder / f"{certificate}.key")
        return context

    def git(self, *arguments: str) -> str:
        """Run git in the folder's repository/, out of reach of your own git settings."""
        repository = self.folder / "repository"
        repository.mkdir(exist_ok=True)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "XDG_"))}
        variables |= {"HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1"}
        return run(["git", "-c", "user.name=Alice", "-c", "user.email=alice@localhost", *arguments],
                   repository, variables)


# --- Client and server meet ----------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What each side saw."""

    client: str
    server: str


NOTHING = "nothing"
"""What a side saw that was never reached."""


def in_words(error: OSError) -> str:
    """OpenSSL's words for a failure, without what Python puts around them.

    What stands before "alert" is left out. It depends on OpenSSL's version ("sslv3 alert bad
    certificate" in 3.0, "ssl/tls alert bad certificate" in 3.5), and not on the connection's.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.replace("_", " ").lower()
        return words[max(0, words.find("alert ")):]
    return str(error)


def name_in(certificate: Any) -> str:
    """The common name in what getpeercert() returned."""
    if not certificate:
        return "nobody"
    return str(dict(field[0] for field in certificate["subject"])["commonName"])


def part(side: ssl.SSLSocket) -> None:
    """Say goodbye, then listen until the other side has said it too.

    Closing at once while the other side is still sending makes the kernel reset the connection,
    and the alert that says why is lost.
    """
    try:
        side.shutdown(socket.SHUT_WR)   # from here on, Python reads the plain bytes
        while side.recv(4096):
            pass
    except OSError:
        pass   # it has gone already


def serve(listener: socket.socket, context: ssl.SSLContext, seen: list[str]) -> None:
    """Accept one client, greet it by the name in its certificate, and note what was seen."""
    connection, _ = listener.accept()
    connection.settimeout(PATIENCE)
    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as side:
        try:
            side.do_handshake()
            side.recv(4096)   # the request
            name = name_in(side.getpeercert())
            body = f"hello, {name}"
            side.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
            seen.append(f"{name}'s request")
        except OSError as error:
            seen.append(in_words(error))
        part(side)


def ask(context: ssl.SSLContext, host: str, port: int) -> str:
    """Send a request to https://HOST:PORT and return the answer, or why there is none."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    with context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False) as side:
        try:
            side.do_handshake()
            side.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            # In TLS 1.3 the client is done before the server has looked at its certificate:
            # a refusal is not seen until now, on the first read.
            seen = side.recv(4096).decode().partition("\r\n\r\n")[2]
        except OSError as error:
            seen = in_words(error)
        part(side)
        return seen


def meet(server: ssl.SSLContext, client: ssl.SSLContext | Callable[[int], str], host: str = "localhost") -> Outcome:
    """Let a client connect to a server over loopback. A function for a client gets the port."""
    seen_by_server: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve, args=(listener, server, seen_by_server))
        thread.start()
        try:
            seen_by_client = ask(client, host, port) if isinstance(client, ssl.SSLContext) else client(port)
        finally:
            thread.join()
    return Outcome(seen_by_client, seen_by_server[0])


# --- The list of experiments ---------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One mistake: what you do wrong, in a few words, and the function that does it."""

    title: str
    run: Callable[[Bench], Outcome]


EXPERIMENTS: list[Experiment] = []
"""All of them, in the order of this file."""


def experiment(title: str) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    """Put the function below into `EXPERIMENTS`."""

    def register(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        EXPERIMENTS.append(Experiment(title, run))
        return run

    return register


# --- Nothing wrong, and no certificate -----------------------------------------------------


@experiment("nothing: the lab as it is")
def as_it_is(bench: Bench) -> Outcome:
    """Both sides prove who they are. All that follows differs from this in one thing."""
    return meet(bench.server(), bench.client())


@experiment("no client certificate")
def no_certificate(bench: Bench) -> Outcome:
    """The server requires a certificate (CERT_REQUIRED), the client has none.

    Cure: load_cert_chain() on the client.
    """
    return meet(bench.server(), bench.client(certificate=None))


@experiment("no client certificate, TLS 1.2")
def no_certificate_in_tls12(bench: Bench) -> Outcome:
    """The same in TLS 1.2, which has no alert of its own for it.

    Cure: load_cert_chain() on the client.
    """
    client = bench.client(certificate=None)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    return meet(bench.server(), client)


# --- Names: the SAN ------------------------------------------------------------------------


@experiment("no SAN, https://127.0.0.1")
def no_san_address(bench: Bench) -> Outcome:
    """The client finds no address in the certificate to compare with; a CN is no address.

    Cure: subjectAltName = IP:127.0.0.1 in the server's certificate.
    """
    bench.issue("nameless", like="server", subjectAltName=None)
    return meet(bench.server("nameless"), bench.client(), "127.0.0.1")


@experiment("no SAN, https://localhost")
def no_san_name(bench: Bench) -> Outcome:
    """Accepted: where no DNS name is in a SAN, OpenSSL falls back to the CN (deprecated since 2000, RFC 2818).

    So it works here, and fails in browsers and in Go, which have dropped the CN.
    Cure: subjectAltName = DNS:localhost in the server's certificate.
    """
    bench.issue("nameless", like="server", subjectAltName=None)
    return meet(bench.server("nameless"), bench.client(), "localhost")


@experiment("no SAN, localhost, CN ignored")
def no_san_name_strict(bench: Bench) -> Outcome:
    """The same for a client that does not fall back to the CN. The lab's client is one.

    Cure: subjectAltName = DNS:localhost in the server's certificate.
    """
    bench.issue("nameless", like="server", subjectAltName=None)
    client = bench.client()
    client.hostname_checks_common_name = False
    return meet(bench.server("nameless"), client, "localhost")


@experiment("no SAN, https://localhost, curl")
def no_san_curl(bench: Bench) -> Outcome:
    """Accepted: curl with OpenSSL falls back to the CN, too. With other TLS libraries it may not.

    Cure: subjectAltName = DNS:localhost in the server's certificate.
    """
    if not shutil.which("curl"):
        raise Missing("the curl command is missing")
    bench.issue("nameless", like="server", subjectAltName=None)

    def curl(port: int) -> str:
        try:
            return run(["curl", "--silent", "--show-error", "--noproxy", "*",
                        "--resolve", f"localhost:{port}:127.0.0.1", "--cacert", "ca.crt",
                        "--cert", "client.crt", "--key", "client.key", f"https://localhost:{port}"], bench.folder)
        except subprocess.CalledProcessError as error:
            return str(error.output).partition("\n")[0]

    return meet(bench.server("nameless"), curl)


@experiment("SAN in the request only")
def san_not_signed(bench: Bench) -> Outcome:
    """The CSR asks for a SAN and an EKU, but ``openssl x509 -req`` copies nothing of what it asks for.

    The CA decides what it signs. Nothing warns: the certificate just lacks them.
    Cure: -extensions v3_server -extfile certs/server.cnf
    """
    bench.make_request("request", like="server")
    bench.openssl("x509", "-req", "-days", "365", "-in", "request.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
                  "-CAcreateserial", "-out", "request.crt")
    return meet(bench.server("request"), bench.client(), "127.0.0.1")


# --- Purposes: the EKU ---------------------------------------------------------------------


@experiment("server cert without an EKU")
def server_without_eku(bench: Bench) -> Outcome:
    """Accepted: no EKU means any purpose. Apple's systems refuse it all the same.

    With it the key of a client could pose as a server, and the other way round.
    Cure: extendedKeyUsage = serverAuth
    """
    bench.issue("odd", like="server", extendedKeyUsage=None)
    return meet(bench.server("odd"), bench.client())


@experiment("server cert with clientAuth")
def server_with_client_eku(bench: Bench) -> Outcome:
    """The certificate says that it is for something else.

    This is what keeps a client of yours from posing as the server.
    Cure: extendedKeyUsage = serverAuth
    """
    bench.issue("odd", like="server", extendedKeyUsage="clientAuth")
    return meet(bench.server("odd"), bench.client())


@experiment("client cert without an EKU")
def client_without_eku(bench: Bench) -> Outcome:
    """Accepted: no EKU means any purpose.

    Cure: extendedKeyUsage = clientAuth
    """
    bench.issue("odd", like="client", extendedKeyUsage=None)
    return meet(bench.server(), bench.client("odd"))


@experiment("client cert with serverAuth")
def client_with_server_eku(bench: Bench) -> Outcome:
    """The certificate says that it is for something else.

    Cure: extendedKeyUsage = clientAuth
    """
    bench.issue("odd", like="client", extendedKeyUsage="serverAuth")
    return meet(bench.server(), bench.client("odd"))


# --- What makes a CA -----------------------------------------------------------------------


def with_ca(bench: Bench, flags: ssl.VerifyFlags, basic_constraints: str | None) -> Outcome:
    """Both sides have their certificate from, and trust, a CA with other basicConstraints."""
    bench.make_ca("odd-ca", basicConstraints=basic_constraints)
    bench.issue("odd-server", like="server", ca="odd-ca")
    bench.issue("odd-client", like="client", ca="odd-ca")
    client = bench.client("odd-client", trust="odd-ca")
    client.verify_flags |= flags
    return meet(bench.server("odd-server", trust="odd-ca"), client)


@experiment("CA without basicConstraints")
def ca_without_constraints(bench: Bench) -> Outcome:
    """Accepted: OpenSSL takes a certificate with keyCertSign for a CA if it says no more.

    Cure: basicConstraints = critical, CA:true
    """
    return with_ca(bench, ssl.VerifyFlags(0), None)


@experiment("CA without constraints, strict")
def ca_without_constraints_strict(bench: Bench) -> Outcome:
    """The same for a strict client, which insists on basicConstraints.

    Python's ssl.create_default_context() makes strict clients since 3.13.
    Cure: basicConstraints = critical, CA:true
    """
    return with_ca(bench, ssl.VERIFY_X509_STRICT, None)


@experiment("CA with CA:false")
def ca_that_says_no(bench: Bench) -> Outcome:
    """The certificate says that it is no CA, so what it has signed counts for nothing.

    Also what you see when somebody signs certificates with the key of an ordinary certificate.
    Cure: basicConstraints = critical, CA:true
    """
    return with_ca(bench, ssl.VerifyFlags(0), "critical, CA:false")


# --- Whom to let in ------------------------------------------------------------------------


@experiment("CERT_OPTIONAL")
def optional(bench: Bench) -> Outcome:
    """The server asks for a certificate, and lets in who has none: getpeercert() is None.

    Cure: verify_mode = ssl.CERT_REQUIRED
    """
    server = bench.server()
    server.verify_mode = ssl.CERT_OPTIONAL
    return meet(server, bench.client(certificate=None))


@experiment("getpeercert() not checked")
def not_checked(bench: Bench) -> Outcome:
    """Any certificate of the CA gets in: the handshake says who it is, not what it may do.

    Mallory has a certificate of her own, for another service, say.
    Cure: compare the name in getpeercert() with a list, and answer 403 to all others.
    """
    bench.issue("mallory", like="client", common_name="mallory")
    return meet(bench.server(), bench.client("mallory"))


@experiment("one cert for all clients")
def shared(bench: Bench) -> Outcome:
    """Two clients, one certificate: the server cannot tell them apart, nor shut out only one.

    Cure: a certificate for each, with a name of its own: bash certs/gen_certs.sh client NAME
    """
    laptop = meet(bench.server(), bench.client("client"))
    phone = meet(bench.server(), bench.client("client"))
    return Outcome(f"{laptop.client}; {phone.client}", f"{laptop.server}; {phone.server}")


@experiment("key committed to git")
def committed_key(bench: Bench) -> Outcome:
    """``git rm`` takes the key out of the folder, not out of the history: who has a clone is that client.

    Cure: keep certs/*.key in .gitignore. Too late? Then issue a new key and trust the old one no more.
    """
    certs = bench.folder / "repository" / "certs"
    bench.git("init", "--quiet")
    certs.mkdir()
    shutil.copy(bench.folder / "client.crt", certs)
    shutil.copy(bench.folder / "client.key", certs)
    bench.git("add", "--all")
    bench.git("commit", "--quiet", "--message", "Add the lab")
    bench.git("rm", "--quiet", "-r", "certs")
    bench.git("commit", "--quiet", "--message", "Remove the key")

    for name in ("client.crt", "client.key"):
        (bench.folder / f"stolen-{name}").write_text(bench.git("show", f"HEAD~1:certs/{name}"))
    return meet(bench.server(), bench.client("stolen-client"))


# --- Whom to trust -------------------------------------------------------------------------


@contextlib.contextmanager
def foreign_ca_in_system_store(bench: Bench) -> Iterator[None]:
    """Within this, the system's store of CAs holds another CA than the lab's."""
    bench.make_ca("foreign-ca", common_name="Some Public CA")
    with mock.patch.dict(os.environ, SSL_CERT_FILE=str(bench.folder / "foreign-ca.crt")):
        yield


@experiment("client trusts the system's CAs")
def client_trusts_system(bench: Bench) -> Outcome:
    """Accepted: whoever has a certificate for this name from *any* CA in the store can be the server.

    Cure: load_verify_locations(cafile="certs/ca.crt") and nothing else.
    """
    with foreign_ca_in_system_store(bench):
        bench.issue("impostor", like="server", ca="foreign-ca")
        client = bench.client()
        client.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return meet(bench.server("impostor"), client)


@experiment("server trusts the system's CAs")
def server_trusts_system(bench: Bench) -> Outcome:
    """Accepted: *any* CA in the store can say who is mtls-client, not only yours.

    Cure: load_verify_locations(cafile="certs/ca.crt") and nothing else.
    """
    with foreign_ca_in_system_store(bench):
        bench.issue("impostor", like="client", ca="foreign-ca")
        server = bench.server()
        server.load_default_certs(ssl.Purpose.CLIENT_AUTH)
    return meet(server, bench.client("impostor"))


@experiment("client cert self-signed")
def self_signed(bench: Bench) -> Outcome:
    """Nobody the server trusts vouches for it: anyone can write mtls-client into a certificate.

    Cure: let the CA sign it.
    """
    bench.make_key("self")
    (bench.folder / "self.cnf").write_text(altered("client.cnf", "v3_client", {}), encoding="utf-8")
    bench.openssl("req", "-new", "-x509", "-days", "365", "-key", "self.key", "-out", "self.crt",
                  "-config", "self.cnf", "-extensions", "v3_client")
    return meet(bench.server(), bench.client("self"))


@experiment("CA made anew, old client cert")
def former_ca(bench: Bench) -> Outcome:
    """The new CA has the name of the old one, but another key: a name proves nothing.

    Each certificate says which key has signed it (authorityKeyIdentifier), so the server does not
    even try its own. Without that it would try, and say "certificate signature failure".
    Cure: issue the certificate again, with the CA that the server trusts.
    """
    bench.make_ca("former-ca")
    bench.issue("former", like="client", ca="former-ca")
    return meet(bench.server(), bench.client("former"))


# --- Dates ---------------------------------------------------------------------------------


@experiment("client cert expired")
def client_expired(bench: Bench) -> Outcome:
    """Its time is over, by the server's clock.

    Cure: issue a new one in time. openssl x509 -noout -dates -in FILE shows when that is.
    """
    bench.issue_dated("old", "client", "20200101", "20200102")
    return meet(bench.server(), bench.client("old"))


@experiment("client cert not yet valid")
def client_early(bench: Bench) -> Outcome:
    """Its time has not come, by the server's clock. Most often a clock is wrong.

    Note the alert: there is one for "expired", but none for this.
    Cure: set the clocks of the CA and the server.
    """
    bench.issue_dated("early", "client", "20480101", "20480102")
    return meet(bench.server(), bench.client("early"))


@experiment("server cert expired")
def server_expired(bench: Bench) -> Outcome:
    """The client refuses, by its own clock, before it sends any certificate or request.

    Cure: issue a new one in time, and restart the server: it reads its files when it starts.
    """
    bench.issue_dated("old", "server", "20200101", "20200102")
    return meet(bench.server("old"), bench.client())


# --- Setup ---------------------------------------------------------------------------------


@experiment("key of another certificate")
def wrong_key(bench: Bench) -> Outcome:
    """The key is not the one in the certificate. Both Python and OpenSSL look before they connect.

    Cure: give the two files that were made together; openssl x509 -noout -pubkey -in CERT and
    openssl pkey -pubout -in KEY print the same for them.
    """
    context = bench.client(certificate=None)
    try:
        context.load_cert_chain(bench.folder / "client.crt", bench.folder / "server.key")
    except ssl.SSLError as error:
        return Outcome(in_words(error), NOTHING)
    return meet(bench.server(), context)


@experiment("TLS 1.1 only")
def old_protocol(bench: Bench) -> Outcome:
    """TLS 1.0 and 1.1 are deprecated (RFC 8996), and this server's minimum is 1.2.

    OpenSSL itself offers TLS 1.1 only at security level 0, hence @SECLEVEL; Python warns.
    Cure: an up-to-date client.
    """
    if not ssl.HAS_TLSv1_1:
        raise Missing("this OpenSSL has no TLS 1.1")
    client = bench.client()
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client.minimum_version = ssl.TLSVersion.TLSv1_1
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    return meet(bench.server(), client)


# --- All of them ---------------------------------------------------------------------------


def row(title: str, client: str, server: str) -> str:
    """One line of the list. A long message pushes the rest to the right."""
    return f"{title:<31} | {client:<38} | {server}"


def main() -> int:
    """Run all experiments and print a line for each."""
    try:
        with tempfile.TemporaryDirectory(prefix="mtls mistakes ") as folder:
            bench = Bench(Path(folder))
            print(row("what you do wrong", "what the client saw", "what the server saw"), flush=True)
            for one in EXPERIMENTS:
                try:
                    outcome = one.run(bench)
                    print(row(one.title, outcome.client, outcome.server), flush=True)
                except Missing as missing:
                    print(row(one.title, f"not run: {missing}", NOTHING), flush=True)
    except subprocess.CalledProcessError as error:
        print(f"mistakes: {' '.join(error.cmd)} failed:\n{error.output}", file=sys.stderr)
        return 1
    except BrokenPipeError:   # the reader has left, as in "... | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Missing, OSError, RuntimeError) as error:
        print(f"mistakes: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
