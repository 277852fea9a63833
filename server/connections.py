"""The connections of a TLS server: a doorman and workers.

                 first byte       certificate verified        last words said
    listener ---> DOOR: handshake -----------------> WORKER: serves ------.
                    |                                                     |
                    `---- refused: alert sent ---> DOOR: sees off <-------'

The handshake is the border. Before it a peer is a *stranger* and costs a descriptor and a small
record: one thread, the doorman, accepts and leads all handshakes at once, never waiting for one
of them. Who has proved with a certificate who he is becomes a *guest*: a worker, a thread of his
own, reads and answers his requests in the plain blocking way. The doorman sees off all who go:
what they were told last must reach them before the connection ends.

Every wait has a deadline. The doorman looks at them four times a second. To end a worker's wait,
he shuts the socket down under it. Windows does not wake for that, so there waits come in slices.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import math
import os
import select
import selectors
import socket
import socketserver
import ssl
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

MAX_GUESTS = 256            # served at the same time
MAX_STRANGERS = 512         # at the door: in their handshake, or being seen off
MAX_DRAIN = 16 * 1024 ** 2  # bytes that one who is seen off may still send
STOP_SECONDS = 5.0          # that running requests have to finish when the server is told to stop
TICK = 0.25                 # seconds between two looks at the deadlines
SLICE = TICK if sys.platform == "win32" else None   # seconds of a worker's single wait, where nobody can wake him

Phase = enum.Enum("Phase", "HANDSHAKE IDLE REQUEST RESPONSE REFUSED CLOSING")
DEADLINES = {Phase.HANDSHAKE: 5.0, Phase.IDLE: 15.0, Phase.REQUEST: 10.0, Phase.RESPONSE: 10.0,
             Phase.REFUSED: 1.0, Phase.CLOSING: 2.0}
"""Seconds that a phase of a connection may take as a whole, however slowly bytes come or go."""


class Guest(ssl.SSLSocket):
    """Our end of a TLS connection."""

    phase = Phase.HANDSHAKE
    deadline = math.inf   # on the clock of time.monotonic(); none while he waits for a worker
    given_up = False      # told to go

    def recv_into(self, *arguments: Any) -> int:
        """As ever, but in slices; and 0, as at the input's end, if he was told to go."""
        while not self.given_up:
            try:
                return super().recv_into(*arguments)
            except TimeoutError:
                continue
        return 0

    def send(self, *arguments: Any) -> int:
        """As ever, but in slices."""
        while True:
            try:
                return super().send(*arguments)
            except TimeoutError:
                if self.given_up:
                    raise


@dataclass
class Stranger:
    """Someone at the door."""

    socket: Any       # plain; a Guest from his first byte on
    address: Any
    number: int       # of the descriptor, which the socket forgets if it fails to become a Guest
    phase: Phase = Phase.HANDSHAKE
    deadline: float = 0.0
    drained: int = 0  # bytes that were dropped while he was seen off


class DoormanServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Leads connections through the handshake to ``handler``, and to a clean end.

    ``context`` has the TLS settings. Override `is_welcome`, `refused` and `handle_error`.
    """

    request_queue_size = 1024                       # the default of 5 drops newcomers under load
    allow_reuse_address = sys.platform != "win32"   # there it would let two servers share the port

    def __init__(self, address: tuple[str, int], handler: Any, context: ssl.SSLContext) -> None:
        self.context = context
        context.sslsocket_class = Guest
        # With few descriptors (ulimit -n; negative: unlimited) both shrink. On Windows, select() takes 512 sockets:
        # the listener, strangers, and all guests when they leave at the same time.
        limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else 511 + 32
        places = max(limit, 36) - 32 if limit >= 0 else MAX_GUESTS + MAX_STRANGERS
        self.max_guests = min(MAX_GUESTS, places // 2)
        self.max_strangers = min(MAX_STRANGERS, places - self.max_guests)
        self.strangers: dict[int, Stranger] = {}   # by descriptor, the oldest first
        self.guests: set[Guest] = set()
        self.changing = threading.Lock()           # guards the guests and their phases
        self.workers = ThreadPoolExecutor(self.max_guests)
        self.selector = selectors.DefaultSelector()
        self.next_look = 0.0
        self.stopping = False
        self.stopped = threading.Event()
        # IPv4 if there is one, because "localhost" may stand for both: its number is the smaller one everywhere.
        self.address_family, *_, where = min(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        super().__init__(where, handler)   # type: ignore[arg-type]   # an IPv6 address has four parts

    def server_bind(self) -> None:
        """Set the listener's options, and bind."""
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        # Connections inherit this: a long body's last piece must not wait for an ACK (40 ms).
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.address_family == socket.AF_INET6:   # "::" stands for IPv4, too; not every system has it so
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setblocking(False)
        super().server_bind()

    def is_welcome(self, guest: Guest) -> bool:
        """Whether he may use the server. In a full house all others go first, whatever they are doing."""
        return True

    def refused(self, client_address: Any, reason: Exception) -> None:
        """Told once of each connection that did not become a guest."""

    # The door: the doorman's thread

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Be the doorman, until `shutdown`."""
        while self.strangers or self.guests or not self.stopping:
            try:
                self.service_actions()
                if not self.selector.get_map():   # only guests are left, and Windows cannot wait for nothing
                    time.sleep(poll_interval)
                    continue
                for key, _ in self.selector.select(poll_interval):
                    stranger = self.strangers.get(key.fd)
                    if key.data is None:
                        self.accept()
                    elif stranger and stranger is key.data:   # else he has gone since select() returned
                        step = self.shake_hands if stranger.phase is Phase.HANDSHAKE else self.see_off
                        step(stranger)
            except Exception:   # a defect of ours; but without a doorman nobody would come in any more
                self.handle_error(None, ("all", 0))   # type: ignore[arg-type]
                time.sleep(TICK)   # it may come back at once
        self.stopped.set()

    def accept(self) -> None:
        """Let newcomers in, as many as are there, but in turns with those who are inside."""
        for _ in range(64):
            try:
                newcomer, address = self.get_request()
            except OSError as error:   # as a rule: no more are there
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self.selector.unregister(self.socket)   # until the next look; else a busy loop
                    self.make_room(1)
                return
            newcomer.setblocking(False)
            # macOS gives no address for a peer that has left already.
            self.put_at_door(Stranger(newcomer, address or ("unknown", 0), newcomer.fileno()))
            if len(self.strangers) > self.max_strangers:
                self.turn_away(list(self.strangers.values())[0])   # a copy: workers bring guests back meanwhile

    def put_at_door(self, stranger: Stranger) -> None:
        """Look after what he sends, until his phase's deadline."""
        stranger.deadline = time.monotonic() + DEADLINES[stranger.phase]
        self.selector.register(stranger.number, selectors.EVENT_READ, stranger)
        self.strangers[stranger.number] = stranger   # last: from here on the doorman may turn him away

    def take_from_door(self, stranger: Stranger) -> None:
        """The opposite."""
        del self.strangers[stranger.number]
        self.selector.unregister(stranger.number)

    def turn_away(self, stranger: Stranger) -> None:
        """End a connection at the door."""
        if stranger.phase is Phase.HANDSHAKE:
            self.refused(stranger.address, TimeoutError(
                f"no complete handshake within {DEADLINES[stranger.phase]:.0f} s, or while others waited"))
        self.take_from_door(stranger)
        self.close_request(stranger.socket)

    def shake_hands(self, stranger: Stranger) -> None:
        """One step of the handshake. It ends with an alert, or with a guest."""
        try:
            if not isinstance(stranger.socket, Guest):   # his first byte: only now he costs a TLS object
                stranger.socket.getpeername()   # fails if he has left already; wrap_socket would fail less neatly
                stranger.socket = self.context.wrap_socket(stranger.socket, True, do_handshake_on_connect=False)
            stranger.socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wanted:
            events = selectors.EVENT_READ if isinstance(wanted, ssl.SSLWantReadError) else selectors.EVENT_WRITE
            self.selector.modify(stranger.number, events, stranger)
        except Exception as error:
            self.take_from_door(stranger)
            self.refused(stranger.address, error)
            if stranger.socket.fileno() >= 0:   # else he has reset it before TLS began
                # Our end is not said yet: it could overtake the alert in some clients (Chromium).
                stranger.phase = Phase.REFUSED
                self.put_at_door(stranger)
        else:
            self.take_from_door(stranger)
            self.process_request(stranger.socket, stranger.address)

    def see_off(self, stranger: Stranger) -> None:
        """Drop what he still sends, until he leaves."""
        try:   # not SSLSocket.recv, which would go on with the handshake
            dropped = len(socket.socket.recv(stranger.socket, 64 * 1024))
        except OSError:
            dropped = 0
        stranger.drained += dropped
        if not dropped or stranger.drained > MAX_DRAIN:
            self.turn_away(stranger)

    def service_actions(self) -> None:
        """Look at all deadlines, if it is time."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + TICK
        if self.stopping and self.socket.fileno() >= 0:
            with contextlib.suppress(KeyError):   # it is not there while descriptors are short
                self.selector.unregister(self.socket)
            self.server_close()
        elif not self.stopping and self.socket.fileno() not in self.selector.get_map():
            self.selector.register(self.socket, selectors.EVENT_READ)
        for stranger in list(self.strangers.values()):
            if now >= stranger.deadline or (self.stopping and stranger.phase is Phase.HANDSHAKE):
                self.turn_away(stranger)
        with self.changing:
            for guest in self.guests:
                if now >= guest.deadline or (self.stopping and guest.phase is Phase.IDLE and not guest.given_up):
                    self.give_up(guest)
        self.make_room(len(self.guests) - self.max_guests)

    # Guests

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a guest a worker, now or when one is free. In a full house he, or somebody else, must go."""
        if len(self.guests) >= self.max_guests and not self.is_welcome(request):
            self.refused(client_address, ConnectionError("no room"))
            self.shutdown_request(request)
            return
        if hasattr(socket, "TCP_QUICKACK"):
            # Without tickets we send nothing now, so the kernel would delay its ACK by 40 ms,
            # and a client with Nagle's algorithm holds his first request back for that ACK.
            request.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        request.settimeout(SLICE)
        with self.changing:
            self.guests.add(request)
        try:
            self.workers.submit(self.process_request_thread, request, client_address)
        except RuntimeError:   # no more threads can be started: he waits for one that is there
            self.make_room(1)
        self.make_room(len(self.guests) - self.max_guests)

    def make_room(self, places: int) -> None:
        """Tell so many guests to go, if there are: the unwelcome, then the longest idle with no request on its way."""
        if places <= 0:
            return
        with self.changing:
            unwelcome = [one for one in self.guests if not self.is_welcome(one)]
            idle = {one for one in self.guests if one.phase is Phase.IDLE}.difference(unwelcome)
            with contextlib.suppress(OSError, ValueError):   # what select cannot take is not spared
                idle.difference_update(select.select(idle, [], [], 0)[0])
            for guest in [*unwelcome, *sorted(idle, key=lambda one: one.deadline)][:places]:
                if not guest.given_up:
                    self.give_up(guest)

    def enter(self, guest: Guest, phase: Phase) -> bool:
        """Begin a guest's phase and its deadline. False if he was told to go just before, or we stop."""
        with self.changing:
            wanted = not guest.given_up and not (self.stopping and phase is Phase.IDLE)
            guest.phase, guest.deadline = phase, time.monotonic() + DEADLINES[phase]
            guest.given_up = False
        return wanted

    def give_up(self, guest: Guest) -> None:
        """End his worker's wait, as if the input had ended: it can still answer. The next time, end all."""
        only_input = guest.phase in (Phase.IDLE, Phase.REQUEST) and not guest.given_up
        guest.given_up = True
        guest.deadline = time.monotonic() + DEADLINES[Phase.CLOSING]
        if SLICE is None or not only_input:
            with contextlib.suppress(OSError):
                # Not SSLSocket's method: that drops the TLS layer under the worker's feet.
                socket.socket.shutdown(guest, socket.SHUT_RD if only_input else socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """A worker's last words: close_notify, and the end of our direction. Then back to the door.

        To close now would make the kernel answer what the peer still sends with a reset, and
        a reset can destroy what he has not read yet. So the doorman reads on until he leaves.
        """
        request.settimeout(0)   # not to wait for the peer's close_notify
        for last_words in (request.unwrap, lambda: request.shutdown(socket.SHUT_WR)):
            with contextlib.suppress(OSError, ValueError):   # as a rule: close_notify is out, the peer's is not here
                last_words()
        self.put_at_door(Stranger(request, None, request.fileno(), Phase.CLOSING))
        with self.changing:
            self.guests.discard(request)

    def running(self) -> bool:
        """Whether a request is being read or answered."""
        return any(guest.phase in (Phase.REQUEST, Phase.RESPONSE) for guest in list(self.guests))

    def shutdown(self) -> None:
        """Accept no more, and let running requests finish: return when all have left, or time is up."""
        self.stopping = True
        for _ in range(int(STOP_SECONDS / TICK)):   # one long wait would be deaf to Ctrl+C on Windows
            if self.stopped.wait(TICK):
                break
