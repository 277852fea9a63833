#!/usr/bin/env python3
"""Negative test: a client without a certificate must be refused, by TLS, and for that reason.

Exit 0: refused with the alert for a missing certificate. Exit 1: the server let us in: it answered,
or began to. Exit 2: the test could not be done, so nothing is proved.

Read client.py first; only what differs is explained here.
"""

import signal

if __name__ == "__main__":   # Ctrl+C ends the program without a traceback, even during the imports below
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import http.client
import ssl
import sys
import urllib.request
from pathlib import Path
from typing import NoReturn

if sys.version_info < (3, 10):   # noqa: UP036   # one clear line, instead of whatever fails first
    sys.exit(f"client_no_cert.py: needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import exchange  # this already needs Python 3.10
import reasons
import verbose
from exchange import CERTS

REFUSALS = {
    # TLS 1.3 has an alert for exactly this: certificate_required (RFC 8446 section 6.2).
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    # TLS 1.2 has none: it sends handshake_failure (RFC 5246 section 7.4.6), which can have other
    # causes, such as no common cipher suite. From the lab's server it means the certificate.
    "SSLV3_ALERT_HANDSHAKE_FAILURE",
}
"""OpenSSL's reason codes. (Its texts differ between versions.)"""


def tls_context(cacert: Path, tls_max: str) -> ssl.SSLContext:
    """A client's context without a certificate. Raises OSError (ssl.SSLError is one) on a bad ``cacert``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # Verify the server as usual: a refusal by some other server would prove nothing.
    context.load_verify_locations(cafile=cacert)
    context.hostname_checks_common_name = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[tls_max]
    context.sslsocket_class = Connection
    # Deliberately missing: context.load_cert_chain(...)
    return context


class Connection(exchange.Connection):
    """Believes a refusal only after the server has proved who it is.

    In TLS 1.3, the alert is encrypted. In TLS 1.2 it is not: a man in the middle can let the server
    prove who it is, and then forge the alert. To rule that out, use TLS 1.3.
    """

    def do_handshake(self, block: bool = False) -> None:
        """The handshake. Raises ConnectionError for a refusal that comes too early to count."""
        try:
            super().do_handshake(block)
        except ssl.SSLError as error:
            # Anyone can answer our first bytes with an alert. We send our Finished only after we have
            # verified the server, and only then is there a "tls-unique" value to ask for.
            if error.reason in REFUSALS and self.get_channel_binding("tls-unique") is None:
                raise ConnectionError(f"{reasons.words(error)}, before the server proved who it is") from None
            raise


def report(text: str) -> None:
    """Print one line of the test's report."""
    try:
        print(f"[NEGATIVE TEST] {exchange.printable(text)}", flush=True)
    except OSError as error:   # the verdict cannot be shown
        exchange.output_failed(error, "NEGATIVE TEST", 2)


def no_result(problem: str) -> NoReturn:
    """Print one line on stderr that says why the test could not be done, and what to do; exit 2."""
    print(f"[NEGATIVE TEST] ERROR: {exchange.one_line(problem)}", file=sys.stderr)
    sys.exit(2)


def no_answer(problem: str) -> NoReturn:
    """There is no complete answer. If one had begun, the server let us in: FAIL, exit 1. Otherwise exit 2."""
    if exchange.Connection.received:
        report(f"FAIL: Server began to answer a client without a certificate; only then: {exchange.one_line(problem)}")
        sys.exit(1)
    no_result(f"nothing is proved: {problem}")


def judge(error: Exception, url: str, cacert: Path) -> NoReturn:
    """PASS for the alert that means a missing certificate, if nothing of an answer came before it."""
    if isinstance(error, ssl.SSLError) and error.reason in REFUSALS:
        if exchange.Connection.received:
            no_answer(reasons.words(error))
        report("Connection rejected as expected.")
        report(f"Error: {error.args[-1]}")
        report("PASS: Server correctly refused unauthenticated client.")
        sys.exit(0)
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, ConnectionAbortedError,
                          BrokenPipeError)):
        no_answer(f"{url} ended the connection without an alert or a whole answer ({reasons.words(error)}); "
                  "it may have refused us without saying why: see its log")
    no_answer(reasons.explain(error, url, cacert))


def main() -> None:
    """Try to GET without a certificate, and judge the result."""
    parser = argparse.ArgumentParser(description="Negative test: connect to the mTLS server without a certificate.")
    exchange.add_url_argument(parser)
    verbose.add_argument(parser)
    parser.add_argument("--cacert", type=Path, default=CERTS / "ca.crt", metavar="FILE",
                        help="the CA that we trust (default certs/ca.crt)")
    parser.add_argument("--tls-max", choices=["1.2", "1.3"], default="1.3",
                        help="the highest TLS version to offer (default %(default)s)")
    arguments = parser.parse_args()
    url = arguments.url or exchange.default_url(parser)
    try:
        context = tls_context(arguments.cacert, arguments.tls_max)
    except OSError as error:
        no_result(reasons.unusable(error, arguments.cacert))
    if arguments.verbose:
        exchange.Connection.show = verbose.Handshakes(report)

    report("Attempting connection WITHOUT client certificate...")
    report(f"Target: {url}")
    try:
        with exchange.answer(context, urllib.request.Request(url), no_answer) as answer:
            status = answer.status
    except (OSError, http.client.HTTPException) as error:   # TLS 1.2 refuses in the handshake, 1.3 at the first read
        judge(error, url, arguments.cacert)
    how = "refused, but in HTTP, after TLS had let us in" if status >= 400 else "let in"
    report(f"FAIL: Server answered HTTP {status} to a client without a certificate: {how}.")
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        exchange.output_failed(error, "NEGATIVE TEST", 2)
