"""HTTP/1.1, read strictly: what two programs could understand differently is refused.

Where two readers see different headers or a different end of a body, that body can become a
second request (request smuggling, RFC 9112 section 11.2). So nothing is guessed here, and the
e-mail parser of http.server, which lets lines without a colon and bare CRs pass, is not used.

A handler reads one request after the other. Override `answer`, which answers one of them: with
`respond`, or by raising `Refusal`. Every answer is JSON.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import http.server
import json
import re
import sys
import time
from http import HTTPStatus
from io import BufferedReader
from typing import NoReturn

from connections import DEADLINES, DoormanServer, Guest, Phase

MAX_LINE = 64 * 1024   # bytes of the request line, and of one header line
MAX_HEADERS = 100      # lines
MAX_DEPTH = 100        # levels of arrays and objects in a JSON body
MAX_LOGGED = 200       # characters of a request line that are logged

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"                                                # RFC 9110 section 5.6.2
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([1-9])\.([0-9])\r?\n")   # RFC 9112 section 3
HEADER_LINE = re.compile(rb"(" + TOKEN + rb"):([\t -~\x80-\xff]*)\r?\n")               # RFC 9112 section 5
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.~!$&'()*+,;=%-]*)(?::\d*)?"                         # RFC 3986 section 3.2
ABSOLUTE = re.compile(rf"https?://(?=[^/:]){HOST}(?=/)", re.ASCII | re.IGNORECASE)     # RFC 9112 section 3.2.2
STEERING = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")   # control characters that JSON does not escape

date_in_words = functools.lru_cache(maxsize=1)(email.utils.formatdate)


class Refusal(Exception):
    """The answer to a request that breaks a rule. ``headers`` are added to it."""

    def __init__(self, status: HTTPStatus, rule: str, **headers: str) -> None:
        super().__init__(rule)
        self.status, self.headers = status, headers


class StrictHandler(http.server.BaseHTTPRequestHandler):
    """The requests of one connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1                   # buffer, so that head and body leave in one write
    server: DoormanServer
    connection: Guest
    rfile: BufferedReader
    fields: dict[str, list[str]]    # the headers' values, by their names in small letters
    keep_alive: bool                # what the client wants

    def answer(self) -> None:
        """Answer a request: ``command``, ``path`` and ``fields`` are sound, its body (`read_body`) not yet read."""
        raise NotImplementedError

    def handle_one_request(self) -> None:
        """Wait for a request, read and answer it. See http.server."""
        self.requestline, self.command, self.request_version = "", "", "HTTP/1.1"
        self.close_connection = True   # unless the headers are sound and say otherwise
        if not self.server.enter(self.connection, Phase.IDLE):
            return
        # An empty line between requests, which some clients send, begins none (RFC 9112 section 2.2).
        begin = b"\n"
        while begin in (b"\n", b"\r\n"):
            begin = self.rfile.read(1)
            if begin == b"\r":
                begin += self.rfile.read(1)
        if begin in (b"", b"\r") or not self.server.enter(self.connection, Phase.REQUEST):
            return
        try:
            self.read_request_line(begin)
            self.read_headers()
            self.answer()
        except Refusal as refusal:
            self.respond(refusal.status, {"error": str(refusal)}, **refusal.headers)

    def read_request_line(self, begin: bytes) -> None:
        """Read the rest of the line that begins so. Raises Refusal."""
        if begin == b"\x16":   # the first byte of a TLS record: no line end may ever come
            raise Refusal(HTTPStatus.BAD_REQUEST, "request: is TLS inside TLS")
        line = begin + self.rfile.readline(MAX_LINE)
        self.requestline = for_log(line)
        if len(line) > MAX_LINE:
            raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "request line: is too long")
        match = REQUEST_LINE.fullmatch(line)
        if not match:
            raise self.broken(line, "request line: must be METHOD TARGET HTTP/1.1")
        if match[3] != b"1":
            raise Refusal(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP version: must be 1.0 or 1.1")
        self.command = match[1].decode()
        self.request_version = "HTTP/1.0" if match[4] == b"0" else "HTTP/1.1"
        self.path = ABSOLUTE.sub("", match[2].decode(), count=1).partition("?")[0]   # a query changes nothing here

    def read_headers(self) -> None:
        """Read the header lines up to the empty one, and see what they say of the connection. Raises Refusal."""
        self.fields = {}
        left, lines = 2 * MAX_LINE, 0   # bytes for all: 256 connections with 100 long lines each would be 1.6 GB
        while (line := self.rfile.readline(MAX_LINE + 1)) not in (b"\r\n", b"\n"):
            left, lines = left - len(line), lines + 1
            if len(line) > MAX_LINE or left < 0 or lines > MAX_HEADERS:
                raise Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers: too long or too many")
            match = HEADER_LINE.fullmatch(line)
            if not match:
                raise self.broken(line, "header line: must be NAME: VALUE")
            self.fields.setdefault(match[1].decode().lower(), []).append(match[2].decode("latin-1").strip(" \t"))
        hosts = self.fields.get("host", [])   # RFC 9112 section 3.2
        if len(hosts) > 1 or (not hosts and self.request_version == "HTTP/1.1"):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Host header: must be there once")
        if hosts and not re.fullmatch(HOST, hosts[0], re.ASCII):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Host header: must be a host and perhaps a port")
        options = {option.strip().lower() for option in ",".join(self.fields.get("connection", [])).split(",")}
        self.keep_alive = "close" not in options and (self.request_version == "HTTP/1.1" or "keep-alive" in options)
        # Unless we read it, a body must not be taken for the next request: close after the answer.
        has_body = "transfer-encoding" in self.fields or set(self.fields.get("content-length", ["0"])) != {"0"}
        self.close_connection = has_body or not self.keep_alive

    def broken(self, line: bytes, rule: str) -> Refusal:
        """The refusal of a line that breaks the rule, or of what has come of a request that broke off."""
        if line.endswith(b"\n"):
            return Refusal(HTTPStatus.BAD_REQUEST, rule)
        if self.connection.given_up:
            rule = f"request: must be complete within {DEADLINES[Phase.REQUEST]:.0f} s"
            return Refusal(HTTPStatus.REQUEST_TIMEOUT, rule)
        return Refusal(HTTPStatus.BAD_REQUEST, "request: ended before it was complete")

    def body_length(self) -> int | None:
        """The Content-Length, None without one. Raises Refusal if it leaves any doubt (RFC 9112 section 6.3)."""
        lengths = {one.strip(" \t") for line in self.fields.get("content-length", []) for one in line.split(",")}
        plain = all(one.isascii() and one.isdigit() for one in lengths)
        if len(lengths) > 1 or not plain or (lengths and "transfer-encoding" in self.fields):
            raise Refusal(HTTPStatus.BAD_REQUEST, "Content-Length: must be one plain number, without Transfer-Encoding")
        digits = lengths.pop() if lengths else None
        # Python refuses to convert huge numbers.
        return None if digits is None else int(digits) if len(digits) < 20 else sys.maxsize

    def read_body(self, most: int) -> bytes:
        """The request's body, of so many bytes at most. Raises Refusal."""
        self.close_connection = True   # until it is read: some send one without a length, too
        length = self.body_length()
        if length is None:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "Content-Length: must be given; chunked bodies are not taken")
        if length > most:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"body: must have at most {most:,} bytes")
        if self.fields.get("expect", [""])[0].lower() == "100-continue" and self.request_version == "HTTP/1.1":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
            self.wfile.flush()
        body = self.rfile.read(length)
        if len(body) < length:
            raise self.broken(b"", "")
        self.close_connection = not self.keep_alive
        return body

    def read_json(self, most: int) -> dict[str, object]:
        """The body, a JSON object (RFC 8259) of so many bytes at most. Raises Refusal."""
        try:
            text = self.read_body(most).decode()
            if depth(text) > MAX_DEPTH:   # judged before: the parser's recursion could exhaust the thread's stack
                raise Refusal(HTTPStatus.BAD_REQUEST, f"body: nested more than {MAX_DEPTH} levels deep")
            value = json.loads(text, parse_constant=not_json, object_pairs_hook=unambiguous)
        except UnicodeDecodeError:
            raise Refusal(HTTPStatus.BAD_REQUEST, "body: must be UTF-8") from None
        except ValueError as error:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"body: must be JSON ({error})") from None
        if not isinstance(value, dict):
            raise Refusal(HTTPStatus.BAD_REQUEST, "body: must be a JSON object")
        return value

    def respond(self, status: HTTPStatus, content: object, **headers: str) -> None:
        """Send an answer: ``content`` as JSON (bytes: JSON already), which HEAD only measures."""
        body = content if isinstance(content, bytes) else encode(content)
        self.server.enter(self.connection, Phase.RESPONSE)
        self.close_connection |= self.server.stopping
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

    def version_string(self) -> str:
        """The Server header: our name, not Python's version, which helps only attackers."""
        return "mTLS-Lab"

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date header, put in words once a second."""
        return date_in_words(int(time.time()), usegmt=True)

    def finish(self) -> None:
        """Close both files, also when the peer is gone and the last flush fails."""
        with contextlib.suppress(OSError):
            super().finish()
        self.rfile.close()


def encode(value: object) -> bytes:
    """JSON as all our bodies have it: indented, UTF-8 instead of escapes, a newline at the end.

    But what would steer the terminal of someone who looks at it with curl stays escaped.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", text).encode() + b"\n"


def depth(text: str) -> int:
    """How deep a JSON text is nested. What is in its strings does not count."""
    deepest = level = 0
    for token in re.findall(r'[\[{}\]]|"(?:[^"\\]|\\.)*"?', text, re.DOTALL):
        level += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
        deepest = max(deepest, level)
    return deepest


def not_json(constant: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's json reads although RFC 8259 section 6 forbids them."""
    raise ValueError(f"{constant} is not JSON")


def unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that has a name twice: some programs take the first, some the last (RFC 8259 section 4)."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def for_log(line: bytes) -> str:
    """A request line as it is logged: shortened, and escaped so that it can look like nothing else.

    Only two spaces stay: more could move what follows to where a line of the log begins.
    """
    text = line[:MAX_LOGGED + 2].decode("latin-1").rstrip("\r\n")
    text = text.encode("unicode_escape").decode().replace('"', r"\x22")
    words = text.split(" ")
    if len(words) > 3:
        text = " ".join([words[0], r"\x20".join(words[1:-1]), words[-1]])
    return text if len(text) <= MAX_LOGGED else text[:MAX_LOGGED] + "..."
