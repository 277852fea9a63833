"""Why something failed and what to do about it: one table for both clients.

The functions find out the facts (OpenSSL's code, the alert, what is in a file); the table has the sentence and the
next step for them. If a harmless step helps, no destructive one is offered.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import ssl
import urllib.parse
from pathlib import Path

from exchange import CERTS, SILENCE, TooMuch

PYTHON, EXPORT, PRIVATELY = "python3", "export MTLS_SERVER_PORT=PORT", "umask 077; "
if os.name == "nt":
    PYTHON, EXPORT, PRIVATELY = "python", "$env:MTLS_SERVER_PORT=PORT", ""
RENEW = "bash certs/gen_certs.sh renew"
NEW_CA = "bash certs/gen_certs.sh"
# With the same key it is the same CA: everything that it has issued keeps working.
REMAKE_CA = "openssl req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf"

# --- The table -----------------------------------------------------------------------------
# In the texts, {make} is how to get a new file, see MAKE; {cacert}, {cert}, {file} and the like are paths;
# {host} and {port} are those of the URL; {words} are OpenSSL's or the system's.

OTHER_CA = ("it was not issued by the CA in {cacert}; make sure that the server on port {port} uses the same certs/ "
            "(right after gen_certs.sh, try again in a second)")
UNNAMED = f"where the server runs, add that name under alt_names in certs/server.cnf if it is not there, then: {RENEW}"

UNTRUSTED = {   # The server's certificate does not verify, by OpenSSL's error code
    7: OTHER_CA,    # signature failure: a CA of the same name with another key
    18: OTHER_CA,   # self-signed certificate
    19: OTHER_CA,   # self-signed certificate in certificate chain
    20: OTHER_CA,   # unable to get local issuer certificate
    21: OTHER_CA,   # unable to verify the first certificate
    9: f"set the clock of this machine; if it is right, renew the certificate where the server runs: {RENEW}",
    10: f"renew it where the server runs: {RENEW}",
    26: f"it is not for servers; renew server.crt where the server runs: {RENEW}",
    62: UNNAMED,    # host name mismatch
    64: UNNAMED,    # IP address mismatch
    "no CA": "{cacert} is not the certificate of a CA; use the CA's own: --cacert certs/ca.crt",
    "other": "is it our server?",
}
REFUSED = {   # The server refuses our certificate, by its alert (RFC 8446 section 6.2)
    "unknown ca": "it does not trust the CA that issued {cert}: is it our server? If so, {of_its_ca}",
    "decrypt error": "its CA has the same name as the one that issued {cert}, but another key: is it our server? "
                     "If so, {of_its_ca}",
    "certificate expired": "{cert} has expired; {make}",
    "bad certificate": "{cert} is damaged or not valid yet; compare both machines' clocks with its dates: "
                       "openssl x509 -noout -dates -in {cert}",
    "unsupported certificate": "{cert} is not for clients; use a client's: "
                               "--cert certs/client.crt --key certs/client.key",
    "certificate revoked": "{cert} has been revoked; ask whoever runs the server for another one",
    "certificate required": "it did not receive {cert}; see the server's log",
    "handshake failure": "it has no cipher suite in common with us, or wants a certificate other than {cert}; "
                         "see the server's log",
    "protocol version": "it speaks neither TLS 1.2 nor 1.3; is it our server?",
    "other": "see the server's log; is it our server?",
}
NO_ANSWER = {
    "refused": "no server at {url}: nothing listens on port {port}; start it there: {start}; "
               f"if it runs on another port, name that: {EXPORT} (or --url)",
    "no port": "no server at {url}: nothing listens on port 443, the default; "
               "add the server's port: --url https://{host}:8443/todo",
    "silent": f"no answer from {{url}} within {SILENCE:.0f} s; "
              "is port {port} our server's, and is the server still running?",
    "unknown host": "the host name {host} cannot be resolved ({words}); correct it, or, "
                    "for a server on this machine: --url https://127.0.0.1:8443/todo",
    "no TLS": "what listens on port {port} does not speak TLS ({words}); is that our server's port?",
    "too much": "{url} sent more than 1 MB; is it our server? If so, its list is too long: restart it",
    "other": "no HTTP answer from {url}: {words}; is it our server, and is it still running?",
}
NOT_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")
CONVERT_PFX = ("is a PFX, not PEM; convert it and use the result for both --cert and --key: "
               f"({PRIVATELY}openssl pkcs12 -in {{file}} -clcerts -nodes -out {{pem}})")
FILES = {   # What should be in a file, and what is there
    ("certificate", "nothing"): "is empty; {make}",
    ("certificate", "certificate"): "is damaged; {make}",
    ("certificate", "other"): "holds no certificate; {make}",
    ("certificate", "private key"): "holds a private key; use the certificate: {option} {crt}",
    ("certificate", "encrypted key"): "holds a private key; use the certificate: {option} {crt}",
    ("certificate", "request"): "holds a request, which becomes a certificate only when a CA signs it; "
                                "use the certificate: {option} {crt}",
    ("certificate", "DER"): "is in DER form, not PEM; convert it and use the result: "
                            "openssl x509 -inform DER -in {file} -out {pem}",
    ("certificate", "PFX"): CONVERT_PFX,
    ("private key", "nothing"): "is empty; {make}",
    ("private key", "private key"): "is damaged; {make}",
    ("private key", "other"): "holds no private key; {make}",
    ("private key", "certificate"): "holds a certificate; use its private key: {option} {key}",
    ("private key", "request"): "holds a request; use its private key: {option} {key}",
    ("private key", "encrypted key"): "has a password; ask whoever made it for one without, or make a private copy "
                                      f"without and use that: ({PRIVATELY}openssl rsa -in {{file}} -out {{plain_key}})",
    ("private key", "DER"): "is in DER form, not PEM; convert it and use the result: "
                            f"({PRIVATELY}openssl rsa -inform DER -in {{file}} -out {{pem}})",
    ("private key", "PFX"): CONVERT_PFX,
}
PAIR = {   # What is wrong with a certificate and a key
    "other key": "do not belong together; use the one that does: {pair}",
    "misfit": "do not belong together; {make}",
    "unusable": "cannot be used ({words}); {make}",
}
UNREADABLE = {   # A file that we may not read, or that is missing
    "ours": "give yourself access: chmod u+r {file}",
    "key": "it belongs to {owner}, and a private key is for its owner only; "   # no chmod, which could expose it
           "ask for a certificate and key of your own",
    "certificate": "it belongs to {owner}; ask for a copy (a certificate is no secret)",
    "elsewhere": "is this the right path?",
}
MAKE = {   # How to get a new file: {make} above
    "elsewhere": "is it the right one? If so, get another from whoever issued it",
    "nothing": f"make the certificates: {NEW_CA}",
    "no ca.key": "copy it from the machine that has ca.key; "
                 f"if there is none, make a new CA and all certificates: {NEW_CA}",
    "ca": f"make it again from its key: {REMAKE_CA}",
    "key": "move it and make another: mv {file} {old}; {command}",
    "certificate": "make a new one: {command}",
}
OF_ITS_CA = f"make one of its CA: {NEW_CA} client NAME"
FORBIDDEN = "; to admit it, start the server with this name, too: --allow-cn mtls-client {name}"


# --- What happened -------------------------------------------------------------------------

def words(error: Exception) -> str:
    """What OpenSSL or the system says, without OpenSSL's codes and source locations."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    if isinstance(error, ssl.SSLError) and error.reason:
        return re.sub("^(sslv3|tlsv1|tlsv13) alert ", "", error.reason.replace("_", " ").lower())
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def explain(error: Exception, url: str, cacert: Path, cert: Path | None = None) -> str:
    """Why there is no answer, and what to do next. ``cert`` is the certificate that we have, if any."""
    said, parts = words(error), urllib.parse.urlsplit(url)
    port = parts.port or 443
    facts = {"url": url, "host": parts.hostname, "port": port, "words": said, "cacert": quoted(cacert),
             "start": f"{PYTHON} server/server.py" + f" --port {port}" * (port != 8443)}
    if cert:
        facts |= {"cert": quoted(cert), "make": make(cert), "of_its_ca": make(cert) if in_certs(cert) else OF_ITS_CA}
    if isinstance(error, ssl.SSLCertVerificationError):
        code: int | str = error.verify_code
        if code in (18, 19, 20, 21) and authorities(cacert) == 0:
            code = "no CA"
        step = UNTRUSTED.get(code, UNTRUSTED["other"])
        return f"the server's certificate is not trusted: {said}; " + step.format(**facts)
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLError) and "_ALERT_" in reason:
        step = REFUSED.get(said, REFUSED["other"]) if cert else "that is not the alert for a missing certificate"
        return f"the server refused us: {said}; " + step.format(**facts)
    if reason in NOT_TLS:
        kind = "no TLS"
    elif isinstance(error, ConnectionRefusedError):
        kind = "refused" if parts.port else "no port"
    else:
        kind = next((kind for type_, kind in ((TooMuch, "too much"), (TimeoutError, "silent"),
                                              (socket.gaierror, "unknown host")) if isinstance(error, type_)), "other")
    return NO_ANSWER[kind].format(**facts)


def of_answer(status: int, phrase: str, body: bytes) -> str:
    """What an error answer says, and what to do if we know that. ``phrase`` is from its status line."""
    try:
        text = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError, RecursionError):   # not our server's JSON: take an HTML page's title
        text = body[:5000].decode(errors="replace")
        title = re.search(r"<title>([^<]*)", text, re.IGNORECASE)
        text = title[1] if title else text.strip().partition("\n")[0][:200] or phrase
    if status == 403:
        name = re.search(r"CN '([^'\\]+)' is not in the allowed list", text)
        text += FORBIDDEN.format(name=shlex.quote(name[1])) if name else "; see the server's log"
    return text


# --- What is wrong with a file -------------------------------------------------------------

def unusable(error: OSError, cacert: Path, cert: Path | None = None, key: Path | None = None) -> str:
    """Why the files cannot be used: which one, what it holds, what to do. ``error`` was raised by loading them."""
    reason = getattr(error, "reason", None)
    misfit = reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED")
    forgotten = key == CERTS / "client.key" and not there(key)   # as in --cert alice.crt without --key
    if cert and key and (misfit or forgotten) and (pair := pair_of(cert, key)):
        return f"{cert} and {key} " + PAIR["other key"].format(pair=pair)
    for option, file in (("--cert", cert), ("--key", key), ("--cacert", cacert)):
        if file is None:
            continue
        try:
            held = content(file.read_bytes())
        except OSError as problem:
            return f"cannot use {file} ({problem.strerror}); {unreadable(file, problem, option)}"
        wanted = "private key" if option == "--key" else "certificate"
        if wanted not in held or (wanted == "certificate" and authorities(file) is None):
            found = wanted if wanted in held else held[0]
            return f"cannot use {file}: it " + FILES.get((wanted, found), FILES[wanted, "other"]).format(
                file=quoted(file), option=option, make=make(file), **beside(file))
    if key and reason is None:   # "PEM lib", and it is not the certificate
        return f"cannot use {key}: it " + FILES["private key", "private key"].format(make=make(key))
    if cert and key and misfit:   # renew keeps the key
        return f"{cert} and {key} " + PAIR["misfit"].format(make=make(cert))
    return f"{cert or cacert} " + PAIR["unusable"].format(words=words(error), make=make(key or cacert))


def content(data: bytes) -> list[str]:
    """What a file holds, in the table's words."""
    if not data.strip():
        return ["nothing"]
    kinds = [kind for kind, sign in (
        ("certificate", rb"-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----"),
        ("encrypted key", rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|Proc-Type: 4,ENCRYPTED"),
        ("private key", rb"-----BEGIN (\w+ )?PRIVATE KEY-----"),
        ("request", rb"-----BEGIN (NEW )?CERTIFICATE REQUEST-----"),
        # DER (X.690): a sequence (0x30) and its length; a PFX begins with version 3, a key with 0 or 1
        ("PFX", rb"\A0(\x82..|\x81.|[\x00-\x80])\x02\x01\x03"),
        ("DER", rb"\A0(\x82..|\x81.|[\x00-\x7f])[\x020]")) if re.search(sign, data, re.DOTALL)]
    if "encrypted key" in kinds and "private key" in kinds:   # the old format has both lines
        kinds.remove("private key")
    return kinds or ["other"]


def unreadable(file: Path, problem: OSError, option: str) -> str:
    """What to do about a file that is missing or that we may not read."""
    if isinstance(problem, PermissionError):
        kind = "key" if option == "--key" else "certificate"
        try:
            owner = file.owner()
            kind = "ours" if file.stat().st_uid == os.geteuid() else kind
        except (KeyError, OSError, NotImplementedError, AttributeError):   # unknown, hidden, Windows
            owner = "another user"
        return UNREADABLE[kind].format(file=quoted(file), owner=owner)
    if isinstance(problem, FileNotFoundError) and in_certs(file):
        return make(file)
    return UNREADABLE["elsewhere"]


def make(file: Path) -> str:
    """How to get a new certificate or key. Never a new CA while anything is left of the former one."""
    kind = "certificate"
    if not in_certs(file):
        kind = "elsewhere"
    elif not there(CERTS / "ca.key"):
        left = any(there(CERTS / name) for name in ("ca.crt", "server.crt", "client.crt"))
        kind = "no ca.key" if left else "nothing"
    elif file.stem == "ca":
        kind = "ca"
    elif file.suffix == ".key" and there(file):
        kind = "key"
    return MAKE[kind].format(file=quoted(file), old=quoted(file.with_suffix(".old.key")), command=command(file))


def command(file: Path) -> str:
    """The command that makes this certificate; renew keeps an existing key."""
    if file.stem in ("client", "server"):
        return RENEW
    known = there(file.with_suffix(".crt")) or there(file.with_suffix(".key"))
    return f"{RENEW if known else NEW_CA + ' client'} {shlex.quote(file.stem)}"


def in_certs(file: Path) -> bool:
    """Whether it is one of the lab's own files."""
    return file.parent.resolve() == CERTS


def beside(file: Path) -> dict[str, str]:
    """The paths of related files (same name, other suffix), by their fields in the table."""
    return {field: quoted(file.with_suffix(ending)) for field, ending in (
        ("crt", ".crt"), ("key", ".key"), ("pem", ".pem"), ("plain_key", ".plain.key"))}


def pair_of(cert: Path, key: Path) -> str | None:
    """The option to add if only one of --cert and --key was given: it names the other file of the pair."""
    options = [(option, given.with_suffix(ending)) for option, given, ending in (
        ("--key", cert, ".key"), ("--cert", key, ".crt")) if given.name]
    if cert == CERTS / "client.crt":   # the default, so it is --key that was given
        options.reverse()
    return next((f"{option} {quoted(other)}" for option, other in options
                 if other not in (cert, key) and there(other)), None)


def there(file: Path) -> bool:
    """Whether the file exists, as far as we can see."""
    return os.access(file, os.F_OK)


def authorities(file: Path) -> int | None:
    """How many of the certificates in a file are CA certificates; None if one cannot be read."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(file)
    except OSError:
        return None
    return context.cert_store_stats()["x509_ca"]


def quoted(path: Path) -> str:
    """A path, quoted for a command line."""
    return shlex.quote(str(path)) if os.name == "posix" else f'"{path}"'
