"""Error messages in one line: what is wrong, and what to do next.

The first part is about certificate files; its steps destroy nothing. The second part says why a
handshake failed, and who refused whom. Tables hold the words.
"""

import os
import re
import ssl
from collections.abc import Callable
from pathlib import Path

MAX_FILE = 1024 ** 2   # bytes; a hundred CAs have less


class Unusable(Exception):
    """One line: which file is unusable, why, and what to do next."""


# --- What is wrong with a file, and what to do ---------------------------------------------

_LENGTH = rb"(?:[\0-\x80]|\x81.|\x82..|\x83...)"   # a length in DER
LOOKS = {
    "a certificate": rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----",
    "a certificate request (CSR)": rb"-----BEGIN (?:NEW )?CERTIFICATE REQUEST-----",
    "a private key with a password": rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|\nProc-Type: 4,ENCRYPTED",
    "a private key": rb"-----BEGIN (?:(?!ENCRYPTED)[A-Z]+ )?PRIVATE KEY-----",
    "a PFX (PKCS#12)": rb"\A\x30" + _LENGTH + rb"\x02\x01\x03",
    "a certificate in DER": rb"\A\x30" + _LENGTH + rb"\x30" + _LENGTH + rb"\xa0",
    "a private key in DER": rb"\A\x30" + _LENGTH + rb"\x02\x01[\0\1]",
    "nothing": rb"\A\s*\Z",
}
"""What a file holds, and how to recognize it: PEM by its first line, DER by its first bytes."""

CONVERT = {
    ("ca.crt", "a PFX (PKCS#12)"): "pkcs12 -cacerts -nokeys",
    ("server.crt", "a PFX (PKCS#12)"): "pkcs12 -clcerts -nokeys",
    ("server.key", "a PFX (PKCS#12)"): "pkcs12 -nocerts -nodes",
    ("ca.crt", "a certificate in DER"): "x509 -inform DER",
    ("server.crt", "a certificate in DER"): "x509 -inform DER",
    ("server.key", "a private key in DER"): "pkey -inform DER",
    ("server.key", "a private key with a password"): "pkey",
}
"""The openssl command that extracts or converts what is wanted, by file and by what it holds."""


def read(file: Path) -> bytes:
    """The content of a file. Raises Unusable if it does not look like what it should be."""
    try:
        if file.is_dir():
            raise Unusable(f"{file} is a folder (Docker creates one if a file to mount is missing); "
                           f"remove it: rmdir certs/{file.name}")
        if file.exists() and not file.is_file():   # a FIFO would block the event loop
            raise Unusable(f"{file} is not a regular file; {next_step(file)}")
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise Unusable(f"{file} is too large for a certificate or a key; {next_step(file)}")
    except FileNotFoundError:
        raise Unusable(f"{file} is missing; {next_step(file)}") from None
    except PermissionError:
        raise Unusable(f"{file} cannot be read (Permission denied); {permit(file)}") from None
    except OSError as error:
        raise Unusable(f"{file} cannot be read ({error.strerror}); look at it: ls -l certs/{file.name}") from None
    holds = [what for what, pattern in LOOKS.items() if re.search(pattern, content, re.DOTALL)]
    holds = holds or ["something unknown"]
    wanted = "a private key" if file.name == "server.key" else "a certificate"
    if wanted in holds and "a private key with a password" not in holds:
        return content
    step = next_step(file)
    if command := CONVERT.get((file.name, holds[0])):
        step = f"openssl {command} -in certs/{file.name} -out certs/new.pem"
        if wanted == "a private key":   # it must be private from the moment it exists
            step = f"(umask 077; {step})"
        purpose = "remove the password" if command == "pkey" else "convert it"
        step = f"{purpose}: {step} && mv certs/new.pem certs/{file.name}"
    found = "is empty" if holds[0] == "nothing" else f"holds {holds[0]}"
    raise Unusable(f"{file} {found}, but should hold {wanted} in PEM; {step}")


def load(file: Path, attempt: Callable[[], None]) -> None:
    """Try to load a file that looks like a certificate. Raises Unusable."""
    try:
        attempt()
    except ssl.SSLError:
        raise Unusable(f"{file} is damaged; {next_step(file)}") from None


def next_step(file: Path) -> str:
    """The step with the least side effects that replaces a missing or unusable file."""
    def has(name: str) -> bool:
        return (file.parent / name).exists()

    if file.name == "ca.crt":
        if has("ca.key"):
            return ("make it again from its key: openssl req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt "
                    "-config certs/ca.cnf")
        if has("server.crt"):
            return "copy it from where server.crt was made, or begin with a new CA: bash certs/gen_certs.sh"
        return "make the certificates, CA included: bash certs/gen_certs.sh"
    if not has("ca.crt") or not has("ca.key"):
        return "copy it from where the CA is"
    renew = "bash certs/gen_certs.sh renew" + (" server" if has("client.crt") else "")   # else it makes that, too
    if file.name == "server.key" and has("server.key"):   # renew keeps an existing key
        return f"make another: mv certs/server.key certs/server.old.key && {renew}"
    return f"make a new one with the existing CA: {renew}"


def permit(file: Path) -> str:
    """The step that lets us, and nobody else, read a file."""
    try:
        owner = file.owner()
        if file.stat().st_uid == os.getuid():
            return f"it is yours: chmod u+r certs/{file.name}"
    except (KeyError, OSError, NotImplementedError):   # unknown, in a closed folder, Windows
        return f"see whose it is: ls -ld certs certs/{file.name}"
    return f'it belongs to {owner}; start the server as {owner}, or: sudo chown "$(id -un)" certs/{file.name}'


# --- Why a handshake failed ----------------------------------------------------------------

ALERTS = {
    "unknown ca": "it does not trust the CA that signed server.crt; is its ca.crt the same as ours?",
    "decrypt error": "a CA of the same name, but with another key, signed server.crt; is its ca.crt the same as ours?",
    "certificate expired": "server.crt has expired, by its clock",
    "unsupported certificate": "server.crt is not for a server (see its extendedKeyUsage)",
    "certificate revoked": "server.crt is revoked",
    "bad certificate": "look at the names in server.crt, its dates and its CA",
    "certificate unknown": "look at the names in server.crt, its dates and its CA",
}
"""What a client's alert says about our certificate."""

VERIFY = dict.fromkeys((7, 18, 19, 20, 21), "; no CA in ca.crt has signed it") | {
    26: "; it is not for a client (see its extendedKeyUsage)",
}
"""What to add to OpenSSL's words when we refuse a client's certificate, by OpenSSL's error code."""


def in_words(error: Exception) -> str:
    """Why a handshake failed, in one line: who refused whom, and what to look at."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"client certificate refused: {error.verify_message}{VERIFY.get(error.verify_code, '')}"
    text = str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
    text = re.sub(r"\[\w+(: \w+)?\] | ?\(_ssl\.c:\d+\)", "", text).replace("_", " ").lower()
    # The words before the alert's name are historical: OpenSSL says "sslv3 alert bad certificate" over TLS 1.3, too.
    if alert := re.match(r"(?:(?:\S+ )?alert|tlsv1) (.+)", text):
        if alert[1] in ALERTS:
            return f"the client refused our certificate (alert {alert[1]}): {ALERTS[alert[1]]}"
        return f"the client ended the handshake (alert {alert[1]})"
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or "unexpected eof" in text:
        return "the client closed the connection during the handshake (eof); its own output may say why"
    if text == "http request":
        return "http request without TLS; the client must use https://"
    return re.sub(r"[^ -~]", "?", text)[:200]
