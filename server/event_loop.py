"""A TLS server on one event loop: nothing waits for a peer, and nothing is locked.

`EventLoopServer` is an http.server.HTTPServer with a `serve_forever` of its own: it accepts connections,
keeps their number within limits, checks all deadlines four times a second, and stops without cutting off
a request. What happens within a connection is in connections.py.

Every connection is in one of five groups. They are limited, and when there are too many, one is dropped:

    opening         no complete ClientHello yet: the oldest
    lingering       waits for the peer to close: the oldest
    pending         in the handshake: the oldest, if no other group is too large
    clients         served: the one that has been idle longest, never one that has begun a request
    unauthorized    served, but only with refusals: the oldest, whatever it is doing
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.server
import os
import socket
import socketserver
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from connections import Connection, Phase

MAX_PENDING = 512        # opening, lingering and pending; opening may take only half: anyone can open many
MAX_CLIENTS = 1024       # clients and unauthorized
MAX_UNAUTHORIZED = 32    # so few that they can never fill the server
SPARE_DESCRIPTORS = 14   # for the server itself: streams, listener, event loop, certificate files
TICK = 0.25              # seconds between two checks of the deadlines
STOP_SECONDS = 5.0       # seconds that running requests have to finish when the server is told to stop


class EventLoopServer(http.server.HTTPServer):
    """Takes connections through the handshake to ``handler``, and to a clean end.

    ``context`` has the TLS settings of new connections. Override `authenticated`, `is_authorized`,
    `keeps_alive`, `refused`, `service_actions` (called four times a second) and `handle_error`.
    Raises OSError if it cannot listen.
    """

    request_queue_size = 1024                       # the default of 5 drops newcomers under load
    allow_reuse_address = sys.platform != "win32"   # on Windows it would let two servers share the port

    def __init__(self, address: tuple[str, int], handler: Any, context: ssl.SSLContext) -> None:
        self.context = context
        limit = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1   # negative: unlimited
        places = limit - SPARE_DESCRIPTORS if limit >= 0 else MAX_CLIENTS + MAX_PENDING
        if places < 4:
            raise OSError(errno.EMFILE, f"needs {SPARE_DESCRIPTORS + 4} file descriptors, may have {limit}")
        self.max_clients = min(MAX_CLIENTS, places // 2)
        self.max_pending = min(MAX_PENDING, places - self.max_clients)
        self.max_unauthorized = min(MAX_UNAUTHORIZED, self.max_clients // 2)
        self.opening: dict[Connection, None] = {}   # in each of the five, the oldest comes first
        self.lingering: dict[Connection, None] = {}
        self.pending: dict[Connection, None] = {}
        self.clients: dict[Connection, None] = {}
        self.unauthorized: dict[Connection, None] = {}
        self.groups = (self.opening, self.lingering, self.pending, self.clients, self.unauthorized)
        self.stopping = False
        # Prefer IPv4, because "localhost" may mean both: AF_INET is the smaller number everywhere.
        self.address_family, *_, sockaddr = min(socket.getaddrinfo(*address, type=socket.SOCK_STREAM))
        super().__init__(sockaddr, handler)   # type: ignore[arg-type]   # an IPv6 address has four parts
        self.loop, self.told_to_stop = asyncio.new_event_loop(), asyncio.Event()

    def server_bind(self) -> None:
        """Set the listener's options, and bind."""
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.address_family == socket.AF_INET6:   # "::" includes IPv4, too; not every system does this by default
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Connections inherit this: a short answer must not wait for the ACK of the one before (40 ms). asyncio
        # sets it only on sockets that name their protocol, which accepted ones do not.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        socketserver.TCPServer.server_bind(self)   # HTTPServer's looks up the host's name, which can take seconds

    # --- Hooks ---------------------------------------------------------------------------------

    def authenticated(self, connection: Connection) -> None:
        """Called when the handshake is over."""

    def is_authorized(self, connection: Connection) -> bool:
        """Whether this client may use the server."""
        return True

    def keeps_alive(self, connection: Connection) -> bool:
        """Whether the connection may have another request after this one."""
        return not (self.stopping or connection.evicted)

    def refused(self, client_address: Any, reason: Exception) -> None:
        """Called once for each connection that is not served."""

    def still_running(self) -> None:
        """Called when the server is told to stop while requests are running."""

    # --- Places --------------------------------------------------------------------------------

    def connections(self) -> list[Connection]:
        """All of them."""
        return [one for group in self.groups for one in group]

    def forget(self, connection: Connection) -> None:
        """Take it out of its group."""
        for group in self.groups:
            group.pop(connection, None)

    def move(self, connection: Connection, group: dict[Connection, None]) -> None:
        """Put it into a group. If the first three are too large now, one is dropped.

        Neither peers that only connect, nor refused ones, can crowd out a peer that is merely far away.
        """
        if connection in group:
            return
        self.forget(connection)
        group[connection] = None
        many_opening = len(self.opening) > (self.max_pending + 1) // 2
        if many_opening or len(self.opening) + len(self.lingering) + len(self.pending) > self.max_pending:
            crowd = self.opening if many_opening else self.lingering or self.pending
            reason = ConnectionError("no complete handshake before it was dropped for newer connections")
            next(iter(crowd)).drop(reason)

    def admit(self, connection: Connection) -> bool:
        """Let an authenticated connection be served, if need be in the place of another. False if there is no place."""
        authorized = self.is_authorized(connection)
        at_capacity = len(self.clients) + len(self.unauthorized) >= self.max_clients
        evicted = None
        if at_capacity or (not authorized and len(self.unauthorized) >= self.max_unauthorized):
            evicted = self.whom_to_evict(authorized)
            if evicted is None:
                return False
        self.move(connection, self.clients if authorized else self.unauthorized)
        if evicted:
            self.move(evicted, self.lingering)
            if evicted.is_idle:
                evicted.evict()
            else:
                evicted.drop(ConnectionError("its place is needed"))
        return True

    def whom_to_evict(self, authorized: bool) -> Connection | None:
        """The oldest unauthorized one; otherwise, for an authorized newcomer, the one that has been idle longest."""
        if self.unauthorized:
            return next(iter(self.unauthorized))
        idle = [one for one in self.clients if one.is_idle]
        return min(idle, key=lambda one: one.deadline, default=None) if authorized else None

    # --- The loop ------------------------------------------------------------------------------

    def serve_forever(self, poll_interval: float = TICK) -> None:
        """Run the event loop until `shutdown`."""
        self.loop.run_until_complete(self.serve())

    def shutdown(self) -> None:
        """Make `serve_forever` return. May be called from a signal handler, and before `serve_forever`."""
        self.stopping = True
        self.loop.call_soon_threadsafe(self.told_to_stop.set)

    async def serve(self) -> None:
        """Accept connections and watch deadlines until `shutdown`; then let running requests finish."""
        self.loop.set_exception_handler(self.asyncio_error)
        accepting, watching = (self.loop.create_task(self.repeat(step)) for step in (self.accept, self.watch))
        await self.told_to_stop.wait()
        with contextlib.suppress(NotImplementedError):   # on Windows
            self.loop.remove_reader(self.socket)
        await asyncio.wait([accepting], timeout=0.01)   # a connection that is being accepted must not get lost
        accepting.cancel()
        self.server_close()
        await self.finish()
        watching.cancel()

    async def finish(self) -> None:
        """Let running requests finish, and end all other connections."""
        if any(one.phase in (Phase.REQUEST, Phase.RESPONSE) for one in self.connections()):
            self.still_running()
        deadline = time.monotonic() + STOP_SECONDS
        while self.connections() and time.monotonic() < deadline:
            for connection in self.connections():
                if connection.phase is Phase.HANDSHAKE:
                    connection.drop(ConnectionError("the server is stopping"))
                elif connection.phase in (Phase.WAITING, Phase.IDLE):
                    connection.evict()
            await asyncio.sleep(0.01)
        for connection in self.connections():
            connection.transport.abort()
        await asyncio.sleep(0.01)   # transports close in the next turns

    async def repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat the step forever. A bug of ours must not end this: no more connections would be accepted."""
        while True:
            try:
                await step()
            except Exception:   # noqa: BLE001
                self.handle_error(None, ("none", 0))   # type: ignore[arg-type]
                await asyncio.sleep(TICK)   # the error may come back at once

    async def accept(self) -> None:
        """Accept one connection.

        asyncio's own servers accept all waiting connections at once, before our limits can act. Then descriptors
        run out, and nobody is accepted for a second.
        """
        if self.stopping:
            await asyncio.sleep(TICK)
        try:
            newcomer, address = await self.loop.sock_accept(self.socket)
        except OSError as error:
            no_resources = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
            if no_resources:
                for oldest in [*self.opening, *self.lingering, *self.pending][:1]:
                    oldest.drop(ConnectionError("no file descriptor was left for others"))
            await asyncio.sleep(TICK if no_resources else 0)   # else a busy loop
            return
        try:
            # macOS gives no address for a peer that has left already.
            await self.loop.connect_accepted_socket(lambda: Connection(self, address or ("unknown", 0)), newcomer)
        except OSError:   # it has just left
            newcomer.close()

    def asyncio_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log what asyncio would print. An OSError there only means that a peer has left at an odd moment."""
        try:
            raise context.get("exception") or RuntimeError(context["message"])
        except OSError:
            pass
        except Exception:   # noqa: BLE001
            self.handle_error(None, ("none", 0))   # type: ignore[arg-type]

    async def watch(self) -> None:
        """After a while, check all deadlines, and whether waiting connections can be served."""
        await asyncio.sleep(TICK)
        now = time.monotonic()
        for connection in self.connections():
            if now >= connection.deadline:
                connection.end()
            elif connection.phase is Phase.WAITING:
                connection.wake()
        self.service_actions()
