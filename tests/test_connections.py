"""The server's connections: whatever peers do, it ends what waits too long, says why, and serves the others."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.support import (
    PATIENCE,
    Server,
    ServerCase,
    Talk,
    Wire,
    environment,
    lab,
    request,
)

MAX_CONNECTIONS = 256
SLACK = 8.0
"""Seconds that a deadline may come late: the machine may be busy."""

GET = request("GET", "/todo")
ENDING_GET = request("GET", "/todo", Connection="close")
HALF = b"GET /todo HTTP/1.1\r\nHost: loc"
HALF_BODY = b"POST /todo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
BODY = b'{"task": "Finished in the end"}'


def todo(task: str) -> bytes:
    """A POST of this task."""
    return request("POST", "/todo", json.dumps({"task": task}).encode())


def begin_post(talk: Talk) -> None:
    """Begin a POST, and know that the server has begun to read it; `end_post` ends it."""
    talk.send(request("POST", "/todo", Content_Type="application/json", Content_Length=str(len(BODY)),
                      Expect="100-continue"))
    assert (talk.readline(), talk.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")


def end_post(talk: Talk) -> None:
    """The rest of it."""
    talk.send(BODY)


def reset(connection: socket.socket) -> None:
    """Close with a reset, as a crashing peer or a hostile one does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_silent(connection: socket.socket, seconds: float) -> bool:
    """Whether nothing is heard for so long, not even the end."""
    patience = connection.gettimeout()
    connection.settimeout(seconds)
    try:
        connection.recv(1)
    except (TimeoutError, ssl.SSLWantReadError, BlockingIOError):
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(patience)
    return False


def hear(connection: socket.socket) -> bytes:
    """What it says up to its end; a reset of a plain connection counts as one. TLS must end with close_notify."""
    heard = b""
    try:
        while piece := connection.recv(65536):
            heard += piece
    except ConnectionError:
        if isinstance(connection, ssl.SSLSocket):
            raise
    return heard


def trickle(connection: socket.socket, data: bytes, seconds: float) -> bytes:
    """Send one byte after the other, so many seconds apart, until something is heard; returns what, to the end."""
    connection.settimeout(seconds)
    for byte in data:
        try:
            connection.send(bytes([byte]))
            first = connection.recv(1)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
        connection.settimeout(PATIENCE)
        return first and first + hear(connection)
    raise AssertionError(f"nothing was heard while {len(data)} bytes were sent")


@contextlib.contextmanager
def many_descriptors(case: unittest.TestCase, number: int) -> Iterator[None]:
    """Let this process have so many descriptors; skips the test if the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < number:
        if hard != resource.RLIM_INFINITY and hard < number:
            case.skipTest(f"needs {number} descriptors, but the system allows this process only {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def processor_seconds(server: Server) -> float:
    """How long the server has been computing so far."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_listening(server: Server) -> bool:
    """Whether one can still connect."""
    try:
        server.connect_plain().close()
    except ConnectionError:
        return False
    return True


class ConnectionCase(ServerCase):
    """What these tests share."""

    def assert_served(self, server: Server, message: str = "a proper client is served") -> None:
        """A new client gets its answer and a clean end."""
        with Talk(server.connect()) as talk:
            talk.send(ENDING_GET)
            self.assertEqual(talk.answer().status, 200, message)
            self.assert_ends_well(talk)

    def assert_quiet_while(self, server: Server, connection: socket.socket, what: str) -> None:
        """The connection hears nothing for a second, in which the server hardly computes."""
        started, computed = time.monotonic(), processor_seconds(server)
        self.assertTrue(is_silent(connection, 1.0), f"{what} should have to wait")
        share = (processor_seconds(server) - computed) / (time.monotonic() - started)
        self.assertLess(share, 0.2, f"the server is busy while {what} waits")

    def assert_side_by_side(self, checks: Mapping[str, tuple[Callable[[int], None], int]]) -> None:
        """Make several checks at the same time, because they take long."""
        with concurrent.futures.ThreadPoolExecutor(len(checks)) as pool:
            results = {what: pool.submit(check, argument) for what, (check, argument) in checks.items()}
        for what, result in results.items():
            with self.subTest(what):
                result.result()

    def kept_alive(self, server: Server, held: contextlib.ExitStack, number: int) -> list[Talk]:
        """So many connections that have been served and are idle now, the longest idle first."""
        talks = []
        for _ in range(number):
            talks.append(held.enter_context(Talk(server.connect())))
            self.assertEqual(talks[-1].ask("GET", "/nothing").status, 404)
        return talks

    def silent(self, server: Server, held: contextlib.ExitStack, number: int) -> list[socket.socket]:
        """So many connections that say nothing, the oldest first."""
        return [held.enter_context(server.connect_plain()) for _ in range(number)]

    def wait_for_evictions(self, server: Server, number: int) -> None:
        """So many unfinished handshakes have had to go."""
        server.stderr.wait_for(lambda lines: sum("REJECTED" in line for line in lines) >= number)


class Waits(ConnectionCase):
    """What takes long because it waits, side by side and beside the other tests; `TestWaits` looks at the results."""

    def __init__(self) -> None:
        super().__init__()
        with contextlib.ExitStack() as held:
            # Entered before the servers, and so left after them: their end ends the waits.
            pool = held.enter_context(concurrent.futures.ThreadPoolExecutor(30))
            self.server, self.loaded, self.stopping, crowded = (held.enter_context(Server(lab())) for _ in range(4))
            self.before, self.before_load = self.server.counts(), self.loaded.counts()
            server = self.server
            self.waits: dict[str, tuple[float, Callable[[], None]]] = {
                "a silent connection ends": (5, lambda: self.stay_silent(server)),
                "a ClientHello that comes byte by byte ends": (5, lambda: self.trickle_hello(server)),
                "a handshake that stops halfway ends": (5, lambda: self.stop_halfway(server)),
                "a handshake whose second half comes byte by byte ends": (5, lambda: self.trickle_flight(server)),
                "a connection without a request ends with close_notify": (15, lambda: self.be_idle(server, b"")),
                "an idle connection ends with close_notify": (15, lambda: self.be_idle(server, GET)),
                "an idle connection that sends only the beginning of a TLS record ends with close_notify":
                    (15, lambda: self.trickle_record(server, b"", b"")),
                "a connection with a request now and then goes on": (16, lambda: self.ask_now_and_then(server)),
                "a request that stops after one byte is answered with 408": (10, lambda: self.stall(server, b"G")),
                "a request that stops in its headers is answered with 408": (10, lambda: self.stall(server, HALF)),
                "a request that stops in its body is answered with 408": (10, lambda: self.stall(server, HALF_BODY)),
                "a request line that comes byte by byte is answered with 408":
                    (10, lambda: self.trickle_request(server, b"")),
                "a header that comes byte by byte is answered with 408":
                    (10, lambda: self.trickle_request(server, HALF)),
                "a body that comes byte by byte is answered with 408":
                    (10, lambda: self.trickle_request(server, HALF_BODY)),
                "a TLS record that comes byte by byte is answered with 408":
                    (10, lambda: self.trickle_record(server, HALF, b"HTTP/1.1 408 ")),
                "a response that nobody takes ends": (10, lambda: self.take_no_response(self.loaded, self.before_load)),
                "a flood of strangers cannot push out clients that have been idle": (11, lambda: self.survive(crowded)),
                "a refused peer that stays is left": (2, lambda: self.stay_after(server, None, ENDING_GET)),
                "a peer that stays after an error is left":
                    (2, lambda: self.stay_after(server, "client", b"rubbish\r\n")),
                "a stalled request ends with the server that is told to stop":
                    (5, lambda: self.stop_stalled(self.stopping)),
            }
            self.seconds = {what: pool.submit(self.timed, wait) for what, (_, wait) in self.waits.items()}
            self.end = held.pop_all().close

    def timed(self, wait: Callable[[], None]) -> float:
        """How long it takes."""
        started = time.monotonic()
        wait()
        return time.monotonic() - started

    # The waits, each from its beginning to its end

    def stay_silent(self, server: Server) -> None:
        with server.connect_plain() as plain:
            self.assertEqual(hear(plain), b"")

    def trickle_hello(self, server: Server) -> None:
        with Wire(server) as wire:
            self.assertEqual(trickle(wire.plain, wire.bytes_of(wire.tls.do_handshake), 0.25), b"")

    def stop_halfway(self, server: Server) -> None:
        with Wire(server) as wire:
            wire.flight()
            self.assertEqual(hear(wire.plain), b"")

    def trickle_flight(self, server: Server) -> None:
        with Wire(server) as wire:
            self.assertEqual(trickle(wire.plain, wire.flight(), 0.25), b"")

    def be_idle(self, server: Server, first: bytes) -> None:
        with Talk(server.connect()) as talk:
            if first:
                talk.send(first)
                self.assertEqual(talk.answer().status, 200)
            self.assert_ends_well(talk, PATIENCE)

    def ask_now_and_then(self, server: Server) -> None:
        with Talk(server.connect()) as talk:
            for _ in range(5):
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
                self.assertTrue(is_silent(talk.connection, 3.2), "the connection should live on")
            talk.send(ENDING_GET)
            self.assertIn(b"HTTP/1.1 200 ", hear(talk.connection))

    def stall(self, server: Server, beginning: bytes) -> None:
        with Talk(server.connect()) as talk:
            talk.send(beginning)
            answer = talk.answer()
            self.assertEqual((answer.status, answer.headers["Connection"]), (408, "close"))
            self.assertRegex(answer.json["error"], "10 s")
            self.assert_ends_well(talk)

    def trickle_request(self, server: Server, beginning: bytes) -> None:
        with Talk(server.connect()) as talk:
            if beginning:
                talk.send(beginning)
            self.assertRegex(trickle(talk.connection, b"x" * 30, 1.0), rb"^HTTP/1\.1 408 ")

    def trickle_record(self, server: Server, beginning: bytes, answer: bytes) -> None:
        with Wire(server) as wire:
            wire.shake_hands()
            if beginning:
                wire.send(beginning)
            heard = b"nothing"
            wire.plain.settimeout(1.0)
            for byte in wire.bytes_of(lambda: wire.tls.write(b"x" * 30)):
                wire.plain.send(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    heard = wire.hear()
                    break
            self.assertEqual(heard[:len(answer) or None], answer)

    def take_no_response(self, server: Server, before: tuple[int, int] | None) -> None:
        if before is None:
            self.skipTest("needs /proc to see when the server lets go")
        with Talk(server.connect()) as talk:
            for _ in range(200):
                talk.send(todo("\0" * 1000))
                self.assertEqual(talk.answer().status, 201)
        with Wire(server) as silent, Wire(server) as slow:
            for wire in (silent, slow):
                wire.shake_hands()
                wire.send(GET * 20)
                wire.plain.recv(1, socket.MSG_PEEK)   # wait until answers come, but leave them there
            while not server.settles_to(before, 1.0):
                slow.plain.recv(1)
            with self.assertRaises(OSError, msg="the rest of the answers should not have come"):
                silent.hear()

    def survive(self, server: Server) -> None:
        with contextlib.ExitStack() as held:
            idle = self.kept_alive(server, held, 20)
            self.assertTrue(is_silent(idle[0].connection, 11.0), "it should not have to go yet")
            self.silent(server, held, 300)
            self.wait_for_evictions(server, 300 + 20 - MAX_CONNECTIONS)
            for talk in idle:
                self.assertEqual(talk.ask("GET", "/todo").status, 200)

    def stay_after(self, server: Server, certificate: str | None, sent: bytes) -> None:
        with Wire(server, certificate) as wire:
            wire.shake_hands()
            wire.send(sent)
            while wire.plain.recv(65536):
                pass
            for _ in range(200):   # an answer or alert and the end were heard; when will a reset come?
                try:
                    wire.plain.send(b"x")
                except ConnectionError:
                    return
                time.sleep(0.05)
        self.fail("the server should have left")

    def stop_stalled(self, server: Server) -> None:
        with Talk(server.connect()) as talk:
            begin_post(talk)
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.stdout.all()[-1], "[SERVER] Stopped.")


class TestRefusals(ConnectionCase):
    """How the server says that it does not want a connection."""

    def test_every_refusal_is_heard(self) -> None:
        """300 clients without a certificate read the alert on each TLS version, several at once, some still sending."""
        data = (GET, GET + b"x" * 50_000, GET + b"x" * 500_000)
        alerts = {ssl.TLSVersion.TLSv1_2: "HANDSHAKE_FAILURE", ssl.TLSVersion.TLSv1_3: "CERTIFICATE_REQUIRED"}
        with Server(lab()) as server:
            before = server.counts()
            for version, alert in alerts.items():
                context = lab().context(None, minimum_version=version, maximum_version=version)

                def knock(number: int, context: ssl.SSLContext = context) -> str:
                    try:
                        with server.connect(context=context) as connection:
                            connection.sendall(data[number % 3])
                            connection.recv(1)
                    except OSError as error:
                        return getattr(error, "reason", None) or repr(error)
                    return "no refusal"

                with self.subTest(f"each of 300 clients on {version.name} hears {alert}"):
                    with concurrent.futures.ThreadPoolExecutor(8) as pool:
                        reasons = collections.Counter(pool.map(knock, range(300)))
                    heard = {reason.rpartition("ALERT_")[2]: count for reason, count in reasons.items()}
                    self.assertEqual(heard, {alert: 300})
            lines = server.stderr.wait_for(lambda lines: len(lines) >= 600)
            self.assertEqual(collections.Counter(lines), {
                "[SERVER] REJECTED | peer=127.0.0.1 | peer did not return a certificate": 600})
            self.assert_unharmed(server, before)

    def test_strange_openings(self) -> None:
        """What is no TLS, or ends too early, costs one REJECTED line."""
        openings: dict[str, Callable[[Server], None]] = {
            "plain HTTP": lambda server: self.say(server, GET),
            "rubbish": lambda server: self.say(server, bytes(range(256)) * 10),
            "a line of text": lambda server: self.say(server, b"hello\r\n"),
            "a megabyte of rubbish": lambda server: self.say(server, b"\xff" * 1_000_000),
            "a TLS record that is too long": lambda server: self.say(server, b"\x16\x03\x01\xff\xff" + b"x" * 70_000),
            "a ClientHello that is empty": lambda server: self.say(server, b"\x16\x03\x01\x00\x04\x01\x00\x00\x00"),
            "a TLS alert": lambda server: self.say(server, b"\x15\x03\x01\x00\x02\x02\x28"),
            "a connection that ends at once": lambda server: self.say(server, b""),
            "a connection that is reset at once": lambda server: reset(server.connect_plain()),
            "a connection that is reset after rubbish": lambda server: self.reset_after(server, b"\x16\x03\x01"),
            "a connection that ends in the ClientHello":
                lambda server: self.leave_in_handshake(server, socket.socket.close),
            "a connection that is reset in the ClientHello": lambda server: self.leave_in_handshake(server, reset),
            "a connection that ends after the ClientHello":
                lambda server: self.leave_in_handshake(server, socket.socket.close, whole=True),
            "a connection that is reset after the ClientHello":
                lambda server: self.leave_in_handshake(server, reset, whole=True),
            "a client that does not trust the server": self.distrust,
            "TLS 1.1": lambda server: self.say(server, b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b\x03\x02" + b"x" * 32
                                               + b"\x00\x00\x04\x00\x2f\x00\xff\x01\x00"),
        }
        with Server(lab()) as server:
            before = server.counts()
            for what, come in openings.items():
                known = len(server.stderr.now())
                with self.subTest(f"{what} is answered with one REJECTED line"):
                    come(server)
                    self.wait_for_rejections(server, 1, known)
                self.assert_served(server, f"a proper client is served after {what}")
            rejected = [line for line in server.stderr.now() if "REJECTED" in line]
            self.assertEqual(len(rejected), len(openings), f"there should be no line more: {rejected}")
            self.assert_unharmed(server, before)

    def test_connections_that_are_gone_before_they_are_accepted(self) -> None:
        """A peer that resets its connection while it waits in the listen queue costs nothing but a REJECTED line."""
        with Server(lab()) as server:
            before = server.counts()
            server.process.send_signal(signal.SIGSTOP)
            try:
                os.waitpid(server.process.pid, os.WUNTRACED)   # until it has stopped
                for data in (b"", GET, b"\x16\x03\x01") * 10:
                    self.reset_after(server, data)
            finally:
                server.process.send_signal(signal.SIGCONT)
            self.assert_served(server)
            self.wait_for_rejections(server, 30)
            self.assert_unharmed(server, before)

    def test_a_refused_peer_that_floods(self) -> None:
        """Draining what a refused peer still sends is bounded, in bytes as well as in time."""
        with Server(lab()) as server:
            before = server.counts()
            for what, certificate in (("without a certificate", None), ("with an endless body", "client")):
                with self.subTest(f"a peer {what} cannot send for ever"), Wire(server, certificate) as wire:
                    wire.shake_hands()
                    wire.send(request("POST", "/todo", Content_Length="999999999999"))
                    started = time.monotonic()
                    with self.assertRaises(ConnectionError):   # the reset that ends it
                        while time.monotonic() < started + PATIENCE:
                            wire.plain.sendall(b"x" * 65536)
            self.assert_unharmed(server, before)

    def say(self, server: Server, data: bytes) -> None:
        """Say it and end; whatever is heard, it is no HTTP."""
        with server.connect_plain() as plain:
            plain.sendall(data)
            plain.shutdown(socket.SHUT_WR)
            self.assertNotIn(b"HTTP", hear(plain))

    def reset_after(self, server: Server, data: bytes) -> None:
        """Say it and reset."""
        plain = server.connect_plain()
        plain.sendall(data)
        reset(plain)

    def leave_in_handshake(self, server: Server, leave: Callable[[socket.socket], None], whole: bool = False) -> None:
        """Send half a ClientHello, or all of it and hear the answer, and leave."""
        with Wire(server) as wire:
            hello = wire.bytes_of(wire.tls.do_handshake)
            wire.plain.sendall(hello if whole else hello[:100])
            if whole:
                wire.plain.recv(100)
            leave(wire.plain)

    def distrust(self, server: Server) -> None:
        """Come as a client that knows another CA."""
        with self.assertRaises(ssl.SSLCertVerificationError):
            server.connect(context=ssl.create_default_context(cafile=lab().certs / "client.crt")).close()

    def wait_for_rejections(self, server: Server, number: int, past: int = 0) -> None:
        """So many REJECTED lines with a reason come after the first ``past`` lines of the log."""
        def come(lines: list[str]) -> bool:
            return sum(re.fullmatch(r"\[SERVER\] REJECTED \| peer=127\.0\.0\.1 \| \w.*", one) is not None
                       for one in lines[past:]) >= number

        try:
            server.stderr.wait_for(come, 5.0)
        except AssertionError:
            self.fail(f"the log should have {number} REJECTED lines more, but has {server.stderr.now()[past:]}")


class TestCloses(ConnectionCase):
    """How connections end."""

    def test_every_answer_that_ends_the_connection_is_followed_by_close_notify(self) -> None:
        """On both TLS versions, whatever the answer, also if the client never answers the close_notify."""
        requests = {
            "GET that asks to close": (ENDING_GET, 200),
            "request line that is none": (b"x\r\n\r\n", 400),
            "body that is too large": (request("POST", "/todo", b"x" * 70_000), 413),
            "body without length": (request("POST", "/todo"), 411),
            "unknown method": (request("BREW", "/todo"), 501),
        }
        with Server(lab()) as server:
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = lab().context(minimum_version=version, maximum_version=version)
                for what, (data, status) in requests.items():
                    with (self.subTest(f"a {what} on {version.name} ends with close_notify"),
                          Talk(server.connect(context=context)) as talk):
                        talk.send(data)
                        self.assertEqual(talk.answer().status, status)
                        self.assert_ends_well(talk)

    def test_openssl_sees_a_clean_end(self) -> None:
        """`openssl s_client` reports no unexpected end."""
        certs = lab().certs
        with Server(lab()) as server:
            for version in ("-tls1_2", "-tls1_3"):
                with self.subTest(f"openssl s_client {version} sees a clean end"):
                    output = self.run_tool([
                        "openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", version, "-ign_eof",
                        "-CAfile", f"{certs}/ca.crt", "-cert", f"{certs}/client.crt", "-key", f"{certs}/client.key"])
                    self.assertNotRegex(output, "(?i)unexpected eof|error:|errno")

    def test_gnutls_sees_a_clean_end(self) -> None:
        """`gnutls-cli` reports no early end."""
        if not shutil.which("gnutls-cli"):
            self.skipTest("needs gnutls-cli (package gnutls-bin)")
        certs = lab().certs
        with Server(lab()) as server:
            for version in ("1.2", "1.3"):
                with self.subTest(f"gnutls-cli with TLS {version} sees a clean end"):
                    output = self.run_tool([
                        "gnutls-cli", "127.0.0.1", "-p", str(server.port), "--x509cafile", f"{certs}/ca.crt",
                        "--x509certfile", f"{certs}/client.crt", "--x509keyfile", f"{certs}/client.key",
                        "--priority", f"NORMAL:-VERS-ALL:+VERS-TLS{version}"])
                    self.assertIn("Peer has closed the GnuTLS connection", output)
                    self.assertNotIn("non-properly terminated", output)

    def run_tool(self, command: list[str]) -> str:
        """Run a TLS client that sends a GET; returns what it prints until the server has ended the connection."""
        with subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT) as process:
            assert process.stdin and process.stdout
            process.stdin.write(ENDING_GET)   # and leave it open: some clients end when their input does
            process.stdin.flush()
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                output = pool.submit(process.stdout.read)
                try:
                    shown = output.result(PATIENCE).decode(errors="replace")
                except concurrent.futures.TimeoutError:
                    process.kill()
                    self.fail(f"{command[0]} did not end; it printed {output.result()!r}")
        self.assertIn("HTTP/1.1 200 OK", shown)
        self.assertEqual(process.returncode, 0, shown)
        return shown

    def test_rude_ends(self) -> None:
        """A peer that vanishes or talks nonsense after the handshake costs nothing."""
        ends: dict[str, Callable[[socket.socket], None]] = {
            "ends without close_notify": socket.socket.close,
            "resets the connection": reset,
            "sends what is no TLS": lambda plain: self.send_and_close(plain, GET * 10),
            "sends a broken TLS record": lambda plain: self.send_and_close(plain, b"\x17\x03\x03\x00\x20" + b"x" * 32),
            "sends an alert that is none": lambda plain: self.send_and_close(plain, b"\x15\x03\x03\x00\x02\x02\x28"),
        }
        beginnings = {
            "before its first request": b"",
            "in the middle of a request line": b"GET /to",
            "in the middle of the headers": HALF,
            "in the middle of a body": HALF_BODY,
            "after a request that it never reads the answer of": GET,
            "after 100 requests that it never reads the answers of": GET * 100,
            "after a refused request": request("POST", "/todo", b"x" * 70_000),
        }
        with Server(lab()) as server:
            before = server.counts()
            for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
                context = lab().context(minimum_version=version, maximum_version=version)
                for data in beginnings.values():
                    for end in ends.values():
                        tls = server.connect(context=context)
                        tls.sendall(data)
                        with socket.socket(fileno=tls.detach()) as plain, contextlib.suppress(ConnectionError):
                            plain.settimeout(PATIENCE)
                            end(plain)
                self.assert_served(server)
            self.assert_unharmed(server, before)

    def send_and_close(self, plain: socket.socket, data: bytes) -> None:
        """Below TLS."""
        plain.sendall(data)
        hear(plain)


class TestFullHouse(ConnectionCase):
    """Who is served when there are more connections than the server takes."""

    def test_who_gives_way(self) -> None:
        """Newcomers replace those that are closing, then the oldest unfinished handshake, then the longest idle."""
        with many_descriptors(self, 600), Server(lab()) as server, contextlib.ExitStack() as held:
            before = server.counts()
            idle = self.kept_alive(server, held, MAX_CONNECTIONS - 4)
            self.assertEqual(idle[0].ask("GET", "/nothing").status, 404)   # now the second is the longest idle
            idle.append(idle.pop(0))
            silent = self.silent(server, held, 2)
            for plain in self.silent(server, held, 2):   # closing: each has heard the alert and stays
                plain.sendall(b"rubbish\r\n")
                hear(plain)
            everyone = [*silent, *(talk.connection for talk in idle)]
            steps: dict[str, tuple[list[socket.socket], socket.socket | None]] = {
                "a newcomer replaces a closing one": (everyone, None),
                "a second newcomer replaces the other closing one": (everyone, None),
                "a third newcomer replaces the oldest unfinished handshake":
                    ([silent[1], *(talk.connection for talk in idle)], silent[0]),
                "a fourth newcomer replaces the other unfinished handshake":
                    ([talk.connection for talk in idle], silent[1]),
                "a fifth newcomer replaces the longest idle":
                    ([talk.connection for talk in idle[1:]], idle[0].connection),
                "a sixth newcomer replaces the next one":
                    ([talk.connection for talk in idle[2:]], idle[1].connection),
            }
            for what, (stay, goes) in steps.items():
                with self.subTest(what):
                    self.kept_alive(server, held, 1)
                    if goes:
                        self.assertEqual(hear(goes), b"", "it ends, with close_notify if it has come to TLS")
                    gone = [one for one in stay if not is_silent(one, 0)]
                    self.assertEqual(len(gone), 0, "nobody else has to go")
            for talk in idle[2:]:
                self.assertEqual(talk.ask("GET", "/nothing").status, 404)
            held.close()
            self.assert_unharmed(server, before)

    def test_strangers_cannot_push_out_clients(self) -> None:
        """20 idle connections and one in the middle of a request survive a flood of 600 silent newcomers."""
        with many_descriptors(self, 1000), Server(lab()) as server, contextlib.ExitStack() as held:
            before = server.counts()
            idle = self.kept_alive(server, held, 20)
            busy = held.enter_context(Talk(server.connect()))
            begin_post(busy)
            self.silent(server, held, 600)
            self.wait_for_evictions(server, 600 + 21 - MAX_CONNECTIONS)
            for talk in idle:
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
            end_post(busy)
            self.assertEqual(busy.answer().status, 201)
            self.assert_served(server, "a proper newcomer is served in the flood")
            held.close()
            self.assert_unharmed(server, before)

    def test_requests_are_finished_before_newcomers_are_served(self) -> None:
        """With all 256 in the middle of a request, a newcomer waits in the listen queue; then it is served."""
        with many_descriptors(self, 600), Server(lab()) as server, contextlib.ExitStack() as held:
            before = server.counts()
            busy = self.kept_alive(server, held, MAX_CONNECTIONS)
            for talk in busy:
                begin_post(talk)
            with Wire(server) as newcomer:
                newcomer.plain.sendall(newcomer.bytes_of(newcomer.tls.do_handshake))
                if before:
                    self.assert_quiet_while(server, newcomer.plain, "the newcomer")
                end_post(busy[0])
                self.assertEqual(busy[0].answer().status, 201)
                newcomer.shake_hands()
                newcomer.send(ENDING_GET)
                self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")
            for talk in busy[1:]:
                end_post(talk)
                self.assertEqual(talk.answer().status, 201)
            held.close()
            self.assert_unharmed(server, before)

    def test_2000_silent_connections(self) -> None:
        """A proper client is served as if they were not there, and the server never has more than 256 connections."""
        with many_descriptors(self, 2200), Server(lab()) as server, contextlib.ExitStack() as held:
            before = server.counts()
            most = (0, 0)
            for number in range(200, 2001, 200):
                self.silent(server, held, 200)
                self.assert_served(server, f"a proper client is served among {number} silent ones")
                most = max(most, server.counts() or most)
            with Talk(server.connect()) as talk:
                talk.send(todo("Among strangers"))
                self.assertEqual(talk.answer().status, 201)
            if before:
                self.assertLessEqual(most[0], before[0] + MAX_CONNECTIONS + 1)
                self.assertLessEqual(most[1], before[1] + MAX_CONNECTIONS + 1)
            held.close()
            self.assert_unharmed(server, before)


class TestDescriptors(ConnectionCase):
    """A server that may open only few files."""

    def test_a_low_limit(self) -> None:
        """With `ulimit -n 320` or far less it accepts what it can, and a client among 400 silent ones is served."""
        with many_descriptors(self, 1500):
            self.assert_side_by_side({
                f"a server with ulimit -n {limit} serves a client among 400 silent ones": (self.crowd, limit)
                for limit in (320, 48, 24)})

    def crowd(self, limit: int) -> None:
        """400 silent connections and proper clients among them."""
        with Server(lab(), descriptors=limit) as server, contextlib.ExitStack() as held:
            before = server.counts()
            for _ in range(4):
                self.silent(server, held, 100)
                self.assert_served(server)
            held.close()
            self.assert_unharmed(server, before)

    def test_a_full_house_of_few(self) -> None:
        """With few descriptors, requests fill the house earlier; then newcomers wait, and the server is at rest."""
        self.assert_side_by_side({f"a server with ulimit -n {limit} lets newcomers wait": (self.fill, limit)
                                  for limit in (48, 24)})

    def fill(self, limit: int) -> None:
        """Connections in the middle of a request, until a newcomer has to wait; then one ends its request."""
        with Server(lab(), descriptors=limit) as server, contextlib.ExitStack() as held:
            before = server.counts()
            if before is None:
                self.skipTest("needs /proc to see how much the server computes")
            busy: list[Talk] = []
            while True:
                newcomer = held.enter_context(Wire(server))
                newcomer.plain.sendall(newcomer.bytes_of(newcomer.tls.do_handshake))
                if is_silent(newcomer.plain, 0.5):
                    break
                newcomer.plain.close()
                busy.append(held.enter_context(Talk(server.connect())))
                begin_post(busy[-1])
            self.assertIn(len(busy), range(1, limit), "how many have come in")
            self.assert_quiet_while(server, newcomer.plain, "the newcomer")
            end_post(busy[0])
            self.assertEqual(busy[0].answer().status, 201)
            newcomer.shake_hands()
            newcomer.send(ENDING_GET)
            self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")
            held.close()
            self.assert_unharmed(server, before)

    def test_no_descriptor_left(self) -> None:
        """When accept() fails, newcomers wait while the server is at rest, and one idle connection makes room."""
        with Server(lab()) as server, contextlib.ExitStack() as held:
            before = server.counts()
            if before is None or not hasattr(resource, "prlimit"):
                self.skipTest("needs Linux to take descriptors from a running process")
            usual, most = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)

            def allow(descriptors: int) -> None:
                resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (descriptors, most))

            with self.subTest("with no descriptor at all, a newcomer waits"):
                allow(before[1])
                with Wire(server) as newcomer:
                    newcomer.plain.sendall(newcomer.bytes_of(newcomer.tls.do_handshake))
                    self.assert_quiet_while(server, newcomer.plain, "the newcomer")
                    allow(usual)
                    newcomer.shake_hands()
                    newcomer.send(ENDING_GET)
                    self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")
            self.assertTrue(server.settles_to(before))
            with self.subTest("with all descriptors in idle connections, a newcomer replaces one"):
                allow(usual)
                idle = self.kept_alive(server, held, 30)
                allow(before[1] + 30)
                self.assert_served(server)
                left = [talk for talk in idle if is_silent(talk.connection, 0)]
                self.assertGreaterEqual(len(left), 28, "only the longest idle has to go")
                self.assertEqual(left, idle[-len(left):])
            allow(usual)
            held.close()
            self.assert_unharmed(server, before)


class TestManyAtOnce(ConnectionCase):
    """Clients side by side."""

    def test_64_clients_at_once(self) -> None:
        """With POSTs and GETs mixed, ids are unique and without gaps, and log lines are never mixed."""
        clients, rounds = 64, 5
        start = threading.Barrier(clients)

        def work(number: int) -> list[int]:
            ids: list[int] = []
            with Talk(server.connect()) as talk:
                start.wait(PATIENCE)
                for turn in range(rounds):
                    task = f"{number}.{turn} " + "x" * 900
                    talk.send(todo(task))
                    item = talk.answer().json["todo"]
                    self.assertEqual(item["task"], task)
                    ids.append(item["id"])
                    todos = talk.ask("GET", "/todo").json["todos"]
                    self.assertEqual([item["id"] for item in todos], list(range(1, len(todos) + 1)))
                    self.assertEqual([item["id"] for item in todos if item["task"].startswith(f"{number}.")], ids)
            return ids

        with Server(lab()) as server:
            before = server.counts()
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                ids = [one for result in pool.map(work, range(clients)) for one in result]
            self.assertEqual(sorted(ids), list(range(6, 6 + clients * rounds)))
            name = "'mtls-client'"
            line = rf"\[SERVER\] REQUEST \| peer=127\.0\.0\.1 \| cert-CN={name} \| "
            item = r"{'id': \d+, 'task': '\d+\.\d x{900}', 'done': False}"
            post = rf'{line}"POST /todo HTTP/1\.1" 201 -\n\[SERVER\] AUTHENTICATED \| CN={name} \| creating TODO\n' \
                   rf"\[SERVER\] TODO CREATED \| CN={name} \| item={item}\n"
            get = rf'{line}"GET /todo HTTP/1\.1" 200 -\n\[SERVER\] AUTHENTICATED \| CN={name} \| serving /todo\n'
            lines = server.stderr.wait_for(lambda lines: len(lines) >= clients * rounds * 5)
            text = "".join(f"{one}\n" for one in lines)
            self.assertRegex(text, rf"\A(?:{post}|{get})+\Z", "the lines of each request stand together and whole")
            self.assertEqual(len(lines), clients * rounds * 5)
            self.assert_unharmed(server, before)


class TestStop(ConnectionCase):
    """What becomes of connections when the server is told to stop."""

    def test_a_running_request_is_finished(self) -> None:
        """On SIGTERM and SIGINT, one in the middle is finished, all that only wait end at once, and it exits with 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with (self.subTest(f"on {number.name}, requests are finished"), Server(lab()) as server,
                  Talk(server.connect()) as posting, Talk(server.connect()) as idle,
                  server.connect_plain() as silent):
                self.assertEqual(idle.ask("GET", "/todo").status, 200)
                begin_post(posting)
                server.process.send_signal(number)
                self.assert_ends_well(idle)
                self.assertEqual(hear(silent), b"")
                self.assertFalse(is_listening(server), "it accepts no more")
                self.assertIsNone(server.process.poll(), "it waits for the request")
                end_post(posting)
                answer = posting.answer()
                self.assertEqual((answer.status, answer.headers["Connection"]), (201, "close"))
                self.assert_ends_well(posting)
                posting.__exit__()
                self.assertEqual(server.process.wait(PATIENCE), 0)
                self.assertEqual(server.stdout.all()[-1], "[SERVER] Stopped.")
                lines = server.stderr.all()
                self.assertEqual(len([line for line in lines if '"POST /todo HTTP/1.1" 201 -' in line]), 1)
                self.assertFalse([line for line in lines if not line.startswith("[SERVER] ") or "ERROR" in line])

    def test_a_stopped_server_ends_at_once_and_once(self) -> None:
        """With idle and silent connections and several signals, it waits for nobody, but says close_notify."""
        with Server(lab()) as server, contextlib.ExitStack() as held:
            idle = self.kept_alive(server, held, 50)
            self.silent(server, held, 10)
            started = time.monotonic()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                server.process.send_signal(number)
            for talk in idle:
                self.assert_ends_well(talk)
            self.assertEqual(server.process.wait(PATIENCE), 0)
            self.assertLess(time.monotonic() - started, 5.0, "it should not need the time that it gives to requests")
            self.assertEqual(server.stdout.all()[3:], ["[SERVER] Stopped."])
            lines = server.stderr.all()
            self.assertFalse([line for line in lines if not line.startswith("[SERVER] ") or "ERROR" in line])


class TestWaits(ConnectionCase):
    """How long the server waits for what. The last of these tests, because all the others run meanwhile."""

    def test_every_wait_has_its_end(self) -> None:
        """5 s for a handshake, 15 for a request, 10 for its rest, 10 to take the answer, 2 to close, 5 to stop."""
        for what, (seconds, _) in WAITS.waits.items():
            with self.subTest(f"{what} after {seconds} s"):
                taken = WAITS.seconds[what].result(PATIENCE)
                self.assertGreaterEqual(taken, seconds - 0.1)
                self.assertLess(taken, seconds + SLACK)
        rejected = [line for line in WAITS.server.stderr.now() if line.startswith("[SERVER] REJECTED | ")]
        self.assertEqual(len(rejected), 5, "4 late handshakes and 1 without a certificate")
        self.assert_unharmed(WAITS.server, WAITS.before)
        self.assert_unharmed(WAITS.loaded, WAITS.before_load)


WAITS: Waits


def setUpModule() -> None:
    """Begin to wait."""
    global WAITS
    WAITS = Waits()


def tearDownModule() -> None:
    """Whoever still waits, because not all tests were run, meets the end of the servers."""
    WAITS.end()


if __name__ == "__main__":
    unittest.main()
