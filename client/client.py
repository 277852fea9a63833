#!/usr/bin/env python3
"""The lab's mutual TLS client: creates a TODO item with POST /todo, then fetches the list with GET.

It proves who it is with certs/client.crt and its key, and accepts only a server whose
certificate our own CA has signed for the host in the URL.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

CERTS = Path(__file__).resolve().parent.parent / "certs"   # found from any current folder
TIMEOUT = 10.0   # seconds of silence from the server


def fail(problem: str) -> NoReturn:
    """One line on stderr that says what is wrong and what to do; exit 1."""
    print(f"[CLIENT] ERROR: {printable(' '.join(problem.split()))}", file=sys.stderr)
    sys.exit(1)


def printable(text: str) -> str:
    """The text with control characters as JSON escapes: what a server sends must not drive our terminal."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def tls_context(cert: Path, key: Path, cacert: Path) -> ssl.SSLContext:
    """The client's side of mutual TLS. Raises OSError (ssl.SSLError is one) if a file cannot be used."""
    for file in (cert, key, cacert):
        file.read_bytes()   # names the file that is missing, which ssl does not
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # ① Verify the server against our own CA only. With the system's trust store, a certificate
    #    from any public CA for the same name would do.
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    context.load_verify_locations(cafile=cacert)
    # The name must be in the SAN: a CN is free text, not checked as a host name (RFC 9525 section 2).
    context.hostname_checks_common_name = False
    # ② Present our certificate, and prove with the key that it is ours. The empty password makes
    #    an encrypted key an error instead of a question.
    context.load_cert_chain(certfile=cert, keyfile=key, password="")
    # TLS 1.0 and 1.1 are deprecated (RFC 8996).
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # For Wireshark, if asked for. Private, because whoever has this file can read the traffic.
    if keylog := os.environ.get("SSLKEYLOGFILE"):
        Path(keylog).touch(mode=0o600)
        context.keylog_filename = keylog
    return context


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Following a redirect could lead our request, and our certificate, elsewhere: an error here."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none; urllib then raises HTTPError."""


def exchange(opener: urllib.request.OpenerDirector, url: str, item: dict[str, Any] | None = None) -> tuple[int, Any]:
    """POST ``item`` as JSON, or GET if there is none; returns the status and the decoded reply."""
    request = urllib.request.Request(url)
    if item is not None:
        request.data = json.dumps(item, ensure_ascii=False).encode()
        request.add_header("Content-Type", "application/json")
    with opener.open(request, timeout=TIMEOUT) as response:
        return response.status, json.loads(response.read().decode())


def listing(reply: dict[str, Any]) -> str:
    """The reply of GET as JSON with one item on each line, which reads better than one field on each."""
    items = ",\n".join("    " + json.dumps(item, ensure_ascii=False) for item in reply["todos"])
    client = json.dumps(reply["client"], ensure_ascii=False)
    return f'{{\n  "client": {client},\n  "todos": [\n{items}\n  ]\n}}'


def explain(error: BaseException, url: str) -> str:
    """What went wrong with an exchange, and what to do next, in one line."""
    if isinstance(error, urllib.error.HTTPError):
        body = ""
        try:
            with error:
                body = error.read(100_000).decode(errors="replace")
            body = json.loads(body)["error"]
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
            body = body or error.reason
        return f"the server answered HTTP {error.code}: {body}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason   # urllib wraps what fails while it sends, but not what fails later
    if isinstance(error, ssl.SSLCertVerificationError):
        return (f"the server's certificate is not trusted: {error.verify_message}; is this our server, "
                "and were both made by the same run of: bash certs/gen_certs.sh")
    if isinstance(error, ssl.SSLError) and "ALERT" in (error.reason or ""):
        return (f"the server refused us: {error.args[-1]}; "
                "is our certificate signed by the CA that it trusts, for clients, and not expired?")
    if isinstance(error, TimeoutError):
        return f"no answer from {url} within {TIMEOUT:.0f} s; is our server there, and does it still run?"
    if isinstance(error, ConnectionRefusedError):
        return f"no server at {url}; start it first: python3 server/server.py"
    return f"no HTTP answer from {url}: {error or type(error).__name__}; is our server there, and does it still run?"


def https_url(text: str) -> str:
    """A URL as argparse's type; ValueError if it is none. Only https: urllib would open file: as well."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.port == 0 or not text.isascii():
        raise ValueError(text)
    return text


def parse_arguments() -> argparse.Namespace:
    """Flags with curl's names. Exits with 2 on what makes no sense."""
    port = os.environ.get("MTLS_SERVER_PORT") or "8443"
    parser = argparse.ArgumentParser(description="The lab's mutual TLS client: POST /todo, then GET /todo.")
    parser.add_argument("task", nargs="?", metavar="TASK", default="Añadir endpoint POST",
                        help="the task to create (default %(default)s)")
    parser.add_argument("--url", type=https_url, default=f"https://127.0.0.1:{port}/todo",
                        help="where the server is (default https://127.0.0.1:8443/todo, with the port of "
                             "MTLS_SERVER_PORT if that is set)")
    parser.add_argument("--cert", type=Path, default=CERTS / "client.crt", metavar="FILE",
                        help="our certificate (default certs/client.crt)")
    parser.add_argument("--key", type=Path, default=CERTS / "client.key", metavar="FILE",
                        help="its private key (default certs/client.key)")
    parser.add_argument("--cacert", type=Path, default=CERTS / "ca.crt", metavar="FILE",
                        help="the CA that we trust (default certs/ca.crt)")
    arguments = parser.parse_args()
    if any("\ud800" <= c <= "\udfff" for c in arguments.task):   # how Python shows bytes that it cannot decode
        parser.error("argument TASK: is no valid text in this terminal's encoding")
    return arguments


def main() -> None:
    """POST, then GET, printing each step."""
    for stream in (sys.stdout, sys.stderr):
        if stream:   # not closed
            stream.reconfigure(errors="backslashreplace")   # type: ignore[union-attr]  # where ñ cannot be shown
    arguments = parse_arguments()
    try:
        context = tls_context(arguments.cert, arguments.key, arguments.cacert)
    except ssl.SSLError as error:
        fail(f"these certificate files do not fit together or are damaged: {error.args[-1]}; "
             "make a new set: bash certs/gen_certs.sh")
    except OSError as error:
        fail(f"cannot use {error.filename or 'SSLKEYLOGFILE'} ({error.strerror}); "
             "if it is a certificate that is missing, make them: bash certs/gen_certs.sh")
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context),
        urllib.request.ProxyHandler({}),   # the lab is local: a proxy from the environment could not reach it
        NoRedirects,
    )
    print(f"[CLIENT] Connecting to {arguments.url}")
    print(f"[CLIENT] Client cert: {arguments.cert.name}")
    print(f"[CLIENT] CA trust: {arguments.cacert.name}")
    try:
        print("[CLIENT] Creating new TODO with POST /todo ...", flush=True)
        status, reply = exchange(opener, arguments.url, {"task": arguments.task, "done": False})
        print(f"[CLIENT] POST response (HTTP {status}):")
        print(printable(json.dumps(reply, indent=2, ensure_ascii=False)))

        print("[CLIENT] Fetching TODO list with GET /todo ...", flush=True)
        status, reply = exchange(opener, arguments.url)
        shown = listing(reply)
        print(f"[CLIENT] Authenticated as: \"{printable(reply['client'])}\"")
        print(f"[CLIENT] Response (HTTP {status}):")
        print(printable(shown))
    except BrokenPipeError:   # of our own output: urllib wraps those of the connection
        raise
    except (OSError, http.client.HTTPException) as error:
        fail(explain(error, arguments.url))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{arguments.url} did not send the JSON that our server sends: {error!r}; is it our server?")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError:   # our own output failed, or its reader has left, as in: | head -3
        os._exit(1)
