"""The server (server/server.py): TLS settings, who may use it, the TODO list, the log, start and stop."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import re
import resource
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import (
    PATIENCE,
    Output,
    Server,
    Talk,
    comes_true,
    environment,
    issue,
    lab,
    new_folder,
    openssl,
    other_lab,
    request,
    side_by_side,
)
from tests.test_strict_http import FORGED, NASTY, TLS_VERSIONS, CalledServer, Case, HttpCase, OneServerCase, get, todo


def sign_again(name: str, pattern: bytes, replacement: bytes) -> None:
    """Replace bytes in a certificate of the shared lab, as no openssl would write them, and let the CA sign it."""
    file, tbs, signature = lab().certs / f"{name}.crt", new_folder("sign") / "tbs", new_folder("sign") / "signature"
    der, count = re.subn(pattern, replacement, ssl.PEM_cert_to_DER_cert(file.read_text()), flags=re.DOTALL)
    assert count == 1
    end = 8 + int.from_bytes(der[6:8], "big")   # Certificate: 30 82 length, tbsCertificate: 30 82 length
    tbs.write_bytes(der[4:end])
    openssl("dgst", "-sha256", "-sign", lab().certs / "ca.key", "-out", signature, tbs)
    signed = signature.read_bytes()
    file.write_text(ssl.DER_cert_to_PEM_cert(der[:-len(signed)] + signed))


def has_ipv6() -> bool:
    """Whether this machine can be reached by IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


class TestTLS(OneServerCase):
    """What the server's TLS settings accept and refuse."""

    def test_versions_and_ciphers(self) -> None:
        """TLS 1.2 and 1.3 with forward secrecy and AEAD; no CBC, HTTP/1.1 by ALPN, no tickets in TLS 1.3."""
        for cipher, accepted in {"": True, "ECDHE-RSA-AES128-GCM-SHA256": True, "ECDHE-RSA-CHACHA20-POLY1305": True,
                                 "ECDHE-RSA-AES256-SHA384": False, "DHE-RSA-AES256-GCM-SHA384": False,
                                 "AES256-GCM-SHA384": False}.items():
            with self.subTest(cipher or "TLS 1.3"):
                context = lab().context(maximum_version=TLS_VERSIONS[not cipher])
                context.set_alpn_protocols(["h2", "http/1.1"])
                if cipher:
                    context.set_ciphers(cipher)
                if not accepted:
                    self.assertRaises(ssl.SSLError, self.server.connect, context=context)
                    continue
                with Talk(self.server.connect(context=context)) as talk:
                    self.assertEqual(talk.connection.selected_alpn_protocol(), "http/1.1")
                    self.assertEqual(talk.ask("GET", "/todo").status, 200)
                    session = talk.connection.session
                self.assertFalse(not cipher and session is not None and session.has_ticket)
        self.server.stderr.wait_for("no shared cipher")

    def test_nothing_older_than_tls_1_2(self) -> None:
        """A ClientHello of TLS 1.1 is answered with the alert protocol_version, not with one about its suites."""
        hello = b"\x03\x02" + b"x" * 32 + b"\x00\x00\x04\x00\x2f\x00\xff\x01\x00"
        with self.server.connect_plain() as plain:
            plain.sendall(b"\x16\x03\x01\x00\x2f\x01\x00\x00\x2b" + hello)
            self.assertRegex(plain.recv(100), rb"^\x15\x03.\x00\x02\x02\x46")

    def test_no_renegotiation(self) -> None:
        """A TLS 1.2 client that asks to renegotiate is refused."""
        certs = lab().certs
        result = subprocess.run(
            ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{self.server.port}", "-CAfile", certs / "ca.crt",
             "-cert", certs / "client.crt", "-key", certs / "client.key"], input="R\n", capture_output=True, text=True,
            env=environment(), check=False, timeout=PATIENCE)
        self.assertRegex(result.stdout + result.stderr, "(?i)no.renegotiation")

    def test_only_certificates_of_our_ca_are_trusted(self) -> None:
        """All others are refused in the handshake and learn why, including those from a CA the system trusts."""
        none = "peer did not return a certificate"
        unknown = r"client certificate refused: [a-z ]+; no CA in ca.crt has signed it"
        foreign = lab().context(None)
        foreign.load_cert_chain(other_lab().certs / "client.crt", other_lab().certs / "client.key")
        cases = ((lab().context(None), "CERTIFICATE_REQUIRED", none),
                 (lab().context(None, maximum_version=TLS_VERSIONS[0]), "HANDSHAKE_FAILURE", none),
                 (foreign, "(?i)UNKNOWN.CA", unknown))
        with self.serving(env={"SSL_CERT_FILE": str(other_lab().certs / "ca.crt")}) as server:
            for number, (context, alert, reason) in enumerate(cases, 1):
                with (self.subTest(alert), self.assertRaisesRegex(ssl.SSLError, alert),
                      Talk(server.connect(context=context)) as talk):
                    talk.ask("GET", "/todo")
                self.assertRegex(server.stderr.wait_for(has_lines(number))[-1],
                                 rf"^\[SERVER\] REJECTED \| peer=127\.0\.0\.1 \| {reason}$")


class TestWhoMayComeIn(HttpCase):
    """Authorization: which of our CA's clients are served."""

    seconds = 9

    def test_allowed_names(self) -> None:
        """--allow-cn replaces the list, and overrides MTLS_ALLOWED_CNS; both take several names."""
        two = "client mallory"
        cases: list[tuple[list[str], dict[str, str | None], str]] = [
            (["--allow-cn", "mtls-client", "mallory"], {}, two),
            (["--allow-cn", "mtls-client,mallory"], {}, two),
            (["--allow-cn", "mallory", "--allow-cn", "mtls-client"], {}, two),
            (["--allow-cn", "two words, mallory"], {}, "two-words mallory"),
            (["--allow-cn", "mallory"], {"MTLS_ALLOWED_CNS": "mtls-client"}, "mallory"),
            ([], {"MTLS_ALLOWED_CNS": "mallory, other"}, "mallory"),
            ([], {"MTLS_ALLOWED_CNS": "mtls-client mallory"}, two),
            ([], {"MTLS_ALLOWED_CNS": ""}, "client"),
        ]
        issue(lab(), "two-words", "/CN=two words")
        for arguments, env, admitted in cases:
            with self.subTest(arguments=arguments, env=env), Server(lab(), *arguments, env=env) as server:
                for certificate in "client", "mallory", "two-words":
                    with Talk(server.connect(certificate)) as talk:
                        self.assert_sound(talk.ask("GET", "/todo"), 200 if certificate in admitted.split() else 403)

    def test_a_certificate_needs_exactly_one_common_name(self) -> None:
        """None, two, another spelling, or one that nobody can read: 403, logged so that nothing can be forged."""
        certificates = {
            "no common name": ("/O=mtls-client", None),
            "two common names": ("/CN=mtls-client/CN=mallory", None),
            "the same common name twice": ("/CN=mtls-client/CN=mtls-client", None),
            "a common name in capitals": ("/CN=MTLS-CLIENT", "MTLS-CLIENT"),
            "a common name with a space behind it": ("/CN=mtls-client ", "mtls-client "),
            "a common name with a line end": ("/CN=x\n[SERVER] FORGED | y", "x\n[SERVER] FORGED | y"),
            "a common name that a shell would run": ("/CN=a'$(id)b", "a'$(id)b"),
            "a common name that is a sequence": ("/CN=\x0c\x03abc", None),
            "a SAN that is not UTF-8": ("/CN=mtls-client", None),
        }
        for what, (subject, _) in certificates.items():
            issue(lab(), what, subject, "extendedKeyUsage = clientAuth\nsubjectAltName = email:a@example.org\n"
                                        "nsComment = " + "x" * 200)   # so that the length of all takes two bytes
        sign_again("a common name that is a sequence", rb".(\x05\x0c\x03abc)", rb"0\1")   # "0" is the tag of SEQUENCE
        sign_again("a SAN that is not UTF-8", rb"a@(example\.org)", b"\xff@\\1")
        with self.serving() as server:
            for number, (what, (_, name)) in enumerate(certificates.items(), 1):
                with self.subTest(f"a certificate with {what} is forbidden"), Talk(server.connect(what)) as talk:
                    answer = talk.ask("GET", "/todo")
                    self.assert_sound(answer, 403)
                    self.assertEqual(answer.json["error"],
                                     f"client certificate: CN {name!r} is not in the allowed list")
                    line = server.stderr.wait_for(has_lines(2 * number))[-2:]
                    typed = name is not None and name.isprintable()   # what a shell takes as this name, and no more
                    admit = f"; to admit: --allow-cn {shlex.join(['mtls-client', name])}" if name and typed else ""
                    self.assertEqual(line, [
                        f"[SERVER] REQUEST | peer=127.0.0.1 | cert-CN={name!r} | \"GET /todo HTTP/1.1\" 403 -",
                        f"[SERVER] FORBIDDEN | CN={name!r} | not in the allowed list{admit}"])

    def test_an_expired_certificate(self) -> None:
        """It gets no answer in a resumed session or a kept connection, where TLS does not look at the dates again."""
        end = int(time.time()) + 6
        dates = [time.strftime("%Y%m%d%H%M%SZ", time.gmtime(when)) for when in (end - 3600, end)]
        issue(lab(), "short-lived", "/CN=mtls-client", "extendedKeyUsage = clientAuth", *dates)
        old = lab().context("short-lived", maximum_version=TLS_VERSIONS[0])
        with self.serving() as server, Talk(server.connect(context=old)) as kept:
            self.assertEqual(kept.ask("GET", "/todo").headers["Connection"], None)
            self.assertTrue(comes_true(lambda: time.time() > end + 0.1))
            resuming = old.wrap_socket(server.connect_plain(), server_hostname="127.0.0.1",
                                       session=kept.connection.session, suppress_ragged_eofs=False)
            with Talk(resuming) as resumed:
                self.assertTrue(resuming.session_reused)
                for talk in (kept, resumed):
                    answer = talk.ask("GET", "/todo")
                    self.assert_sound(answer, 403)
                    self.assertEqual(answer.json["error"], "client certificate: has expired")
                    self.assertEqual(answer.headers["Connection"], "close")
                    self.assert_ends_well(talk)
            lines = server.stderr.wait_for(has_lines(6))
            self.assertEqual([line for line in lines if "FORBIDDEN" in line],
                             ["[SERVER] FORBIDDEN | CN='mtls-client' | its certificate has expired"] * 2)
            with (self.assertRaisesRegex(ssl.SSLError, "(?i)certificate.expired"),
                  Talk(server.connect("short-lived")) as new):
                new.ask("GET", "/todo")


def has_lines(number: int) -> Callable[[list[str]], bool]:
    """Whether there are this many."""
    return lambda lines: len(lines) >= number


def refusal_cases() -> Iterator[Case]:
    """Which rule an answer names, in the order in which they are judged; `reference` has more of it."""
    for path in ("/", "/todo/", "/TODO", "/nothing?/todo", "//localhost/todo", "*", "https://localhost:8443/nothing"):
        for method in "GET", "HEAD", "POST", "PUT", "BREW":
            yield Case(request(method, path, b"{"), 404, says="^path: ")
    for method in ("PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
        yield Case(request(method, "/todo", b"{", Content_Length="x"), 405, says="^method: must be GET, HEAD or POST$")
    for method in ("BREW", "get", "GETT", "__class__", "M-SEARCH"):
        yield Case(request(method, "/todo", b"{", Content_Length="x"), 501, says="^method: is unknown$")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json",
                 "application/jsonx", "application/json-patch+json", "application/json/x", "text/json", "*/*",
                 "text/plain; application/json", "text/plain, application/json"):   # browsers can be made to
        for length in "1", "65537":
            yield Case(request("POST", "/todo", b"{", Content_Type=kind, Content_Length=length, Expect="100-continue"),
                       415, True, "^header: must be Content-Type: application/json$")
    for kinds in ["text/plain", "application/json"], ["application/json", "text/plain"], []:
        fields = [f"Content-Type: {kind}" for kind in kinds]
        yield Case(get(*fields, "Content-Length: 13", line="POST /todo HTTP/1.1") + todo(task="x"), 415, True)
    for kind in ("application/json; charset=utf-8", "Application/JSON", 'application/json;charset="utf-8"'):
        yield Case(request("POST", "/todo", todo(task="x"), Content_Type=kind), 201, closes=False)
    yield Case(request("POST", "/todo", b"{" * 65_537), 413, True)


def validation_cases() -> Iterator[Case]:
    """Bodies that are not a TODO item: 400 names the field and the rule."""
    lists, many = b"[" * 100 + b"1" + b"]" * 100, b'{"task": "x", "other": %s}'
    bodies: dict[str, list[bytes]] = {
        "body: .*JSON": [
            b"", b"{", b'{"task": "x"} x', b"{'task': 'x'}", b'{"task": "a\nb"}', b"task=x",
            b'\xef\xbb\xbf{"task": "x"}', many % b"NaN", many % b"[-Infinity]", many % (b"1" * 10_000)],
        "body: .*UTF-8": [
            '{"task": "Añadir"}'.encode("latin-1"), '{"task": "x"}'.encode("utf-16"), b'{"task": "\xed\xa0\x80"}'],
        "^body: nested more than 100 levels deep$": [
            b"[" * 65_000, b"[" * 30_000 + b"]" * 30_000, b'{"a":' * 10_000,
            *(b'{"task": %s, "other": %s}' % (task, lists) for task in (b'"x"', rb'"\""', rb'"\\"', b'"]"'))],
        "^body: .*twice": [
            b'{"task": "a", "task": "evil"}', rb'{"task": "a", "t\u0061sk": "evil"}', many % b'[{"x": 1, "x": 1}]'],
        "body: .*object": [b'[{"task": "x"}]', b'"task"', b"1", b"null"],
        "task: .*non-empty": [todo(done=True), todo(Task="x"), todo(task=""), todo(task="  \t\r\n\u2003")],
        "task: .*1,?000": [todo(task="x" * 1001)],
        "task: .*surrogate": [rb'{"task": "\ud800"}', rb'{"task": "a\udfffb"}', rb'{"task": "\udc00\ud800"}'],
        "task: .*string": [b'{"task": %s}' % value for value in (b"null", b"true", b"1", b"[]", b'["x"]', b"{}")],
        "done: .*true or false": [b'{"task": "x", "done": %s}' % value
                                  for value in (b"null", b"0", b"1", b'"true"', b'""', b"[]", b"{}")],
    }
    for says, wrong in bodies.items():
        for body in wrong:
            yield Case(request("POST", "/todo", body), 400, closes=False, says=says)


class TestEndpoints(HttpCase):
    """GET and POST /todo, and nothing else."""

    def test_cases(self) -> None:
        """Each request gets its answer, is logged once, and adds to the list only what it should."""
        self.assert_cases((*refusal_cases(), *validation_cases()))

    def test_who_is_not_on_the_list(self) -> None:
        """It gets 403 whatever the request is, if it can be read."""
        cases = (get(), request("POST", "/todo", todo(task="x")), *(case.data for case in refusal_cases()))
        self.assert_cases((Case(data, 403, says="CN .mallory. is not in the") for data in cases), "mallory")
        self.assert_cases([Case(get("x"), 400, True), Case(b"hello\r\n\r\n", 400, True)], "mallory")

    def test_items_that_are_accepted(self) -> None:
        """A POST answers with the item as it is on the list from then on."""
        items: tuple[dict[str, Any], ...] = (
            {"task": "Añadir endpoint POST"}, {"task": "  x \n"},
            {"task": "x", "done": True}, {"task": "x", "done": False},
            {"task": "\U0001f600" * 1000},   # 4,000 bytes
            {"task": "".join(map(chr, (*range(0x100), *range(0x2020, 0x2070), 0xfeff)))},
            {"task": '{"task": "\\"}'}, {"task": '\\"' + "[" * 500 + "{" * 498},
            {"task": "x", "id": 1, "other": ["y"], "Done": "z"},
            {"task": "x", "other": json.loads("[" * 99 + "]" * 99)},   # 100 levels
            {"task": "x", "other": [[]] * 1000},
        )
        server = CalledServer()
        for item, ascii_only in itertools.product(items, (True, False)):
            with self.subTest(f"{str(item)[:80]} is stored as given", escaped=ascii_only):
                body = json.dumps(item, ensure_ascii=ascii_only).encode()
                before, answer, after = server.answers(get(), request("POST", "/todo", body), get())
                self.assert_sound(answer, 201)
                known = before.json["todos"]
                stored = {"id": len(known) + 1, "task": item["task"], "done": item.get("done", False)}
                self.assertEqual(answer.json, {"client": "mtls-client", "message": "TODO item created", "todo": stored})
                self.assert_sound(after, 200)
                self.assertEqual(after.json["todos"], [*known, stored])

    def test_a_full_list(self) -> None:
        """The 1,001st item is refused with 507 that says so, after all other checks; the list is still served."""
        post = request("POST", "/todo", todo(task="one of many"))
        *created, full, empty, listing = CalledServer().answers(
            *[post] * 996, request("POST", "/todo", todo(task="")), get())
        self.assertEqual({answer.status for answer in created}, {201})
        self.assert_sound(full, 507)
        self.assertRegex(full.json["error"], "full.*1,?000")
        self.assert_sound(empty, 400)
        self.assertEqual([(item["id"], item["task"]) for item in listing.json["todos"][5:]],
                         [(number, "one of many") for number in range(6, 1001)])


class TestLog(HttpCase):
    """What the server writes to stderr."""

    seconds = 6

    def test_the_lines_of_each_request(self) -> None:
        """As the description shows them: 200 and 201 have their lines (for 403 see above), all else REQUEST alone.

        Where ñ cannot be shown, the log has an escape instead.
        """
        serving = "AUTHENTICATED | CN='mtls-client' | serving /todo"
        script: tuple[tuple[str, str, bytes | None, int, list[str]], ...] = (
            ("POST", "/todo", todo(task="Añadir endpoint POST"), 201, [
                "AUTHENTICATED | CN='mtls-client' | creating TODO",
                "TODO CREATED | CN='mtls-client' | item={'id': 6, 'task': 'Añadir endpoint POST', 'done': False}"]),
            ("GET", "/todo", None, 200, [serving]),
            ("GET", "/todo?x=%20y", None, 200, [serving]),
            ("HEAD", "/todo", None, 200, [serving]),
            ("GET", "/nothing", None, 404, []),
            ("DELETE", "/todo", None, 405, []),
            ("POST", "/todo", b"{", 400, []),
            ("BREW", "/todo", None, 501, []),
        )
        expected = [f"[SERVER] {line}" for method, path, _, status, more in script for line in (
            f"REQUEST | peer=127.0.0.1 | cert-CN='mtls-client' | \"{method} {path} HTTP/1.1\" {status} -", *more)]
        for env, letter in (({"LC_ALL": "C"}, "ñ"), ({"PYTHONIOENCODING": "ascii"}, r"\xf1")):
            with self.subTest(env), self.serving(env=env) as server:
                with Talk(server.connect()) as talk:
                    for method, path, body, *_ in script:
                        talk.ask(method, path, body)
                self.assertEqual(server.stderr.wait_for(has_lines(len(expected))),
                                 [one.replace("ñ", letter) for one in expected])

    def test_no_peer_can_forge_a_line_or_drive_a_terminal(self) -> None:
        """Control characters are escaped in a task and in a name (for request lines see test_strict_http)."""
        name = "nasty\r\n" + FORGED + "\x1b[2J\x9b\u202e\u2028|"
        bad = (*NASTY, "\n", "\r\n", "\u2028", "\u2029", "\u202e", "\ufeff", "\U000e0001")
        server = CalledServer()
        server.allowed_cns.append(name)
        for client, text in itertools.product(("mtls-client", name), bad):
            answer, = server.answers(request("POST", "/todo", todo(task=f"a{text}{FORGED}")), name=client)
            self.assert_sound(answer, 201)
        self.assertEqual(len(server.lines), 6 * len(bad), "there should be no line more")
        for line in server.lines:
            self.assertRegex(line, r"^(REQUEST|AUTHENTICATED|TODO CREATED) \| ")
            self.assertTrue(line.isprintable(), f"a control character is in {line!r}")

    def test_64_clients_at_once(self) -> None:
        """Of two names, and POSTs and GETs mixed: all see one list with ids without gaps, and log lines stay whole."""
        clients, rounds = 64, 5
        start = threading.Barrier(clients)

        def work(number: int) -> list[int]:
            certificate, name = (("client", "mtls-client"), ("mallory", "mallory"))[number % 2]
            ids: list[int] = []
            with Talk(server.connect(certificate)) as talk:
                start.wait(PATIENCE)
                for _ in range(rounds):
                    ids.append(talk.ask("POST", "/todo", todo(task=f"{number}. " + "x" * 900)).json["todo"]["id"])
                    answer = talk.ask("GET", "/todo").json
                    self.assertEqual(answer["client"], name)
                    todos = answer["todos"]
                    self.assertEqual([item["id"] for item in todos], list(range(1, len(todos) + 1)))
                    self.assertEqual([item["id"] for item in todos if item["task"].startswith(f"{number}.")], ids)
            return ids

        with self.serving("--allow-cn", "mtls-client", "mallory") as server:
            with ThreadPoolExecutor(clients) as pool:
                ids = [one for result in pool.map(work, range(clients)) for one in result]
            self.assertEqual(sorted(ids), list(range(6, 6 + clients * rounds)))
            lines = server.stderr.wait_for(has_lines(clients * rounds * 5))
            words = " ".join(line.split(" | ")[0].removeprefix("[SERVER] ") for line in lines)
            self.assertEqual(re.sub("REQUEST AUTHENTICATED( TODO CREATED)? ?", "", words), "", "an entry stays whole")

    def test_it_keeps_up(self) -> None:
        """No entry of 64 clients is dropped if the log is read, even if each 4 KB take a moment, as in a terminal."""
        clients, rounds = 64, 40
        reader, writer = os.pipe2(os.O_DIRECT) if sys.platform == "linux" else os.pipe()
        with Server(lab(), stderr=writer) as server, contextlib.ExitStack() as held:
            os.close(writer)
            log = Output(os.fdopen(reader, "rb"), lambda _: time.sleep(0.0005))
            talks = [held.enter_context(Talk(server.connect())) for _ in range(clients)]
            for turn in range(rounds + 1):
                for talk in talks:
                    if turn > 0:   # not parsed: the server must be what is slow
                        self.assertEqual(talk.connection.recv(65536)[:12], b"HTTP/1.1 200")
                    if turn < rounds:
                        talk.send(request("GET", "/todo"))
            self.assertEqual(server.stop(), 0)
        said = collections.Counter(line.split(" | ")[-1] for line in log.all())
        self.assertEqual(said, dict.fromkeys(('"GET /todo HTTP/1.1" 200 -', "serving /todo"), clients * rounds))

    def ask_unread(self, server: Server, talk: Talk, requests: int, status: int = 200) -> None:
        """Nobody reads the log while so many requests are answered; each has its number."""
        server.stderr.reading.clear()
        for first in range(0, requests, 100):
            talk.send(b"".join(request("GET", f"/todo?n={n}") for n in range(first, first + 100)))
            self.assertEqual({talk.answer().status for _ in range(100)}, {status})

    def assert_logged_or_counted(self, lines: list[str], requests: int, at_least: int) -> None:
        """Entries are whole and in order; those that are not there are counted exactly."""
        numbers = [int(found) for line in lines for found in re.findall(r"n=(\d+) HTTP", line)]
        self.assertEqual(numbers, sorted(set(numbers)), "what is logged stands in its order")
        self.assertIn(len(numbers), range(at_least, requests), "the queue has its length, and the pipe has an end")
        dropped = re.findall(r"\[SERVER\] LOG \| (\d+) entries dropped: .* not read fast enough", "\n".join(lines))
        self.assertEqual(len(numbers) + sum(map(int, dropped)), requests)
        for line, following in zip(lines, [*lines[1:], "serving"], strict=True):
            self.assertTrue("REQUEST" not in line or "serving" in following, "an entry is logged or dropped whole")

    def test_a_log_that_nobody_reads(self) -> None:
        """Nobody waits for its reader: requests and handshakes go on, and what was dropped is counted exactly."""
        with self.serving() as server, Talk(server.connect()) as talk:
            self.ask_unread(server, talk, 3000)
            with Talk(server.connect()) as other:
                self.assertEqual(other.ask("GET", "/todo?n=3000").status, 200)
            server.stderr.reading.set()
            server.stderr.wait_for("LOG | ")
            self.assertEqual(talk.ask("GET", "/todo?last").status, 200)
            self.assert_logged_or_counted(server.stderr.wait_for("/todo?last"), 3001, at_least=1000)

    def test_a_long_name_and_a_log_that_nobody_reads(self) -> None:
        """A name in the log has 200 characters at most: what waits to be written is small, whatever a CA has signed."""
        issue(lab(), "long name", "/description=" + "x" * 50_000)   # as CN, openssl would refuse it
        sign_again("long name", rb"\x06\x03\x55\x04\x0d", b"\x06\x03\x55\x04\x03")
        with self.serving() as server, Talk(server.connect("long name")) as talk:
            before = server.peak_memory()
            self.ask_unread(server, talk, 2500, status=403)   # more than wait in the queue, the pipe and the writer
            self.assertLess(server.peak_memory() - before, 10)
            server.stderr.reading.set()
            for line in server.stderr.wait_for("LOG | "):
                self.assertLess(len(line), 700)
                self.assertTrue("CN" not in line or f"CN='{'x' * 200}'... |" in line, line)

    def test_stop_with_a_log_that_nobody_reads(self) -> None:
        """It ends in time, even if stdout is the same stuck pipe and a request is running."""
        for stderr in (subprocess.PIPE, subprocess.STDOUT):
            with (self.subTest(stderr=stderr),
                  Server(lab(), stderr=stderr, constants={"event_loop.STOP_SECONDS": 1.0}) as server,
                  Talk(server.connect()) as talk):
                self.ask_unread(server, talk, 2000)
                talk.begin_post()
                started = time.monotonic()
                self.assertEqual(server.stop(), 0)
                self.assertLess(time.monotonic() - started, 10, "it should wait for the request, and not much longer")

    def test_stop_with_a_log_that_is_read_at_last(self) -> None:
        """Waiting entries are written and dropped ones counted, even if the log is read after the last client left.

        A short queue, so that all can be read in the second that it then takes to end.
        """
        with Server(lab(), constants={"log.MAX_ENTRIES": 100}) as server:
            with Talk(server.connect()) as talk:
                self.ask_unread(server, talk, 2000)
                server.process.send_signal(signal.SIGTERM)
                self.assert_ends_well(talk)
            with self.assertRaises(subprocess.TimeoutExpired, msg="it should wait for a reader"):
                server.process.wait(0.3)
            server.stderr.reading.set()
            self.assertEqual(server.process.wait(PATIENCE), 0)
            self.assert_logged_or_counted(server.stderr.all(), 2000, at_least=100)


class TestStart(HttpCase):
    """What it says when it starts, and a server that cannot start says in one line what to do."""

    def test_greeting_and_end(self) -> None:
        """As the description shows them. The address that it prints can be reached and verified; IPv6 has brackets."""
        for host, connect_to, number in (
                ("127.0.0.1", "127.0.0.1", signal.SIGTERM), ("::1", "::1", signal.SIGINT),
                ("0.0.0.0", "127.0.0.1", signal.SIGINT), ("::", "::1", signal.SIGTERM)):
            with self.subTest(host):
                if ":" in host and not has_ipv6():
                    self.skipTest("this machine has no IPv6")
                with Server(lab(), "--host", host) as server:
                    shown = f"[{host}]" if ":" in host else host
                    lines = [f"[SERVER] mTLS server listening on https://{shown}:{server.port}",
                             "[SERVER] Requiring client cert signed by: ca.crt", "[SERVER] Press Ctrl+C to stop."]
                    if host in ("0.0.0.0", "::"):
                        lines.insert(-1, line := server.stdout.now()[-2])
                        self.assertRegex(line, r"^\[SERVER\] On this machine, clients connect to: https://\S+:\d+$")
                        url = urlsplit(line.rpartition(" ")[2])
                        self.assertEqual(url.port, server.port)
                        with (server.connect_plain(host=url.hostname or "") as plain,
                              lab().context().wrap_socket(plain, server_hostname=url.hostname)):
                            pass
                    with Talk(lab().context().wrap_socket(server.connect_plain(host=connect_to),
                                                          server_hostname="localhost")) as talk:
                        self.assertEqual(talk.ask("GET", "/todo").status, 200)
                    server.stderr.wait_for(f"peer={connect_to} |")
                    self.assertEqual(server.stop(number), 0)
                    self.assertEqual(server.stdout.all(), [*lines, "[SERVER] Stopped."])

    def test_settings(self) -> None:
        """Invalid settings exit with 2; a busy port, and a host that is invalid or not ours, with 1."""
        unused: dict[str, str | None] = {"MTLS_SERVER_PORT": "banana", "MTLS_SERVER_HOST": "192.0.2.1"}   # flags win
        with Server(lab(), "--host", "127.0.0.1", "--port", "0", env=unused) as server:
            busy = ("(address already in use); stop the program that uses this port, or use another one, in both "
                    "terminals: export MTLS_SERVER_PORT=8444")
            cases: list[tuple[list[str], dict[str, str | None], int, str]] = [
                *(([flag, value], {}, 2, f"argument {flag}") for flag, value in (
                    ("--port", "banana"), ("--port", "99999"), ("--port", "-1"), ("--port", ""), ("--host", ""),
                    ("--allow-cn", ""), ("--allow-cn", "a,,b"))),
                (["--allow-cn"], {}, 2, ""), (["--nonsense"], {}, 2, ""), (["extra"], {}, 2, ""),
                ([], {"MTLS_ALLOWED_CNS": ","}, 2, "MTLS_ALLOWED_CNS"),
                ([], {"MTLS_SERVER_PORT": "banana"}, 2, "MTLS_SERVER_PORT: 'banana' is not a port (0 to 65535)"),
                *((["--port", "0", "--host", host], {}, 1, "--host") for host in (
                    "no.such.host.invalid", "999.1.1.1", "192.0.2.1", "a" * 70, "2001:db8::1")),
                (["--port", "0"], {"MTLS_SERVER_HOST": "192.0.2.1"}, 1, "--host"),
                (["--port", str(server.port)], {"MTLS_SERVER_PORT": "0"}, 1, busy),
                ([], {"MTLS_SERVER_PORT": str(server.port)}, 1, busy),
            ]
            results = side_by_side(lambda case: lab().run("server/server.py", *case[0], env=case[1]), cases)
            for (arguments, env, code, words), result in zip(cases, results, strict=True):
                with self.subTest(arguments=arguments, env=env):
                    self.assertEqual((result.returncode, result.stdout), (code, ""))
                    self.assertIn(words if code == 1 else f"server.py: error: {words}", result.stderr)
                    self.assertRegex(result.stderr, r"\A\[SERVER\] ERROR: [^\n]+\n\Z" if code == 1 else r"\Ausage: ")
            self.assert_served(server)

    def test_reader_that_leaves(self) -> None:
        """A server whose output's reader has left ends without a traceback."""
        script = f'"{sys.executable}" "{lab().root}/server/server.py" --port 0 & echo $! >&2; wait $!; echo $? >&2'
        with subprocess.Popen(["sh", "-c", script], env=environment(), stdin=subprocess.DEVNULL, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            pid = int(process.stderr.readline())
            self.assertIn("listening", process.stdout.readline())
            process.stdout.close()
            os.kill(pid, signal.SIGTERM)
            self.assertEqual(process.stderr.read(), "0\n")

    @unittest.skipUnless(sys.platform == "linux", "needs /proc")
    def test_threads(self) -> None:
        """It needs two, and no more to stop: a system that gives no more of them cannot harm it."""
        with Server(lab()) as server, contextlib.ExitStack() as held:
            self.assertEqual(server.has("task"), 2)
            if os.getuid():   # root has no such limit
                resource.prlimit(server.process.pid, resource.RLIMIT_NPROC, (1, 1))
            for _ in range(50):
                talk = held.enter_context(Talk(server.connect()))
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
            self.assertEqual(server.has("task"), 2)
            self.assertEqual(server.stop(), 0)
        self.assertEqual([line for line in server.stderr.now() if not line.startswith("[SERVER] ")], [])

    def test_second_ctrl_c(self) -> None:
        """It says what it waits for; a second Ctrl+C ends it at once. (For a single one, see test_connections.)"""
        with Server(lab()) as server, Talk(server.connect()) as talk:
            talk.begin_post()
            server.process.send_signal(signal.SIGINT)
            self.assertEqual(server.stdout.wait_for("Waiting")[-1],
                             "[SERVER] Waiting for running requests, 5 s at most; Ctrl+C again ends at once.")
            self.assertEqual(server.stop(signal.SIGINT), 1)
