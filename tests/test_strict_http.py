"""The server's HTTP (server/strict_http.py): which requests it accepts, how it answers, and what it logs.

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
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import ROOT, Answer, Server, ServerCase, Talk, Wire, lab, request

sys.path.insert(0, str(ROOT / "server"))
from server import Client, TodoHandler, TodoServer, TodoStore

POST, JSON = "POST /todo HTTP/1.1", "Content-Type: application/json"
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A request in the place of a body: if it is answered or logged, the server was out of step."""
HIDDEN_LENGTH = f"Content-Length: {len(HIDDEN)}"

MAX_BODY = 64 * 1024
TLS_VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
FORGED = "[SERVER] FORGED | all is well"
NASTY = ("\r", "\x1b[2J\x1b]0;x\x07", "\x00", "\x08\x08", "\x7f", "\x85", "\x9b2J", "\t", "\x0b", "\xa0", "\xad")
"""What must not get into the log unescaped."""
CONTROLS = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What JSON answers escape, because it could control the terminal of whoever reads it."""


class Case(NamedTuple):
    """A request and what its answer must be."""

    data: bytes                 # the request as it goes out
    status: int
    closes: bool | None = None  # whether the connection ends with the answer; None: as the server likes
    says: str = ""              # a pattern that the error must match


def head(line: str, *fields: str) -> bytes:
    """The bytes of a request line and header lines, with nothing added but line ends."""
    return "\r\n".join((line, *fields, "", "")).encode("latin-1")


def get(*fields: str, line: str = "GET /todo HTTP/1.1") -> bytes:
    """A GET of /todo, or what ``line`` says, with a Host and these header lines."""
    return head(line, "Host: localhost", *fields)


def todo(**item: Any) -> bytes:
    """The body of a POST."""
    return json.dumps(item).encode()


def sound_cases() -> Iterator[Case]:
    """What a well-meaning client may send; `grown` has more of it."""
    item, old = todo(task="x"), "Connection: Keep-Alive"
    for fields, closes in ([], False), (["Connection: close"], True), (["Connection: TE, Close"], True):
        yield Case(get(*fields), 200, closes)
        yield Case(get(*fields, line="HEAD /todo HTTP/1.1"), 200, closes)
        yield Case(get(JSON, "Content-Length: 13", *fields, line=POST) + item, 201, closes)
    yield Case(head("GET /todo HTTP/1.0"), 200, True)
    yield Case(head("HEAD /todo HTTP/1.0", old), 200, False)
    yield Case(head("POST /todo HTTP/1.0", old, JSON, "Content-Length: 13") + item, 201, False)
    yield Case(b"\r\n\n" * 4 + get(), 200, False)   # 8 empty lines
    yield Case(request("GET", "/todo?" + "x" * 60_000), 200, False)
    yield Case(get("X: " + "y" * 60_000, *["X: y"] * 98), 200, False)   # 100 headers
    yield Case(request("POST", "/todo", item.ljust(MAX_BODY)), 201, False)


def refused_cases() -> Iterator[Case]:
    """What nobody may send, and the rule that the answer names; `grown` has more of each kind. All end the connection.

    Where two readers could understand a head differently, a lenient one finds a second request, `HIDDEN`.
    """
    host, large = b"\r\nHost: localhost\r\n\r\n", "y" * MAX_BODY
    rules = {
        (400, "request: is TLS inside TLS"): [b"\x16\x03\x01\x02\x00" + b"x" * 512],   # no line ever ends
        (400, "request line: must be METHOD TARGET HTTP/1.1"): [line + host for line in (
            b"GET /todo", b"hello", b"\x00\x01\x02 \xff\xfe", b"GET /todo HTTP/0.9", b"GET /todo HTTP/1.1 x",
            b"GET /to do HTTP/1.1", b"GET /\xc3\xb1 HTTP/1.1", b"GET /todo HTTP/1.1\rX: y")],
        (400, "request line: is missing .*"): [b"\r\n" * 9 + get()],
        (414, "request line: is too long"): [request("GET", f"/todo?{large}"), b"x" * 1_000_000],
        (505, "HTTP version: must be 1.0 or 1.1"): [b"GET /todo HTTP/2.0" + host, b"PRI * HTTP/2.0" + host],
        (400, "header line: must be NAME: VALUE"): [get(line) + HIDDEN for line in (
            "nocolon", " X: y", "X : y", ": y", "X:\x00", f"X: a\r{HIDDEN_LENGTH}", "X: a\r\n continued")],
        (431, "headers: too long or too many"): [
            get(*["X: y"] * 100), get(f"X: {large}"), get(*["X: " + "y" * 50_000] * 3), get("X: " + "y" * 1_000_000)],
        (400, "Host header: must be .* once"): [
            head("GET /todo HTTP/1.1"), get("Host: other"), get("host: localhost", line="GET /todo HTTP/1.0")],
        (400, "Host header: must be a host and perhaps a port"): [
            request("GET", "/todo", Host=name) for name in ("a b", "a/b", "a:8443:1", "[::1]x")],
        (400, "Content-Length: must be one plain number, without Transfer-Encoding"): [
            get(HIDDEN_LENGTH, line) + HIDDEN for line in ("Content-Length: 0", "Transfer-Encoding: chunked")],
        (411, "Content-Length: must be given; chunked bodies are not taken"): [
            get(JSON, line=POST), get(JSON, "Transfer-Encoding: chunked", line=POST) + b"0\r\n\r\n" + HIDDEN],
        (413, "body: must have at most 65,536 bytes"): [
            get(JSON, f"Content-Length: {size}", line=POST) for size in ("65537", "9" * 5000, "0" * 30 + "65537")],
    }
    for (status, says), requests in rules.items():
        for data in requests:
            yield Case(data, status, True, f"^{says}$")


class CalledServer(TodoServer):
    """The server without sockets: its handler is called. ``lines`` is its log."""

    log: Any

    def __init__(self) -> None:
        self.allowed_cns, self.stopping, self.store = ["mtls-client"], False, TodoStore()
        self.context: Any = None
        self.lines = list[str]()
        self.log = SimpleNamespace(write=lambda *lines: self.lines.extend(lines))

    def handler(self, name: str | None = "mtls-client") -> TodoHandler:
        """A handler of the requests of a client with this name."""
        connection = SimpleNamespace(client=Client(name, math.inf), evicted=False, tls=self)
        return TodoHandler(connection, ("127.0.0.1", 50000), self)

    def answers(self, *pieces: bytes, name: str | None = "mtls-client") -> list[Answer]:
        """The answers to what such a client sends in these pieces."""
        answers = []
        for response in responses(self.handler(name), pieces):
            file = io.BytesIO(response)
            answers.append(Answer(file, "HEAD" if response.endswith(b"\r\n\r\n") else "GET"))
            assert not file.read(), "nothing may follow an answer"
        return answers


def responses(handler: TodoHandler, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What a handler answers, request by request, to bytes that come in these pieces and then end."""
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
        """The status is this one, and the answer is like all of the server's: JSON, with the right length."""
        self.assertEqual(answer.status, status, f"the answer: {answer.body[:200]!r}")
        self.assertEqual(answer.headers.get_all("Content-Type"), ["application/json"])
        self.assertEqual(answer.headers.get("Allow"), "GET, HEAD, POST" if status == 405 else None)
        length, = answer.headers.get_all("Content-Length", [])
        if method == "HEAD":
            self.assertGreater(int(length), 0, "HEAD measures the body that it leaves out")
            self.assertEqual(answer.body, b"")
            return
        plain = json.dumps(answer.json, indent=2, ensure_ascii=False)
        form = CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", plain)
        self.assertEqual(answer.body.decode(), form + "\n", "a body is indented JSON in UTF-8 with a line end")
        if status >= 400:
            self.assertEqual(list(answer.json), ["error"])
            self.assertRegex(answer.json["error"], r"\w")

    def assert_kept(self, server: CalledServer, statuses: list[int]) -> None:
        """Each of these answers is in the log once, and those with 201 have added to the list."""
        logged = [int(line.split()[-2]) for line in server.lines if line.startswith("REQUEST |")]
        self.assertEqual(logged, statuses, "in the log")
        self.assertEqual(server.store.number - 5, statuses.count(201), "gained by the list")

    def assert_cases(self, cases: Iterable[Case], name: str = "mtls-client") -> None:
        """Each is answered and kept as it should be, and no part of it is taken for another request."""
        dice = random.Random(20)   # noqa: S311
        for case in cases:
            with self.subTest(f"{case.data[:200]!r} is answered with {case.status}"):
                server, method = CalledServer(), case.data.split(maxsplit=1)[0].decode("latin-1")
                answer, = server.answers(*torn(case.data, dice), name=name)
                self.assert_sound(answer, case.status, method)
                if case.says and method != "HEAD":
                    self.assertRegex(answer.json["error"], case.says)
                closes = answer.headers["Connection"] == "close"
                if case.closes is not None:
                    self.assertEqual(closes, case.closes, "whether the connection ends with this answer")
                self.assertIn(answer.headers["Connection"], ["close", "keep-alive" if b"/1.0" in case.data else None])
                self.assert_kept(server, [case.status])


class OneServerCase(HttpCase):
    """Its tests share one server, which must be unharmed after them all."""

    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(lab())
        cls.addClassCleanup(cls.server.__exit__)
        cls.addClassCleanup(lambda: cls("assert_unharmed").assert_unharmed(cls.server))


class TestRequests(HttpCase):
    """Which request gets which answer, and that it is logged once."""

    def test_cases(self) -> None:
        """Each request gets its answer, is logged once, and adds to the list only what it should."""
        self.assert_cases((*sound_cases(), *refused_cases()))

    def test_head_answers_as_get_without_the_body(self) -> None:
        """HEAD has the headers of GET, with the length of GET's body, for errors too."""
        for path in "/todo", "/nothing":
            got, measured = CalledServer().answers(request("GET", path), request("HEAD", path))
            for name in "Content-Length", "Content-Type", "Connection":
                self.assertEqual((got.status, got.headers[name]), (measured.status, measured.headers[name]))

    def test_request_lines_in_the_log(self) -> None:
        """It can be read one way only: quotes, spaces and control characters are escaped, and it has its length."""
        lines = {f"{beginning}{text}{FORGED}": "" for beginning in ("GET /", "", "BREW ") for text in NASTY}
        lines |= {'GET /todo HTTP/1.1" 200 -': "", "GET /todo" + " " * 100 + "HTTP/1.1": "", " " * 190: ""}
        sound = {'?"x" HTTP/1.1': r"?\x22x\x22 HTTP/1.1",
                 "?" + "x" * 181 + " HTTP/1.1": "?" + "x" * 181 + " HTTP/1.1",   # a line of 200 characters
                 "?" + "x" * 182 + " HTTP/1.1": "?" + "x" * 182 + " HTTP/1....",
                 "?" + "x" * 60_000 + " HTTP/1.1": "?" + "x" * 190 + "..."}
        lines |= {f"GET /todo{line}": f"GET /todo{shown}" for line, shown in sound.items()}
        for line, shown in lines.items():
            with self.subTest(f"{line[:60]!r} in the log"):
                server = CalledServer()
                server.answers(line.encode("latin-1") + b"\r\nHost: localhost\r\n\r\n")
                one = server.lines[0]
                self.assertRegex(one, r"^REQUEST \| peer=127\.0\.0\.1 \| cert-CN='mtls-client' \| "
                                      rf'"[ !#-~]{{,203}}" {200 if shown else 400} -$')
                found = one.split('"')[1]
                self.assertLessEqual(found.count(" "), 2, "more spaces than a request line has")
                if shown:
                    self.assertEqual(found, shown)
                elif not found.endswith("..."):   # then it says the whole
                    self.assertEqual(found.encode().decode("unicode_escape"), line)

    def test_a_bug_of_the_server(self) -> None:
        """A request that meets one is answered with 500, and the log says where the bug is; the connection ends."""
        server = CalledServer()
        server.store = None   # type: ignore[assignment]   # so do_GET raises an AttributeError
        answer, = server.answers(get() + get())
        self.assertEqual((answer.status, answer.headers["Connection"]), (500, "close"))
        self.assertRegex(server.lines[0], r"^ERROR \| peer=127\.0\.0\.1 \| AttributeError\(.*\) at server\.py:\d+$")

    def test_a_line_costs_no_more_than_its_bytes(self) -> None:
        """Even if they arrive one by one: each byte is searched for a line end only once."""
        class Received(bytearray):
            searched = 0

            def find(self, what: Any, start: Any = 0, end: Any = sys.maxsize) -> int:
                self.searched += min(end, len(self)) - start
                return super().find(what, start, end)

        for beginning in (b"GET /todo?", b"GET /todo HTTP/1.1\r\nHost: localhost\r\nX: "):
            handler = CalledServer().handler()
            handler.received = received = Received()
            data = beginning + b"x" * 50_000
            refusal, = responses(handler, (bytes([one]) for one in data))
            self.assertIn(b" 400 ", refusal[:13])
            self.assertIn(received.searched, range(len(data), 2 * len(data)))


# --- A second reading to compare with ------------------------------------------------------------

NAME = rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
EMPTY = rb"(?:\r?\n){0,8}"
FIELD = rb"(%b):([\t\x20-\x7e\x80-\xff]*)\r?\n" % NAME
HEAD = re.compile(rb"%b(%b) ([\x21-\x7e]+) HTTP/1\.([0-9])\r?\n((?:%b){0,100})\r?\n"
                  % (EMPTY, NAME, FIELD.replace(b"(", b"(?:")))
OTHER_VERSION = re.compile(rb"%b%b [\x21-\x7e]+ HTTP/[2-9]\.[0-9]\r?\n" % (EMPTY, NAME))
AUTHORITY = rb"(?:[a-z0-9._~!$&'()*+,;=%-]*|\[[0-9a-f:.]+\])(?::[0-9]*)?"

ITEM = todo(task="x")
Verdict = tuple[int, bool, bool]
"""How a request is answered: the status, whether the connection ends, and whether 100 Continue comes before."""


def reference(data: bytes, allowed: bool) -> list[Verdict]:
    """A second reading of RFC 9112, and of the order in which the server judges what a client sends."""
    verdicts: list[Verdict] = []
    while not (verdicts and verdicts[-1][1]) and not re.fullmatch(EMPTY + rb"\r?", data):
        found = HEAD.match(data)
        if not found:
            return [*verdicts, (505 if OTHER_VERSION.match(data) else 400, True, False)]
        method, target, minor, lines = found.groups()
        data = data[found.end():]
        fields = collections.defaultdict(list)
        for name, value in re.findall(FIELD, lines):
            fields[name.lower()].append(value.strip(b" \t"))
        hosts, codings, lengths = fields[b"host"], fields[b"transfer-encoding"], fields[b"content-length"]
        known = [host for host in hosts if re.fullmatch(AUTHORITY, host, re.IGNORECASE)]
        if hosts != known or len(hosts) not in ((0, 1) if minor == b"0" else (1,)):
            return [*verdicts, (400, True, False)]
        options = [option.strip(b" \t").lower() for option in b",".join(fields[b"connection"]).split(b",")]
        closes = b"close" in options or (minor == b"0" and b"keep-alive" not in options)
        numbers = {one.strip(b" \t") for one in b",".join(lengths).split(b",")} if lengths else set()
        sound = len(numbers) + bool(codings) < 2 and all(re.fullmatch(rb"[0-9]+", one) for one in numbers)
        size = int(min(numbers)) if sound and numbers else 0
        absolute = re.fullmatch(rb"https?://(?![/:])%b(/.*)" % AUTHORITY, target, re.IGNORECASE)
        types = [kind.partition(b";")[0].strip(b" \t").lower() for kind in fields[b"content-type"]]
        refused = [status for status, applies in (
            (403, not allowed),
            (404, (absolute[1] if absolute else target).partition(b"?")[0] != b"/todo"),
            (405, method in (b"PUT", b"DELETE")),
            (501, method not in (b"GET", b"HEAD", b"POST")),
            (400, not sound),
            (200, method != b"POST"),
            (415, types != [b"application/json"]),
            (411, not numbers),
            (413, size > MAX_BODY)) if applies]
        if refused:   # a body is not read, so it must not be taken for the next request
            has_body = bool(codings) or any(one != b"0" for one in lengths)
            verdicts.append((refused[0], closes or has_body or refused[0] == 411, False))
        else:
            go_ahead = minor != b"0" and [one.lower() for one in fields[b"expect"]][:1] == [b"100-continue"]
            complete = size <= len(data)
            verdicts.append((201 if complete and data[:size] == ITEM else 400, closes or not complete, go_ahead))
            data = data[size:]
    return verdicts


PARTS = {
    "before": ("|||\n|\r\n\n", "\r\n" * 8 + "|" + "\r\n" * 9),
    "method": ("GET|HEAD|POST|POST|POST|PUT", "DELETE|BREW|get|G(T|\xcbT|"),
    "space": (" ", "  |\t|"),
    "target": ("/todo|/todo?b=/c|http://a/todo?b|HTTPS://[::1]:1/todo",
               "/|/todo/|//todo|*|http:///todo|http://a|http://a@b/todo|http://:1/todo|/\xe9|/to do|/to\tdo|/\x00|"),
    "version": (" HTTP/1.1| HTTP/1.1| HTTP/1.0| HTTP/1.9",
                " HTTP/2.0| HTTP/3.1| HTTP/0.9| HTTP/11| HTTP/1| http/1.1| HTTP/\xb9.1| HTTP/1.-1| HTTP/+1.1|"
                " HTTP/1.1 x|  HTTP/1.1| |"),
    "end": ("\n", "\r|\r\r\n"),
    "Host": ("Host:|host: \t", "Host :|Hos:|"),
    "name": ("localhost|LOCALHOST:080|127.0.0.1:8443|[::1]|[::1]:8443|lab_1.example|a.b:1||:",
             'a b|a\tb|::1|[::1|[::1]x|[x y]|[g]|a/b|a?b|a#b|a@b|<a>|a\\b|"a"|\xe9|a, b|a:b|a:1:1|a:-1|http://a'),
    "type": ("Content-Type: application/json", "Content-Type: Application/JSON;x|Content-Type: text/plain|X: y|"
             "Content-Type: application/json\xa0"),
    "Length": ("Content-Length: \t|CONTENT-LENGTH:", "Transfer-Encoding: |X: |\xe9: "),
    "length": ("=|=|=|=\t|65537", "1=|12|65536|999999999999999999999999999999|-1|5, 5|5, 6|,5|,||00|+5|5 5|5;|5.0|5e0|"
               "0x5|1_0|five|\xb2|5\xa0|\xa05|5\x85"),
    "more": ("X: y|X:|Cookie: \xe9=\x80|Connection: keep-alive|Expect: 100-continue|Expect: 100-Continue",
             "X| X: y|\tX: y|X : y|X\t: y|: y|X Y: z|X(y): z|X: \x00|X: \x0b|X: \x7f|"
             "\rContent-Length: 1|Content-Length: 0|Content-Length: 1|Transfer-Encoding: x|Transfer-Encoding: chunked|"
             "Content-Type: application/json|Host: localhost|Connection: TE, Close|Connection: close\xa0"),
    "byte": ("", "\r|\n|\t| |:|,|;|/|?|\"|(|)|\x00|\x0b|\x1f|\x7f|\x85|\xa0|\xff|0|1|9|H|T|P|X|x|-|"),
}
"""The parts of a request: what they usually are, and what odd ones are. "=" is the length of its body."""


def grown(dice: random.Random) -> bytes:
    """A request of which at most two parts are odd."""
    odd = dice.sample(sorted(PARTS), dice.choice([0, 1, 1, 1, 2]))
    part = {name: dice.choice(choices[name in odd].split("|")) for name, choices in PARTS.items()}
    body = dice.choice([b"", ITEM, ITEM, HIDDEN] if part["method"] == "POST" else [b"", b"", b"", HIDDEN])
    fields = [part["Host"] + part["name"], part["type"]]
    if body or dice.randrange(2):
        fields.append(part["Length"] + part["length"].replace("=", str(len(body))))
    fields += [part["more"], *dice.choices(PARTS["more"][0].split("|"), k=2)][:dice.randrange(1, 4)]
    dice.shuffle(fields)
    lines = [part["before"] + part["method"] + part["space"] + part["target"] + part["version"], *fields, ""]
    ends = [part["end"], *["\n", "\r\n", "\r\n"] * 3]
    dice.shuffle(ends)
    data = bytearray("".join(map(str.__add__, lines, ends)).encode("latin-1") + body)
    if "byte" in odd:
        at = dice.randrange(len(data))
        data[at:at + dice.randrange(2)] = part["byte"].encode("latin-1")
    return bytes(data)


class TestReference(HttpCase):
    """Thousands of requests, most of them valid."""

    def test_same_verdicts(self) -> None:
        """Each is understood as by the reference, whether it comes whole, in pieces, or byte by byte."""
        dice, statuses = random.Random(18), collections.Counter[int]()   # noqa: S311
        answer = re.compile(rb"(HTTP/1\.1 100 Continue\r\n\r\n)?HTTP/1\.1 (\d+) ")
        for _ in range(2500):
            data = b"".join(grown(dice) for _ in range(dice.randrange(1, 4)))
            name = dice.choice(["mtls-client"] * 9 + ["mallory"])
            verdicts = reference(data, allowed=name == "mtls-client")
            statuses.update(status for status, *_ in verdicts)
            for pieces in ([data], torn(data, dice), [bytes([one]) for one in data]):
                server, said = CalledServer(), []
                for response in responses(server.handler(name), pieces):
                    found = answer.match(response)
                    assert found, response
                    said.append((int(found[2]), b"\r\nConnection: close\r\n" in response, bool(found[1])))
                self.assertEqual(said, verdicts, data)
                self.assert_kept(server, [status for status, *_ in verdicts])
        for status in 200, 201, 400, 403, 404, 405, 411, 413, 415, 501, 505:
            self.assertGreater(statuses[status], 5, statuses)


# --- Over connections ----------------------------------------------------------------------------

class TestConnections(OneServerCase):
    """Behaviour that involves TLS and waiting."""

    def test_requests_that_come_together(self) -> None:
        """Requests on one connection are answered in order."""
        cases = [case for case in sound_cases() if not case.closes]
        with Talk(self.server.connect()) as talk:
            talk.send(b"".join(case.data for case in cases) + get("Connection: close"))
            for case in cases:
                method = case.data.split()[0].decode()
                self.assert_sound(talk.answer(method), case.status, method)
            self.assert_sound(talk.answer(), 200)
            self.assert_ends_well(talk)

    def test_a_request_that_ends_too_early(self) -> None:
        """A peer that ends in the middle of a request gets 400, and nothing is stored."""
        ends: dict[str, Callable[[Wire], object]] = {
            "TCP's end": lambda wire: wire.plain.shutdown(socket.SHUT_WR),
            "close_notify": lambda wire: wire.plain.sendall(wire.bytes_of(wire.tls.unwrap)),
        }
        begun = (b"GET /todo HT", get()[:-2], get(JSON, "Content-Length: 20", line=POST) + todo(task="never"))
        for (by, end), beginning in itertools.product(ends.items(), (b"", b"\r\n", *begun)):
            with self.subTest(f"{by} after {beginning!r}"), Wire(self.server) as wire:
                wire.shake_hands()
                wire.send(beginning)
                end(wire)
                heard = wire.hear()
                for told in b"HTTP/", b"HTTP/1.1 400 ", b"\r\nConnection: close\r\n":
                    self.assertEqual(heard.count(told), beginning in begun, heard)
        with Talk(self.server.connect()) as talk:
            self.assertNotIn(b"never", talk.ask("GET", "/todo").body)

    def test_a_refusal_is_heard_by_a_client_that_is_still_sending(self) -> None:
        """A client that sends all of its large request before it reads finds the answer, not a reset."""
        large = b"x" * 8_000_000
        length = f"Content-Length: {len(large)}"
        refused = {413: get(JSON, length, line=POST), 200: get(length), 431: b"GET /todo HTTP/1.1\r\nX: "}
        for (status, data), version in itertools.product(refused.items(), TLS_VERSIONS):
            with (self.subTest(f"a client that sends {data!r} and 8 MB reads {status}", on=version.name),
                  Talk(self.server.connect(context=self.server.context(maximum_version=version))) as talk):
                talk.send(data)
                talk.send(large)
                self.assert_sound(talk.answer(), status)
                self.assert_ends_well(talk)
