#!/usr/bin/env python3
"""The lab's mutual TLS client: creates a TODO item with POST /todo, then fetches the list with GET.

It proves who it is with certs/client.crt and its key, and accepts only a server that has a
certificate for the host in the URL, signed by our own CA.
"""

import signal

if __name__ == "__main__":   # Ctrl+C ends the program without a traceback, even during the imports below
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import errno
import http.client
import json
import os
import ssl
import stat
import sys
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

if sys.version_info < (3, 10):   # noqa: UP036   # one clear line, instead of whatever fails first
    sys.exit(f"client.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import exchange  # this already needs Python 3.10
import reasons
import verbose
from exchange import CERTS, printable


def tls_context(cert: Path, key: Path, cacert: Path) -> ssl.SSLContext:
    """The client's side of mutual TLS. Raises OSError (ssl.SSLError is one) if the files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # ① Verify the server against our own CA only. With the system's trust store, a certificate
    #    for the same name from any public CA would be accepted.
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = True
    context.load_verify_locations(cafile=cacert)
    # The name must be in the SAN: a CN is free text, not checked as a host name (RFC 9525 section 2).
    context.hostname_checks_common_name = False
    # ② Present our certificate, and prove with the key that it is ours. The empty password makes
    #    an encrypted key an error: without it, OpenSSL would ask for the password.
    context.load_cert_chain(certfile=cert, keyfile=key, password="")
    # TLS 1.0 and 1.1 are deprecated (RFC 8996).
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Limits how much a server can make us read.
    context.sslsocket_class = exchange.Connection
    return context


def log_secrets(context: ssl.SSLContext, file: str) -> None:
    """Let TLS append each session's secrets to the file, for Wireshark. Raises OSError.

    Whoever has them can decrypt the traffic, so the file must be ours alone: in a folder where others can
    write, it may already exist as a file of theirs, or as a link to another file of ours.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    try:
        status = os.fstat(descriptor)
        if os.name == "posix":   # Windows has other permissions, and not everyone may create links
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "not a file of our own")
            os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
    context.keylog_filename = file


def say(text: str) -> None:
    """Print one line for -v. If that fails, it must not look as if the handshake had failed."""
    try:
        print(f"[CLIENT] {text}", flush=True)
    except OSError as error:
        exchange.output_failed(error, "CLIENT", 1)


def fail(problem: str) -> NoReturn:
    """Print one line on stderr that says what is wrong and what to do; exit 1."""
    print(f"[CLIENT] ERROR: {exchange.one_line(problem)}", file=sys.stderr)
    sys.exit(1)


def ask(context: ssl.SSLContext, arguments: argparse.Namespace, item: dict[str, Any] | None = None) -> tuple[int, Any]:
    """POST ``item`` as JSON, or GET if there is none; returns the status and the decoded answer.

    Raises ValueError (RecursionError if nested too deep) if that is not JSON. Ends the program if there is no answer,
    or an error.
    """
    request = urllib.request.Request(arguments.url)
    if item is not None:
        request.data = json.dumps(item, ensure_ascii=False).encode()
        request.add_header("Content-Type", "application/json")
    try:
        with exchange.answer(context, request, fail) as answer:
            body = exchange.read(answer)
    except (OSError, http.client.HTTPException) as error:
        fail(reasons.explain(error, arguments.url, arguments.cacert, arguments.cert))
    if not 200 <= answer.status < 300:
        fail(f"the server answered HTTP {answer.status}: {reasons.of_answer(answer.status, answer.reason, body)}")
    return answer.status, exchange.decode(body)


def listing(reply: dict[str, Any]) -> str:
    """The reply to GET as JSON with one item per line, which reads better than one field per line.

    Raises TypeError if it is not what our server sends.
    """
    if not isinstance(reply["client"], str) or not isinstance(reply["todos"], list):
        raise TypeError("client must be a string, todos a list")
    items = ",\n".join("    " + json.dumps(item, ensure_ascii=False) for item in reply["todos"])
    client = json.dumps(reply["client"], ensure_ascii=False)
    return f'{{\n  "client": {client},\n  "todos": [\n{items}\n  ]\n}}'


def parse_arguments() -> argparse.Namespace:
    """Flags named as in curl. Exits with 2 on invalid values."""
    parser = argparse.ArgumentParser(description="The lab's mutual TLS client: POST /todo, then GET /todo.")
    parser.add_argument("task", nargs="?", metavar="TASK", default="Añadir endpoint POST",
                        help="the task to create (default %(default)s)")
    exchange.add_url_argument(parser)
    verbose.add_argument(parser)
    parser.add_argument("--cert", type=Path, default=CERTS / "client.crt", metavar="FILE",
                        help="our certificate (default certs/client.crt)")
    parser.add_argument("--key", type=Path, default=CERTS / "client.key", metavar="FILE",
                        help="its private key (default certs/client.key)")
    parser.add_argument("--cacert", type=Path, default=CERTS / "ca.crt", metavar="FILE",
                        help="the CA that we trust (default certs/ca.crt)")
    arguments = parser.parse_args()
    if any("\ud800" <= c <= "\udfff" for c in arguments.task):   # how Python represents bytes that it cannot decode
        parser.error("argument TASK: is not valid text in this terminal's encoding")
    if arguments.task.endswith((".key", ".crt", ".pem", ".pfx")) and os.access(arguments.task, os.F_OK):
        option = "--key" if arguments.task.endswith(".key") else "--cert"
        parser.error(f"argument TASK: {arguments.task} is a file; did you mean {option} {arguments.task}?")
    arguments.url = arguments.url or exchange.default_url(parser)
    return arguments


def main() -> None:
    """POST, then GET, and print each step."""
    for stream in (sys.stdout, sys.stderr):
        if stream:   # not closed
            stream.reconfigure(errors="backslashreplace")   # type: ignore[union-attr]  # where ñ cannot be shown
    arguments = parse_arguments()
    try:
        context = tls_context(arguments.cert, arguments.key, arguments.cacert)
    except OSError as error:
        fail(reasons.unusable(error, arguments.cacert, arguments.cert, arguments.key))
    secrets = os.environ.get("SSLKEYLOGFILE")
    if secrets:
        try:
            log_secrets(context, secrets)
        except OSError as error:
            fail(f"cannot use SSLKEYLOGFILE={secrets} ({error.strerror}); name a new file in a folder of your own")
    if arguments.verbose:
        exchange.Connection.show = verbose.Handshakes(say, arguments.cert, arguments.key)

    print(f"[CLIENT] Connecting to {arguments.url}")
    print(f"[CLIENT] Client cert: {arguments.cert.name}")
    print(f"[CLIENT] CA trust: {arguments.cacert.name}")
    try:
        print("[CLIENT] Creating new TODO with POST /todo ...", flush=True)
        status, reply = ask(context, arguments, {"task": arguments.task, "done": False})
        print(f"[CLIENT] POST response (HTTP {status}):")
        print(printable(json.dumps(reply, indent=2, ensure_ascii=False), keep="\n"))

        print("[CLIENT] Fetching TODO list with GET /todo ...", flush=True)
        status, reply = ask(context, arguments)
        shown = listing(reply)
        print(f"[CLIENT] Authenticated as: \"{printable(reply['client'])}\"")
        print(f"[CLIENT] Response (HTTP {status}):")
        print(printable(shown, keep="\n"), flush=True)   # flushed here, where we can still handle a failure
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fail(f"{arguments.url} did not send the JSON that our server would send: {error!r}; is it our server?")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        exchange.output_failed(error, "CLIENT", 1)
