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
NEW_CA = "bash certs/gen_certs.sh"
RENEW = f"{NEW_CA} renew"
# With the same key it is the same CA: everything that it has issued keeps working.
REMAKE_CA = "openssl req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf"

# --- The table -----------------------------------------------------------------------------
# In the texts, {make} is how to get a new file, see MAKE; {cacert}, {cert}, {file} and the like are paths;
# {host} and {port} are those of the URL; {words} are OpenSSL's or the system's.

OTHER_CA = "not from the CA in {cacert}; is port {port} your server's? Just after gen_certs.sh, try again"
UNNAMED = ("add {kind}.2 = {host} (or the next free number) at the end of certs/server.cnf, unless it is there, "
           f"then: {RENEW} server")

UNTRUSTED: dict[int | str, str] = {   # The server's certificate does not verify, by OpenSSL's error code
    # Signature failure (a CA of the same name with another key), self-signed (two codes), issuer unknown (two codes)
    **dict.fromkeys((7, 18, 19, 20, 21), OTHER_CA),
    9: f"set this machine's clock; if that is right, renew it where the server runs: {RENEW} server",
    10: f"renew it where the server runs: {RENEW} server",
    26: f"it is not for servers; renew server.crt where the server runs: {RENEW} server",
    62: UNNAMED,    # host name mismatch
    64: UNNAMED,    # IP address mismatch
    "no CA": "{cacert} is not the certificate of a CA; use the CA's own: --cacert certs/ca.crt",
    "other": "is it our server?",
}
REFUSED = {   # The server refuses our certificate, by its alert (RFC 8446 section 6.2)
    "unknown ca": "it does not trust the CA that issued {cert}: is it our server? If so, {of_its_ca}",
    "decrypt error": "its CA has the name of {cert}'s, but another key: is it our server? If so, {of_its_ca}",
    "certificate expired": "{cert} has expired; {make}",
    "bad certificate": "{cert} is damaged or not valid yet; compare both machines' clocks with its dates: "
                       "openssl x509 -noout -dates -in {cert}",
    "unsupported certificate": "{cert} is not for clients; use: --cert certs/client.crt --key certs/client.key",
    "certificate revoked": "{cert} has been revoked; ask whoever runs the server for another one",
    "certificate required": "it did not receive {cert}; see the server's log",
    "handshake failure": "no cipher suite in common, or it wants a certificate other than {cert}; see the server's log",
    "protocol version": "it speaks neither TLS 1.2 nor 1.3; is it our server?",
    "other": "see the server's log; is it our server?",
}
NO_ANSWER = {
    "refused": "no server at {url}; start it there: {start}; "
               f"if it runs on another port, name that: {EXPORT} (or --url)",
    "no port": "no server at {url}: nothing listens on port 443, the default; "
               "add the server's port: --url https://{host}:8443/todo",
    "silent": f"no answer from {{url}} within {SILENCE:.0f} s; is our server on port {{port}}, and still running?",
    "unknown host": "the host name {host} cannot be resolved ({words}); correct it, or, "
                    "for a server on this machine: --url https://127.0.0.1:8443/todo",
    "no TLS": "what listens on port {port} does not speak TLS ({words}); is that our server's port?",
    "too much": "{url} sent more than 1 MB; is it our server? If so, its list is too long: restart it",
    "other": "no HTTP answer from {url}: {words}; is it our server, and is it still running?",
}
NOT_TLS = ("WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "UNKNOWN_PROTOCOL")
FILES = {   # What a file holds, instead of what it should hold
    "nothing": "is empty; {make}",
    "damaged": "is damaged; {make}",
    "other": "holds no {wanted}; {make}",
    "certificate": "holds a certificate; use its private key: {option} {right}",
    "private key": "holds a private key; use the certificate: {option} {right}",
    "request": "holds a certificate request (CSR); use the {wanted}: {option} {right}",
    "encrypted private key": "has a password; ask whoever made it for one without, or make a copy without: "
                             f"({PRIVATELY}openssl pkey -in {{file}} -out {{plain}})",
    "PFX": "is a PFX, not PEM; convert it and use that as --cert and --key: "
           f"({PRIVATELY}openssl pkcs12 -in {{file}} -clcerts -nodes -out {{pem}})",
    "--cacert PFX": "is a PFX; use the CA's certificate: --cacert certs/ca.crt",
    "DER": "is in DER form, not PEM; convert it and use the result: "
           f"({PRIVATELY}openssl {{tool}} -inform DER -in {{file}} -out {{pem}})",
}
UNREADABLE = {   # A file that we may not read, or that is missing
    "ours": "give yourself access: chmod u+r {file}",
    "key": "it belongs to {owner}, and a private key is for its owner only; "   # no chmod, which could expose it
           "ask for a certificate and key of your own",
    "certificate": "it belongs to {owner}; ask for a copy (a certificate is no secret)",
    "closed": "you may not look into its folder; see whose it is: ls -ld {folder}",
    "meant": "did you mean {meant}?",
    "elsewhere": "is this the right path?",
}
MAKE = {   # How to get a new file: {make} above
    "elsewhere": "is it the right one? If so, get another from whoever issued it",
    "nothing": f"make the certificates: {NEW_CA}",
    "no ca.key": "copy it from the machine that has ca.key; "
                 f"if there is none, make a new CA and all certificates: {NEW_CA}",
    "ca": "make it again from its key: {command}",
    "key": "move it and make another: mv {file} {old}; {command}",
    "no key": "make another: {command}",
    "certificate": "make a new certificate: {command}",
}
OF_ITS_CA = f"make one of its CA: {NEW_CA} client NAME"
FORBIDDEN = "; to admit it, add {name} to the names after the server's --allow-cn (see its log)"


# --- What happened -------------------------------------------------------------------------

def words(error: Exception) -> str:
    """What OpenSSL or the system says, without OpenSSL's codes and source locations."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.partition(",")[0]   # what follows in a mismatch is the URL's host
    if isinstance(error, ssl.SSLError) and error.reason:
        return re.sub("^(sslv3|tlsv1|tlsv13) (alert )?", "", error.reason.replace("_", " ").lower())
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def explain(error: Exception, url: str, cacert: Path, cert: Path | None = None) -> str:
    """Why there is no answer, and what to do next. ``cert`` is the certificate that we have, if any."""
    said, parts = words(error), urllib.parse.urlsplit(url)
    port = parts.port or 443
    facts = {"url": url, "host": parts.hostname, "port": port, "words": said, "cacert": quoted(cacert),
             "start": f"{PYTHON} server/server.py" + f" --port {port}" * (port != 8443)
                      + f" --host {parts.hostname}" * (parts.hostname not in ("127.0.0.1", "localhost"))}
    if cert:
        facts |= {"cert": quoted(cert), "make": make(cert), "of_its_ca": make(cert) if command(cert) else OF_ITS_CA}
    if isinstance(error, ssl.SSLCertVerificationError):
        code: int | str = error.verify_code
        if code in (18, 19, 20, 21) and authorities(cacert) == 0:
            code = "no CA"
        step = UNTRUSTED.get(code, UNTRUSTED["other"])
        step = step.format(kind="IP" if code == 64 else "DNS", **facts)
        return f"the server's certificate is not trusted: {said}; {step}"
    reason = getattr(error, "reason", None) or ""
    if isinstance(error, ssl.SSLError) and ("_ALERT_" in reason or reason.startswith("TLSV1_")):
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
        text = title[1] if title else text.strip().partition("\n")[0] or phrase
    text = text[:200]
    if status == 403:
        name = re.search(r"CN '([^'\\]+)' is not in the allowed list", text)
        text += FORBIDDEN.format(name=shlex.quote(name[1])) if name else "; see the server's log"
    return text


# --- What is wrong with a file -------------------------------------------------------------

def unusable(error: OSError, cacert: Path, cert: Path | None = None, key: Path | None = None) -> str:
    """Why the files cannot be used: which one, what it holds, what to do. ``error`` is what loading them raised."""
    reason = getattr(error, "reason", None)
    for option, file, partner in (("--cacert", cacert, None), ("--cert", cert, key), ("--key", key, cert)):
        if file is None:
            continue
        try:
            held = content(file.read_bytes())
        except OSError as problem:
            return f"cannot use {shown(file)} ({problem.strerror}); {unreadable(option, file, problem, partner)}"
        if option == "--key":
            wanted, ending, tool, usable = "private key", ".key", "pkey", reason   # without one, it is the key's fault
        else:
            wanted, ending, tool, usable = "certificate", ".crt", "x509", authorities(file) is not None
            held[0] = held[0].removeprefix("encrypted ")
        if wanted in held and usable:
            continue
        found = "damaged" if wanted in held else held[0]
        return f"cannot use {shown(file)}: it " + FILES.get(f"{option} {found}", FILES[found]).format(
            file=quoted(file), option=option, wanted=wanted, tool=tool, make=make(file),
            right=quoted(file.with_suffix(ending)), pem=quoted(file.with_suffix(".pem")),
            plain=quoted(file.with_suffix(".plain.key")))
    if cert and key and reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        other = meant("--key", key, cert) or meant("--cert", cert, key)
        step = UNREADABLE["meant"].format(meant=other) if other else make(cert)   # renew keeps the key
        return f"{shown(cert)} and {shown(key)} do not belong together; {step}"
    return f"{shown(cert or cacert)} cannot be used ({words(error)}); {make(key or cacert)}"


def content(data: bytes) -> list[str]:
    """What a file holds, in the table's words."""
    if not data.strip():
        return ["nothing"]
    kinds = [kind for kind, sign in (
        ("certificate", rb"-----BEGIN (X509 |TRUSTED )?CERTIFICATE-----"),
        ("encrypted private key", rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|Proc-Type: 4,ENCRYPTED"),
        ("private key", rb"-----BEGIN (?!ENCRYPTED)(\w+ )?PRIVATE KEY-----(?!\s*Proc-Type: 4,ENCRYPTED)"),
        ("request", rb"-----BEGIN (NEW )?CERTIFICATE REQUEST-----"),
        # DER (X.690): a sequence (0x30) and its length; a PFX begins with version 3, a key with 0 or 1
        ("PFX", rb"\A0(\x82..|\x81.|[\x00-\x80])\x02\x01\x03"),
        ("DER", rb"\A0(\x82..|\x81.|[\x00-\x7f])[\x020]")) if re.search(sign, data, re.DOTALL)]
    return kinds or ["other"]


def unreadable(option: str, file: Path, problem: OSError, partner: Path | None) -> str:
    """What to do about a file that is missing or that we may not read. ``partner`` is the key for a certificate."""
    kind, owner, other = "elsewhere", "another user", None
    if isinstance(problem, PermissionError):
        kind = "key" if option == "--key" else "certificate"
        try:
            owner = file.owner()
            kind = "ours" if file.stat().st_uid == os.geteuid() else kind
        except PermissionError:
            kind = "closed"
        except (KeyError, OSError, NotImplementedError, AttributeError):   # unknown, Windows
            pass
    elif isinstance(problem, FileNotFoundError):
        other = meant(option, file, partner)
        if not other and command(file):
            return make(file)
        kind = "meant" if other else kind
    return UNREADABLE[kind].format(file=quoted(file), folder=quoted(file.parent), owner=owner, meant=other)


def meant(option: str, file: Path, partner: Path | None) -> str | None:
    """The option with a file that exists and was probably meant: with an ending, or beside a partner that was given."""
    ending = ".key" if option == "--key" else ".crt"
    files = [file.with_name(file.name.rstrip(".") + ending)]
    if partner and partner.name and partner not in (CERTS / "client.crt", CERTS / "client.key"):
        files.append(partner.with_suffix(ending))
    return next((f"{option} {quoted(other)}" for other in files if other != file and there(other)), None)


def make(file: Path) -> str:
    """How to get a new certificate or key. Never a new CA while anything is left of the former one."""
    kind, made_by = "certificate", command(file)
    if not made_by:
        kind = "elsewhere"
    elif not there(CERTS / "ca.key"):
        left = any(there(CERTS / name) for name in ("ca.crt", "server.crt", "client.crt"))
        kind = "no ca.key" if left else "nothing"
    elif file.name == "ca.crt":
        kind = "ca"
    elif file.suffix == ".key":
        kind = "key" if there(file) else "no key"
    return MAKE[kind].format(file=quoted(file), old=quoted(file.with_suffix(".old.key")), command=made_by)


def command(file: Path) -> str | None:
    """The command that makes exactly this certificate or key, or None; renew keeps the key if that exists."""
    name = file.stem
    if not in_certs(file) or not re.fullmatch(r"\w[\w.-]{0,63}\.(crt|key)", file.name, re.ASCII):
        return None
    if file.name == "ca.crt":
        return REMAKE_CA
    if name in ("server", "client") or there(file.with_suffix(".crt")) or there(file.with_suffix(".key")):
        return f"{RENEW} {name}"
    return None if name.lower() in ("ca", "server", "client") else f"{NEW_CA} client {name}"


def in_certs(file: Path) -> bool:
    """Whether it is one of the lab's own files."""
    return file.parent.resolve() == CERTS


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


def shown(path: Path) -> str:
    """A path as short as it can be: the lab's own files have relative ones in the project's folder."""
    short = Path("certs", path.name)
    return str(short if in_certs(path) and there(short.parent) and in_certs(short) else path)


def quoted(path: Path) -> str:
    """A path for a command line."""
    return shlex.quote(shown(path)) if os.name == "posix" else f'"{shown(path)}"'
