"""The server's HTTP: what it answers to which request, sound or broken, and what it logs."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import ssl
import time
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from tests.support import (
    PATIENCE,
    Answer,
    Server,
    ServerCase,
    SharedServerCase,
    Talk,
    Wire,
    lab,
    new_folder,
    openssl,
    request,
)

HOST = "Host: localhost"
JSON = "Content-Type: application/json"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A request in the place of a body: if it is answered or logged, the server was out of step."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
MAX_BODY = 64 * 1024


class Case(NamedTuple):
    """One request and what the issue says of its answer."""

    what: str                   # in words, to follow "the answer to"
    data: bytes                 # the request as it goes out
    status: int
    closes: bool | None = None  # whether the connection ends with the answer; None: as the server likes
    says: str = ""              # a pattern that the error must match


def head(line: str, *fields: str) -> bytes:
    """The bytes of a request line and header lines, with nothing added but line ends."""
    return "\r\n".join((line, *fields, "", "")).encode("latin-1")


def post(*fields: str, body: bytes = b"", path: str = "/todo") -> bytes:
    """A POST with these header lines and this body, and nothing that makes them fit."""
    return head(f"POST {path} HTTP/1.1", HOST, *fields) + body


def todo(**item: Any) -> bytes:
    """The body of a POST."""
    return json.dumps(item).encode()


def sized(size: int) -> bytes:
    """A sound body of so many bytes."""
    body = todo(task="large")
    return body + b" " * (size - len(body))


def sound_cases() -> Iterator[Case]:
    """What a well-meaning client may send."""
    yield Case("a GET", request("GET", "/todo"), 200, closes=False)
    yield Case("a HEAD", request("HEAD", "/todo"), 200, closes=False)
    yield Case("a POST", request("POST", "/todo", todo(task="x")), 201, closes=False)
    yield Case("a GET that asks to close", request("GET", "/todo", Connection="close"), 200, closes=True)
    yield Case("a GET that asks to Close, among others", request("GET", "/todo", Connection="TE, Close"), 200, True)
    yield Case("a POST that asks to close", request("POST", "/todo", todo(task="x"), Connection="close"), 201, True)
    yield Case("an HTTP/1.0 GET", b"GET /todo HTTP/1.0\r\n\r\n", 200, closes=True)
    yield Case("an HTTP/1.0 HEAD", b"HEAD /todo HTTP/1.0\r\n\r\n", 200, closes=True)
    yield Case("an empty line before the request", b"\r\n" + request("GET", "/todo"), 200, closes=False)
    yield Case("header names in any case and values in odd spaces",
               post("CONTENT-type:application/json", "content-LENGTH: \t 13 \t", body=b'{"task": "x"}'), 201, False)
    yield Case("99 headers", head("GET /todo HTTP/1.1", HOST, *(f"X-{n}: y" for n in range(98))), 200)
    yield Case("a header line of 60 KB", head("GET /todo HTTP/1.1", HOST, "X: " + "y" * 60_000), 200)
    yield Case("a request line of 60 KB", request("GET", "/todo?" + "x" * 60_000), 200)
    for kind in ("application/json; charset=utf-8", "Application/JSON", 'application/json;charset="utf-8"'):
        yield Case(f"a POST of {kind}", request("POST", "/todo", todo(task="x"), Content_Type=kind), 201, closes=False)
    yield Case("a body of exactly 64 KiB", request("POST", "/todo", sized(MAX_BODY)), 201, closes=False)


def path_and_method_cases() -> Iterator[Case]:
    """Rows of the table on paths and methods."""
    for method in METHODS:
        yield Case(f"{method} of an unknown path", request(method, "/nothing"), 404, says="path")
    for path in ("/", "/todo/", "/todo/1", "/TODO", "/nothing?/todo", "//todo", "//localhost/todo", "*",
                 "https://localhost:8443/", "https://localhost:8443", "https://localhost:8443/nothing", "https://[/todo"):
        yield Case(f"GET of {path}", request("GET", path), 404, says="path")
    for target in ("/todo?", "/todo?page=2&x=/nothing", "https://localhost:8443/todo", "https://localhost:8443/todo?x=y"):
        yield Case(f"GET of {target}", request("GET", target), 200, closes=False)
        yield Case(f"HEAD of {target}", request("HEAD", target), 200, closes=False)
        yield Case(f"POST of {target}", request("POST", target, todo(task="x")), 201, closes=False)
    for method in METHODS[3:]:
        yield Case(f"{method} of /todo", request(method, "/todo"), 405, says="method")
    for method in ("BREW", "get", "GETT", "__class__", "M-SEARCH"):
        yield Case(f"the unknown method {method}", request(method, "/todo"), 501)


def request_line_cases() -> Iterator[Case]:
    """Rows of the table on request lines. All end the connection: where would the next one begin?"""
    yield Case("HTTP/0.9", b"GET /todo\r\n", 400, closes=True)
    yield Case("HTTP/0.9 by its number", head("GET /todo HTTP/0.9"), 400, closes=True)
    for raw in (b"hello", b"\x00\x01\x02 \xff\xfe", b"GET", b"GET /todo HTTP", b"GET /todo HTTP/1",
                 b"GET /todo HTTP/11", b"GET /todo HTTP/1.1 x", b"GET  /todo HTTP/1.1", b" GET /todo HTTP/1.1",
                 b"GET /todo http/1.1", b"GET /to do HTTP/1.1", b"GET /to\tdo HTTP/1.1", b"GET /to\x00do HTTP/1.1",
                 b"GET /to\x0bdo HTTP/1.1",
                 b"GET /\xc3\xb1 HTTP/1.1", b"G\xc3\x8bT /todo HTTP/1.1", b"G(T /todo HTTP/1.1",
                 b"GET /todo HTTP/1.1\r", b"GET /todo HTTP/1.1\rX: y", b"GET /todo HTTP/\xb9.1",
                 b"GET /todo HTTP/1.-1", b"GET /todo HTTP/+1.1"):
        yield Case(f"the request line {raw!r}", raw + b"\r\nHost: localhost\r\n\r\n", 400, closes=True)
    yield Case("TLS inside TLS", client_hello().replace(b"\n", b"\r"), 400, closes=True)   # no line ever ends
    for line in ("GET /todo HTTP/2.0", "PRI * HTTP/2.0", "GET /todo HTTP/3.0"):
        yield Case(f"the request line {line!r}", head(line, HOST), 505, closes=True)
    yield Case("a request line over 64 KiB", request("GET", "/todo?" + "x" * MAX_BODY), 414, closes=True)
    yield Case("a line of 1 MB without an end", b"x" * 1_000_000, 414, closes=True)


def header_cases() -> Iterator[Case]:
    """Rows of the table on header lines. In each, a lenient reader would find a second request."""
    yield Case("HTTP/1.1 without Host", head("GET /todo HTTP/1.1", "X: y"), 400, True, "Host")
    yield Case("HTTP/1.1 without any header", head("GET /todo HTTP/1.1"), 400, True, "Host")
    yield Case("a HEAD without Host", head("HEAD /todo HTTP/1.1"), 400, True)
    for second in ("localhost", "other"):
        yield Case(f"HTTP/1.1 with a second Host ({second})",
                   head("GET /todo HTTP/1.1", HOST, f"Host: {second}"), 400, True, "Host")
    yield Case("HTTP/1.0 with two Hosts", head("GET /todo HTTP/1.0", HOST, "host: other"), 400, True, "Host")
    length = f"Content-Length: {len(HIDDEN)}"
    for line in ("no colon", "nocolon", " X: y", "\tX: y", "X : y", "X\t: y", ": y", "X Y: z", "\xd1: y", "X(y): z",
                 "X:\x00", "X: a\x0bb", "X: a\x7fb", f"X: a\r{length}", f"\r{length}", "X: a\r", "X: a\r\n continued"):
        name = repr(line)
        yield Case(f"a POST with the header line {name}", post(line, JSON, length, body=HIDDEN), 400, True,
                   "(?i)header")
        yield Case(f"a GET with the last header line {name}", head("GET /todo HTTP/1.1", HOST, line) + HIDDEN,
                   400, True, "(?i)header")
        yield Case(f"an HTTP/1.0 GET with the first header line {name}",
                   head("GET /todo HTTP/1.0", line, length) + HIDDEN, 400, True, "(?i)header")
    yield Case("101 headers", head("GET /todo HTTP/1.1", HOST, *(f"X-{n}: y" for n in range(100))), 431, True)
    yield Case("a header line over 64 KiB", head("GET /todo HTTP/1.1", HOST, "X: " + "y" * MAX_BODY), 431, True)
    yield Case("a header line of 1 MB without an end", head("GET /todo HTTP/1.1", "X: " + "y" * 1_000_000), 431, True)


def body_header_cases() -> Iterator[Case]:
    """Rows of the table on the headers that describe a body."""
    body = todo(task="never stored")
    length = f"Content-Length: {len(HIDDEN)}"
    names_it = "Content-Type: application/json"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                 "application/jsonx", "application/json-patch+json", "text/plain; application/json", "text/json",
                 "json", "*/*", "", " ", "application/json/x", "text/plain, application/json"):
        yield Case(f"a POST of {kind!r}", post(f"Content-Type: {kind}", f"Content-Length: {len(body)}", body=body), 415,
                   says=names_it)
        yield Case(f"a POST of {kind!r} with a request as body",
                   post(f"Content-Type: {kind}", length, body=HIDDEN), 415)
    yield Case("a POST without Content-Type", post(f"Content-Length: {len(body)}", body=body), 415, says=names_it)

    yield Case("a POST without Content-Length", post(JSON), 411, True, "Content-Length")
    yield Case("a POST without Content-Length but with a body", post(JSON, body=HIDDEN), 411, True)
    for coding in ("chunked", "gzip, chunked", "identity"):
        yield Case(f"a POST with Transfer-Encoding: {coding}",
                   post(JSON, f"Transfer-Encoding: {coding}", body=b"0\r\n\r\n" + HIDDEN), 411, True, "Content-Length")
    yield Case("an HTTP/1.0 POST without Content-Length", head("POST /todo HTTP/1.0", JSON) + body, 411, True)

    for value in ("", " ", "-1", "+5", "5.0", "0x5", "5e0", "1_0", "5 5", "5;", "five", "\xb2", "\xb5", "5\xa0",
                  "\xa05", "5\x85", "5, 6", "5,", ",5", "5 6"):
        yield Case(f"a POST with the Content-Length {value!r}",
                   post(JSON, f"Content-Length: {value}", body=HIDDEN), 400, True, "Content-Length")
        yield Case(f"a GET with the Content-Length {value!r}",
                   head("GET /todo HTTP/1.1", HOST, f"Content-Length: {value}") + HIDDEN, 400, True)
    for first, second in (("0", str(len(HIDDEN))), (str(len(HIDDEN)), "0"), ("5", "six")):
        for method in ("POST", "GET", "HEAD"):
            yield Case(f"a {method} with Content-Length: {first} and {second}",
                       head(f"{method} /todo HTTP/1.1", HOST, JSON, f"Content-Length: {first}",
                            f"Content-Length: {second}") + HIDDEN, 400, True)
    for coding in ("chunked", "identity"):
        for fields in ((length, f"Transfer-Encoding: {coding}"), (f"Transfer-Encoding: {coding}", length),
                       ("Content-Length: 0", f"Transfer-Encoding: {coding}")):
            for method in ("POST", "GET"):
                yield Case(f"a {method} with {' and '.join(fields)}",
                           head(f"{method} /todo HTTP/1.1", HOST, JSON, *fields) + b"0\r\n\r\n" + HIDDEN,
                           400, True, "Content-Length")

    for size in ("65537", "1000000", "9" * 25, "9" * 5000, "0" * 30 + "65537"):
        yield Case(f"a POST that announces {size[:40]} bytes", post(JSON, f"Content-Length: {size}"), 413, True,
                   "64|65,?536")


def unread_body_cases() -> Iterator[Case]:
    """A body that comes with a GET, a HEAD or a request that is refused: never taken for a request."""
    length = f"Content-Length: {len(HIDDEN)}"
    framings = {
        "a body": ([length], HIDDEN),
        "a chunked body": (["Transfer-Encoding: chunked"], b"%x\r\n" % len(HIDDEN) + HIDDEN + b"\r\n0\r\n\r\n"),
        "a chunked body that hides a request after it": (["Transfer-Encoding: chunked"], b"0\r\n\r\n" + HIDDEN),
        "a body that waits for 100 Continue": ([length, "Expect: 100-continue"], HIDDEN),
    }
    targets = {"GET /todo": 200, "HEAD /todo": 200, "PUT /todo": 405, "DELETE /todo": 405, "BREW /todo": 501,
               "GET /nothing": 404, "POST /nothing": 404, "PUT /nothing": 404, "HEAD /nothing": 404}
    for name, (fields, body) in framings.items():
        for target, status in targets.items():
            yield Case(f"{target} with {name}",
                       head(f"{target} HTTP/1.1", HOST, JSON, *fields) + body, status)
    # Judged by the path or the method, before anyone looks whether the two lengths agree.
    for first, second in (("0", str(len(HIDDEN))), ("0", "five"), ("five", "0"), ("0, 5", "0")):
        for target, status in {"GET /nothing": 404, "POST /nothing": 404, "PUT /todo": 405}.items():
            yield Case(f"{target} with Content-Length: {first} and {second}",
                       head(f"{target} HTTP/1.1", HOST, f"Content-Length: {first}",
                            f"Content-Length: {second}") + HIDDEN, status)


def order_cases() -> Iterator[Case]:
    """Requests with several faults get the answer to the one that is judged first (as an allowed client)."""
    large, unsound = "Content-Length: 65537", "Content-Length: five"
    yield Case("a broken header, an unknown method and path", head("BREW /nothing HTTP/1.1", HOST, "x"), 400)
    yield Case("an unknown path and method of /todo's", request("PUT", "/nothing"), 404)
    yield Case("an unknown path and an unsound length", head("POST /nothing HTTP/1.1", HOST, unsound), 404)
    yield Case("an unknown path and no length", head("POST /nothing HTTP/1.1", HOST), 404)
    yield Case("an unknown path and a large body", head("POST /nothing HTTP/1.1", HOST, large), 404)
    yield Case("an unknown path and a broken body", request("POST", "/nothing", b"{"), 404)
    yield Case("a wrong method and an unsound length", head("PUT /todo HTTP/1.1", HOST, unsound), 405)
    yield Case("a wrong method and a large body", head("PUT /todo HTTP/1.1", HOST, large), 405)
    yield Case("a wrong method and a broken body", request("PATCH", "/todo", b"{"), 405)
    yield Case("a large and broken body", request("POST", "/todo", b"{" * (MAX_BODY + 1)), 413)
    yield Case("a wrong Content-Type and a broken body", request("POST", "/todo", b"{", Content_Type="text/plain"), 415)


def forbidden_cases() -> Iterator[Case]:
    """What a client hears whose CN is not allowed: 403, unless its request cannot be read at all."""
    for method in METHODS:
        for path in ("/todo", "/nothing"):
            yield Case(f"mallory's {method} of {path}", request(method, path), 403, says="mallory")
    unsound = "Content-Length: five"
    for method in ("GET", "POST", "PUT"):
        for fields in (["Content-Length: 65537"], [unsound], ["Transfer-Encoding: chunked"],
                       [f"Content-Length: {len(HIDDEN)}"], ["Content-Length: 0", f"Content-Length: {len(HIDDEN)}"],
                       [f"Content-Length: {len(HIDDEN)}", "Expect: 100-continue"]):
            yield Case(f"mallory's {method} with {' and '.join(fields)} and a request as body",
                       head(f"{method} /todo HTTP/1.1", HOST, *fields) + HIDDEN, 403, says="mallory")
    yield Case("mallory's POST of a broken body", request("POST", "/todo", b"{"), 403, says="mallory")
    yield Case("mallory's sound POST", request("POST", "/todo", todo(task="x")), 403, says="mallory")
    yield Case("mallory's rubbish", b"rubbish\r\n", 400, True)
    yield Case("mallory's request without Host", head("GET /todo HTTP/1.1"), 400, True)
    yield Case("mallory's broken header", head("GET /todo HTTP/1.1", HOST, "x"), 400, True)
    yield Case("mallory's HTTP/2.0", head("GET /todo HTTP/2.0", HOST), 505, True)
    yield Case("mallory's unknown method", request("BREW", "/todo"), 501)
    yield Case("mallory's long request line", request("GET", "/" + "x" * MAX_BODY), 414, True)
    yield Case("mallory's 101 headers", head("GET /todo HTTP/1.1", *(f"X-{n}: y" for n in range(101))), 431, True)


def validation_cases() -> Iterator[Case]:
    """Bodies that are no TODO item: 400 names the field and the rule."""
    bodies: dict[str, tuple[bytes, str]] = {
        "an empty body": (b"", "body: .*JSON"),
        "a broken body": (b"{", "body: .*JSON"),
        "a body with more after the object": (b'{"task": "x"} x', "body: .*JSON"),
        "a body with single quotes": (b"{'task': 'x'}", "body: .*JSON"),
        "a body with a raw line end in the task": (b'{"task": "a\nb"}', "body: .*JSON"),
        "a form": (b"task=x", "body: .*JSON"),
        "a request as body": (HIDDEN, "body: .*JSON"),
        "a body in Latin-1": ('{"task": "Añadir"}'.encode("latin-1"), "body: .*UTF-8"),
        "a body in UTF-16": ('{"task": "x"}'.encode("utf-16"), "body: .*UTF-8"),
        "a body with a surrogate in UTF-8": (b'{"task": "\xed\xa0\x80"}', "body: .*UTF-8"),
        "a body with a byte order mark": (b'\xef\xbb\xbf{"task": "x"}', "body: .*JSON"),
        "NaN in the task's place": (b'{"task": NaN}', "JSON"),
        "NaN in another field": (b'{"task": "x", "other": NaN}', "JSON"),
        "Infinity in another field": (b'{"task": "x", "other": [-Infinity]}', "JSON"),
        "a body nested 30,000 deep": (b"[" * 30_000, "body: "),
        "a body nested 30,000 deep and closed": (b"[" * 30_000 + b"]" * 30_000, "body: "),
        "objects nested 10,000 deep": (b'{"a":' * 10_000, "body: "),
        "another field nested 30,000 deep": (b'{"task": "x", "o": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", "body: "),
        "a 10,000-digit number": (b'{"task": "x", "other": ' + b"1" * 10_000 + b"}", "body: "),
        "a list": (b'[{"task": "x"}]', "body: .*object"),
        "a string": (b'"task"', "body: .*object"),
        "a number": (b"1", "body: .*object"),
        "null": (b"null", "body: .*object"),
        "no task": (todo(done=True), "task: .*non-empty"),
        "a task under another name": (todo(Task="x"), "task: .*non-empty"),
        "an empty task": (todo(task=""), "task: .*non-empty"),
        "a task of spaces": (todo(task="  \t\r\n\u2003"), "task: .*non-empty"),
        "a task of 1,001 characters": (todo(task="x" * 1001), "task: .*1,?000"),
        "a task with a high lone surrogate": (b'{"task": "\\ud800"}', "task: "),
        "a task with a low lone surrogate": (b'{"task": "a\\udfffb"}', "task: "),
        "a task with surrogates in the wrong order": (b'{"task": "\\udc00\\ud800"}', "task: "),
    }
    value: Any
    for value in (None, True, 1, 1.5, [], ["x"], {}, {"task": "x"}):
        bodies[f"the task {value!r}"] = (todo(task=value), "task: .*string")
    for value in (None, 0, 1, "true", "", [], {}):
        bodies[f"the done {value!r}"] = (todo(task="x", done=value), "done: .*true or false")
    for what, (body, says) in bodies.items():
        yield Case(what, request("POST", "/todo", body), 400, says=says)


def client_hello() -> bytes:
    """The first bytes of a TLS connection."""
    outgoing = ssl.MemoryBIO()
    tls = lab().context(None).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


class HttpCase(ServerCase):
    """Sends requests and judges the answers."""

    def assert_sound(self, answer: Answer, status: int, method: str = "GET") -> None:
        """The status is this one, and the answer is like all of the server's: JSON, rightly measured."""
        self.assertEqual(answer.status, status, f"the answer: {answer.body[:200]!r}")
        self.assertEqual(answer.headers.get_all("Content-Type"), ["application/json"])
        lengths = answer.headers.get_all("Content-Length", [])
        self.assertEqual(len(lengths), 1, "an answer has one Content-Length")
        if method == "HEAD":
            self.assertEqual(answer.body, b"", "HEAD has no body")
            self.assertGreater(int(lengths[0]), 0, "HEAD measures the body that it leaves out")
            return
        self.assertEqual(int(lengths[0]), len(answer.body), "the Content-Length is right")
        self.assertEqual(answer.body.decode(), json.dumps(answer.json, indent=2, ensure_ascii=False) + "\n",
                         "a body is indented JSON in UTF-8 with a line end")
        if status >= 400:
            self.assertEqual(list(answer.json), ["error"])
            self.assertRegex(answer.json["error"], r"\w")

    def assert_case(self, server: Server, case: Case, certificate: str) -> list[int]:
        """The answer is as the case says and the only one; then the connection is in step, or closed.

        Returns the status of each request that it should have made of it.
        """
        method = case.data.split(maxsplit=1)[0].decode("latin-1")
        with Talk(server.connect(certificate)) as talk:
            talk.send(case.data)
            answer = talk.answer(method)
            self.assert_sound(answer, case.status, method)
            if case.says and method != "HEAD":
                self.assertRegex(answer.json["error"], case.says)
            self.assertEqual(answer.headers.get("Allow"), "GET, HEAD, POST" if case.status == 405 else None)
            closes = answer.headers.get("Connection") == "close"
            if case.closes is not None:
                self.assertEqual(closes, case.closes, "whether the connection ends with this answer")
            statuses = [case.status]
            if not closes:
                statuses.append(403 if certificate == "mallory" else 404)
                following = talk.ask("GET", "/in-step", Connection="close")
                self.assert_sound(following, statuses[-1])
                self.assertEqual(following.headers.get("Connection"), "close")
            self.assert_ends_well(talk)
            return statuses

    def todos(self, server: Server, certificate: str = "client") -> list[dict[str, Any]]:
        """The list as a new connection sees it."""
        with Talk(server.connect(certificate)) as talk:
            todos: list[dict[str, Any]] = talk.ask("GET", "/todo", Connection="close").json["todos"]
            return todos


class TestRequests(HttpCase, SharedServerCase):
    """What is answered to which request, each on a connection of its own, and that it is logged once."""

    looks = itertools.count()

    def assert_cases(self, cases: Iterable[Case], certificate: str = "client") -> None:
        """Each case is answered as it says, is logged once, and adds to the list only what it should."""
        cases = list(cases)
        self.assertEqual(len({case.what for case in cases}), len(cases), "each case has a name of its own")
        with Talk(self.server.connect()) as witness:
            def look() -> tuple[int, list[str]]:
                """How long the list is, and the log so far."""
                mark = f"/todo?look={next(self.looks)}"
                length = len(witness.ask("GET", mark).json["todos"])
                return length, self.server.stderr.wait_for(f'"GET {mark} HTTP/1.1" 200 -')

            length, log = look()
            for case in cases:
                length_before, log_before = length, log
                statuses: list[int] = []
                with self.subTest(f"the answer to {case.what} is {case.status}"):
                    statuses += self.assert_case(self.server, case, certificate)
                length, log = look()
                with self.subTest(f"the list gains {int(case.status == 201)} items from {case.what}"):
                    self.assertEqual(length - length_before, int(case.status == 201))
                new = [line for line in log[len(log_before):] if line.startswith("[SERVER] REQUEST |")]
                with self.subTest(f"the log has one request for {case.what}"):
                    if statuses:   # else it has failed above
                        self.assertEqual([int(line.split()[-2]) for line in new[:-1]], statuses, f"the log: {new}")

    def test_sound_requests(self) -> None:
        """Whatever a well-meaning client may send is served."""
        self.assert_cases(sound_cases())

    def test_paths_and_methods(self) -> None:
        """404, 405 with Allow, 501; the query is ignored, an absolute-form target is as good."""
        self.assert_cases(path_and_method_cases())

    def test_request_lines(self) -> None:
        """400, 414 and 505 for request lines that are none, too long or of another HTTP."""
        self.assert_cases(request_line_cases())

    def test_header_lines(self) -> None:
        """400 and 431 for header lines that two readers could understand differently, or too many."""
        self.assert_cases(header_cases())

    def test_headers_of_a_body(self) -> None:
        """400, 411, 413 and 415, whatever the body."""
        self.assert_cases(body_header_cases())

    def test_unread_bodies(self) -> None:
        """A body that nobody asked for is never read as a request."""
        self.assert_cases(unread_body_cases())

    def test_bodies(self) -> None:
        """400 that names the field and the rule for what is no TODO item; the list is untouched."""
        self.assert_cases(validation_cases())

    def test_order_of_judgment(self) -> None:
        """Of several faults, the one that is judged first is answered."""
        self.assert_cases(order_cases())

    def test_forbidden(self) -> None:
        """A client that is not allowed learns nothing about paths, methods and bodies."""
        self.assert_cases(forbidden_cases(), "mallory")


class TestAnswers(HttpCase, SharedServerCase):
    """What the answers say, and how connections go on."""

    arguments = ("--allow-cn", "mtls-client", "mallory")

    def test_items_that_are_accepted(self) -> None:
        """A POST answers with the item as it is on the list from then on."""
        items: dict[str, dict[str, Any]] = {
            "a task with ñ": {"task": "Añadir endpoint POST"},
            "a done task": {"task": "x", "done": True},
            "a task that is not done": {"task": "x", "done": False},
            "a task with spaces around it": {"task": "  x \n"},
            "a task of 1,000 characters of 4 bytes": {"task": "\U0001f600" * 1000},
            "a task of control characters": {"task": "\x00\x07\x1b[2J\x7f\x85\u2028\u202e"},
            "a task that looks like JSON": {"task": '{"task": "\\"}'},
            "unknown fields": {"task": "x", "id": 1, "other": ["y"], "Done": "z"},
        }
        with Talk(self.server.connect()) as talk:
            for what, item in items.items():
                for form, body in (("escapes", json.dumps(item)), ("characters", json.dumps(item, ensure_ascii=False))):
                    with self.subTest(f"{what}, written with {form}, is accepted and stored as given"):
                        known = talk.ask("GET", "/todo").json["todos"]
                        answer = talk.ask("POST", "/todo", body.encode())
                        self.assert_sound(answer, 201)
                        stored = {"id": len(known) + 1, "task": item["task"], "done": item.get("done", False)}
                        self.assertEqual(answer.json["todo"], stored)
                        self.assertEqual(answer.json["client"], "mtls-client")
                        listed = talk.ask("GET", "/todo")
                        self.assert_sound(listed, 200)
                        self.assertEqual(listed.json["todos"], [*known, stored])

    def test_each_client_sees_the_same_list_under_its_own_name(self) -> None:
        """GET after any POST shows the new item, to both of two clients, each by its CN."""
        names = {"client": "mtls-client", "mallory": "mallory"}
        with Talk(self.server.connect("client")) as client, Talk(self.server.connect("mallory")) as mallory:
            talks = {"client": client, "mallory": mallory}
            known = self.todos(self.server)
            for poster in ("client", "mallory", "mallory", "client"):
                answer = talks[poster].ask("POST", "/todo", todo(task=f"by {poster}"))
                known.append({"id": len(known) + 1, "task": f"by {poster}", "done": False})
                self.assertEqual((answer.json["client"], answer.json["todo"]), (names[poster], known[-1]))
                for reader in ("mallory", "client", "client", "mallory"):
                    with self.subTest(f"after a POST by {poster}, {reader} sees the new item under its own name"):
                        self.assertEqual(talks[reader].ask("GET", "/todo").json,
                                         {"client": names[reader], "todos": known})

    def test_head_answers_as_get_without_the_body(self) -> None:
        """HEAD has the headers of GET, with the length of GET's body, for errors too."""
        with Talk(self.server.connect()) as talk:
            for path in ("/todo", "/nothing"):
                with self.subTest(f"HEAD of {path} has the headers of GET"):
                    get, head_only = talk.ask("GET", path), talk.ask("HEAD", path)
                    self.assertEqual(head_only.status, get.status)
                    headers = [{name: value for name, value in answer.headers.items() if name != "Date"}
                               for answer in (get, head_only)]
                    self.assertEqual(headers[0], headers[1])
                    self.assertEqual(head_only.body, b"")

    def test_a_connection_stays_in_step(self) -> None:
        """Requests on one connection are answered in their order, however their bytes arrive."""
        body = todo(task="in step")
        script = [
            ("GET", request("GET", "/todo"), 200),
            ("HEAD", request("HEAD", "/todo"), 200),
            ("POST", request("POST", "/todo", body), 201),
            ("POST", b"\r\n" + request("POST", "/todo", HIDDEN), 400),   # a body that is no JSON, after an empty line
            ("GET", request("GET", "/nothing"), 404),
            ("HEAD", request("HEAD", "/nothing"), 404),
            ("PUT", request("PUT", "/todo"), 405),
            ("POST", request("POST", "/todo", body), 201),
            ("GET", b"GET /todo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 200),
            ("POST", request("POST", "/todo", b""), 400),
            ("GET", request("GET", "/todo", Connection="close"), 200),
        ]
        everything = b"".join(data for _, data, _ in script)
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
                for method, data, status in script:
                    if not pieces:
                        talk.send(data)
                    self.assert_sound(talk.answer(method), status, method)
                self.assert_ends_well(talk)

    def test_http_1_0_keep_alive(self) -> None:
        """An HTTP/1.0 client that asks for keep-alive is told so and may go on, or is closed."""
        for method, status, body in (("GET", 200, b""), ("HEAD", 200, b""), ("POST", 201, todo(task="old"))):
            fields = (JSON, f"Content-Length: {len(body)}") if body else ()
            data = head(f"{method} /todo HTTP/1.0", "Connection: Keep-Alive", *fields) + body
            with (self.subTest(f"an HTTP/1.0 {method} with keep-alive hears what becomes of the connection"),
                  Talk(self.server.connect()) as talk):
                for _ in range(3):
                    talk.send(data)
                    answer = talk.answer(method)
                    self.assert_sound(answer, status, method)
                    if answer.headers["Connection"] != "keep-alive":
                        self.assertEqual(answer.headers["Connection"], "close")
                        break
                else:
                    talk.send(head("GET /todo HTTP/1.0"))
                    self.assert_sound(talk.answer(), 200)
                self.assert_ends_well(talk)

    def test_expect_100_continue(self) -> None:
        """The go-ahead comes before the body and only if the body is wanted; a refusal comes instead of it."""
        body = todo(task="expected")
        length = f"Content-Length: {len(body)}"
        for value in ("100-continue", "100-Continue"):
            with self.subTest(f"a POST with Expect: {value} is told to go on"), Talk(self.server.connect()) as talk:
                talk.send(post(JSON, length, f"Expect: {value}"))
                self.assertEqual((talk.readline(), talk.readline()), (b"HTTP/1.1 100 Continue\r\n", b"\r\n"))
                talk.send(body)
                self.assert_sound(talk.answer(), 201)
                self.assert_sound(talk.ask("GET", "/todo"), 200)
        refusals = {
            413: post(JSON, "Content-Length: 65537", "Expect: 100-continue"),
            415: post("Content-Type: text/plain", length, "Expect: 100-continue"),
            411: post(JSON, "Transfer-Encoding: chunked", "Expect: 100-continue"),
            400: post(JSON, "Content-Length: five", "Expect: 100-continue"),
            404: post(JSON, length, "Expect: 100-continue", path="/nothing"),
            405: head("PUT /todo HTTP/1.1", HOST, JSON, length, "Expect: 100-continue"),
        }
        for status, data in refusals.items():
            with self.subTest(f"{status} comes at once, not 100 Continue"), Talk(self.server.connect()) as talk:
                talk.send(data)
                self.assertRegex(talk.readline(), rb"^HTTP/1\.1 %d " % status)
        with self.subTest("HTTP/1.0 knows no 100 Continue"), Talk(self.server.connect()) as talk:
            talk.send(head("POST /todo HTTP/1.0", JSON, length, "Expect: 100-continue") + body)
            self.assertRegex(talk.readline(), rb"^HTTP/1\.1 201 ")

    def test_a_request_that_ends_too_early(self) -> None:
        """A peer that ends in the middle of a request is told 400, and nothing is stored."""
        ends: dict[str, Callable[[Wire], None]] = {
            "TCP's end": lambda wire: wire.plain.shutdown(socket.SHUT_WR),
            "close_notify": lambda wire: wire.plain.sendall(wire.bytes_of(wire.tls.unwrap)),
        }
        beginnings = {
            "a request line": b"GET /todo HT",
            "the headers": b"GET /todo HTTP/1.1\r\nHost: localhost\r\n",
            "a header line": b"GET /todo HTTP/1.1\r\nHost: loc",
            "a body": post(JSON, "Content-Length: 20", body=todo(task="never")),
            "a body before its first byte": post(JSON, "Content-Length: 20"),
        }
        known = self.todos(self.server)
        for by, end in ends.items():
            for where, data in beginnings.items():
                with (self.subTest(f"{by} in the middle of {where} is answered with 400"),
                      Wire(self.server) as wire):
                    wire.shake_hands()
                    wire.send(data)
                    end(wire)
                    heard = wire.hear()
                    self.assertRegex(heard, rb"^HTTP/1\.1 400 ")
                    self.assertIn(b"\r\nConnection: close\r\n", heard)
                    self.assertEqual(heard.count(b"HTTP/"), 1, "there should be one answer")
            with (self.subTest(f"{by} between two requests is answered with close_notify alone"),
                  Wire(self.server) as wire):
                wire.shake_hands()
                end(wire)
                self.assertEqual(wire.hear(), b"")
        self.assertEqual(self.todos(self.server), known)

    def test_a_refusal_is_heard_by_a_client_that_is_still_sending(self) -> None:
        """A client that sends all of its large request before it reads finds the answer, not a reset."""
        large = b"x" * 8_000_000
        length = f"Content-Length: {len(large)}"
        refused = {
            "a body that is too large": (post(JSON, length), 413),
            "a body of a wrong type": (post("Content-Type: text/plain", "Content-Length: 60000"), 415),
            "a chunked body": (post(JSON, "Transfer-Encoding: chunked"), 411),
            "a body that came with a GET": (head("GET /todo HTTP/1.1", HOST, length), 200),
            "a body to an unknown path": (post(JSON, length, path="/nothing"), 404),
            "an endless request line": (b"GET /", 414),
            "an endless header": (b"GET /todo HTTP/1.1\r\nX: ", 431),
        }
        for what, (data, status) in refused.items():
            with self.subTest(f"a client that sends {what} reads {status}"), Talk(self.server.connect()) as talk:
                talk.send(data)
                talk.send(large)
                self.assert_sound(talk.answer(), status)
                self.assert_ends_well(talk)
        with self.subTest("a client that sends for ever reads 413 in between"), Talk(self.server.connect()) as talk:
            self.assertRegex(sending_for_ever(talk.connection, post(JSON, "Content-Length: 999999999999")),
                             rb"(?s)^HTTP/1\.1 413 .*\r\n\r\n\{.*\}\n$")


class TestStore(HttpCase):
    """The list's limit."""

    def test_a_full_list(self) -> None:
        """The 1,001st item is refused with 507 that says so, after everything else was judged; the list serves on."""
        with Server(lab()) as server, Talk(server.connect()) as talk:
            before = server.counts()
            data = request("POST", "/todo", todo(task="one of many"))
            for count in (100,) * 9 + (95,):
                talk.send(data * count)
                self.assertEqual({talk.answer().status for _ in range(count)}, {201})
            full = talk.ask("POST", "/todo", todo(task="one too many"))
            self.assert_sound(full, 507)
            self.assertRegex(full.json["error"], "full.*1,?000")
            cases = {
                400: request("POST", "/todo", todo(task="")),
                413: request("POST", "/todo", sized(MAX_BODY + 1)),
                415: request("POST", "/todo", todo(task="x"), Content_Type="text/plain"),
                404: request("POST", "/nothing", todo(task="x")),
                405: request("PUT", "/todo", todo(task="x")),
                507: request("POST", "/todo", todo(task="x")),
            }
            for status, refused in cases.items():
                with (self.subTest(f"with a full list, the fault that is {status} is answered so"),
                      Talk(server.connect()) as other):
                    other.send(refused)
                    self.assert_sound(other.answer(), status)
            todos = self.todos(server)
            self.assertEqual([item["id"] for item in todos], list(range(1, 1001)))
            self.assertNotIn("one too many", {item["task"] for item in todos})
            self.assert_sound(talk.ask("GET", "/todo", Connection="close"), 200)
            self.assert_unharmed(server, before)


class TestLog(HttpCase):
    """What the server writes to stderr about requests."""

    def test_the_lines_of_each_request(self) -> None:
        """200 and 201 have their lines below the REQUEST line, 403 its reason, and all else the REQUEST line alone."""
        def line(status: int, what: str, name: str = "mtls-client") -> str:
            return f"[SERVER] REQUEST | peer=127.0.0.1 | cert-CN='{name}' | \"{what}\" {status} -"

        item = "{'id': 6, 'task': 'Añadir endpoint POST', 'done': False}"
        with Server(lab()) as server:
            with Talk(server.connect()) as talk:
                self.assertEqual(talk.ask("POST", "/todo", todo(task="Añadir endpoint POST")).status, 201)
                talk.ask("GET", "/todo?x=%20y")
                talk.ask("HEAD", "/todo")
                talk.ask("GET", "/nothing")
                talk.ask("DELETE", "/todo")
                talk.ask("POST", "/todo", b"{")
                talk.send(post(JSON, "Content-Length: 13", "Expect: 100-continue", body=b'{"task": "x"}'))
                talk.answer()
                talk.ask("BREW", "/todo")
            with Talk(server.connect("mallory")) as talk:
                talk.ask("GET", "/nothing")
            expected = [
                line(201, "POST /todo HTTP/1.1"),
                "[SERVER] AUTHENTICATED | CN='mtls-client' | creating TODO",
                f"[SERVER] TODO CREATED | CN='mtls-client' | item={item}",
                line(200, "GET /todo?x=%20y HTTP/1.1"),
                "[SERVER] AUTHENTICATED | CN='mtls-client' | serving /todo",
                line(200, "HEAD /todo HTTP/1.1"),
                "[SERVER] AUTHENTICATED | CN='mtls-client' | serving /todo",
                line(404, "GET /nothing HTTP/1.1"),
                line(405, "DELETE /todo HTTP/1.1"),
                line(400, "POST /todo HTTP/1.1"),
                line(201, "POST /todo HTTP/1.1"),
                "[SERVER] AUTHENTICATED | CN='mtls-client' | creating TODO",
                "[SERVER] TODO CREATED | CN='mtls-client' | item={'id': 7, 'task': 'x', 'done': False}",
                line(501, "BREW /todo HTTP/1.1"),
                line(403, "GET /nothing HTTP/1.1", "mallory"),
                "[SERVER] FORBIDDEN | CN='mallory' | not in the allowed list",
            ]
            self.assertEqual(server.stderr.wait_for(lambda lines: len(lines) >= len(expected)), expected)

    def test_no_peer_can_forge_a_line_or_drive_a_terminal(self) -> None:
        """Control characters are escaped wherever they come from: request line, header, task or common name."""
        forged = "[SERVER] FORGED | all is well"
        bad = ("\r", "\x1b[2J\x1b]0;x\x07", "\x00", "\x08\x08", "\x7f", "\x85", "\x9b2J", "\t", "\x0b", "\x0c", "\xa0",
               "\xad")
        name = "nasty\r\n" + forged + "\x1b[2J\x9b\u202e\u2028\n"
        with Server(lab(), "--allow-cn", "mtls-client", name) as server:
            expected = 0
            for text in bad:
                for data, status in (
                    (f"GET /{text}{forged.replace(' ', '_')} HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
                    (f"{text}{forged}\r\n\r\n", 400),
                    (f"BREW{text} /todo HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
                    (f"GET /todo HTTP/1.1\r\nHost: localhost\r\n{text}X{text}: {text}{forged}\r\n\r\n", 400),
                ):
                    with Talk(server.connect()) as talk:
                        talk.send(data.encode("latin-1"))
                        self.assertEqual(talk.answer().status, status, repr(data))
                    expected += 1
            contexts = [lab().context(), issued_to(f"/CN={name}")]
            for context in contexts:
                with Talk(server.connect(context=context)) as talk:
                    for text in (*bad, "\n", "\r\n", "\u2028", "\u2029", "\u202e", "\ufeff", "\U000e0001"):
                        status = talk.ask("POST", "/todo", todo(task=f"a{text}{forged}")).status
                        self.assertEqual(status, 201, repr(text))
                        expected += 3
                    talk.ask("GET", "/todo")
                    expected += 2
            lines = server.stderr.wait_for(lambda lines: len(lines) >= expected)
            self.assertEqual(len(lines), expected, "there should be no line more")
            for line in lines:
                self.assertRegex(line, r"^\[SERVER\] (REQUEST|AUTHENTICATED|TODO CREATED) \| ")
                self.assertTrue(line.isprintable(), f"a control character is in {line!r}")

    def test_a_certificate_needs_exactly_one_common_name(self) -> None:
        """None, two, or one of another spelling: 403, logged so that nothing can be forged."""
        certificates = {
            "no common name": ("/O=mtls-client", "None"),
            "two common names": ("/CN=mtls-client/CN=mallory", "None"),
            "the same common name twice": ("/CN=mtls-client/CN=mtls-client", "None"),
            "a common name in capitals": ("/CN=MTLS-CLIENT", "'MTLS-CLIENT'"),
            "a common name with a space behind it": ("/CN=mtls-client ", "'mtls-client '"),
            "a common name with a line end": ("/CN=x\n[SERVER] FORGED | y", r"'x\n[SERVER] FORGED | y'"),
        }
        expected: list[str] = []
        with Server(lab()) as server:
            for what, (subject, shown) in certificates.items():
                with (self.subTest(f"a certificate with {what} is forbidden"),
                      Talk(server.connect(context=issued_to(subject))) as talk):
                    self.assert_sound(talk.ask("GET", "/todo"), 403)
                    expected += [f"[SERVER] REQUEST | peer=127.0.0.1 | cert-CN={shown} | \"GET /todo HTTP/1.1\" 403 -",
                                 f"[SERVER] FORBIDDEN | CN={shown} | not in the allowed list"]
            lines = server.stderr.wait_for(lambda lines: len(lines) >= len(expected))
            self.assertEqual(lines, expected)


def issued_to(subject: str) -> ssl.SSLContext:
    """The context of a client with a certificate of the lab's CA for this subject."""
    folder = new_folder("issued")
    key, csr, certificate, config = (folder / name for name in ("key", "csr", "crt", "cnf"))
    config.write_text("[req]\ndistinguished_name = none\n[none]\n[v3]\nextendedKeyUsage = clientAuth\n")
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    openssl("req", "-new", "-utf8", "-config", config, "-subj", subject, "-key", key, "-out", csr)
    openssl("x509", "-req", "-days", "2", "-in", csr, "-CA", lab().certs / "ca.crt", "-CAkey", lab().certs / "ca.key",
            "-set_serial", "77", "-extfile", config, "-extensions", "v3", "-out", certificate)
    context = lab().context(None)
    context.load_cert_chain(certificate, key)
    return context


def sending_for_ever(connection: ssl.SSLSocket, data: bytes) -> bytes:
    """Send these bytes and then more and more, until the server ends it; returns what was read meanwhile."""
    connection.sendall(data)
    heard = b""
    connection.settimeout(0)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            piece = connection.recv(65536)
            if not piece:
                return heard
            heard += piece
        except ssl.SSLWantReadError:
            pass
        except OSError:
            return heard
        with contextlib.suppress(ssl.SSLWantWriteError, OSError):
            connection.send(b"x" * 16_000)
    raise AssertionError("the server never ended the connection")


if __name__ == "__main__":
    unittest.main()
