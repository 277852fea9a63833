"""The mistakes people make with mTLS, each one an experiment: python3 -m tests.mistakes [WORD...]

Each experiment makes one mistake with real certificates, connects a client to a server over
loopback, and prints what each of them saw, why, and the cure. The certificates are made from the
lab's own certs/*.cnf, with one setting changed, in a temporary folder that is removed at the end.

Read an experiment's title (what you do wrong), its docstring (the why and the cure that it
prints), and its code. The code that all of them use comes first: certificates, then connections.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30.0
"""Seconds after which a side gives up waiting for the other. Only a bug in this file makes it wait that long."""


class Missing(Exception):
    """An experiment needs something that this machine does not have."""


# --- Certificates --------------------------------------------------------------------------


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed. Raises CalledProcessError with that if it fails."""
    if not shutil.which(command[0]):
        raise Missing(f"the {command[0]} command is missing")
    result = subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=True)
    return result.stdout


Changes = dict[str, str | None]
"""New values for the settings of one section of a configuration; None: without this setting."""


def altered(config: str, section: str, changes: Changes) -> str:
    """The text of a configuration with some settings of one section changed, added or left out.

    Raises RuntimeError if the section, or a setting to leave out, is missing: then certs/*.cnf
    has changed, and the experiment would no longer make its mistake.
    """
    lines = []
    missing = {f"[ {section} ]"} | {setting for setting, value in changes.items() if value is None}
    within = ""
    for line in config.splitlines():
        setting = line.partition("=")[0].strip()
        if line.startswith("["):
            within = line.strip("[] ")
        elif within == section and setting in changes:
            missing.discard(setting)
            continue
        lines.append(line)
        if line == f"[ {section} ]":
            missing.discard(line)
            lines += [f"{name} = {value}" for name, value in changes.items() if value is not None]
    if missing:
        raise RuntimeError(f"the configuration has no {', '.join(sorted(missing))}")
    return "\n".join(lines) + "\n"


OPENSSL_CA = """[ ca ]
default_ca = bench
[ bench ]
database = database
serial = serial
new_certs_dir = .
unique_subject = no
default_md = sha256
default_days = 365
policy = names
[ names ]
commonName = optional
organizationName = optional
"""
"""For ``openssl ca``: unlike ``openssl x509 -req`` it takes dates in all versions, and makes CRLs."""

PAST = ("-startdate", "20200101000000Z", "-enddate", "20200102000000Z")
FUTURE = ("-startdate", "20480101000000Z", "-enddate", "20480102000000Z")


class Bench:
    """A folder of certificates to experiment with: a good CA, server and client to begin with.

    A certificate called NAME is NAME.crt, and its key is NAME.key: a P-256 key unless an experiment
    needs another, because these take no time to make. Methods that make something return its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("openssl-ca.cnf", OPENSSL_CA)
        self.write("database", "")
        self.write("serial", "01\n")
        self.make_ca("ca")
        self.issue("server", like="server")
        self.issue("client", like="client")

    def write(self, name: str, text: str) -> None:
        """Write a file into the folder."""
        (self.folder / name).write_text(text, encoding="utf-8", newline="\n")

    def openssl(self, *arguments: str) -> str:
        """Run openssl in the folder."""
        return run(["openssl", *arguments], self.folder)

    def openssl_ca(self, ca: str, *arguments: str) -> str:
        """Run ``openssl ca`` as that CA."""
        return self.openssl("ca", "-batch", "-config", "openssl-ca.cnf", "-cert", f"{ca}.crt", "-keyfile", f"{ca}.key",
                            *arguments)

    def prepare(self, name: str, like: str, subject: Changes | None, changes: Changes,
                rsa_bits: int | None = None) -> None:
        """Make NAME.key, and NAME.cnf from certs/LIKE.cnf with changes to its [ dn ] and its [ v3_LIKE ]."""
        config = (ROOT / "certs" / f"{like}.cnf").read_text(encoding="utf-8")
        # In the file, not with -subj: LibreSSL ignores that where the file says "prompt = no".
        self.write(f"{name}.cnf", altered(altered(config, "dn", subject or {}), f"v3_{like}", changes))
        if rsa_bits:
            self.openssl("genrsa", "-out", f"{name}.key", str(rsa_bits))
        else:
            self.openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")

    def make_self_signed(self, name: str, like: str, subject: Changes | None = None,
                         **changes: str | None) -> str:
        """Make a certificate from certs/LIKE.cnf with changes, signed with its own key."""
        self.prepare(name, like, subject, changes)
        self.openssl("req", "-new", "-x509", "-days", "3650", "-key", f"{name}.key", "-out", f"{name}.crt",
                     "-config", f"{name}.cnf", "-extensions", f"v3_{like}")
        return name

    def make_ca(self, name: str, subject: Changes | None = None, **changes: str | None) -> str:
        """Make a CA from certs/ca.cnf with changes."""
        return self.make_self_signed(name, "ca", subject, **changes)

    def make_request(self, name: str, like: str, subject: Changes | None = None,
                     rsa_bits: int | None = None, **changes: str | None) -> str:
        """Make a key and NAME.csr."""
        self.prepare(name, like, subject, changes, rsa_bits)
        self.openssl("req", "-new", "-key", f"{name}.key", "-out", f"{name}.csr", "-config", f"{name}.cnf")
        return name

    def sign(self, name: str, like: str, ca: str = "ca", options: tuple[str, ...] = ()) -> str:
        """Make NAME.crt from NAME.csr and the [ v3_LIKE ] of NAME.cnf; ``options`` are those of ``openssl ca``."""
        self.openssl_ca(ca, "-notext", "-in", f"{name}.csr", "-out", f"{name}.crt", "-extensions", f"v3_{like}",
                        "-extfile", f"{name}.cnf", *options)
        return name

    def issue(self, name: str, like: str, ca: str = "ca", options: tuple[str, ...] = (),
              subject: Changes | None = None, **changes: str | None) -> str:
        """Make a certificate from certs/LIKE.cnf with changes: `make_request`, then `sign`."""
        self.make_request(name, like, subject, rsa_bits=None, **changes)
        return self.sign(name, like, ca, options)

    def load(self, context: ssl.SSLContext, certificate: str) -> None:
        """Load a certificate and its key into a context."""
        context.load_cert_chain(self.folder / f"{certificate}.crt", self.folder / f"{certificate}.key")

    def server(self, certificate: str = "server", trust: str = "ca") -> ssl.SSLContext:
        """A server's TLS settings, as in server/server.py."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(self.folder / f"{trust}.crt")
        self.load(context, certificate)
        return context

    def client(self, certificate: str | None = "client", trust: str = "ca") -> ssl.SSLContext:
        """A client's TLS settings: Python's defaults. None: without a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.folder / f"{trust}.crt")
        if certificate is not None:
            self.load(context, certificate)
        return context

    def git(self, *arguments: str) -> str:
        """Run git in the folder's repository/, without your own git settings."""
        repository = self.folder / "repository"
        repository.mkdir(exist_ok=True)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "XDG_"))}
        variables |= {"HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1"}
        return run(["git", "-c", "user.name=Alice", "-c", "user.email=alice@localhost", *arguments],
                   repository, variables)


# --- Connections ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What each side saw."""

    client: str
    server: str


NOTHING = "nothing"
"""What a side saw if the other never connected."""


def in_words(error: OSError) -> str:
    """OpenSSL's words for a failure, without what Python adds to them.

    What comes before "alert" is left out: it depends on OpenSSL's version ("sslv3 alert bad
    certificate" in 3.0, "ssl/tls alert bad certificate" in 3.5), not on the connection's.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        words = error.reason.replace("_", " ").lower()
        return words[max(0, words.find("alert ")):]
    return str(error)


def name_in(certificate: Any) -> str:
    """The common name in what getpeercert() returned, in quotes if it begins or ends with a space."""
    subject = dict(field[0] for field in certificate["subject"]) if certificate else {}
    name = str(subject.get("commonName", "nobody"))
    return name if name == name.strip() else f'"{name}"'


def close(side: ssl.SSLSocket) -> None:
    """Lingering close: stop sending, then read until the other side has closed, too.

    Closing at once while the other side is still sending would reset the connection, and the alert
    that says why would be lost.
    """
    try:
        side.shutdown(socket.SHUT_WR)   # from here on, Python reads the plain bytes
        while side.recv(4096):
            pass
    except OSError:
        pass   # the other side has already closed


def serve(listener: socket.socket, context: ssl.SSLContext, name_of: Callable[[Any], str], seen: list[str]) -> None:
    """Accept one client, answer with the name in its certificate, and append what was seen to ``seen``."""
    connection, _ = listener.accept()
    connection.settimeout(PATIENCE)
    with context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False) as side:
        try:
            side.do_handshake()
            side.recv(4096)   # the request
            name = name_of(side.getpeercert())
            body = f"hello, {name}"
            side.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
            seen.append(f"{name}'s request")
        except OSError as error:
            seen.append(in_words(error))
        close(side)


def ask(context: ssl.SSLContext, host: str, port: int) -> str:
    """Send a request to https://HOST:PORT. Returns the answer, or the error."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    with context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False) as side:
        try:
            side.do_handshake()
            side.sendall(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            # In TLS 1.3 the client has finished before the server has seen its certificate:
            # it learns of a refusal only now, on its first read.
            seen = side.recv(4096).decode().partition("\r\n\r\n")[2]
        except OSError as error:
            seen = in_words(error)
        close(side)
        return seen


def meet(server: ssl.SSLContext, client: ssl.SSLContext | Callable[[int], str], host: str = "localhost",
         name_of: Callable[[Any], str] = name_in) -> Outcome:
    """Connect a client to a server over loopback. A client that is a function is called with the port.

    ``name_of`` takes the client's name out of what the server's getpeercert() returned.
    """
    seen_by_server: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        port = listener.getsockname()[1]
        thread = threading.Thread(target=serve, args=(listener, server, name_of, seen_by_server))
        thread.start()
        try:
            seen_by_client = ask(client, host, port) if isinstance(client, ssl.SSLContext) else client(port)
        finally:
            thread.join()
    return Outcome(seen_by_client, seen_by_server[0])


# --- The list of experiments ---------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """One mistake: its group, what you do wrong in a few words, and the function that does it."""

    group: str
    title: str
    run: Callable[[Bench], Outcome]

    def explanation(self) -> tuple[str, str]:
        """Why the sides saw what they saw, and the cure: the function's docstring."""
        why, _, cure = " ".join((self.run.__doc__ or "").split()).partition(" Cure: ")
        return why, cure


EXPERIMENTS: list[Experiment] = []
"""All of them, in the order of this file, group by group."""


def experiment(group: str, title: str) -> Callable[[Callable[[Bench], Outcome]], Callable[[Bench], Outcome]]:
    """Decorator: add the function to `EXPERIMENTS`."""

    def register(run: Callable[[Bench], Outcome]) -> Callable[[Bench], Outcome]:
        EXPERIMENTS.append(Experiment(group, title, run))
        return run

    return register


def in_turn(*outcomes: Outcome) -> Outcome:
    """Several attempts, one after the other, as one outcome."""
    return Outcome("; ".join(one.client for one in outcomes), "; ".join(one.server for one in outcomes))


# --- Handshake -----------------------------------------------------------------------------


@experiment("handshake", "nothing: the lab as it is")
def as_it_is(bench: Bench) -> Outcome:
    """Each side has proved who it is.

    Cure: None needed. Every other experiment differs from this in one thing.
    """
    return meet(bench.server(), bench.client())


@experiment("handshake", "no client certificate")
def no_certificate(bench: Bench) -> Outcome:
    """The server demands one (CERT_REQUIRED). In TLS 1.3 the client learns of the refusal on its first read.

    Cure: load_cert_chain() on the client.
    """
    return meet(bench.server(), bench.client(certificate=None))


@experiment("handshake", "no client certificate, TLS 1.2")
def no_certificate_in_tls12(bench: Bench) -> Outcome:
    """The same, but TLS 1.2 has no specific alert for it.

    Cure: load_cert_chain() on the client.
    """
    client = bench.client(certificate=None)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    return meet(bench.server(), client)


@experiment("handshake", "CERT_OPTIONAL")
def optional(bench: Bench) -> Outcome:
    """The server asks for a certificate but lets in clients that have none. getpeercert() is None.

    Cure: verify_mode = ssl.CERT_REQUIRED.
    """
    server = bench.server()
    server.verify_mode = ssl.CERT_OPTIONAL
    return meet(server, bench.client(certificate=None))


@experiment("handshake", "TLS 1.1 only")
def old_protocol(bench: Bench) -> Outcome:
    """TLS 1.0 and 1.1 are deprecated (RFC 8996). The server's minimum is 1.2.

    Cure: Use an up-to-date client.
    """
    if not ssl.HAS_TLSv1_1:
        raise Missing("this OpenSSL has no TLS 1.1")
    client = bench.client()
    client.set_ciphers("DEFAULT:@SECLEVEL=0")   # OpenSSL does not offer TLS 1.1 otherwise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        client.minimum_version = ssl.TLSVersion.TLSv1_1
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    return meet(bench.server(), client)


# --- Names and SAN -------------------------------------------------------------------------


def server_without_san(bench: Bench) -> ssl.SSLContext:
    """A server whose certificate has a CN and no SAN."""
    return bench.server(bench.issue("nameless", like="server", subjectAltName=None))


@experiment("names and SAN", "no SAN, https://127.0.0.1")
def no_san_address(bench: Bench) -> Outcome:
    """The client looks for the address in the SAN. The CN is not compared with an address.

    Cure: subjectAltName with IP:127.0.0.1.
    """
    return meet(server_without_san(bench), bench.client(), "127.0.0.1")


@experiment("names and SAN", "no SAN, https://localhost")
def no_san_name(bench: Bench) -> Outcome:
    """Accepted: Python's default falls back to the CN (deprecated since 2000, RFC 2818). Go and browsers refuse it.

    Cure: subjectAltName with DNS:localhost.
    """
    return meet(server_without_san(bench), bench.client(), "localhost")


@experiment("names and SAN", "no SAN, localhost, CN ignored")
def no_san_name_strict(bench: Bench) -> Outcome:
    """With hostname_checks_common_name = False, as in the lab's client, only the SAN counts.

    Cure: subjectAltName with DNS:localhost.
    """
    client = bench.client()
    client.hostname_checks_common_name = False
    return meet(server_without_san(bench), client, "localhost")


@experiment("names and SAN", "no SAN, https://localhost, curl")
def no_san_curl(bench: Bench) -> Outcome:
    """Accepted: a curl with OpenSSL falls back to the CN, too. One with another TLS library may not.

    Cure: subjectAltName with DNS:localhost.
    """
    if not shutil.which("curl"):
        raise Missing("the curl command is missing")

    def curl(port: int) -> str:
        try:
            return run(["curl", "--silent", "--show-error", "--noproxy", "*",
                        "--resolve", f"localhost:{port}:127.0.0.1", "--cacert", "ca.crt",
                        "--cert", "client.crt", "--key", "client.key", f"https://localhost:{port}"], bench.folder)
        except subprocess.CalledProcessError as error:
            return str(error.output).partition("\n")[0]

    return meet(server_without_san(bench), curl)


@experiment("names and SAN", "SAN in the request only")
def san_not_signed(bench: Bench) -> Outcome:
    """The CA decides what it signs: openssl x509 -req copies no extension from the CSR, and does not warn.

    Cure: Sign with -extensions v3_server -extfile certs/server.cnf.
    """
    bench.make_request("request", like="server")
    bench.openssl("x509", "-req", "-sha256", "-days", "365", "-in", "request.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
                  "-CAcreateserial", "-out", "request.crt")
    return meet(bench.server("request"), bench.client(), "127.0.0.1")


def uri_in(certificate: Any) -> str:
    """The URI in the SAN of what getpeercert() returned. SPIFFE allows only one."""
    return str(dict(certificate["subjectAltName"])["URI"])


@experiment("names and SAN", "client name in the SAN, no CN")
def spiffe(bench: Bench) -> Outcome:
    """The handshake succeeds, but a server that looks only at the CN sees nobody. The second server reads the SAN.

    Cure: Take the name from where your CA puts it: the URI in subjectAltName.
    """
    bench.issue("spiffe", like="client", subject={"CN": None, "O": "mTLS Lab"},
                subjectAltName="URI:spiffe://lab/mtls-client")
    return in_turn(meet(bench.server(), bench.client("spiffe")),
                   meet(bench.server(), bench.client("spiffe"), name_of=uri_in))


@experiment("names and SAN", "CN in capitals, CN with a space")
def similar_names(bench: Bench) -> Outcome:
    """The handshake succeeds: TLS does not check a client's name. Neither of these two is mtls-client.

    Cure: Compare exactly. With lower() or strip(), one of them would pass for mtls-client.
    """
    bench.issue("capitals", like="client", subject={"CN": "MTLS-Client"})
    bench.issue("space", like="client", subject={"CN": '"mtls-client "'})
    return in_turn(meet(bench.server(), bench.client("capitals")), meet(bench.server(), bench.client("space")))


# --- Purpose -------------------------------------------------------------------------------


@experiment("purpose", "server cert without an EKU")
def server_without_eku(bench: Bench) -> Outcome:
    """Accepted: no EKU means any purpose. Apple's systems demand serverAuth.

    Cure: extendedKeyUsage = serverAuth.
    """
    return meet(bench.server(bench.issue("odd", like="server", extendedKeyUsage=None)), bench.client())


@experiment("purpose", "server cert with clientAuth")
def server_with_client_eku(bench: Bench) -> Outcome:
    """The certificate is for clients. This check keeps a client from posing as the server.

    Cure: extendedKeyUsage = serverAuth.
    """
    return meet(bench.server(bench.issue("odd", like="server", extendedKeyUsage="clientAuth")), bench.client())


@experiment("purpose", "client cert without an EKU")
def client_without_eku(bench: Bench) -> Outcome:
    """Accepted: no EKU means any purpose.

    Cure: extendedKeyUsage = clientAuth.
    """
    return meet(bench.server(), bench.client(bench.issue("odd", like="client", extendedKeyUsage=None)))


@experiment("purpose", "client cert with serverAuth")
def client_with_server_eku(bench: Bench) -> Outcome:
    """The certificate is for servers.

    Cure: extendedKeyUsage = clientAuth.
    """
    return meet(bench.server(), bench.client(bench.issue("odd", like="client", extendedKeyUsage="serverAuth")))


# --- CA and chain --------------------------------------------------------------------------


def with_ca(bench: Bench, flags: ssl.VerifyFlags, basic_constraints: str | None) -> Outcome:
    """Both sides use certificates from, and trust, a CA with other basicConstraints."""
    bench.make_ca("odd-ca", basicConstraints=basic_constraints)
    client = bench.client(bench.issue("odd-client", like="client", ca="odd-ca"), trust="odd-ca")
    client.verify_flags |= flags
    return meet(bench.server(bench.issue("odd-server", like="server", ca="odd-ca"), trust="odd-ca"), client)


@experiment("CA and chain", "CA without basicConstraints")
def ca_without_constraints(bench: Bench) -> Outcome:
    """Accepted: keyCertSign is enough for OpenSSL's default check. Go refuses it.

    Cure: basicConstraints = critical, CA:true.
    """
    return with_ca(bench, ssl.VerifyFlags(0), None)


@experiment("CA and chain", "CA without constraints, strict")
def ca_without_constraints_strict(bench: Bench) -> Outcome:
    """A strict client insists on basicConstraints. ssl.create_default_context() has been strict since Python 3.13.

    Cure: basicConstraints = critical, CA:true.
    """
    return with_ca(bench, ssl.VERIFY_X509_STRICT, None)


@experiment("CA and chain", "CA with CA:false")
def ca_that_says_no(bench: Bench) -> Outcome:
    """The certificate says that it is not a CA, so nothing that it signs is accepted.

    Cure: basicConstraints = critical, CA:true.
    """
    return with_ca(bench, ssl.VerifyFlags(0), "critical, CA:false")


@experiment("CA and chain", "CA replaced, old client cert")
def former_ca(bench: Bench) -> Outcome:
    """The new CA has the same name as the old one but a different key, and only the key counts.

    Cure: Issue the certificate again, from the CA that the server trusts.
    """
    # Each certificate names the key that signed it (authorityKeyIdentifier), so the server does not
    # even try its own CA's key. Otherwise it would, and report "certificate signature failure".
    return meet(bench.server(), bench.client(bench.issue("former", like="client", ca=bench.make_ca("former-ca"))))


def client_of_intermediate_ca(bench: Bench, root: str, *, chain_sent: bool) -> Outcome:
    """The root, which the server trusts, has signed an intermediate CA, and that the client's certificate."""
    bench.issue("middle-ca", like="ca", ca=root, subject={"CN": "mTLS Lab Intermediate CA"})
    bench.issue("leaf", like="client", ca="middle-ca")
    if chain_sent:
        chain = [(bench.folder / f"{name}.crt").read_text(encoding="utf-8") for name in ("leaf", "middle-ca")]
        bench.write("leaf.crt", "".join(chain))
    return meet(bench.server(trust=root), bench.client("leaf"))


@experiment("CA and chain", "intermediate CA, chain not sent")
def chain_not_sent(bench: Bench) -> Outcome:
    """The server knows only the root. The client has to send the intermediate CA's certificate along with its own.

    Cure: Append it to the client's file: cat client.crt intermediate.crt > chain.crt.
    """
    root = bench.make_ca("root-ca", basicConstraints="critical, CA:true")
    return client_of_intermediate_ca(bench, root, chain_sent=False)


@experiment("CA and chain", "intermediate CA, chain sent")
def chain_sent(bench: Bench) -> Outcome:
    """Nothing is wrong here: both certificates are in the file that the client loads.

    Cure: None needed. The server can follow the chain from the client to the root.
    """
    root = bench.make_ca("root-ca", basicConstraints="critical, CA:true")
    return client_of_intermediate_ca(bench, root, chain_sent=True)


@experiment("CA and chain", "intermediate CA below pathlen:0")
def below_pathlen_0(bench: Bench) -> Outcome:
    """pathlen:0 in the lab's CA allows no other CA below it. If it signs one by mistake, that one is useless.

    Cure: pathlen:1 in the root's basicConstraints, if you want intermediate CAs.
    """
    return client_of_intermediate_ca(bench, "ca", chain_sent=True)


# --- Time ----------------------------------------------------------------------------------


@experiment("time", "client cert expired")
def client_expired(bench: Bench) -> Outcome:
    """By the server's clock, its notAfter date has passed.

    Cure: Renew it in time: bash certs/gen_certs.sh renew. openssl x509 -noout -dates -in FILE shows the dates.
    """
    return meet(bench.server(), bench.client(bench.issue("old", like="client", options=PAST)))


@experiment("time", "client cert not yet valid")
def client_early(bench: Bench) -> Outcome:
    """Usually a clock is wrong. TLS has no alert for this, so the client sees a general one.

    Cure: Set the clocks of the CA and the server.
    """
    return meet(bench.server(), bench.client(bench.issue("early", like="client", options=FUTURE)))


@experiment("time", "server cert expired")
def server_expired(bench: Bench) -> Outcome:
    """The client checks it by its own clock, and refuses before it sends a certificate or a request.

    Cure: Renew it in time: bash certs/gen_certs.sh renew. The lab's server then loads it by itself.
    """
    return meet(bench.server(bench.issue("old", like="server", options=PAST)), bench.client())


@experiment("time", "client cert renewed, no restart")
def client_renewed(bench: Bench) -> Outcome:
    """The running server accepts the new one at once: it checks who signed a certificate, and keeps no list of them.

    Cure: None needed on the server. The client has to load the new file.
    """
    server = bench.server()
    before = meet(server, bench.client(bench.issue("renewed", like="client", options=PAST)))
    return in_turn(before, meet(server, bench.client(bench.issue("renewed", like="client"))))


@experiment("time", "server cert renewed, no restart")
def server_renewed(bench: Bench) -> Outcome:
    """A server with Python's ssl reads the file only when it starts, and does not notice a change. Before the second
    attempt, it calls load_cert_chain() again.

    Cure: Restart it. Or do as the lab's server does: check the files once a second, and load new ones into a new
    context.
    """
    server = bench.server(bench.issue("renewed", like="server", options=PAST))
    bench.issue("renewed", like="server")
    before = meet(server, bench.client())
    bench.load(server, "renewed")
    return in_turn(before, meet(server, bench.client()))


# --- Keys and secrets ----------------------------------------------------------------------


def load_and_meet(bench: Bench, client: ssl.SSLContext, certificate: str, key: str) -> Outcome:
    """The client's own load_cert_chain() fails, or the client connects with what it has loaded."""
    try:
        client.load_cert_chain(bench.folder / f"{certificate}.crt", bench.folder / f"{key}.key")
    except ssl.SSLError as error:
        return Outcome(in_words(error), NOTHING)
    return meet(bench.server(), client)


def usual_and_careless(bench: Bench, certificate: str) -> Outcome:
    """Two clients with this certificate: one with Python's defaults, and one that accepts any key and digest."""
    careless = bench.client(certificate=None)
    careless.set_ciphers("DEFAULT:@SECLEVEL=0")
    return in_turn(load_and_meet(bench, bench.client(certificate=None), certificate, certificate),
                   load_and_meet(bench, careless, certificate, certificate))


@experiment("keys and secrets", "key of another certificate")
def wrong_key(bench: Bench) -> Outcome:
    """The key does not match the certificate. load_cert_chain() fails before there is a connection.

    Cure: Use the two files that were made together.
    """
    return load_and_meet(bench, bench.client(certificate=None), "client", "server")


@experiment("keys and secrets", "RSA key of 1024 bits")
def short_key(bench: Bench) -> Outcome:
    """Python's default, OpenSSL's security level 2, requires 2048 bits. First the client's own load_cert_chain()
    refuses the key. Then a client at level 0 presents it, and the server refuses.

    Cure: 2048 bits or more, or a P-256 key.
    """
    bench.make_request("short", like="client", rsa_bits=1024)
    return usual_and_careless(bench, bench.sign("short", like="client"))


@experiment("keys and secrets", "SHA-1 signature")
def weak_digest(bench: Bench) -> Outcome:
    """SHA-1 is broken: the certificate may be forged. The two attempts are as with the short key. In OpenSSL 3.6.5,
    load_cert_chain() does not check this, so the server refuses both.

    Cure: Sign with -sha256. openssl x509 -noout -text -in FILE shows the algorithm.
    """
    try:
        bench.issue("sha1", like="client", options=("-md", "sha1"))
    except subprocess.CalledProcessError:   # some systems' settings forbid it
        raise Missing("this openssl does not sign with SHA-1") from None
    return usual_and_careless(bench, "sha1")


@experiment("keys and secrets", "one cert for all clients")
def shared(bench: Bench) -> Outcome:
    """The server cannot tell the two clients apart, or lock out just one of them.

    Cure: One certificate each: bash certs/gen_certs.sh client NAME.
    """
    return in_turn(meet(bench.server(), bench.client()), meet(bench.server(), bench.client()))


@experiment("keys and secrets", "key committed to git")
def committed_key(bench: Bench) -> Outcome:
    """After git rm, the key was recovered from the git history. Whoever has a clone can pose as that client.

    Cure: certs/*.key in .gitignore. Too late? Issue a new key, and stop trusting the old one.
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
        bench.write(f"stolen-{name}", bench.git("show", f"HEAD~1:certs/{name}"))
    return meet(bench.server(), bench.client("stolen-client"))


# --- Trust ---------------------------------------------------------------------------------


@experiment("trust", "client cert self-signed")
def self_signed(bench: Bench) -> Outcome:
    """No CA that the server trusts has signed it. Anyone can write mtls-client into a certificate.

    Cure: Let the CA sign it.
    """
    return meet(bench.server(), bench.client(bench.make_self_signed("self", like="client")))


@experiment("trust", "getpeercert() not checked")
def not_checked(bench: Bench) -> Outcome:
    """Every certificate from the CA passes the handshake. It proves who a client is, not what it may do.

    Cure: Compare the name with a list, and answer 403 if it is not there.
    """
    return meet(bench.server(), bench.client(bench.issue("mallory", like="client", subject={"CN": "mallory"})))


def load_system_cas(bench: Bench, context: ssl.SSLContext, purpose: ssl.Purpose) -> None:
    """Make a context trust the system's CAs; only while this runs, "foreign-ca" is the system's one CA."""
    bench.make_ca("foreign-ca", subject={"CN": "Some Public CA"})
    with mock.patch.dict(os.environ, SSL_CERT_FILE=str(bench.folder / "foreign-ca.crt")):
        context.load_default_certs(purpose)


@experiment("trust", "client trusts the system's CAs")
def client_trusts_system(bench: Bench) -> Outcome:
    """The client trusts an impostor: any CA in the system's store can issue a certificate for the server's name.

    Cure: load_verify_locations() with our own CA, and nothing else.
    """
    client = bench.client()
    load_system_cas(bench, client, ssl.Purpose.SERVER_AUTH)
    return meet(bench.server(bench.issue("impostor", like="server", ca="foreign-ca")), client)


@experiment("trust", "server trusts the system's CAs")
def server_trusts_system(bench: Bench) -> Outcome:
    """The server trusts an impostor: any CA in the system's store can issue a certificate for mtls-client.

    Cure: load_verify_locations() with our own CA, and nothing else.
    """
    server = bench.server()
    load_system_cas(bench, server, ssl.Purpose.CLIENT_AUTH)
    return meet(server, bench.client(bench.issue("impostor", like="client", ca="foreign-ca")))


def revoke_alice(bench: Bench, *lifetime: str) -> ssl.SSLContext:
    """Issue alice's certificate, revoke it, and make crl.pem. Returns a server that checks clients with it."""
    bench.issue("alice", like="client", subject={"CN": "alice"})
    bench.openssl_ca("ca", "-revoke", "alice.crt")
    bench.openssl_ca("ca", "-gencrl", *lifetime, "-out", "crl.pem")
    server = bench.server()
    server.load_verify_locations(bench.folder / "crl.pem")
    server.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return server


@experiment("trust", "client cert revoked, no CRL")
def revoked_without_crl(bench: Bench) -> Outcome:
    """alice's key was stolen, so the CA has revoked her certificate. The server does not know, and the thief gets in.

    Cure: Give the server the CA's list of revoked certificates (the CRL), as in the next experiment.
    """
    revoke_alice(bench, "-crldays", "7")
    return meet(bench.server(), bench.client("alice"))


@experiment("trust", "client cert revoked, CRL loaded")
def revoked_with_crl(bench: Bench) -> Outcome:
    """The CRL lists the certificates that the CA has revoked. alice's is on it, mtls-client's is not.

    Cure: openssl ca -revoke and -gencrl make it. On the server: load it with load_verify_locations(), and add
    ssl.VERIFY_CRL_CHECK_LEAF to verify_flags.
    """
    server = revoke_alice(bench, "-crldays", "7")
    return in_turn(meet(server, bench.client("alice")), meet(server, bench.client()))


@experiment("trust", "CRL expired, cert not revoked")
def crl_expired(bench: Bench) -> Outcome:
    """Everyone is refused: after its nextUpdate, the list may lack the latest revocations, so it is not accepted.

    Cure: Make and load a new CRL before that date, even if nothing was revoked.
    """
    server = revoke_alice(bench, "-crlsec", "1")   # only this makes an expired CRL in every version
    time.sleep(1.1)
    return meet(server, bench.client())


# --- All of them ---------------------------------------------------------------------------

LEGEND = """\
"hello, NAME": the client got in. "alert ...": what the other side said.
Anything else: that side's own error, in OpenSSL's words. "A; B": two attempts.
"""


def entry(one: Experiment, outcome: Outcome) -> str:
    """What is printed about an experiment, in lines of 80 columns."""
    why, cure = one.explanation()
    lines = [one.title]
    for label, text in (("client saw", outcome.client), ("server saw", outcome.server), ("why", why), ("cure", cure)):
        lines += textwrap.wrap(text, 80, initial_indent=f"  {label:<12}", subsequent_indent=" " * 14,
                               break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def chosen(words: list[str]) -> list[Experiment]:
    """The experiments with, for each of these words, a word in their group or title that begins with it."""
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}", re.IGNORECASE) for word in words]
    return [one for one in EXPERIMENTS if all(pattern.search(f"{one.group}, {one.title}") for pattern in patterns)]


def main() -> int:
    """Run the chosen experiments and print what each of them shows. Returns the exit code."""
    groups = ", ".join(dict.fromkeys(one.group for one in EXPERIMENTS))
    parser = argparse.ArgumentParser(prog="python3 -m tests.mistakes", epilog=f"groups: {groups}",
                                     description="The mistakes people make with mTLS, as experiments.")
    parser.add_argument("words", metavar="WORD", nargs="*",
                        help="run only those with these words in their title or group, as in: client expired")
    words = parser.parse_args().words
    experiments = chosen(words)
    if not experiments:
        print(f"mistakes: no experiment has {' '.join(words)!r} in title or group; groups: {groups}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="mtls mistakes ") as folder:
            bench = Bench(Path(folder))
            print(LEGEND, end="")
            group = ""
            for one in experiments:
                if one.group != group:
                    group = one.group
                    print(f"\n=== {group} ===")
                try:
                    outcome = one.run(bench)
                except Missing as missing:
                    outcome = Outcome(f"not run: {missing}", NOTHING)
                print(f"\n{entry(one, outcome)}", flush=True)
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
