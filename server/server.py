#!/usr/bin/env python3
"""The lab's mutual TLS server: GET /todo and POST /todo, for clients with a certificate of our CA.

Read it from top to bottom: what makes it mutual, who may come in, what a request goes through,
the log, start and stop, and last the list of items. It stands on two rooms of its own, which know
nothing of TODO: connections.py leads connections through the handshake, strict_http.py reads
requests.
"""

import argparse
import contextlib
import errno
import os
import queue
import re
import signal
import ssl
import sys
import tempfile
import threading
import time
from http import HTTPStatus
from pathlib import Path
from typing import Any

if sys.version_info < (3, 10):   # noqa: UP036   # said here, because older ones cannot read what follows
    sys.exit(f"server.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")

from connections import STOP_SECONDS, DoormanServer  # noqa: E402
from strict_http import Refusal, StrictHandler, encode  # noqa: E402

CERTS = Path(__file__).resolve().parent.parent / "certs"   # found from any current folder

MAX_BODY = 64 * 1024   # bytes of a request's body
MAX_TASK = 1000        # characters
MAX_ITEMS = 1000       # on the list
MAX_LOG = 1000         # entries that wait for somebody to read the log


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
    #    it, OpenSSL would stop and ask for a password that nobody is there to type.
    context.load_cert_chain(certs / "server.crt", certs / "server.key", password="")
    # ④ TLS 1.2 at least: 1.0 and 1.1 rest on MD5 and SHA-1 (deprecated by RFC 8996).
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # For TLS 1.2, only forward secrecy with authenticated encryption: Python's default still has
    # the CBC suites (padding oracles). TLS 1.3 has nothing else.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    # All those suites are good, so the client may choose: it knows which one is fast for it.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    # Key exchange on elliptic curves only: TLS 1.3 also has finite-field groups, of which the
    # largest costs 0.2 s of CPU for a stranger's hello. Before Python 3.15 they stay.
    if hasattr(context, "set_groups"):
        known = context.get_groups()   # type: ignore[attr-defined]
        good = ("X25519MLKEM768", "x25519", "secp256r1", "secp384r1")   # the first where OpenSSL has it (3.5+)
        context.set_groups(":".join(group for group in good if group in known))
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


def verify_own_certificate(context: ssl.SSLContext, certs: Path) -> None:
    """Verify it as a client will, in a handshake within memory. Raises SSLCertVerificationError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False   # any name will do here
    client.load_verify_locations(certs / "ca.crt")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs, ours = client.wrap_bio(to_client, to_server), context.wrap_bio(to_server, to_client, server_side=True)
    for side in (theirs, ours, theirs):
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()


def in_words(error: Exception) -> str:
    """What went wrong in OpenSSL's words, without its numbers and source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    text = str(getattr(error, "strerror", None) or error)
    return re.sub(r"\[\w+(: \w+)?\] | ?\(_ssl\.c:\d+\)", "", text).lower()


# --- Who may come in -----------------------------------------------------------------------

class TodoServer(DoormanServer):
    """Knows who may come in, and has what all connections share."""

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, allowed_cns: list[str]) -> None:
        self.allowed_cns = allowed_cns
        self.store = TodoStore()
        self.log = Log()
        super().__init__(address, TodoHandler, context)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Here the handshake is over: our CA has signed this client's certificate, and it has the key."""
        request.common_name = common_name(request)
        super().process_request(request, client_address)

    def is_welcome(self, guest: Any) -> bool:
        """Authorization: the handshake has proved who a client is, but our CA may have certified others, too."""
        return guest.common_name in self.allowed_cns

    def refused(self, client_address: Any, reason: Exception) -> None:
        """Log who has not come through the handshake, and why."""
        self.log.write(f"REJECTED | peer={client_address[0]} | {in_words(reason)}")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that vanishes in the middle is no news; anything else is ours (the doorman's, if without request)."""
        error = sys.exc_info()[1]
        if request is None or not isinstance(error, OSError):
            self.log.write(f"ERROR | peer={client_address[0]} | {error!r}")


def common_name(connection: ssl.SSLSocket) -> str | None:
    """The CN in the client's certificate; None unless there is exactly one: of two, readers take different ones."""
    try:
        certificate: Any = connection.getpeercert()
    except (OSError, ValueError):   # verified, but its names are in no known form
        return None
    names = [value for rdn in certificate["subject"] for key, value in rdn if key == "commonName"]
    return names[0] if len(names) == 1 else None


# --- What a request goes through -----------------------------------------------------------

class TodoHandler(StrictHandler):
    """The requests of one connection, which strict_http has read and found sound."""

    server: TodoServer
    connection: Any                  # a Guest, with the common_name that TodoServer has found
    outcome: tuple[str, ...] = ()    # lines for the log: what came of the request

    def answer(self) -> None:
        """Judge a request in this order: who asks, for what, how; then serve it."""
        name = self.connection.common_name
        if not self.server.is_welcome(self.connection):
            plain = re.compile(r"[\w.-]+")
            others = " ".join(one if plain.fullmatch(one) else repr(one) for one in self.server.allowed_cns)
            admit = "" if name is None else f"; to admit: --allow-cn {others} {name!r}"
            self.outcome = (f"FORBIDDEN | CN={name!r} | not in the allowed list{admit}",)
            raise Refusal(HTTPStatus.FORBIDDEN, f"client certificate: CN {name!r} is not in the allowed list")
        if self.path != "/todo":
            raise Refusal(HTTPStatus.NOT_FOUND, "path: only /todo is here")
        if self.command in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "method: must be GET, HEAD or POST", Allow="GET, HEAD, POST")
        if self.command not in ("GET", "HEAD", "POST"):
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "method: is unknown")
        self.body_length()   # refuses what could hide a second request, also where no body is wanted
        if self.command == "POST":
            return self.create_todo(name)
        self.outcome = (f"AUTHENTICATED | CN={name!r} | serving /todo",)
        return self.respond(HTTPStatus.OK, self.server.store.encoded(name))

    def create_todo(self, name: str) -> None:
        """POST /todo by the client ``name``."""
        # Any web page can make a browser that holds our PFX send a form, but not JSON.
        types = [value.partition(";")[0].strip().lower() for value in self.fields.get("content-type", [])]
        if types != ["application/json"]:
            raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "header: must be Content-Type: application/json")
        task, done = checked_todo(self.read_json(MAX_BODY))
        item = self.server.store.add(task, done)
        self.outcome = (f"AUTHENTICATED | CN={name!r} | creating TODO", f"TODO CREATED | CN={name!r} | item={item!r}")
        self.respond(HTTPStatus.CREATED, {"client": name, "message": "TODO item created", "todo": item})

    def log_message(self, format: str, *args: object) -> None:
        """One REQUEST line, and what came of the request."""
        request = f"REQUEST | peer={self.client_address[0]} | cert-CN={self.connection.common_name!r} | {format % args}"
        self.server.log.write(request, *self.outcome)
        self.outcome = ()


def checked_todo(item: dict[str, object]) -> tuple[str, bool]:
    """Task and done of a POST's object. Raises Refusal that names the field and the rule."""
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


# --- Log -----------------------------------------------------------------------------------

class Log:
    """The log on stderr, written by a thread of its own: nobody who is served waits for its reader.

    Entries are lines that belong together. Callers escape what a peer can choose (``repr`` or
    ``unicode_escape``): no request may forge a line or send control codes to the terminal.
    """

    def __init__(self) -> None:
        self.entries: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.counting = threading.Lock()
        self.dropped = 0
        self.closed = False
        self.writer = threading.Thread(target=self.write_all, daemon=True)
        self.writer.start()

    def write(self, *lines: str) -> None:
        """Add an entry; if too many wait already, only count it."""
        if self.entries.qsize() < MAX_LOG:
            self.entries.put("".join(f"[SERVER] {line}\n" for line in lines))
        else:
            with self.counting:
                self.dropped += 1

    def write_all(self) -> None:
        """The thread: write entries, and how many are missing once no more wait, until `close`."""
        while not self.closed or not self.entries.empty():
            text = self.entries.get() + "".join(self.entries.get() for _ in range(self.entries.qsize()))
            with contextlib.suppress(AttributeError, OSError, ValueError):   # a closed stderr stops no one
                sys.stderr.write(text)
                if self.dropped and self.entries.empty():
                    with self.counting:
                        number, self.dropped = self.dropped, 0
                    sys.stderr.write(f"[SERVER] LOG | {number} entries dropped: the log was not read fast enough\n")
                sys.stderr.flush()
            time.sleep(0.002)   # what comes meanwhile is one write: a wake-up for each is a third of a GET's CPU

    def close(self) -> None:
        """Write what still waits, if somebody reads it within a second."""
        self.closed = True
        self.entries.put("")
        self.writer.join(1.0)


def say(text: str) -> None:
    """Print a line to stdout at once, if it still has a reader (``| head`` leaves early)."""
    with contextlib.suppress(OSError):
        print(f"[SERVER] {text}", flush=True)


# --- Start and stop ------------------------------------------------------------------------

def port_number(text: str) -> int:
    """A TCP port as argparse's type; 0 stands for any free one."""
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    """Flags, else variables, else defaults. Exits with 2 on what makes no sense."""
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
    words = [word[:-1] if word.endswith(",") else word for word in arguments.allow_cn or []]   # as in "one, two"
    where, names = "argument --allow-cn", ",".join(words).split(",")
    if arguments.allow_cn is None:   # in the variable, spaces separate, too
        where, names = "MTLS_ALLOWED_CNS", re.split(r"[\s,]+", os.environ.get("MTLS_ALLOWED_CNS") or "mtls-client")
    arguments.allow_cn = [name.strip(" ") for name in names]
    if not all(name.strip() for name in names):
        parser.error(f"{where}: has an empty name")
    return arguments


def start(host: str, port: int, allowed_cns: list[str]) -> TodoServer:
    """The server, ready to accept. Exits with one line that says what is wrong and what to do."""
    try:
        for name in ("ca.crt", "server.crt", "server.key"):
            (CERTS / name).read_bytes()   # OpenSSL would not say which one it cannot read
        context = tls_context(CERTS)
        load_with_ca(context, CERTS)
        verify_own_certificate(context, CERTS)
    except PermissionError as error:
        sys.exit(f"[SERVER] ERROR: may not read {error.filename}; see whose it is: ls -l {CERTS}")
    except ssl.SSLError as error:
        if getattr(error, "verify_code", 0) not in (9, 10):   # not yet valid, expired
            sys.exit(f"[SERVER] ERROR: {CERTS}: ca.crt, server.crt and server.key do not fit or cannot be used "
                     f"({in_words(error)}); the key must have no password; use the files of one run, renew server.crt "
                     "(see README.md), or, for a new CA, run bash certs/gen_certs.sh again")
        print(f"[SERVER] WARNING: {CERTS / 'server.crt'}: {in_words(error)}: clients will refuse it; "
              "look at the clock, or renew it (see README.md)", file=sys.stderr)
    except OSError as error:
        sys.exit(f"[SERVER] ERROR: cannot read {error.filename} ({error.strerror}); "
                 "make the certificates, CA included: bash certs/gen_certs.sh")
    try:
        return TodoServer((host, port), context, allowed_cns)
    except (OSError, UnicodeError) as error:
        problem = in_words(error)
        advice = "choose an address of this machine with --host and a port you may use with --port"
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            problem = "address already in use"   # Windows has longer words for it
            advice = ("stop the program that uses this port, or take another one in both terminals: "
                      "MTLS_SERVER_PORT=8444")
        sys.exit(f"[SERVER] ERROR: cannot listen on {host}:{port} ({problem}); {advice}")


def main() -> None:
    """Start, serve until Ctrl+C or SIGTERM, stop."""
    arguments = parse_arguments()
    server = start(arguments.host, arguments.port, arguments.allow_cn)

    signals: list[int] = []

    def stop(number: int, _: object) -> None:
        if number == signal.SIGINT and number in signals:   # Ctrl+C again
            os._exit(1)
        signals.append(number)
        server.stopping = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    # Here the doorman's thread begins: it leads all handshakes. Whoever gets through them is served by
    # a thread of his own (see connections.py).
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    port = server.server_address[1]
    say(f"mTLS server listening on https://{host}:{port}")
    say("Requiring client cert signed by: ca.crt")
    if arguments.host in ("0.0.0.0", "::"):   # noqa: S104   # all addresses; the certificate is for these
        say(f"On this machine, clients connect to: https://127.0.0.1:{port}")
    say("Press Ctrl+C to stop.")
    while not server.stopping:
        time.sleep(0.1)   # the main thread does nothing else, so a signal is always heard
    threading.Timer(STOP_SECONDS + 2, os._exit, [0]).start()   # if nobody reads what we print now
    if server.running():
        say(f"Waiting for running requests, {STOP_SECONDS:.0f} s at most; Ctrl+C again ends at once.")
    server.shutdown()
    server.log.close()
    say("Stopped.")
    os._exit(0)   # a plain return would wait for threads that still serve


# --- The list ------------------------------------------------------------------------------

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

    def add(self, task: str, done: bool) -> dict[str, object]:
        """Append an item and return it. Raises Refusal if the list is full."""
        with self._lock:
            if len(self._items) >= MAX_ITEMS:
                raise Refusal(HTTPStatus.INSUFFICIENT_STORAGE,
                              f"list: is full with {MAX_ITEMS:,} items; restart the server to empty it")
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


if __name__ == "__main__":
    main()
