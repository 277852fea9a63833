"""The server's connections (server/connections.py): it ends what waits too long, says why, and serves the others."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import re
import resource
import signal
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoResult
from pathlib import Path
from typing import Any

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import (
    DESCRIPTORS,
    PATIENCE,
    Server,
    ServerCase,
    Talk,
    Wire,
    comes_true,
    lab,
    request,
)
from tests.test_strict_http import TLS_VERSIONS, todo

MAX_GUESTS, MAX_STRANGERS = 256, 512   # served at once; in their handshake, or being seen off
SLACK = 8.0
"""Seconds that a deadline may come late: the machine may be busy."""
SLICED = {"connections.SLICE": 0.6}
"""As on Windows, where nobody can wake a thread that waits: it has to look up itself (here: less often)."""

GET = request("GET", "/todo")
ENDING_GET = request("GET", "/todo", Connection="close")
HALF = b"GET /todo HTTP/1.1\r\nHost: loc"
HALF_BODY = b"POST /todo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 50   # of 512 bytes
NO_CERTIFICATE = "[SERVER] REJECTED | peer=127.0.0.1 | peer did not return a certificate"
LATE = "[SERVER] REJECTED | peer=127.0.0.1 | no complete handshake within 5 s, or while others waited"


def reset(connection: socket.socket) -> None:
    """Close with a reset, as a crashing peer or a hostile one does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def is_silent(connection: socket.socket, seconds: float) -> bool:
    """Whether nothing is heard for so long, not even the end."""
    connection.settimeout(seconds)
    try:
        connection.recv(1)
    except (TimeoutError, ssl.SSLWantReadError, BlockingIOError):
        return True
    except OSError:
        pass
    finally:
        connection.settimeout(PATIENCE)
    return False


def hear(plain: socket.socket) -> bytes:
    """What a plain connection says up to its end, or a reset."""
    heard = b""
    with contextlib.suppress(ConnectionError):
        while piece := plain.recv(65536):
            heard += piece
    return heard


def drip(connection: socket.socket, pieces: Iterable[bytes], seconds: float) -> None:
    """Send one piece after the other, so many seconds apart, until something can be heard."""
    connection.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        for piece in pieces:
            connection.send(piece)
            with contextlib.suppress(TimeoutError):
                connection.recv(1, socket.MSG_PEEK)
                break
    connection.settimeout(PATIENCE)


def processor_seconds(server: Server) -> float:
    """How long the server has been computing so far; 0 where there is no /proc."""
    if not (stat := Path(f"/proc/{server.process.pid}/stat")).exists():
        return 0.0
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rejected(server: Server, at_least: int) -> list[str]:
    """The log's lines that say why a connection was rejected, once there are so many."""
    def found(lines: list[str]) -> list[str]:
        return [line for line in lines if re.fullmatch(r"\[SERVER\] REJECTED \| peer=127\.0\.0\.1 \| \w.*", line)]

    return found(server.stderr.wait_for(lambda lines: len(found(lines)) >= at_least))


def kept_alive(server: Server, held: contextlib.ExitStack, number: int, certificate: str = "client") -> list[Talk]:
    """So many connections that have been served and are idle now, the longest idle first."""
    talks = [held.enter_context(Talk(server.connect(certificate))) for _ in range(number)]
    for talk in talks:
        assert talk.ask("GET", "/nothing").status in {404, 403}
    return talks


def silent(server: Server, held: contextlib.ExitStack, number: int, says: bytes = b"") -> list[socket.socket]:
    """So many connections that say nothing, or only this, the oldest first."""
    strangers = [held.enter_context(server.connect_plain()) for _ in range(number)]
    for stranger in strangers if says else ():
        with contextlib.suppress(ConnectionError):   # it may have had to go already
            stranger.send(says)
    return strangers


class ConnectionCase(ServerCase):
    """What these tests share."""

    def assert_quiet_while(self, server: Server, connection: socket.socket, what: str) -> None:
        """The connection hears nothing for a second, in which the server hardly computes."""
        started, computed = time.monotonic(), processor_seconds(server)
        self.assertTrue(is_silent(connection, 1.0), f"{what} should have to wait")
        share = (processor_seconds(server) - computed) / (time.monotonic() - started)
        self.assertLess(share, 0.2, f"the server is busy while {what} waits")

    def assert_newcomer_waits(self, server: Server, busy: list[Talk]) -> None:
        """A newcomer is not served, and the server at rest, until one of the busy connections ends."""
        with Wire(server) as newcomer, ThreadPoolExecutor(1) as pool:
            shaken = pool.submit(newcomer.shake_hands)
            with contextlib.suppress(NoResult):   # it may have to wait for the handshake or for the answer
                shaken.result(2.0)
                newcomer.send(ENDING_GET)
                self.assert_quiet_while(server, newcomer.plain, "the newcomer")
            self.assertEqual(busy[0].end_post().status, 201)
            busy[0].__exit__()
            if not shaken.done():
                shaken.result(PATIENCE)
                newcomer.send(ENDING_GET)
            self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")
        for talk in busy[1:]:
            self.assertEqual(talk.end_post().status, 201)


class TestWaits(ConnectionCase):
    """How long the server waits for what."""

    seconds = 20

    def test_every_wait_has_its_end(self) -> None:
        """5 s for a handshake, 15 for a request, 10 for its rest, 10 to take the answer, 1 or 2 to leave, 5 to stop."""
        record = True
        with self.serving() as server, self.serving(constants=SLICED) as sliced:
            waits: dict[str, tuple[float, Callable[..., None], tuple[Any, ...]]] = {
                "a silent connection ends": (5, self.shake_hands, (server, lambda wire: b"")),
                "a ClientHello that comes byte by byte ends":
                    (5, self.shake_hands, (server, lambda wire: wire.bytes_of(wire.tls.do_handshake))),
                "a handshake that stops halfway ends": (5, self.shake_hands, (server, lambda wire: wire.flight()[:0])),
                "a handshake whose second half comes byte by byte ends": (5, self.shake_hands, (server, Wire.flight)),
                "a connection without a request": (15, self.wait, (server, b"", b"", [])),
                "an idle connection": (15, self.wait, (server, GET, b"", [200])),
                "an idle connection with an empty line at last": (15, self.wait, (server, GET + b"\r\n", b"", [200])),
                "a connection with empty lines now and then": (15, self.wait, (server, b"", b"\r\n" * 15, [])),
                "a connection with the start of a TLS record": (15, self.wait, (server, b"", b"x" * 30, [], record)),
                "a request that stops after one byte": (10, self.wait, (server, b"G", b"", [408])),
                "a request that stops in its headers": (10, self.wait, (server, HALF, b"", [408])),
                "a request that stops in its body": (10, self.wait, (server, HALF_BODY, b"", [408])),
                "a request line that comes byte by byte": (10, self.wait, (server, b"", b"x" * 30, [408])),
                "a header that comes byte by byte": (10, self.wait, (server, HALF, b"x" * 30, [408])),
                "a body that comes byte by byte": (10, self.wait, (server, HALF_BODY, b"x" * 30, [408])),
                "a TLS record that comes byte by byte": (10, self.wait, (server, HALF, b"x" * 30, [408], record)),
                "a connection with a request now and then goes on": (16, self.ask_now_and_then, (server,)),
                "a response that nobody takes ends": (10, self.take_no_response, ({},)),
                "a refused peer that stays is left": (1, self.stay_after, (server, None, ENDING_GET)),
                "a peer that stays after an error is left": (2, self.stay_after, (server, "client", b"rubbish\r\n")),
                "a stalled request ends with the server that is told to stop": (5, self.stop_stalled, ()),
            }
            late = sum([408] in arguments for _, _, arguments in waits.values())
            waits |= {f"in slices, {what}": (seconds, wait, (sliced, *arguments[1:]))
                      for what, (seconds, wait, arguments) in waits.items() if wait == self.wait}
            waits["in slices, a response that nobody takes ends"] = (10, self.take_no_response, (SLICED,))

            def timed(wait: Callable[..., None], arguments: tuple[Any, ...]) -> float:
                started = time.monotonic()
                wait(*arguments)
                return time.monotonic() - started

            with ThreadPoolExecutor(len(waits)) as pool:
                results = {what: pool.submit(timed, wait, arguments) for what, (_, wait, arguments) in waits.items()}
            for what, (seconds, _, _) in waits.items():
                with self.subTest(f"{what}, after {seconds} s"):
                    taken = results[what].result()
                    self.assertGreaterEqual(taken, seconds - 0.1)
                    self.assertLess(taken, seconds + SLACK)
            self.assertEqual(sorted(rejected(server, 5)), [LATE] * 4 + [NO_CERTIFICATE])
            for one in (server, sliced):
                self.assertEqual(len([line for line in one.stderr.now() if '" 408 -' in line]), late)

    # The waits, each from its beginning to its end

    def shake_hands(self, server: Server, part: Callable[[Wire], bytes]) -> None:
        """Send this part of the handshake byte by byte, and hear no more than the end."""
        with Wire(server) as wire:
            drip(wire.plain, (bytes([byte]) for byte in part(wire)), 0.25)
            self.assertEqual(hear(wire.plain), b"")

    def wait(self, server: Server, said: bytes, drops: bytes, statuses: list[int], record: bool = False) -> None:
        """Say something, and then go on byte by byte (of a TLS record, or each in one), and hear all to the end."""
        with Wire(server) as wire:
            wire.shake_hands()
            if said:
                wire.send(said)
            whole = wire.bytes_of(lambda: wire.tls.write(drops)) if record else b""
            each = (wire.bytes_of(functools.partial(wire.tls.write, bytes([byte]))) for byte in drops)
            drip(wire.plain, (bytes([byte]) for byte in whole) if record else each, 1.0)
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

    def take_no_response(self, constants: dict[str, object]) -> None:
        with self.serving(constants=constants) as server:
            with Talk(server.connect()) as talk:
                for _ in range(200):
                    self.assertEqual(talk.ask("POST", "/todo", todo(task="\0" * 1000)).status, 201)
            with Wire(server) as still, Wire(server) as slow:
                for wire in (still, slow):
                    wire.shake_hands()
                    wire.send(GET * 20)
                    wire.plain.recv(1, socket.MSG_PEEK)   # wait until answers come, but leave them there
                if not server.at_rest:
                    time.sleep(11)   # without /proc it cannot be seen when the server lets go
                self.assertTrue(comes_true(lambda: server.settles(1.0) or not slow.plain.recv(1)), "it lets both go")
                with self.assertRaises(OSError, msg="the rest of the answers should not have come"):
                    still.hear()

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

    def stop_stalled(self) -> None:
        with Server(lab()) as server, Talk(server.connect()) as talk:
            talk.begin_post()
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.stdout.all()[-1], "[SERVER] Stopped.")


class TestRefusals(ConnectionCase):
    """How the server says that it does not want a connection, and what it takes from peers that are rude."""

    seconds = 8

    def test_every_refusal_is_heard(self) -> None:
        """300 clients without a certificate read the alert on each TLS version, several at once, some still sending."""
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
                with self.subTest(f"each of 300 clients on {version.name} hears {alert}"):
                    context = lab().context(None, maximum_version=version)
                    heard = collections.Counter(pool.map(functools.partial(knock, server, context), range(300)))
                    self.assertEqual(heard, {alert: 300})
            self.assertEqual(server.stderr.wait_for(lambda lines: len(lines) >= 600), [NO_CERTIFICATE] * 600)

    def test_the_alert_comes_before_the_end(self) -> None:
        """The connection does not end together with the alert, which some browsers then would not show."""
        with self.serving() as server:
            waits = 0
            for _ in range(5):   # on a busy machine, this test may be late to look
                with Wire(server, None) as wire:
                    wire.shake_hands()
                    self.assertRegex(wire.plain.recv(65536), rb"\A[\x14-\x17]\x03\x03")
                    waits += is_silent(wire.plain, 0.15)
                    self.assertEqual(wire.plain.recv(65536), b"", "it ends in order")
            self.assertGreater(waits, 0, "the end should follow the alert only after a while")

    def test_strange_openings(self) -> None:
        """What is no TLS, or ends too early, costs one REJECTED line, and hears no HTTP."""
        outgoing = ssl.MemoryBIO()
        with self.assertRaises(ssl.SSLWantReadError):
            lab().context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1").do_handshake()
        hello = outgoing.read()
        openings: dict[str, tuple[bytes, Callable[[socket.socket], bytes | None]]] = {
            "plain HTTP": (GET, hear),
            "rubbish": (bytes(range(256)) * 10, hear),
            "a line of text": (b"hello\r\n", hear),
            "a megabyte of rubbish": (b"\xff" * 1_000_000, hear),
            "a TLS record that is too long": (b"\x16\x03\x01\xff\xff" + b"x" * 70_000, hear),
            "a ClientHello that is empty": (b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", hear),
            "a TLS alert": (b"\x15\x03\x01\x00\x02\x02\x28", hear),
            "a client that does not trust the server": (hello + b"\x15\x03\x03\x00\x02\x02\x30", hear),
            "a connection that ends at once": (b"", hear),
            "a connection that ends in the ClientHello": (hello[:100], socket.socket.close),
            "a connection that ends after the ClientHello": (hello, socket.socket.close),
            "a connection that is reset at once": (b"", reset),
            "a connection that is reset after rubbish": (b"\x16\x03\x01", reset),
            "a connection that is reset in the ClientHello": (hello[:100], reset),
            "a connection that is reset after the ClientHello": (hello, reset),
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
            self.assertEqual(len(rejected(server, 0)), len(openings), "there should be no line more")

    def test_connections_that_are_gone_before_they_are_accepted(self) -> None:
        """A peer that resets its connection while it waits in the listen queue costs nothing but a REJECTED line."""
        with self.serving() as server:
            server.process.send_signal(signal.SIGSTOP)
            os.waitpid(server.process.pid, os.WUNTRACED)   # until it has stopped
            for data in (b"", GET, b"\x16\x03\x01") * 10:
                plain = server.connect_plain()
                plain.sendall(data)
                reset(plain)
            server.process.send_signal(signal.SIGCONT)
            self.assert_served(server)
            rejected(server, 30)

    def test_a_refused_peer_that_floods(self) -> None:
        """Draining what a refused peer still sends is bounded, in bytes as well as in time."""
        with self.serving() as server:
            for what, certificate in (("without a certificate", None), ("with an endless body", "client")):
                with self.subTest(f"a peer {what} cannot send for ever"), Wire(server, certificate) as wire:
                    wire.shake_hands()
                    wire.send(request("POST", "/todo", Content_Length="999999999999"))
                    started, sent = time.monotonic(), 0
                    with self.assertRaises(ConnectionError):   # the reset that ends it
                        while time.monotonic() < started + PATIENCE:
                            sent += wire.plain.send(b"x" * 65536)
                    self.assertLess(sent, 48 * 1024 ** 2, "16 MB, and what is under way")

    def test_rude_ends(self) -> None:
        """A peer that vanishes or talks nonsense after the handshake costs nothing."""
        # Closed, reset, what is no TLS, a broken TLS record, an alert that is none.
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


class TestFullHouse(ConnectionCase):
    """Who is served when there are more connections than the server takes."""

    seconds = 10

    def serving_few(self) -> contextlib.AbstractContextManager[Server]:
        """A server with few places, and so patient that a busy machine changes nothing."""
        return self.serving(constants={"connections.MAX_GUESTS": 6, "connections.MAX_STRANGERS": 4,
                                       "connections.DEADLINES[connections.Phase.HANDSHAKE]": 60.0})

    def assert_no_room_for_mallory(self, server: Server) -> None:
        """Who is not on the list has to go, in one way or another, from a full house."""
        with Talk(server.connect("mallory")) as talk, contextlib.suppress(OSError):
            self.assertEqual(talk.file.read(), b"")

    def test_who_gives_way_to_an_allowed_client(self) -> None:
        """First whoever is not on the list, whatever it is doing; then the longest idle; a request never."""
        with self.serving_few() as server, contextlib.ExitStack() as held:
            busy, *idle = kept_alive(server, held, 4)
            busy.begin_post()
            unlisted = [talk.connection for talk in kept_alive(server, held, 2, "mallory")]
            unlisted[0].send(HALF)
            for number in (1, 2):
                idle += kept_alive(server, held, 1)
                gone = [one for one in unlisted if not is_silent(one, 1.0)]
                self.assertEqual(len(gone), number, "one who is not on the list goes")
            self.assert_no_room_for_mallory(server)
            newcomers = kept_alive(server, held, 2)
            gone = [talk for talk in idle if not is_silent(talk.connection, 0.2)]
            self.assertEqual(len(gone), 2, "one goes for each newcomer")
            for talk in gone:
                self.assertIn(talk, idle[:3], "those who are idle for longest go")
                self.assert_ends_well(talk)
            served = [busy, *(talk for talk in [*idle, *newcomers] if talk not in gone)]
            for talk in served[1:]:
                talk.begin_post()
            self.assert_no_room_for_mallory(server)
            server.stderr.wait_for("REJECTED | peer=127.0.0.1 | no room")
            self.assert_newcomer_waits(server, served)

    def test_the_oldest_stranger_gives_way(self) -> None:
        """At the door, a newcomer replaces the one that came first, and the log says so; clients stay."""
        with self.serving_few() as server, contextlib.ExitStack() as held:
            idle = kept_alive(server, held, 6)
            strangers = silent(server, held, 4)
            refused = held.enter_context(server.connect_plain())
            self.assertEqual(hear(strangers[0]), b"")
            refused.sendall(b"rubbish\r\n")   # it is still a stranger, being seen off
            rejected(server, 2)
            for stranger in strangers[1:3]:
                silent(server, held, 1)
                self.assertEqual(hear(stranger), b"")
            self.assertTrue(is_silent(strangers[3], 0))
            self.assertEqual(rejected(server, 4).count(LATE.replace("5 s", "60 s")), 3)
            for talk in idle:
                self.assertEqual(talk.ask("GET", "/nothing").status, 404)

    def test_300_attackers_with_a_certificate(self) -> None:
        """Clients that are not on the list, each with a request begun, cannot shut out the allowed one."""
        stop = threading.Event()

        def attack(server: Server) -> None:
            """Keep 50 connections there: what has had to go comes back."""
            with contextlib.ExitStack() as held:
                connections: list[ssl.SSLSocket] = []
                while not stop.wait(0.02):
                    connections = [one for one in connections if is_silent(one, 0)]
                    with contextlib.suppress(OSError):
                        for _ in range(len(connections), 50):
                            connections.append(held.enter_context(server.connect("mallory")))
                            connections[-1].send(b"G")

        with self.serving() as server, ThreadPoolExecutor(6) as pool:
            attacks = [pool.submit(attack, server) for _ in range(6)]
            try:
                full = server.at_rest and server.at_rest + MAX_GUESTS - 6
                self.assertTrue(comes_true(lambda: server.has("fd") >= full), "the attackers should fill the house")
                for _ in range(25):
                    self.assert_served(server, "the allowed client is served among 300 attackers")
                    self.assertLessEqual(server.has("task"), MAX_GUESTS + 8)
            finally:
                stop.set()
            for one in attacks:
                one.result(PATIENCE)


class TestDescriptors(ConnectionCase):
    """Crowds, and a server that may open only few files."""

    seconds = 6

    def test_crowds_and_full_houses(self) -> None:
        """A client is served among 2,000 strangers; with `ulimit -n 320` or less, among 400; and after a full house."""
        checks = [(self.crowd, limit) for limit in (320, 128, 48, 24)] + [(self.fill, limit) for limit in (48, 24)]
        if DESCRIPTORS >= 2600:
            checks.append((self.crowd, 0))
        with ThreadPoolExecutor(len(checks)) as pool:
            results = [pool.submit(check, limit) for check, limit in checks]
        for (check, limit), result in zip(checks, results, strict=True):
            with self.subTest(check.__name__, limit=limit):
                result.result()

    def crowd(self, limit: int) -> None:
        """Strangers, silent or in their handshake, push out nobody, and a proper client is served among them."""
        with (self.serving(before=f"ulimit -n {limit}" if limit else ":") as server,
              contextlib.ExitStack() as clients):
            busy, *idle = kept_alive(server, clients, 1 if limit else 21)
            busy.begin_post()
            for says in (b"", HALF_HELLO):
                with contextlib.ExitStack() as held:
                    for _ in range(4 if limit else 10):
                        silent(server, held, 100 if limit else 200, says)
                        self.assert_served(server)
                        self.assertLessEqual(server.has("task"), MAX_GUESTS + 8)
                        self.assertLessEqual(server.has("fd"), server.at_rest + MAX_GUESTS + MAX_STRANGERS + 8)
            for talk in idle:
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
            self.assertEqual(busy.end_post().status, 201)

    def fill(self, limit: int) -> None:
        """Connections in the middle of a request, until a newcomer has to wait; then one ends its request."""
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
            self.assert_newcomer_waits(server, busy)

    def test_no_descriptor_left(self) -> None:
        """When accept() fails, newcomers wait while the server is at rest, and are served when one is free again."""
        if not hasattr(resource, "prlimit"):
            self.skipTest("needs Linux to take descriptors from a running process")
        with self.serving() as server:
            usual = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (server.at_rest, usual[1]))
            with Wire(server) as newcomer:
                newcomer.plain.sendall(newcomer.bytes_of(newcomer.tls.do_handshake))
                self.assert_quiet_while(server, newcomer.plain, "the newcomer")
                resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, usual)
                newcomer.shake_hands()
                newcomer.send(ENDING_GET)
                self.assertRegex(newcomer.hear(), b"^HTTP/1.1 200 ")


class TestStop(ConnectionCase):
    """What becomes of connections when the server is told to stop."""

    def test_a_running_request_is_finished(self) -> None:
        """One in the middle is finished, all that only wait end at once, nobody new comes in, and it exits with 0."""
        for number, constants in ((signal.SIGTERM, {}), (signal.SIGINT, {}), (signal.SIGTERM, SLICED)):
            with (self.subTest(f"on {number.name}", **constants), Server(lab(), constants=constants) as server,
                  contextlib.ExitStack() as held):
                posting = held.enter_context(Talk(server.connect()))
                posting.begin_post()
                idle = kept_alive(server, held, 20)
                strangers = [*silent(server, held, 5), *silent(server, held, 5, HALF_HELLO),
                             *silent(server, held, 5, b"rubbish\r\n")]
                server.process.send_signal(number)
                for talk in idle:
                    with talk:
                        self.assert_ends_well(talk)
                self.assertNotIn(b"HTTP", b"".join(map(hear, strangers)))
                with self.assertRaises(ConnectionError, msg="it accepts no more"):
                    server.connect_plain()
                server.stdout.wait_for("Waiting")
                answer = posting.end_post()
                self.assertEqual((answer.status, answer.headers["Connection"]), (201, "close"))
                self.assert_ends_well(posting)
                posting.__exit__()
                self.assertEqual(server.process.wait(PATIENCE), 0)
                self.assertEqual(server.stdout.all()[-2:], [
                    "[SERVER] Waiting for running requests, 5 s at most; Ctrl+C again ends at once.",
                    "[SERVER] Stopped."])
                lines = "\n".join(server.stderr.all())
                self.assertEqual(lines.count('"POST /todo HTTP/1.1" 201 -'), 1)
                self.assertNotRegex(lines, r"(?m)^(?!\[SERVER\] )|ERROR")
