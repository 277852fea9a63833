#!/usr/bin/env python3
"""Negative test: a client without a certificate must be refused, by TLS, and for that reason.

Exit 0: refused with the alert for a missing certificate. Exit 1: the server let us in as far as
HTTP. Exit 2: the test could not be made, so nothing is proved.
"""

from __future__ import annotations

import argparse
import http.client
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

REFUSALS = {
    # TLS 1.3 has an alert for exactly this: certificate_required (RFC 8446 section 6.2).
    "TLSV13_ALERT_CERTIFICATE_REQUIRED",
    # TLS 1.2 has none: it sends handshake_failure (RFC 5246 section 7.4.6), which other faults
    # share, such as no common cipher suite. From this lab's server it means the certificate.
    "SSLV3_ALERT_HANDSHAKE_FAILURE",
}
"""OpenSSL's reason codes; its texts differ from version to version."""


def report(text: str) -> None:
    """One line of the test's report."""
    print(f"[NEGATIVE TEST] {text}", flush=True)


def no_result(problem: str) -> NoReturn:
    """One line on stderr that says why the test could not be made, and what to do; exit 2."""
    print(f"[NEGATIVE TEST] ERROR: {' '.join(problem.split())}", file=sys.stderr)
    sys.exit(2)


class Connection(ssl.SSLSocket):
    """Believes an alert only from a server that has proved who it is.

    Anyone can answer our first bytes with an alert. We send our Finished only after we have
    verified the server, and only then is there a "tls-unique" value to ask for.
    """

    def do_handshake(self, *args: Any) -> None:
        """The handshake; ConnectionError for a refusal that comes too early to count."""
        try:
            super().do_handshake(*args)
        except ssl.SSLError as error:
            if error.reason in REFUSALS and self.get_channel_binding("tls-unique") is None:
                raise ConnectionError(f"{error.args[-1]}, before the server proved who it is") from None
            raise


def tls_context(cacert: Path, tls_max: str) -> ssl.SSLContext:
    """A client's context without a certificate. Raises OSError (ssl.SSLError is one) on a bad ``cacert``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # The server is verified as always: a refusal by some other server would prove nothing.
    context.load_verify_locations(cafile=cacert)
    context.hostname_checks_common_name = False
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[tls_max]
    context.sslsocket_class = Connection
    # Deliberately missing: context.load_cert_chain(...)
    return context


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an HTTP answer, so a failure; where it leads, a refusal would prove nothing."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Follow none; urllib then raises HTTPError."""


def judge(error: BaseException, url: str) -> NoReturn:
    """PASS for the alert that means a missing certificate; anything else is no result."""
    if isinstance(error, ssl.SSLError) and error.reason in REFUSALS:
        report("Connection rejected as expected.")
        report(f"Error: {error.args[-1]}")
        report("PASS: Server correctly refused unauthenticated client.")
        sys.exit(0)
    if isinstance(error, ssl.SSLCertVerificationError):
        no_result(f"the server's certificate is not trusted: {error.verify_message}; is this our server, "
                  "and were both made by the same run of: bash certs/gen_certs.sh")
    if isinstance(error, ConnectionRefusedError):
        no_result(f"no server at {url}; start it first: python3 server/server.py")
    if isinstance(error, TimeoutError):
        no_result(f"no answer from {url} within {TIMEOUT:.0f} s; is our server there, and does it still run?")
    no_result(f"{url} did not refuse us with the alert for a missing certificate, but: "
              f"{error or type(error).__name__}; is our server there?")


def https_url(text: str) -> str:
    """A URL as argparse's type; ValueError if it is none. Only https: urllib would open file: as well."""
    parts = urllib.parse.urlsplit(text)
    if parts.scheme != "https" or not parts.hostname or parts.port == 0 or not text.isascii():
        raise ValueError(text)
    return text


def main() -> None:
    """Try to GET without a certificate, and judge how that ends."""
    port = os.environ.get("MTLS_SERVER_PORT") or "8443"
    parser = argparse.ArgumentParser(description="Negative test: connect to the mTLS server without a certificate.")
    parser.add_argument("--url", type=https_url, default=f"https://127.0.0.1:{port}/todo",
                        help="where the server is (default https://127.0.0.1:8443/todo, with the port of "
                             "MTLS_SERVER_PORT if that is set)")
    parser.add_argument("--cacert", type=Path, default=CERTS / "ca.crt", metavar="FILE",
                        help="the CA that we trust (default certs/ca.crt)")
    parser.add_argument("--tls-max", choices=["1.2", "1.3"], default="1.3",
                        help="the highest TLS version to offer (default %(default)s)")
    arguments = parser.parse_args()
    try:
        context = tls_context(arguments.cacert, arguments.tls_max)
    except OSError as error:
        no_result(f"cannot use {arguments.cacert} ({error.strerror}); "
                  "if it is missing, make it: bash certs/gen_certs.sh")
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context),
        urllib.request.ProxyHandler({}),   # the lab is local: a proxy's refusal would prove nothing
        NoRedirects,
    )
    report("Attempting connection WITHOUT client certificate...")
    report(f"Target: {arguments.url}")
    try:
        with opener.open(arguments.url, timeout=TIMEOUT) as response:
            status = response.status
    except urllib.error.HTTPError as error:
        with error:
            status = error.code
    except urllib.error.URLError as error:   # while connecting, where TLS 1.2 refuses
        judge(error.reason if isinstance(error.reason, OSError) else error, arguments.url)
    except (OSError, http.client.HTTPException, UnicodeError) as error:   # on the first read, where TLS 1.3 refuses
        judge(error, arguments.url)
    report(f"FAIL: Server answered HTTP {status} to a client without a certificate.")
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError:   # our own output failed: nobody has read a verdict
        os._exit(2)
