"""The two clients: what they print, whom they believe, how long they wait, and how they fail."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tests import load_tests  # noqa: F401
from tests.support import (
    PATIENCE,
    Lab,
    Server,
    environment,
    in_terminal,
    issue,
    lab,
    new_folder,
    once,
    openssl,
    scratch,
    side_by_side,
)

CLIENT, NEGATIVE = "client", "client_no_cert"

OUTPUT = """\
[CLIENT] Connecting to https://127.0.0.1:{port}/todo
[CLIENT] Client cert: client.crt
[CLIENT] CA trust: ca.crt
[CLIENT] Creating new TODO with POST /todo ...
[CLIENT] POST response (HTTP 201):
{{
  "client": "mtls-client",
  "message": "TODO item created",
  "todo": {{
    "id": 6,
    "task": "Añadir endpoint POST",
    "done": false
  }}
}}
[CLIENT] Fetching TODO list with GET /todo ...
[CLIENT] Authenticated as: "mtls-client"
[CLIENT] Response (HTTP 200):
{{
  "client": "mtls-client",
  "todos": [
    {{"id": 1, "task": "Set up local CA", "done": true}},
    {{"id": 2, "task": "Issue server certificate", "done": true}},
    {{"id": 3, "task": "Issue client certificate", "done": true}},
    {{"id": 4, "task": "Configure mTLS server", "done": true}},
    {{"id": 5, "task": "Validate mutual auth", "done": false}},
    {{"id": 6, "task": "Añadir endpoint POST", "done": false}}
  ]
}}
"""

REFUSED = r"""\A\[NEGATIVE TEST\] Attempting connection WITHOUT client certificate\.\.\.
\[NEGATIVE TEST\] Target: {url}
\[NEGATIVE TEST\] Connection rejected as expected\.
\[NEGATIVE TEST\] Error: {words} \(_ssl\.c:\d+\)
\[NEGATIVE TEST\] PASS: Server correctly refused unauthenticated client\.
\Z"""


class Case(NamedTuple):
    """A run of a client and how it should end: with an error line, or, of `NEGATIVE` with 1, a FAIL line."""

    program: str
    words: str                    # a regular expression that its line must match
    code: int = 1                 # the exit code
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str | None] = {}
    before: str = "pass"          # Python code that runs between the import and main()
    cwd: Path | None = None


def run(case: Case) -> subprocess.CompletedProcess[str]:
    """Run the client to its end."""
    of = lab()
    start = [str(of.root / "client" / f"{case.program}.py")]
    if case.before != "pass":
        start = ["-c", f"import sys; sys.path.insert(0, {str(of.root / 'client')!r})\n"
                       f"import exchange, {case.program} as program\n{case.before}\nprogram.main()"]
    return subprocess.run([sys.executable, "-W", "error", *start, *case.arguments], env=environment(case.env),
                          cwd=case.cwd or scratch(), stdin=subprocess.DEVNULL, capture_output=True, check=False,
                          encoding="utf-8", errors="surrogateescape", timeout=PATIENCE * 2)


class ClientCase(unittest.TestCase):
    """What tests of both clients share."""

    def check(self, cases: list[Case], runs: list[subprocess.CompletedProcess[str]] | None = None) -> None:
        """Run the clients, a few at a time; each must end as its case says."""
        for case, result in zip(cases, runs or side_by_side(run, cases), strict=True):
            with self.subTest(program=case.program, words=case.words, arguments=case.arguments):
                self.check_one(case, result)

    def check_one(self, case: Case, result: subprocess.CompletedProcess[str]) -> None:
        """The exit code, and one line that says it, without anything that could steer a terminal."""
        self.assertEqual(result.returncode, case.code, result.stdout + result.stderr)
        self.assertEqual([c for c in result.stdout + result.stderr if not c.isprintable() and c != "\n"], [])
        self.assertEqual("PASS" in result.stdout, case.code == 0)
        line = result.stdout.splitlines()[-1] if case.program == NEGATIVE and case.code < 2 else result.stderr
        if case.program == CLIENT and case.code == 1:
            self.assertRegex(line, r"\A\[CLIENT\] ERROR: [^\n]+\n\Z")
        elif case.program == NEGATIVE:
            self.assertRegex(line, (r"\[NEGATIVE TEST\] PASS: ", r"\[NEGATIVE TEST\] FAIL: ",
                                    r"\A\[NEGATIVE TEST\] ERROR: [^\n]+\n\Z|\Ausage: ")[case.code])
        self.assertRegex(line, case.words)


class TestOurServer(ClientCase):
    """With the lab's server: what the description shows, to the letter, whatever the environment."""

    def test_client(self) -> None:
        """On a fresh server, with the defaults; a proxy or a foreign locale changes nothing."""
        cases: dict[str, tuple[Mapping[str, str | None], str]] = {
            "as it is": ({}, "ñ"),
            "proxy": ({"https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}, "ñ"),
            "C": ({"LC_ALL": "C"}, "ñ"),
            "no ñ on the terminal": ({"PYTHONIOENCODING": "ascii"}, r"\xf1"),
        }

        def outcome(name: str) -> tuple[int, str, str, str]:
            env, letter = cases[name]
            with Server(lab()) as server:
                result = run(Case(CLIENT, "", env={"MTLS_SERVER_PORT": str(server.port), **env}))
                return result.returncode, result.stderr, result.stdout, OUTPUT.format(port=server.port).replace("ñ", letter)
        for name, (code, errors, output, expected) in zip(cases, side_by_side(outcome, cases), strict=True):
            with self.subTest(name):
                self.assertEqual((code, errors), (0, ""))
                self.assertEqual(output, expected)

    def test_without_certificate(self) -> None:
        """The negative test passes, over TLS 1.3 and 1.2, with OpenSSL's own words."""
        cases = (((), r"\[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED\] tlsv13 alert certificate required"),
                 (("--tls-max", "1.2"), r"\[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE\] .+ alert handshake failure"))
        with Server(lab()) as server:
            env = {"MTLS_SERVER_PORT": str(server.port), "https_proxy": "http://127.0.0.1:9"}
            for arguments, words in cases:
                with self.subTest(arguments=arguments):
                    result = run(Case(NEGATIVE, "", arguments=arguments, env=env))
                    self.assertRegex(result.stdout, REFUSED.format(url=server.url, words=words))
                    self.assertEqual((result.returncode, result.stderr), (0, ""))

    def test_refused_by_our_server(self) -> None:
        """Not on its list, or of another CA: the client says what to do."""
        other, certs = other_ca(), lab().certs
        with Server(lab()) as server:
            self.check([
                Case(CLIENT, r"HTTP 403: client certificate: CN 'mallory' is not in the allowed list; "
                             "if it should be, start the server with --allow-cn and all its names$",
                     arguments=("--url", server.url, "--cert", str(certs / "mallory.crt"), "--key", str(certs / "mallory.key"))),
                Case(CLIENT, "the server refused us: .*alert unknown ca.*; is our certificate signed by the CA",
                     arguments=("--url", server.url, "--cert", str(other / "server.crt"), "--key", str(other / "server.key")))])

    def test_output_that_fails(self) -> None:
        """A reader that leaves, a disk that is full: nobody is blamed, least of all the server."""
        script = '"$1" "$2" --url "$3" {}; echo "code $?"'
        with Server(lab()) as server:
            for name, code in ((CLIENT, 1), (NEGATIVE, 2)):
                for redirection in ("| head -n 1", ">/dev/full"):
                    if redirection == ">/dev/full" and not Path("/dev/full").exists():
                        continue   # only Linux has it
                    with self.subTest(name, redirection=redirection):
                        command = ["sh", "-c", script.format(redirection), "sh", sys.executable,
                                   str(lab().root / "client" / f"{name}.py"), server.url]
                        result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False,
                                                stdin=subprocess.DEVNULL)
                        self.assertEqual(result.stderr, "")
                        self.assertEqual(result.stdout.count("\n"), 2 if "head" in redirection else 1)
                        self.assertIn("code 0" if "head" in redirection else f"code {code}", result.stdout)

    def test_key_log(self) -> None:
        """SSLKEYLOGFILE gets the session's secrets, in a file that is its owner's alone."""
        folder = new_folder("keylog")
        (folder / "old").write_text("# before\n")
        (folder / "old").chmod(0o644)
        with Server(lab()) as server:
            def with_log(name: str, words: str = "", code: int = 1) -> Case:
                return Case(CLIENT, words, code, ("--url", server.url), {"SSLKEYLOGFILE": str(folder / name)})

            for name in ("new", "old"):
                self.assertEqual(run(with_log(name)).returncode, 0)
                self.assertIn("CLIENT_HANDSHAKE_TRAFFIC_SECRET", (folder / name).read_text())
                self.assertEqual(stat.S_IMODE((folder / name).stat().st_mode), 0o600)
            self.assertTrue((folder / "old").read_text().startswith("# before\n"))
            (folder / "target").write_text("mine\n")
            (folder / "link").symlink_to("target")
            theirs = folder / "theirs" if os.getuid() == 0 else Path("/dev/null")   # root can make one, others find one
            if os.getuid() == 0:
                theirs.touch(0o666)
                os.chown(theirs, 65534, -1)
            words = r"cannot use SSLKEYLOGFILE=.* \(.+\); name a new file in a folder of your own$"
            self.check([with_log("link", words), with_log(str(theirs), words), with_log("no/such", words)])
            self.assertEqual((folder / "target").read_text(), "mine\n")


class TestStart(ClientCase):
    """What is found before anything is sent: arguments, variables, files, an old Python."""

    def test_files(self) -> None:
        """Missing, misfitting and unreadable files. Where there is a CA, none is advised that would replace it."""
        certs = lab().certs
        openssl("rsa", "-aes128", "-passout", "pass:secret", "-in", certs / "client.key", "-out", certs / "secret.key")
        shutil.copy(certs / "client.key", certs / "locked.key")
        (certs / "locked.key").chmod(0)
        me = pwd.getpwuid(os.getuid()).pw_name
        leave = f"import gettext, locale, os, shutil\nos.chdir({str(certs)!r})\nos.getuid() or os.setuid(65534)"
        damaged = "damaged or do not fit together.*client NAME$"
        cases = [
            Case(CLIENT, r"cannot use certs/bob.crt \(No such file .*\); make it: bash certs/gen_certs.sh client bob$",
                 arguments=("--cert", "certs/bob.crt", "--key", "certs/bob.key"), cwd=lab().root),
            Case(CLIENT, "gen_certs.sh client 'b;b'$", arguments=("--key", str(certs / "b;b.key"))),
            Case(CLIENT, "No such file .*right path", arguments=("--cert", "/no/such/file")),
            Case(CLIENT, "No such file .*right path", arguments=("--cacert", "certs/ca2.crt"), cwd=scratch()),
            Case(NEGATIVE, "No such file .*right path", 2, ("--cacert", "/no/such/file")),
            Case(CLIENT, "Is a directory.*right path", arguments=("--cert", str(scratch()))),
            *(Case(CLIENT, damaged, arguments=(option, "/dev/null")) for option in ("--cert", "--key", "--cacert")),
            Case(CLIENT, "key values mismatch.*client NAME$", arguments=("--key", str(certs / "mallory.key"))),
            Case(NEGATIVE, "/dev/null holds no certificate", 2, ("--cacert", "/dev/null")),
            Case(CLIENT, f"locked.key .*it belongs to {me}, who must let us read it", before=leave,
                 arguments=("--cert", "client.crt", "--key", "locked.key", "--cacert", "ca.crt")),
            Case(NEGATIVE, f"locked.key .*it belongs to {me}, who", 2, ("--cacert", "locked.key"), before=leave),
        ]
        results = side_by_side(run, cases)
        self.check(cases, results)
        for result in results:
            self.assertNotRegex(result.stderr, r"gen_certs\.sh(?! client)")
        command = [sys.executable, str(lab().root / "client" / "client.py"), "--key", str(certs / "secret.key")]
        code, shown = in_terminal(command)   # where OpenSSL could ask for the password
        self.assertEqual(code, 1)
        self.assertRegex(shown, rf"\A\[CLIENT\] ERROR: .*{damaged}")

    def test_no_ca_yet(self) -> None:
        """Before the first gen_certs.sh, both name it."""
        empty = Lab("no certificates")
        for program, code in ((CLIENT, 1), (NEGATIVE, 2)):
            result = empty.run(f"client/{program}.py")
            self.check_one(Case(program, "make the certificates: bash certs/gen_certs.sh$", code), result)

    def test_senseless_arguments(self) -> None:
        """URLs that are none, ports that are none, a TASK that is no text: exit 2, with the reason."""
        urls = {"must begin with https://": ("http://127.0.0.1/", "localhost:8443/todo", "file:///etc/passwd", "x"),
                "is no URL such as https://127.0.0.1:8443/todo": (
                    "https://", "https://127.0.0.1:99999/", "https://127.0.0.1:port/", "https://127.0.0.1:0/",
                    "https://[::1/", "https://127.0.0.1/ñ", "https://127.0.0.1/a b", "https://a..b/")}
        port = "error: MTLS_SERVER_PORT: '{}' is no port"
        self.check([
            *(Case(CLIENT, f"error: argument --url: '.*' {words}$", 2, ("--url", url))
              for words, those in urls.items() for url in those),
            Case(NEGATIVE, "must begin with https://$", 2, ("--url", "http://127.0.0.1/")),
            *(Case(CLIENT, port.format(text), 2, env={"MTLS_SERVER_PORT": text}) for text in ("abc", "0", "65536", "1_0", "²")),
            Case(NEGATIVE, port.format("abc"), 2, env={"MTLS_SERVER_PORT": "abc"}),
            Case(CLIENT, "TASK: is no valid text", 2, ("\udcff",)),
            Case(NEGATIVE, "invalid choice: '1.1'", 2, ("--tls-max", "1.1")),
        ])
        for program in (CLIENT, NEGATIVE):
            result = lab().run(f"client/{program}.py", "--help")
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertIn("MTLS_SERVER_PORT", result.stdout)

    def test_old_python(self) -> None:
        """Python 3.6 to 3.9 is told in one line that it is too old."""
        found = {}
        places = [str(path) for path in Path("~/.pyenv/versions").expanduser().glob("3.*/bin")]
        for minor in range(6, 10):
            python = shutil.which(f"python3.{minor}", path=os.pathsep.join([*places, os.environ["PATH"], "/usr/bin"]))
            asked = subprocess.run([python or "false", "-c", "import platform; print(platform.python_version())"],
                                   capture_output=True, text=True, check=False)
            if python and asked.returncode == 0:
                found[python] = asked.stdout.strip()
        if not found:
            self.skipTest("no Python 3.6 to 3.9 here")
        for python, version in found.items():
            for program in (CLIENT, NEGATIVE):
                result = subprocess.run([python, str(lab().root / "client" / f"{program}.py")], capture_output=True,
                                        text=True, check=False)
                self.assertEqual((result.returncode, result.stdout, result.stderr),
                                 (1, "", f"{program}.py: needs Python 3.10 or newer, this is {version}\n"))


# --- Other servers -------------------------------------------------------------------------


Behaviour = Callable[[socket.socket], None]


@contextlib.contextmanager
def other_server(behave: Behaviour) -> Iterator[str]:
    """A server that is not ours: treats each TCP connection as ``behave`` says. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            while not ended:
                connection, _ = listener.accept()
                connection.settimeout(PATIENCE)
                with connection, contextlib.suppress(OSError):
                    behave(connection)

        ended = False
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}/todo"
        finally:
            ended = True
            socket.create_connection(listener.getsockname(), timeout=PATIENCE).close()   # wakes accept()
            thread.join(PATIENCE)


def server_context(certificate: Path | None = None) -> ssl.SSLContext:
    """A server's context that asks for no certificate; it shows ``certificate`` (a path without .crt), or the lab's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = certificate or lab().certs / "server"
    context.load_cert_chain(f"{path}.crt", f"{path}.key")
    return context


def answers(data: bytes, certificate: Path | None = None, every: float = 0.0) -> Behaviour:
    """Speak TLS, read a request's head, send ``data``, close. With ``every``: send it 300 times, so many seconds apart."""
    def behave(connection: socket.socket) -> None:
        with server_context(certificate).wrap_socket(connection, server_side=True) as tls:
            head = b""
            while b"\r\n\r\n" not in head:
                head += hear(tls)
            tls.sendall(data)
            for _ in range(300 if every else 0):
                time.sleep(every)
                tls.sendall(data)
            with contextlib.suppress(OSError):
                tls.unwrap()
    return behave


def hear(connection: socket.socket) -> bytes:
    """What comes next; ConnectionError if nothing does."""
    if not (received := connection.recv(65536)):
        raise ConnectionError
    return received


def refuses_late(data: bytes = b"") -> Behaviour:
    """Prove who it is, send ``data``, and answer the request with an alert (bad_record_mac), as if it were damaged."""
    def behave(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = server_context().wrap_bio(incoming, outgoing, server_side=True)
        with contextlib.suppress(ssl.SSLError):
            while True:
                try:
                    tls.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    connection.sendall(outgoing.read())
                    incoming.write(hear(connection))
            if data:
                tls.write(data)
            connection.sendall(outgoing.read())
            record = incoming.read() or hear(connection)   # the request may be here already
            incoming.write(record[:-1] + bytes([record[-1] ^ 1]))
            tls.read(65536)
        connection.sendall(outgoing.read())
        connection.recv(65536)
    return behave


def forges(code: int) -> Behaviour:
    """A man in the middle of TLS 1.2: lets the real server prove who it is, then sends an alert of his own."""
    def behave(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = server_context().wrap_bio(incoming, outgoing, server_side=True)
        incoming.write(hear(connection))
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        connection.sendall(outgoing.read())
        alerts(connection, code)
    return behave


def alerts(connection: socket.socket, code: int) -> None:
    """Read what is sent and answer with an unprotected fatal alert."""
    connection.recv(65536)
    connection.sendall(b"\x15\x03\x03\x00\x02\x02" + bytes([code]))
    connection.recv(65536)


def resets(connection: socket.socket) -> None:
    """Wait for the first bytes and answer with a TCP reset."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def ends(connection: socket.socket) -> None:
    """Read the ClientHello and close without a word."""
    connection.recv(65536)


def drips_handshake(connection: socket.socket) -> None:
    """A TLS record of which a byte comes now and then."""
    connection.sendall(b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03")
    for _ in range(300):
        time.sleep(0.05)
        connection.sendall(b"\0")


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@once
def other_ca() -> Path:
    """A folder with another CA, of the same name as ours, and a server.crt of it."""
    other = Lab("another CA")
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", other.certs / "ca.key")
    openssl("req", "-new", "-x509", "-sha256", "-days", "2", "-key", other.certs / "ca.key", "-out", other.certs / "ca.crt",
            "-config", other.certs / "ca.cnf")
    issue(other, "server", "/CN=localhost", "subjectAltName = IP:127.0.0.1")
    (other.certs / "chain.crt").write_bytes(b"".join((other.certs / f"{name}.crt").read_bytes() for name in ("server", "ca")))
    shutil.copy(other.certs / "server.key", other.certs / "chain.key")
    return other.certs


class TestOtherServers(ClientCase):
    """Each failure is one line that says what to do; the negative test never passes for a wrong reason."""

    def check_with(self, servers: list[tuple[Behaviour, list[Case]]]) -> None:
        """Run clients against other servers: the URL is added to each case's arguments, unless it has one."""
        pairs = [(behave, case) for behave, cases in servers for case in cases]

        def against(pair: tuple[Behaviour, Case]) -> subprocess.CompletedProcess[str]:
            behave, case = pair
            with other_server(behave) as url:
                local = url.replace("127.0.0.1", "localhost")
                arguments = tuple(text.format(url=url, local=local) for text in case.arguments) or ("--url", url)
                return run(case._replace(arguments=arguments))
        self.check([case for _, case in pairs], side_by_side(against, pairs))

    def test_no_server(self) -> None:
        """Both name the command that starts it."""
        words = "no server at https://127.0.0.1:[0-9]+/todo; start it first: python3 server/server.py$"
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))   # bound but not listening: refuses
            env = {"MTLS_SERVER_PORT": str(closed.getsockname()[1])}
            self.check([Case(CLIENT, words, env=env), Case(NEGATIVE, words, 2, env=env)])

    def test_untrusted(self) -> None:
        """A certificate that does not verify: both tell why, and what to do about just that."""
        certs, other, host = lab().certs, other_ca(), "subjectAltName = IP:127.0.0.1"
        issue(lab(), "expired", "/CN=s", host, "20200101000000Z", "20200201000000Z")
        issue(lab(), "early", "/CN=s", host, "20440101000000Z", "20450101000000Z")
        issue(lab(), "elsewhere", "/CN=127.0.0.1", "subjectAltName = DNS:localhost")
        issue(lab(), "no-san", "/CN=localhost", "extendedKeyUsage = serverAuth")
        shutil.copy(certs / "client.crt", certs / "for-clients.crt")
        restart = "; restart the server if gen_certs.sh has run since it started; if not, is it our server"
        dates = "; compare the clock with the certificate's dates: openssl x509 -noout -dates -in certs/server.crt$"
        names = "; the host in the URL must stand under alt_names in certs/server.cnf$"
        self.check_with([
            (answers(http("200 OK", b"{}"), certificate), [
                Case(program, f"the server's certificate is not trusted: .*{words}", code, arguments,
                     {"SSL_CERT_FILE": str(other / "ca.crt")})   # what the system trusts is not what we trust
                for program, code in ((CLIENT, 1), (NEGATIVE, 2))])
            for certificate, words, arguments in (
                (other / "server", restart, ()), (other / "chain", restart, ()), (other / "ca", restart, ()),
                (certs / "expired", "certificate has expired" + dates, ()),
                (certs / "early", "certificate is not yet valid" + dates, ()),
                (certs / "client", "; is it our server", ()),   # is for clients only
                (certs / "elsewhere", "IP address mismatch.* '127.0.0.1'.*" + names, ()),
                (certs / "no-san", "Hostname mismatch.* 'localhost'.*" + names, ("--url", "{local}")))])

    def test_strange_answers(self) -> None:
        """Servers that answer something else than ours does: what the client and the negative test say."""
        no_json, too_long, silent = "did not send the JSON", "sent more than 1 MB", "without an alert or an answer .*may have refused"
        no_answer, let_in, in_http = "no HTTP answer", r"HTTP 200 .*: let in\.$", "HTTP {}.*: refused, but in HTTP, after TLS"
        much = b"x" * 2 ** 21
        with Server(lab()) as refusing:
            cases: list[tuple[Behaviour, str, int, str]] = [
                (answers(http("507 Full", b'{"error": "the list\\nis \\u009b31m full"}')),
                 r"HTTP 507: the list is \\u009b31m full", 1, in_http.format(507)),
                (answers(http("400 Bad", b"<html>\x1b")), r"HTTP 400: <html>\\u001b", 1, in_http.format(400)),
                (answers(http("404 Nowhere")), "HTTP 404: Nowhere", 1, in_http.format(404)),
                (answers(http("302 Found", b"", f"Location: {refusing.url}")), "HTTP 302", 1, "HTTP 302.*: let in"),
                (answers(http("302 Found", b"", "Location: http://[x/")), "HTTP 302", 1, "HTTP 302.*: let in"),
                (answers(http("200 OK", b"hello")), no_json, 1, let_in),
                (answers(http("200 OK", b"[1, 2]")), no_json, 1, let_in),
                (answers(http("200 OK", b'"\xff"')), no_json, 1, let_in),
                (answers(http("200 OK", b"[" * 100_000)), no_json, 1, let_in),
                (answers(b"HTTP/1.1 200 OK\r\n\r\n" + much), too_long, 1, let_in),
                (answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nde0b6b3a7640000\r\n" + much), too_long, 1, let_in),
                *((answers(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n{" % length), no_answer, 1, let_in)
                  for length in (9, 10 ** 18, 10 ** 19)),
                (answers(b"220 \x1b]0;smtp\x07\r\n"), r"no HTTP answer.*220 \\u001b\]0;smtp\\u0007", 2, r"220 \\u001b\]0;smtp"),
                (answers(b""), no_answer, 2, silent + ".*nothing is proved"),
                (resets, no_answer, 2, silent),
                (ends, no_answer, 2, silent),
                (lambda connection: connection.sendall(http("200 OK")), no_answer, 2, "(?i)wrong.version"),
                (lambda connection: alerts(connection, 70), "refused us: .*alert protocol version", 2, "alert protocol version"),
                (lambda connection: alerts(connection, 116), "refused us", 2, "before the server proved who it is"),
                (lambda connection: alerts(connection, 40), "refused us", 2, "before the server proved who it is"),
            ]
            self.check_with([(behave, [Case(CLIENT, words), Case(NEGATIVE, words_of_negative, code)])
                             for behave, words, code, words_of_negative in cases])

    def test_late_refusals(self) -> None:
        """From a server that has proved who it is: PASS only for the right alert, and before any answer.

        No server here can be made to send certificate_required late, so another alert is counted as that.
        """
        counted = 'program.REFUSALS.add("SSLV3_ALERT_BAD_RECORD_MAC")'
        old = ("--url", "{url}", "--tls-max", "1.2")
        begun = "Server began to answer a client without a certificate; only then: .*bad record mac"
        answer = refuses_late(b"HTTP/1.1 200 OK\r\nContent-Le")
        self.check_with([
            (forges(48), [Case(NEGATIVE, "nothing is proved: .*alert unknown ca", 2, old)]),
            (forges(46), [Case(NEGATIVE, "nothing is proved: .*alert certificate unknown", 2, old)]),
            (forges(40), [Case(NEGATIVE, "PASS", 0, old)]),   # what TLS 1.2 cannot tell
            (refuses_late(), [Case(NEGATIVE, "nothing is proved: .*bad record mac", 2),
                              Case(NEGATIVE, "PASS", 0, before=counted), Case(NEGATIVE, "PASS", 0, old, before=counted)]),
            (answer, [Case(NEGATIVE, begun, before=counted), Case(NEGATIVE, begun, 1, old, before=counted)]),
            (refuses_late(b"H"), [Case(NEGATIVE, begun, before=counted)])])

    def test_hostile_list(self) -> None:
        """What another client put on the list cannot drive this client's terminal."""
        body = '{"client": "x\\u001b]0;", "todo": {}, "todos": [{"id": 1, "task": "\u009b31m\u202e\u007f", "done": true}]}'
        with other_server(answers(http("200 OK", body.encode()))) as url:
            result = run(Case(CLIENT, "", arguments=("--url", url)))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual([c for c in result.stdout if not c.isprintable() and c != "\n"], [])
        self.assertIn(r'"task": "\u009b31m\u202e\u007f"', result.stdout)

    def test_drips(self) -> None:
        """A server that never says its last word: both give up when the whole exchange takes too long."""
        soon = "exchange.EXCHANGE = 1"
        too_slow = "no complete answer from https://.* within 1 s"
        both = [Case(CLIENT, too_slow, before=soon), Case(NEGATIVE, too_slow, 2, before=soon)]
        self.check_with([
            (drips_handshake, both), (answers(b"H", every=0.05), both),
            (answers(b"HTTP/1.1 100 Continue\r\n\r\n", every=0.05), both),
            (answers(b"HTTP/1.1 200 OK\r\nA: b\r\n", every=0.05), both),
            (answers(b"HTTP/1.1 200 OK\r\n\r\n", every=0.05), both[:1])])


class TestSilence(ClientCase):
    """Nothing is said."""

    seconds = 10

    def test_silence(self) -> None:
        """Both give up after 10 s and say so."""
        words = "no answer from https://127.0.0.1:.* within 10 s; is our server there"
        with socket.create_server(("127.0.0.1", 0)) as silent:   # nobody accepts
            env = {"MTLS_SERVER_PORT": str(silent.getsockname()[1])}
            start = time.monotonic()
            self.check([Case(CLIENT, words, env=env), Case(NEGATIVE, words, 2, env=env)])
        self.assertLess(time.monotonic() - start, 20)


if __name__ == "__main__":
    unittest.main()
