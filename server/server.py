#!/usr/bin/env python3
"""The lab's mutual TLS server: GET /todo and POST /todo, for clients with a certificate of our CA.

Read it from top to bottom: the TLS settings, the log, the TODO list, one connection's life
(handshake, requests, close), the HTTP rules and who may come in, and last the start and the end.

One thread accepts. Each connection is served by a thread of its own, so whoever stalls, stalls
alone; a sweep a few times a second ends whatever has waited too long.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import http.server
import json
import os
import queue
import re
import select
import signal
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from http import HTTPStatus
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

CERTS = Path(__file__).resolve().parent.parent / "certs"   # found from any current folder

MAX_CONNECTIONS = 256
MAX_BODY = 64 * 1024        # bytes of a request's body
MAX_LINE = 64 * 1024        # bytes of the request line, and of one header line
MAX_HEADERS = 100           # lines
MAX_ITEMS = 1000            # on the list
MAX_TASK = 1000             # characters
MAX_DRAIN = 16 * 1024 ** 2  # bytes that a peer may still send while we close
STOP_SECONDS = 5.0          # that running requests have to finish when the server is told to stop
SWEEP_SECONDS = 0.25        # between two looks at the deadlines


# --- TLS -----------------------------------------------------------------------------------

def tls_context(certs: Path) -> ssl.SSLContext:
    """The server's side of mutual TLS, with ca.crt, server.crt and server.key from ``certs``.

    Exits with an error line if one of them is missing, unreadable or does not fit.
    """
    for name in ("ca.crt", "server.crt", "server.key"):
        try:
            (certs / name).read_bytes()
        except OSError as error:
            fail(f"cannot read {certs / name} ({error.strerror}); make the certificates: bash certs/gen_certs.sh")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # ① Require a client certificate: this is the "mutual" in mTLS. A client without one, or
    #    with one that does not verify, is refused in the handshake and never reaches HTTP.
    context.verify_mode = ssl.CERT_REQUIRED
    # ② Trust only our CA. With the system's trust store, any public CA could admit a client.
    try:
        context.load_verify_locations(cafile=certs / "ca.crt")
    except ssl.SSLError as error:
        fail(f"{certs / 'ca.crt'} is not a certificate ({in_words(error)}); run bash certs/gen_certs.sh again")
    # ③ Our own certificate and key. The empty password makes an encrypted key an error: without
    #    it, OpenSSL would stop and ask for a password that nobody is there to type.
    try:
        context.load_cert_chain(certs / "server.crt", certs / "server.key", password="")
        load_with_ca(context, certs)
    except (ssl.SSLError, OSError) as error:
        fail(f"{certs / 'server.crt'} and server.key do not fit or cannot be used ({in_words(error)}); "
             "the key must have no password; run bash certs/gen_certs.sh again")
    # ④ TLS 1.2 at least: 1.0 and 1.1 rest on MD5 and SHA-1 (deprecated by RFC 8996).
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # For TLS 1.2, only forward secrecy with authenticated encryption. This removes from Python's
    # default the CBC suites (padding oracles) and finite-field DHE. TLS 1.3 has nothing else.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # All those suites are good, so the client may choose: it knows which one is fast for it.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    # The only protocol we speak. A client that offers others (h2) learns it in the handshake.
    context.set_alpn_protocols(["http/1.1"])
    # A TLS 1.2 client must not make us repeat the costly handshake within a connection.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # No TLS 1.3 tickets: every new connection proves again that the client has its key. (TLS 1.2
    # can still resume. Every request is authorized anyway, resumed or not.)
    context.num_tickets = 0
    # A peer that leaves without close_notify gets no error alert from OpenSSL 3, just an end:
    # HTTP has lengths, so nothing can be cut off unnoticed. (Python 3.10+ with OpenSSL 3+.)
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    context.sslsocket_class = Connection
    return context


def load_with_ca(context: ssl.SSLContext, certs: Path) -> None:
    """Load our certificate once more, with the CA's after it in one file.

    OpenSSL sends both in any case, but a chain that it is not given, it looks for and verifies
    in every handshake: 6 % of the CPU time. Where no temporary file can be, that is the price.
    """
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
        chain = Path(folder) / "chain.pem"
        chain.write_bytes((certs / "server.crt").read_bytes() + (certs / "ca.crt").read_bytes())
        context.load_cert_chain(chain, certs / "server.key", password="")


def in_words(error: Exception) -> str:
    """What went wrong in OpenSSL's words, without its numbers and source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    text = str(getattr(error, "strerror", None) or error)
    return re.sub(r"\[\w+(: \w+)?\] | ?\(_ssl\.c:\d+\)", "", text).lower()


def common_name(certificate: Any) -> str | None:
    """The CN of what ``getpeercert()`` returned; None unless there is exactly one.

    With two, which of them counts would depend on who reads the certificate.
    """
    names = [value for rdn in certificate["subject"] for key, value in rdn if key == "commonName"]
    return names[0] if len(names) == 1 else None


# --- Log -----------------------------------------------------------------------------------

LOG_LOCK = threading.Lock()


def log(*lines: str, patient: bool = True) -> None:
    """Write whole lines to stderr, one thread at a time, so that they never mix.

    Not ``patient``: rather lose the lines than wait for a terminal or pipe that nobody reads.

    Callers escape what a peer can choose (``repr`` or ``unicode_escape``): no request may forge
    a line or send control codes to the terminal.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):   # a closed stderr stops no one
        if patient or select.select([], [sys.stderr], [], 0)[1]:
            with LOG_LOCK:
                sys.stderr.write("".join(f"[SERVER] {line}\n" for line in lines))
                sys.stderr.flush()


def say(text: str) -> None:
    """Print to stdout at once; if its reader has left (``| head``), print to nowhere from then on."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(problem: str) -> NoReturn:
    """One line that says what is wrong and what to do; exit 1."""
    log(f"ERROR: {problem}")
    sys.exit(1)


# --- The TODO list -------------------------------------------------------------------------

class TodoStore:
    """The items, in memory: gone when the server stops. Safe under threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: list[dict[str, object]] = []
        self._encoded: dict[str, bytes] = {}
        for task in ("Set up local CA", "Issue server certificate", "Issue client certificate",
                     "Configure mTLS server"):
            self.add(task, True)
        self.add("Validate mutual auth", False)

    def add(self, task: str, done: bool) -> dict[str, object] | None:
        """Append an item and return it; None if the list is full."""
        with self._lock:
            if len(self._items) >= MAX_ITEMS:
                return None
            item: dict[str, object] = {"id": len(self._items) + 1, "task": task, "done": done}
            self._items.append(item)
            self._encoded.clear()
            return item

    def encoded(self, client: str) -> bytes:
        """The whole list as the body of an answer to ``client``; kept until the next `add`."""
        with self._lock:
            if client not in self._encoded:
                self._encoded[client] = encode({"client": client, "todos": self._items})
            return self._encoded[client]


def encode(value: object) -> bytes:
    """JSON as all our bodies have it: indented, UTF-8 instead of escapes, a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def parse_todo(body: bytes) -> tuple[str, bool]:
    """Task and done of a POST's body. Raises ValueError that names the field and the rule."""
    try:
        item = json.loads(body.decode(), parse_constant=not_json)
    except UnicodeDecodeError:
        raise ValueError("body: must be UTF-8") from None
    except RecursionError:   # deep nesting; not a ValueError
        raise ValueError("body: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"body: must be JSON ({error})") from None
    if not isinstance(item, dict):
        raise ValueError("body: must be a JSON object")
    task = item.get("task")
    if not isinstance(task, str) or not task.strip():
        raise ValueError("task: must be a non-empty string")
    if len(task) > MAX_TASK:
        raise ValueError(f"task: must have at most {MAX_TASK:,} characters")
    if any("\ud800" <= character <= "\udfff" for character in task):
        raise ValueError("task: must be valid Unicode (it has a lone surrogate)")
    done = item.get("done", False)
    if not isinstance(done, bool):
        raise ValueError("done: must be true or false")
    return task, done


def not_json(constant: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's json reads although RFC 8259 section 6 forbids them."""
    raise ValueError(f"{constant} is not JSON")


# --- Connections ---------------------------------------------------------------------------

class Phase(enum.IntEnum):
    """What a connection is waiting for. When the house is full, the lower gives way first."""

    CLOSING = 0     # for the peer to read our last words and leave
    HANDSHAKE = 1
    IDLE = 2        # for the next request
    REQUEST = 3     # for the rest of a request: from here on it never gives way
    RESPONSE = 4    # for the peer to take the response


DEADLINES = {Phase.CLOSING: 2.0, Phase.HANDSHAKE: 5.0, Phase.IDLE: 15.0, Phase.REQUEST: 10.0, Phase.RESPONSE: 10.0}
"""Seconds that a phase may take as a whole, however slowly bytes come or go."""


class Connection(ssl.SSLSocket):
    """An accepted connection. `MutualTLSServer` keeps its books under its lock."""

    phase = Phase.HANDSHAKE
    deadline = 0.0              # on the clock of time.monotonic()
    given_up = False            # woken from its waiting by the server
    common_name: str | None = None


class MutualTLSServer(http.server.ThreadingHTTPServer):
    """Accepts, keeps the deadlines, and makes room when the house is full.

    Sockets block without a timeout; `service_actions` wakes those whose deadline has passed by
    shutting down the socket under them. This is one mechanism for all waiting, and it bounds the
    whole of a phase, where a socket's timeout would start anew with every byte.
    """

    request_queue_size = 1024                    # of connections to accept; the default 5 drops some under load
    allow_reuse_address = sys.platform != "win32"   # there it would let two servers share the port
    allow_reuse_port = False                     # a second server must fail, not take half of the clients
    timeout = SWEEP_SECONDS                      # of handle_request: how long it waits for a connection
    idle_thread_seconds = 0.5

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, allowed_cns: Iterable[str]) -> None:
        self.context = context
        self.allowed_cns = frozenset(allowed_cns)
        self.store = TodoStore()
        self.max_connections = connection_limit()
        self.connections: set[Connection] = set()
        self.changed = threading.Condition()     # guards the connections and their phases
        self.stopping = False
        self.next_sweep = 0.0
        self.work: queue.SimpleQueue[tuple[Connection, Any]] = queue.SimpleQueue()
        self.idle_threads = threading.Semaphore(0)
        super().__init__(address, TodoHandler)

    def server_bind(self) -> None:
        """Set the listener's options and bind, without HTTPServer's look-up of the host's name in DNS."""
        if sys.platform == "win32":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        # Connections inherit this: a long body's last piece must not wait for an ACK (40 ms).
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.socket.getsockname()[1]

    # Accepting

    def get_request(self) -> tuple[Connection, Any]:
        """Accept, if there is room. The handshake comes later: here it would block everyone."""
        with self.changed:
            if len(self.connections) >= self.max_connections:
                self.make_room()
            if len(self.connections) >= self.max_connections:
                raise BlockingIOError("no room: the newcomer stays in the listen queue")
        try:
            plain, address = self.socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):   # out of descriptors: to try again at
                self.make_room()                              # once would be a busy loop
            raise
        try:
            plain.getpeername()   # fails if the peer has left already; wrap_socket would fail less neatly
            connection = self.context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        except OSError as error:
            plain.close()
            log(f"REJECTED | peer={address[0]} | {in_words(error)}", patient=False)   # others want to come in
            raise
        assert isinstance(connection, Connection)
        self.enter(connection, Phase.HANDSHAKE)
        with self.changed:
            self.connections.add(connection)
        return connection, address

    def make_room(self) -> None:
        """Let the one go that is worth least, and wait until a connection has left, 0.1 s at most.

        An idle one that has something to read is about to begin a request, or to leave: no victim.
        """
        with self.changed:
            idle = [one for one in self.connections if one.phase is Phase.IDLE]
            busy: set[Connection] = set()
            with contextlib.suppress(OSError, ValueError):   # what select cannot take is not spared
                busy = set(select.select(idle, [], [], 0)[0])
            if busy and self.changed.wait(0.01) and len(self.connections) < self.max_connections:
                return
            waiting = [one for one in self.connections
                       if one.phase <= Phase.IDLE and not one.given_up and one not in busy]
            if waiting:
                self.give_up(min(waiting, key=lambda one: (one.phase, one.deadline)))
            self.changed.wait(0.1)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the connection to an idle thread, or to a new one if there is none.

        Threads are used again, because starting one costs a tenth of a connection.
        """
        if not self.idle_threads.acquire(blocking=False):
            try:
                threading.Thread(target=self.serve_connections, daemon=True).start()
            except RuntimeError as error:
                log(f"ERROR: {error}; connection dropped", patient=False)
                self.close_request(request)
                return
        self.work.put((request, client_address))

    def serve_connections(self) -> None:
        """A thread's life: serve one connection after another, and end after a while without."""
        while True:
            try:
                job = self.work.get(timeout=self.idle_thread_seconds)
            except queue.Empty:
                if self.idle_threads.acquire(blocking=False):
                    return
                job = self.work.get()   # we have just been counted on: a connection is coming
            self.process_request_thread(*job)
            del job   # an idle thread must not keep the connection alive
            self.idle_threads.release()

    # One connection, in its own thread: finish_request, then shutdown_request

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The handshake, then the requests. A failed handshake is logged with its reason."""
        try:
            request.do_handshake()
            if hasattr(socket, "TCP_QUICKACK"):
                # Without tickets we send nothing now, so the kernel would delay its ACK by 40 ms,
                # and a client with Nagle's algorithm holds its first request back for that ACK.
                request.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            request.common_name = common_name(request.getpeercert())
        except (OSError, ValueError) as error:
            reason = in_words(error)
            if request.given_up:
                reason = f"no complete handshake within {DEADLINES[Phase.HANDSHAKE]:.0f} s, or while others waited"
            log(f"REJECTED | peer={client_address[0]} | {reason}")
            return
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close so that the peer can read what it was told last, alert or response.

        Closing at once would make the kernel answer anything the peer still sends with a reset,
        and a reset can destroy what the peer has not read yet. So: end our direction, read on.
        """
        with contextlib.suppress(OSError, ValueError):
            failed = request.phase is Phase.HANDSHAKE
            self.enter(request, Phase.CLOSING)
            if not failed:
                request.settimeout(0)   # send close_notify, but do not wait for the peer's
                with contextlib.suppress(OSError):
                    request.unwrap()
                request.settimeout(None)
            request.shutdown(socket.SHUT_WR)   # also drops the TLS layer: from here on plain bytes
            left = MAX_DRAIN
            while left > 0 and (received := len(request.recv(64 * 1024))):
                left -= received
        self.close_request(request)

    def close_request(self, request: Any) -> None:
        """Close the socket and make its place free."""
        with contextlib.suppress(OSError):
            request.close()
        with self.changed:
            self.connections.discard(request)
            self.changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that vanishes in the middle is no news; anything else is ours: one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            log(f"ERROR | peer={client_address[0]} | {error!r}")

    # Deadlines

    def enter(self, connection: Connection, phase: Phase) -> bool:
        """Begin a phase and its deadline. False if it was given up just before, or we stop."""
        with self.changed:
            wanted = not connection.given_up and not (self.stopping and phase is Phase.IDLE)
            connection.phase = phase
            connection.deadline = time.monotonic() + DEADLINES[phase]
            connection.given_up = False
        return wanted

    def give_up(self, connection: Connection) -> None:
        """Wake the thread that waits on this connection. It finds an end of the input.

        Only the input: a late request still gets its 408, an idle peer its close_notify. If that
        has not helped after a while, or where no answer is due, both directions.
        """
        only_input = connection.phase in (Phase.IDLE, Phase.REQUEST) and not connection.given_up
        connection.given_up = True
        connection.deadline = time.monotonic() + DEADLINES[Phase.CLOSING]
        with contextlib.suppress(OSError):
            # Not SSLSocket's method: that drops the TLS layer under the other thread's feet.
            socket.socket.shutdown(connection, socket.SHUT_RD if only_input else socket.SHUT_RDWR)

    def service_actions(self) -> None:
        """Called between connections: a sweep through the deadlines, if it is time for one."""
        now = time.monotonic()
        if now >= self.next_sweep:
            self.next_sweep = now + SWEEP_SECONDS
            with self.changed:
                for connection in self.connections:
                    if now >= connection.deadline:
                        self.give_up(connection)

    def stop(self) -> None:
        """Accept no more, and let running requests finish for a while; the process then ends the rest."""
        self.server_close()
        deadline = time.monotonic() + STOP_SECONDS
        with self.changed:
            self.stopping = True
            for connection in self.connections:
                if connection.phase <= Phase.IDLE:
                    self.give_up(connection)
            while self.connections and time.monotonic() < deadline:
                self.changed.wait(SWEEP_SECONDS)
                self.service_actions()


def connection_limit() -> int:
    """MAX_CONNECTIONS, or as many as the descriptors (``ulimit -n``) allow with some to spare."""
    if sys.platform == "win32":
        return MAX_CONNECTIONS
    import resource  # Unix only

    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, descriptors - 32))


# --- HTTP ----------------------------------------------------------------------------------

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                                # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9])\.([0-9])\r?\n")   # RFC 9112 section 3
HEADER_LINE = re.compile(rb"(" + TOKEN + rb"):([\t -~\x80-\xff]*)\r?\n")               # RFC 9112 section 5
TARGET = re.compile(r"(https?://[^][/?#]+)?/todo(\?.*)?")   # RFC 9112 section 3.2: an absolute URL is fine, too


class TodoHandler(http.server.BaseHTTPRequestHandler):
    """The requests of one connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1                    # buffer, so that head and body leave in one write
    server: MutualTLSServer
    connection: Connection
    rfile: BufferedReader
    raw_requestline: bytes
    outcome: tuple[str, ...]         # lines for the log: what came of the request
    keep_alive: bool                 # what the client wants

    def version_string(self) -> str:
        """The Server header: our name, not Python's version, which helps only attackers."""
        return "mTLS-Lab"

    def handle_one_request(self) -> None:
        """Wait for a request's first byte, then let the base class read and dispatch it."""
        self.requestline, self.command, self.request_version, self.outcome = "", "", "HTTP/1.1", ()
        self.close_connection = True
        if not self.server.enter(self.connection, Phase.IDLE):
            return
        first = self.rfile.peek(1)[:1]
        if not first or not self.server.enter(self.connection, Phase.REQUEST):
            return
        if first == b"\x16":   # a TLS record: no line end may ever come
            self.send_error(HTTPStatus.BAD_REQUEST, "request: is TLS inside TLS")
            return
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Read the request line and the headers strictly; False after an error was sent.

        Replaces the base class's e-mail parser, which lets lines without a colon and bare CRs
        pass: where two readers see different headers, a body can become a second request
        (request smuggling, RFC 9112 section 11.2).
        """
        if self.raw_requestline in (b"\r\n", b"\n"):   # RFC 9112 section 2.2: ignore one empty line
            self.raw_requestline = self.rfile.readline(MAX_LINE + 1)
        text = self.raw_requestline.decode("latin-1").rstrip("\r\n")
        self.requestline = text.encode("unicode_escape").decode()   # it is for the log; see there
        match = REQUEST_LINE.fullmatch(self.raw_requestline)
        if not match:
            return self.refuse_line(self.raw_requestline, "request line: must be METHOD TARGET HTTP/1.1")
        if match[3] != b"1":
            status = HTTPStatus.BAD_REQUEST if match[3] == b"0" else HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            self.send_error(status, "HTTP version: must be 1.0 or 1.1")
            return False
        self.command, self.path = match[1].decode(), match[2].decode()
        self.request_version = "HTTP/1.0" if match[4] == b"0" else "HTTP/1.1"

        self.headers = self.MessageClass()
        left = 2 * MAX_LINE   # for all together: 256 connections with 100 long lines each would be 1.6 GB
        while (line := self.rfile.readline(MAX_LINE + 1)) not in (b"\r\n", b"\n"):
            left -= len(line)
            if len(line) > MAX_LINE or left < 0 or len(self.headers) >= MAX_HEADERS:
                self.send_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers: too long or too many")
                return False
            match = HEADER_LINE.fullmatch(line)
            if not match:
                return self.refuse_line(line, "header line: must be NAME: VALUE")
            self.headers[match[1].decode()] = match[2].decode("latin-1").strip(" \t")

        hosts = len(self.headers.get_all("Host", []))
        if hosts > 1 or (hosts == 0 and self.request_version == "HTTP/1.1"):   # RFC 9112 section 3.2
            self.send_error(HTTPStatus.BAD_REQUEST, "Host header: must be there once")
            return False
        options = {option.strip().lower() for option in ",".join(self.headers.get_all("Connection", [])).split(",")}
        self.keep_alive = "close" not in options and (
            self.request_version == "HTTP/1.1" or "keep-alive" in options)
        # Unless we read it, a body must not be taken for the next request: close after the answer.
        lengths = self.headers.get_all("Content-Length", [])
        has_body = "Transfer-Encoding" in self.headers or any(length != "0" for length in lengths)
        self.close_connection = has_body or not self.keep_alive
        return True

    def do_GET(self) -> None:
        """Judge any request in this order: who asks, for what, how; then serve it."""
        # The handshake proved who the client is (authentication). Whether this client may come
        # in is our decision (authorization): our CA may have certified others, too.
        name = self.connection.common_name
        if name is None or name not in self.server.allowed_cns:
            self.outcome = (f"FORBIDDEN | CN={name!r} | not in the allowed list",)
            return self.refuse(HTTPStatus.FORBIDDEN, f"client certificate: CN {name!r} is not in the allowed list")
        if not TARGET.fullmatch(self.path):
            return self.refuse(HTTPStatus.NOT_FOUND, "path: only /todo is here")
        if self.command not in ("GET", "HEAD", "POST"):
            return self.refuse(HTTPStatus.METHOD_NOT_ALLOWED, "method: must be GET, HEAD or POST",
                               Allow="GET, HEAD, POST")
        # Unless the headers leave no doubt where the body ends (RFC 9112 section 6.3), refuse and close.
        lengths = {one.strip(" \t") for line in self.headers.get_all("Content-Length", []) for one in line.split(",")}
        plain = all(one.isascii() and one.isdigit() for one in lengths)
        if len(lengths) > 1 or not plain or (lengths and "Transfer-Encoding" in self.headers):
            return self.send_error(HTTPStatus.BAD_REQUEST,
                                   "Content-Length: must be one plain number, without Transfer-Encoding")
        if self.command == "POST":
            return self.create_todo(name, lengths.pop() if lengths else None)
        self.outcome = (f"AUTHENTICATED | CN={name!r} | serving /todo",)
        return self.respond(HTTPStatus.OK, self.server.store.encoded(name))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = do_GET

    def create_todo(self, name: str, digits: str | None) -> None:
        """POST /todo by the client ``name``, with a Content-Length of ``digits`` bytes (None: without)."""
        if digits is None:
            return self.send_error(HTTPStatus.LENGTH_REQUIRED, "Content-Length: must be given")
        length = int(digits) if len(digits) < 20 else MAX_BODY + 1   # Python refuses to convert huge numbers
        if length > MAX_BODY:
            return self.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: must have at most {MAX_BODY:,} bytes")
        # Any web page can make a browser that holds our PFX send a form, but not JSON.
        if self.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
            return self.refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "header: must be Content-Type: application/json")
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version == "HTTP/1.1":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
            self.wfile.flush()
        body = self.rfile.read(length)
        if len(body) < length:
            return self.refuse_incomplete()
        self.close_connection = not self.keep_alive
        try:
            task, done = parse_todo(body)
        except ValueError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        item = self.server.store.add(task, done)
        if item is None:
            return self.refuse(HTTPStatus.INSUFFICIENT_STORAGE,
                               f"list: is full with {MAX_ITEMS:,} items; restart the server to empty it")
        self.outcome = (f"AUTHENTICATED | CN={name!r} | creating TODO", f"TODO CREATED | CN={name!r} | item={item!r}")
        return self.respond(HTTPStatus.CREATED, {"client": name, "message": "TODO item created", "todo": item})

    # Answers

    def respond(self, status: int, content: object, **headers: str) -> None:
        """Send one answer: ``content`` as JSON (bytes: JSON already), which HEAD only measures."""
        body = content if isinstance(content, bytes) else encode(content)
        self.server.enter(self.connection, Phase.RESPONSE)
        if self.server.stopping:
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")   # this old client asked for it, and waits to hear
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def refuse(self, status: int, rule: str, **headers: str) -> None:
        """Send an error that names the rule; the connection may live on."""
        self.respond(status, {"error": rule}, **headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The same for the base class and for broken requests: where the next one begins is unclear, so close."""
        self.close_connection = True
        self.refuse(code, message or HTTPStatus(code).phrase)

    def refuse_line(self, line: bytes, rule: str) -> bool:
        """Refuse a line that breaks the rule, or did not come to its end; always False."""
        if line.endswith(b"\n"):
            self.send_error(HTTPStatus.BAD_REQUEST, rule)
        else:
            self.refuse_incomplete()
        return False

    def refuse_incomplete(self) -> None:
        """Refuse a request that broke off: its time was up, or the peer had ended it."""
        if self.connection.given_up:
            self.send_error(HTTPStatus.REQUEST_TIMEOUT,
                            f"request: must be complete within {DEADLINES[Phase.REQUEST]:.0f} s")
        else:
            self.send_error(HTTPStatus.BAD_REQUEST, "request: ended before it was complete")

    def log_message(self, format: str, *args: object) -> None:
        """One REQUEST line, and what came of the request, in a single write."""
        log(f"REQUEST | peer={self.client_address[0]} | cert-CN={self.connection.common_name!r} | {format % args}",
            *self.outcome)

    def finish(self) -> None:
        """Close both files, also when the peer is gone and the last flush fails."""
        with contextlib.suppress(OSError):
            super().finish()
        self.rfile.close()


# --- Start and end -------------------------------------------------------------------------

def port_number(text: str) -> int:
    """A TCP port as argparse's type; 0 stands for any free one."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")
    return int(text)


def non_empty(text: str) -> str:
    """A host or common name as argparse's type."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def parse_arguments() -> argparse.Namespace:
    """Flags, with defaults from the environment. Exits with 2 on what makes no sense."""
    parser = argparse.ArgumentParser(description="The lab's mutual TLS server: GET /todo and POST /todo.")
    parser.add_argument("--host", type=non_empty, default=os.environ.get("MTLS_SERVER_HOST") or "127.0.0.1",
                        help="address to listen on (MTLS_SERVER_HOST; default 127.0.0.1)")
    parser.add_argument("--port", type=port_number, default=os.environ.get("MTLS_SERVER_PORT") or "8443",
                        help="port to listen on, 0 for any free one (MTLS_SERVER_PORT; default 8443)")
    parser.add_argument("--allow-cn", type=non_empty, nargs="+", metavar="CN", action="extend",
                        help="common names that may use the server (MTLS_ALLOWED_CNS, separated by commas; "
                             "default mtls-client)")
    arguments = parser.parse_args()
    if not arguments.allow_cn:
        names = os.environ.get("MTLS_ALLOWED_CNS") or "mtls-client"
        arguments.allow_cn = [name.strip() for name in names.split(",")]
        if not all(arguments.allow_cn):
            parser.error(f"MTLS_ALLOWED_CNS has an empty name: {names!r}")
    return arguments


def main() -> None:
    """Start, serve until Ctrl+C or SIGTERM, stop."""
    arguments = parse_arguments()
    context = tls_context(CERTS)
    try:
        server = MutualTLSServer((arguments.host, arguments.port), context, arguments.allow_cn)
    except (OSError, UnicodeError) as error:
        problem = f"cannot listen on {arguments.host}:{arguments.port} ({in_words(error)})"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            fail(f"{problem}; stop the program that uses this port, or choose another with --port")
        fail(f"{problem}; choose an address of this machine with --host and a port you may use with --port")

    def stop(*_: object) -> None:
        server.stopping = True   # no more than this: a handler may interrupt anything, also a lock's owner

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    say(f"[SERVER] mTLS server listening on https://{arguments.host}:{server.server_port}\n"
        "[SERVER] Requiring client cert signed by: ca.crt\n"
        "[SERVER] Press Ctrl+C to stop.")
    while not server.stopping:
        server.handle_request()
        server.service_actions()
    server.stop()
    say("[SERVER] Stopped.")
    os._exit(0)   # a plain return would wait for a thread that is stuck in a log that nobody reads


if __name__ == "__main__":
    main()
