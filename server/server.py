#!/usr/bin/env python3
"""The lab's mutual TLS server: GET /todo and POST /todo, for clients with a certificate of our CA.

Read it from top to bottom: what makes TLS mutual, who may use the server, what a request goes
through, the list of items, settings, start and stop. The modules below it know nothing about TODO
items: event_loop.py and connections.py (TLS connections), strict_http.py (requests),
certificates.py (the server's own), log.py, problems.py (error messages).
"""

import signal

if __name__ == "__main__":   # Ctrl+C ends the program without a traceback, even during the imports; main() changes that
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import errno
import functools
import os
import re
import shlex
import ssl
import sys
import textwrap
import threading
import time
import traceback
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

if sys.version_info < (3, 10):   # noqa: UP036   # checked first: the imports below need it
    sys.exit(f"server.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")

from certificates import Certificates
from connections import Connection
from event_loop import STOP_SECONDS, EventLoopServer
from log import MAX_QUOTED, Log, quoted
from problems import Unusable, in_words
from strict_http import Refusal, StrictHandler, encode

CERTS = Path(__file__).resolve().parent.parent / "certs"   # wherever you start it from

MAX_BODY = 64 * 1024   # bytes of a request's body
MAX_TASK = 1000        # characters
MAX_ITEMS = 1000       # on the list
MAX_BLOCK = 16 * 1024  # bytes of the encoded list that a new item replaces
MAX_SESSIONS = 100     # of TLS 1.2 that OpenSSL keeps


# --- TLS: what makes it mutual -------------------------------------------------------------

def tls_context(certs: Path) -> ssl.SSLContext:
    """The server's side of mutual TLS, with ca.crt, server.crt and server.key from ``certs``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # ① Require a client certificate: this is the "mutual" in mTLS. A client without one, or
    #    with one that does not verify, is refused in the handshake and never reaches HTTP.
    context.verify_mode = ssl.CERT_REQUIRED
    # ② Trust only our CA. With the system's trust store, any public CA could admit a client.
    context.load_verify_locations(cafile=certs / "ca.crt")
    # ③ Our own certificate and key. The empty password makes an encrypted key an error: without
    #    it, OpenSSL would stop and ask for the password on the terminal.
    context.load_cert_chain(certs / "server.crt", certs / "server.key", password="")
    # ④ TLS 1.2 at least: 1.0 and 1.1 rest on MD5 and SHA-1 (deprecated by RFC 8996).
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # For TLS 1.2, only suites with forward secrecy and authenticated encryption: Python's default
    # still includes CBC suites (padding oracles). TLS 1.3 has only such suites anyway.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # Python's default stays: the server's order of preference decides. By the client's order, OpenSSL would
    # compare its whole list of signature algorithms with itself: 0.6 s of CPU for a ClientHello of 60 KB.
    # Only cheap key exchange groups: anyone can send a ClientHello, and with the largest group
    # (ffdhe8192) each would cost 0.2 s of CPU. P-256 is the one that every client supports.
    if hasattr(context, "set_groups"):   # Python 3.15
        known = context.get_groups()   # type: ignore[attr-defined]
        good = ("X25519MLKEM768", "x25519", "secp256r1")   # the first needs OpenSSL 3.5+
        context.set_groups(":".join(group for group in good if group in known))
    else:
        context.set_ecdh_curve("prime256v1")   # despite its name, it disables all other groups
    # The only protocol we speak. A client that offers others (h2) learns this in the handshake.
    context.set_alpn_protocols(["http/1.1"])
    # A TLS 1.2 client must not be able to repeat the costly handshake within a connection.
    context.options |= ssl.OP_NO_RENEGOTIATION
    # No TLS 1.3 tickets: every new connection proves again that the client has its key. (TLS 1.2
    # can still resume. Every request is authorized anyway, resumed or not.)
    context.num_tickets = 0
    # A peer that leaves without close_notify is no error for OpenSSL 3, just the end of the
    # connection: HTTP states lengths, so truncation is noticed. (Python 3.10+ with OpenSSL 3+.)
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


# --- Who may use the server ----------------------------------------------------------------

class Client(NamedTuple):
    """Who the client has proved to be, and how long that counts."""

    name: str | None   # its common name
    expires: float     # when its certificate expires, in seconds since 1970


class TodoServer(EventLoopServer):
    """Decides who may use it, and holds what all connections share."""

    def __init__(self, address: tuple[str, int], certificates: Certificates, allowed_cns: list[str]) -> None:
        self.certificates = certificates
        self.allowed_cns = allowed_cns
        self.store = TodoStore()
        self.log = Log()
        self.next_look = 0.0
        super().__init__(address, TodoHandler, certificates.context)

    def authenticated(self, connection: Connection) -> None:
        """The handshake is over: our CA has signed this client's certificate, and the client has the key."""
        connection.client = Client(*identity(connection))

    def is_authorized(self, connection: Connection) -> bool:
        """Authorization: the handshake proved who the client is, but not all clients of our CA may use this server."""
        client: Client = connection.client
        return client.name in self.allowed_cns

    def has_expired(self, connection: Connection) -> bool:
        """TLS checks the dates only in a full handshake: not when it resumes a session, and not later."""
        client: Client = connection.client
        return client.expires < time.time()

    def keeps_alive(self, connection: Connection) -> bool:
        """A client must prove again who it is if its certificate has expired, or if the CA may be a new one."""
        current = connection.tls.context is self.context
        return current and not self.has_expired(connection) and super().keeps_alive(connection)

    def service_actions(self) -> None:
        """Once a second, look for new certificates, and use them for new connections."""
        if time.monotonic() >= self.next_look:
            self.next_look = time.monotonic() + 1.0
            line = self.certificates.look()
            if line:
                self.log.write(line)
            # OpenSSL keeps the sessions of TLS 1.2 clients that take no ticket: up to 20,480 for two hours, each with
            # all certificates that the client sent. Python cannot limit that, but a new context starts without any.
            if self.context.session_stats()["number"] > MAX_SESSIONS:
                with contextlib.suppress(Unusable):
                    self.certificates.take_up()
            self.context = self.certificates.context

    def refused(self, client_address: Any, reason: Exception) -> None:
        """Log whose handshake failed, and why."""
        self.log.write(f"REJECTED | peer={client_address[0]} | {in_words(reason)}")

    def still_running(self) -> None:
        """Say why the server does not stop at once. Not on the event loop: a terminal may hold back its output."""
        text = f"Waiting for running requests, {STOP_SECONDS:.0f} s at most; Ctrl+C again ends at once."
        with contextlib.suppress(RuntimeError):   # no more threads may be started
            threading.Thread(target=say, args=[text], daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a bug of ours, and where it is: nothing that a peer does should lead here."""
        error = sys.exc_info()[1]
        place = traceback.extract_tb(error.__traceback__)[-1] if error else None
        where = f" at {Path(place.filename).name}:{place.lineno}" if place else ""
        self.log.write(f"ERROR | peer={client_address[0]} | {error!r}{where}")


seconds_since_1970 = functools.lru_cache(ssl.cert_time_to_seconds)   # slow, and the same few dates recur


def identity(connection: Connection) -> tuple[str | None, float]:
    """The CN in the client's certificate, and when that expires.

    The CN is None unless there is exactly one: if there are two, some programs read the first, some the last.
    """
    try:
        certificate = connection.getpeercert()
        names = [value for rdn in certificate["subject"] for key, value in rdn if key == "commonName"]
        return names[0] if len(names) == 1 else None, seconds_since_1970(certificate["notAfter"])
    except (OSError, ValueError):   # verified, but Python cannot decode its names
        return None, 0.0


# --- What a request goes through -----------------------------------------------------------

class TodoHandler(StrictHandler):
    """Handles the requests of one connection, which strict_http has parsed and found valid."""

    server: TodoServer
    connection: Connection           # its ``client`` is set by TodoServer.authenticated
    outcome: tuple[str, ...] = ()    # log lines: the result of the request

    def judge(self) -> None:
        """Check a request before its body is read: who asks, for what, and how. Raises Refusal."""
        if not self.server.is_authorized(self.connection):
            raise self.unauthorized()
        if self.server.has_expired(self.connection):
            raise self.expired()
        if self.path != "/todo":
            raise Refusal(HTTPStatus.NOT_FOUND, "path: only /todo exists")
        if self.command in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method: must be GET, HEAD or POST", Allow="GET, HEAD, POST")
        if self.command not in ("GET", "HEAD", "POST"):
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "method: is unknown")
        self.body_length()   # refuses what could hide a second request, even where no body is expected
        if self.command == "POST":
            # Any web page can make a browser that holds our PFX send a form, but not JSON.
            types = [value.partition(";")[0].strip(" \t").lower() for value in self.fields.get("content-type", [])]
            if types != ["application/json"]:
                raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "header: must be Content-Type: application/json")
            self.accept_body(MAX_BODY)

    def do_GET(self) -> None:
        """GET /todo: the client's CN and the list."""
        name = self.connection.client.name
        self.outcome = (f"AUTHENTICATED | CN={name!r} | serving /todo",)
        self.respond(HTTPStatus.OK, *self.server.store.listing(name))

    do_HEAD = do_GET   # `respond` leaves out the body

    def do_POST(self) -> None:
        """POST /todo: add an item, and return it."""
        name = self.connection.client.name
        task, done = checked_todo(self.json_object())
        item = self.server.store.add(task, done)
        self.outcome = (f"AUTHENTICATED | CN={name!r} | creating TODO", f"TODO CREATED | CN={name!r} | item={item!r}")
        self.respond(HTTPStatus.CREATED, encode({"client": name, "message": "TODO item created", "todo": item}))

    def unauthorized(self) -> Refusal:
        """The 403 for a client that is not on the list. The log says how to add it."""
        name = self.connection.client.name
        admit = ""
        if name and len(name) <= MAX_QUOTED and name.isprintable() and "," not in name:   # it can be typed
            # Quoted for a shell: whoever pastes this must not run what a client has put into its name.
            admit = f"; to admit: --allow-cn {shlex.join([*self.server.allowed_cns, name])}"
        self.outcome = (f"FORBIDDEN | CN={quoted(name)} | not in the allowed list{admit}",)
        return Refusal(HTTPStatus.FORBIDDEN, f"client certificate: CN {quoted(name)} is not in the allowed list")

    def expired(self) -> Refusal:
        """The 403 for a client whose certificate has expired since its handshake."""
        self.outcome = (f"FORBIDDEN | CN={quoted(self.connection.client.name)} | its certificate has expired",)
        return Refusal(HTTPStatus.FORBIDDEN, "client certificate: has expired")

    def log_message(self, format: str, *args: object) -> None:   # noqa: A002   # http.server's name for it
        """Log one REQUEST line, and the result of the request."""
        name = quoted(self.connection.client.name)
        request = f"REQUEST | peer={self.client_address[0]} | cert-CN={name} | {format % args}"
        self.server.log.write(request, *self.outcome)
        self.outcome = ()


def checked_todo(item: dict[str, object]) -> tuple[str, bool]:
    """The task and the done flag from a POST's JSON object. Raises Refusal, which names the field and the rule."""
    task, done = item.get("task"), item.get("done", False)
    if not isinstance(task, str) or not task.strip():
        raise Refusal(HTTPStatus.BAD_REQUEST, "task: must be a non-empty string")
    if len(task) > MAX_TASK:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"task: must have at most {MAX_TASK:,} characters")
    if any("\ud800" <= character <= "\udfff" for character in task):
        raise Refusal(HTTPStatus.BAD_REQUEST, "task: must be valid Unicode (it has a lone surrogate)")
    if not isinstance(done, bool):
        raise Refusal(HTTPStatus.BAD_REQUEST, "done: must be true or false")
    return task, done


# --- The list ------------------------------------------------------------------------------

class TodoStore:
    """The items, in memory: gone when the server stops."""

    def __init__(self) -> None:
        self.number = 0
        # The items as they appear in a listing. A new item changes only the last block: listings that are still
        # being sent share all others, however many clients are slow to read theirs.
        self.blocks = [b""]
        for task in ("Set up local CA", "Issue server certificate", "Issue client certificate",
                     "Configure mTLS server"):
            self.add(task, True)
        self.add("Validate mutual auth", False)

    def add(self, task: str, done: bool) -> dict[str, object]:
        """Append an item and return it. Raises Refusal if the list is full."""
        if self.number >= MAX_ITEMS:
            raise Refusal(HTTPStatus.INSUFFICIENT_STORAGE,
                          f"list: is full with {MAX_ITEMS:,} items; restart the server to empty it")
        self.number += 1
        item: dict[str, object] = {"id": self.number, "task": task, "done": done}
        text = textwrap.indent(encode(item).decode().rstrip("\n"), "    ")
        if len(self.blocks[-1]) > MAX_BLOCK:
            self.blocks.append(b"")
        self.blocks[-1] += (",\n" * (self.number > 1) + text).encode()
        return item

    def listing(self, client: str | None) -> list[bytes]:
        """The answer's body for ``client``, in pieces: all but the first are the same for all clients."""
        return [listing_head(client), *self.blocks, b"\n  ]\n}\n"]


@functools.lru_cache
def listing_head(client: str | None) -> bytes:
    """What precedes the items in an answer to ``client``."""
    return encode({"client": client}).removesuffix(b"\n}\n") + b',\n  "todos": [\n'


# --- Settings ------------------------------------------------------------------------------

def port_number(text: str) -> int:
    """Argparse's type for a TCP port; 0 means any free one."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """Flags override variables, variables override defaults. Exits with 2 on invalid values."""
    parser = argparse.ArgumentParser(description="The lab's mutual TLS server: GET /todo and POST /todo.")
    parser.add_argument("--host", default=os.environ.get("MTLS_SERVER_HOST") or "127.0.0.1",
                        help="address to listen on (MTLS_SERVER_HOST; default 127.0.0.1)")
    parser.add_argument("--port", type=port_number,
                        help="port to listen on, 0 for any free one (MTLS_SERVER_PORT; default 8443)")
    parser.add_argument("--allow-cn", nargs="+", metavar="CN", action="extend",
                        help="common names that may use the server (MTLS_ALLOWED_CNS, separated by commas; "
                             "default mtls-client)")
    arguments = parser.parse_args()
    if not arguments.host.strip():
        parser.error("argument --host: must not be empty")
    if arguments.port is None:
        try:
            arguments.port = port_number(os.environ.get("MTLS_SERVER_PORT") or "8443")
        except argparse.ArgumentTypeError as error:
            parser.error(f"MTLS_SERVER_PORT: {error}")
    words = [word.removesuffix(",") for word in arguments.allow_cn or []]   # as in "one, two"
    where, names = "argument --allow-cn", ",".join(words).split(",")
    if arguments.allow_cn is None:   # in the variable, spaces separate names, too
        where, names = "MTLS_ALLOWED_CNS", re.split(r"[\s,]+", os.environ.get("MTLS_ALLOWED_CNS") or "mtls-client")
    arguments.allow_cn = [name.strip(" ") for name in names]
    if not all(name.strip() for name in names):
        parser.error(f"{where}: has an empty name")
    return arguments


# --- Start and stop ------------------------------------------------------------------------

def say(text: str) -> None:
    """Print a line to stdout at once, if it still has a reader (``| head`` exits early)."""
    with contextlib.suppress(OSError):
        print(f"[SERVER] {text}", flush=True)


def start(host: str, port: int, allowed_cns: list[str]) -> TodoServer:
    """Create the server, ready to accept. On failure, exits with one line that says what is wrong and what to do."""
    try:
        certificates = Certificates(CERTS, tls_context)
    except Unusable as error:
        sys.exit(f"[SERVER] ERROR: {error}")
    if certificates.warning:
        print(f"[SERVER] WARNING: {certificates.warning}", file=sys.stderr)
    try:
        return TodoServer((host, port), certificates, allowed_cns)
    except (OSError, UnicodeError) as error:
        problem = in_words(error)
        advice = "use --host with an address of this machine, and --port with a port that you may use"
        code = getattr(error, "errno", None)
        if code == errno.EADDRINUSE:
            problem = "address already in use"   # Windows says it in more words
            other = "$env:MTLS_SERVER_PORT = 8444" if os.name == "nt" else "export MTLS_SERVER_PORT=8444"
            advice = f"stop the program that uses this port, or use another one, in both terminals: {other}"
        elif code == errno.EMFILE:
            advice = "allow it more: ulimit -n 1024"
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        sys.exit(f"[SERVER] ERROR: cannot listen on {where} ({problem}); {advice}")


def main() -> None:
    """Start, serve until Ctrl+C or SIGTERM, stop."""
    arguments = parse_arguments()
    server = start(arguments.host, arguments.port, arguments.allow_cn)

    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        if number == signal.SIGINT and signals:   # Ctrl+C again
            os._exit(1)
        if not signals:
            with contextlib.suppress(RuntimeError):   # the system gives no more threads
                threading.Timer(STOP_SECONDS + 2, os._exit, [0]).start()   # in case nobody reads what we print
        signals.append(number)
        server.shutdown()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    port = server.server_address[1]
    say(f"mTLS server listening on https://{host}:{port}")
    say("Requiring client cert signed by: ca.crt")
    if arguments.host in ("0.0.0.0", "::"):   # noqa: S104   # no client can connect to these
        say(f"On this machine, clients connect to: https://127.0.0.1:{port}")
    say("Press Ctrl+C to stop.")
    server.serve_forever()
    server.log.close()
    say("Stopped.")
    os._exit(0)   # a plain return would wait for the timer, and for a log that nobody reads


if __name__ == "__main__":
    main()
