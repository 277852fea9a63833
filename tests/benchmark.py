"""Benchmark that compares the lab's server with others: python3 tests/benchmark.py (4 minutes)

    ours      server/server.py
    theirs    the server of another checkout: --against FOLDER
    nginx     ssl_verify_client on, one worker, an access log, a fixed body (if it is installed)
    uvicorn   with uvloop and httptools, an access log, a fixed body (if uvicorn[standard] is installed)
    bare      a loop around `ssl` that sends fixed bytes and knows no HTTP: what TLS costs in Python
    plain     BaseHTTPRequestHandler with its defaults: HTTP/1.1, a thread per connection
    textbook  a single-threaded HTTPServer with its listening socket wrapped in TLS

Each measurement has a fresh server process and load processes of its own. The servers take turns
in every round, so that whatever else the machine does affects all of them; the report shows the
medians of the rounds. All traffic stays on 127.0.0.1, all files in a temporary folder.

Key exchange: ours and bare have the same group, before Python 3.15 only P-256, where a client that
offers X25519 first (this one, too) takes one more round trip. The others have OpenSSL's defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import selectors
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, cast

if sys.platform == "win32":
    sys.exit("The benchmark needs a Unix system. On Windows, run it in WSL.")

sys.dont_write_bytecode = True   # no __pycache__ in the working tree
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import support  # noqa: E402, RUF100
from tests.test_connections import P256, client_hello, record  # noqa: E402, RUF100

PATIENCE = 10.0     # seconds that a client waits for the server before it counts an error
SETTLE = 0.1        # seconds for a server to finish its work after the last answer
HELD = 2000         # connections that never finish their handshake
REOPEN = 400        # connections reopened per second: as if each of the 2,000 were closed after 5 s
ITEM = b'{"task": "measure the server", "done": false}'
TODOS = [{"id": number, "task": "Issue server certificate", "done": True} for number in range(1, 6)]
BODY = json.dumps({"client": "mtls-client", "todos": TODOS}, indent=2)   # what the others send: as long as ours


# --- The servers -----------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """GET /todo for plain and textbook, without any of the care that our server takes."""

    connection: ssl.SSLSocket

    def do_GET(self) -> None:
        """The list and the client's CN; head and body in two writes, as the default buffering does."""
        certificate: Any = self.connection.getpeercert()
        name = next(value for rdn in certificate["subject"] for key, value in rdn if key == "commonName")
        body = json.dumps({"client": name, "todos": TODOS}, indent=2, ensure_ascii=False).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


async def answer(scope: dict[str, Any], _: object, send: Callable[[dict[str, object]], Awaitable[None]]) -> None:
    """GET /todo for uvicorn: an ASGI application."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]})
        await send({"type": "http.response.body", "body": BODY.encode()})


def serve_bare(listener: socket.socket, context: ssl.SSLContext) -> None:
    """Answer whatever comes with the same bytes: 32 threads, each accepts and serves in turn."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    answer = (head + BODY).encode()

    def work() -> None:
        while True:
            plain, _ = listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                while request := connection.recv(65536):
                    connection.sendall(answer)
                    if b"close" in request:
                        break

    with ThreadPoolExecutor(32) as pool:
        for _ in range(32):
            pool.submit(work)


def serve(kind: str, port: int, certs: Path) -> None:
    """Run bare, plain, textbook or uvicorn until killed."""
    if kind == "uvicorn":
        importlib.import_module("uvicorn").run(
            answer, port=port, loop="uvloop", http="httptools", lifespan="off", ssl_certfile=certs / "server.crt",
            ssl_keyfile=certs / "server.key", ssl_ca_certs=certs / "ca.crt", ssl_cert_reqs=ssl.CERT_REQUIRED)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certs / "ca.crt")
    context.load_cert_chain(certs / "server.crt", certs / "server.key")
    if kind != "textbook":
        context.num_tickets = 0   # as ours
    if kind == "bare":
        if sys.version_info < (3, 15):
            context.set_ecdh_curve("prime256v1")   # as ours
        serve_bare(socket.create_server(("127.0.0.1", port), backlog=1024), context)
    base: type[HTTPServer] = HTTPServer
    if kind == "plain":
        Handler.protocol_version = "HTTP/1.1"
        base = ThreadingHTTPServer
        base.request_queue_size = 1024   # so that 256 connections get in
    server = base(("127.0.0.1", port), Handler)
    # Of plain, the connection's thread does the handshake; of textbook, accept() does it.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=kind == "textbook")
    server.serve_forever()


# master_process off: one process that accepts and serves, so its CPU time is that of the worker.
NGINX = """
daemon off; master_process off; pid "{folder}/pid";
events {{ worker_connections 4096; }}
http {{
  access_log "{folder}/access.log"; default_type application/json; keepalive_requests 1000000;
  client_body_temp_path "{folder}/1"; proxy_temp_path "{folder}/2"; fastcgi_temp_path "{folder}/3";
  uwsgi_temp_path "{folder}/4"; scgi_temp_path "{folder}/5";
  server {{
    listen 127.0.0.1:{port} ssl backlog=1024;
    ssl_certificate "{certs}/server.crt"; ssl_certificate_key "{certs}/server.key";
    ssl_client_certificate "{certs}/ca.crt"; ssl_verify_client on;
    ssl_protocols TLSv1.2 TLSv1.3; ssl_session_tickets off; ssl_session_cache off;
    location = /todo {{ return 200 '{body}'; }}
  }}
}}
"""


class Server(NamedTuple):
    """A server process."""

    kind: str
    port: int
    process: subprocess.Popen[bytes]

    def usage(self) -> tuple[float, float]:
        """CPU seconds so far (user and system, all threads), and the peak of its resident memory in MB."""
        pid = self.process.pid
        if sys.platform == "linux":   # the clock of clock_getcpuclockid(3), which counts in ns
            status = Path(f"/proc/{pid}/status").read_text()
            return time.clock_gettime(~pid << 3 | 2), int(status.partition("VmHWM:")[2].split()[0]) / 1024
        # ps knows no peak, and the time as [[days-]hours:]minutes:seconds
        taken, memory = subprocess.check_output(["ps", "-o", "time=", "-o", "rss=", "-p", str(pid)], text=True).split()
        parts = reversed(taken.replace("-", ":").split(":"))
        seconds = sum(float(part) * unit for part, unit in zip(parts, (1, 60, 3600, 86400), strict=False))
        return seconds, int(memory) / 1024


@contextlib.contextmanager
def running(kind: str) -> Iterator[Server]:
    """Start a server, and end it afterwards."""
    lab, folder = support.lab(), support.new_folder(kind)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command: list[str | Path] = [sys.executable, __file__, "_serve", kind, str(port), lab.certs]
    if kind in ("ours", "theirs"):
        root = lab.root if kind == "ours" else lab.root.with_name("theirs")
        command = [sys.executable, root / "server" / "server.py", "--port", str(port)]
    elif kind == "nginx":
        (folder / "conf").write_text(NGINX.format(folder=folder, port=port, certs=lab.certs, body=BODY))
        command = ["nginx", "-p", folder, "-e", "stderr", "-c", folder / "conf"]
    with (folder / "log").open("w") as log:   # in a session of its own, so that Ctrl+C reaches only us
        process = subprocess.Popen(command, env=support.environment({"PYTHONDONTWRITEBYTECODE": "1"}), stdout=log,
                                   stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"benchmark: {kind} did not start: {(folder / 'log').read_text(errors='replace')}")
            time.sleep(0.02)
        yield Server(kind, port, process)
        if process.poll() is not None:
            sys.exit(f"benchmark: {kind} ended during a measurement")
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# --- The load --------------------------------------------------------------------------------


class Job(NamedTuple):
    """What the clients do, all at once, until the time is up or the count is reached."""

    clients: int = 1
    kept: bool = True            # requests on a kept-alive connection, else each on a new one
    methods: Sequence[str] = ("GET",)   # of the requests, in turn
    seconds: float = 600.0       # no request begins later
    requests: int = 10 ** 9      # of each client


class Client:
    """One client. It does not verify the server: that would cost only itself, and hide what is measured."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.port, self.context = port, context
        self.connection: ssl.SSLSocket | None = None
        self.latencies: list[float] = []    # seconds
        self.errors: Counter[str] = Counter()

    def work(self, job: Job) -> float:
        """Do the job; returns when the last answer came, on the clock of time.monotonic()."""
        end, last = time.monotonic() + job.seconds, -math.inf
        for turn in range(job.requests):
            begin = time.monotonic()
            if begin >= end:
                break
            try:
                self.request(job, job.methods[turn % len(job.methods)])
            except (OSError, ValueError) as error:
                self.errors[str(error)] += 1
                self.close()
                time.sleep(0.01)
            else:
                last = time.monotonic()
                self.latencies.append(last - begin)
        return last

    def request(self, job: Job, method: str) -> None:
        """Send one request, on a new connection if there is none, and read the answer. Raises OSError or ValueError."""
        if self.connection is None:
            plain = socket.socket()
            plain.settimeout(PATIENCE)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection = self.context.wrap_socket(plain)   # handshakes as soon as it connects
            self.connection.connect(("127.0.0.1", self.port))
        more = {} if job.kept else {"Connection": "close"}
        self.connection.sendall(support.request(method, "/todo", ITEM if method == "POST" else None, **more))
        answer, size = b"", 0
        while not size or len(answer) < size:
            data = self.connection.recv(65536)
            if not data:
                raise ConnectionError("the connection ended before the answer did")
            answer += data
            if not size and b"\r\n\r\n" in answer:
                head = answer.partition(b"\r\n\r\n")[0].lower()
                if head[9:11] != b"20":
                    raise ValueError(head[:60].decode("latin-1"))
                size = len(head) + 4 + int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if not job.kept:
            self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self.connection:
            self.connection.close()
            self.connection = None


CLIENTS: list[Client] = []   # in a load process: those that `prepare` has made


def prepare(job: Job, port: int, certs: Path) -> None:
    """In a load process: let new clients make a few GETs that are not measured."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(certs / "client.crt", certs / "client.key")
    CLIENTS[:] = [Client(port, context) for _ in range(job.clients)]
    work(job._replace(methods=("GET",), requests=10 if job.kept else 2))


def work(job: Job) -> tuple[list[float], float, Counter[str]]:
    """In a load process: let the clients work; returns latencies, seconds until the last answer, and errors."""
    for client in CLIENTS:
        client.latencies, client.errors = [], Counter()
    begin = time.monotonic()
    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        last = max(pool.map(lambda client: client.work(job), CLIENTS))
    return ([latency for client in CLIENTS for latency in client.latencies], max(0.001, last - begin),
            sum((client.errors for client in CLIENTS), Counter()))


class Attack(NamedTuple):
    """Connections that are there during a measurement. The server's answers are read and dropped."""

    number: int
    data: bytes = b""       # what each sends
    certificate: str = ""   # over TLS, with this one


ONE_BYTE = record(20, b"\1") * 32 + record(22, b"x")   # of a ClientHello, behind 32 ChangeCipherSpec records
ATTACKS = {
    "": Attack(0),
    "silent": Attack(HELD),
    "half": Attack(HELD, b"\x16\x03\x01\x02\x00\x01"),   # a TLS record's header, a ClientHello's first byte
    "hellos": Attack(3, client_hello(P256) + record(20, b"\1") + record(22, b"\1\1\xfb\xd0") + ONE_BYTE * 130_000),
    "unlisted": Attack(8, support.request("GET", "/todo") * 200_000, "mallory"),
}


class Attackers:
    """The connections of an attack."""

    def __init__(self, port: int, attack: Attack) -> None:
        self.port, self.attack = port, attack
        self.begin, self.opened, self.selector = time.monotonic(), 0, selectors.DefaultSelector()
        while self.opened < attack.number:
            self.step()

    def step(self) -> None:
        """For 20 ms: open all in the first second, and then REOPEN a second of those that the server closes."""
        passed = time.monotonic() - self.begin
        due = min(passed, 1) * self.attack.number + max(passed - 1, 0) * REOPEN
        while self.opened < due and len(self.selector.get_map()) < self.attack.number:
            self.opened += 1
            with contextlib.suppress(OSError):
                one: Any = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
                if self.attack.certificate:
                    one = support.lab().context(self.attack.certificate, check_hostname=False).wrap_socket(one)
                one.setblocking(False)
                self.selector.register(one, selectors.EVENT_READ | selectors.EVENT_WRITE, self.attack.data)
        for key, events in self.selector.select(0.02):
            one = key.fileobj
            try:
                if events & selectors.EVENT_READ and not one.recv(65536):
                    raise ConnectionError("the server has closed it")
                if events & selectors.EVENT_WRITE:
                    rest = memoryview(key.data)[one.send(key.data[:65536]) if key.data else 0:]
                    self.selector.modify(one, selectors.EVENT_READ | (selectors.EVENT_WRITE if rest else 0), rest)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                pass
            except OSError:
                self.selector.unregister(one)
                one.close()

    def close(self) -> None:
        """Close them all."""
        for key in list(self.selector.get_map().values()):
            cast("socket.socket", key.fileobj).close()
        self.selector.close()


# --- Measurements ----------------------------------------------------------------------------


class Sample(NamedTuple):
    """One measurement, or the medians of several."""

    rate: float         # answers per second
    p50: float          # ms
    p99: float          # ms
    cpu: float          # the server's CPU time per answer, microseconds
    memory: float       # the server's peak of resident memory, MB
    errors: float


class Scenario(NamedTuple):
    """A measurement to make of several servers."""

    title: str
    others: str                 # the servers besides ours
    job: Job
    attack: str = ""            # that goes on meanwhile
    before: int = 0             # POSTs before the measurement


def scenarios(scale: float = 1.0) -> dict[str, Scenario]:
    """All of them; ``scale`` shortens them."""
    new, get = Job(16, kept=False, seconds=2 * scale), Job(seconds=scale)
    one = new._replace(clients=1)
    return {
        "new": Scenario("New connections (TLS 1.3), one GET each, 16 clients", "nginx bare textbook", new),
        "silent": Scenario(f"The same with {HELD:,} silent connections held open", "nginx", new, "silent"),
        "half": Scenario(f"The same with {HELD:,} half-finished handshakes held open", "nginx", new, "half"),
        "one": Scenario("New connections, 1 client", "", one),
        "unlisted": Scenario("The same beside 8 unlisted clients that pipeline GETs", "", one, "unlisted"),
        "hellos": Scenario("The same beside three hellos of 25 MB in records of one byte", "", one, "hellos"),
        "many": Scenario("New connections, 256 clients", "nginx", new._replace(clients=256)),
        "get": Scenario("Kept-alive GET, 1 connection", "plain nginx bare", get),
        "get16": Scenario("Kept-alive GET, 16 connections", "plain nginx bare uvicorn", get._replace(clients=16)),
        "long": Scenario("Kept-alive GET of 505 items, several TLS records: what TCP_NODELAY is for", "",
                         get, before=500),
        "open": Scenario("256 connections open, one GET each", "plain nginx", Job(256, requests=1)),
    }


def measure(server: Server, loads: list[ProcessPoolExecutor], job: Job, attack: str = "") -> Sample:
    """Put a load on a running server, from all load processes if there is more than one client."""
    loads = loads[:job.clients]
    part = job._replace(clients=job.clients // len(loads))
    for preparing in [load.submit(prepare, part, server.port, support.lab().certs) for load in loads]:
        preparing.result()
    with contextlib.closing(Attackers(server.port, ATTACKS[attack])) as attackers:
        time.sleep(SETTLE)
        before, _ = server.usage()
        working = [load.submit(work, part) for load in loads]
        while not all(one.done() for one in working):
            attackers.step()
        parts = [one.result() for one in working]
        time.sleep(SETTLE)
        after, memory = server.usage()   # while the connections are still open
    errors = sum((errors for _, _, errors in parts), Counter())
    for text, times in errors.items():
        print(f"{times} errors of {server.kind}'s clients: {text}", file=sys.stderr)
    latencies = sorted(latency for taken, _, _ in parts for latency in taken)
    answers = len(latencies)
    return Sample(
        rate=answers / max(seconds for _, seconds, _ in parts),
        p50=latencies[answers // 2] * 1000 if answers else math.inf,
        p99=latencies[answers * 99 // 100] * 1000 if answers else math.inf,
        cpu=(after - before) / answers * 1e6 if answers else math.inf,
        memory=memory, errors=errors.total(),
    )


def available(kind: str) -> bool:
    """Whether that server is on this machine."""
    if kind == "uvicorn":
        return all(importlib.util.find_spec(name) for name in ("uvicorn", "uvloop", "httptools"))
    return kind != "nginx" or shutil.which("nginx") is not None


Samples = dict[tuple[str, str], list[Sample]]   # by scenario and server, one of each round


def measure_all(rounds: int, quick: bool, against: Path | None) -> Samples:
    """All scenarios, the servers in turns; ``quick``: one short round."""
    spawn = multiprocessing.get_context("spawn")   # not fork: we have threads
    # Ctrl+C is for us, not for them.
    loads = [ProcessPoolExecutor(1, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) for _ in range(2)]
    if against:
        root = support.lab().root.with_name("theirs")
        shutil.copytree(against / "server", root / "server")
        shutil.copytree(support.lab().certs, root / "certs")
    us = ("ours", "theirs") if against else ("ours",)
    samples: Samples = {}
    for turn in range(1 if quick else rounds):
        for key, scenario in scenarios(0.25 if quick else 1.0).items():
            print(f"Round {turn + 1}: {scenario.title}", file=sys.stderr)
            for kind in (*us, *scenario.others.split()):
                if not available(kind):
                    continue
                with running(kind) as server:
                    if scenario.before:
                        measure(server, loads, Job(methods=("POST",), requests=scenario.before))
                    sample = measure(server, loads, scenario.job, scenario.attack)
                samples.setdefault((key, kind), []).append(sample)
    return samples


# --- The report ------------------------------------------------------------------------------


def medians(rounds: Sequence[Sample]) -> Sample:
    """The median of each field."""
    return Sample(*map(statistics.median, zip(*rounds, strict=True)))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def goals(samples: Samples, us: str) -> Iterator[tuple[str, str, str]]:
    """Text, limit, and the measured value with a verdict for ``us``, which is "ours" or "theirs"."""

    def of(field: str, key: str, kind: str = us) -> float:
        rounds = samples.get((key, kind))   # none if nginx is not on this machine
        return float(getattr(medians(rounds), field)) if rounds else math.nan

    for text, limit, unit, value in [
        ("CPU per new connection, to a bare ssl loop", 1.1, "x", of("cpu", "new") / of("cpu", "new", "bare")),
        ("CPU per new connection, to the other checkout", 1, "x", of("cpu", "new") / of("cpu", "new", "theirs")),
        *((f"{text} with {HELD:,} {name}, to without", limit, "x", of(field, key) / of(field, "new"))
          for key, name in (("silent", "silent"), ("half", "half-finished"))
          for text, field, limit in (("p50", "p50", 1.2), ("p99", "p99", 1.5), ("CPU per answer", "cpu", 1.3))),
        ("p50 of an answer of several TLS records", 20, "ms", of("p50", "long")),
        ("CPU per kept-alive GET, to plain, 1 connection", 0.3, "x", of("cpu", "get") / of("cpu", "get", "plain")),
        *((f"CPU per kept-alive GET, to {kind}, 16 connections", limit, "x",
           of("cpu", "get16") / of("cpu", "get16", kind)) for kind, limit in (("plain", 0.25), ("uvicorn", 1))),
        ("p99 of a kept-alive GET, 16 connections, to the other checkout", 1, "x",
         of("p99", "get16") / of("p99", "get16", "theirs")),
        *((f"p99 of a newcomer beside {what}, to without", 5, "x", of("p99", key) / of("p99", "one"))
          for key, what in (("unlisted", "8 unlisted clients that pipeline"), ("hellos", "three endless hellos"))),
        ("peak memory with 256 connections", 64, "MB", of("memory", "open")),
        ("errors in all measurements", 0, "", sum(one.errors for (_, kind), rounds in samples.items()
                                                        if kind == us for one in rounds)),
    ]:
        verdict = "not measured" if math.isnan(value) else f"{value:.2f} {unit} {'met' if value <= limit else 'MISSED'}"
        yield text, f"<= {limit:g} {unit}", verdict


HOW_TO_READ = """
"CPU us", the number to compare, is the server's CPU time per answer, user and system; "spread" is how far the
rounds lie apart. Rates and latencies depend on the load, too, which runs on the same cores. "MB" is the peak of
memory. Refused, broken and late answers (10 s) are "errors". Plain sends head and body separately: it costs 40 ms."""


def report(samples: Samples) -> None:
    """Print it all: the machine; a table for each scenario, with a row for each server; the goals."""
    cpu, nginx = platform.machine(), "no nginx"
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].splitlines()[0].lstrip("\t: ")
    if shutil.which("nginx"):
        nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr.strip()
    print(f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python "
          f"{platform.python_version()}, {ssl.OPENSSL_VERSION}, {nginx}")
    for wanted, scenario in scenarios().items():
        ours = medians(samples[wanted, "ours"])
        rows = [["", "per s", "p50 ms", "p99 ms", "CPU us", "spread", "ours/this", "MB", "errors"]]
        for kind, rounds in [(kind, rounds) for (key, kind), rounds in samples.items() if key == wanted]:
            it, cpus = medians(rounds), [one.cpu for one in rounds]
            rows.append([kind, f"{it.rate:,.0f}", f"{it.p50:.2f}", f"{it.p99:.1f}", f"{it.cpu:,.0f}",
                         f"{(max(cpus) - min(cpus)) / it.cpu:.0%}", f"{ours.cpu / it.cpu:.2f}", f"{it.memory:.0f}",
                         f"{sum(one.errors for one in rounds):.0f}"])
        print(f"\n{scenario.title}\n{table(rows)}")
    for us in ("ours", "theirs"):
        if ("new", us) in samples:
            print("\n" + table([("goal", "limit", us), *goals(samples, us)]))
    print(HOW_TO_READ)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compares the lab's server with nginx and others.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds to take medians of (default 3)")
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="also measure the server of another checkout")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that SIGTERM cleans up, too
    if (busy := os.getloadavg()[0]) > 1:
        print(f"The machine is busy with other work (load average {busy:.1f}): expect a large spread.", file=sys.stderr)
    try:
        report(measure_all(max(1, arguments.rounds), arguments.quick, arguments.against))
    except KeyboardInterrupt:
        return 130
    except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
        sys.exit(f"benchmark: {error}")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["_serve"]:
        serve(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        sys.exit(main())
