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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
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


@functools.cache
def scratch() -> Path:
    """A folder for this run of the tests, removed when it ends. Its name has a space."""
    folder = Path(tempfile.mkdtemp(prefix="mtls lab tests "))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def new_folder(prefix: str) -> Path:
    """A new empty folder inside `scratch`."""
    return Path(tempfile.mkdtemp(prefix=prefix + " ", dir=scratch()))


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
_PREPARED_OPENSSL = """#!/bin/sh
if [ "$1" = genrsa ]; then
  kept="{keys}/${{PREPARED_SET:-first}}-$4-${{3##*/}}"
  [ -e "$kept" ] || {{ "{openssl}" genrsa -out "$kept.$$" "$4" 2>/dev/null && mv "$kept.$$" "$kept"; }} || exit 1
  cp "$kept" "$3"
else
  exec "{openssl}" "$@"
fi
"""


@functools.cache
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
        for folder, names in {
            "certs": ["gen_certs.sh", "ca.cnf", "server.cnf", "client.cnf"],
            "server": ["server.py"],
            "client": ["client.py", "client_no_cert.py"],
        }.items():
            (self.root / folder).mkdir(parents=True, exist_ok=True)
            for file in names:
                shutil.copy(ROOT / folder / file, self.root / folder / file)

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
        context.load_verify_locations(self.certs / "ca.crt")
        if certificate is not None:
            context.load_cert_chain(self.certs / f"{certificate}.crt", self.certs / f"{certificate}.key")
        for name, value in settings.items():
            setattr(context, name, value)
        return context


@functools.cache
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

    ``descriptors`` lowers its ``ulimit -n``; other keywords go to `subprocess.Popen`.
    """

    def __init__(self, of: Lab, *arguments: str, env: Mapping[str, str | None] | None = None,
                 descriptors: int | None = None) -> None:
        command = [sys.executable, "-W", "error", str(of.root / "server" / "server.py"), "--port", "0", *arguments]
        if descriptors is not None:
            command = ["sh", "-c", f'ulimit -n {descriptors}; exec "$@"', "sh", *command]
        self.lab = of
        self.process = subprocess.Popen(command, cwd=scratch(), env=environment(env), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
                                        errors="backslashreplace")
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
        """A TLS connection to it, after the handshake."""
        context = context or self.lab.context(certificate)
        plain = self.connect_plain(timeout)
        try:
            return context.wrap_socket(plain, server_hostname="127.0.0.1")
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

    ``answers`` are (text to wait for, what to type then) in order; ``"\\x03"`` is Ctrl+C.
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
    try:
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 0.1)[0]:
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
            while waiting and (at := shown.find(waiting[0][0].encode(), seen)) >= 0:
                seen = at + len(waiting[0][0].encode())
                os.write(leader, waiting.pop(0)[1].encode())
        process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(leader)
    if waiting:
        raise AssertionError(f"never saw {waiting[0][0]!r} in:\n{shown.decode(errors='replace')}")
    return process.returncode, shown.decode(errors="backslashreplace").replace("\r\n", "\n")
