"""What the tests share: a copy of the lab with certificates, its processes, and a TLS client."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import json
import os
import pty
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")

ROOT = Path(__file__).resolve().parent.parent


def once(make: Callable[[], A]) -> Callable[[], A]:
    """Decorator: make it when it is first asked for, only once also where tests run side by side."""
    lock = threading.RLock()
    cached = functools.cache(make)

    @functools.wraps(make)
    def get() -> A:
        with lock:
            return cached()
    return get


PATIENCE = 30.0
"""Seconds after which a test gives up waiting for something that should happen at once."""

# The variables that steer the lab or its tools must not leak in from the developer's shell.
_STEERING = ("MTLS_", "SSL", "OPENSSL", "PYTHON", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "PREPARED_")


def environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The test's own environment without what steers the lab; ``extra`` adds (None removes)."""
    variables: dict[str, str | None] = {
        name: value for name, value in os.environ.items() if not name.upper().startswith(_STEERING)
    }
    variables.update(extra or {})
    return {name: value for name, value in variables.items() if value is not None}


@once
def scratch() -> Path:
    """A folder for this run of the tests, removed when it ends. Its name has a space."""
    folder = Path(tempfile.mkdtemp(prefix="mtls lab tests "))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def new_folder(prefix: str) -> Path:
    """A new empty folder inside `scratch`."""
    return Path(tempfile.mkdtemp(prefix=prefix + " ", dir=scratch()))


def side_by_side(function: Callable[[A], B], cases: Iterable[A]) -> list[B]:
    """The function's results for all cases, a few at a time: what starts processes gains from every core."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, cases))


# --- openssl -------------------------------------------------------------------------------


def openssl(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run the real openssl; returns its output, raises CalledProcessError with it on failure."""
    command = ["openssl", *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout}")
    return result.stdout


# Generating a 4096-bit key costs seconds. This openssl keeps each key that it makes, by set,
# size and file name, and hands out the same one next time; all else goes to the real openssl.
# It creates files as LibreSSL does, with the mode that the umask leaves. To save time, the CA's key
# of any set but the first has 2048 bits, and additional clients of a set share one key.
_PREPARED_OPENSSL = """#!/bin/sh
if [ "$1" = genrsa ]; then
  set=${{PREPARED_SET:-first}}
  bits=$4; [ "$set" = first ] || bits=2048
  case $3 in */ca.key | */server.key | */client.key) name=${{3##*/}} ;; *) name=other.key ;; esac
  kept="{keys}/$set-$bits-$name"
  [ -e "$kept" ] || {{ "{openssl}" genrsa -out "$kept.$$" "$bits" 2>/dev/null && mv "$kept.$$" "$kept"; }} || exit 1
  cat "$kept" >"$3"
else
  exec "{openssl}" "$@"
fi
"""


@once
def prepared_path() -> str:
    """A PATH whose openssl hands out prepared keys (``genrsa -out FILE BITS`` only)."""
    folder = new_folder("prepared")
    real = shutil.which("openssl")
    assert real, "the tests need the openssl command"
    fake = folder / "openssl"
    fake.write_text(_PREPARED_OPENSSL.format(keys=folder, openssl=real))
    fake.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# --- The lab -------------------------------------------------------------------------------


class Lab:
    """A copy of the project, without certificates until `generate` or `issue` makes them."""

    def __init__(self, name: str = "lab") -> None:
        self.root = new_folder(name) / "mtls-lab"
        self.certs = self.root / "certs"
        for pattern in ("certs/*.sh", "certs/*.cnf", "server/*.py", "client/*.py"):
            for file in ROOT.glob(pattern):
                (self.root / file.parent.name).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.root / file.parent.name)

    def generate(self, *arguments: str, **variables: str) -> str:
        """Run gen_certs.sh with prepared keys and no terminal; returns what it printed."""
        result = self.script(*arguments, env={"PATH": prepared_path(), **variables})
        if result.returncode:
            raise AssertionError(f"gen_certs.sh {arguments} failed:\n{result.stdout}{result.stderr}")
        return result.stdout

    def script(self, *arguments: str, env: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
        """Run gen_certs.sh as it is, with no terminal."""
        return subprocess.run(["bash", str(self.certs / "gen_certs.sh"), *arguments], cwd=scratch(), text=True,
                              env=environment(env), stdin=subprocess.DEVNULL, capture_output=True, check=False)

    def run(self, script: str, *arguments: str, env: Mapping[str, str | None] | None = None,
            cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of the Python programs, as in ``run("client/client.py", "--url", ...)``."""
        return subprocess.run([sys.executable, "-W", "error", str(self.root / script), *arguments],
                              cwd=cwd or scratch(), env=environment(env), stdin=subprocess.DEVNULL,
                              capture_output=True, encoding="utf-8", errors="backslashreplace", check=False,
                              timeout=PATIENCE * 2)

    def context(self, certificate: str | None = "client", **settings: Any) -> ssl.SSLContext:
        """A client's context: trusts the lab's CA, presents ``certificate`` (None: none)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Some Pythons (Debian's 3.11) set this, and then an end without close_notify looks like one with it.
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        context.load_verify_locations(self.certs / "ca.crt")
        if certificate is not None:
            context.load_cert_chain(self.certs / f"{certificate}.crt", self.certs / f"{certificate}.key")
        for name, value in settings.items():
            setattr(context, name, value)
        return context


@once
def lab() -> Lab:
    """The lab that tests share: with all certificates, and mallory's. Do not change its files."""
    shared = Lab("shared")
    shared.generate()
    shared.generate("client", "mallory")
    return shared


# --- Processes -----------------------------------------------------------------------------


class Lines:
    """The lines that a process prints to one of its streams, collected by a thread."""

    def __init__(self, stream: IO[str]) -> None:
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._collect, args=(stream,), daemon=True)
        self._thread.start()

    def _collect(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                with self._changed:
                    self._lines.append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def now(self) -> list[str]:
        """The lines so far."""
        with self._changed:
            return list(self._lines)

    def wait_for(self, wanted: Callable[[list[str]], bool] | str, seconds: float = PATIENCE) -> list[str]:
        """Wait until a line contains the text, or the lines satisfy the function; returns them."""
        holds = wanted if callable(wanted) else lambda lines: any(wanted in line for line in lines)
        with self._changed:
            self._changed.wait_for(lambda: holds(self._lines) or self._ended, seconds)
            if not holds(self._lines):
                raise AssertionError(f"waited in vain for {wanted!r}; the process printed {self._lines}")
            return list(self._lines)

    def all(self) -> list[str]:
        """All lines of a process that has ended."""
        self._thread.join(PATIENCE)
        return self.now()


class Server:
    """A running ``server.py``. Use it as a context manager: it is ended on the way out.

    It listens on a free port, unless ``port`` is None: then the environment says which.
    ``descriptors`` lowers its ``ulimit -n``.
    """

    def __init__(self, of: Lab, *arguments: str, env: Mapping[str, str | None] | None = None,
                 port: str | None = "0", descriptors: int | None = None) -> None:
        command = [sys.executable, "-W", "error", str(of.root / "server" / "server.py"), *arguments]
        if port is not None:
            command += ["--port", port]
        if descriptors is not None:
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        self.lab = of
        self._contexts: dict[str | None, ssl.SSLContext] = {}
        self.process = subprocess.Popen(command, cwd=scratch(), env=environment(env), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                                        errors="backslashreplace")
        atexit.register(self.process.kill)   # also when the tests are interrupted
        assert self.process.stdout and self.process.stderr
        self.stdout = Lines(self.process.stdout)
        self.stderr = Lines(self.process.stderr)
        try:
            first = self.stdout.wait_for("listening on")[0]
        except AssertionError as error:
            self.__exit__()
            raise AssertionError(f"{error}\nstderr: {self.stderr.all()}") from None
        self.port = int(first.rpartition(":")[2])
        self.url = f"https://127.0.0.1:{self.port}/todo"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.stdout.all()
        self.stderr.all()

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Ask it to end and wait; returns the exit code."""
        self.process.send_signal(with_signal)
        return self.process.wait(PATIENCE)

    def counts(self) -> tuple[int, int] | None:
        """How many threads and descriptors it has; None where there is no /proc."""
        folder = Path("/proc") / str(self.process.pid)
        if not folder.exists():
            return None
        return len(os.listdir(folder / "task")), len(os.listdir(folder / "fd"))

    def settles_to(self, before: tuple[int, int] | None, seconds: float = 3.0) -> bool:
        """Whether threads and descriptors are back to ``before`` within the given time."""
        deadline = time.monotonic() + seconds
        while (counts := self.counts()) is not None and before is not None and any(
                now > then for now, then in zip(counts, before)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def connect(self, certificate: str | None = "client", context: ssl.SSLContext | None = None,
                timeout: float = PATIENCE) -> ssl.SSLSocket:
        """A TLS connection to it, after the handshake. Reading an end without close_notify raises SSLEOFError."""
        if not context:
            if certificate not in self._contexts:   # making one costs as much as a handshake
                self._contexts[certificate] = self.lab.context(certificate)
            context = self._contexts[certificate]
        plain = self.connect_plain(timeout)
        try:
            return context.wrap_socket(plain, server_hostname="127.0.0.1", suppress_ragged_eofs=False)
        except BaseException:
            plain.close()
            raise

    def connect_plain(self, timeout: float = PATIENCE) -> socket.socket:
        """A TCP connection to it, no TLS."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)


class Answer:
    """An HTTP response: ``status``, ``headers``, ``body`` (bytes) and, if it is JSON, ``json``."""

    def __init__(self, connection: socket.socket, method: str = "GET") -> None:
        response = http.client.HTTPResponse(connection, method=method)
        try:
            response.begin()
            self.status = response.status
            self.version = response.version
            self.headers = response.headers
            self.body = response.read()
        finally:
            response.close()

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Talk:
    """A TLS connection that is read answer by answer, also when several arrive together.

    Use it as a context manager: it is closed on the way out.
    """

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self.connection = connection
        self.file = connection.makefile("rb")

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.connection.close()

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.connection.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer; ``method`` is that of its request (after HEAD comes no body)."""
        return Answer(self, method)   # type: ignore[arg-type]   # reads it as a socket, by the methods below

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request, see `request`, and read its answer."""
        self.send(request(method, path, body, **headers))
        return self.answer(method)

    def makefile(self, *_: object) -> Talk:
        """What HTTPResponse reads from: this, not a new file, which would keep what it read too much."""
        return self

    def readline(self, limit: int = -1) -> bytes:
        """For HTTPResponse."""
        return self.file.readline(limit)

    def read(self, amount: int = -1) -> bytes:
        """For HTTPResponse; without an amount, all up to the connection's end."""
        return self.file.read(amount)

    def flush(self) -> None:
        """For HTTPResponse."""

    def close(self) -> None:
        """For HTTPResponse, whose end is not the connection's."""


class Wire:
    """A TLS client whose bytes the test carries itself, and so can hold back or send one by one.

    Use it as a context manager: it is closed on the way out.
    """

    def __init__(self, server: Server, certificate: str | None = "client") -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = server.lab.context(certificate).wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        self.plain = server.connect_plain()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.plain.close()

    def bytes_of(self, step: Callable[[], object]) -> bytes:
        """Take a step of TLS, as in ``bytes_of(wire.tls.do_handshake)``; returns the bytes that it wants to send."""
        with contextlib.suppress(ssl.SSLWantReadError):
            step()
        return self._outgoing.read()

    def flight(self) -> bytes:
        """The second and last thing that a client has to send in a handshake; the first is sent here."""
        self.plain.sendall(self.bytes_of(self.tls.do_handshake))
        while not (flight := self.bytes_of(self.tls.do_handshake)):
            self._incoming.write(self.plain.recv(65536))
        return flight

    def shake_hands(self) -> None:
        """The whole handshake, as TLS 1.3 does it: nothing comes back after the flight."""
        self.plain.sendall(self.flight())

    def send(self, data: bytes) -> None:
        """Send it encrypted."""
        self.plain.sendall(self.bytes_of(lambda: self.tls.write(data)))

    def hear(self) -> bytes:
        """All that the server says until its close_notify. An end without one raises an OSError."""
        heard = b""
        while True:
            try:
                if not (piece := self.tls.read(65536)):
                    return heard
                heard += piece
            except ssl.SSLZeroReturnError:   # close_notify, after we have sent ours
                return heard
            except ssl.SSLWantReadError:
                data = self.plain.recv(65536)
                self._incoming.write(data) if data else self._incoming.write_eof()


class ServerCase(unittest.TestCase):
    """What tests of the server share."""

    def assert_ends_well(self, talk: Talk, within: float = 5.0) -> None:
        """The server says no more and closes in order, within so many seconds."""
        rest = b""
        talk.connection.settimeout(within)
        try:
            while piece := talk.file.read1(65536):
                rest += piece
        except ssl.SSLZeroReturnError:   # this is close_notify, too, if we have sent ours before
            pass
        except OSError as error:
            self.fail(f"the connection should end with close_notify, but: {error!r}")
        self.assertEqual(rest, b"", "nothing may follow the answer")

    def assert_no_defect_logged(self, server: Server) -> None:
        """The server runs, and has written no traceback and no error of its own."""
        self.assertIsNone(server.process.poll(), "the server has ended")
        defects = [line for line in server.stderr.now() if not line.startswith("[SERVER] ") or "ERROR" in line]
        self.assertEqual(defects, [], "the server should log no defect of its own")

    def assert_unharmed(self, server: Server, before: tuple[int, int] | None) -> None:
        """A proper client is served, threads and descriptors are back, and no defect was logged."""
        self.assert_no_defect_logged(server)
        with Talk(server.connect()) as talk:
            self.assertEqual(talk.ask("GET", "/todo").status, 200, "a proper client must be served afterwards")
        self.assertTrue(server.settles_to(before),
                        f"threads and descriptors should be back to {before} within 3 s, but are {server.counts()}")
        self.assert_no_defect_logged(server)


class SharedServerCase(ServerCase):
    """Tests that share one server, which must be unharmed after all of them."""

    arguments: tuple[str, ...] = ()
    server: Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.server = Server(lab(), *cls.arguments)
        cls.addClassCleanup(cls.server.__exit__)
        before = cls.server.counts()   # only here, because the server's idle threads take a second to end
        cls.addClassCleanup(lambda: cls("assert_unharmed").assert_unharmed(cls.server, before))

    def tearDown(self) -> None:
        self.assert_no_defect_logged(self.server)


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """The bytes of a request; header names with ``_`` for ``-``. A body brings its length."""
    fields = {"Host": "localhost"}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return head.encode("latin-1") + b"\r\n" + (body or b"")


@contextlib.contextmanager
def closing_all() -> Iterator[list[socket.socket]]:
    """A list for sockets; all that is in it is closed on the way out."""
    sockets: list[socket.socket] = []
    try:
        yield sockets
    finally:
        for one in sockets:
            one.close()


def in_terminal(command: Sequence[str], answers: Sequence[tuple[str, str]] = (), cwd: Path | None = None,
                env: Mapping[str, str | None] | None = None) -> tuple[int, str]:
    """Run a command under a terminal of its own.

    ``answers`` are (text to wait for, what to type then) in order; ``"\\x03"`` is Ctrl+C. To a text that
    ends in "assword:" it is typed once the terminal no longer shows what is typed.
    Returns the exit code (negative: the signal) and all that the terminal showed.
    """
    leader, follower = pty.openpty()
    # setsid and then opening the terminal make it the controlling one, so that /dev/tty is it.
    start = 'import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execvp(sys.argv[1], sys.argv[1:])'
    process = subprocess.Popen([sys.executable, "-c", start, *command], cwd=cwd or scratch(), env=environment(env),
                               stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    waiting = list(answers)
    shown = b""
    seen = 0
    deadline = time.monotonic() + PATIENCE

    def answer() -> None:
        nonlocal seen
        while waiting and (at := shown.find(waiting[0][0].encode(), seen)) >= 0:
            if waiting[0][0].endswith("assword:") and termios.tcgetattr(leader)[3] & termios.ECHO:
                return
            seen = at + len(waiting[0][0].encode())
            os.write(leader, waiting.pop(0)[1].encode())

    try:
        while time.monotonic() < deadline:
            answer()
            if not select.select([leader], [], [], 0.01)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                data = os.read(leader, 65536)
            except OSError:   # Linux: the last holder of the terminal has closed it
                break
            if not data:
                break
            shown += data
        process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{command} still runs after:\n{shown.decode(errors='replace')}") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(leader)
    if waiting:
        raise AssertionError(f"never saw {waiting[0][0]!r} in:\n{shown.decode(errors='replace')}")
    return process.returncode, shown.decode(errors="backslashreplace").replace("\r\n", "\n")
