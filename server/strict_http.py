"""HTTP/1.1, read strictly and without I/O: bytes go in, a response or a request for more comes out.

If two programs see different headers or a different end of a body, the body can be taken for a
second request (request smuggling, RFC 9112 section 11.2). So this parser never guesses. It does not
use the e-mail parser of http.server, which accepts lines without a colon and bare CRs.

A `StrictHandler` handles the requests of one connection, one after the other:

    receive(bytes)         add what has arrived
    handle_one_request()   answer the next request; False if it is not complete yet
    break_off(...)         answer a request that will never be complete
    wfile.take()           the bytes to send: call it after each of the others, even after False

It never waits and touches no socket, so you can test its rules by calling it. A subclass checks a
request's head in `judge`, and answers in ``do_GET`` and the like, with `respond` or by raising
`Refusal`. Every answer is JSON.
"""

from __future__ import annotations

import email.utils
import functools
import http.server
import itertools
import json
import re
import sys
import time
from http import HTTPStatus
from typing import Any, NoReturn

MAX_LINE = 64 * 1024        # bytes of the request line, and of one header line
MAX_HEAD = 2 * MAX_LINE     # bytes of all header lines together: up to 1,024 connections can hold as many
MAX_HEADERS = 100           # lines
MAX_EMPTY_LINES = 8         # before a request: each costs time, and no client needs them
MAX_DEPTH = 100             # levels of arrays and objects in a JSON body
MAX_LOGGED = 200            # characters of a request line that are logged

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                                                # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([1-9])\.([0-9])\r?\n")   # RFC 9112 section 3
HEADER_LINE = re.compile(rb"(" + TOKEN + rb"):([\t -~\x80-\xff]*)\r?\n")               # RFC 9112 section 5
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(?::\d*)?"                         # RFC 3986 section 3.2
ABSOLUTE = re.compile(rf"\Ahttps?://(?=[^/:]){HOST}(?=/)", re.ASCII | re.IGNORECASE)     # RFC 9112 section 3.2.2
CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")   # control characters that JSON does not escape

http_date = functools.lru_cache(maxsize=1)(email.utils.formatdate)


class Refusal(Exception):
    """The answer to a request that breaks a rule. ``headers`` are added to it."""

    def __init__(self, status: HTTPStatus, rule: str, **headers: str) -> None:
        super().__init__(rule)
        self.status, self.headers = status, headers


class Response:
    """A file to write a response to. It keeps the pieces as they are, so a large body is not copied."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def write(self, piece: bytes) -> None:
        """Add a piece."""
        self.pieces.append(piece)

    def flush(self) -> None:
        """Nothing to do."""

    def take(self) -> list[bytes]:
        """What has been written since the last call."""
        pieces, self.pieces = self.pieces, []
        return pieces


class StrictHandler(http.server.BaseHTTPRequestHandler):
    """Handles the requests of one connection. ``server.keeps_alive(connection)`` says whether it may stay open."""

    protocol_version = "HTTP/1.1"
    server: Any
    connection: Any
    wfile: Any                      # a Response
    fields: dict[str, list[str]]    # header values by lower-case name
    body: bytes                     # of the request, in do_POST

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """As in socketserver, but without handling anything yet: requests arrive through `receive`."""
        self.request = self.connection = request
        self.client_address, self.server = client_address, server
        self.received = bytearray()
        self.wfile = Response()
        self.begin()

    def begin(self) -> None:
        """Be ready to read a request. (``close_connection`` stays as the last answer has set it.)"""
        self.requestline, self.command, self.request_version = "", "", "HTTP/1.1"
        self.fields = {}
        self.empty_lines = self.header_lines = self.header_bytes = 0
        self.searched = 0               # bytes of `received` known to hold no line end
        self.wanted: int | None = None  # bytes of the body, once the head is complete

    # --- Bytes in, a response out --------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        """Add bytes that have arrived."""
        self.received += data

    @property
    def has_begun(self) -> bool:
        """Whether any part of a request has arrived; an empty line before it does not count."""
        return bool(self.requestline) or bytes(self.received[:2]) not in (b"", b"\r")

    def handle_one_request(self) -> bool:   # type: ignore[override]   # http.server's waits, and returns None
        """Answer the next request, if it is complete; False asks for more bytes."""
        try:
            if self.wanted is None:
                if not self.parse_request():
                    return False
                self.wanted = 0
                self.judge()
            if len(self.received) < self.wanted:
                return False
            self.body = self.take(self.wanted)
            getattr(self, f"do_{self.command}")()
        except Refusal as refusal:
            self.refuse(refusal)
        except Exception:   # noqa: BLE001   # a bug of ours: the log says where it is
            self.server.handle_error(self.connection, self.client_address)
            self.wfile.take()
            self.close_connection = True
            self.refuse(Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "server: has a bug, see its log"))
        self.begin()
        return True

    def break_off(self, after: float | None = None) -> None:
        """Answer a request that is still incomplete ``after`` this many seconds, or (None) when the connection ends."""
        self.requestline = self.requestline or for_log(self.received)
        self.close_connection = True
        if after is None:
            self.refuse(Refusal(HTTPStatus.BAD_REQUEST, "request: ended before it was complete"))
        else:
            self.refuse(Refusal(HTTPStatus.REQUEST_TIMEOUT, f"request: must be complete within {after:.0f} s"))

    def judge(self) -> None:
        """Check a request by its head, before its body is read; call `accept_body` if it may have one.

        ``command``, ``path`` and ``fields`` are valid. Raises Refusal unless there is a ``do_`` method for it.
        """
        raise NotImplementedError

    # --- Reading -------------------------------------------------------------------------------

    def take(self, size: int) -> bytes:
        """Remove this many bytes from what has been received, and return them."""
        data = bytes(self.received[:size])
        del self.received[:size]
        self.searched = 0
        return data

    def take_line(self, limit: int) -> bytes | None:
        """The next line with its end; None if that has not arrived. A line over the limit comes without its end."""
        # Remember how far we searched: otherwise, a line that arrives byte by byte costs quadratic time.
        end = self.received.find(b"\n", self.searched, limit)
        if end < 0 and len(self.received) < limit:
            self.searched = len(self.received)
            return None
        return self.take(end + 1 or limit)

    def parse_request(self) -> bool:
        """Read as much of the head as has arrived; False if it is incomplete. Raises Refusal."""
        self.close_connection = True   # unless the headers are valid and say otherwise
        while not self.requestline:
            if self.received.startswith(b"\x16"):   # the first byte of a TLS record: a line end may never come
                self.requestline = for_log(self.received)
                raise Refusal(HTTPStatus.BAD_REQUEST, "request: is TLS inside TLS")
            line = self.take_line(MAX_LINE + 1)
            if line is None:
                return False
            if line not in (b"\r\n", b"\n"):
                self.read_request_line(line)
                break
            # Skip an empty line before a request: some clients send one (RFC 9112 section 2.2).
            self.empty_lines += 1
            if self.empty_lines > MAX_EMPTY_LINES:
                raise Refusal(HTTPStatus.BAD_REQUEST, "request line: is missing after too many empty lines")
        while (line := self.take_line(MAX_LINE + 1)) not in (b"\r\n", b"\n"):
            if line is None:
                return False
            self.read_header_line(line)
        self.check_headers()
        return True

    def read_request_line(self, line: bytes) -> None:
        """Parse the request line. Raises Refusal."""
        self.requestline = for_log(line)
        if len(line) > MAX_LINE:
            raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "request line: is too long")
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise Refusal(HTTPStatus.BAD_REQUEST, "request line: must be METHOD TARGET HTTP/1.1")
        if match[3] != b"1":
            raise Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP version: must be 1.0 or 1.1")
        self.command = match[1].decode()
        self.request_version = "HTTP/1.0" if match[4] == b"0" else "HTTP/1.1"
        self.path = ABSOLUTE.sub("", match[2].decode(), count=1).partition("?")[0]   # a query changes nothing here

    def read_header_line(self, line: bytes) -> None:
        """Add a header to ``fields``. Raises Refusal."""
        self.header_lines += 1
        self.header_bytes += len(line)
        if len(line) > MAX_LINE or self.header_bytes > MAX_HEAD or self.header_lines > MAX_HEADERS:
            raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers: too long or too many")
        match = HEADER_LINE.fullmatch(line)
        if not match:
            raise Refusal(HTTPStatus.BAD_REQUEST, "header line: must be NAME: VALUE")
        self.fields.setdefault(match[1].decode().lower(), []).append(match[2].decode("latin-1").strip(" \t"))

    def check_headers(self) -> None:
        """Check Host, and decide whether the connection stays open after the answer. Raises Refusal."""
        hosts = self.fields.get("host", [])   # RFC 9112 section 3.2
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Host header: must be given exactly once")
        if hosts and not re.fullmatch(HOST, hosts[0], re.ASCII):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Host header: must be a host and perhaps a port")
        options = {option.strip(" \t").lower() for option in ",".join(self.fields.get("connection", [])).split(",")}
        self.keep_alive = "close" not in options and (self.request_version == "HTTP/1.1" or "keep-alive" in options)
        # A body that we do not read must not be taken for the next request: close after the answer.
        has_body = "transfer-encoding" in self.fields or set(self.fields.get("content-length", ["0"])) != {"0"}
        self.close_connection = has_body or not self.keep_alive

    def body_length(self) -> int | None:
        """The Content-Length; None without one. Raises Refusal if it is ambiguous (RFC 9112 section 6.3)."""
        lengths = {one.strip(" \t") for line in self.fields.get("content-length", []) for one in line.split(",")}
        plain = all(one.isascii() and one.isdigit() for one in lengths)
        if len(lengths) > 1 or not plain or (lengths and "transfer-encoding" in self.fields):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Content-Length: must be one plain number, without Transfer-Encoding")
        digits = lengths.pop() if lengths else None
        # Python refuses to convert huge numbers, so any of these counts as the largest.
        return None if digits is None else int(digits) if len(digits) < 20 else sys.maxsize

    def accept_body(self, limit: int) -> None:
        """Have the body read, if it has at most this many bytes. Raises Refusal."""
        self.close_connection = True   # a client may send a body without a length
        length = self.body_length()
        if length is None:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "Content-Length: must be given; chunked bodies are not taken")
        if length > limit:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: must have at most {limit:,} bytes")
        self.wanted = length
        self.close_connection = not self.keep_alive
        if self.fields.get("expect", [""])[0].lower() == "100-continue" and self.request_version == "HTTP/1.1":
            self.send_response_only(HTTPStatus.CONTINUE)   # the client waits for this before it sends the body
            self.end_headers()

    def json_object(self) -> dict[str, object]:
        """The body as a JSON object (RFC 8259). Raises Refusal."""
        try:
            text = self.body.decode()
            if depth(text) > MAX_DEPTH:   # checked first: the parser's recursion could exhaust the stack
                raise Refusal(HTTPStatus.BAD_REQUEST, f"body: nested more than {MAX_DEPTH} levels deep")
            value = json.loads(text, parse_constant=not_json, object_pairs_hook=unambiguous)
        except UnicodeDecodeError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "body: must be UTF-8") from None
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"body: must be JSON ({error})") from None
        if not isinstance(value, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "body: must be a JSON object")
        return value

    # --- Answering -----------------------------------------------------------------------------

    def respond(self, status: HTTPStatus, *body: bytes, **headers: str) -> None:
        """Write an answer. The body is JSON, in pieces; for HEAD, only its length counts."""
        self.close_connection |= not self.server.keeps_alive(self.connection)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(sum(map(len, body))))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        elif self.request_version == "HTTP/1.0":
            self.send_header("Connection", "keep-alive")   # an HTTP/1.0 client that asked for it needs to be told
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.pieces.extend(body)

    def refuse(self, refusal: Refusal) -> None:
        """Write the answer to a request that breaks a rule."""
        self.respond(refusal.status, encode({"error": str(refusal)}), **refusal.headers)

    def version_string(self) -> str:
        """The Server header: our name, not Python's version, which helps only attackers."""
        return "mTLS-Lab"

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header, formatted once a second."""
        return http_date(int(time.time()), usegmt=True)


def encode(value: object) -> bytes:
    """JSON as in all our bodies: indented, UTF-8 instead of escapes, a newline at the end.

    Characters that could control the terminal of someone who uses curl stay escaped.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"


def depth(text: str) -> int:
    """How deep a JSON text is nested. Brackets in strings do not count."""
    brackets = re.sub(r'"(?:[^"\\]|\\.)*"?|[^][{}"]+', "", text, flags=re.DOTALL)
    return max(itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)


def not_json(constant: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's json reads although RFC 8259 section 6 forbids them."""
    raise ValueError(f"{constant} is not JSON")


def unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that has a name twice: some programs take the first, some the last (RFC 8259 section 4)."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def for_log(line: bytes | bytearray) -> str:
    """A request line as it is logged: cut off, and escaped so that it cannot pass for anything else.

    Only two spaces stay: with more, a terminal could wrap the rest so that it looks like a line of its own.
    """
    text = line[:MAX_LOGGED + 2].decode("latin-1").rstrip("\r\n")
    text = text.encode("unicode_escape").decode().replace('"', r"\x22")
    words = text.split(" ")
    if len(words) > 3:
        text = " ".join([words[0], r"\x20".join(words[1:-1]), words[-1]])
    return text if len(text) <= MAX_LOGGED else text[:MAX_LOGGED] + "..."
