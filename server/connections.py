"""One connection of a TLS server on an event loop: its handshake, its requests, its end.

A connection is an asyncio protocol over a plain transport. TLS runs in memory: bytes from the
transport go into one `ssl.MemoryBIO`, an `ssl.SSLObject` takes a step, and what it wants to send comes
out of another. (asyncio's own TLS closes before a refused peer has read its alert.) `Connection.live`
is its life from top to bottom, as a generator: at each ``yield`` it waits until something happens.

    HANDSHAKE --> WAITING --> IDLE --> REQUEST --> RESPONSE --> LINGERING --> gone
        |       for a place    ^                      |                        ^
        |                      '----------------------'                        |
        '-- refused: an alert --> REFUSED -------------------------------------'

Only a peer that has completed the handshake, and so proved with a certificate who it is, gets a handler.
Each phase has one deadline, however slowly bytes come or go. No peer can block the loop: each step
reads at most `CHUNK` bytes from it, and each turn of the loop answers at most one of its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import ssl
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from event_loop import EventLoopServer

MAX_HELLO = 16 * 1024        # bytes before a ClientHello is complete: an honest one has 4 KB at most
MAX_HANDSHAKE = 64 * 1024    # bytes before a peer has proved who it is: enough for the longest honest chain
MAX_LINGER = 16 * 1024 ** 2  # bytes that a peer may still send before it closes
CHUNK = 4 * 1024             # bytes from a peer in one step, so that no step takes long
SLICE = 64 * 1024            # bytes of an answer encrypted in one step; no piece of an answer is longer

Phase = enum.Enum("Phase", "HANDSHAKE WAITING IDLE REQUEST RESPONSE REFUSED LINGERING")
DEADLINES = {Phase.HANDSHAKE: 5.0, Phase.WAITING: 15.0, Phase.IDLE: 15.0, Phase.REQUEST: 10.0,
             Phase.RESPONSE: 10.0, Phase.REFUSED: 1.0, Phase.LINGERING: 2.0}
"""Seconds that each phase may take."""


class Connection(asyncio.BufferedProtocol):
    """A peer's connection. After the handshake, ``getpeercert()`` says who the peer is."""

    transport: asyncio.Transport
    tls: ssl.SSLObject               # this and the next two are made on the first byte: a silent peer costs little
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO
    life: Generator[None, None, None] | None = None
    handler: Any                     # handles its requests, see strict_http.StrictHandler
    client: Any                      # who it is, for the server's own use
    buffer: bytearray | None = None
    error: Exception | None = None   # why the connection was lost
    received = 0                     # bytes in this phase
    congested = False                # the peer has not taken all that we sent
    half_closed = False              # the peer has closed its sending direction
    its_turn = False                 # it may have its next request answered
    evicted = False                  # its place is needed, or the server stops

    def __init__(self, server: EventLoopServer, address: Any) -> None:
        self.server, self.address = server, address
        self.enter(Phase.HANDSHAKE)

    def enter(self, phase: Phase) -> None:
        """Begin a phase and its deadline."""
        self.phase, self.received = phase, 0
        self.deadline = time.monotonic() + DEADLINES[phase]

    def getpeercert(self) -> Any:
        """See ssl.SSLSocket."""
        return self.tls.getpeercert()

    # --- Called by asyncio ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The TCP connection is established."""
        self.transport = transport   # type: ignore[assignment]   # asyncio's own hint is too wide
        self.transport.set_write_buffer_limits(0)   # report every byte that the peer does not take
        self.server.move(self, self.server.opening)
        if self.server.stopping:
            self.drop(ConnectionError("the server is stopping"))

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go. Those that get refusals only have short requests, and may send less at a time."""
        self.buffer = self.buffer or bytearray(CHUNK)
        return memoryview(self.buffer)[:CHUNK // 8 if self in self.server.unauthorized else CHUNK]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have arrived."""
        self.received += nbytes
        if self.phase in (Phase.REFUSED, Phase.LINGERING):
            if self.received > MAX_LINGER:
                self.transport.abort()
            return
        self.begin()
        self.incoming.write(self.get_buffer(0)[:nbytes])
        if self.incoming.pending >= CHUNK:
            self.transport.pause_reading()   # until `live` has taken them
        self.wake()

    def eof_received(self) -> bool:
        """The peer sends no more. It may still read, so the transport must not close yet: True."""
        self.half_closed = True
        if self.phase in (Phase.REFUSED, Phase.LINGERING):
            self.transport.close()
        else:
            self.begin()
            self.incoming.write_eof()
            self.wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has reset the connection, or we have closed it."""
        self.error = self.error or exc or ConnectionAbortedError("closed")
        if self.life is None:   # it never sent a byte
            self.server.refused(self.address, self.error)
        self.server.forget(self)
        self.wake()

    def pause_writing(self) -> None:
        """The peer does not take what we send at once."""
        self.congested = True

    def resume_writing(self) -> None:
        """The peer has taken all of it."""
        self.congested = False
        self.server.loop.call_soon(self.wake)   # not at once: asyncio would not expect a close in here

    # --- Its life ------------------------------------------------------------------------------

    def begin(self) -> None:
        """On the first byte, create the TLS object and start `live`."""
        if self.life is None:
            self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            self.tls = self.server.context.wrap_bio(self.incoming, self.outgoing, server_side=True)
            self.life = self.live()

    def wake(self) -> None:
        """Something has happened: let `live` continue."""
        if self.life:
            next(self.life, None)

    def next_turn(self) -> None:
        """A new turn of the loop has begun."""
        self.its_turn = True
        self.wake()

    def wait(self) -> Generator[None, None, None]:
        """Wait for something to happen: bytes, an end, space to write, a deadline. Raises the error that ends it."""
        if not self.error:
            if self.incoming.pending < CHUNK:
                self.transport.resume_reading()
            yield
        if self.error:
            raise self.error

    def live(self) -> Generator[None, None, None]:
        """From the first byte to the last."""
        try:
            yield from self.shake_hands()
            self.server.authenticated(self)
            yield from self.wait_for_place()
            self.handler = self.server.RequestHandlerClass(self, self.address, self.server)
            self.be_idle()
            while (yield from self.exchange()):
                if not self.is_idle:   # it pipelines: one request per turn of the loop, so that it cannot hold it
                    self.its_turn = False
                    self.server.loop.call_soon(self.next_turn)
                    while not self.its_turn:   # bytes that arrive meanwhile wake it, too
                        yield from self.wait()
        except OSError as error:   # ssl.SSLError is one
            if self.phase in (Phase.HANDSHAKE, Phase.WAITING):
                self.server.refused(self.address, error)
        except Exception:   # noqa: BLE001   # a bug of ours must end no more than this connection
            self.server.handle_error(self, self.address)   # type: ignore[arg-type]
        self.linger()
        self.error = None   # its traceback refers to this connection, and would keep it in memory
        del self.tls, self.incoming, self.outgoing

    def shake_hands(self) -> Generator[None, None, None]:
        """The handshake, step by step. Raises OSError."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                if self.outgoing.pending:   # we answer, so the ClientHello was complete
                    self.server.move(self, self.server.pending)
                self.flush()
            limit = MAX_HELLO if self in self.server.opening else MAX_HANDSHAKE
            if self.received > limit:
                raise ConnectionError(f"sent more than {limit:,} bytes without completing the handshake")
            yield from self.wait()
        self.flush()
        if hasattr(socket, "TCP_QUICKACK"):
            # Without tickets we send nothing now, so the kernel would delay its ACK by 40 ms, and a
            # client with Nagle's algorithm would hold back its first request until that ACK.
            with contextlib.suppress(OSError):   # it has just been reset
                self.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def wait_for_place(self) -> Generator[None, None, None]:
        """Wait while the server is at capacity and every other client has a request running. Raises OSError."""
        self.enter(Phase.WAITING)
        while not self.server.admit(self):
            if self.is_over:
                raise ConnectionError("at capacity")
            yield from self.wait()

    def exchange(self) -> Generator[None, None, bool]:
        """One request and its answer. False if no more may come. Raises OSError."""
        while not self.handler.handle_one_request():
            if self.handler.wfile.pieces:   # 100 Continue
                yield from self.send(self.handler.wfile.take())
            if self.phase is Phase.IDLE and self.handler.has_begun:
                self.enter(Phase.REQUEST)
            while (data := self.decrypt()) is None and not self.is_over:
                yield from self.wait()
            if data:
                self.handler.receive(data)
            elif self.phase is Phase.IDLE:
                return False
            else:
                self.handler.break_off(after=DEADLINES[Phase.REQUEST] if data is None else None)
                break
        self.enter(Phase.RESPONSE)
        yield from self.send(self.handler.wfile.take())
        self.be_idle()
        return not (self.handler.close_connection or self.evicted)

    def be_idle(self) -> None:
        """Wait for the next request, of which a part may have arrived already."""
        self.enter(Phase.IDLE)
        self.received = self.incoming.pending

    # --- TLS in memory -------------------------------------------------------------------------

    def flush(self) -> None:
        """Send what the last step of TLS wants to send."""
        if self.outgoing.pending and not self.transport.is_closing():
            self.transport.write(self.outgoing.read())

    def decrypt(self) -> bytes | None:
        """Bytes of a request; None if no more are here, b"" if no more will come. Raises ssl.SSLError."""
        if self.congested or not (self.incoming.pending or self.half_closed):
            return None
        try:
            return self.tls.read(SLICE)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLEOFError:   # an end without close_notify: HTTP states lengths, so truncation is noticed
            return b""
        finally:
            self.flush()   # TLS may have something of its own to send

    def send(self, pieces: list[bytes]) -> Generator[None, None, None]:
        """Encrypt and send one piece at a time, each after the peer has taken the one before. Raises OSError."""
        if sum(map(len, pieces)) <= SLICE:
            pieces = [b"".join(pieces)]   # one TLS record, if it is a short answer
        for piece in pieces:
            self.tls.write(piece)
            self.flush()
            if self.transport.is_closing():   # lost: what is encrypted now would only pile up
                raise ConnectionAbortedError("closed")
            while self.congested:
                yield from self.wait()

    # --- Its end -------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request and nothing of that has arrived, not even part of a TLS record."""
        return self.phase is Phase.IDLE and not (self.received or self.handler.has_begun)

    @property
    def is_over(self) -> bool:
        """Whether to wait no more: the deadline has passed, or it is evicted, but not in the middle of a request."""
        return time.monotonic() >= self.deadline or (self.evicted and self.phase is not Phase.REQUEST)

    def evict(self) -> None:
        """Make room for another connection, or for a stop."""
        self.evicted = True
        self.end()

    def end(self) -> None:
        """End it, because `is_over` says so. What has arrived is still answered."""
        if self.phase is Phase.HANDSHAKE:
            self.drop(TimeoutError(f"no complete handshake within {DEADLINES[Phase.HANDSHAKE]:.0f} s"))
        elif self.phase in (Phase.WAITING, Phase.IDLE, Phase.REQUEST) and not self.congested:
            self.server.loop.call_later(0, self.wake)   # after the next reads: what has arrived is answered
        else:
            self.transport.abort()

    def drop(self, reason: OSError) -> None:
        """Close it at once."""
        self.error = reason
        self.server.forget(self)
        self.transport.abort()

    def linger(self) -> None:
        """Lingering close: send the alert or close_notify, then read until the peer closes its direction.

        If we closed at once, the kernel would answer what the peer still sends with a reset, and
        a reset can destroy what the peer has not read yet.
        """
        refused = self.phase is Phase.HANDSHAKE
        if not refused:
            self.incoming.read()   # or unwrap() would process what the peer has sent
            with contextlib.suppress(ssl.SSLError):   # the peer's close_notify has not arrived
                self.tls.unwrap()
        self.flush()
        self.enter(Phase.REFUSED if refused else Phase.LINGERING)
        if self.transport.is_closing():
            return
        self.server.move(self, self.server.lingering)
        if self.half_closed:
            self.transport.close()
            return
        if not refused:   # after an alert, close only with the peer: otherwise some browsers miss the alert
            with contextlib.suppress(OSError):   # it has just been reset
                self.transport.write_eof()
        self.transport.resume_reading()
