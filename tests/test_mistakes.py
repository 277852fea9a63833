"""The mistakes' outcomes, as the tests' page has them, and what is on the wire of a refused request."""

from __future__ import annotations

import contextlib
import re
import shutil
import ssl
import subprocess
import sys
import unittest
from pathlib import Path

from tests import mistakes
from tests import side_by_side as load_tests  # noqa: F401
from tests.mistakes import Bench, Outcome, meet
from tests.support import PATIENCE, ROOT, environment, new_folder, once, openssl, request
from tests.test_readme import in_words_of_this_openssl, section, table

HELLO = Outcome("hello, mtls-client", "mtls-client's request")
NO_CA = Outcome("invalid CA certificate", "alert unknown ca")
NO_ISSUER = "unable to get local issuer certificate"

Groups = dict[str, dict[str, dict[str, str]]]
"""By group and title, the text of each label that the program prints."""


@once
def told() -> Groups:
    """What the tables on the tests' page say."""
    groups: Groups = {}
    for group in dict.fromkeys(one.group for one in mistakes.EXPERIMENTS):
        groups[group] = {}
        for title, messages, why, cure in table(section(group[0].upper() + group[1:], "tests/README.md").text):
            texts = (*messages.strip("`").split("`; `"), why, cure)
            groups[group][title] = dict(zip(("client saw", "server saw", "why", "cure"),
                                            (text.replace("`", "") for text in texts), strict=True))
    return groups


def printed(output: str) -> Groups:
    """What the program printed, the lines of each text joined."""
    groups: Groups = {}
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


def expected(title: str, entry: dict[str, str]) -> list[dict[str, str]]:
    """What an experiment may print, in the words of this Python's OpenSSL."""
    client, server = (in_words_of_this_openssl(entry[label]) for label in ("client saw", "server saw"))
    seen = [(client, server)]
    if title == "SHA-1 signature":   # OpenSSL 3.6.5 does not check this in one's own certificate
        seen.append(("; ".join(["alert bad certificate"] * 2),
                     "; ".join(["CA signature digest algorithm too weak"] * 2)))
    return [{**entry, "client saw": client, "server saw": server} for client, server in seen]


def curl_falls_back() -> bool:
    """Whether there is a curl with OpenSSL: the page says what that one does, not what others do."""
    curl = shutil.which("curl")
    return bool(curl) and " OpenSSL/" in subprocess.run([str(curl), "--version"], capture_output=True, text=True,
                                                        stdin=subprocess.DEVNULL, check=False).stdout


COMMAND = (sys.executable, "-B", "-W", "error", "-m", "tests.mistakes")
"""In a process of its own, because two experiments change the environment."""


class CommandTest(unittest.TestCase):
    """``python3 -m tests.mistakes``, as the README has it."""

    maxDiff = None
    seconds = 4

    def run_it(self, *command: str, **variables: str) -> tuple[str, str, int]:
        """What it writes to stdout and stderr, and its exit code. It leaves no file behind."""
        folder = new_folder("tmp")
        result = subprocess.run(command, cwd=ROOT, env=environment({"TMPDIR": str(folder), **variables}), text=True,
                                stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=PATIENCE * 2)
        self.assertEqual(list(folder.iterdir()), [], "left something behind")
        return result.stdout, result.stderr, result.returncode

    def test_all(self) -> None:
        """The experiments print what the tables on the page say, in their order, in lines of 80 columns."""
        stdout, *rest = self.run_it(*COMMAND)
        self.assertEqual(rest, ["", 0])
        self.assertEqual([line for line in stdout.splitlines() if len(line) > 80], [], "wraps in a terminal")
        seen, on_page = (
            [(group, title, entry) for group, entries in groups.items() for title, entry in entries.items()]
            for groups in (printed(stdout), told()))
        self.assertEqual([one[:2] for one in seen], [one[:2] for one in on_page])
        for (_, title, entry), (_, _, its_row) in zip(seen, on_page, strict=True):
            with self.subTest(title):
                if entry["client saw"].startswith("not run: ") or (title.endswith("curl") and not curl_falls_back()):
                    self.skipTest(entry["client saw"])
                self.assertIn(entry, expected(title, its_row))

    def test_words_and_errors(self) -> None:
        """Words select the experiments that have all of them; if there are none, one line says so.

        Output whose reader has left is not an error.
        """
        stdout, *rest = self.run_it(*COMMAND, "ca", "NO")   # at the beginning of a word in a title or group
        self.assertEqual(rest, ["", 0])
        self.assertEqual([list(entries) for entries in printed(stdout).values()], [["intermediate CA, chain not sent"]])
        groups = ", ".join(told())
        self.assertEqual(self.run_it(*COMMAND, "client", "xyz"), (
            "", f"mistakes: no experiment has 'client xyz' in title or group; groups: {groups}\n", 2))
        self.assertEqual(self.run_it(*COMMAND, PATH="/none"), ("", "mistakes: the openssl command is missing\n", 1))
        stdout, *rest = self.run_it("sh", "-c", '{ "$@"; echo $? >&2; } | head -n 1', "sh", *COMMAND)
        self.assertEqual((len(stdout.splitlines()), *rest), (1, "0\n", 0))

    def test_old_python(self) -> None:
        """Whatever is started says in one line that Python is too old: with an old one, or one that says it is."""
        (custom := new_folder("old") / "sitecustomize.py").write_text(
            "import sys; sys.version, sys.version_info = '3.9.6 (pretended)', (3, 9, 6)")
        real = Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python3")
        for python, path in ((sys.executable, str(custom.parent)), *((str(python), "") for python in real)):
            # With what makes them end at once where they do not refuse it.
            for words in ("-m tests.mistakes -h", "-m unittest discover -s tests -t . -p no", "-m unittest tests.none",
                          "client/client.py -h", "client/client_no_cert.py -h", "server/server.py -h",
                          *(["tests/benchmark.py -h"] if path else [])):   # Python 3.7 cannot read that
                with self.subTest(python=python, words=words):
                    stdout, stderr, code = self.run_it(python, "-B", *words.split(), PYTHONPATH=path)
                    self.assertRegex(stderr, r"\A.* needs? Python 3\.10 or newer, .*this is 3\.\d\.\d+.*\n\Z")
                    self.assertEqual((stdout, code), ("", 1))


REQUEST = request("POST", "/todo", b'{"task": "stolen"}')
APPLICATION_DATA = 23   # the content type of a TLS record (RFC 8446 section 5.1)
REFUSALS = {ssl.TLSVersion.TLSv1_3: "TLSV13_ALERT_CERTIFICATE_REQUIRED",
            ssl.TLSVersion.TLSv1_2: "SSLV3_ALERT_HANDSHAKE_FAILURE"}


class Wire:
    """A client and a server in memory, after the client's last flight, which the server has not read."""

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
        """The bytes on their way to the server. They stay there."""
        data = self.to_server.read()
        self.to_server.write(data)
        return data

    def send_request(self) -> tuple[bytes, list[int]]:
        """Let the client try to send a request. Returns the bytes that it sends, and their records' content types."""
        before = len(self.waiting())
        with contextlib.suppress(ssl.SSLError):
            self.client.write(REQUEST)
        sent = data = self.waiting()[before:]
        types = []
        while data:
            types.append(data[0])
            data = data[5 + int.from_bytes(data[3:5], "big"):]
        return sent, types


class BenchTest(unittest.TestCase):
    """What the experiments rely on, and what a refused request looks like on the wire."""

    bench: Bench

    @classmethod
    def setUpClass(cls) -> None:
        cls.bench = Bench(new_folder("bench"))

    def test_missing_setting(self) -> None:
        """A setting that is not in certs/*.cnf cannot be left out: the experiment would not make its mistake."""
        with self.assertRaisesRegex(RuntimeError, "the configuration has no nameConstraints"):
            self.bench.issue("odd", like="server", nameConstraints=None)

    def test_strict_default(self) -> None:
        """Python's default context refuses a CA without basicConstraints since 3.13."""
        self.bench.make_ca("odd-ca", basicConstraints=None)
        self.bench.issue("odd-server", like="server", ca="odd-ca")
        client = ssl.create_default_context(cafile=self.bench.folder / "odd-ca.crt")
        self.bench.load(client, "client")
        self.assertEqual(meet(self.bench.server("odd-server"), client),
                         NO_CA if sys.version_info >= (3, 13) else HELLO)

    def test_request(self) -> None:
        """The request asks for a SAN and an EKU that the certificate lacks."""
        mistakes.san_not_signed(self.bench)
        asked = openssl("req", "-in", self.bench.folder / "request.csr", "-noout", "-text")
        signed = openssl("x509", "-in", self.bench.folder / "request.crt", "-noout", "-text")
        for wanted in ("DNS:localhost, IP Address:127.0.0.1", "TLS Web Server Authentication"):
            self.assertIn(wanted, asked)
            self.assertNotIn(wanted, signed)

    def test_other_cas(self) -> None:
        """A side that trusts only the lab's CA refuses impostors, and a former CA of the same name by its signature."""
        bench = self.bench
        bench.make_ca("foreign-ca", subject={"CN": "Some Public CA"})
        bench.make_ca("former-ca")
        for like in ("server", "client"):
            bench.issue(f"false-{like}", like=like, ca="foreign-ca")
        # OpenSSL 3 adds the CA's key identifier unless told not to. Others do not know "none".
        none = "none" if openssl("version").startswith("OpenSSL 3") else None
        bench.issue("former", like="client", ca="former-ca", authorityKeyIdentifier=none)
        for server, client, seen in (
                ("false-server", "client", Outcome(NO_ISSUER, "alert unknown ca")),
                ("server", "false-client", Outcome("alert unknown ca", NO_ISSUER)),
                ("server", "former", Outcome("alert decrypt error", "certificate signature failure"))):
            with self.subTest(server=server, client=client):
                self.assertEqual(meet(bench.server(server), bench.client(client)), seen)

    @unittest.skipUnless(shutil.which("git"), "no git here")
    def test_git(self) -> None:
        """Git still has the key after it was removed."""
        mistakes.committed_key(self.bench)
        repository = self.bench.folder / "repository"
        self.assertEqual((self.bench.git("ls-files"), list(repository.glob("certs/*"))), ("", []))
        self.assertEqual(self.bench.git("show", "HEAD~1:certs/client.key"),
                         (self.bench.folder / "client.key").read_text())

    def test_without_certificate(self) -> None:
        """In TLS 1.3 a request is sent, but refused unread, and nothing is sent after that; in 1.2 none is sent.

        With a certificate the same request is sent and read.
        """
        for version, alert in REFUSALS.items():
            with self.subTest(version):
                wire = Wire(self.bench, version, certificate="client")
                wire.server.do_handshake()
                wire.client.do_handshake()
                self.assertEqual(wire.send_request()[1], [APPLICATION_DATA])
                self.assertEqual(wire.server.read(4096), REQUEST)
                wire = Wire(self.bench, version, certificate=None)
                sent, types = wire.send_request()
                self.assertEqual(types, [APPLICATION_DATA] if version is ssl.TLSVersion.TLSv1_3 else [])
                self.assertNotIn(b"stolen", sent)
                with self.assertRaises(ssl.SSLError) as refused:
                    wire.server.do_handshake()
                self.assertEqual(refused.exception.reason, "PEER_DID_NOT_RETURN_A_CERTIFICATE")
                self.assertTrue(wire.waiting().endswith(sent), "the server has read the request")
                with self.assertRaises(ssl.SSLError) as learned:
                    wire.client.read(1)
                self.assertEqual(learned.exception.reason, alert)
                self.assertNotIn(APPLICATION_DATA, wire.send_request()[1], "sent after the refusal")
