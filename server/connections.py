"""The connections of a TLS server, all on one event loop: nothing waits for a peer, nothing is locked.

A connection is an asyncio protocol over a plain transport. Its TLS is in memory: bytes from the
transport go into one `ssl.MemoryBIO`, an `ssl.SSLObject` takes a step, and what it wants to send comes
out of another. (asyncio's own TLS closes before a refused peer has heard its alert.) `Connection.live`
is its life from top to bottom:

    HANDSHAKE ---> IDLE <---> REQUEST ---> RESPONSE ---> LINGERING
        |            ^                        |              ^
        |            `------------------------'              |
        `---- refused: an alert -----------------------------'

Only a peer that has completed the handshake, and so proved with a certificate who it is, gets a handler.
Every phase has a deadline, looked at four times a second. No peer can hold the loop: it gives a few KB
in one step, and has one request answered per turn of the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import http.server
import math
import os
import socket
import socketserver
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

MAX_PENDING = 512            # connections in their handshake, or lingering
MAX_CLIENTS = 1024           # connections that are served
MAX_UNAUTHORIZED = 32        # of those, of clients that may not use the server: they can never take all places
SPARE_DESCRIPTORS = 14       # that the server itself needs: streams, listener, event loop, certificate files
MAX_HANDSHAKE = 64 * 1024    # bytes until a peer has proved who it is: the longest honest chain fits
MAX_LINGER = 16 * 1024 ** 2  # bytes that a peer may still send while we wait for its end
CHUNK = 4 * 1024             # bytes of a peer in one step
SLICE = 64 * 1024            # bytes of an answer that are encrypted in one step
TICK = 0.25                  # seconds between two looks at the deadlines
STOP_SECONDS = 5.0           # that running requests have to finish when the server is told to stop

Phase = enum.Enum("Phase", "HANDSHAKE WAITING IDLE REQUEST RESPONSE REFUSED LINGERING")
DEADLINES = {Phase.HANDSHAKE: 5.0, Phase.WAITING: 15.0, Phase.IDLE: 15.0, Phase.REQUEST: 10.0,
             Phase.RESPONSE: 10.0, Phase.REFUSED: 1.0, Phase.LINGERING: 2.0}
"""Seconds that a phase of a connection may take as a whole, however slowly bytes come or go."""


OVERRUN = "no complete handshake before too many newer connections came"


class Connection(asyncio.BufferedProtocol):
    """A peer's connection. ``getpeercert`` tells who it is once the handshake is over."""

    transport: asyncio.Transport
    handler: Any = None                          # answers its requests, see strict_http.StrictHandler
    client: Any = None                           # who the server has found it to be
    tls: ssl.SSLObject | None = None             # from its first byte on: a silent peer costs only a transport
    buffer: bytearray | None = None
    life: asyncio.Task[None] | None = None
    happened: asyncio.Future[None] | None = None   # while `live` waits
    error: Exception | None = None               # why the connection is lost
    received = 0                                 # bytes in this phase
    ended = False                                # the peer says no more
    told_to_end = False                          # its deadline has passed, or its place is needed
    congested = False                            # the peer does not take what we send

    def __init__(self, server: EventLoopServer, address: Any) -> None:
        self.server, self.address = server, address
        self.enter(Phase.HANDSHAKE)

    def getpeercert(self) -> Any:
        """As of ssl.SSLSocket."""
        return self.tls and self.tls.getpeercert()

    def enter(self, phase: Phase) -> None:
        """Begin a phase and its deadline."""
        self.phase, self.received = phase, 0
        self.deadline = time.monotonic() + DEADLINES[phase]

    # --- What asyncio tells us -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The TCP connection is there."""
        self.transport = transport   # type: ignore[assignment]
        self.transport.set_write_buffer_limits(0)   # tell us about anything that the peer does not take
        self.server.add_pending(self)

    def get_buffer(self, sizehint: int) -> bytearray:
        """Where the next bytes go."""
        self.buffer = self.buffer or bytearray(CHUNK)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived."""
        assert self.buffer
        self.received += nbytes
        if self.phase in (Phase.REFUSED, Phase.LINGERING):
            if self.received > MAX_LINGER:
                self.transport.abort()
            return
        self.begin_tls()
        self.incoming.write(memoryview(self.buffer)[:nbytes])
        if self.incoming.pending >= CHUNK:
            self.transport.pause_reading()   # until `live` has taken them
        self.wake()

    def eof_received(self) -> bool:
        """The peer says no more. It may still listen."""
        self.ended = True
        if self.phase in (Phase.REFUSED, Phase.LINGERING):
            self.transport.close()
        else:
            self.begin_tls()
            self.incoming.write_eof()
            self.wake()
        return True   # do not close yet

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over: the peer has reset it, or we have closed it."""
        self.error = self.error or exc or ConnectionAbortedError("closed")
        if self.phase is Phase.HANDSHAKE and not self.life:   # it has never said a byte
            self.server.refused(self.address, self.error)
        self.server.forget(self)
        self.wake()

    def pause_writing(self) -> None:
        """What we send is not taken at once."""
        self.congested = True

    def resume_writing(self) -> None:
        """All has been taken."""
        self.congested = False
        self.wake()

    def wake(self) -> None:
        """Let `live` go on, if it waits."""
        if self.happened and not self.happened.done():
            self.happened.set_result(None)

    # --- TLS in memory -------------------------------------------------------------------------

    def begin_tls(self) -> None:
        """With the first byte, make the TLS object and begin to live."""
        if self.life is None:
            self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = self.server.context.wrap_bio(self.incoming, self.outgoing, server_side=True)
            self.life = self.server.loop.create_task(self.live())

    def flush(self) -> None:
        """Send what the last step of TLS wants to send."""
        if self.outgoing.pending and not self.transport.is_closing():
            self.transport.write(self.outgoing.read())

    async def something(self) -> None:
        """Wait until something has happened: bytes, an end, room to write, a deadline. Raises if the peer is lost."""
        if not self.error:
            if self.incoming.pending < CHUNK:
                self.transport.resume_reading()
            self.happened = self.server.loop.create_future()
            await self.happened
        if self.error:
            raise self.error

    # --- Its life ------------------------------------------------------------------------------

    async def live(self) -> None:
        """From the first byte to the last."""
        try:
            await self.shake_hands()
            self.server.authenticated(self)
            self.enter(Phase.WAITING)
            while not self.server.admit(self):   # at capacity, and all others have a request running
                if self.told_to_end:
                    raise ConnectionError("at capacity")
                await self.something()
            self.handler = self.server.RequestHandlerClass(self, self.address, self.server)
            self.enter(Phase.IDLE)
            while await self.exchange():
                await asyncio.sleep(0)   # one request per turn: pipelining must not keep others waiting
            self.linger()
        except OSError as error:
            if self.phase in (Phase.HANDSHAKE, Phase.WAITING):
                self.server.refused(self.address, error)
            self.linger()
        except Exception:   # a defect of ours: it must not cost more than this connection
            self.server.handle_error(self, self.address)   # type: ignore[arg-type]
            self.transport.abort()
        finally:
            self.tls = self.handler = self.error = None   # which hold much memory, or each other
            del self.incoming, self.outgoing

    async def shake_hands(self) -> None:
        """The handshake, step by step. Raises OSError (ssl.SSLError is one)."""
        assert self.tls
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                if self.outgoing.pending:   # so its ClientHello was whole
                    self.server.make_pending(self)
                self.flush()
            if self.received > MAX_HANDSHAKE:
                raise ConnectionError(f"sent more than {MAX_HANDSHAKE:,} bytes without completing the handshake")
            await self.something()
        self.flush()
        if hasattr(socket, "TCP_QUICKACK"):
            # Without tickets we send nothing now, so the kernel would delay its ACK by 40 ms,
            # and a client with Nagle's algorithm holds its first request back for that ACK.
            with contextlib.suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    async def exchange(self) -> bool:
        """One request and its answer. False if it was the last."""
        while not self.handler.handle_one_request():
            await self.send(self.handler.wfile.take())   # 100 Continue, or nothing
            if self.phase is Phase.IDLE and self.handler.has_begun:
                self.enter(Phase.REQUEST)
                self.told_to_end = False   # from here on, only the request's own deadline counts
            data = None if self.congested else self.decrypt()
            if data:
                self.handler.receive(data)
            elif data is None and not self.told_to_end:
                await self.something()
            elif self.phase is Phase.IDLE:
                return False
            else:
                self.handler.break_off(after=DEADLINES[Phase.REQUEST] if self.told_to_end else None)
                break
        self.enter(Phase.RESPONSE)
        await self.send(self.handler.wfile.take())
        self.enter(Phase.IDLE)
        self.received = self.incoming.pending   # perhaps half of the next request
        return not (self.handler.close_connection or self.told_to_end)

    def decrypt(self) -> bytes | None:
        """Bytes of a request; None if no more are here, b"" if no more will come."""
        assert self.tls
        try:
            return self.tls.read(SLICE)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLEOFError:   # an end without close_notify: HTTP has lengths, so nothing is cut off unnoticed
            return b""
        finally:
            self.flush()   # TLS may have something to say itself

    async def send(self, pieces: list[bytes]) -> None:
        """Encrypt and send, a slice at a time, each when the peer has taken the one before. Raises OSError."""
        assert self.tls
        if sum(map(len, pieces)) <= SLICE:
            pieces = [b"".join(pieces)]
        for piece in pieces:
            for start in range(0, len(piece), SLICE):
                self.tls.write(memoryview(piece)[start:start + SLICE])
                self.flush()
                while self.congested:
                    await self.something()

    # --- Its end -------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request has arrived, not even half of a TLS record."""
        return self.phase is Phase.IDLE and not (self.received or self.handler.has_begun)

    def end(self) -> None:
        """Its deadline has passed, or its place is needed."""
        self.told_to_end = True
        if self.phase is Phase.HANDSHAKE:
            self.drop(TimeoutError(f"no complete handshake within {DEADLINES[Phase.HANDSHAKE]:.0f} s"))
        elif self.phase in (Phase.WAITING, Phase.IDLE, Phase.REQUEST):
            self.wake()   # `live` still answers what is there
        else:
            self.transport.abort()

    def drop(self, reason: OSError) -> None:
        """End it at once."""
        self.error = reason
        self.server.forget(self)
        self.transport.abort()

    def linger(self) -> None:
        """Say the last thing, an alert or close_notify, and read on until the peer ends its direction.

        To close now would make the kernel answer what the peer still sends with a reset, and
        a reset can destroy what the peer has not read yet.
        """
        assert self.tls
        refused = self.phase is Phase.HANDSHAKE
        if not refused:
            self.incoming.read()   # or unwrap() would go on with what the peer has sent
            with contextlib.suppress(ssl.SSLError):   # the peer's close_notify is not here
                self.tls.unwrap()
        self.flush()
        self.enter(Phase.REFUSED if refused else Phase.LINGERING)
        if self.transport.is_closing():
            return
        self.server.make_pending(self)
        if self.ended:
            self.transport.close()
        else:
            if not refused:   # after an alert, our end comes with the peer's: together, some browsers miss the alert
                with contextlib.suppress(OSError):   # it has just been reset
                    self.transport.write_eof()
            self.transport.resume_reading()


class EventLoopServer(http.server.HTTPServer):
    """Leads connections through the handshake to ``handler``, and to a clean end.

    ``context`` has the TLS settings of new connections. Override `authenticated`, `is_authorized`,
    `keeps_alive`, `refused`, `service_actions` (called four times a second) and `handle_error`.
    Raises OSError if it cannot listen.
    """

    request_queue_size = 1024                       # the default of 5 drops newcomers under load
    allow_reuse_address = sys.platform != "win32"   # there it would let two servers share the port

    def __init__(self, address: tuple[str, int], handler: Any, context: ssl.SSLContext) -> None:
        self.context = context
        limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1   # negative: unlimited
        places = limit - SPARE_DESCRIPTORS if limit >= 0 else MAX_CLIENTS + MAX_PENDING
        if places < 4:
            raise OSError(errno.EMFILE, f"needs {SPARE_DESCRIPTORS + 4} file descriptors, may have {limit} (ulimit -n)")
        self.max_clients = min(MAX_CLIENTS, places // 2)
        self.max_pending = min(MAX_PENDING, places - self.max_clients)
        self.max_unauthorized = min(MAX_UNAUTHORIZED, self.max_clients // 2)
        # Every connection is in one of these, the oldest first.
        self.opening: dict[Connection, None] = {}        # has not sent a whole ClientHello
        self.pending: dict[Connection, None] = {}        # all others in their handshake, or lingering
        self.clients: dict[Connection, None] = {}        # served
        self.unauthorized: dict[Connection, None] = {}   # served, but may not use the server
        self.stopping = False
        # IPv4 if there is one, because "localhost" may stand for both: its number is the smaller one everywhere.
        self.address_family, *_, where = min(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        super().__init__(where, handler)   # type: ignore[arg-type]   # an IPv6 address has four parts
        self.loop, self.told_to_stop = asyncio.new_event_loop(), asyncio.Event()

    def server_bind(self) -> None:
        """Set the listener's options, and bind."""
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:   # "::" stands for IPv4, too; not every system has it so
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.setblocking(False)
        socketserver.TCPServer.server_bind(self)   # HTTPServer's looks up its own name, which can take seconds

    # --- Hooks ---------------------------------------------------------------------------------

    def authenticated(self, connection: Connection) -> None:
        """Called when the handshake is over."""

    def is_authorized(self, connection: Connection) -> bool:
        """Whether this client may use the server. The others have few places, and lose them first."""
        return True

    def keeps_alive(self, connection: Connection) -> bool:
        """Whether the connection may have another request after this one."""
        return not (self.stopping or connection.told_to_end)

    def refused(self, client_address: Any, reason: Exception) -> None:
        """Called once for each connection that is not served."""

    def waiting(self) -> None:
        """Called when the server is told to stop, if requests still run."""

    # --- Places --------------------------------------------------------------------------------

    def connections(self) -> list[Connection]:
        """All of them."""
        return [*self.opening, *self.pending, *self.clients, *self.unauthorized]

    def forget(self, connection: Connection) -> None:
        """Take it out of its place."""
        for group in (self.opening, self.pending, self.clients, self.unauthorized):
            group.pop(connection, None)

    def add_pending(self, connection: Connection) -> None:
        """Give a new connection a place. If there are too many, the oldest goes.

        Those that have not sent a whole ClientHello, which anyone can open by the thousand, may have
        half of the places: so they never drop one that is under way and merely far.
        """
        self.opening[connection] = None
        if self.stopping:
            connection.drop(ConnectionError("the server stops"))
        elif len(self.opening) > (self.max_pending + 1) // 2:
            next(iter(self.opening)).drop(ConnectionError(OVERRUN))
        elif len(self.opening) + len(self.pending) > self.max_pending:
            next(iter(self.pending)).drop(ConnectionError(OVERRUN))

    def make_pending(self, connection: Connection) -> None:
        """It has sent a whole ClientHello, or begins to linger."""
        if connection not in self.pending:
            self.forget(connection)
            self.pending[connection] = None

    def admit(self, connection: Connection) -> bool:
        """Give an authenticated connection a place among those that are served. False if there is none."""
        authorized = self.is_authorized(connection)
        full = len(self.clients) + len(self.unauthorized) >= self.max_clients
        if full or (not authorized and len(self.unauthorized) >= self.max_unauthorized):
            idle = [one for one in self.clients if one.is_idle] if authorized and not self.unauthorized else []
            # The unauthorized go first, whatever they do; then the longest idle. A request that has begun never.
            evicted = next(iter(self.unauthorized), None) or min(idle, key=lambda one: one.deadline, default=None)
            if evicted is None:
                return False
            self.make_pending(evicted)
            if evicted.is_idle:
                evicted.end()
            else:
                evicted.drop(ConnectionError("its place is needed"))
        self.forget(connection)
        (self.clients if authorized else self.unauthorized)[connection] = None
        return True

    # --- Start and stop ------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Run the event loop until `shutdown`."""
        self.loop.run_until_complete(self.serve())

    async def serve(self) -> None:
        """Accept and watch until `shutdown`; then let running requests finish."""
        # What asyncio would print itself; unlike a defect of a connection, it is told with what was being done.
        self.loop.set_exception_handler(lambda _, context: self.handle_error(None, context))   # type: ignore[arg-type]
        accepting, watching = (self.loop.create_task(self.repeat(step)) for step in (self.accept, self.watch))
        await self.told_to_stop.wait()
        with contextlib.suppress(NotImplementedError):   # on Windows
            self.loop.remove_reader(self.socket)
        await asyncio.wait([accepting], timeout=0.01)   # a connection that is just coming in must not get lost
        accepting.cancel()
        self.server_close()
        for connection in self.connections():
            if connection.phase in (Phase.HANDSHAKE, Phase.WAITING, Phase.IDLE):
                connection.end()
        if any(one.phase in (Phase.REQUEST, Phase.RESPONSE) for one in self.connections()):
            self.waiting()
        deadline = time.monotonic() + STOP_SECONDS
        while self.connections() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        watching.cancel()
        for connection in self.connections():
            connection.transport.abort()
        await asyncio.sleep(TICK)   # transports close in the next turns

    def shutdown(self) -> None:
        """Let `serve_forever` come to its end. May be called from a signal handler, and before it has begun."""
        self.stopping = True
        self.loop.call_soon_threadsafe(self.told_to_stop.set)

    async def repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        """Take the step again and again. A defect of ours must not end it: nobody would come in any more."""
        while True:
            try:
                await step()
            except Exception:
                self.handle_error(None, ("all", 0))   # type: ignore[arg-type]
                await asyncio.sleep(TICK)   # it may come back at once

    async def accept(self) -> None:
        """Let one connection in.

        asyncio's own servers accept as many as wait, before any limit of ours can act. Then descriptors
        run out, and for a second nobody comes in.
        """
        if self.stopping:
            return await asyncio.sleep(TICK)
        try:
            newcomer, address = await self.loop.sock_accept(self.socket)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                oldest = [*self.opening, *self.pending, *filter(lambda one: one.is_idle, self.clients)]
                for connection in oldest[:1]:
                    connection.end()
                await asyncio.sleep(TICK)   # else a busy loop
            return
        # macOS gives no address for a peer that has left already.
        await self.loop.connect_accepted_socket(lambda: Connection(self, address or ("unknown", 0)), newcomer)

    async def watch(self) -> None:
        """Look at all deadlines, after a while."""
        await asyncio.sleep(TICK)
        now = time.monotonic()
        for connection in self.connections():
            if now >= connection.deadline:
                connection.end()
            elif connection.phase is Phase.WAITING:
                connection.wake()
        self.service_actions()
