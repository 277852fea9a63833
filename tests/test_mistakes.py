"""The mistakes' outcomes as the README tells them, and what of a refused request is on the wire."""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import subprocess
import sys
import unittest

from tests import mistakes
from tests import side_by_side as load_tests  # noqa: F401
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
NO_ADDRESS = ("IP address mismatch, certificate is not valid for '127.0.0.1'", "alert bad certificate")
NO_CA = ("invalid CA certificate", "alert unknown ca")
NO_ISSUER = ("alert unknown ca", "unable to get local issuer certificate")

# By group: what you do wrong, what the client saw, what the server saw.
EXPECTED = {
    "handshake": {
        "nothing: the lab as it is": HELLO,
        "no client certificate": ("alert certificate required", "peer did not return a certificate"),
        "no client certificate, TLS 1.2": ("alert handshake failure", "peer did not return a certificate"),
        "CERT_OPTIONAL": ("hello, nobody", "nobody's request"),
        "TLS 1.1 only": ("alert protocol version", "unsupported protocol"),
    },
    "names and SAN": {
        "no SAN, https://127.0.0.1": NO_ADDRESS,
        "no SAN, https://localhost": HELLO,
        "no SAN, localhost, CN ignored": ("Hostname mismatch, certificate is not valid for 'localhost'",
                                          "alert bad certificate"),
        "no SAN, https://localhost, curl": HELLO,
        "SAN in the request only": NO_ADDRESS,
        "client name in the SAN, no CN": ("hello, nobody; hello, spiffe://lab.example/mtls-client",
                                          "nobody's request; spiffe://lab.example/mtls-client's request"),
        "CN in capitals, CN with a space": ('hello, MTLS-Client; hello, "mtls-client "',
                                            'MTLS-Client\'s request; "mtls-client "\'s request'),
    },
    "purpose": {
        "server cert without an EKU": HELLO,
        "server cert with clientAuth": ("unsuitable certificate purpose", "alert unsupported certificate"),
        "client cert without an EKU": HELLO,
        "client cert with serverAuth": ("alert unsupported certificate", "unsuitable certificate purpose"),
    },
    "CA and chain": {
        "CA without basicConstraints": HELLO,
        "CA without constraints, strict": NO_CA,
        "CA with CA:false": NO_CA,
        "CA made anew, old client cert": NO_ISSUER,
        "intermediate CA, chain not sent": NO_ISSUER,
        "intermediate CA, chain sent": HELLO,
        "intermediate CA below pathlen:0": ("alert unknown ca", "path length constraint exceeded"),
    },
    "time": {
        "client cert expired": ("alert certificate expired", "certificate has expired"),
        "client cert not yet valid": ("alert bad certificate", "certificate is not yet valid"),
        "server cert expired": ("certificate has expired", "alert certificate expired"),
        "client cert renewed, server runs on": ("alert certificate expired; hello, mtls-client",
                                                "certificate has expired; mtls-client's request"),
        "server cert renewed, server runs on": ("certificate has expired; hello, mtls-client",
                                                "alert certificate expired; mtls-client's request"),
    },
    "keys and secrets": {
        "key of another certificate": ("key values mismatch", "nothing"),
        "RSA key of 1024 bits": ("ee key too small; alert bad certificate", "nothing; EE certificate key too weak"),
        "SHA-1 signature": ("ca md too weak; alert bad certificate",
                            "nothing; CA signature digest algorithm too weak"),
        "one cert for all clients": ("hello, mtls-client; hello, mtls-client",
                                     "mtls-client's request; mtls-client's request"),
        "key committed to git": HELLO,
    },
    "trust": {
        "client cert self-signed": ("alert unknown ca", "self-signed certificate"),
        "getpeercert() not checked": ("hello, mallory", "mallory's request"),
        "client trusts the system's CAs": HELLO,
        "server trusts the system's CAs": HELLO,
        "client cert revoked, no CRL": ("hello, alice", "alice's request"),
        "client cert revoked, CRL loaded": ("alert certificate revoked; hello, mtls-client",
                                            "certificate revoked; mtls-client's request"),
        "CRL expired, cert not revoked": ("alert certificate expired", "CRL has expired"),
    },
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


def expected(title: str) -> list[tuple[str, ...]]:
    """The outcomes that are right, in the words of this Python's OpenSSL."""
    outcomes: list[tuple[str, ...]] = [entries[title] for entries in EXPECTED.values() if title in entries]
    if title == "SHA-1 signature":   # OpenSSL 3.6.5 leaves what signed one's own certificate to the other side
        outcomes.append(("alert bad certificate; alert bad certificate",
                         "CA signature digest algorithm too weak; CA signature digest algorithm too weak"))
    return [tuple(map(in_words_of_this_openssl, outcome)) for outcome in outcomes]


def curl_falls_back() -> bool:
    """Whether there is a curl, and one with OpenSSL: only of this do we tell what it does."""
    curl = shutil.which("curl")
    return bool(curl) and " OpenSSL/" in subprocess.run([str(curl), "--version"], capture_output=True, text=True,
                                                        stdin=subprocess.DEVNULL, check=False).stdout


def parsed(output: str) -> dict[str, dict[str, dict[str, str]]]:
    """What the program printed: by group and title, the text of each label, its lines joined."""
    groups: dict[str, dict[str, dict[str, str]]] = {}
    group = label = ""
    for block in output.split("\n\n")[1:]:
        title, *lines = block.splitlines()
        if heading := re.fullmatch("=== (.+) ===", title):
            group = heading[1]
            groups[group] = {}
            continue
        entry = groups[group][title] = {}
        for line in lines:
            label = line[:14].strip() or label
            entry[label] = f"{entry.get(label, '')} {line[14:]}".strip()
    return groups


COMMAND = (sys.executable, "-B", "-W", "error", "-m", "tests.mistakes")
"""In a process of its own, because two experiments change the environment."""


class CommandTest(unittest.TestCase):
    """``python3 -m tests.mistakes``, as the README has it."""

    maxDiff = None
    seconds = 4

    def printed(self, *command: str, **variables: str) -> tuple[str, str, int]:
        """What it writes to stdout and stderr, and its exit code."""
        folder = new_folder("tmp")
        result = subprocess.run(command, cwd=ROOT, env=environment({"TMPDIR": str(folder), **variables}), text=True,
                                stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=PATIENCE * 2)
        self.assertEqual(list(folder.iterdir()), [], "left something behind")
        return result.stdout, result.stderr, result.returncode

    def test_each_experiment_sees_what_the_readme_says(self) -> None:
        stdout, *rest = self.printed(*COMMAND)
        self.assertEqual(rest, ["", 0])
        self.assertEqual([line for line in stdout.splitlines() if len(line) > 80], [], "wraps in a terminal")
        seen = parsed(stdout)
        self.assertEqual([(group, list(entries)) for group, entries in seen.items()],
                         [(group, list(entries)) for group, entries in EXPECTED.items()])
        for title, entry in (pair for entries in seen.values() for pair in entries.items()):
            with self.subTest(title):
                self.assertEqual([label for label, text in entry.items() if text],
                                 ["client saw", "server saw", "why", "cure"])
                client, server = entry["client saw"], entry["server saw"]
                if client.startswith("not run: ") or (title.endswith("curl") and not curl_falls_back()):
                    self.skipTest(client)
                self.assertIn((client, server), expected(title))

    def test_words_choose_by_what_begins_a_word_of_title_or_group(self) -> None:
        stdout, *rest = self.printed(*COMMAND, "ca", "NO")
        self.assertEqual(rest, ["", 0])
        self.assertEqual({group: list(entries) for group, entries in parsed(stdout).items()},
                         {"CA and chain": ["intermediate CA, chain not sent"]})

    def test_errors_are_one_line(self) -> None:
        groups = ", ".join(EXPECTED)
        self.assertEqual(self.printed(*COMMAND, "client", "xyz"), (
            "", f"mistakes: nothing has 'client xyz' in its title or group; groups: {groups}\n", 2))
        self.assertEqual(self.printed(*COMMAND, PATH="/none"), ("", "mistakes: the openssl command is missing\n", 1))

    def test_ends_in_silence_when_its_reader_has_left(self) -> None:
        stdout, *rest = self.printed("sh", "-c", '{ "$@"; echo $? >&2; } | head -n 1', "sh", *COMMAND)
        self.assertEqual((len(stdout.splitlines()), *rest), (1, "0\n", 0))


class BenchCase(unittest.TestCase):
    """Tests with a bench of their own."""

    bench: Bench

    @classmethod
    def setUpClass(cls) -> None:
        cls.bench = Bench(new_folder("bench"))


class CuresTest(BenchCase):
    """What keeps some of the mistakes from happening. The server's own tests show the others."""

    def test_a_setting_that_is_not_in_the_configuration_cannot_be_left_out(self) -> None:
        # Else an experiment would go on without its mistake when certs/*.cnf changes.
        with self.assertRaisesRegex(RuntimeError, "the configuration has no nameConstraints"):
            self.bench.issue("odd", like="server", nameConstraints=None)

    def test_python_s_default_context_is_strict_since_3_13(self) -> None:
        self.bench.make_ca("odd-ca", basicConstraints=None)
        self.bench.issue("odd-server", like="server", ca="odd-ca")
        client = ssl.create_default_context(cafile=self.bench.folder / "odd-ca.crt")
        self.bench.load(client, "client")
        self.assertEqual(meet(self.bench.server("odd-server"), client),
                         Outcome(*(NO_CA if sys.version_info >= (3, 13) else HELLO)))

    def test_the_request_asks_for_a_san_and_an_eku_that_the_certificate_lacks(self) -> None:
        mistakes.san_not_signed(self.bench)
        asked = openssl("req", "-in", self.bench.folder / "request.csr", "-noout", "-text")
        signed = openssl("x509", "-in", self.bench.folder / "request.crt", "-noout", "-text")
        for wanted in ("DNS:localhost, IP Address:127.0.0.1", "TLS Web Server Authentication"):
            self.assertIn(wanted, asked)
            self.assertNotIn(wanted, signed)

    def test_with_the_lab_s_ca_only_an_impostor_is_refused(self) -> None:
        self.bench.make_ca("foreign-ca", subject={"CN": "Some Public CA"})
        self.bench.issue("false-server", like="server", ca="foreign-ca")
        self.bench.issue("false-client", like="client", ca="foreign-ca")
        self.assertEqual(meet(self.bench.server("false-server"), self.bench.client()), Outcome(*reversed(NO_ISSUER)))
        self.assertEqual(meet(self.bench.server(), self.bench.client("false-client")), Outcome(*NO_ISSUER))

    def test_without_key_identifiers_the_signature_tells_two_cas_of_a_name_apart(self) -> None:
        self.bench.make_ca("former-ca")
        # OpenSSL 3 adds the identifier unasked, unless told not to; the others know no "none".
        none = "none" if openssl("version").startswith("OpenSSL 3") else None
        self.bench.issue("former", like="client", ca="former-ca", authorityKeyIdentifier=none)
        self.assertEqual(meet(self.bench.server(), self.bench.client("former")),
                         Outcome("alert decrypt error", "certificate signature failure"))

    @unittest.skipUnless(shutil.which("git"), "no git here")
    def test_git_forgets_no_key_and_gitignore_keeps_all_that_the_script_makes_out_of_it(self) -> None:
        mistakes.committed_key(self.bench)
        repository = self.bench.folder / "repository"
        self.assertEqual((self.bench.git("ls-files"), list(repository.glob("certs/*"))), ("", []))
        self.assertEqual(self.bench.git("show", "HEAD~1:certs/client.key"),
                         (self.bench.folder / "client.key").read_text())

        (repository / "certs" / ".new.a1b2c3").mkdir(parents=True)
        shutil.copy(ROOT / ".gitignore", repository)
        for name in ("ca.cnf", "gen_certs.sh", "ca.key", "ca.crt", "ca.srl", "server.key", "server.csr", "server.crt",
                     "client.key", "client.pfx", "alice.key", "alice.pfx", ".new.a1b2c3/ca.key"):
            (repository / "certs" / name).write_text(name)
        self.bench.git("add", "--all")
        self.assertEqual(self.bench.git("ls-files").splitlines(), [".gitignore", "certs/ca.cnf", "certs/gen_certs.sh"])


REQUEST = request("POST", "/todo", b'{"task": "stolen"}')
APPLICATION_DATA = 23   # the content type of a TLS record (RFC 8446 section 5.1)
REFUSALS = {ssl.TLSVersion.TLSv1_3: "TLSV13_ALERT_CERTIFICATE_REQUIRED",
            ssl.TLSVersion.TLSv1_2: "SSLV3_ALERT_HANDSHAKE_FAILURE"}


class Wire:
    """A client and a server in memory, after the client's last flight, which the server has not read yet."""

    def __init__(self, bench: Bench, version: ssl.TLSVersion, certificate: str | None) -> None:
        self.to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = bench.client(certificate)
        context.maximum_version = version
        self.client = context.wrap_bio(to_client, self.to_server, server_hostname="localhost")
        self.server = bench.server().wrap_bio(self.to_server, to_client, server_side=True)
        for side in (self.client, self.server, self.client):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()

    def waiting(self) -> bytes:
        """Look at what is on its way to the server."""
        data = self.to_server.read()
        self.to_server.write(data)
        return data

    def send_request(self) -> tuple[bytes, list[int]]:
        """Let the client try to send a request. Returns what leaves it, and the content types of the TLS records."""
        before = len(self.waiting())
        with contextlib.suppress(ssl.SSLError):
            self.client.write(REQUEST)
        sent = data = self.waiting()[before:]
        types = []
        while data:
            types.append(data[0])
            data = data[5 + int.from_bytes(data[3:5], "big"):]
        return sent, types


class WireTest(BenchCase):
    """A request without a client certificate: in TLS 1.3 it travels in vain, in TLS 1.2 it does not leave."""

    def test_a_request_without_a_certificate_is_never_read(self) -> None:
        for version, alert in REFUSALS.items():
            with self.subTest(version):
                wire = Wire(self.bench, version, certificate=None)
                sent, types = wire.send_request()
                self.assertEqual(types, [APPLICATION_DATA] if version is ssl.TLSVersion.TLSv1_3 else [])
                self.assertNotIn(b"stolen", sent)
                with self.assertRaises(ssl.SSLError) as refusal:
                    wire.server.do_handshake()
                self.assertEqual(refusal.exception.reason, "PEER_DID_NOT_RETURN_A_CERTIFICATE")
                self.assertTrue(wire.waiting().endswith(sent), "the server has read the request")
                with self.assertRaises(ssl.SSLError) as news:
                    wire.client.read(1)
                self.assertEqual(news.exception.reason, alert)
                self.assertNotIn(APPLICATION_DATA, wire.send_request()[1], "sent after the refusal")

    def test_with_a_certificate_it_is_sent_and_read(self) -> None:
        # The counterpart: what would be seen if it were sent in TLS 1.2, after the handshake.
        for version in REFUSALS:
            with self.subTest(version):
                wire = Wire(self.bench, version, certificate="client")
                wire.server.do_handshake()
                wire.client.do_handshake()
                self.assertEqual(wire.send_request()[1], [APPLICATION_DATA])
                self.assertEqual(wire.server.read(4096), REQUEST)

    def test_the_lab_s_server_never_serves_it(self) -> None:
        of = Lab("wire")
        for name in ("ca.crt", "server.crt", "server.key", "client.crt", "client.key"):
            shutil.copy(self.bench.folder / name, of.certs)
        with Server(of) as server:
            for version, alert in REFUSALS.items():
                context = of.context(None, maximum_version=version)
                with self.assertRaises(ssl.SSLError) as news, server.connect(context=context) as client:
                    client.sendall(REQUEST)   # TLS 1.3: connected, as far as the client knows
                    client.recv(1)
                self.assertEqual(news.exception.reason, alert)
            with server.connect("client") as client:
                client.sendall(request("GET", "/todo"))
                self.assertNotIn("stolen", [item["task"] for item in Answer(client).json["todos"]])
            server.stderr.wait_for('"GET /todo HTTP/1.1" 200')
            self.assertFalse([line for line in server.stderr.now() if "POST" in line])


if __name__ == "__main__":
    unittest.main()
