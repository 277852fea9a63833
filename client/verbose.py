"""What -v shows: what the two sides agreed on in the handshake, and both certificates.

exchange.Connection calls `Handshakes` when its handshake ends. In TLS 1.3 that is before the server has checked
our certificate, so these lines come before a refusal. In TLS 1.2 a refusal ends the handshake: they are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exchange import printable

NO_CHECK_TIME = 0x200000   # OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag -v."""
    parser.add_argument("-v", "--verbose", action="store_true",
                        help="show what the handshake agreed on, and both certificates")


class Handshakes:
    """Shows each handshake through ``say``. ``cert`` and ``key`` are our own, if we have any."""

    def __init__(self, say: Callable[[str], None], cert: Path | None = None, key: Path | None = None) -> None:
        self.say = say
        self.ours = ["Our certificate: none"]
        if cert and key:
            try:
                self.ours = lines("Our certificate (sent if the server asks for one)", decoded_by_peer(cert, key))
            except OSError as error:   # for example, it is not for clients
                why = getattr(error, "verify_message", None) or error
                self.ours = [f"Our certificate: {cert} cannot be shown ({why})"]
        self.shown: list[str] = []

    def __call__(self, connection: ssl.SSLSocket | None) -> None:
        """Show the handshake of this connection; None if it failed."""
        if connection is None:
            self.say("TLS: the handshake did not complete")
            return
        suite = connection.cipher()
        group = getattr(connection, "group", lambda: None)()   # since Python 3.15
        agreed = [str(connection.version()), suite[0] if suite else "?", *([f"key exchange {group}"] if group else []),
                  "session resumed" if connection.session_reused else "new session",
                  f"ALPN {connection.selected_alpn_protocol() or 'none'}"]
        self.say(printable(f"TLS: {', '.join(agreed)}"))
        shown = [*lines("Server's certificate", connection), *self.ours]
        for line in ["Both certificates: as before"] if shown == self.shown else shown:
            self.say(printable(line))
        self.shown = shown


def lines(title: str, connection: ssl.SSLSocket | ssl.SSLObject) -> list[str]:
    """What the certificate of this connection's peer says, in lines that are not escaped yet."""
    try:
        certificate: dict[str, Any] = connection.getpeercert() or {}
    except (OSError, ValueError):   # verified, but Python cannot decode its names
        certificate = {}
    names = {field: ", ".join(value for rdn in certificate.get(field, ()) for key, value in rdn if key == "commonName")
             for field in ("subject", "issuer")}
    san = ", ".join(f"{kind}:{value}" for kind, value in certificate.get("subjectAltName", ()))
    validity = [f"  valid until: {certificate.get('notAfter', 'unknown')}"]
    with contextlib.suppress(KeyError, ValueError):
        start, end = (ssl.cert_time_to_seconds(certificate[date]) - time.time() for date in ("notBefore", "notAfter"))
        days = int(abs(end) // 86400)
        number = f"{days} day{'' if days == 1 else 's'}"
        if end < 0:
            validity[0] += f" (expired {f'{number} ago' if days else 'today'})"
        else:
            validity[0] += f" (in {number})"
        if start > 0:
            validity.insert(0, f"  valid from: {certificate['notBefore']} (not valid yet)")
    digest = hashlib.sha256(connection.getpeercert(binary_form=True) or b"").hexdigest().upper()
    return [f"{title}: CN {names['subject'] or 'none'}",
            f"  names in its SAN: {san or 'none'}",
            f"  issued by: {names['issuer'] or 'no CN'}",
            *validity,
            f"  SHA-256: {':'.join(digest[i:i + 2] for i in range(0, len(digest), 2))}"]


def decoded_by_peer(cert: Path, key: Path) -> ssl.SSLObject:
    """A peer that has our certificate. Raises OSError (ssl.SSLError is one).

    Python decodes a certificate only for a peer that has verified it. So this makes an in-memory handshake with a
    server that trusts exactly this certificate.
    """
    client, server = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE   # this server is ourselves
    server.verify_mode = ssl.CERT_REQUIRED
    server.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | NO_CHECK_TIME   # show an expired one, too
    server.load_verify_locations(cert)
    for context in (client, server):
        context.load_cert_chain(cert, key, password="")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours, peer = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    for side in (ours, peer) * 3:   # two turns each, or three after a HelloRetryRequest
        with contextlib.suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return peer
