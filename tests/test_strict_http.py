"""The server's HTTP (server/strict_http.py): which requests it takes, how answers look, and what it logs of them.

Its rules are called: bytes in, a response out. Only what is about TLS and waiting goes over a connection.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
import math
import random
import re
import socket
import ssl
import sys
import unittest
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import ROOT, Answer, Server, ServerCase, Talk, Wire, lab, request

sys.path.insert(0, str(ROOT / "server"))
from strict_http import Refusal, StrictHandler

from server import Client, TodoHandler, TodoServer, TodoStore

HOST = "Host: localhost"
JSON = "Content-Type: application/json"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A request in the place of a body: if it is answered or logged, the server was out of step."""
HIDDEN_LENGTH = f"Content-Length: {len(HIDDEN)}"

MAX_BODY = 64 * 1024
TLS_VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
FORGED = "[SERVER] FORGED | all is well"
NASTY = ("\r", "\x1b[2J\x1b]0;x\x07", "\x00", "\x08\x08", "\x7f", "\x85", "\x9b2J", "\t", "\x0b", "\xa0", "\xad")
"""What must not come into the log as it is."""
STEERING = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What JSON answers escape, because it could steer the terminal of whoever reads it."""


class Case(NamedTuple):
    """One request and what its answer must be."""

    what: str                   # in words, to follow "the answer to"
    data: bytes                 # the request as it goes out
    status: int
    closes: bool | None = None  # whether the connection ends with the answer; None: as the server likes
    says: str = ""              # a pattern that the error must match


def head(line: str, *fields: str) -> bytes:
    """The bytes of a request line and header lines, with nothing added but line ends."""
    return "\r\n".join((line, *fields, "", "")).encode("latin-1")


def get(*fields: str, method: str = "GET") -> bytes:
    """A GET of /todo with a Host and these header lines."""
    return head(f"{method} /todo HTTP/1.1", HOST, *fields)


def post(*fields: str, body: bytes = b"", path: str = "/todo") -> bytes:
    """A POST with these header lines and this body, and nothing that makes them fit."""
    return head(f"POST {path} HTTP/1.1", HOST, *fields) + body


def todo(**item: Any) -> bytes:
    """The body of a POST."""
    return json.dumps(item).encode()


def sound_cases() -> Iterator[Case]:
    """What a well-meaning client may send."""
    yield Case("a GET", get(), 200, closes=False)
    yield Case("a HEAD", get(method="HEAD"), 200, closes=False)
    yield Case("a POST", request("POST", "/todo", todo(task="x")), 201, closes=False)
    yield Case("a GET that asks to close", get("Connection: close"), 200, closes=True)
    yield Case("a GET that asks to Close, among others", get("Connection: TE, Close"), 200, closes=True)
    yield Case("a GET with an option that is not close", get("Connection: close\xa0"), 200, closes=False)
    yield Case("a POST that asks to close", request("POST", "/todo", todo(task="x"), Connection="close"), 201, True)
    yield Case("an HTTP/1.0 GET", b"GET /todo HTTP/1.0\r\n\r\n", 200, closes=True)
    yield Case("an HTTP/1.0 HEAD", b"HEAD /todo HTTP/1.0\r\n\r\n", 200, closes=True)
    yield Case("eight empty lines before the request", b"\r\n\n" * 4 + get(), 200, closes=False)
    yield Case("header names in any case and values in odd spaces",
               post("CONTENT-type:application/json", "content-LENGTH: \t 13 \t", body=b'{"task": "x"}'), 201, False)
    yield Case("99 headers", get(*(f"X-{n}: y" for n in range(98))), 200)
    yield Case("a header line of 60 KB", get("X: " + "y" * 60_000), 200)
    yield Case("a request line of 60 KB", request("GET", "/todo?" + "x" * 60_000), 200)
    yield Case("a body of exactly 64 KiB", request("POST", "/todo", todo(task="large").ljust(MAX_BODY)), 201, False)
    for host in ("localhost:8443", "127.0.0.1:8443", "[::1]:8443", "[::1]", "lab_1.example", "LOCALHOST:080"):
        yield Case(f"the Host {host}", request("GET", "/todo", Host=host), 200, closes=False)


def request_line_cases() -> Iterator[Case]:
    """Request lines that are none. All end the connection: where would the next one begin?"""
    for raw in (b"GET /todo", b"GET /todo HTTP/0.9", b"hello", b"\x00\x01\x02 \xff\xfe", b"GET", b"GET /todo HTTP",
                b"GET /todo HTTP/1", b"GET /todo HTTP/11", b"GET /todo HTTP/1.1 x", b"GET  /todo HTTP/1.1",
                b" GET /todo HTTP/1.1", b"GET /todo http/1.1", b"GET /to do HTTP/1.1", b"GET /to\tdo HTTP/1.1",
                b"GET /to\x00do HTTP/1.1", b"GET /to\x0bdo HTTP/1.1", b"GET /\xc3\xb1 HTTP/1.1",
                b"G\xc3\x8bT /todo HTTP/1.1", b"G(T /todo HTTP/1.1", b"GET /todo HTTP/1.1\r",
                b"GET /todo HTTP/1.1\rX: y", b"GET /todo HTTP/\xb9.1", b"GET /todo HTTP/1.-1", b"GET /todo HTTP/+1.1"):
        yield Case(f"the request line {raw!r}", raw + b"\r\nHost: localhost\r\n\r\n", 400, closes=True)
    yield Case("nine empty lines before the request", b"\r\n" * 9 + get(), 400, closes=True)
    yield Case("TLS inside TLS", b"\x16\x03\x01\x02\x00" + b"x" * 512, 400, closes=True)   # no line ever ends
    for line in ("GET /todo HTTP/2.0", "PRI * HTTP/2.0", "GET /todo HTTP/3.0"):
        yield Case(f"the request line {line!r}", head(line, HOST), 505, closes=True)
    yield Case("a request line over 64 KiB", request("GET", "/todo?" + "x" * MAX_BODY), 414, closes=True)
    yield Case("a line of 1 MB without an end", b"x" * 1_000_000, 414, closes=True)


def header_cases() -> Iterator[Case]:
    """Header lines that two readers could understand differently. In each, a lenient one finds a second request."""
    yield Case("HTTP/1.1 without Host", head("GET /todo HTTP/1.1", "X: y"), 400, True, "Host")
    yield Case("HTTP/1.1 without any header", head("GET /todo HTTP/1.1"), 400, True, "Host")
    yield Case("a HEAD without Host", head("HEAD /todo HTTP/1.1"), 400, True)
    for second in ("localhost", "other"):
        yield Case(f"HTTP/1.1 with a second Host ({second})", get(f"Host: {second}"), 400, True, "Host")
    yield Case("HTTP/1.0 with two Hosts", head("GET /todo HTTP/1.0", HOST, "host: other"), 400, True, "Host")
    for host in ("a b<>/@", "a b", "a\tb", "a/b", "a?b", "a#b", "a@b", "<a>", "a\\b", "\xf1", '"a"', "a:b", "a:8443:1",
                 "a:-1", "[::1", "::1", "[::1]x", "[x y]", "https://localhost"):
        for version in ("1.0", "1.1"):
            yield Case(f"HTTP/{version} with the Host {host!r}", head(f"GET /todo HTTP/{version}", f"Host: {host}"),
                       400, True, "^Host header: must be a host and perhaps a port$")
    for line in ("no colon", "nocolon", " X: y", "\tX: y", "X : y", "X\t: y", ": y", "X Y: z", "\xd1: y", "X(y): z",
                 "X:\x00", "X: a\x0bb", "X: a\x7fb", f"X: a\r{HIDDEN_LENGTH}", f"\r{HIDDEN_LENGTH}", "X: a\r",
                 "X: a\r\n continued"):
        for what, data in (("a POST", post(line, JSON, HIDDEN_LENGTH)), ("a GET", get(line)),
                           ("an HTTP/1.0 GET", head("GET /todo HTTP/1.0", line, HIDDEN_LENGTH))):
            yield Case(f"{what} with the header line {line!r}", data + HIDDEN, 400, True, "(?i)header")
    yield Case("101 headers", get(*(f"X-{n}: y" for n in range(100))), 431, True)
    yield Case("a header line over 64 KiB", get("X: " + "y" * MAX_BODY), 431, True)
    yield Case("three header lines of 50 KB", get(*["X: " + "y" * 50_000] * 3), 431, True)
    yield Case("a header line of 1 MB without an end", head("GET /todo HTTP/1.1", "X: " + "y" * 1_000_000), 431, True)


def body_header_cases() -> Iterator[Case]:
    """Headers that leave in doubt where the body ends, or announce one that is not taken."""
    yield Case("a POST without Content-Length", post(JSON), 411, True, "Content-Length: must be given")
    yield Case("a POST without Content-Length but with a body", post(JSON, body=HIDDEN), 411, True)
    for coding in ("chunked", "gzip, chunked", "identity"):
        yield Case(f"a POST with Transfer-Encoding: {coding}",
                   post(JSON, f"Transfer-Encoding: {coding}", body=b"0\r\n\r\n" + HIDDEN), 411, True,
                   "^Content-Length: must be given; chunked bodies are not taken$")
    yield Case("an HTTP/1.0 POST without Content-Length", head("POST /todo HTTP/1.0", JSON) + todo(task="x"), 411, True)
    for value in ("", " ", "-1", "+5", "5.0", "0x5", "5e0", "1_0", "5 5", "5;", "five", "\xb2", "\xb5", "5\xa0",
                  "\xa05", "5\x85", "5, 6", "5,", ",5"):
        for method in ("POST", "GET"):
            yield Case(f"a {method} with the Content-Length {value!r}",
                       get(JSON, f"Content-Length: {value}", method=method) + HIDDEN, 400, True, "Content-Length")
    for first, second in (("0", str(len(HIDDEN))), (str(len(HIDDEN)), "0"), ("5", "six")):
        for method in ("POST", "GET", "HEAD"):
            yield Case(f"a {method} with Content-Length: {first} and {second}",
                       get(JSON, f"Content-Length: {first}", f"Content-Length: {second}", method=method) + HIDDEN,
                       400, True)
    for coding in ("chunked", "identity"):
        for fields in ((HIDDEN_LENGTH, f"Transfer-Encoding: {coding}"), (f"Transfer-Encoding: {coding}", HIDDEN_LENGTH),
                       ("Content-Length: 0", f"Transfer-Encoding: {coding}")):
            for method in ("POST", "GET"):
                yield Case(f"a {method} with {' and '.join(fields)}",
                           get(JSON, *fields, method=method) + b"0\r\n\r\n" + HIDDEN, 400, True, "Content-Length")
    for size in ("65537", "1000000", "9" * 25, "9" * 5000, "0" * 30 + "65537"):
        yield Case(f"a POST that announces {size[:40]} bytes", post(JSON, f"Content-Length: {size}"), 413, True,
                   "64|65,?536")


def unread_body_cases() -> Iterator[Case]:
    """A body that comes with a GET, a HEAD or a request that is refused: never taken for a request."""
    framings = {
        "a body": ([HIDDEN_LENGTH], HIDDEN),
        "a chunked body": (["Transfer-Encoding: chunked"], b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"),
        "a chunked body that hides a request after it": (["Transfer-Encoding: chunked"], b"0\r\n\r\n" + HIDDEN),
        "a body that waits for 100 Continue": ([HIDDEN_LENGTH, "Expect: 100-continue"], HIDDEN),
    }
    targets = {"GET /todo": 200, "HEAD /todo": 200, "PUT /todo": 405, "DELETE /todo": 405, "BREW /todo": 501,
               "GET /nothing": 404, "POST /nothing": 404, "PUT /nothing": 404, "HEAD /nothing": 404}
    for name, (fields, body) in framings.items():
        for target, status in targets.items():
            yield Case(f"{target} with {name}", head(f"{target} HTTP/1.1", HOST, JSON, *fields) + body, status)
    # Judged by the path or the method, before anyone looks whether the two lengths agree.
    for first, second in (("0", str(len(HIDDEN))), ("0", "five"), ("five", "0"), ("0, 5", "0")):
        for target, status in {"GET /nothing": 404, "POST /nothing": 404, "PUT /todo": 405}.items():
            yield Case(f"{target} with Content-Length: {first} and {second}",
                       head(f"{target} HTTP/1.1", HOST, f"Content-Length: {first}",
                            f"Content-Length: {second}") + HIDDEN, status)


class CalledServer(TodoServer):
    """The server without sockets: its handler is called. ``lines`` is its log."""

    certificates: Any
    log: Any

    def __init__(self, *allowed_cns: str) -> None:
        self.allowed_cns, self.stopping = list(allowed_cns or ["mtls-client"]), False
        self.certificates, self.store = SimpleNamespace(generation=0), TodoStore()
        self.lines: list[str] = []
        self.log = SimpleNamespace(write=lambda *lines: self.lines.extend(lines))

    def respond_to(self, *pieces: bytes, name: str | None = "mtls-client", expires: float = math.inf) -> list[bytes]:
        """The responses to what a client of this name sends in these pieces."""
        connection = SimpleNamespace(client=Client(name, expires, 0), told_to_end=False)
        return list(responses(TodoHandler(connection, ("127.0.0.1", 50000), self), pieces))

    def answers(self, *pieces: bytes, **client: Any) -> list[Answer]:
        """The same, taken apart."""
        answers = []
        for response in self.respond_to(*pieces, **client):
            file = io.BytesIO(response)
            answers.append(Answer(file, "HEAD" if response.endswith(b"\r\n\r\n") else "GET"))
            assert not file.read(), "nothing may follow an answer"
        return answers


def responses(handler: StrictHandler, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What a handler says, request by request, to bytes that come in these pieces and then end."""
    for piece in pieces:
        handler.receive(piece)
        while handler.handle_one_request():
            yield b"".join(handler.wfile.take())
            if handler.close_connection:
                return
    if handler.has_begun:
        handler.break_off()
        yield b"".join(handler.wfile.take())


def torn(data: bytes, dice: random.Random) -> list[bytes]:
    """The bytes in pieces of any length."""
    cuts = sorted(dice.randrange(len(data)) for _ in range(dice.randrange(1, 8)))
    return [data[first:last] for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True)]


class HttpCase(ServerCase):
    """Judges answers."""

    def assert_sound(self, answer: Answer, status: int, method: str = "GET") -> None:
        """The status is this one, and the answer is like all of the server's: JSON, rightly measured."""
        self.assertEqual(answer.status, status, f"the answer: {answer.body[:200]!r}")
        self.assertEqual(answer.headers.get_all("Content-Type"), ["application/json"])
        lengths = answer.headers.get_all("Content-Length", [])
        self.assertEqual(len(lengths), 1, "an answer has one Content-Length")
        if method == "HEAD":
            self.assertGreater(int(lengths[0]), 0, "HEAD measures the body that it leaves out")
            self.assertEqual(answer.body, b"")
            return
        plain = json.dumps(answer.json, indent=2, ensure_ascii=False)
        form = STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", plain)
        self.assertEqual(answer.body.decode(), form + "\n", "a body is indented JSON in UTF-8 with a line end")
        if status >= 400:
            self.assertEqual(list(answer.json), ["error"])
            self.assertRegex(answer.json["error"], r"\w")

    def assert_cases(self, cases: Iterable[Case], name: str = "mtls-client") -> None:
        """Each is answered as it says, then the connection is in step or closed; logged once; stored only with 201."""
        server, dice = CalledServer(), random.Random(20)   # noqa: S311
        following = request("GET", "/in-step", Connection="close")
        for case in cases:
            method = case.data.split(maxsplit=1)[0].decode("latin-1")
            for pieces in ([case.data + following], torn(case.data + following, dice)):
                known = server.store.number
                server.lines.clear()
                with self.subTest(f"the answer to {case.what} is {case.status}", pieces=len(pieces)):
                    answer, *others = server.answers(*pieces, name=name)
                    self.assert_sound(answer, case.status, method)
                    if case.says and method != "HEAD":
                        self.assertRegex(answer.json["error"], case.says)
                    self.assertEqual(answer.headers.get("Allow"), "GET, HEAD, POST" if case.status == 405 else None)
                    closes = answer.headers.get("Connection") == "close"
                    if case.closes is not None:
                        self.assertEqual(closes, case.closes, "whether the connection ends with this answer")
                    statuses = [case.status] if closes else [case.status, 404 if name == "mtls-client" else 403]
                    self.assertEqual([one.status for one in (answer, *others)], statuses)
                    logged = [int(line.split()[-2]) for line in server.lines if line.startswith("REQUEST |")]
                    self.assertEqual(logged, statuses, "in the log")
                    self.assertEqual(server.store.number - known, case.status == 201, "gained by the list")


class TestRequests(HttpCase):
    """What is answered to which request, and that it is logged once."""

    def test_cases(self) -> None:
        """Each request gets its answer, is logged once, and adds to the list only what it should."""
        for cases in (sound_cases, request_line_cases, header_cases, body_header_cases, unread_body_cases):
            with self.subTest(cases.__doc__):
                self.assert_cases(cases())

    def test_what_could_steer_a_terminal_is_escaped(self) -> None:
        r"""JSON answers write U+007F-U+009F, U+2028-U+202E and U+2066-U+2069 as \uXXXX, and all else as it is."""
        task = "".join(map(chr, (*range(0x20, 0x100), *range(0x2020, 0x2070), 0xfeff, 0x1f600)))
        post, listing = CalledServer().answers(request("POST", "/todo", todo(task=task)), get())
        for answer, item in ((post, post.json["todo"]), (listing, listing.json["todos"][-1])):
            self.assertEqual(item["task"], task)
            self.assert_sound(answer, answer.status)
            self.assertIsNone(STEERING.search(answer.body.decode()))
            self.assertIn("ÿ", answer.body.decode())

    def test_request_lines_in_the_log(self) -> None:
        """It can be read one way only: quotes, spaces and control characters are escaped, and it has its length."""
        lines = {f"{beginning}{text}{FORGED}": "" for beginning in ("GET /", "", "BREW ") for text in NASTY}
        lines |= {
            'GET /todo HTTP/1.1" 200 -': "",
            'GET /todo?"x" HTTP/1.1': r"GET /todo?\x22x\x22 HTTP/1.1",
            "GET /todo" + " " * 100 + "HTTP/1.1": "",
            " " * 190: "",
            "GET /todo?" + "x" * 181 + " HTTP/1.1": "GET /todo?" + "x" * 181 + " HTTP/1.1",      # 200 characters
            "GET /todo?" + "x" * 182 + " HTTP/1.1": "GET /todo?" + "x" * 182 + " HTTP/1....",
            "GET /todo?" + "x" * 60_000 + " HTTP/1.1": "GET /todo?" + "x" * 190 + "...",
        }
        for line, shown in lines.items():
            status = 200 if line.startswith("GET /todo?") else 400
            with self.subTest(f"{line[:60]!r} in the log"):
                server = CalledServer()
                server.answers(line.encode("latin-1") + b"\r\nHost: localhost\r\n\r\n")
                one = server.lines[0]
                self.assertTrue(one.isprintable() and one.isascii(), one)
                found = re.fullmatch(r"REQUEST \| peer=127\.0\.0\.1 \| cert-CN='mtls-client' \| "
                                     rf'"([^"]{{,203}})" {status} -', one)
                assert found, one
                self.assertLessEqual(found[1].count(" "), 2, "more spaces than a request line has")
                if shown:
                    self.assertEqual(found[1], shown)
                elif not found[1].endswith("..."):   # then it says the whole
                    self.assertEqual(found[1].encode().decode("unicode_escape"), line)

    def test_a_line_costs_no_more_than_its_bytes(self) -> None:
        """Also if they come one by one: each is searched for a line end once."""
        class Received(bytearray):
            searched = 0

            def find(self, what: Any, start: Any = 0, end: Any = sys.maxsize) -> int:
                self.searched += min(end, len(self)) - start
                return super().find(what, start, end)

        for beginning in (b"GET /todo?", b"GET /todo HTTP/1.1\r\nHost: localhost\r\nX: "):
            handler = Echo()
            handler.received = received = Received()
            data = beginning + b"x" * 50_000
            refusal, = responses(handler, (bytes([one]) for one in data))
            self.assertIn(b" 400 ", refusal[:13])
            self.assertIn(received.searched, range(len(data), 2 * len(data)))


# --- A second reading to compare with ------------------------------------------------------------

LIMIT = 50   # bytes of a body


class Echo(StrictHandler):
    """Says what it has understood."""

    def __init__(self) -> None:
        super().__init__(None, None, SimpleNamespace(keeps_alive=lambda _: True))

    def judge(self) -> None:
        self.body_length()
        if self.command == "POST":
            self.accept_body(LIMIT)
        elif self.command != "GET":
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "method: is unknown")

    def do_GET(self) -> None:
        """Also a POST."""
        self.respond(HTTPStatus.OK, f"{self.command} {self.path} ".encode(), self.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


NAME = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
EMPTY = rb"(?:\r?\n){0,8}"
FIELD = rb"(%b):([\t\x20-\x7e\x80-\xff]*)\r?\n" % NAME
HEAD = re.compile(rb"%b(%b) ([\x21-\x7e]+) HTTP/1\.([0-9])\r?\n((?:%b){0,100})\r?\n"
                  % (EMPTY, NAME, FIELD.replace(b"(", b"(?:")))
OTHER_VERSION = re.compile(rb"%b%b [\x21-\x7e]+ HTTP/[2-9]\.[0-9]\r?\n" % (EMPTY, NAME))
AUTHORITY = rb"(?:[a-z0-9._~!$&'()*+,;=%-]*|\[[0-9a-f:.]+\])(?::[0-9]*)?"


def reference(data: bytes) -> list[tuple[int, bytes, bool]]:
    """A second reading of RFC 9112: of each request its status, what `Echo` says, and whether that is the end."""
    verdicts: list[tuple[int, bytes, bool]] = []
    while not re.fullmatch(EMPTY + rb"\r?", data):
        refused = 400, b"", True
        found = HEAD.match(data)
        if not found:
            return [*verdicts, (505, b"", True) if OTHER_VERSION.match(data) else refused]
        method, target, minor, lines = found.groups()
        fields = collections.defaultdict(list)
        for name, value in re.findall(FIELD, lines):
            fields[name.lower()].append(value.strip(b" \t"))
        hosts, codings, lengths = fields[b"host"], fields[b"transfer-encoding"], fields[b"content-length"]
        numbers = {one.strip(b" \t") for one in b",".join(lengths).split(b",")} if lengths else set()
        if ((len(hosts) != 1 and not (minor == b"0" and not hosts))
                or not all(re.fullmatch(AUTHORITY, host, re.IGNORECASE) for host in hosts)
                or not all(re.fullmatch(rb"[0-9]+", one) for one in numbers)
                or len(numbers) > 1 or (numbers and codings)):
            return [*verdicts, refused]
        options = [option.strip(b" \t").lower() for option in b",".join(fields[b"connection"]).split(b",")]
        closes = b"close" in options or (minor == b"0" and b"keep-alive" not in options)
        size = int(min(numbers)) if numbers else 0
        data = data[found.end():]
        if method != b"POST":   # a body is not read, so it must not be taken for the next request
            closes = closes or bool(codings) or any(one != b"0" for one in lengths)
            size = 0
        elif not numbers or size > LIMIT or size > len(data):
            return [*verdicts, (411 if not numbers else 413 if size > LIMIT else 400, b"", True)]
        absolute = re.fullmatch(rb"https?://(?![/:])%b(/.*)" % AUTHORITY, target, re.IGNORECASE)
        path = (absolute[1] if absolute else target).partition(b"?")[0]
        known = method in (b"GET", b"POST")
        verdicts.append((200 if known else 501, b"%b %b %b" % (method, path, data[:size]) if known else b"", closes))
        if closes:
            break
        data = data[size:]
    return verdicts


def grown(dice: random.Random) -> bytes:
    """A request, mostly sound; then perhaps a byte of it is another."""
    def one(often: str, seldom: str = "") -> str:
        return dice.choice((seldom if seldom and dice.random() < 0.03 else often).split("|"))

    body = one(f"||x=1|{HIDDEN.decode()}", "x" * LIMIT + ("|" + "x" * (LIMIT + 1)) * 2)
    length = one(str(len(body)), f"{len(body) - 1}|{LIMIT + 1}|-1|5, 5|,||00|+1|5 5|0x5|\xb2|{'9' * 30}")
    fields = [one("Host:|host: \t", "Host :|Hos:|") + one("localhost|[::1]:8443|a.b:1||:", "a b|::1|a/b|\xe9|[g]|a, b"),
              *[one("Content-Length: |CONTENT-LENGTH:", "\xe9: |Transfer-Encoding: ") + length] * (
                  1 if body else dice.randrange(2))]
    fields += [one("X: y|X:|Cookie: \xe9=\x80|Connection: keep-alive|Expect: 100-continue",
                   "X| X: y|X\t: y|Content-Length: 0|Content-Length: 1|Transfer-Encoding: chunked|Host: localhost|"
                   "Connection: TE, Close|Connection: close|X: \r") for _ in range(dice.randrange(5))]
    dice.shuffle(fields)
    lines = [one("|||\n|\r\n\n", "\r\n" * 8 + "|" + "\r\n" * 9) + one("GET|POST", "HEAD|PUT|get|BREW|G(T|")
             + one(" ", "  |\t|") + one("/|/todo|/a?b=/c|*|//a|http://a/b?c|HTTPS://[::1]:1/b",
                                        "http:///b|http://a|http://a@b/|http://:1/|\xe9|")
             + one(" ", "  |") + one("HTTP/1.1|HTTP/1.0|HTTP/1.9", "HTTP/2.0|HTTP/3.1|HTTP/11|http/1.1|HTTP/0.9|")]
    data = bytearray("".join(line + one("\r\n|\n", "\r|\r\r\n") for line in [*lines, *fields, ""]).encode("latin-1"))
    data += body.encode()
    if dice.random() < 0.3:
        at = dice.randrange(len(data))
        data[at:at + dice.randrange(2)] = [dice.choice(b'\r\n\n\t :,;/?"()\x00\x0b\x1f\x7f\x85\xa0\xff019HTPXx-')]
    return bytes(data)


class TestReference(unittest.TestCase):
    """Thousands of requests, most of them sound."""

    def test_same_verdicts(self) -> None:
        """Each is understood as by the reference, whether it comes whole, in pieces, or byte by byte."""
        dice, statuses = random.Random(18), collections.Counter[int]()   # noqa: S311
        for _ in range(1200):
            data = b"".join(grown(dice) for _ in range(dice.randrange(1, 4)))
            verdicts = reference(data)
            statuses.update(status for status, *_ in verdicts)
            for pieces in ([data], torn(data, dice), [bytes([one]) for one in data]):
                handler = Echo()
                said = []
                for response in responses(handler, pieces):
                    response = response.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")   # noqa: PLW2901
                    fields, _, body = response.partition(b"\r\n\r\n")
                    status = int(fields[9:12])
                    said.append((status, body if status == 200 else b"", b"\r\nConnection: close" in fields))
                self.assertEqual(said, verdicts, data)
        self.assertGreater(min(statuses[status] for status in (200, 400, 411, 413, 501, 505)), 5, statuses)


# --- Over connections ----------------------------------------------------------------------------

class TestConnections(HttpCase):
    """What is about TLS and waiting, on one server that must be unharmed after all."""

    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(lab())
        cls.addClassCleanup(cls.server.__exit__)
        cls.addClassCleanup(lambda: cls("assert_unharmed").assert_unharmed(cls.server))

    def test_a_connection_stays_in_step(self) -> None:
        """Requests on one connection are answered in order, however their bytes arrive; HTTP/1.0 is kept if it asks."""
        body, old = todo(task="in step"), "Connection: Keep-Alive"
        script = [
            ("POST", request("POST", "/todo", body), 201, None),
            ("POST", b"\r\n\n\r\n" + request("POST", "/todo", HIDDEN), 400, None),   # empty lines; no JSON
            ("HEAD", request("HEAD", "/nothing"), 404, None),
            ("PUT", request("PUT", "/todo"), 405, None),
            ("HEAD", head("HEAD /todo HTTP/1.0", old), 200, "keep-alive"),
            ("POST", head("POST /todo HTTP/1.0", old, JSON, f"Content-Length: {len(body)}") + body, 201, "keep-alive"),
            ("POST", request("POST", "/todo", b""), 400, None),
            ("GET", head("GET /todo HTTP/1.0"), 200, "close"),
        ]
        data = b"".join(data for _, data, *_ in script)
        with Talk(self.server.connect()) as talk:
            talk.send(data)
            over_tls = [talk.answer(method) for method, *_ in script]
            self.assert_ends_well(talk)
        for answers in over_tls, *(CalledServer().answers(*(data[at:at + size] for at in range(0, len(data), size)))
                                   for size in (1, 7, 100, len(data))):
            for (method, _, status, connection), answer in zip(script, answers, strict=True):
                self.assert_sound(answer, status, method)
                self.assertEqual(answer.headers["Connection"], connection)

    def test_head_answers_as_get_without_the_body(self) -> None:
        """HEAD has the headers of GET, with the length of GET's body, for errors too."""
        with Talk(self.server.connect()) as talk:
            for path in ("/todo", "/nothing"):
                with self.subTest(f"HEAD of {path} has the headers of GET"):
                    answers = talk.ask("GET", path), talk.ask("HEAD", path)
                    headers = [[(name, value) for name, value in answer.headers.items() if name != "Date"]
                               for answer in answers]
                    self.assertEqual((answers[0].status, headers[0]), (answers[1].status, headers[1]))

    def test_expect_100_continue(self) -> None:
        """The go-ahead comes before the body and only if the body is wanted; a refusal comes instead of it."""
        body = todo(task="expected")
        length, expect = f"Content-Length: {len(body)}", "Expect: 100-continue"
        with Talk(self.server.connect()) as talk:
            talk.send(post(JSON, length, "Expect: 100-Continue"))
            self.assertEqual((talk.file.readline(), talk.file.readline()), (b"HTTP/1.1 100 Continue\r\n", b"\r\n"))
            talk.send(body)
            self.assert_sound(talk.answer(), 201)
            self.assert_sound(talk.ask("GET", "/todo"), 200)
        for status, data in {
            413: post(JSON, "Content-Length: 65537", expect),
            415: post("Content-Type: text/plain", length, expect),
            411: post(JSON, "Transfer-Encoding: chunked", expect),
            400: post(JSON, "Content-Length: five", expect),
            404: post(JSON, length, expect, path="/nothing"),
            405: get(JSON, length, expect, method="PUT"),
            201: head("POST /todo HTTP/1.0", JSON, length, expect) + body,   # HTTP/1.0 knows no 100 Continue
        }.items():
            with self.subTest(f"{status} comes at once, not 100 Continue"):
                self.assertRegex(CalledServer().respond_to(data)[0], rb"^HTTP/1\.1 %d " % status)

    def test_a_request_that_ends_too_early(self) -> None:
        """A peer that ends in the middle of a request is told 400, and nothing is stored."""
        beginnings = {
            b"GET /todo HT": 1,
            b"GET /todo HTTP/1.1\r\nHost: localhost\r\n": 1,
            b"GET /todo HTTP/1.1\r\nHost: loc": 1,
            post(JSON, "Content-Length: 20", body=todo(task="never")): 1,
            post(JSON, "Content-Length: 20"): 1,
            b"": 0,
            b"\r\n": 0,
        }
        ends: dict[str, Callable[[Wire], object]] = {
            "TCP's end": lambda wire: wire.plain.shutdown(socket.SHUT_WR),
            "close_notify": lambda wire: wire.plain.sendall(wire.bytes_of(wire.tls.unwrap)),
        }
        for (beginning, answers), (by, end) in itertools.product(beginnings.items(), ends.items()):
            with self.subTest(f"{by} after {beginning!r}"), Wire(self.server) as wire:
                wire.shake_hands()
                wire.send(beginning)
                end(wire)
                heard = wire.hear()
                self.assertEqual((heard.count(b"HTTP/"), heard.count(b"HTTP/1.1 400 "),
                                  heard.count(b"\r\nConnection: close\r\n")), (answers,) * 3, heard)
        with Talk(self.server.connect()) as talk:
            self.assertNotIn(b"never", talk.ask("GET", "/todo").body)

    def test_a_refusal_is_heard_by_a_client_that_is_still_sending(self) -> None:
        """A client that sends all of its large request before it reads finds the answer, not a reset."""
        large = b"x" * 8_000_000
        length = f"Content-Length: {len(large)}"
        refused = {
            "a body that is too large": (post(JSON, length), 413),
            "a body that came with a GET": (get(length), 200),
            "an endless header": (b"GET /todo HTTP/1.1\r\nX: ", 431),
        }
        for (what, (data, status)), version in itertools.product(refused.items(), TLS_VERSIONS):
            with (self.subTest(f"a client that sends {what} reads {status}", on=version.name),
                  Talk(self.server.connect(context=self.server.context(maximum_version=version))) as talk):
                talk.send(data)
                talk.send(large)
                self.assert_sound(talk.answer(), status)
                self.assert_ends_well(talk)
