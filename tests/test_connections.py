"""The server's connections (connections.py, event_loop.py): those that take too long end, and the others are served."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import re
import resource
import selectors
import signal
import socket
import ssl
import struct
import sys
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import DESCRIPTORS, PATIENCE, ROOT, Server, ServerCase, Talk, Wire, comes_true, issue, lab, request
from tests.test_strict_http import CalledServer

sys.path.insert(0, str(ROOT / "server"))
from connections import Connection

from server import TodoHandler, tls_context

MAX_PENDING, MAX_UNAUTHORIZED = 512, 32   # as in server/event_loop.py
SLACK = 8.0   # seconds by which a deadline may be late: the machine may be busy
HANDSHAKE, IDLE, REQUEST, RESPONSE, LINGERING = (
    f"connections.DEADLINES[connections.Phase.{phase}]"
    for phase in ("HANDSHAKE", "IDLE", "REQUEST", "RESPONSE", "LINGERING"))

FEW: dict[str, object] = {"event_loop.MAX_CLIENTS": 6, "event_loop.MAX_PENDING": 8,
                          HANDSHAKE: 60.0, IDLE: 60.0, REQUEST: 60.0}
"""A server that takes few connections, and so patient that a busy machine changes nothing."""

TLS_VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
GET = request("GET", "/todo")
ENDING_GET = request("GET", "/todo", Connection="close")
HALF = b"GET /todo HTTP/1.1\r\nHost: loc"
HALF_BODY = b"POST /todo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
NO_CERTIFICATE = "[SERVER] REJECTED | peer=127.0.0.1 | peer did not return a certificate"
LATE = "[SERVER] REJECTED | peer=127.0.0.1 | no complete handshake "

P256, P384, P521, X25519, FFDHE2048, FFDHE8192 = 0x17, 0x18, 0x19, 0x1d, 0x100, 0x104
"""Groups for the key exchange, by their numbers in TLS 1.3 (RFC 8446 section 4.2.7)."""


def record(kind: int, data: bytes) -> bytes:
    """A TLS record (RFC 8446 section 5.1)."""
    return struct.pack("!BHH", kind, 0x303, len(data)) + data


def client_hello(*groups: int, algorithms: bytes = b"\4\1\4\3\x08\4") -> bytes:
    """A ClientHello of TLS 1.3 that offers these groups and a key share for none: the answer asks for one."""
    lists = ((10, struct.pack(f"!{len(groups)}H", *groups)), (13, algorithms), (50, algorithms), (51, b""))
    extensions = b"\0\x2b\0\3\2\3\4" + b"".join(   # the versions; groups, signature algorithms, key shares
        struct.pack("!HHH", number, len(offered) + 2, len(offered)) + offered for number, offered in lists)
    body = (b"\3\3" + bytes(32) + b"\x20" + bytes(32) + b"\0\2\x13\1" + b"\1\0"
            + len(extensions).to_bytes(2, "big") + extensions)
    return record(22, b"\1" + len(body).to_bytes(3, "big") + body)


HALF_HELLO = record(22, b"\1\0\x7d\0" + b"x" * 16_000)   # of 32 KB


def reset(connection: socket.socket) -> None:
    """Close with a reset, as a crashing peer or a hostile one does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_silent(connection: socket.socket, seconds: float) -> bool:
    """Whether nothing arrives for this long, not even the end."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return not selector.select(seconds)


def hear(plain: socket.socket) -> bytes:
    """What arrives on a plain connection until its end, or a reset."""
    heard = b""
    with contextlib.suppress(ConnectionError):
        while piece := plain.recv(65536):
            heard += piece
    return heard


def drip(connection: socket.socket, pieces: Iterable[bytes], seconds: float) -> None:
    """Send one piece after the other, this many seconds apart, until something arrives."""
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.send(piece)
            if not is_silent(connection, seconds):
                break


def processor_seconds(server: Server) -> float:
    """CPU time that it has used so far, as clock_getcpuclockid(3) finds it; 0 where there is no /proc."""
    return time.clock_gettime(~server.process.pid << 3 | 2) if server.at_rest else 0.0


def slow_reader(server: Server) -> Talk:
    """A client that has told the server's kernel to keep little for it, so that the server itself has to wait."""
    plain = socket.socket()
    plain.settimeout(PATIENCE)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.connect(("127.0.0.1", server.port))
    context = server.context("client")
    return Talk(context.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False))


def fill_list(server: Server, number: int) -> None:
    """Add this many items, each of 6 KB in the answer to a GET."""
    with Talk(server.connect()) as talk:
        for _ in range(number):
            assert talk.ask("POST", "/todo", b'{"task": "%b"}' % (rb"\u0000" * 1000)).status == 201


@contextlib.contextmanager
def paused(server: Server) -> Iterator[None]:
    """The server does not run meanwhile: what arrives in this time, it finds all at once."""
    server.process.send_signal(signal.SIGSTOP)
    os.waitpid(server.process.pid, os.WUNTRACED)   # until it has stopped
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def rejected(server: Server, at_least: int) -> list[str]:
    """The log lines that say why a connection was rejected, once there are this many."""
    reason = re.compile(r"\[SERVER\] REJECTED \| peer=127\.0\.0\.1 \| \w.*")
    lines = server.stderr.wait_for(lambda lines: sum(map(bool, map(reason.fullmatch, lines))) >= at_least)
    return list(filter(reason.fullmatch, lines))


def kept_alive(server: Server, held: contextlib.ExitStack, number: int, certificate: str = "client") -> list[Talk]:
    """This many connections that have been served and are idle now, the longest idle first."""
    talks = [held.enter_context(Talk(server.connect(certificate))) for _ in range(number)]
    for talk in talks:
        assert talk.ask("GET", "/nothing").status in {404, 403}
    return talks


def pending(server: Server, held: contextlib.ExitStack, number: int, says: bytes = b"") -> list[socket.socket]:
    """This many connections that send nothing, or only this, the oldest first."""
    peers = [held.enter_context(server.connect_plain()) for _ in range(number)]
    for peer in peers if says else ():
        with contextlib.suppress(ConnectionError):   # it may have been dropped already
            peer.sendall(says)
    return peers


class TestDeadlines(ServerCase):
    """How long the server waits in each phase."""

    seconds = 20

    def test_every_wait_has_its_end(self) -> None:
        """5 s for a handshake, 15 for a request, 10 for its rest, 10 to take the answer, 1 or 2 to leave, 5 to stop."""
        whole = True
        with self.serving() as server:
            waits: dict[str, tuple[float, Callable[..., float | None], tuple[Any, ...]]] = {
                "a silent connection ends": (5, self.shake_hands, (server, lambda wire: b"")),
                "a ClientHello that comes byte by byte ends":
                    (5, self.shake_hands, (server, lambda wire: wire.bytes_of(wire.tls.do_handshake))),
                "a handshake whose second half comes byte by byte ends": (5, self.shake_hands, (server, Wire.flight)),
                "a connection without a request": (15, self.wait, (server, b"", b"", [])),
                "an idle connection": (15, self.wait, (server, GET, b"", [200])),
                "an idle connection with empty lines now and then": (15, self.wait, (server, GET, b"\r\n" * 8, [200])),
                "a connection with the start of a TLS record": (15, self.wait, (server, b"", b"x" * 30, [], whole)),
                "a request that stops after one byte": (10, self.wait, (server, b"G", b"", [408])),
                "a header that comes byte by byte": (10, self.wait, (server, HALF, b"x" * 30, [408])),
                "a body that comes byte by byte": (10, self.wait, (server, HALF_BODY, b"x" * 30, [408])),
                "a TLS record that comes byte by byte": (10, self.wait, (server, HALF, b"x" * 30, [408], whole)),
                "a connection with a request now and then goes on": (16, self.ask_now_and_then, (server,)),
                "a response that nobody takes ends": (10, self.take_no_response, ()),
                "a refused peer that stays is left": (1, self.stay_after, (server, None, ENDING_GET)),
                "a peer that stays after an error is left": (2, self.stay_after, (server, "client", b"rubbish\r\n")),
                "a peer that stays after its request was late is left": (12, self.stay_after, (server, "client", b"G")),
                "a stalled request ends with the server that is told to stop": (5, self.stop_stalled, ()),
            }
            late = 1 + sum([408] in arguments for _, _, arguments in waits.values())

            def timed(row: tuple[float, Callable[..., float | None], tuple[Any, ...]]) -> float:
                started = time.monotonic()
                started = row[1](*row[2]) or started   # what it has to prepare first does not count
                return time.monotonic() - started

            with ThreadPoolExecutor(len(waits)) as pool:
                results = {what: pool.submit(timed, row) for what, row in waits.items()}
            for what, (seconds, _, _) in waits.items():
                with self.subTest(f"{what}, after {seconds} s"):
                    taken = results[what].result()
                    self.assertGreaterEqual(taken, seconds - 0.1)
                    self.assertLess(taken, seconds + SLACK)
            reasons = sorted(rejected(server, 4))
            self.assertEqual(([line[:len(LATE)] for line in reasons[:-1]], reasons[-1]), ([LATE] * 3, NO_CERTIFICATE))
            self.assertEqual(len([line for line in server.stderr.now() if '" 408 -' in line]), late)

    # The waits, each from its beginning to its end

    def shake_hands(self, server: Server, part: Callable[[Wire], bytes]) -> None:
        """Send this part of the handshake byte by byte, and read nothing but the end."""
        with Wire(server) as wire:
            drip(wire.plain, (bytes([byte]) for byte in part(wire)), 0.25)
            self.assertEqual(hear(wire.plain), b"")

    def wait(self, server: Server, said: bytes, drops: bytes, statuses: list[int], whole: bool = False) -> None:
        """Send ``said``, then go on byte by byte (of one TLS record, or each in its own); read all to the end."""
        with Wire(server) as wire:
            wire.shake_hands()
            if said:
                wire.send(said)
            one = wire.bytes_of(lambda: wire.tls.write(drops)) if whole else b""
            each = (wire.bytes_of(functools.partial(wire.tls.write, bytes([byte]))) for byte in drops)
            drip(wire.plain, (bytes([byte]) for byte in one) if whole else each, 1.0)
            heard = wire.hear()
        self.assertEqual([int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", heard)], statuses)
        if statuses == [408]:
            self.assertRegex(heard, rb"(?s)\r\nConnection: close\r\n.*within 10 s")

    def ask_now_and_then(self, server: Server) -> None:
        with Talk(server.connect()) as talk:
            for _ in range(5):
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
                self.assertTrue(is_silent(talk.connection, 3.2), "the connection should live on")
            self.assertEqual(talk.ask("GET", "/todo", Connection="close").status, 200)
            self.assert_ends_well(talk)

    def take_no_response(self) -> float:
        with self.serving() as server, contextlib.ExitStack() as held:
            fill_list(server, 100)
            still, slow, late = (held.enter_context(slow_reader(server)) for _ in range(3))
            began = time.monotonic()
            for talk in (still, slow, late):
                talk.send(GET)
                self.assertFalse(is_silent(talk.connection, PATIENCE))
            socket.socket.shutdown(late.connection, socket.SHUT_WR)
            self.assertEqual(late.answer().status, 200, "it is slow, but takes all")
            self.assert_ends_well(late)
            late.__exit__()
            if not server.at_rest:
                time.sleep(11)   # without /proc it cannot be seen when the server lets go
            for _ in range(20):
                if not server.settles(1.0):
                    with contextlib.suppress(OSError):
                        slow.file.read(1)
            with self.assertRaises(OSError, msg="the rest of the answer should not have come"):
                still.answer()
        return began

    def stay_after(self, server: Server, certificate: str | None, sent: bytes) -> None:
        with Wire(server, certificate) as wire:
            wire.shake_hands()
            wire.send(sent)
            hear(wire.plain)
            with self.assertRaises(ConnectionError, msg="after the end was heard, a reset comes"):
                for _ in range(200):
                    wire.plain.send(b"x")
                    time.sleep(0.05)

    def stop_stalled(self) -> float:
        with Server(lab()) as server, Talk(server.connect()) as talk:
            talk.begin_post()
            began = time.monotonic()
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.stdout.all()[-1], "[SERVER] Stopped.")
        return began


class TestTurns(unittest.TestCase):
    """A connection without a socket or a loop: what it is told comes from here."""

    def test_one_request_per_turn_of_the_loop(self) -> None:
        """However much a pipelining peer sends meanwhile, and in however many pieces."""
        server, next_turn = CalledServer(), list[Callable[[], None]]()
        server.context, server.loop = tls_context(lab().certs), mock.Mock(call_soon=next_turn.append)
        server.RequestHandlerClass, server.max_clients, server.max_pending = TodoHandler, 9, 9
        server.opening, server.lingering, server.pending, server.clients, server.unauthorized = {}, {}, {}, {}, {}
        server.groups = server.opening, server.lingering, server.pending, server.clients, server.unauthorized
        connection, transport = Connection(server, ("127.0.0.1", 50000)), mock.Mock()
        transport.is_closing.return_value = False
        connection.connection_made(transport)
        received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = lab().context().wrap_bio(received, sent, server_hostname="127.0.0.1")

        def send() -> None:
            while piece := sent.read(len(buffer := connection.get_buffer(-1))):
                buffer[:len(piece)] = piece
                connection.buffer_updated(len(piece))

        transport.write.side_effect = received.write
        for _ in range(3):   # the server asks for another group, so there are three flights
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            send()
        for turn in range(1, 30):
            client.write(GET * 30)
            send()
            self.assertEqual(sum("REQUEST" in line for line in server.lines), turn)
            calls, next_turn[:] = next_turn[:], []
            for call in calls:
                call()
            self.assertEqual(sum("REQUEST" in line for line in server.lines), turn + 1)


class TestRequests(ServerCase):
    """What happens to requests at a deadline, or at the same time."""

    seconds = 12

    def test_a_body_that_is_too_slow(self) -> None:
        """A client that still sends its body piece by piece when it is refused gets the 408."""
        with self.serving(constants={REQUEST: 1.0, LINGERING: 20.0}) as server, Talk(server.connect()) as talk:
            talk.send(HALF_BODY)
            for _ in range(20):
                talk.send(b" ")
                time.sleep(0.1)
            self.assertEqual(talk.answer().status, 408)

    def test_requests_at_the_idle_deadline(self) -> None:
        """A request that was sent before the server ended the connection is answered, even if it is seen too late."""
        with contextlib.ExitStack() as held:
            servers = [held.enter_context(self.serving(constants={IDLE: 4.0})) for _ in range(3)]
            talks = [talk for server in servers for talk in kept_alive(server, held, 10)]
            answered = time.monotonic()
            with contextlib.ExitStack() as pauses:
                for server in servers:
                    pauses.enter_context(paused(server))
                for number, talk in enumerate(talks):
                    talk.send(GET[:30] if number % 2 else GET)
                time.sleep(max(0.0, answered + 4.5 - time.monotonic()))   # until it is too late
            for number, talk in enumerate(talks):
                talk.send(GET[30:] if number % 2 else b"")
                self.assertEqual(talk.answer().status, 200)

    def test_who_pipelines_takes_turns(self) -> None:
        """Thousands of requests that arrive at once, from clients that may not use the server, delay nobody."""
        long = GET[:-2] + b"".join(b"X-%d: y\r\n" % number for number in range(96)) + b"\r\n"
        with (Server(lab(), constants={"event_loop.STOP_SECONDS": 2 * PATIENCE}) as server,
              contextlib.ExitStack() as held):
            first, hostile = (kept_alive(server, held, number, "mallory") for number in (3, MAX_UNAUTHORIZED))
            for talk in first:
                self.assertFalse(is_silent(talk.connection, 8.0), "they have this many places, and no more")
            listed, = kept_alive(server, held, 1)
            begin = len(server.stderr.wait_for("mtls-client"))
            with paused(server):
                for talk, data in zip(hostile, itertools.cycle((GET * 30, long, b"\r\n" * 600))):
                    for _ in range(45):   # as many TLS records
                        talk.send(data)
                listed.send(GET)
            self.assertEqual(listed.answer().status, 200)
            lines = server.stderr.wait_for("serving /todo")[begin:]
            before = next(number for number, line in enumerate(lines) if "serving /todo" in line)
            self.assertLess(before, 200, "each of the others had a turn or two, of two lines in the log")
            self.assertEqual(hostile[2].answer().status, 400, "nothing but empty lines")
            self.assert_served(server)
            self.assert_no_defect_logged(server)
            self.assertEqual(server.stop(), 0, "it does not wait for all that they have sent")

    def test_who_takes_nothing(self) -> None:
        """No request stays forever, not even if the client has not taken `100 Continue`."""
        post = request("POST", "/todo", b"{}", Expect="100-continue")[:-2]

        def ask(talk: Talk) -> None:   # until the server can send no more: some get stuck there, others in an answer
            talk.connection.settimeout(1.5)
            with contextlib.suppress(OSError):
                while True:
                    talk.send(post)
                    talk.send(b"{}")

        with (self.serving(constants=dict.fromkeys((IDLE, REQUEST, RESPONSE), 1.0)) as server,
              contextlib.ExitStack() as held, ThreadPoolExecutor(30) as pool):
            list(pool.map(ask, [held.enter_context(slow_reader(server)) for _ in range(30)]))
            self.assertTrue(server.settles(PATIENCE))

    @unittest.skipUnless(hasattr(socket, "TCP_QUICKACK"), "needs Linux")
    def test_nagles_algorithm(self) -> None:
        """Clients use it, but it delays neither a first request nor the second of two answers by 40 ms."""
        def seconds(talk: Talk) -> float:
            began = time.monotonic()
            talk.send(GET * 2)
            self.assertEqual([talk.answer().status, talk.answer().status], [200, 200])
            return time.monotonic() - began

        with self.serving() as server, contextlib.ExitStack() as held:   # the best, because the machine may be busy
            self.assertLess(min(seconds(held.enter_context(Talk(server.connect()))) for _ in range(20)), 0.035)
            kept = held.enter_context(Talk(server.connect()))
            self.assertLess(min([seconds(kept) for _ in range(40)][20:]), 0.035)


class TestRefusals(ServerCase):
    """How the server refuses a connection, and how it copes with misbehaving peers."""

    seconds = 8

    def test_every_refusal_is_heard(self) -> None:
        """300 clients without a certificate read the alert on each TLS version, several at once, some still sending.

        The connection does not end together with the alert, which some browsers then would not show.
        """
        data = (GET, GET + b"x" * 50_000, GET + b"x" * 500_000)

        def knock(server: Server, context: ssl.SSLContext, number: int) -> str:
            try:
                with server.connect(context=context) as connection:
                    connection.sendall(data[number % 3])
                    connection.recv(1)
            except OSError as error:
                return (getattr(error, "reason", None) or repr(error)).rpartition("ALERT_")[2]
            return "no refusal"

        with self.serving() as server, ThreadPoolExecutor(8) as pool:
            for version, alert in zip(TLS_VERSIONS, ("HANDSHAKE_FAILURE", "CERTIFICATE_REQUIRED"), strict=True):
                with self.subTest(f"each of 300 clients on {version.name} reads {alert}"):
                    context = lab().context(None, maximum_version=version)
                    heard = collections.Counter(pool.map(functools.partial(knock, server, context), range(300)))
                    self.assertEqual(heard, {alert: 300})
            self.assertEqual(server.stderr.wait_for(lambda lines: len(lines) >= 600), [NO_CERTIFICATE] * 600)
            with contextlib.ExitStack() as held:   # several, because on a busy machine this may be late to look
                for wire in [held.enter_context(Wire(server, None)) for _ in range(5)]:
                    wire.shake_hands()
                    wire.plain.recv(65536)   # the alert
                    if is_silent(wire.plain, 0.15):
                        break
                else:
                    self.fail("the end should follow the alert only after a while")

    def test_strange_openings(self) -> None:
        """A peer that does not speak TLS, or ends too early, costs one REJECTED line and gets no HTTP."""
        hello = client_hello(P256)
        openings: dict[str, tuple[bytes, Callable[[socket.socket], bytes | None]]] = {
            "plain HTTP": (GET, hear),
            "rubbish": (bytes(range(256)) * 10, hear),
            "a megabyte of rubbish": (b"\xff" * 1_000_000, hear),
            "a TLS record that is too long": (b"\x16\x03\x01\xff\xff" + b"x" * 70_000, hear),
            "a ClientHello that is empty": (record(22, b"\1\0\0\0"), hear),
            "a TLS alert": (record(21, b"\x02\x28"), hear),
            "a client that does not trust the server": (hello + record(21, b"\x02\x30"), hear),
            "nothing, and the end of one direction": (b"", hear),
            **{f"{what}, and the end by {leave.__name__}": (says, leave) for leave in (socket.socket.close, reset)
               for what, says in (("nothing", b""), ("half a ClientHello", hello[:100]), ("a ClientHello", hello),
                                  ("three bytes", b"\x16\x03\x01"))},
        }
        with self.serving() as server:
            for number, (what, (says, leave)) in enumerate(openings.items(), 1):
                with self.subTest(f"{what} is answered with one REJECTED line"):
                    with server.connect_plain() as plain:
                        plain.sendall(says)
                        if says is hello:
                            plain.recv(1)   # wait for the answer
                        if leave is hear:
                            plain.shutdown(socket.SHUT_WR)
                        self.assertNotIn(b"HTTP", leave(plain) or b"")
                    rejected(server, number)
                self.assert_served(server, f"a proper client is served after {what}")
            with paused(server):   # a peer that is gone before it is accepted: no more than this either
                for data in (b"", GET, b"\x16\x03\x01") * 10:
                    plain = server.connect_plain()
                    plain.sendall(data)
                    reset(plain)
            self.assert_served(server)
            self.assertEqual(len(rejected(server, len(openings) + 30)), len(openings) + 30, "there should be no more")

    def test_no_hello_is_expensive(self) -> None:
        """One group for the key exchange before Python 3.15 (then three or four): no choice of a peer costs much."""
        alert = rb"\x15\x03[\x01-\x03]\x00\x02\x02[\x28\x47]"         # handshake_failure, insufficient_security
        p256, x25519 = (b"\x16\x03\x03.*\x00\x33\x00\x02\x00" + group for group in (b"\x17", b"\x1d"))   # asks for it
        modern = sys.version_info >= (3, 15)
        answers: dict[tuple[int, ...], bytes] = {
            (P256,): p256, (X25519, P256): x25519 if modern else p256, (X25519,): x25519 if modern else alert,
            (FFDHE8192,): alert, (FFDHE2048,): alert, (P384,): alert, (P521,): alert}
        with self.serving() as server:
            for groups, answer in answers.items():
                with self.subTest("the answer to a hello", groups=groups), server.connect_plain() as plain:
                    plain.sendall(client_hello(*groups))
                    self.assertRegex(plain.recv(65536), b"(?s)\\A" + answer)
            before = processor_seconds(server)
            for _ in range(20):
                with server.connect_plain() as plain:
                    plain.sendall(client_hello(P256, algorithms=b"\x08\4" * 3800))   # our certificate has another
                    self.assertRegex(plain.recv(65536), alert)
            self.assertLess(processor_seconds(server) - before, 0.3)

    def test_what_a_peer_may_send_before_it_has_proved_who_it_is(self) -> None:
        """16 KB of a ClientHello, 64 KB with the longest honest chain. Then it is refused; nobody has had to wait."""
        one_byte = (record(20, b"\1") * 32 + record(22, b"x")) * 500   # 32 ChangeCipherSpec, as many as OpenSSL takes
        retried = (record(20, b"\1") + record(22, b"\1\1\xfb\xd0") + one_byte)   # a second hello, of 130 KB
        issue(lab(), "long", "/CN=mtls-client", "subjectAltName = " + ",".join(["DNS:" + "x" * 60] * 700))
        with self.serving(constants={HANDSHAKE: 60.0}) as server, contextlib.ExitStack() as held:
            with Talk(server.connect("long")) as talk:
                self.assertEqual(talk.ask("GET", "/todo").status, 200, "a certificate of 45 KB is accepted")
            peers = pending(server, held, 3, client_hello(P256))
            for peer in peers:
                self.assertEqual(peer.recv(65536)[0], 22, "it should be asked for a second hello")
                with contextlib.suppress(ConnectionError):
                    peer.sendall(retried)
            peers += pending(server, held, 3, HALF_HELLO + record(22, b"x" * 500))
            self.assert_served(server)
            for peer in peers:
                peer.settimeout(10.0)
                self.assertNotIn(b"HTTP", hear(peer))
            self.assertEqual(len(rejected(server, 6)), 6)

    def test_sessions(self) -> None:
        """A TLS 1.2 session can be resumed, but not all of them are kept: each has the client's certificates."""
        context = lab().context("mallory", maximum_version=TLS_VERSIONS[0])
        context.options |= ssl.OP_NO_TICKET   # so the server has to keep it

        def session(former: ssl.SSLSession | None = None) -> ssl.SSLSession | None:
            plain = server.connect_plain()
            with context.wrap_socket(plain, server_hostname="127.0.0.1", session=former) as connection:
                return connection.session

        with self.serving(constants={"server.MAX_SESSIONS": 20}) as server:
            first = session()
            self.assertEqual(session(first), first, "it is resumed")
            for _ in range(20):
                session()
            self.assertTrue(comes_true(lambda: session(first) != first), "it should be forgotten in a second")

    def test_a_refused_peer_that_floods(self) -> None:
        """Draining what a refused peer still sends is bounded, in bytes as well as in time."""
        with self.serving() as server:
            for what, certificate in (("without a certificate", None), ("with an endless body", "client")):
                with self.subTest(f"a peer {what} cannot send forever"), Wire(server, certificate) as wire:
                    wire.shake_hands()
                    wire.send(request("POST", "/todo", Content_Length="999999999999"))
                    started, sent = time.monotonic(), 0
                    with self.assertRaises(ConnectionError):   # the reset that ends it
                        while time.monotonic() < started + PATIENCE:
                            sent += wire.plain.send(b"x" * 65536)
                    self.assertLess(sent, 48 * 1024 ** 2, "16 MB, and what is under way")

    def test_rude_ends(self) -> None:
        """A peer that vanishes or sends nonsense after the handshake does no harm."""
        # Closed, reset, no TLS, a broken TLS record, an invalid alert.
        ends = (b"", None, GET * 10, b"\x17\x03\x03\x00\x20" + b"x" * 32, b"\x15\x03\x03\x00\x02\x02\x28")
        beginnings = (b"", b"GET /to", HALF, HALF_BODY, GET, GET * 100, request("POST", "/todo", b"x" * 70_000))
        with self.serving() as server:
            for version, data, end in itertools.product(TLS_VERSIONS, beginnings, ends):
                tls = server.connect(context=server.context(maximum_version=version))
                tls.sendall(data)
                with socket.socket(fileno=tls.detach()) as plain, contextlib.suppress(ConnectionError):
                    plain.settimeout(PATIENCE)
                    if end is None:
                        reset(plain)
                    elif end:
                        plain.sendall(end)
                        hear(plain)


class TestCapacity(ServerCase):
    """Who is served when there are more connections than the server takes."""

    seconds = 10

    def test_who_is_evicted(self) -> None:
        """At capacity, a newcomer replaces the longest idle connection; what has sent part of a request stays."""
        with self.serving(constants=FEW) as server, contextlib.ExitStack() as held:
            begun, early, newest = (held.enter_context(Wire(server)) for _ in range(3))
            first = early.flight() + early.bytes_of(lambda: early.tls.write(ENDING_GET))   # together
            early.plain.sendall(first[:-20])
            begun.shake_hands()
            both = begun.bytes_of(lambda: (begun.tls.write(GET), begun.tls.write(ENDING_GET)))
            begun.plain.sendall(both[:-20])
            begun.plain.recv(1, socket.MSG_PEEK)
            busy, *idle = kept_alive(server, held, 4)
            busy.begin_post()
            newcomers = kept_alive(server, held, 2)
            gone = [talk for talk in idle if not is_silent(talk.connection, 0.2)]
            self.assertEqual(gone, idle[:2], "one goes for each newcomer, the longest idle first")
            for talk in gone:
                self.assert_ends_well(talk)
            flight = newest.flight()
            with paused(server):   # it finds both at once
                newest.plain.sendall(flight)
                idle[2].send(HALF)
            idle[2].send(GET[len(HALF):] + GET)
            answer = idle[2].answer()
            self.assertEqual((answer.status, answer.headers["Connection"]), (200, "close"), "its last request")
            self.assert_ends_well(idle[2])
            begun.plain.sendall(both[-20:])
            self.assertRegex(begun.hear(), b"^HTTP/1.1 200 (?s:.*)HTTP/1.1 200 ", "half a record is not idle")
            early.plain.sendall(first[-20:])
            newest.send(ENDING_GET)
            for wire in (early, newest):
                self.assertRegex(wire.hear(), b"^HTTP/1.1 200 ")
            self.assertEqual(busy.end_post().status, 201)
            for talk in newcomers:
                self.assertEqual(talk.ask("GET", "/todo").status, 200)

    def test_who_is_dropped_before_the_handshake_is_complete(self) -> None:
        """The oldest that has not sent a whole ClientHello, while they have more than half of the places."""
        with self.serving(constants=FEW) as server, contextlib.ExitStack() as held:
            kept_alive(server, held, 6)
            far = [held.enter_context(Wire(server)) for _ in range(4)]   # far away: the rest of it takes its time
            flights = [wire.flight() for wire in far]
            peers = [peer for says in (b"", b"\x16", HALF_HELLO) for peer in pending(server, held, 20, says)]
            for peer in peers[:-4]:
                self.assertEqual(hear(peer), b"")
            self.assertTrue(all(is_silent(peer, 0.1) for peer in peers[-4:]))
            pending(server, held, 20, b"rubbish\r\n")   # refused, these linger: they replace each other
            for wire, flight in zip(far, flights, strict=True):
                wire.plain.sendall(flight)
                wire.send(ENDING_GET)
                self.assertRegex(wire.hear(), b"^HTTP/1.1 200 ")
            lines = [line for line in rejected(server, 76) if "wrong version number" not in line]
            self.assertEqual({line[:len(LATE)] for line in lines}, {LATE})

    def test_answers_that_nobody_takes(self) -> None:
        """A long list that changes all the time, for clients that do not read, and then reset, costs little memory."""
        with self.serving() as server, contextlib.ExitStack() as held:
            fill_list(server, 700)
            for _ in range(50):
                fill_list(server, 1)
                reader = slow_reader(server).connection
                held.callback(reset, reader)
                reader.send(GET)
                self.assertFalse(is_silent(reader, PATIENCE))
            held.close()
            for number in range(20):
                reader = server.connect()
                reader.sendall(GET * 100)
                for _ in range(300 + 20 * number):   # of 260 that are an answer
                    reader.recv(16384)
                reset(reader)
            self.assert_served(server)
            self.assertLess(server.peak_memory(), 100, "MB")


class TestDescriptors(ServerCase):
    """Crowds, and a server that may open only few files."""

    seconds = 6

    def assert_waits_quietly(self, server: Server, newcomer: Wire) -> None:
        """The newcomer gets nothing for a second, in which the server uses hardly any CPU time."""
        started, computed = time.monotonic(), processor_seconds(server)
        self.assertTrue(is_silent(newcomer.plain, 1.0), "the newcomer should have to wait")
        share = (processor_seconds(server) - computed) / (time.monotonic() - started)
        self.assertLess(share, 0.2, "the server is busy while the newcomer waits")

    def test_crowds(self) -> None:
        """A client is served among 2,000 pending connections; with `ulimit -n 320` or less, among 400; and so on."""
        crowds = (320, 128, 100, 64, 40, 20, *((0,) if DESCRIPTORS >= 2600 else ()))
        checks = [*((self.crowd, limit) for limit in crowds), (self.fill, 48), (self.fill, 24)]
        with ThreadPoolExecutor(len(checks)) as pool:
            results = [pool.submit(check, limit) for check, limit in checks]
        for (check, limit), result in zip(checks, results, strict=True):
            with self.subTest(check.__name__, limit=limit):
                result.result()

    def crowd(self, limit: int) -> None:
        """Silent or half-finished connections displace nobody and cost little; a proper client is served among them."""
        patience = {f"connections.DEADLINES[connections.Phase.{phase}]": 120.0 for phase in ("IDLE", "REQUEST")}
        with (self.serving(before=f"ulimit -n {limit}" if limit else ":", constants=patience) as server,
              contextlib.ExitStack() as clients):
            busy, *idle = kept_alive(server, clients, 1 if limit else 21)
            busy.begin_post()
            for says in (b"", HALF_HELLO):
                with contextlib.ExitStack() as held:
                    for _ in range(4 if limit else 10):
                        pending(server, held, 100 if limit else 200, says)
                        self.assert_served(server)
                        self.assertLessEqual(server.has("task"), 2, "the event loop's thread, and the log's")
                        self.assertLessEqual(server.has("fd"), server.at_rest + MAX_PENDING + len(idle) + 10)
            self.assertLess(server.peak_memory(), 64, "MB")
            for talk in idle:
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
            self.assertEqual(busy.end_post().status, 201)

    def fill(self, limit: int) -> None:
        """Connections in the middle of a request, until a newcomer has to wait, until one ends its request."""
        with self.serving(before=f"ulimit -n {limit}") as server, contextlib.ExitStack() as held:
            busy: list[Talk] = []
            with contextlib.suppress(TimeoutError):
                while True:
                    talk = held.enter_context(Talk(server.connect(timeout=1.5)))
                    talk.begin_post()
                    talk.connection.settimeout(PATIENCE)
                    busy.append(talk)
            if talk not in busy:
                talk.__exit__()
            self.assertIn(len(busy), range(1, limit), "how many have come in")
            with Wire(server) as newcomer:
                newcomer.shake_hands()
                newcomer.send(ENDING_GET)
                self.assert_waits_quietly(server, newcomer)
                self.assertEqual(busy[0].end_post().status, 201)
                busy[0].__exit__()
                self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")
            for talk in busy[1:]:
                self.assertEqual(talk.end_post().status, 201)

    @unittest.skipUnless(hasattr(resource, "prlimit"), "needs Linux to take descriptors from a running process")
    def test_no_descriptor_left(self) -> None:
        """When accept() fails, newcomers wait while the server is at rest, and are served when one is free again."""
        with self.serving() as server:
            usual = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (server.at_rest, usual[1]))
            with Wire(server) as newcomer:
                newcomer.plain.sendall(newcomer.bytes_of(newcomer.tls.do_handshake))
                self.assert_waits_quietly(server, newcomer)
                resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, usual)
                newcomer.shake_hands()
                newcomer.send(ENDING_GET)
                self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")

    def test_fewer_descriptors_than_it_needs(self) -> None:
        """The server says so when it starts, in one line."""
        said = r"printed \[\]\nstderr: \['\[SERVER\] ERROR: [^']*(file|descriptor)[^']*'\]$"
        self.assertRaisesRegex(AssertionError, said, Server, lab(), before="ulimit -n 12")


class TestStop(ServerCase):
    """What happens to connections when the server is told to stop."""

    def test_a_running_request_is_finished(self) -> None:
        """Running requests finish, waiting connections end at once, no new one is accepted, and it exits with 0."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with (self.subTest(f"on {number.name}"), contextlib.ExitStack() as held,
                  Server(lab(), constants={"event_loop.STOP_SECONDS": 2 * PATIENCE}) as server):
                fill_list(server, 50)
                reader, posting = held.enter_context(slow_reader(server)), held.enter_context(Talk(server.connect()))
                reader.send(GET)
                self.assertFalse(is_silent(reader.connection, PATIENCE))
                posting.begin_post()
                idle = kept_alive(server, held, 20)
                peers = [*pending(server, held, 5), *pending(server, held, 5, HALF_HELLO),
                         *pending(server, held, 5, b"rubbish\r\n")]
                server.process.send_signal(number)
                for talk in idle:
                    with talk:
                        self.assert_ends_well(talk)
                self.assertNotIn(b"HTTP", b"".join(map(hear, peers)))
                with self.assertRaises(ConnectionError, msg="it accepts no more"):
                    server.connect_plain()
                server.stdout.wait_for("Waiting")
                answer = posting.end_post()
                self.assertEqual((answer.status, answer.headers["Connection"]), (201, "close"))
                self.assert_ends_well(posting)
                self.assertEqual(reader.answer().status, 200)
                self.assert_ends_well(reader)
                posting.__exit__()
                reader.__exit__()
                self.assertEqual(server.process.wait(PATIENCE), 0)
                self.assertEqual(server.stdout.all()[-2:], [
                    "[SERVER] Waiting for running requests, 60 s at most; Ctrl+C again ends at once.",
                    "[SERVER] Stopped."])
                lines = "\n".join(server.stderr.all())
                self.assertEqual(lines.count('"POST /todo HTTP/1.1" 201 -'), 50 + 1)
                self.assertNotRegex(lines, r"(?m)^(?!\[SERVER\] )|ERROR")
