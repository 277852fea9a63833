"""The lab end to end: server and clients as people run them, what they print, and how they fail."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import (
    PATIENCE,
    Answer,
    Lab,
    Server,
    environment,
    lab,
    new_folder,
    openssl,
    request,
    scratch,
    side_by_side,
)

CLIENT_OUTPUT = """\
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

SERVER_LOG = """\
[SERVER] REQUEST | peer=127.0.0.1 | cert-CN='mtls-client' | "POST /todo HTTP/1.1" 201 -
[SERVER] AUTHENTICATED | CN='mtls-client' | creating TODO
[SERVER] TODO CREATED | CN='mtls-client' | item={'id': 6, 'task': 'Añadir endpoint POST', 'done': False}
[SERVER] REQUEST | peer=127.0.0.1 | cert-CN='mtls-client' | "GET /todo HTTP/1.1" 200 -
[SERVER] AUTHENTICATED | CN='mtls-client' | serving /todo
""".splitlines()

GREETING = """\
[SERVER] mTLS server listening on https://127.0.0.1:{port}
[SERVER] Requiring client cert signed by: ca.crt
[SERVER] Press Ctrl+C to stop.
""".splitlines()


def issue(of: Lab, name: str, subject: str, *sign: str) -> None:
    """Let the lab's CA sign a client certificate with any subject; ``sign`` goes to openssl x509."""
    files = {ending: of.certs / f"{name}.{ending}" for ending in ("key", "csr", "crt")}
    shutil.copy(of.certs / "client.key", files["key"])
    openssl("req", "-new", "-key", files["key"], "-out", files["csr"], "-config", of.certs / "client.cnf",
            "-subj", subject)
    openssl("x509", "-req", "-days", "1", "-in", files["csr"], "-CA", of.certs / "ca.crt", "-CAkey", of.certs / "ca.key",
            "-out", files["crt"], "-extensions", "v3_client", "-extfile", of.certs / "client.cnf", *sign)


class TestHappyPath(unittest.TestCase):
    """What the README promises to a newcomer."""

    def test_client_and_server(self) -> None:
        """On a fresh server both print what the description shows, byte for byte; then Ctrl+C."""
        for stop in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(stop=stop.name), Server(lab()) as server:
                result = lab().run("client/client.py", "--url", server.url)
                self.assertEqual(result.stderr, "")
                self.assertEqual(result.stdout, CLIENT_OUTPUT.format(port=server.port))
                self.assertEqual(result.returncode, 0)
                self.assertEqual(server.stop(stop), 0)
                self.assertEqual(server.stderr.all(), SERVER_LOG)
                greeting = [line.format(port=server.port) for line in GREETING]
                self.assertEqual(server.stdout.all(), [*greeting, "[SERVER] Stopped."])

    def test_without_certificate(self) -> None:
        """The negative test passes, over TLS 1.3 and 1.2, with OpenSSL's own words."""
        cases = (((), r"\[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED\] tlsv13 alert certificate required \(_ssl\.c:\d+\)"),
                 (("--tls-max", "1.2"), r"\[SSL: SSLV3_ALERT_HANDSHAKE_FAILURE\] .+ alert handshake failure \(_ssl\.c:\d+\)"))
        with Server(lab()) as server:
            for arguments, words in cases:
                with self.subTest(arguments=arguments):
                    result = lab().run("client/client_no_cert.py", "--url", server.url, *arguments)
                    lines = result.stdout.splitlines()
                    self.assertEqual(lines[:3], [
                        "[NEGATIVE TEST] Attempting connection WITHOUT client certificate...",
                        f"[NEGATIVE TEST] Target: {server.url}",
                        "[NEGATIVE TEST] Connection rejected as expected."])
                    self.assertRegex(lines[3], r"\[NEGATIVE TEST\] Error: " + words)
                    self.assertEqual(lines[4:], ["[NEGATIVE TEST] PASS: Server correctly refused unauthenticated client."])
                    self.assertEqual((result.returncode, result.stderr), (0, ""))
            server.stop()
            self.assertEqual(server.stderr.all(),
                             ["[SERVER] REJECTED | peer=127.0.0.1 | peer did not return a certificate"] * 2)

    def test_port_from_the_environment(self) -> None:
        """MTLS_SERVER_PORT moves all three programs; a proxy or a foreign locale changes nothing."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        env = {"MTLS_SERVER_PORT": port, "https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9",
               "ALL_PROXY": "http://127.0.0.1:9", "LC_ALL": "C"}
        with Server(lab(), env=env, port=None) as server:
            self.assertEqual(str(server.port), port)
            result = lab().run("client/client.py", env=env)
            self.assertEqual((result.stdout, result.stderr), (CLIENT_OUTPUT.format(port=port), ""))
            self.assertEqual(lab().run("client/client_no_cert.py", env=env).returncode, 0)

    def test_terminal_without_enye(self) -> None:
        """Where ñ cannot be shown, client and server print an escape instead of failing."""
        env: dict[str, str | None] = {"PYTHONIOENCODING": "ascii"}
        with Server(lab(), env=env) as server:
            result = lab().run("client/client.py", "--url", server.url, env=env)
            self.assertIn(r'"task": "A\xf1adir endpoint POST"', result.stdout)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            server.stderr.wait_for(r"'task': 'A\xf1adir endpoint POST'")

    def test_reader_that_leaves(self) -> None:
        """``client.py | head`` ends without a traceback, and so does a server whose output nobody reads."""
        client = f'"{sys.executable}" "{lab().root}/client/client.py" --url "$1" | head -n 1'
        with Server(lab()) as server:
            result = subprocess.run(["sh", "-c", client, "sh", server.url], capture_output=True, text=True, check=False,
                                    env=environment(), stdin=subprocess.DEVNULL)
            self.assertEqual((result.stdout.count("\n"), result.stderr), (1, ""))
        script = f'"{sys.executable}" "{lab().root}/server/server.py" --port 0'
        process = subprocess.Popen(["sh", "-c", script + ' & echo $! >&2; wait $!; echo $? >&2'], env=environment(),
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stderr
        with process, process.stderr:
            pid = int(process.stderr.readline())
            self.assertIn("listening", process.stdout.readline())
            process.stdout.close()
            os.kill(pid, signal.SIGTERM)
            self.assertEqual(process.stderr.read(), "0\n")

    def test_log_that_nobody_reads(self) -> None:
        """A server whose log is stuck, because its reader stalls, ends all the same when it is told to."""
        command = [sys.executable, "-W", "error", str(lab().root / "server" / "server.py"), "--port", "0"]
        with subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout and process.stderr
                port = int(process.stdout.readline().rpartition(":")[2])
                plain = socket.create_connection(("127.0.0.1", port), timeout=1)
                with lab().context().wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                    with self.assertRaises(TimeoutError):
                        while True:   # until the pipe is full: 64 KiB on Linux
                            connection.sendall(request("GET", "/todo"))
                            Answer(connection)
                    process.send_signal(signal.SIGTERM)
                    self.assertEqual(process.wait(PATIENCE), 0)
            finally:
                process.kill()

    def test_key_log(self) -> None:
        """SSLKEYLOGFILE gets the session's secrets, in a file that only its owner can read."""
        log = new_folder("keylog") / "keys"
        with Server(lab()) as server:
            self.assertEqual(lab().run("client/client.py", "--url", server.url,
                                       env={"SSLKEYLOGFILE": str(log)}).returncode, 0)
            self.assertIn("CLIENT_HANDSHAKE_TRAFFIC_SECRET", log.read_text())
            self.assertEqual(stat.S_IMODE(log.stat().st_mode), 0o600)
            result = lab().run("client/client.py", "--url", server.url, env={"SSLKEYLOGFILE": str(log / "no" / "such")})
            self.assertRegex(result.stderr, r"^\[CLIENT\] ERROR: cannot use .*/no/such .*\n$")
            self.assertEqual(result.returncode, 1)


class TestTLS(unittest.TestCase):
    """What the server's TLS settings admit and refuse."""

    def test_wrong_common_name(self) -> None:
        """A certificate of our CA with another CN, or without exactly one, gets 403 on every path and method."""
        own = Lab("names")
        own.generate()
        own.generate("client", "mallory")
        issue(own, "nameless", "/O=nobody")
        issue(own, "two-faced", "/CN=mtls-client/CN=mallory")
        names = {"mallory": "'mallory'", "nameless": "None", "two-faced": "None"}
        with Server(own) as server:
            for certificate, name in names.items():
                for sent in (request("GET", "/todo"), request("GET", "/nowhere"), request("DELETE", "/todo"),
                             request("POST", "/todo", b"not json")):
                    with self.subTest(certificate=certificate, sent=sent), server.connect(certificate) as connection:
                        connection.sendall(sent)
                        answer = Answer(connection)
                        self.assertEqual(answer.status, 403)
                        self.assertIn(f"CN {name} ", answer.json["error"])
                        line = sent.partition(b"\r\n")[0].decode()
                        server.stderr.wait_for(lambda lines, line=line, name=name: lines[-2:] == [   # type: ignore[misc]
                            f'[SERVER] REQUEST | peer=127.0.0.1 | cert-CN={name} | "{line}" 403 -',
                            f"[SERVER] FORBIDDEN | CN={name} | not in the allowed list"])
            result = own.run("client/client.py", "--url", server.url, "--cert", str(own.certs / "mallory.crt"),
                             "--key", str(own.certs / "mallory.key"))
            self.assertEqual(result.stderr, "[CLIENT] ERROR: the server answered HTTP 403: client certificate: "
                                            "CN 'mallory' is not in the allowed list\n")
            self.assertEqual(result.returncode, 1)

    def test_allowed_names(self) -> None:
        """--allow-cn replaces the list, and wins over MTLS_ALLOWED_CNS."""
        cases: list[tuple[list[str], dict[str, str | None], dict[str, int]]] = [
            (["--allow-cn", "mtls-client", "mallory"], {}, {"client": 200, "mallory": 200}),
            (["--allow-cn", "mallory"], {"MTLS_ALLOWED_CNS": "mtls-client"}, {"client": 403, "mallory": 200}),
            (["--allow-cn", "mallory", "--allow-cn", "mtls-client"], {}, {"client": 200, "mallory": 200}),
            ([], {"MTLS_ALLOWED_CNS": "mallory, other"}, {"client": 403, "mallory": 200}),
            ([], {"MTLS_ALLOWED_CNS": ""}, {"client": 200, "mallory": 403}),
        ]
        for arguments, env, statuses in cases:
            with self.subTest(arguments=arguments, env=env), Server(lab(), *arguments, env=env) as server:
                for certificate, status in statuses.items():
                    with server.connect(certificate) as connection:
                        connection.sendall(request("GET", "/todo"))
                        self.assertEqual(Answer(connection).status, status)

    def test_versions_and_ciphers(self) -> None:
        """TLS 1.2 and 1.3 with forward secrecy and AEAD; nothing older, no CBC, HTTP/1.1 by ALPN, no tickets."""
        with Server(lab()) as server:
            for version, cipher, accepted in (
                    ("TLSv1_3", None, True), ("TLSv1_2", "ECDHE-RSA-AES128-GCM-SHA256", True),
                    ("TLSv1_2", "ECDHE-RSA-CHACHA20-POLY1305", True), ("TLSv1_2", "ECDHE-RSA-AES256-SHA384", False),
                    ("TLSv1_2", "DHE-RSA-AES256-GCM-SHA384", False), ("TLSv1_2", "AES256-GCM-SHA384", False)):
                with self.subTest(version=version, cipher=cipher):
                    context = lab().context()
                    context.set_alpn_protocols(["h2", "http/1.1"])
                    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
                    if cipher:
                        context.set_ciphers(cipher)
                    if not accepted:
                        with self.assertRaises(ssl.SSLError):
                            server.connect(context=context)
                        continue
                    with server.connect(context=context) as connection:
                        self.assertEqual(connection.selected_alpn_protocol(), "http/1.1")
                        connection.sendall(request("GET", "/todo"))
                        self.assertEqual(Answer(connection).status, 200)
                        session = connection.session
                    if version == "TLSv1_3":
                        self.assertFalse(session is not None and session.has_ticket)
            server.stderr.wait_for("no shared cipher")

    def test_no_renegotiation(self) -> None:
        """A TLS 1.2 client that asks to renegotiate is told no."""
        with Server(lab()) as server:
            certs = lab().certs
            command: list[str | Path] = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{server.port}", "-CAfile", certs / "ca.crt",
                       "-cert", certs / "client.crt", "-key", certs / "client.key"]
            result = subprocess.run(command, input="R\n", capture_output=True, text=True, env=environment(), check=False,
                                    timeout=PATIENCE)
            self.assertRegex(result.stdout + result.stderr, "(?i)no.renegotiation")

    def test_rejected(self) -> None:
        """A certificate of another CA is refused in the handshake, and the log says why."""
        other = Lab("other")
        other.generate(PREPARED_SET="other")
        with Server(lab()) as server:
            result = other.run("client/client.py", "--url", server.url, "--cacert", str(lab().certs / "ca.crt"))
            self.assertRegex(result.stderr, r"^\[CLIENT\] ERROR: the server refused us: .*alert unknown ca.*\n$")
            self.assertEqual(result.returncode, 1)
            line = server.stderr.wait_for("REJECTED")[-1]
            self.assertRegex(line, r"^\[SERVER\] REJECTED \| peer=127\.0\.0\.1 \| certificate verify failed: "
                                   "(unable to get local issuer certificate|certificate signature failure)$")


class TestServerStart(unittest.TestCase):
    """A server that cannot start says in one line what to do."""

    def refused(self, of: Lab, *arguments: str, env: dict[str, str | None] | None = None) -> str:
        """Start a server that must exit with 1 and one ERROR line; returns the line."""
        return self.refusal(of.run("server/server.py", "--port", "0", *arguments, env=env))

    def refusal(self, result: subprocess.CompletedProcess[str]) -> str:
        """The one ERROR line of a server that exited with 1."""
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertEqual(result.stdout, "")
        self.assertRegex(result.stderr, r"\A\[SERVER\] ERROR: [^\n]+\n\Z")
        return result.stderr

    def test_certificate_files(self) -> None:
        """Missing, unreadable, malformed, mismatched and encrypted files."""
        def missing(file: Path) -> None:
            file.unlink()

        def empty(file: Path) -> None:
            file.write_bytes(b"")

        def rubbish(file: Path) -> None:
            file.write_bytes(b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")

        def folder(file: Path) -> None:
            file.unlink()
            file.mkdir()

        def foreign(file: Path) -> None:
            shutil.copy(lab().certs / file.name.replace("server", "client"), file)

        def encrypted(file: Path) -> None:
            openssl("rsa", "-aes128", "-passout", "pass:secret", "-in", lab().certs / "server.key", "-out", file)

        cases: list[tuple[str, Callable[[Path], None], str]] = [
            *((name, spoil, r"gen_certs\.sh") for name in ("ca.crt", "server.crt", "server.key")
              for spoil in (missing, empty, rubbish, folder)),
            ("server.key", foreign, "key values mismatch"),
            ("server.key", encrypted, "server.key do not fit or cannot be used"),
        ]
        spoilt = [Lab("spoilt") for _ in cases]
        for of, (name, spoil, _) in zip(spoilt, cases, strict=True):
            shutil.copytree(lab().certs, of.certs, dirs_exist_ok=True)
            spoil(of.certs / name)
        results = side_by_side(lambda of: of.run("server/server.py", "--port", "0"), spoilt)
        for result, (name, spoil, words) in zip(results, cases, strict=True):
            with self.subTest(file=name, spoilt=spoil.__name__):
                self.assertRegex(self.refusal(result), f"{re.escape(name.split('.')[0])}.*{words}")
        if os.getuid():   # root may read everything
            (lab().certs / "server.key").chmod(0)
            self.addCleanup((lab().certs / "server.key").chmod, 0o600)
            self.assertIn("server.key", self.refused(lab()))

    def test_port_and_host(self) -> None:
        """A busy port, a host that is none."""
        with Server(lab()) as server:
            self.assertIn("choose another with --port", self.refused(lab(), "--port", str(server.port)))
            with server.connect() as connection:
                connection.sendall(request("GET", "/todo"))
                self.assertEqual(Answer(connection).status, 200)
        hosts = ("no.such.host.invalid", "999.1.1.1", "192.0.2.1", "a" * 70, "::1")
        results = side_by_side(lambda host: lab().run("server/server.py", "--port", "0", "--host", host), hosts)
        for host, result in zip(hosts, results, strict=True):
            with self.subTest(host=host):
                self.assertIn("--host", self.refusal(result))
        self.assertIn("--host", self.refused(lab(), env={"MTLS_SERVER_HOST": "192.0.2.1"}))

    def test_senseless_settings(self) -> None:
        """Flags and variables that make no sense: exit 2, as argparse does."""
        cases: list[tuple[list[str], dict[str, str | None]]] = [
            (["--port", "banana"], {}), (["--port", "99999"], {}), (["--port", "-1"], {}), (["--port", ""], {}),
            (["--host", ""], {}), (["--allow-cn"], {}), (["--allow-cn", ""], {}), (["--nonsense"], {}), (["extra"], {}),
            ([], {"MTLS_SERVER_PORT": "banana"}), ([], {"MTLS_SERVER_PORT": "99999"}), ([], {"MTLS_ALLOWED_CNS": ","}),
        ]
        results = side_by_side(lambda case: lab().run("server/server.py", *case[0], env=case[1]), cases)
        for (arguments, env), result in zip(cases, results, strict=True):
            with self.subTest(arguments=arguments, env=env):
                self.assertEqual((result.returncode, result.stdout), (2, ""))
                self.assertIn("server.py: error: ", result.stderr)
        for script in ("server/server.py", "client/client.py", "client/client_no_cert.py"):
            result = lab().run(script, "--help")
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertIn("MTLS_SERVER_PORT", result.stdout)

    def test_flag_wins(self) -> None:
        """A flag wins over its variable, even over a senseless one."""
        with Server(lab(), "--host", "127.0.0.1", env={"MTLS_SERVER_PORT": "banana", "MTLS_SERVER_HOST": "192.0.2.1"}) as server:
            self.assertGreater(server.port, 0)


# --- What the clients make of other servers ------------------------------------------------


Behaviour = Callable[[socket.socket], None]


@contextlib.contextmanager
def other_server(behave: Behaviour) -> Iterator[str]:
    """A server that is not ours: treats each TCP connection as ``behave`` says. Yields its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    behave(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}/todo"
        finally:
            # shutdown wakes accept() on Linux; elsewhere a last connection does.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            with contextlib.suppress(OSError):
                socket.create_connection(listener.getsockname(), timeout=1).close()
            listener.close()
            thread.join(PATIENCE)


def answers(data: bytes, certificate: Lab | None = None) -> Behaviour:
    """Speak TLS with the server's certificate of a lab, read a request, send ``data``, close."""
    def behave(connection: socket.socket) -> None:
        certs = (certificate or lab()).certs
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certs / "server.crt", certs / "server.key")
        connection.settimeout(PATIENCE)
        with context.wrap_socket(connection, server_side=True) as tls:
            head = b""
            while b"\r\n\r\n" not in head:
                head += (received := tls.recv(65536))
                if not received:
                    return
            tls.sendall(data)
            with contextlib.suppress(OSError):
                tls.unwrap()
    return behave


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def resets(connection: socket.socket) -> None:
    """Wait for the first bytes and answer with a TCP reset."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")


def ends(connection: socket.socket) -> None:
    """Read the ClientHello and close without a word."""
    connection.recv(65536)


def sends_alert(connection: socket.socket, code: bytes = b"\x46") -> None:
    """Refuse with a fatal alert before any handshake; the default, protocol_version, is not about certificates."""
    connection.recv(65536)
    connection.sendall(b"\x15\x03\x03\x00\x02\x02" + code)


def speaks_http(connection: socket.socket) -> None:
    """Answer in plain HTTP."""
    connection.recv(65536)
    connection.sendall(http("200 OK"))


class TestClients(unittest.TestCase):
    """Each failure is one line that says what to do; the negative test never passes for a wrong reason."""

    def failed(self, *arguments: str, env: dict[str, str | None] | None = None, of: Lab | None = None) -> str:
        """Run client.py, which must exit with 1 and one ERROR line; returns the line."""
        return self.failure((of or lab()).run("client/client.py", *arguments, env=env))

    def failure(self, result: subprocess.CompletedProcess[str]) -> str:
        """The one ERROR line of a client that exited with 1."""
        self.assertEqual(result.returncode, 1, result.stderr)
        self.assertRegex(result.stderr, r"\A\[CLIENT\] ERROR: [^\n]+\n\Z")
        return result.stderr

    def no_pass(self, code: int, *arguments: str) -> str:
        """Run client_no_cert.py, which must exit with the code and not say PASS; returns what it says."""
        return self.no_pass_in(code, lab().run("client/client_no_cert.py", *arguments))

    def no_pass_in(self, code: int, result: subprocess.CompletedProcess[str]) -> str:
        """What a client_no_cert.py that exited with the code said."""
        self.assertEqual(result.returncode, code, result.stdout + result.stderr)
        self.assertNotIn("PASS", result.stdout)
        word = {1: "FAIL", 2: "ERROR"}[code]
        text = (result.stdout if code == 1 else result.stderr).splitlines()[-1]
        self.assertRegex(text, rf"\A\[NEGATIVE TEST\] {word}: .+\Z")
        return text

    def test_no_server(self) -> None:
        """Both name the command that starts it."""
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))   # bound but not listening: refuses
            url = f"https://127.0.0.1:{closed.getsockname()[1]}/todo"
            self.assertIn("start it first: python3 server/server.py", self.failed("--url", url))
            self.assertIn("start it first: python3 server/server.py", self.no_pass(2, "--url", url))

    def test_files(self) -> None:
        """Missing and misfitting certificate files, and the command that makes them."""
        empty = Lab("no certificates")
        self.assertIn("bash certs/gen_certs.sh", self.failed(of=empty))
        cases = [(option, file) for option in ("--cert", "--key", "--cacert")
                 for file in ("/no/such/file", "/dev/null", str(scratch()), str(lab().certs / "mallory.key"))]
        results = side_by_side(lambda case: lab().run("client/client.py", *case), cases)
        for case, result in zip(cases, results, strict=True):
            with self.subTest(case):
                self.assertIn("bash certs/gen_certs.sh", self.failure(result))
        for file in ("/no/such/file", "/dev/null", str(scratch())):
            self.assertIn("bash certs/gen_certs.sh", self.no_pass(2, "--cacert", file))

    def test_senseless_arguments(self) -> None:
        """URLs that are none, a TASK that is no text: exit 2."""
        scripts = ("client/client.py", "client/client_no_cert.py")
        cases = [(script, url) for script in scripts for url in (
            "http://127.0.0.1/", "file:///etc/passwd", "https://", "https://127.0.0.1:99999/", "x",
            "https://127.0.0.1:port/", "https://[::1/", "https://127.0.0.1/ñ")]
        results = side_by_side(lambda case: lab().run(case[0], "--url", case[1]), cases)
        for case, result in zip(cases, results, strict=True):
            with self.subTest(case):
                self.assertEqual(result.returncode, 2)
                self.assertIn("error: argument --url", result.stderr)
        for script in scripts:
            self.assertEqual(lab().run(script, env={"MTLS_SERVER_PORT": "banana"}).returncode, 2)
        self.assertEqual(lab().run("client/client.py", "\udcff").returncode, 2)
        self.assertEqual(lab().run("client/client_no_cert.py", "--tls-max", "1.1").returncode, 2)

    def test_untrusted_server(self) -> None:
        """Another CA, another name, expired: the client tells which; the negative test gives no result."""
        other = Lab("untrusted")
        other.generate(PREPARED_SET="untrusted")
        expired = Lab("expired")
        expired.generate()
        folder = new_folder("ca")
        (folder / "index").touch()
        openssl("ca", "-batch", "-config", ca_config(folder), "-in", expired.certs / "server.csr",
                "-cert", expired.certs / "ca.crt", "-keyfile", expired.certs / "ca.key", "-out", expired.certs / "server.crt",
                "-outdir", folder, "-notext", "-md", "sha256", "-startdate", "20200101000000Z", "-enddate", "20200201000000Z",
                "-extfile", expired.certs / "server.cnf", "-extensions", "v3_server")
        cases = ((other, "127.0.0.1", r"(unable to get local issuer certificate|certificate signature failure)"),
                 (expired, "127.0.0.1", "certificate has expired"),
                 (lab(), "127.0.0.2", "IP address mismatch, certificate is not valid for '127.0.0.2'"))
        for certificate, host, words in cases:
            with self.subTest(words=words), other_server(answers(http("200 OK"), certificate)) as url:
                here = url.replace("127.0.0.1", host)
                if host == "127.0.0.2" and sys.platform != "linux":
                    continue   # elsewhere only 127.0.0.1 is on the loopback interface
                if host == "127.0.0.2":
                    with Server(lab(), "--host", host) as server:
                        url = f"https://{host}:{server.port}/todo"
                        self.assertRegex(self.failed("--url", url), words)
                        self.assertRegex(self.no_pass(2, "--url", url), words)
                    continue
                self.assertRegex(self.failed("--url", here), words)
                self.assertRegex(self.no_pass(2, "--url", here), words)

    def test_strange_answers(self) -> None:
        """Servers that answer something else than ours does."""
        deep = b"[" * 100_000
        cases: list[tuple[str, Behaviour, str]] = [
            ("an HTTP error with our kind of body", answers(http("507 Full", b'{"error": "the list\\nis \\u009b31m full"}')),
             r"HTTP 507: the list is \\u009b31m full"),
            ("an HTTP error with another body", answers(http("500 Oops", b"<html>")), "HTTP 500: <html>"),
            ("an HTTP error without body", answers(http("404 Nowhere")), "HTTP 404: Nowhere"),
            ("a redirect", answers(http("302 Found", b"", "Location: https://127.0.0.1:9/")), "HTTP 302"),
            ("no JSON", answers(http("200 OK", b"hello")), "did not send the JSON"),
            ("another JSON", answers(http("200 OK", b"[1, 2]")), "did not send the JSON"),
            ("no UTF-8", answers(http("200 OK", b'"\xff"')), "did not send the JSON"),
            ("deep JSON", answers(http("200 OK", deep)), "did not send the JSON"),
            ("no HTTP", answers(b"220 smtp.example ESMTP\r\n"), "no HTTP answer"),
            ("less than announced", answers(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"), "no HTTP answer"),
            ("nothing", answers(b""), "no HTTP answer"),
            ("a reset", resets, "no HTTP answer"),
            ("an end", ends, "no HTTP answer"),
            ("plain HTTP", speaks_http, "no HTTP answer"),
        ]
        for title, behave, words in cases:
            with self.subTest(title), other_server(behave) as url:
                self.assertRegex(self.failed("--url", url), words)

    def test_negative_test_without_refusal(self) -> None:
        """HTTP of any status is a FAIL; whatever is not the alert for a missing certificate is an ERROR."""
        cases: list[tuple[str, int, Behaviour, str]] = [
            ("200", 1, answers(http("200 OK", b"{}")), "HTTP 200"),
            ("403", 1, answers(http("403 Forbidden", b"{}")), "HTTP 403"),
            ("500", 1, answers(http("500 Oops")), "HTTP 500"),
            ("a redirect to a server that would refuse", 1, answers(http("302 Found", b"", "Location: {refusing}")), "HTTP 302"),
            ("no HTTP", 2, answers(b"220 smtp.example ESMTP\r\n"), "220 smtp"),
            ("a reset", 2, resets, "reset"),
            ("an end", 2, ends, "(?i)eof"),
            ("plain HTTP", 2, speaks_http, "(?i)wrong.version"),
            ("another alert", 2, sends_alert, "alert protocol version"),
            ("the right alert from anyone", 2, lambda connection: sends_alert(connection, b"\x74"), "before the server"),
            ("the right alert of TLS 1.2 from anyone", 2, lambda connection: sends_alert(connection, b"\x28"),
             "before the server"),
        ]
        with Server(lab()) as refusing:
            for title, code, behave, words in cases:
                if title.startswith("a redirect"):
                    behave = answers(http("302 Found", b"", f"Location: {refusing.url}"))
                with self.subTest(title), other_server(behave) as url:
                    self.assertRegex(self.no_pass(code, "--url", url), words)

    def test_hostile_text(self) -> None:
        """What another client put on the list cannot drive this client's terminal."""
        body = '{"client": "x\\u001b]0;", "todo": {}, "todos": [{"id": 1, "task": "\u009b31m\u202e\u007f", "done": true}]}'
        with other_server(answers(http("200 OK", body.encode()))) as url:
            result = lab().run("client/client.py", "--url", url)
            self.assertEqual((result.returncode, result.stderr), (0, ""))
            self.assertEqual([c for c in result.stdout if not c.isprintable() and c != "\n"], [])
            self.assertIn(r'"task": "\u009b31m\u202e\u007f"', result.stdout)

    def test_timeouts(self) -> None:
        """A server that says nothing: both give up after 10 s and say so."""
        client, negative = SILENCE.results()
        self.assertIn("within 10 s", self.failure(client))
        self.assertIn("within 10 s", self.no_pass_in(2, negative))


class Silence:
    """Both clients, left alone with a server that says nothing, while the other tests run."""

    def __init__(self) -> None:
        self._closing = contextlib.ExitStack()
        self._silent = self._closing.enter_context(socket.create_server(("127.0.0.1", 0)))   # nobody accepts
        url = f"https://127.0.0.1:{self._silent.getsockname()[1]}/todo"
        pool = self._closing.enter_context(ThreadPoolExecutor())
        self._futures = [pool.submit(lab().run, f"client/{name}.py", "--url", url) for name in ("client", "client_no_cert")]

    def results(self) -> list[subprocess.CompletedProcess[str]]:
        """How they ended; waits until they have."""
        return [future.result() for future in self._futures]

    def close(self) -> None:
        """Let go of the port."""
        self._closing.close()


SILENCE: Silence


def setUpModule() -> None:   # noqa: N802
    """Start what takes 10 s."""
    global SILENCE
    lab()
    SILENCE = Silence()
    unittest.addModuleCleanup(SILENCE.close)


def ca_config(folder: Path) -> Path:
    """A configuration for ``openssl ca``, which alone can set dates in every openssl."""
    config = folder / "ca.conf"
    config.write_text(f"""[ca]
default_ca = lab
[lab]
database = {folder}/index
serial = {folder}/serial
policy = any
[any]
commonName = supplied
""")
    (folder / "serial").write_text("01\n")
    return config


if __name__ == "__main__":
    unittest.main()
