"""The server's HTTP (server/strict_http.py): which requests it takes, how answers look, and what it logs of them."""

from __future__ import annotations

import itertools
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import Answer, Server, ServerCase, Talk, Wire, lab, request

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
    yield Case("a POST that asks to close", request("POST", "/todo", todo(task="x"), Connection="close"), 201, True)
    yield Case("an HTTP/1.0 GET", b"GET /todo HTTP/1.0\r\n\r\n", 200, closes=True)
    yield Case("an HTTP/1.0 HEAD", b"HEAD /todo HTTP/1.0\r\n\r\n", 200, closes=True)
    yield Case("an empty line before the request", b"\r\n" + get(), 200, closes=False)
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


class HttpCase(ServerCase):
    """Sends requests and judges the answers."""

    def assert_sound(self, answer: Answer, status: int, method: str = "GET") -> None:
        """The status is this one, and the answer is like all of the server's: JSON, rightly measured."""
        self.assertEqual(answer.status, status, f"the answer: {answer.body[:200]!r}")
        self.assertEqual(answer.headers.get_all("Content-Type"), ["application/json"])
        lengths = answer.headers.get_all("Content-Length", [])
        self.assertEqual(len(lengths), 1, "an answer has one Content-Length")
        if method == "HEAD":
            self.assertGreater(int(lengths[0]), 0, "HEAD measures the body that it leaves out")
            return
        plain = json.dumps(answer.json, indent=2, ensure_ascii=False)
        form = STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", plain)
        self.assertEqual(answer.body.decode(), form + "\n", "a body is indented JSON in UTF-8 with a line end")
        if status >= 400:
            self.assertEqual(list(answer.json), ["error"])
            self.assertRegex(answer.json["error"], r"\w")


class SharedServerCase(HttpCase):
    """Tests that share one server, which must be unharmed after all of them."""

    server: Server
    looks = itertools.count()

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(lab())
        cls.addClassCleanup(cls.server.__exit__)
        cls.addClassCleanup(lambda: cls("assert_unharmed").assert_unharmed(cls.server))

    def tearDown(self) -> None:
        self.assert_no_defect_logged(self.server)

    def assert_case(self, talk: Talk, case: Case, following_status: int) -> list[int]:
        """The answer is as the case says and the only one; then the connection is in step, or closed.

        Returns the status of each request that it should have made of it.
        """
        method = case.data.split(maxsplit=1)[0].decode("latin-1")
        talk.send(case.data)
        answer = talk.answer(method)
        self.assert_sound(answer, case.status, method)
        if case.says and method != "HEAD":
            self.assertRegex(answer.json["error"], case.says)
        self.assertEqual(answer.headers.get("Allow"), "GET, HEAD, POST" if case.status == 405 else None)
        closes = answer.headers.get("Connection") == "close"
        if case.closes is not None:
            self.assertEqual(closes, case.closes, "whether the connection ends with this answer")
        if not closes:
            following = talk.ask("GET", "/in-step", Connection="close")
            self.assert_sound(following, following_status)
            self.assertEqual(following.headers.get("Connection"), "close")
        self.assert_ends_well(talk)
        return [case.status] if closes else [case.status, following_status]

    def look(self) -> tuple[int, list[int]]:
        """How long the list is, and the statuses of all requests in the log."""
        mark = f"/todo?look={next(self.looks)}"
        with Talk(self.server.connect()) as talk:
            length = len(talk.ask("GET", mark).json["todos"])
        log = self.server.stderr.wait_for(f'"GET {mark} HTTP/1.1" 200 -')
        return length, [int(line.split()[-2]) for line in log if line.startswith("[SERVER] REQUEST |")]

    def assert_cases(self, cases: Iterable[Case], certificate: str = "client") -> None:
        """Each is answered as it says, on TLS 1.2 and 1.3 in turn, logged once, and stores an item only with 201."""
        cases, statuses = list(cases), []
        length, logged = self.look()
        for case, version in zip(cases, itertools.cycle(TLS_VERSIONS), strict=False):
            context = self.server.context(certificate, maximum_version=version)
            with (self.subTest(f"the answer to {case.what} is {case.status}", on=version.name),
                  Talk(self.server.connect(context=context)) as talk):
                statuses += self.assert_case(talk, case, 403 if certificate == "mallory" else 404)
        length_after, logged_after = self.look()
        self.assertEqual(length_after - length, sum(case.status == 201 for case in cases), "gained by the list")
        self.assertEqual(logged_after[len(logged):-1], statuses, "in the log")


class TestRequests(SharedServerCase):
    """What is answered to which request, and that it is logged once."""

    seconds = 6

    def test_cases(self) -> None:
        """Each request gets its answer, is logged once, and adds to the list only what it should."""
        for cases in (sound_cases, request_line_cases, header_cases, body_header_cases, unread_body_cases):
            with self.subTest(cases.__doc__):
                self.assert_cases(cases())


class TestConnections(SharedServerCase):
    """How answers look, and how a connection goes on from request to request."""

    def test_head_answers_as_get_without_the_body(self) -> None:
        """HEAD has the headers of GET, with the length of GET's body, for errors too."""
        with Talk(self.server.connect()) as talk:
            for path in ("/todo", "/nothing"):
                with self.subTest(f"HEAD of {path} has the headers of GET"):
                    answers = talk.ask("GET", path), talk.ask("HEAD", path)
                    headers = [[(name, value) for name, value in answer.headers.items() if name != "Date"]
                               for answer in answers]
                    self.assertEqual((answers[0].status, headers[0]), (answers[1].status, headers[1]))

    def test_what_could_steer_a_terminal_is_escaped(self) -> None:
        r"""JSON answers write U+007F-U+009F, U+2028-U+202E and U+2066-U+2069 as \uXXXX, and all else as it is."""
        task = "".join(map(chr, (*range(0x20, 0x100), *range(0x2020, 0x2070), 0xfeff, 0x1f600)))
        with Talk(self.server.connect()) as talk:
            for answer in (talk.ask("POST", "/todo", todo(task=task)), talk.ask("GET", "/todo")):
                item = answer.json["todo"] if answer.status == 201 else answer.json["todos"][-1]
                self.assertEqual(item["task"], task)
                self.assert_sound(answer, answer.status)
                self.assertIsNone(STEERING.search(answer.body.decode()))
                self.assertIn("ÿ", answer.body.decode())

    def test_a_connection_stays_in_step(self) -> None:
        """Requests on one connection are answered in order, however their bytes arrive; HTTP/1.0 is kept if it asks."""
        body = todo(task="in step")
        old = "Connection: Keep-Alive"
        script = [
            ("GET", get(), 200, None),
            ("HEAD", get(method="HEAD"), 200, None),
            ("POST", request("POST", "/todo", body), 201, None),
            ("POST", b"\r\n\n\r\n" + request("POST", "/todo", HIDDEN), 400, None),   # empty lines; no JSON
            ("GET", request("GET", "/nothing"), 404, None),
            ("HEAD", request("HEAD", "/nothing"), 404, None),
            ("PUT", request("PUT", "/todo"), 405, None),
            ("POST", request("POST", "/todo", body), 201, None),
            ("GET", head("GET /todo HTTP/1.0", old), 200, "keep-alive"),
            ("HEAD", head("HEAD /todo HTTP/1.0", old), 200, "keep-alive"),
            ("POST", head("POST /todo HTTP/1.0", old, JSON, f"Content-Length: {len(body)}") + body, 201, "keep-alive"),
            ("POST", request("POST", "/todo", b""), 400, None),
            ("GET", head("GET /todo HTTP/1.0"), 200, "close"),
        ]
        everything = b"".join(data for _, data, *_ in script)
        ways = {
            "all at once": [everything],
            "in pieces of 7 bytes": [everything[at:at + 7] for at in range(0, len(everything), 7)],
            "each with the head of the next": [everything[:100], everything[100:]],
            "one after the other": [],
        }
        for way, pieces in ways.items():
            with (self.subTest(f"requests that are sent {way} are answered in order"),
                  Talk(self.server.connect()) as talk):
                for piece in pieces:
                    talk.send(piece)
                for method, data, status, connection in script:
                    if not pieces:
                        talk.send(data)
                    answer = talk.answer(method)
                    self.assert_sound(answer, status, method)
                    self.assertEqual(answer.headers["Connection"], connection)
                self.assert_ends_well(talk)

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
            with self.subTest(f"{status} comes at once, not 100 Continue"), Talk(self.server.connect()) as talk:
                talk.send(data)
                self.assertRegex(talk.file.readline(), rb"^HTTP/1\.1 %d " % status)

    def test_a_request_that_ends_too_early(self) -> None:
        """A peer that ends in the middle of a request is told 400, and nothing is stored."""
        ends: dict[str, Callable[[Wire], None]] = {
            "TCP's end": lambda wire: wire.plain.shutdown(socket.SHUT_WR),
            "close_notify": lambda wire: wire.plain.sendall(wire.bytes_of(wire.tls.unwrap)),
        }
        beginnings = {
            "a request line": (b"GET /todo HT", 1),
            "the headers": (b"GET /todo HTTP/1.1\r\nHost: localhost\r\n", 1),
            "a header line": (b"GET /todo HTTP/1.1\r\nHost: loc", 1),
            "a body": (post(JSON, "Content-Length: 20", body=todo(task="never")), 1),
            "a body before its first byte": (post(JSON, "Content-Length: 20"), 1),
            "nothing": (b"", 0),
            "an empty line": (b"\r\n", 0),
        }
        known, _ = self.look()
        for by, end in ends.items():
            for where, (data, answers) in beginnings.items():
                with self.subTest(f"{by} in the middle of {where}"), Wire(self.server) as wire:
                    wire.shake_hands()
                    wire.send(data)
                    end(wire)
                    heard = wire.hear()
                    self.assertEqual((heard.count(b"HTTP/"), heard.count(b"HTTP/1.1 400 "),
                                      heard.count(b"\r\nConnection: close\r\n")), (answers,) * 3, heard)
        self.assertEqual(self.look()[0], known)

    def test_a_refusal_is_heard_by_a_client_that_is_still_sending(self) -> None:
        """A client that sends all of its large request before it reads finds the answer, not a reset."""
        large = b"x" * 8_000_000
        length = f"Content-Length: {len(large)}"
        refused = {
            "a body that is too large": (post(JSON, length), 413),
            "a body of a wrong type": (post("Content-Type: text/plain", "Content-Length: 60000"), 415),
            "a chunked body": (post(JSON, "Transfer-Encoding: chunked"), 411),
            "a body that came with a GET": (get(length), 200),
            "a body to an unknown path": (post(JSON, length, path="/nothing"), 404),
            "an endless request line": (b"GET /", 414),
            "an endless header": (b"GET /todo HTTP/1.1\r\nX: ", 431),
        }
        for (what, (data, status)), version in itertools.product(refused.items(), TLS_VERSIONS):
            with (self.subTest(f"a client that sends {what} reads {status}", on=version.name),
                  Talk(self.server.connect(context=self.server.context(maximum_version=version))) as talk):
                talk.send(data)
                talk.send(large)
                self.assert_sound(talk.answer(), status)
                self.assert_ends_well(talk)


class TestLog(HttpCase):
    """What the log shows of a request line."""

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
        pattern = re.compile(r'\[SERVER\] REQUEST \| peer=127\.0\.0\.1 \| cert-CN=\'mtls-client\' \| "([^"]*)" (\d+) -')
        with self.serving() as server:
            for line in lines:
                with Talk(server.connect()) as talk:
                    talk.send(line.encode("latin-1") + b"\r\nHost: localhost\r\n\r\n")
                    self.assertEqual(talk.answer().status, 200 if line.startswith("GET /todo?") else 400)
            log = server.stderr.wait_for(lambda log: sum("REQUEST" in one for one in log) >= len(lines))
            self.assertNotIn(FORGED, "".join(log))
            for (line, shown), one in zip(lines.items(), [one for one in log if "REQUEST" in one], strict=True):
                with self.subTest(f"{line[:60]!r} in the log"):
                    self.assertTrue(one.isprintable() and one.isascii(), one)
                    found = pattern.fullmatch(one)
                    assert found, one
                    logged = found[1]
                    self.assertEqual(found[2], "200" if line.startswith("GET /todo?") else "400")
                    self.assertLessEqual(len(logged), 203)
                    self.assertLessEqual(logged.count(" "), 2, "more spaces than a request line has")
                    if shown:
                        self.assertEqual(logged, shown)
                    elif not logged.endswith("..."):   # then it says the whole
                        self.assertEqual(logged.encode().decode("unicode_escape"), line)
