"""The mistakes' outcomes as the README tells them, and what of a refused request is on the wire."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
import unittest
from pathlib import Path

from tests import mistakes
from tests.mistakes import Bench, Outcome, meet
from tests.support import (
    PATIENCE,
    ROOT,
    Answer,
    Lab,
    Server,
    environment,
    new_folder,
    openssl,
    request,
)

HELLO = ("hello, mtls-client", "mtls-client's request")

# What you do wrong: what the client saw, what the server saw.
EXPECTED = {
    "nothing: the lab as it is": HELLO,
    "no client certificate": ("alert certificate required", "peer did not return a certificate"),
    "no client certificate, TLS 1.2": ("alert handshake failure", "peer did not return a certificate"),
    "no SAN, https://127.0.0.1": ("IP address mismatch, certificate is not valid for '127.0.0.1'",
                                  "alert bad certificate"),
    "no SAN, https://localhost": HELLO,
    "no SAN, localhost, CN ignored": ("Hostname mismatch, certificate is not valid for 'localhost'",
                                      "alert bad certificate"),
    "no SAN, https://localhost, curl": HELLO,
    "SAN in the request only": ("IP address mismatch, certificate is not valid for '127.0.0.1'",
                                "alert bad certificate"),
    "server cert without an EKU": HELLO,
    "server cert with clientAuth": ("unsuitable certificate purpose", "alert unsupported certificate"),
    "client cert without an EKU": HELLO,
    "client cert with serverAuth": ("alert unsupported certificate", "unsuitable certificate purpose"),
    "CA without basicConstraints": HELLO,
    "CA without constraints, strict": ("invalid CA certificate", "alert unknown ca"),
    "CA with CA:false": ("invalid CA certificate", "alert unknown ca"),
    "CERT_OPTIONAL": ("hello, nobody", "nobody's request"),
    "getpeercert() not checked": ("hello, mallory", "mallory's request"),
    "one cert for all clients": ("hello, mtls-client; hello, mtls-client",
                                 "mtls-client's request; mtls-client's request"),
    "key committed to git": HELLO,
    "client trusts the system's CAs": HELLO,
    "server trusts the system's CAs": HELLO,
    "client cert self-signed": ("alert unknown ca", "self-signed certificate"),
    "CA made anew, old client cert": ("alert unknown ca", "unable to get local issuer certificate"),
    "client cert expired": ("alert certificate expired", "certificate has expired"),
    "client cert not yet valid": ("alert bad certificate", "certificate is not yet valid"),
    "server cert expired": ("certificate has expired", "alert certificate expired"),
    "key of another certificate": ("key values mismatch", "nothing"),
    "TLS 1.1 only": ("alert protocol version", "unsupported protocol"),
}


def in_words_of_this_openssl(text: str) -> str:
    """The text with OpenSSL 3.0's words replaced by those of this Python's OpenSSL, where they differ."""
    words = {}
    if ssl.OPENSSL_VERSION_INFO < (3,):
        words = {"unsuitable certificate purpose": "unsupported certificate purpose",
                 "self-signed certificate": "self signed certificate"}
    if ssl.OPENSSL_VERSION_INFO >= (3, 6):
        words = {"certificate is not yet valid": "certificate is not yet valid or the system clock is incorrect"}
    for usual, here in words.items():
        text = text.replace(usual, here)
    return text


def expected(title: str) -> Outcome:
    """The expectation, in the words of this Python's OpenSSL."""
    client, server = EXPECTED[title]
    return Outcome(in_words_of_this_openssl(client), in_words_of_this_openssl(server))


def curl_falls_back() -> bool:
    """Whether there is a curl, and one with OpenSSL: only of this do we tell what it does."""
    curl = shutil.which("curl")
    return bool(curl) and " OpenSSL/" in subprocess.run([str(curl), "--version"], capture_output=True, text=True,
                                                        stdin=subprocess.DEVNULL, check=False).stdout


bench: Bench
"""One set of good certificates for all tests. Experiments add files of their own to it."""


def setUpModule() -> None:
    global bench
    bench = Bench(new_folder("bench"))


class ExperimentsTest(unittest.TestCase):
    """Each experiment sees what the README says."""

    maxDiff = None

    def test_outcomes(self) -> None:
        for experiment in mistakes.EXPERIMENTS:
            with self.subTest(experiment.title):
                if experiment.run is mistakes.no_san_curl and not curl_falls_back():
                    self.skipTest("no curl with OpenSSL here")
                try:
                    self.assertEqual(experiment.run(bench), expected(experiment.title))
                except mistakes.Missing as missing:
                    self.skipTest(str(missing))

    def test_every_experiment_is_expected_and_explained(self) -> None:
        self.assertEqual([experiment.title for experiment in mistakes.EXPERIMENTS], list(EXPECTED))
        for experiment in mistakes.EXPERIMENTS[1:]:
            with self.subTest(experiment.title):
                line = mistakes.row(experiment.title, *EXPECTED[experiment.title])
                self.assertLessEqual(len(line), 120, "wraps in a terminal")
                self.assertIn("Cure: ", experiment.run.__doc__ or "")

    def test_a_setting_that_is_not_in_the_configuration_cannot_be_changed(self) -> None:
        # Else an experiment would go on without its mistake when certs/*.cnf changes.
        with self.assertRaisesRegex(RuntimeError, r"certs/server\.cnf has no nameConstraints in \[ v3_server \]"):
            bench.issue("odd", like="server", nameConstraints=None)


    def test_python_s_default_context_is_strict_since_3_13(self) -> None:
        bench.make_ca("odd-ca", basicConstraints=None)
        bench.issue("odd-server", like="server", ca="odd-ca")
        client = ssl.create_default_context(cafile=bench.folder / "odd-ca.crt")
        client.load_cert_chain(bench.folder / "client.crt", bench.folder / "client.key")
        refused = Outcome("invalid CA certificate", "alert unknown ca")
        self.assertEqual(meet(bench.server("odd-server"), client),
                         refused if sys.version_info >= (3, 13) else Outcome(*HELLO))


class CommandTest(unittest.TestCase):
    """``python3 -m tests.mistakes``, as the README has it."""

    maxDiff = None

    def run_it(self, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-B", "-W", "error", "-m", "tests.mistakes"], cwd=ROOT, text=True,
                              env=environment({"TMPDIR": str(folder), **variables}), stdin=subprocess.DEVNULL,
                              capture_output=True, check=False, timeout=PATIENCE * 2)

    def test_prints_a_line_for_each_experiment(self) -> None:
        folder = new_folder("tmp")
        result = self.run_it(folder)
        self.assertEqual((result.stderr, result.returncode), ("", 0))
        header, *lines = result.stdout.splitlines()
        self.assertEqual([cell.strip() for cell in header.split(" | ")],
                         ["what you do wrong", "what the client saw", "what the server saw"])
        self.assertEqual(len(lines), len(EXPECTED))
        for line, title in zip(lines, EXPECTED):
            with self.subTest(title):
                if " | not run: " in line or (title.endswith("curl") and not curl_falls_back()):
                    self.skipTest(line)
                self.assertEqual(line, mistakes.row(title, expected(title).client, expected(title).server))
        self.assertEqual(list(folder.iterdir()), [], "left something behind")

    def test_without_openssl_says_so_in_one_line(self) -> None:
        folder = new_folder("tmp")
        result = self.run_it(folder, PATH=str(folder))
        self.assertEqual((result.stdout, result.stderr, result.returncode),
                         ("", "mistakes: the openssl command is missing\n", 1))


class CuresTest(unittest.TestCase):
    """What keeps some of the mistakes from happening. The server's own tests show the others."""

    def test_the_request_asks_for_a_san_and_an_eku_that_the_certificate_lacks(self) -> None:
        mistakes.san_not_signed(bench)
        asked = openssl("req", "-in", bench.folder / "request.csr", "-noout", "-text")
        signed = openssl("x509", "-in", bench.folder / "request.crt", "-noout", "-text")
        for wanted in ("DNS:localhost, IP Address:127.0.0.1", "TLS Web Server Authentication"):
            self.assertIn(wanted, asked)
            self.assertNotIn(wanted, signed)

    def test_with_the_lab_s_ca_only_an_impostor_is_refused(self) -> None:
        with mistakes.foreign_ca_in_system_store(bench):
            bench.issue("false-server", like="server", ca="foreign-ca")
            bench.issue("false-client", like="client", ca="foreign-ca")
            self.assertEqual(meet(bench.server("false-server"), bench.client()),
                             Outcome("unable to get local issuer certificate", "alert unknown ca"))
            self.assertEqual(meet(bench.server(), bench.client("false-client")),
                             Outcome("alert unknown ca", "unable to get local issuer certificate"))

    def test_without_key_identifiers_the_signature_tells_two_cas_of_a_name_apart(self) -> None:
        bench.make_ca("former-ca")
        # OpenSSL 3 adds the identifier unasked, unless told not to; 1.1.1 knows no "none".
        none = "none" if openssl("version").startswith("OpenSSL 3") else None
        bench.issue("former", like="client", ca="former-ca", authorityKeyIdentifier=none)
        self.assertEqual(meet(bench.server(), bench.client("former")),
                         Outcome("alert decrypt error", "certificate signature failure"))

    def test_gitignore_keeps_all_that_the_script_makes_out_of_git(self) -> None:
        self.require_git()
        fresh = Bench(new_folder("git"))
        fresh.git("init", "--quiet")
        certs = fresh.folder / "repository" / "certs"
        (certs / ".new.a1b2c3").mkdir(parents=True)
        shutil.copy(ROOT / ".gitignore", certs.parent)
        for name in ("ca.cnf", "gen_certs.sh", "ca.key", "ca.crt", "ca.srl", "server.key", "server.csr", "server.crt",
                     "client.key", "client.pfx", "alice.key", "alice.pfx", ".new.a1b2c3/ca.key"):
            (certs / name).write_text(name)
        fresh.git("add", "--all")
        self.assertEqual(fresh.git("ls-files").splitlines(), [".gitignore", "certs/ca.cnf", "certs/gen_certs.sh"])

    def test_git_rm_leaves_the_key_in_the_history(self) -> None:
        self.require_git()
        fresh = Bench(new_folder("git"))
        mistakes.committed_key(fresh)
        self.assertEqual(fresh.git("ls-files"), "")
        self.assertEqual(list((fresh.folder / "repository").glob("certs/*")), [])
        self.assertEqual(fresh.git("show", "HEAD~1:certs/client.key"), (fresh.folder / "client.key").read_text())

    def require_git(self) -> None:
        if not shutil.which("git"):
            self.skipTest("no git here")


REQUEST = request("POST", "/todo", b'{"task": "stolen"}')
APPLICATION_DATA = 23   # the content type of a TLS record (RFC 8446 section 5.1)


def record_types(data: bytes) -> list[int]:
    """The content types of the TLS records in what was sent."""
    types = []
    while data:
        types.append(data[0])
        data = data[5 + int.from_bytes(data[3:5], "big"):]
    return types


class Wire:
    """A client and a server in memory. What the client sends waits until the server is let to read it."""

    def __init__(self, version: ssl.TLSVersion, certificate: str | None) -> None:
        self.to_server = ssl.MemoryBIO()
        to_client = ssl.MemoryBIO()
        context = bench.client(certificate)
        context.maximum_version = version
        self.client = context.wrap_bio(to_client, self.to_server, server_hostname="localhost")
        self.server = bench.server().wrap_bio(self.to_server, to_client, server_side=True)

    def take(self) -> bytes:
        """Look at what is on its way to the server, and send it on."""
        data = self.to_server.read()
        self.to_server.write(data)
        return data

    def until_it_waits(self, side: ssl.SSLObject) -> None:
        """Go on with a side's handshake until it needs to hear from the other."""
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            return
        raise AssertionError("the handshake is complete")


class WireTest(unittest.TestCase):
    """A request without a client certificate: in TLS 1.3 it travels in vain, in TLS 1.2 it does not leave."""

    def test_tls13_request_travels_encrypted_and_is_never_read(self) -> None:
        wire = Wire(ssl.TLSVersion.TLSv1_3, certificate=None)
        wire.until_it_waits(wire.client)    # ClientHello
        wire.until_it_waits(wire.server)    # ServerHello ... CertificateRequest ... Finished
        wire.client.do_handshake()          # an empty Certificate, Finished: for the client all is well
        self.assertEqual(wire.client.version(), "TLSv1.3")
        handshake = len(wire.take())
        wire.client.write(REQUEST)
        sent = wire.take()[handshake:]
        self.assertEqual(record_types(sent), [APPLICATION_DATA])
        self.assertGreater(len(sent), len(REQUEST))
        self.assertNotIn(b"stolen", sent)

        with self.assertRaises(ssl.SSLError) as refusal:
            wire.server.do_handshake()
        self.assertEqual(refusal.exception.reason, "PEER_DID_NOT_RETURN_A_CERTIFICATE")
        self.assertTrue(wire.take().endswith(sent), "the server has read the request")
        with self.assertRaises(ssl.SSLError) as news:
            wire.client.read(1)
        self.assertEqual(news.exception.reason, "TLSV13_ALERT_CERTIFICATE_REQUIRED")

    def test_tls12_request_is_not_sent(self) -> None:
        wire = Wire(ssl.TLSVersion.TLSv1_2, certificate=None)
        wire.until_it_waits(wire.client)    # ClientHello
        wire.until_it_waits(wire.server)    # ServerHello ... CertificateRequest, ServerHelloDone
        wire.until_it_waits(wire.client)    # an empty Certificate ... Finished: the server's is still to come
        sent = wire.take()
        with self.assertRaises(ssl.SSLWantReadError):
            wire.client.write(REQUEST)
        self.assertEqual(wire.take(), sent, "the client has sent more")
        self.assertNotIn(APPLICATION_DATA, record_types(sent))

        with self.assertRaises(ssl.SSLError) as refusal:
            wire.server.do_handshake()
        self.assertEqual(refusal.exception.reason, "PEER_DID_NOT_RETURN_A_CERTIFICATE")
        wire.to_server.read()
        with self.assertRaises(ssl.SSLError) as news:
            wire.client.do_handshake()
        self.assertEqual(news.exception.reason, "SSLV3_ALERT_HANDSHAKE_FAILURE")
        with self.assertRaises(ssl.SSLError):
            wire.client.write(REQUEST)
        self.assertNotIn(APPLICATION_DATA, record_types(wire.take()))

    def test_tls12_request_with_a_certificate_is_sent_after_the_handshake(self) -> None:
        # The counterpart: what would be seen if the request were sent.
        wire = Wire(ssl.TLSVersion.TLSv1_2, certificate="client")
        wire.until_it_waits(wire.client)
        wire.until_it_waits(wire.server)
        wire.until_it_waits(wire.client)
        wire.server.do_handshake()
        wire.client.do_handshake()
        wire.client.write(REQUEST)
        self.assertEqual(record_types(wire.take()), [APPLICATION_DATA])
        self.assertEqual(wire.server.read(4096), REQUEST)

    def test_the_lab_s_server_never_serves_it(self) -> None:
        of = Lab("wire")
        for name in ("ca.crt", "server.crt", "server.key", "client.crt", "client.key"):
            shutil.copy(bench.folder / name, of.certs)
        with Server(of) as server:
            with server.connect(None) as client:   # TLS 1.3: connected, as far as the client knows
                self.assertEqual(client.version(), "TLSv1.3")
                client.sendall(REQUEST)
                with self.assertRaises(ssl.SSLError) as news:
                    client.recv(1)
                self.assertEqual(news.exception.reason, "TLSV13_ALERT_CERTIFICATE_REQUIRED")
            with self.assertRaises(ssl.SSLError) as news:
                server.connect(context=of.context(None, maximum_version=ssl.TLSVersion.TLSv1_2))
            self.assertEqual(news.exception.reason, "SSLV3_ALERT_HANDSHAKE_FAILURE")
            with server.connect("client") as client:
                client.sendall(request("GET", "/todo"))
                self.assertNotIn("stolen", [item["task"] for item in Answer(client).json["todos"]])
            server.stderr.wait_for('"GET /todo HTTP/1.1" 200')
            self.assertFalse([line for line in server.stderr.now() if "POST" in line])


if __name__ == "__main__":
    unittest.main()
