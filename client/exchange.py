"""What the two clients share: one HTTPS request within limits, and how its answer is read and shown.

The context that a client passes in decides which server to trust and which certificate to present. What a client
says when a request fails is in reasons.py.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import http.client
import json
import os
import re
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

CERTS = Path(__file__).resolve().parent.parent / "certs"   # wherever you start it from
SILENCE = 10.0           # seconds that the server may say nothing
EXCHANGE = 30.0          # seconds for everything from connecting to the last byte of the answer
MAX_ANSWER = 1024 ** 2   # bytes that a server may send in one exchange
MAX_DEPTH = 10           # levels of arrays and objects in an answer; our server's answers have 3


class TooMuch(OSError):
    """The server has sent more than MAX_ANSWER."""


class Connection(ssl.SSLSocket):
    """A TLS connection that counts the bytes it receives, and stops at MAX_ANSWER.

    A context with this class as its ``sslsocket_class`` creates it instead of an ssl.SSLSocket. At this level, one
    limit covers everything that a server could send endlessly: 100 Continue, headers, chunks, a body.
    """

    received: ClassVar[int] = 0   # bytes, decrypted. In the class, because a client has one exchange at a time
    show: ClassVar[Callable[[ssl.SSLSocket | None], None]] = staticmethod(lambda _: None)
    """For -v: called when the handshake ends, with None if it failed."""

    def do_handshake(self, block: bool = False) -> None:
        """Do the handshake. Raises OSError."""
        try:
            super().do_handshake(block)
        except OSError:
            Connection.show(None)
            raise
        Connection.show(self)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Read; returns the number of bytes. Raises TooMuch, or another OSError."""
        number = super().recv_into(*args, **kwargs)
        Connection.received += number
        if Connection.received > MAX_ANSWER:
            raise TooMuch
        return number


class EveryAnswer(urllib.request.HTTPErrorProcessor):
    """Returns each answer as it is: an error status raises nothing, and redirects are not followed.

    A redirect could send our request and our certificate elsewhere; a refusal there would prove nothing.
    """

    def https_response(self, request: urllib.request.Request, response: Any) -> Any:
        """The response."""
        return response


@contextlib.contextmanager
def answer(context: ssl.SSLContext, request: urllib.request.Request,
           give_up: Callable[[str], NoReturn]) -> Iterator[http.client.HTTPResponse]:
    """Send the request; yields the answer, to be read inside the ``with``.

    The context's ``sslsocket_class`` must be `Connection` or a subclass. Raises OSError (ssl.SSLError is one) or
    http.client.HTTPException. After EXCHANGE seconds it calls ``give_up`` with the reason, and the program ends
    with the exit code of its sys.exit().
    """
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context),
        urllib.request.ProxyHandler({}),   # a proxy from the environment could not reach our localhost
        EveryAnswer,
    )

    def out_of_time() -> None:
        try:
            give_up(f"no complete answer from {request.full_url} within {EXCHANGE:.0f} s; is it our server?")
        except SystemExit as end:   # this would end only the timer's thread
            os._exit(int(end.code or 0))

    # A socket's timeout restarts with each byte: a byte every few seconds would make us wait forever.
    timer = threading.Timer(EXCHANGE, out_of_time)
    timer.daemon = True   # it never keeps the program alive
    Connection.received = 0
    try:
        timer.start()
        with opener.open(request, timeout=SILENCE) as response:
            yield response
    except urllib.error.URLError as error:   # up to the request, urllib wraps errors; later ones it does not
        raise error.reason if isinstance(error.reason, OSError) else error from None
    finally:
        timer.cancel()


def read(answer: http.client.HTTPResponse) -> bytes:
    """The whole body of an answer. Raises OSError or http.client.HTTPException."""
    if "Transfer-Encoding" in answer.headers:   # http.client accepts much that is not a valid chunk
        raise http.client.HTTPException("it uses a transfer coding, which our server never does")
    body = answer.read(MAX_ANSWER)   # with a limit, it allocates no more, whatever Content-Length says,
    if answer.length:                # but it does not report a missing end
        raise http.client.IncompleteRead(body, answer.length)
    return body


def decode(body: bytes) -> Any:
    """The JSON in a body. Raises ValueError or RecursionError if our server would not send it."""
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):   # some programs take the first, some the last (RFC 8259 section 4)
            raise ValueError("a name occurs twice")
        return dict(pairs)

    value = json.loads(body.decode(), object_pairs_hook=object_of)
    json.dumps(value, allow_nan=False)   # json.loads accepts NaN, Infinity and 1e999, which are not JSON
    level = [value]
    for _ in range(MAX_DEPTH):   # 1 MB of nested arrays would become 1 GB when indented
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    return value


def output_failed(error: OSError, title: str, code: int) -> NoReturn:
    """End at once, with this exit code: sys.exit() would try to write the same again."""
    if error.errno not in (errno.EPIPE, errno.EINVAL):   # its reader has left, as in: | head -3 (Windows: EINVAL)
        with contextlib.suppress(OSError):   # stderr may have the same problem
            print(f"[{title}] ERROR: cannot write the output ({error.strerror})", file=sys.stderr)
    os._exit(code)


def one_line(text: str) -> str:
    """The text in a single line of printable characters."""
    return printable(" ".join(text.split()))


def printable(text: str, keep: str = "") -> str:
    """The text with all control characters, even line feeds, as JSON escapes, except those in ``keep``.

    What a server sends must not control our terminal, or look like a line of our own.
    """
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)


def add_url_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the server's URL."""
    parser.add_argument("--url", type=https_url, help="where the server is (default https://127.0.0.1:8443/todo, "
                                                      "with the port of MTLS_SERVER_PORT if that is set)")


def https_url(text: str) -> str:
    """Argparse's type for a URL. Only https: urllib would also open file: URLs."""
    if not text.lower().startswith("https://"):
        raise argparse.ArgumentTypeError(f"{text!r} must begin with https://")
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.hostname and parts.hostname.encode("idna") and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as https://127.0.0.1:8443/todo")
    return text


def default_url(parser: argparse.ArgumentParser) -> str:
    """The lab's server, on the port from the environment; exits with 2 if that is not a port."""
    port = os.environ.get("MTLS_SERVER_PORT") or "8443"
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        parser.error(f"MTLS_SERVER_PORT: {port!r} is not a port (1 to 65535)")
    return f"https://127.0.0.1:{int(port)}/todo"
