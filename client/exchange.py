"""What the two clients have in common: one HTTPS request within limits, and what to say when it fails.

Who is trusted, and who we say we are, is not decided here but by the context that they bring.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import shlex
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

CERTS = Path(__file__).resolve().parent.parent / "certs"   # found from any current folder
PYTHON = "python" if os.name == "nt" else "python3"        # as it is called in a terminal
SILENCE = 10.0    # seconds that the server may say nothing
EXCHANGE = 30.0   # seconds for everything from connecting to the last byte of the answer

# What to do when the server's certificate does not verify, by OpenSSL's code for the reason.
RESTART = "restart the server if gen_certs.sh has run since it started; if not, is it our server?"
DATES = "compare the clock with the certificate's dates: openssl x509 -noout -dates -in certs/server.crt"
NAMES = "the host in the URL must stand under alt_names in certs/server.cnf"
HINTS = {
    7: RESTART,    # signature failure: a CA of the same name with another key
    18: RESTART,   # self-signed certificate
    19: RESTART,   # self-signed certificate in certificate chain
    20: RESTART,   # unable to get local issuer certificate
    9: DATES,      # not yet valid
    10: DATES,     # expired
    62: NAMES,     # host name mismatch
    64: NAMES,     # IP address mismatch
}


class EveryAnswer(urllib.request.HTTPErrorProcessor):
    """Hands out each answer as it is: an error status raises nothing, and no redirect is followed.

    A redirect could lead our request, and our certificate, elsewhere; a refusal there would prove nothing.
    """

    def https_response(self, request: urllib.request.Request, response: Any) -> Any:
        """The response."""
        return response


@contextlib.contextmanager
def answer(context: ssl.SSLContext, request: urllib.request.Request,
           give_up: Callable[[str], NoReturn]) -> Iterator[http.client.HTTPResponse]:
    """Send the request; yields the answer, to be read inside the ``with``.

    Raises OSError (ssl.SSLError is one) or http.client.HTTPException. After EXCHANGE seconds it calls
    ``give_up`` with the reason, and the program ends with the exit code of its sys.exit().
    """
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context),
        urllib.request.ProxyHandler({}),   # the lab is local: a proxy from the environment could not reach it
        EveryAnswer,
    )

    def out_of_time() -> None:
        try:
            give_up(f"no complete answer from {request.full_url} within {EXCHANGE:.0f} s; is it our server?")
        except SystemExit as end:   # it would end this thread only, not the one that waits for the server
            os._exit(int(end.code or 0))

    # A socket's timeout begins anew with each byte: one every few seconds would keep us for ever.
    timer = threading.Timer(EXCHANGE, out_of_time)
    timer.start()
    try:
        with opener.open(request, timeout=SILENCE) as response:
            yield response
    except urllib.error.URLError as error:   # what fails up to the request; urllib wraps nothing that fails later
        raise error.reason if isinstance(error.reason, OSError) else error from None
    finally:
        timer.cancel()


def explain(error: Exception, url: str) -> str:
    """Why there is no answer, and what to do next, in one line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        hint = HINTS.get(error.verify_code, "is it our server?")
        return f"the server's certificate is not trusted: {error.verify_message}; {hint}"
    if isinstance(error, TimeoutError):
        return f"no answer from {url} within {SILENCE:.0f} s; is our server there, and does it still run?"
    if isinstance(error, ConnectionRefusedError):
        return f"no server at {url}; start it first: {PYTHON} server/server.py"
    return f"no HTTP answer from {url}: {error or type(error).__name__}; is our server there, and does it still run?"


def unusable(file: Path, error: OSError, ours: bool) -> str:
    """Why a certificate file, of ours or of the CA, cannot be used, and what to do; never to replace a CA."""
    in_certs = file.parent.resolve() == CERTS
    if isinstance(error, PermissionError):
        try:
            owner = file.owner()
        except (KeyError, OSError, NotImplementedError):   # unknown, hidden, Windows
            owner = "another user"
        hint = f"it belongs to {owner}, who must let us read it (chmod or chown)"
    elif in_certs and not (CERTS / "ca.crt").exists():
        hint = "make the certificates: bash certs/gen_certs.sh"
    elif in_certs and ours and file.stem != "client":
        hint = f"make it: bash certs/gen_certs.sh client {shlex.quote(file.stem)}"
    else:
        hint = "is this the right path?"
    return f"cannot use {file} ({error.strerror}); {hint}"


def one_line(text: str) -> str:
    """The text in a single line of printable characters."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The text with control characters as JSON escapes: what a server sends must not drive our terminal."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def add_url_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that says where the server is."""
    parser.add_argument("--url", type=https_url, help="where the server is (default https://127.0.0.1:8443/todo, "
                                                      "with the port of MTLS_SERVER_PORT if that is set)")


def https_url(text: str) -> str:
    """A URL as argparse's type. Only https: urllib would open file: as well."""
    if not text.lower().startswith("https://"):
        raise argparse.ArgumentTypeError(f"{text!r} must begin with https://")
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.hostname and parts.hostname.encode("idna") and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not re.fullmatch("[!-~]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no URL such as https://127.0.0.1:8443/todo")
    return text


def default_url(parser: argparse.ArgumentParser) -> str:
    """The lab's server, on the port of the environment; exits with 2 if that is none."""
    port = os.environ.get("MTLS_SERVER_PORT") or "8443"
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        parser.error(f"MTLS_SERVER_PORT: {port!r} is no port (1 to 65535)")
    return f"https://127.0.0.1:{int(port)}/todo"
