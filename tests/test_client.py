"""The two clients: what they print, whom they believe, how long they wait, and how they fail."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests import side_by_side as load_tests  # noqa: F401
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
from tests.test_readme import section

CLIENT, NEGATIVE = "client", "client_no_cert"

Behaviour = Callable[[socket.socket], object]
"""What a server that is not ours does with a TCP connection, which is closed afterwards."""


@contextlib.contextmanager
def other_server(behave: Behaviour) -> Iterator[str]:
    """A server with this behaviour. Yields its URL."""
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                behave(self.request)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.02)
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}/todo"
        finally:
            server.shutdown()


def hear(connection: socket.socket) -> bytes:
    """What comes next; ConnectionError if nothing does."""
    if not (received := connection.recv(65536)):
        raise ConnectionError
    return received


def drip(connection: socket.socket, data: bytes) -> None:
    """Send the same again and again, for ten seconds or more."""
    for _ in range(200):
        connection.sendall(data)
        time.sleep(0.05)


def alerts(connection: socket.socket, code: int) -> None:
    """Read what is sent and answer with an unprotected fatal alert."""
    hear(connection)
    connection.sendall(b"\x15\x03\x03\x00\x02\x02" + bytes([code]))
    hear(connection)


def resets(connection: socket.socket) -> None:
    """Wait for the first bytes and answer with a TCP reset."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()


def speaks_tls(certificate: Path | None = None) -> ssl.SSLContext:
    """A server's context, for any client. It shows ``certificate`` (a path without .crt), or the lab's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = certificate or lab().certs / "server"
    context.load_cert_chain(f"{path}.crt", f"{path}.key")
    return context


def answers(data: bytes, certificate: Path | None = None, dripping: bool = False) -> Behaviour:
    """Speak TLS, read a request's head, send ``data``, close."""
    def behave(connection: socket.socket) -> None:
        with speaks_tls(certificate).wrap_socket(connection, server_side=True) as tls:
            head = b""
            while b"\r\n\r\n" not in head:
                head += hear(tls)
            drip(tls, data) if dripping else tls.sendall(data)
            with contextlib.suppress(OSError):
                tls.unwrap()
    return behave


def refuses_late(data: bytes = b"", forged: int | None = None) -> Behaviour:
    """Prove who it is, send ``data``, and answer the request with an alert (bad_record_mac), as if it were damaged.

    With ``forged`` it is a man in the middle of TLS 1.2: as soon as the server has proved who it is, he sends an alert.
    """
    def behave(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = speaks_tls().wrap_bio(incoming, outgoing, server_side=True)
        finished = False
        while not finished:
            incoming.write(hear(connection))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                finished = True
                tls.write(data)
            connection.sendall(outgoing.read())
            if forged is not None:
                alerts(connection, forged)
        record = incoming.read() or hear(connection)   # the request may be here already
        incoming.write(record[:-1] + bytes([record[-1] ^ 1]))
        with contextlib.suppress(ssl.SSLError):
            tls.read(65536)
        connection.sendall(outgoing.read())
        hear(connection)
    return behave


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@once
def other_ca() -> Path:
    """A folder with certificates of another CA of the same name; chain.crt is its server.crt with ca.crt."""
    other = Lab("another CA")
    other.generate(PREPARED_SET="second")
    certs = other.certs
    (certs / "chain.crt").write_text((certs / "server.crt").read_text() + (certs / "ca.crt").read_text())
    shutil.copy(certs / "server.key", certs / "chain.key")
    return certs


class Case(NamedTuple):
    """A run of a client and how it should end."""

    program: str
    words: str                    # a regular expression, to be found in what it prints
    code: int = 1                 # the exit code
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str | None] = {}
    before: str = ""              # Python code that runs between the import and main()
    server: Behaviour | None = None
    host: str = "127.0.0.1"       # that the URL of this server names


VERDICTS = {(CLIENT, 1): "[CLIENT] ERROR: ", (NEGATIVE, 0): "[NEGATIVE TEST] PASS: ",
            (NEGATIVE, 1): "[NEGATIVE TEST] FAIL: ", (NEGATIVE, 2): "[NEGATIVE TEST] ERROR: "}
"""How the last line begins, by exit code."""


def run(case: Case) -> subprocess.CompletedProcess[str]:
    """Run the client to its end; with another server, if the case has one. A proxy of the environment is not there."""
    if case.server:
        with other_server(case.server) as url:
            arguments = ("--url", url.replace("127.0.0.1", case.host), *case.arguments)
            return run(case._replace(server=None, arguments=arguments))
    folder = lab().root / "client"
    start = [str(folder / f"{case.program}.py")]
    if case.before:
        start = ["-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import exchange, {case.program} as program\n"
                       f"{case.before}\nprogram.main()"]
    env = environment({"https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9", **case.env})
    return subprocess.run([sys.executable, "-W", "error", *start, *case.arguments], env=env, cwd=scratch(),
                          stdin=subprocess.DEVNULL, capture_output=True, check=False, encoding="utf-8",
                          errors="surrogateescape", timeout=PATIENCE * 2)


class ClientCase(unittest.TestCase):
    """What tests of both clients share."""

    def check(self, cases: list[Case], run: Callable[[Case], subprocess.CompletedProcess[str]] = run) -> None:
        """Run the clients, a few at a time; each must end as its case says, without what could steer a terminal."""
        for case, result in zip(cases, side_by_side(run, cases), strict=True):
            with self.subTest(case.program, words=case.words):
                said = result.stdout + result.stderr
                self.assertEqual(result.returncode, case.code, said)
                self.assertRegex(said, case.words)
                self.assertEqual([c for c in said if not c.isprintable() and c != "\n"], [])
                self.assertEqual("PASS" in said, case.program == NEGATIVE and case.code == 0)
                if not result.stderr.startswith("usage: "):
                    last = said.splitlines(keepends=True)[-1]
                    self.assertTrue(last.startswith(VERDICTS.get((case.program, case.code), "")), said)
                    self.assertEqual(result.stderr, last if " ERROR: " in last else "")


class TestOurServer(ClientCase):
    """With the lab's server: what the description shows, to the letter, whatever the environment."""

    def test_client(self) -> None:
        """On a fresh server it prints what the page shows; a proxy or a foreign locale changes nothing."""
        page = section("With a certificate").blocks[1].content
        for encoding, letter in ((None, "ñ"), ("ascii", r"\xf1")):   # ascii: a terminal that cannot show it
            with self.subTest(encoding), Server(lab()) as server:
                env = {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "MTLS_SERVER_PORT": str(server.port)}
                result = run(Case(CLIENT, "", env=env))
                shown = page.replace("8443", str(server.port)).replace("ñ", letter)
                self.assertEqual((result.returncode, result.stderr, result.stdout), (0, "", shown))

    def test_without_certificate(self) -> None:
        """The negative test passes, over TLS 1.3 and 1.2, with OpenSSL's own words."""
        with Server(lab()) as server:
            self.check([Case(NEGATIVE, rf"Error: \[SSL: {words} \(_ssl\.c:\d+\)\n", 0, ("--url", server.url, *old))
                        for old, words in (
                            ((), r"TLSV13_ALERT_CERTIFICATE_REQUIRED\] tlsv13 alert certificate required"),
                            (("--tls-max", "1.2"), r"SSLV3_ALERT_HANDSHAKE_FAILURE\] .+ alert handshake failure"))])

    def test_refused_by_our_server(self) -> None:
        """Not on its list, or of another CA: the client says what to do."""
        with Server(lab()) as server:
            self.check([
                Case(CLIENT, words, arguments=("--url", server.url, "--cert", f"{path}.crt", "--key", f"{path}.key"))
                for path, words in (
                    (lab().certs / "mallory", "HTTP 403: client certificate: CN 'mallory' is not in the allowed list; "
                                              "if it should be, start the server with --allow-cn and all its names$"),
                    (other_ca() / "server", "the server refused us: .*alert unknown ca.*; is our certificate signed"))])

    def test_output_that_fails(self) -> None:
        """A reader that leaves early or late, a disk that is full: nobody is blamed, least of all the server."""
        full = [">/dev/full; [ $? = %d ]"] if Path("/dev/full").exists() else []   # only Linux has it
        with Server(lab()) as server:
            for name, code in ((CLIENT, 1), (NEGATIVE, 2)):
                for redirection in ("| head -n 1 >/dev/null", "| head -n 15 >/dev/null", *full):
                    with self.subTest(name, redirection=redirection):
                        command = ["sh", "-c", f'"$1" "$2" --url "$3" {redirection.replace("%d", str(code))}', "sh",
                                   sys.executable, str(lab().root / "client" / f"{name}.py"), server.url]
                        result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
                        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))

    def test_key_log(self) -> None:
        """SSLKEYLOGFILE gets the session's secrets, in a file that is its owner's alone."""
        folder = new_folder("keylog")
        (folder / "old").write_text("# before\n")
        (folder / "old").chmod(0o644)
        (folder / "link").symlink_to("target")
        (folder / "target").write_text("mine\n")
        theirs = Path("/dev/null")   # root's
        if os.getuid() == 0:
            theirs = folder / "theirs"
            theirs.touch(0o666)
            os.chown(theirs, 65534, -1)
        words = r"cannot use SSLKEYLOGFILE=.* \(.+\); name a new file in a folder of your own$"
        with Server(lab()) as server:
            self.check([Case(CLIENT, words, code, ("--url", server.url), {"SSLKEYLOGFILE": str(folder / name)})
                        for name, words, code in (("new", "POST", 0), ("old", "POST", 0), ("link", words, 1),
                                                  (str(theirs), words, 1), ("no/such", words, 1))])
        for name, start in (("new", ""), ("old", "# before\n")):
            self.assertRegex((folder / name).read_text(), rf"\A{start}[\s\S]*CLIENT_HANDSHAKE_TRAFFIC_SECRET")
            self.assertEqual((folder / name).stat().st_mode & 0o777, 0o600)
        self.assertEqual((folder / "target").read_text(), "mine\n")


class TestStart(ClientCase):
    """What is found before anything is sent: arguments, variables, files, no or a silent server, an old Python."""

    seconds = 10

    def test_files(self) -> None:
        """Missing, misfitting and unreadable files. Where there is a CA, none is advised that would replace it."""
        certs = lab().certs
        openssl("rsa", "-aes128", "-passout", "pass:secret", "-in", certs / "client.key", "-out", certs / "secret.key")
        shutil.copy(certs / "client.key", certs / "locked.key")
        (certs / "locked.key").chmod(0)
        theirs = f"locked.key .*it belongs to {certs.owner()}, who must let us read it"
        # Root may read everything: it becomes nobody, who can reach the files only from inside their folder.
        leave = f"import gettext, locale, os, shutil; os.chdir({str(certs)!r}); os.getuid() or os.setuid(65534)"
        missing, damaged = r"cannot use .*/{} \(No such file .*\); {}$", "damaged or do not fit together.* client NAME$"
        self.check([
            Case(CLIENT, missing.format("bob.crt", "make it: bash certs/gen_certs.sh client bob"),
                 arguments=("--cert", str(certs / "bob.crt"), "--key", str(certs / "bob.key"))),
            Case(CLIENT, "client 'b;b'$", arguments=("--key", str(certs / "b;b.key"))),
            *(Case(CLIENT, missing.format(path.name, r"is this the right path\?"), arguments=(option, str(path)))
              for option, path in (("--cert", Path("/no/such")), ("--cacert", certs / "no-such.crt"))),
            Case(NEGATIVE, missing.format("such", r"is this the right path\?"), 2, ("--cacert", "/no/such")),
            Case(CLIENT, "Is a directory.*right path", arguments=("--cert", str(scratch()))),
            *(Case(CLIENT, damaged, arguments=(option, "/dev/null")) for option in ("--cert", "--key", "--cacert")),
            Case(CLIENT, "key values mismatch.*client NAME$", arguments=("--key", str(certs / "mallory.key"))),
            Case(NEGATIVE, "/dev/null holds no certificate", 2, ("--cacert", "/dev/null")),
            Case(CLIENT, theirs, 1, ("--cert", "ca.crt", "--key", "locked.key", "--cacert", "ca.crt"), before=leave),
            Case(NEGATIVE, theirs, 2, ("--cacert", "locked.key"), before=leave),
        ])
        code, shown = in_terminal([sys.executable, str(lab().root / "client" / "client.py"),
                                   "--key", str(certs / "secret.key")])   # where OpenSSL could ask for the password
        self.assertEqual(code, 1)
        self.assertRegex(shown, rf"\A\[CLIENT\] ERROR: .*{damaged}")

    def test_nothing_there(self) -> None:
        """Without certificates or a server, both name the command for it; with a silent server they give up at 10 s."""
        empty = Lab("no certificates")
        words = "make the certificates: bash certs/gen_certs.sh$"
        self.check([Case(CLIENT, words), Case(NEGATIVE, words, 2)], lambda case: empty.run(f"client/{case.program}.py"))
        with socket.socket() as closed, socket.create_server(("127.0.0.1", 0)) as silent:   # nobody accepts
            closed.bind(("127.0.0.1", 0))   # bound but not listening: refuses
            self.check([
                Case(program, words, code, env={"MTLS_SERVER_PORT": str(there.getsockname()[1])})
                for program, code in ((CLIENT, 1), (NEGATIVE, 2)) for there, words in (
                    (closed, "no server at https://127.0.0.1:[0-9]+/todo; start it first: python3 server/server.py$"),
                    (silent, "no answer from https://127.0.0.1:.* within 10 s; is our server there"))])

    def test_senseless_arguments(self) -> None:
        """URLs that are none, ports that are none, a TASK that is no text: exit 2, with the reason."""
        urls = {"must begin with https://": ("http://127.0.0.1/", "localhost:8443/todo", "file:///etc/passwd", "x"),
                "is no URL such as https://127.0.0.1:8443/todo": (
                    "https://", "https://127.0.0.1:99999/", "https://127.0.0.1:port/", "https://127.0.0.1:0/",
                    "https://[::1/", "https://127.0.0.1/ñ", "https://127.0.0.1/a b", "https://a..b/")}
        ports = ((CLIENT, "abc"), (CLIENT, "0"), (CLIENT, "65536"), (CLIENT, "1_0"), (CLIENT, "²"), (NEGATIVE, "abc"))
        self.check([
            *(Case(CLIENT, f"error: argument --url: '.*' {words}$", 2, ("--url", url))
              for words, those in urls.items() for url in those),
            Case(NEGATIVE, "must begin with https://$", 2, ("--url", "http://127.0.0.1/")),
            *(Case(program, f"error: MTLS_SERVER_PORT: '{port}' is no port", 2, env={"MTLS_SERVER_PORT": port})
              for program, port in ports),
            Case(CLIENT, "TASK: is no valid text", 2, ("\udcff",)),
            Case(CLIENT, "MTLS_SERVER_PORT", 0, ("--help",)),
        ])

    def test_old_python(self) -> None:
        """All three programs say in one line that it is too old."""
        folders = (Path("/usr/bin"), Path("/usr/local/bin"), *Path.home().glob(".pyenv/versions/*/bin"))
        old = [python for folder in folders for python in folder.glob("python3.[6-9]")]
        if not old:
            self.skipTest("needs a Python older than 3.10")
        for python in old:
            for program in ("client/client.py", "client/client_no_cert.py", "server/server.py"):
                result = subprocess.run([python, lab().root / program], env=environment(), capture_output=True,
                                        text=True, check=False)
                self.assertRegex(result.stderr, rf"\A{program.split('/')[1]}: needs Python 3\.10 or newer, "
                                                r"this is 3\.\d\.\d+\n\Z")
                self.assertEqual((result.returncode, result.stdout), (1, ""))


class TestOtherServers(ClientCase):
    """Each failure is one line that says what to do; the negative test never passes for a wrong reason."""

    def test_untrusted(self) -> None:
        """A certificate that does not verify: both tell why, and what to do about just that."""
        certs, other, host = lab().certs, other_ca(), "subjectAltName = IP:127.0.0.1"
        issue(lab(), "expired", "/CN=s", host, "20200101000000Z", "20200201000000Z")
        issue(lab(), "early", "/CN=s", host, "20440101000000Z", "20450101000000Z")
        issue(lab(), "elsewhere", "/CN=127.0.0.1", "subjectAltName = DNS:localhost")
        issue(lab(), "no-san", "/CN=localhost", "extendedKeyUsage = serverAuth")
        restart = "; restart the server if gen_certs.sh has run since it started; if not, is it our server"
        dates = "; compare the clock with the certificate's dates: openssl x509 -noout -dates -in certs/server.crt$"
        names = "; the host in the URL must stand under alt_names in certs/server.cnf$"
        self.check([
            Case(program, f"the server's certificate is not trusted: .*{words}", code,
                 env={"SSL_CERT_FILE": str(other / "ca.crt")},   # what the system trusts is not what we trust
                 server=answers(http("200 OK", b"{}"), certificate),
                 host="localhost" if "localhost" in words else "127.0.0.1")
            for program, code in ((CLIENT, 1), (NEGATIVE, 2))
            for certificate, words in (
                (other / "server", restart), (other / "chain", restart), (other / "ca", restart),
                (certs / "expired", "certificate has expired" + dates),
                (certs / "early", "certificate is not yet valid.*" + dates),
                (certs / "client", "; is it our server"),   # is for clients only
                (certs / "elsewhere", "IP address mismatch.* '127.0.0.1'.*" + names),
                (certs / "no-san", "Hostname mismatch.* 'localhost'.*" + names))])

    def test_strange_answers(self) -> None:
        """What both say of other answers; what another client put on the list cannot drive a terminal."""
        no_json, no_answer, too_long = "did not send the JSON", "no HTTP answer", "sent more than 1 MB"
        let_in, in_http = r"HTTP {} .*: let in\.$", "HTTP {} .*: refused, but in HTTP, after TLS had let us in"
        silent, too_early = "without an alert or an answer .*may have refused", "before the server proved who it is"
        ok, much = b"HTTP/1.1 200 OK\r\n", b"x" * 2 ** 21
        with Server(lab()) as refusing:
            cases: list[tuple[Behaviour, str, int, str]] = [
                (answers(http("507 Full", b'{"error": "the list\\nis \\u009b31m full"}')),
                 r"HTTP 507: the list is \\u009b31m full", 1, in_http.format(507)),
                (answers(http("400 Bad", b"<html>\x1b")), r"HTTP 400: <html>\\u001b", 1, in_http.format(400)),
                (answers(http("404 Nowhere")), "HTTP 404: Nowhere", 1, in_http.format(404)),
                *((answers(http("302 Found", b"", f"Location: {target}")), "HTTP 302", 1, let_in.format(302))
                  for target in (refusing.url, "http://[x/")),
                *((answers(http("200 OK", body)), no_json, 1, let_in.format(200))
                  for body in (b"hello", b"[1, 2]", b'"\xff"', b"[" * 100_000)),
                *((answers(ok + head + b"\r\n\r\n" + much), too_long, 1, let_in.format(200))
                  for head in (b"A: b", b"Content-Length: 9999999", b"Transfer-Encoding: chunked\r\n\r\nde0b6b3a76")),
                *((answers(ok + b"Content-Length: %d\r\n\r\n{" % length), no_answer, 1, let_in.format(200))
                  for length in (9, 10 ** 18, 10 ** 19)),
                (answers(b"220 \x1b0;\x07\r\n"), no_answer + r".*220 \\u001b0;\\u0007", 2, r"220 \\u001b0;\\u0007"),
                (answers(b""), no_answer, 2, silent), (resets, no_answer, 2, silent), (hear, no_answer, 2, silent),
                (lambda connection: connection.sendall(http("200 OK")), no_answer, 2, "(?i)wrong.version"),
                *((functools.partial(alerts, code=code), "refused us: ", 2, words)
                  for code, words in ((70, "alert protocol version"), (116, too_early), (40, too_early))),
            ]
            self.check([case for server, words, code, words_of_negative in cases for case in (
                Case(CLIENT, words, server=server), Case(NEGATIVE, words_of_negative, code, server=server))])
        body = b'{"client": "\\u001b", "todo": 0, "todos": ["\xc2\x9b31m", "\xe2\x80\xae", "\x7f"]}'
        self.check([Case(CLIENT, r'"\\u009b31m",\n *"\\u202e",\n *"\\u007f"', 0, server=answers(http("200 OK", body)))])

    def test_late_refusals(self) -> None:
        """From a server that has proved who it is: PASS only for the right alert, and before any answer."""
        # No server here can be made to send certificate_required late, so another alert is counted as that.
        counted = 'program.REFUSALS.add("SSLV3_ALERT_BAD_RECORD_MAC")'
        old = ("--tls-max", "1.2")
        begun = "Server began to answer a client without a certificate; only then: .*bad record mac"
        partly = refuses_late(b"HTTP/1.1 200 OK\r\nContent-Le")
        self.check([
            Case(NEGATIVE, "nothing is proved: .*alert unknown ca", 2, old, server=refuses_late(forged=48)),
            Case(NEGATIVE, "nothing is proved: .*alert certificate unknown", 2, old, server=refuses_late(forged=46)),
            Case(NEGATIVE, "PASS", 0, old, server=refuses_late(forged=40)),   # TLS 1.2 cannot tell who sent it
            Case(NEGATIVE, "nothing is proved: .*bad record mac", 2, server=refuses_late()),
            Case(NEGATIVE, "PASS", 0, before=counted, server=refuses_late()),
            Case(NEGATIVE, "PASS", 0, old, before=counted, server=refuses_late()),
            Case(NEGATIVE, begun, before=counted, server=partly),
            Case(NEGATIVE, begun, 1, old, before=counted, server=partly),
            Case(NEGATIVE, begun, before=counted, server=refuses_late(b"H"))])

    def test_drips(self) -> None:
        """A server that never says its last word: both give up when the whole exchange takes too long."""
        drips = (lambda connection: drip(connection, b"\x16\x03\x03\x16\x03"),   # the beginning of a long ServerHello
                 *(answers(piece, dripping=True) for piece in (
                     b"H", b"HTTP/1.1 100 Go on\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n", b"HTTP/1.1 200 OK\r\n\r\n")))
        self.check([Case(program, "no complete answer from https://.* within 1 s", code, before="exchange.EXCHANGE = 1",
                         server=drip)
                    for program, code, those in ((CLIENT, 1, drips), (NEGATIVE, 2, drips[:-1])) for drip in those])
