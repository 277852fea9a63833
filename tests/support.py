"""What the tests share: a copy of the lab with certificates, its processes, and a TLS client."""

from __future__ import annotations

import atexit
import compileall
import contextlib
import functools
import http.client
import json
import os
import pty
import queue
import random
import re
import resource
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
from typing import IO, Any, BinaryIO, TypeVar

A = TypeVar("A")
B = TypeVar("B")

ROOT = Path(__file__).resolve().parent.parent


def once(make: Callable[[], A]) -> Callable[[], A]:
    """Decorator: makes the value on the first call, and only once even if tests run side by side."""
    lock = threading.RLock()
    cached = functools.cache(make)

    @functools.wraps(make)
    def get() -> A:
        with lock:
            return cached()
    return get


PATIENCE = 30.0
"""Seconds after which a test gives up waiting for something that should happen at once."""

# The file descriptors that this process may have, set at import because it concerns all tests.
_HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
DESCRIPTORS = 4000 if _HARD == resource.RLIM_INFINITY else min(4000, _HARD)
resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, _HARD))

# Variables that affect the lab or its tools must not leak in from the developer's shell.
_STEERING = ("MTLS_", "SSL", "OPENSSL", "PYTHON", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "PREPARED_")


def environment(extra: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The tests' environment, without variables that affect the lab. ``extra`` adds or (None) removes variables."""
    own = {name: value for name, value in os.environ.items() if not name.upper().startswith(_STEERING)}
    own["SSL_CERT_FILE"] = os.devnull   # openssl x509 reads the system's CAs each time, which takes 15 of its 18 ms
    return {name: value for name, value in {**own, **(extra or {})}.items() if value is not None}


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
    """The function's results for all cases, a few at a time: starting processes benefits from every core."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(function, cases))


def comes_true(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether the condition holds now or within this many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def succeed(*command: str | Path, cwd: Path | None = None, env: Mapping[str, str | None] | None = None,
            typed: str = "") -> str:
    """Run a command without a terminal; returns its output, or raises AssertionError with it on failure.

    What is ``typed`` comes from a pipe. Without a terminal, openssl reads a password from there, too.
    """
    result = subprocess.run(command, cwd=cwd or scratch(), env=environment(env), input=typed, text=True, check=False,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    if result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout}")
    return result.stdout


def openssl(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run the real openssl, see `succeed`. It does not read the system's CAs, which takes longer than all else."""
    return succeed("openssl", *arguments, cwd=cwd, env={"SSL_CERT_FILE": os.devnull})


# Generating a 4096-bit key takes seconds. This openssl keeps each key that it makes, by set, size
# and file name, and copies it the next time; anything else goes to the real openssl. It creates
# files as LibreSSL does, with the mode that the umask leaves. To save time, the CA's key has 2048
# bits in every set but the first, and additional clients of a set share one key.
_PREPARED_OPENSSL = """#!/bin/sh
if [ "$1" = genrsa ]; then
  set=${{PREPARED_SET:-first}}
  bits=$4; [ "$set" = first ] || bits=2048
  case $3 in */ca.key | */server.key | */client.key) name=${{3##*/}} ;; *) name=other.key ;; esac
  kept="{keys}/$set-$bits-$name"
  [ -e "$kept" ] || {{ "{openssl}" genrsa -out "$kept.$$" "$bits" 2>/dev/null && mv "$kept.$$" "$kept"; }} || exit 1
  cat "$kept" >"$3"
else
  SSL_CERT_FILE=/dev/null exec "{openssl}" "$@"
fi
"""


@once
def prepared_path() -> str:
    """A PATH whose openssl copies prepared keys (``genrsa -out FILE BITS`` only)."""
    folder = new_folder("prepared")
    real = shutil.which("openssl")
    assert real, "the tests need the openssl command"
    fake = folder / "openssl"
    fake.write_text(_PREPARED_OPENSSL.format(keys=folder, openssl=real))
    fake.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# Starting Python takes several times as long as what a client does. This one has started, and forks for each run.
_FORKING = """if True:
    import argparse, gettext, http.client, json, locale, os, shutil, signal, ssl, sys, tempfile, urllib.request
    for line in sys.stdin:
        code, sys.argv, variables, folder = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            if not (child := os.fork()):
                for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), out.fileno(), err.fileno())):
                    os.dup2(descriptor, number)
                os.environ.clear()
                os.environ.update(variables)
                os.chdir(folder)
                signal.alarm(60)
                exec(code)
                sys.exit()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said = [os.pread(file.fileno(), 10 ** 7, 0).decode(errors="surrogateescape") for file in (out, err)]
        print(json.dumps([status, *said]), flush=True)
"""
_waiting: queue.LifoQueue[subprocess.Popen[str]] = queue.LifoQueue()


def forked(code: str, *arguments: str, env: Mapping[str, str | None] | None = None,
           cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python code that needs no Python of its own; ``arguments`` are its sys.argv."""
    try:
        python = _waiting.get_nowait()
    except queue.Empty:
        python = subprocess.Popen([sys.executable, "-W", "error", "-c", _FORKING], env=environment(), text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(python.communicate)   # and so it ends
    assert python.stdin and python.stdout
    print(json.dumps([code, arguments, environment(env), str(cwd or scratch())]), file=python.stdin, flush=True)
    code_and_output = json.loads(python.stdout.readline())
    _waiting.put(python)
    return subprocess.CompletedProcess(arguments, *code_and_output)


def free_port() -> str:
    """A port for a program that needs a fixed one, outside the range from which the system picks free ports."""
    while True:
        port = random.randrange(15_000, 30_000)   # noqa: S311   # no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


@once
def compiled() -> Path:
    """The project's programs, compiled, so that not every copy has to compile them again."""
    folder = new_folder("compiled")
    for pattern in ("certs/*.sh", "certs/*.cnf", "server/*.py", "client/*.py"):
        for file in ROOT.glob(pattern):
            (folder / file.parent.name).mkdir(exist_ok=True)
            shutil.copy(file, folder / file.parent.name)
    compileall.compile_dir(folder, quiet=1)
    return folder


class Lab:
    """A copy of the project, without certificates until `generate` or `issue` makes them."""

    def __init__(self, name: str = "lab") -> None:
        self.root = new_folder(name) / "mtls-lab"
        self.certs = self.root / "certs"
        shutil.copytree(compiled(), self.root)

    def generate(self, *arguments: str, **variables: str) -> None:
        """Run gen_certs.sh with prepared keys and no terminal."""
        succeed("bash", self.certs / "gen_certs.sh", *arguments, env={"PATH": prepared_path(), **variables})

    def take(self, steps: str) -> str:
        """Run commands in the project's folder, as a program prints them; returns what they print.

        To the question for a password the answer is "secret". $LAB and $OTHER are the certs/ of the shared labs.
        """
        return succeed("sh", "-c", steps, cwd=self.root, typed="secret\n", env={
            "PATH": prepared_path(), "MTLS_PFX_PASSWORD": "secret", "LAB": str(lab().certs),
            "OTHER": str(other_lab().certs)})

    def run(self, script: str, *arguments: str,
            env: Mapping[str, str | None] | None = None) -> subprocess.CompletedProcess[str]:
        """Run one of the Python programs, as in ``run("client/client.py", "--url", ...)``."""
        return subprocess.run([sys.executable, "-W", "error", str(self.root / script), *arguments], cwd=scratch(),
                              env=environment(env), stdin=subprocess.DEVNULL, capture_output=True, check=False,
                              encoding="utf-8", errors="backslashreplace", timeout=PATIENCE * 2)

    def context(self, certificate: str | None = "client", of: Lab | None = None, **settings: Any) -> ssl.SSLContext:
        """A client's context: trusts the lab's CA, presents its or another's ``certificate`` (None: none)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        # Some Pythons (Debian's 3.11) set this, and then an end without close_notify looks like one with it.
        context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        context.load_verify_locations(self.certs / "ca.crt")
        if certificate is not None:
            path = (of or self).certs / certificate
            context.load_cert_chain(f"{path}.crt", f"{path}.key")
        for name, value in settings.items():
            setattr(context, name, value)
        return context


@once
def lab() -> Lab:
    """The lab that tests share: with all certificates, and mallory's. Add files, but do not change any."""
    shared = Lab("shared")
    shared.generate()
    shared.generate("client", "mallory")
    return shared


@once
def other_lab() -> Lab:
    """A lab whose CA is another one with the same name."""
    other = Lab("other")
    other.generate(PREPARED_SET="other")
    return other


def copy_of_lab(name: str, spoil: str = "") -> Lab:
    """A copy of the shared lab that a test may change; ``spoil`` (sh) is done first, in its certs/."""
    copy = Lab(name)
    for file in lab().certs.iterdir():
        if file.stem in ("ca", "server", "client", "mallory"):   # not what other tests add
            shutil.copy(file, copy.certs)
    if spoil:
        copy.take(f"cd certs; {spoil}")
    return copy


_CA = """[req]
distinguished_name = empty
[empty]
[lab]
database = index
serial = serial
new_certs_dir = .
policy = any
[any]
commonName = optional
[v3]
"""


def issue(of: Lab, name: str, subject: str, extensions: str = "extendedKeyUsage = clientAuth",
          start: str | None = None, end: str | None = None) -> None:
    """Let the lab's CA certify any subject: ``name``.crt and .key in its certs.

    From now on for two days, or from ``start`` to ``end`` (YYYYMMDDHHMMSSZ).
    """
    folder = new_folder("issue")
    (folder / "cnf").write_text(_CA + extensions + "\n")
    (folder / "index").touch()
    (folder / "serial").write_text("77\n")
    key, certificate = (of.certs / f"{name}.{ending}" for ending in ("key", "crt"))
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    # Not with certs/ca.cnf: LibreSSL ignores -subj where the file says "prompt = no".
    openssl("req", "-new", "-utf8", "-config", "cnf", "-subj", subject, "-key", key, "-out", "csr",
            cwd=folder)
    # Of all the ways to sign, only this one can set dates in every openssl.
    openssl("ca", "-batch", "-notext", "-preserveDN", "-utf8", "-md", "sha256", "-config", "cnf", "-name", "lab",
            "-extensions", "v3", "-cert", of.certs / "ca.crt", "-keyfile", of.certs / "ca.key", "-in", "csr",
            "-out", certificate, *(("-startdate", start, "-enddate", end) if start and end else ("-days", "2")),
            cwd=folder)


class Output:
    """What a process writes to a pipe or a terminal, collected by a thread while ``reading`` is set.

    After each piece that it takes, the thread calls ``heard`` with all so far.
    """

    def __init__(self, stream: IO[bytes], heard: Callable[[bytearray], None] = lambda _: None) -> None:
        self.reading = threading.Event()
        self.reading.set()
        self._data = bytearray()
        self.ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._collect, args=(stream, heard), daemon=True).start()

    def _collect(self, stream: IO[bytes], heard: Callable[[bytearray], None]) -> None:
        with stream, contextlib.suppress(OSError):   # so Linux reports the end of a terminal
            while piece := os.read(stream.fileno(), 65536):
                with self._changed:
                    self._data += piece
                    self._changed.notify_all()
                heard(self._data)
                self.reading.wait()
        with self._changed:
            self.ended = True
            self._changed.notify_all()

    def text(self) -> str:
        """All so far."""
        with self._changed:
            return self._data.decode(errors="backslashreplace")

    def now(self) -> list[str]:
        """The lines so far."""
        return self.text().split("\n")[:-1]

    def wait_for(self, wanted: Callable[[list[str]], bool] | str) -> list[str]:
        """Wait until a line contains the text, or the lines satisfy the function; returns them."""
        holds = wanted if callable(wanted) else lambda lines: any(wanted in line for line in lines)
        self.until(lambda: holds(self.now()))
        if not holds(lines := self.now()):
            raise AssertionError(f"never saw {wanted!r}; the process printed {lines}")
        return lines

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait until it has ended or the condition holds; False if neither happens in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ended or condition(), PATIENCE)

    def all(self) -> list[str]:
        """All lines of a process that has ended."""
        self.reading.set()
        self.until(lambda: False)
        return self.now()


class Server(contextlib.AbstractContextManager["Server"]):
    """A running ``server.py``. Use it as a context manager: it is ended on exit.

    It listens on a free port, unless arguments or ``env`` say otherwise. ``before`` is a shell command that runs
    first ("ulimit -n 48"), ``constants`` are set then ({"connections.NAME": 1.5}), ``stderr`` is as for Popen.
    """

    def __init__(self, of: Lab, *arguments: str, env: Mapping[str, str | None] | None = None, before: str = ":",
                 constants: Mapping[str, object] | None = None, stderr: int | IO[bytes] = subprocess.PIPE) -> None:
        start = [str(of.root / "server" / "server.py")]
        if constants:
            sets = "".join(f"import {name.split('.')[0]}; {name} = {value!r}\n" for name, value in constants.items())
            start = ["-c", f"import sys; sys.path.insert(0, {str(of.root / 'server')!r})\n"
                           f"{sets}import server; server.main()"]
        self.process = subprocess.Popen(
            ["sh", "-c", f'{before}; exec "$@"', "sh", sys.executable, "-W", "error", *start, *arguments],
            cwd=scratch(), env=environment({"MTLS_SERVER_PORT": "0", **(env or {})}), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=stderr)
        atexit.register(self.process.kill)   # also when the tests are interrupted
        assert self.process.stdout
        self.stdout = Output(self.process.stdout)
        self.stderr = Output(self.process.stderr) if self.process.stderr else self.stdout
        try:
            lines = self.stdout.wait_for("Press Ctrl+C")
        except AssertionError as error:
            self.__exit__()
            raise AssertionError(f"{error}\nstderr: {self.stderr.all()}") from None
        self.port = int(next(line for line in lines if "listening on" in line).rpartition(":")[2])
        self.url = f"https://127.0.0.1:{self.port}/todo"
        self.at_rest = self.has("fd")
        self.context = functools.cache(of.context)   # making one costs as much as a handshake

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stdout.all()
        self.stderr.all()

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Ask it to end and wait; returns the exit code."""
        self.process.send_signal(with_signal)
        return self.process.wait(PATIENCE)

    def has(self, what: str) -> int:
        """How many descriptors ("fd") or threads ("task") it has; 0 where there is no /proc."""
        return len(list(Path("/proc", str(self.process.pid), what).glob("*")))

    def peak_memory(self) -> float:
        """Its peak resident memory so far, in MB; 0 where there is no /proc."""
        for status in Path("/proc", str(self.process.pid)).glob("status"):
            return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) / 1024
        return 0

    def settles(self, seconds: float = 6.0) -> bool:
        """Whether it is back to the descriptors that it started with, within the given time."""
        return comes_true(lambda: self.has("fd") <= self.at_rest, seconds)

    def connect(self, certificate: str | None = "client", context: ssl.SSLContext | None = None,
                timeout: float = PATIENCE) -> ssl.SSLSocket:
        """A TLS connection to it, after the handshake. Reading an end without close_notify raises SSLEOFError."""
        with contextlib.ExitStack() as failed:
            plain = failed.enter_context(self.connect_plain(timeout))
            tls = (context or self.context(certificate)).wrap_socket(plain, server_hostname="127.0.0.1",
                                                                     suppress_ragged_eofs=False)
            failed.pop_all()
            return tls

    def connect_plain(self, timeout: float = PATIENCE, host: str = "127.0.0.1") -> socket.socket:
        """A TCP connection to it, no TLS."""
        return socket.create_connection((host, self.port), timeout=timeout)


class Answer:
    """An HTTP response: ``status``, ``headers`` and ``body``, or ConnectionError if it is incomplete.

    It is read from a connection, or from a file if another answer may follow.
    """

    def __init__(self, source: socket.socket | BinaryIO, method: str = "GET") -> None:
        file = source.makefile("rb") if isinstance(source, socket.socket) else source
        self.status = 100
        while self.status == 100:
            line = file.readline(65536)
            if not (match := re.fullmatch(rb"HTTP/1\.1 ([1-5]\d\d) [ -~]*\r\n", line)):
                raise ConnectionError(f"no HTTP answer, but {line!r}")
            self.status = int(match[1])
            self.headers = http.client.parse_headers(file)
        length = 0 if method == "HEAD" else int(self.headers["Content-Length"])
        self.body = file.read(length)
        if len(self.body) < length:
            raise ConnectionError(f"the body ends after {len(self.body)} of {length} bytes")

    @property
    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


_BODY = b'{"task": "Finished in the end"}'


class Talk(contextlib.AbstractContextManager["Talk"]):
    """A TLS connection that is read answer by answer, also when several arrive together."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self.connection = connection
        self.file = connection.makefile("rb")

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.connection.close()

    def send(self, data: bytes) -> None:
        """Send all of it."""
        self.connection.sendall(data)

    def answer(self, method: str = "GET") -> Answer:
        """The next answer; ``method`` is that of its request (after HEAD comes no body)."""
        return Answer(self.file, method)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Send a request, see `request`, and read its answer."""
        self.send(request(method, path, body, **headers))
        return self.answer(method)

    def begin_post(self) -> None:
        """Begin a POST, and wait until the server has begun to read it."""
        self.send(request("POST", "/todo", _BODY, Expect="100-continue")[:-len(_BODY)])
        assert (self.file.readline(), self.file.readline()) == (b"HTTP/1.1 100 Continue\r\n", b"\r\n")

    def end_post(self) -> Answer:
        """The rest of it, and its answer."""
        self.send(_BODY)
        return self.answer()


class Wire(contextlib.AbstractContextManager["Wire"]):
    """A TLS client whose bytes the test carries itself, and so can hold back or send one by one."""

    def __init__(self, server: Server, certificate: str | None = "client") -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = server.context(certificate).wrap_bio(self._incoming, self._outgoing, server_hostname="127.0.0.1")
        self.plain = server.connect_plain()

    def __exit__(self, *_: object) -> None:
        self.plain.close()

    def bytes_of(self, step: Callable[[], object]) -> bytes:
        """Take a step of TLS, as in ``bytes_of(wire.tls.do_handshake)``; returns the bytes that it wants to send."""
        with contextlib.suppress(ssl.SSLWantReadError):
            step()
        return self._outgoing.read()

    def flight(self) -> bytes:
        """The last thing that a client has to send in a TLS 1.3 handshake; what comes before it is sent here."""
        while True:
            flight = self.bytes_of(self.tls.do_handshake)
            with contextlib.suppress(ValueError):   # the handshake is not over: there is no certificate yet
                self.tls.getpeercert()
                return flight
            self.plain.sendall(flight)
            self._incoming.write(self.plain.recv(65536))

    def shake_hands(self) -> None:
        """The whole handshake, as TLS 1.3 does it: nothing comes back after the flight."""
        self.plain.sendall(self.flight())

    def send(self, data: bytes) -> None:
        """Send it encrypted."""
        self.plain.sendall(self.bytes_of(lambda: self.tls.write(data)))

    def hear(self) -> bytes:
        """All that the server sends until its close_notify. An end without one raises an OSError."""
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

    @contextlib.contextmanager
    def serving(self, *arguments: str, **settings: Any) -> Iterator[Server]:
        """A server, see `Server`, that must be unharmed afterwards."""
        with Server(lab(), *arguments, **settings) as server:
            yield server
            self.assert_unharmed(server)

    def assert_ends_well(self, talk: Talk, within: float = 8.0) -> None:
        """The server sends no more and closes properly, within this many seconds."""
        rest = b""
        talk.connection.settimeout(within)
        try:
            while piece := talk.file.read(65536):
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
        self.assertEqual(defects, [], "the server should log no bug of its own")

    def assert_served(self, server: Server, message: str = "a valid client must be served") -> None:
        """A new client gets its answer and a clean end."""
        with Talk(server.connect()) as talk:
            self.assertEqual(talk.ask("GET", "/todo", Connection="close").status, 200, message)
            self.assert_ends_well(talk)

    def assert_unharmed(self, server: Server) -> None:
        """A valid client is served, all descriptors are closed again, and no bug was logged."""
        self.assert_no_defect_logged(server)
        self.assert_served(server, "a valid client must be served afterwards")
        self.assertTrue(server.settles(), f"{server.has('fd')} descriptors are open, not {server.at_rest}")
        self.assert_no_defect_logged(server)


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """The bytes of a request; in header names, ``_`` stands for ``-``. A body adds its Content-Length."""
    fields = {"Host": "localhost"}
    if body is not None:
        fields |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return head.encode("latin-1") + b"\r\n" + (body or b"")


class Terminal:
    """A command that runs under a terminal of its own; a thread collects what it shows and types answers.

    ``answers`` are (text to wait for, what to type then) in order; ``"\\x03"`` is Ctrl+C. To a text that
    ends in "assword:" it is typed once the terminal no longer shows what is typed.
    """

    def __init__(self, command: Sequence[str], answers: Sequence[tuple[str, str]] = (), cwd: Path | None = None,
                 env: Mapping[str, str | None] | None = None) -> None:
        self._leader, follower = pty.openpty()
        # setsid and then opening the terminal make it the controlling one, so that /dev/tty is it.
        start = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execvp(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen([sys.executable, "-c", start, *command], cwd=cwd or scratch(),
                                        env=environment(env), stdin=follower, stdout=follower, stderr=follower,
                                        start_new_session=True)
        os.close(follower)
        self.unanswered = list(answers)
        self._seen = 0
        self._output = Output(os.fdopen(self._leader, "rb", 0), self._answer)

    def _answer(self, shown: bytearray) -> None:
        while self.unanswered and (at := shown.find(self.unanswered[0][0].encode(), self._seen)) >= 0:
            text, typed = self.unanswered[0]
            if text.endswith("assword:"):
                comes_true(lambda: not termios.tcgetattr(self._leader)[3] & termios.ECHO)
            self._seen = at + len(text.encode())
            os.write(self._leader, typed.encode())
            del self.unanswered[0]

    def text(self) -> str:
        """What it has shown so far."""
        return self._output.text().replace("\r", "")

    def wait(self, for_text: str | None = None) -> str:
        """Wait until it has ended, or shown the text; returns what it has shown."""
        if not self._output.until(lambda: for_text is not None and for_text in self.text()):
            raise AssertionError(f"did not end in {PATIENCE:.0f} s; it showed:\n{self.text()}")
        return self.text()

    def close(self) -> int:
        """End it, as Ctrl+C would, if it still runs; returns the exit code (negative: the signal)."""
        try:
            if self.process.poll() is None and not self._output.ended:
                os.killpg(self.process.pid, signal.SIGINT)
            return self.process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._output.all()


def in_terminal(command: Sequence[str], answers: Sequence[tuple[str, str]] = (), cwd: Path | None = None,
                env: Mapping[str, str | None] | None = None) -> tuple[int, str]:
    """Run a command to its end, see `Terminal`; returns the exit code and all that the terminal showed."""
    terminal = Terminal(command, answers, cwd, env)
    try:
        shown = terminal.wait()
    finally:
        code = terminal.close()
    if terminal.unanswered:
        raise AssertionError(f"never saw {terminal.unanswered[0][0]!r} in:\n{shown}")
    return code, shown
