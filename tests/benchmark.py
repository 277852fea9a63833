"""Benchmark of the lab's server beside four others: python3 tests/benchmark.py (2-3 minutes)

    ours      server/server.py
    nginx     ssl_verify_client on, one worker, an access log, a fixed body (if it is installed)
    bare      a loop around `ssl` that sends fixed bytes and knows no HTTP: what TLS costs in Python
    plain     BaseHTTPRequestHandler as it comes: HTTP/1.1, a thread per connection
    textbook  a single-threaded HTTPServer with its listening socket wrapped in TLS

Each measurement has a fresh server process, and load from processes of its own. The servers take
turns in every round, so that whatever else the machine does meets all of them; the report shows
medians of the rounds. All traffic stays on 127.0.0.1, all files in a temporary folder.

Read it from top to bottom: the other servers, the load, the measurements, the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import select
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

THIS_FILE = Path(__file__).resolve()
PYTHON = (sys.executable, "-B")   # like the next line: no __pycache__ in the working tree
sys.dont_write_bytecode = True
sys.path.insert(0, str(THIS_FILE.parent.parent))

from tests import support  # noqa: E402, RUF100

SERVERS = ("ours", "nginx", "bare", "plain", "textbook")
LOAD_PROCESSES = 2
PATIENCE = 10.0     # seconds that a client waits for the server before it counts an error
SETTLE = 0.1        # seconds for a server to finish its work after the last answer
SILENT = 2000       # connections that say nothing
DESCRIPTORS = 2500  # that a process may need: ulimit -n
REOPEN = 400        # silent connections reopened per second: as if each of the 2,000 were closed after 5 s
POSTS = 960         # at most, per server: the list holds 1,000 items
ITEM = b'{"task": "measure the server", "done": false}'
FIRST_LINE = "[SERVER] mTLS server listening on https://127.0.0.1:"


class Failure(Exception):
    """The benchmark cannot go on; the text is for the person who started it."""


# --- The other servers -----------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """The lab's two requests, without any of the care that server/server.py takes."""

    connection: ssl.SSLSocket
    todos: list[dict[str, object]]

    def answer(self, status: int, content: dict[str, object]) -> None:
        """Send JSON with the client's CN; head and body in two writes, as the default buffering does."""
        certificate: Any = self.connection.getpeercert()
        name = next(value for rdn in certificate["subject"] for key, value in rdn if key == "commonName")
        body = json.dumps({"client": name, **content}, indent=2, ensure_ascii=False).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """The list."""
        self.answer(200, {"todos": self.todos})

    def do_POST(self) -> None:
        """A new item."""
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        item = {"id": len(self.todos) + 1, "task": content["task"], "done": content["done"]}
        self.todos.append(item)
        self.answer(201, {"message": "TODO item created", "todo": item})


def serve_bare(listener: socket.socket, context: ssl.SSLContext, body: bytes) -> None:
    """Answer whatever comes with the same bytes: 32 threads, each accepts and serves in turn."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

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


def serve(kind: str, certs: Path, body: bytes) -> None:
    """Run bare, plain or textbook until killed. ``body``: the list, as our server sends it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certs / "ca.crt")
    context.load_cert_chain(certs / "server.crt", certs / "server.key")
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if kind != "textbook":   # the settings of ours that make a difference in TLS 1.3
        context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        context.num_tickets = 0
    if kind == "bare":
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        print(FIRST_LINE + str(listener.getsockname()[1]), flush=True)
        serve_bare(listener, context, body)
    Handler.todos = json.loads(body)["todos"]
    base: type[HTTPServer] = HTTPServer
    if kind == "plain":
        Handler.protocol_version = "HTTP/1.1"
        base = ThreadingHTTPServer
        base.request_queue_size = 1024   # so that 256 connections get in
    server = base(("127.0.0.1", 0), Handler)
    # Of plain, the connection's thread does the handshake; of textbook, accept() does it.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=kind == "textbook")
    print(FIRST_LINE + str(server.server_port), flush=True)
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


class Child:
    """A process that we started and talk to by lines."""

    def __init__(self, *command: str | Path, log: Path | None = None) -> None:
        with open(log, "w") if log else contextlib.nullcontext() as stderr:
            # In a session of its own, Ctrl+C reaches only us.
            self.process = subprocess.Popen(list(map(str, command)), env=support.environment(), start_new_session=True,
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()

    def hear(self) -> Any:
        """Its next line, which is JSON."""
        try:
            return json.loads(self.stdout.readline())
        except ValueError:
            raise Failure("a process that makes the load broke off") from None


class Server(Child):
    """One of SERVERS, ready for connections."""

    def __init__(self, kind: str, body: bytes = b"") -> None:
        self.kind = kind
        folder = self.folder = support.new_folder(kind)
        log, certs = folder / "log", support.lab().certs
        if kind == "ours":
            super().__init__(*PYTHON, certs.parent / "server" / "server.py", "--port", "0", log=log)
        elif kind == "nginx":
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
            text = NGINX.format(folder=folder, port=self.port, certs=certs, body=body.decode())
            (folder / "conf").write_text(text)
            super().__init__("nginx", "-p", folder, "-e", "stderr", "-c", folder / "conf", log=log)
        else:
            (folder / "body").write_bytes(body)
            super().__init__(*PYTHON, THIS_FILE, "_serve", kind, certs, folder / "body", log=log)
        try:
            if not self.is_ready():
                said = log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
                raise Failure(f"the server {kind!r} did not start: {said[-1]}")
        except BaseException:
            self.close()
            raise

    def is_ready(self) -> bool:
        """Wait for the line that names the port; nginx, which prints none, is tried until it accepts."""
        while self.kind == "nginx" and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            time.sleep(0.02)
        line = self.stdout.readline() if select.select([self.stdout], [], [], PATIENCE)[0] else ""
        if line.startswith(FIRST_LINE):
            self.port = int(line.rpartition(":")[2])
        return line.startswith(FIRST_LINE)

    def close(self) -> None:
        """End it, and remove its files."""
        super().close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def cpu_seconds(self) -> float:
        """CPU time that the process has used so far, user and system, all threads, ended ones too."""
        if sys.platform == "linux":   # as in /proc/PID/stat, but in ns instead of ticks of 10 ms
            return time.clock_gettime(~self.process.pid << 3 | 2)   # the clock of clock_getcpuclockid(3)
        parts = self.ps("time").replace("-", ":").split(":")        # [[days-]hours:]minutes:seconds
        return sum(float(part) * unit for part, unit in zip(reversed(parts), (1, 60, 3600, 86400)))

    def memory(self, field: str) -> float:
        """Resident memory, MB: ``VmHWM`` is its peak, ``VmRSS`` what it is now (without /proc: always now)."""
        with contextlib.suppress(FileNotFoundError):
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            return int(status.partition(field + ":")[2].split()[0]) / 1024
        return int(self.ps("rss")) / 1024

    def ps(self, column: str) -> str:
        """What ps knows of it, for systems without /proc."""
        command = ["ps", "-o", f"{column}=", "-p", str(self.process.pid)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


# --- The load, in processes of its own -------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the clients do, all at once, until the time is up or the count is reached."""

    clients: int
    kept: bool = False       # requests on a kept-alive connection, else each on a new one
    methods: str = "GET"     # of the requests, in turn, as in "POST GET"
    seconds: float = 600.0   # no request begins later
    count: int = 10 ** 9     # requests of each client


class Client:
    """One client. It does not verify the server: that would cost only itself, and hide what is measured."""

    def __init__(self, job: Job, port: int, context: ssl.SSLContext) -> None:
        self.job, self.port, self.context = job, port, context
        self.connection: ssl.SSLSocket | None = None
        common = b"Host: localhost\r\n" + (b"" if job.kept else b"Connection: close\r\n")
        self.requests = {
            "GET": b"GET /todo HTTP/1.1\r\n%s\r\n" % common,
            "POST": b"POST /todo HTTP/1.1\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                    % (common, len(ITEM), ITEM),
        }
        self.latencies: list[float] = []    # seconds
        self.last = 0.0                     # when the last answer came, on the clock of time.perf_counter()
        self.errors: Counter[str] = Counter()

    def request(self, method: str) -> None:
        """Send one request, on a new connection if there is none, and read its answer. Raises OSError or ValueError."""
        if self.connection is None:
            plain = socket.socket()
            plain.settimeout(PATIENCE)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connection = self.context.wrap_socket(plain)   # handshakes as soon as it connects
            self.connection.connect(("127.0.0.1", self.port))
        self.connection.sendall(self.requests[method])
        answer, size = b"", 0
        while not size or len(answer) < size:
            data = self.connection.recv(65536)
            if not data:
                raise ConnectionError("the connection ended before the answer did")
            answer += data
            head, blank, _ = answer.lower().partition(b"\r\n\r\n") if not size else (b"", b"", b"")
            if blank:
                if head[9:11] != b"20":
                    raise ValueError(head[:60].decode("latin-1"))
                size = len(head) + 4 + int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if not self.job.kept:
            self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self.connection:
            self.connection.close()
            self.connection = None

    def warm_up(self) -> None:
        """A few GETs that are not measured."""
        with contextlib.suppress(OSError, ValueError):
            for _ in range(10 if self.job.kept else 2):
                self.request("GET")

    def work(self, end: float) -> None:
        """Make requests until ``end`` (on the same clock) or until the count is reached."""
        methods = self.job.methods.split()
        for turn in range(self.job.count):
            begin = time.perf_counter()
            if begin >= end:
                break
            try:
                self.request(methods[turn % len(methods)])
            except (OSError, ValueError) as error:
                self.errors[str(error)] += 1
                self.close()
                time.sleep(0.01)
            else:
                self.last = time.perf_counter()
                self.latencies.append(self.last - begin)


def run_load(job: Job, port: int, certs: Path) -> None:
    """A load process: warm up, say so, wait for a line, work, print the result, stay until stdin ends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(certs / "client.crt", certs / "client.key")
    clients = [Client(job, port, context) for _ in range(job.clients)]
    with ThreadPoolExecutor(job.clients) as pool:
        list(pool.map(Client.warm_up, clients))
        print('"ready"', flush=True)
        sys.stdin.readline()
        begin, cpu = time.perf_counter(), time.process_time()
        list(pool.map(lambda client: client.work(begin + job.seconds), clients))
    print(json.dumps({
        "latencies": [latency for client in clients for latency in client.latencies],
        "window": max(0.001, max(client.last for client in clients) - begin),
        "cpu": time.process_time() - cpu,
        "errors": sum((client.errors for client in clients), Counter()),
    }), flush=True)
    sys.stdin.read()


def hold_silent(port: int) -> None:
    """The process with the silent connections: opens SILENT in a second, then REOPEN a second of those that
    the server closes. Prints a line after the first second; when stdin ends, how many are open and were reopened.
    """
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    begin = time.monotonic()
    opened = 0
    while True:
        passed = time.monotonic() - begin
        while opened < min(passed, 1) * SILENT + max(passed - 1, 0) * REOPEN and len(selector.get_map()) <= SILENT:
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
            selector.register(one, selectors.EVENT_READ)
            opened += 1
            if opened == SILENT:
                print('"ready"', flush=True)
        for key, _ in selector.select(0.02):
            if key.fileobj is sys.stdin:
                print(json.dumps([len(selector.get_map()) - 1, opened - SILENT]), flush=True)
                return
            assert isinstance(key.fileobj, socket.socket)
            selector.unregister(key.fileobj)
            key.fileobj.close()


# --- Measurements ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One measurement, or the medians of several."""

    rate: float         # answers per second
    p50: float          # ms
    p99: float          # ms
    cpu: float          # the server's CPU time per answer, microseconds
    busy: float         # the server's CPU time in % of one core
    load: float         # the same of all load processes
    errors: float
    memory: float       # the server's peak of resident memory, MB
    held: float         # silent connections that were open at the end,
    reopened: float     # and how many had been opened again because the server had closed them


@dataclass(frozen=True)
class Scenario:
    """A measurement to make of several servers."""

    title: str
    servers: tuple[str, ...]
    job: Job
    silent: bool = False


def scenarios(scale: float = 1.0) -> dict[str, Scenario]:
    """All of them; ``scale`` shortens them."""
    new, kept = Job(16, seconds=2.5 * scale), Job(16, kept=True, seconds=1.2 * scale)
    getters = ("ours", "plain", "nginx", "bare")
    return {
        "new": Scenario("New connections (TLS 1.3), one GET each, 16 clients",
                        ("ours", "nginx", "bare", "textbook"), new),
        "silent": Scenario(f"The same with {SILENT:,} silent connections held open",
                           ("ours", "nginx", "textbook"), new, silent=True),
        "many": Scenario("New connections, 256 clients", ("ours", "nginx", "textbook"), replace(new, clients=256)),
        "get1": Scenario("Kept-alive GET, 1 connection", getters, replace(kept, clients=1)),
        "get16": Scenario("Kept-alive GET, 16 connections", getters, kept),
        "post1": Scenario("Kept-alive POST, 1 connection", ("ours", "plain"),
                          replace(kept, clients=1, methods="POST", count=POSTS)),
        "post16": Scenario("Kept-alive POST, 16 connections", ("ours", "plain"),
                           replace(kept, methods="POST", count=POSTS // 16)),
        "memory": Scenario("256 connections open", ("ours", "plain", "nginx"), Job(256, kept=True, count=1)),
    }


ERRORS: Counter[str] = Counter()
"""What went wrong at the clients, in all measurements."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the sorted values that at least this share does not exceed."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def measure(server: Server, job: Job, silent: bool = False) -> Sample:
    """Put a load on a running server."""
    with contextlib.ExitStack() as stack:
        processes = min(LOAD_PROCESSES, job.clients)
        part = json.dumps(asdict(replace(job, clients=job.clients // processes)))
        command = (*PYTHON, THIS_FILE, "_load", part, str(server.port), support.lab().certs)
        loads = [stack.enter_context(closing(Child(*command))) for _ in range(processes)]
        for load in loads:
            load.hear()
        holder = stack.enter_context(closing(Child(*PYTHON, THIS_FILE, "_hold", str(server.port)))) if silent else None
        if holder:
            holder.hear()
        time.sleep(SETTLE)
        cpu, begin = server.cpu_seconds(), time.monotonic()
        for load in loads:
            load.stdin.write("go\n")
            load.stdin.flush()
        results = [load.hear() for load in loads]
        elapsed = time.monotonic() - begin
        time.sleep(SETTLE)
        cpu = server.cpu_seconds() - cpu
        memory = server.memory("VmHWM")   # while the connections are still open
        held = reopened = 0
        if holder:
            holder.stdin.close()
            held, reopened = holder.hear()
        if server.process.poll() is not None:
            raise Failure(f"the server {server.kind!r} ended during a measurement")
    for result in results:
        ERRORS.update({f"{server.kind}: {text}": times for text, times in result["errors"].items()})
    latencies = sorted(latency for result in results for latency in result["latencies"])
    return Sample(
        rate=len(latencies) / max(result["window"] for result in results),
        p50=percentile(latencies, 0.50) * 1000,
        p99=percentile(latencies, 0.99) * 1000,
        cpu=cpu / len(latencies) * 1e6 if latencies else math.nan,
        busy=cpu / elapsed * 100,
        load=sum(result["cpu"] for result in results) / elapsed * 100,
        errors=sum(sum(result["errors"].values()) for result in results),
        memory=memory, held=held, reopened=reopened,
    )


def measure_list() -> list[float]:
    """CPU time of our server per GET, microseconds: with 5 items; with 990; the first after a POST."""
    with closing(Server("ours")) as server:
        few = measure(server, Job(1, kept=True, count=1000))
        post = measure(server, Job(1, kept=True, methods="POST", count=985))
        many = measure(server, Job(1, kept=True, count=500))
        pairs = measure(server, Job(1, kept=True, methods="POST GET", count=20))
        return [few.cpu, many.cpu, 2 * pairs.cpu - post.cpu]


BARE_OPENSSL = """
openssl genrsa -out certs/ca.key 4096
openssl req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf
for name in server client; do
  openssl genrsa -out certs/$name.key 2048
  openssl req -new -key certs/$name.key -out certs/$name.csr -config certs/$name.cnf
  openssl x509 -req -days 365 -in certs/$name.csr -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial \\
    -out certs/$name.crt -extensions v3_$name -extfile certs/$name.cnf
done
openssl pkcs12 -export -out certs/client.pfx -inkey certs/client.key -in certs/client.crt \\
  -certfile certs/ca.crt -passout env:MTLS_PFX_PASSWORD
openssl verify -CAfile certs/ca.crt -purpose sslserver certs/server.crt
openssl verify -CAfile certs/ca.crt -purpose sslclient certs/client.crt
"""


def measure_scripts(runs: int) -> list[float]:
    """Median seconds of gen_certs.sh and of the bare openssl commands, both with prepared keys."""
    variables = support.environment({"PATH": support.prepared_path(), "MTLS_PFX_PASSWORD": "benchmark"})
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for taken, arguments in zip(seconds, (["certs/gen_certs.sh"], ["-ec", BARE_OPENSSL])):
            fresh = support.Lab("timing")
            begin = time.monotonic()
            result = subprocess.run(["bash", *arguments], cwd=fresh.root, env=variables, stdin=subprocess.DEVNULL,
                                    capture_output=True, text=True, check=False)
            taken.append(time.monotonic() - begin)
            if result.returncode:
                raise Failure(f"bash {arguments[0]} failed: {result.stderr.strip() or result.stdout.strip()}")
    return [statistics.median(taken) for taken in seconds]


def measure_soak() -> dict[str, list[float]]:
    """Resident memory of our server, MB, after a tenth of each load and at its end.

    The allocator's arenas, one or more per thread, fill up slowly (bare's as well): 4 MB are no leak.
    """
    memory = {}
    for what, job in {"100,000 requests": Job(16, kept=True, count=6250),
                      "10,000 new connections": Job(16, count=625)}.items():
        with closing(Server("ours")) as server:
            measure(server, replace(job, count=job.count // 10))
            memory[what] = [server.memory("VmRSS")]
            measure(server, job)
            memory[what].append(server.memory("VmRSS"))
    return memory


def fetch_list() -> bytes:
    """The list as our server sends it, for the others to send the same."""
    with closing(Server("ours")) as server, socket.create_connection(("127.0.0.1", server.port), PATIENCE) as plain, \
            support.lab().context().wrap_socket(plain, server_hostname="127.0.0.1") as connection:
        connection.sendall(support.request("GET", "/todo"))
        answer = support.Answer(connection)
    if answer.status != 200:
        raise Failure(f"our server answers a GET with status {answer.status}")
    return answer.body


class Progress:
    """What is being measured, on stderr: in place on a terminal, else a line for each new title."""

    def __init__(self) -> None:
        self.title, self.begin, self.in_place = "", time.monotonic(), sys.stderr.isatty()

    def __call__(self, title: str, detail: str = "") -> None:
        """Show it; without a title, wipe the line."""
        text = f"{time.monotonic() - self.begin:4.0f} s  {title}"
        if self.in_place:
            sys.stderr.write("\r\x1b[K" + (f"{text}  {detail}"[:100] if title else ""))
        elif title and title != self.title:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
        self.title = title


def measure_all(rounds: int, quick: bool, soak: bool, progress: Progress) -> dict[str, Any]:
    """Everything, the servers in turns."""
    progress("certificates")
    body = fetch_list()
    samples: dict[str, dict[str, list[Sample]]] = {}
    lists = []
    for turn in range(rounds):
        title = f"round {turn + 1} of {rounds}"
        for key, scenario in scenarios(0.25 if quick else 1.0).items():
            for kind in scenario.servers:
                if kind == "nginx" and not shutil.which("nginx"):
                    continue
                if kind == "textbook" and key != "new" and (turn or quick):
                    continue   # its clients wait until their patience ends: once is enough
                progress(title, f"{scenario.title}: {kind}")
                with closing(Server(kind, body)) as server:
                    sample = measure(server, scenario.job, scenario.silent)
                samples.setdefault(key, {}).setdefault(kind, []).append(sample)
        progress(title, "GET with 5 and 990 items: ours")
        lists.append(measure_list())
    progress("gen_certs.sh and the bare openssl commands")
    scripts = measure_scripts(2 if quick else 5)
    if soak:
        progress("100,000 requests, 10,000 new connections")
    return {"samples": samples, "lists": lists, "scripts": scripts, "soak": measure_soak() if soak else {}}


# --- The report ------------------------------------------------------------------------------


def medians(rounds: Sequence[Sample]) -> Sample:
    """The median of each field."""
    return Sample(*(statistics.median(getattr(one, field.name) for one in rounds) for field in fields(Sample)))


def number(value: float, digits: int = 0, unit: str = "") -> str:
    """For the report; "-" for what could not be measured."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}{unit}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(("  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])).rstrip()
                     for row in rows)


def scenario_table(by_server: dict[str, list[Sample]]) -> str:
    """A row per server."""
    rows = [["", "per s", "p50 ms", "p99 ms", "CPU us", "spread", "ours/this", "server", "load", "errors"]]
    for kind, rounds in by_server.items():
        it, cpus = medians(rounds), [one.cpu for one in rounds]
        rows.append([kind, number(it.rate), number(it.p50, 2), number(it.p99, 1), number(it.cpu),
                     number((max(cpus) - min(cpus)) / it.cpu * 100, 0, " %"),
                     number(medians(by_server["ours"]).cpu / it.cpu, 2), number(it.busy, 0, " %"),
                     number(it.load, 0, " %"), number(sum(one.errors for one in rounds))])
    return table(rows)


def goals(results: dict[str, Any]) -> list[list[str]]:
    """Rows of goal, limit, measured value and verdict."""

    def median(field: str, key: str, kind: str = "ours") -> float:
        rounds = results["samples"][key].get(kind)   # none if nginx is not on this machine
        return float(getattr(medians(rounds), field)) if rounds else math.nan

    def to(kind: str, field: str, key: str) -> float:
        return median(field, key) / median(field, key, kind)

    _, again, after = map(statistics.median, zip(*results["lists"]))
    script, bare = results["scripts"]
    judged = [
        ("CPU per new connection, to nginx", "<=", 1.3, " x", to("nginx", "cpu", "new")),
        ("CPU per new connection, to a bare ssl loop", "", 0, " x", to("bare", "cpu", "new")),
        ("new connections per second, to nginx", ">=", 0.9, " x", to("nginx", "rate", "new")),
        ("errors at 256 clients", "<=", 0, "", sum(one.errors for one in results["samples"]["many"]["ours"])),
        ("CPU per kept-alive GET, to plain, 1 connection", "<=", 0.5, " x", to("plain", "cpu", "get1")),
        ("CPU per kept-alive GET, to plain, 16 connections", "<=", 0.5, " x", to("plain", "cpu", "get16")),
        (f"p50 with {SILENT:,} silent, to without", "<=", 1.3, " x", median("p50", "silent") / median("p50", "new")),
        (f"p99 with {SILENT:,} silent, to without", "<=", 2, " x", median("p99", "silent") / median("p99", "new")),
        ("CPU per GET of 990 items, to the first after a POST", "<=", 0.5, " x", again / after),
        ("peak memory with 256 connections", "<", 64, " MB", median("memory", "memory")),
        *((f"memory growth over {what}", "<=", 4, " MB", b - a) for what, (a, b) in results["soak"].items()),
        ("gen_certs.sh, beyond the bare openssl commands", "<=", 0.3, " s", script - bare),
    ]
    rows = [["goal", "limit", "measured", "verdict"]]
    for text, sign, limit, unit, value in judged:
        good = {"<=": value <= limit, "<": value < limit, ">=": value >= limit, "": True}[sign]
        verdict = "reported" if not sign else "not measured" if math.isnan(value) else "met" if good else "MISSED"
        rows.append([text, f"{sign} {limit:g}{unit}" if sign else "", number(value, 2, unit), verdict])
    return rows


def machine() -> str:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().partition("model name")[2].splitlines()[0].lstrip("\t: ")
    nginx = "no nginx"
    if shutil.which("nginx"):
        nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr.strip()
    return (f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, {nginx.removeprefix('nginx version: ')}")


HOW_TO_READ = """
How to read it: "CPU us" is the server's CPU time per answer (user and system, as the system counts it): the
number to compare, and "ours/this" compares it. "spread" is how far the rounds lie apart. Rates and latencies
depend on the load too, which runs on the same cores: "server" and "load" are what each used in % of one core,
and a server far below 100 % could do more per second than the load asked of it. Answers that were refused,
broken or not there after 10 s are "errors". Plain sends head and body apart, and so waits 40 ms for
the ACK of the head. Textbook, whose clients wait longest, is measured in one round only after the first table."""


def report(results: dict[str, Any], rounds: int) -> Iterator[str]:
    """The text for people."""
    yield f"{machine()}\nMedians of {rounds} round(s), the servers in turns"
    samples = results["samples"]
    for key, scenario in scenarios().items():
        if key == "memory":
            yield f"\n{scenario.title}, the server's peak memory: " + ", ".join(
                f"{kind} {medians(one).memory:.1f} MB" for kind, one in samples[key].items())
        else:
            yield f"\n{scenario.title}\n{scenario_table(samples[key])}"
        if key == "silent":
            ours = medians(samples[key]["ours"])
            yield (f"  Ours closes silent ones when it is full: {ours.held:,.0f} were open at the end, and "
                   f"{ours.reopened:,.0f} had been\n  opened again ({REOPEN} a second at most), at a cost that its "
                   "CPU time per answer includes.")
    few, many, after = map(statistics.median, zip(*results["lists"]))
    yield f"\nOur CPU per kept-alive GET: {few:,.0f} us with 5 items, {many:,.0f} with 990, {after:,.0f} after a POST"
    yield "gen_certs.sh with prepared keys: {:.2f} s; the bare openssl commands: {:.2f} s".format(*results["scripts"])
    for what, (begin, end) in results["soak"].items():
        yield f"Memory over {what}: {begin:.1f} MB after a tenth, {end:.1f} MB at the end"
    yield "\n" + table(goals(results)) + "\n" + HOW_TO_READ
    if ERRORS:
        yield "Errors: " + "; ".join(f"{times} x {text}" for text, times in ERRORS.most_common(5))


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Benchmark of the lab's server beside nginx and others.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds to take medians of (default 3)")
    parser.add_argument("--quick", action="store_true", help="one short round, for a first look")
    parser.add_argument("--soak", action="store_true", help="also memory over 100,000 requests and 10,000 connections")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE, too")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    rounds = 1 if arguments.quick else arguments.rounds
    progress = Progress()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that it, too, cleans up
    try:
        if not shutil.which("openssl"):
            raise Failure("the openssl command is missing; install OpenSSL 1.1.1+ or LibreSSL 3.3+")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
            if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
                raise Failure(f"{DESCRIPTORS} descriptors are needed, and `ulimit -Hn` allows {hard}")
            resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
        if (busy := os.getloadavg()[0]) > 1:
            print(f"The machine is busy with other things (load average {busy:.1f}): expect spread.", file=sys.stderr)
        results = measure_all(rounds, arguments.quick, arguments.soak, progress)
        progress("")
        print("\n".join(report(results, rounds)))
        if arguments.json:
            text = json.dumps({"machine": machine(), **results, "goals": goals(results)}, default=asdict, indent=1)
            arguments.json.write_text(text.replace("NaN", "null") + "\n")   # JSON has no NaN
    except KeyboardInterrupt:
        progress("")
        return 130
    except (Failure, AssertionError, OSError) as error:
        progress("")
        print("benchmark:", (str(error).strip().splitlines() or [repr(error)])[-1], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["_serve"]:
        serve(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]).read_bytes())
    elif sys.argv[1:2] == ["_load"]:
        run_load(Job(**json.loads(sys.argv[2])), int(sys.argv[3]), Path(sys.argv[4]))
    elif sys.argv[1:2] == ["_hold"]:
        hold_silent(int(sys.argv[2]))
    else:
        sys.exit(main())
