"""The server's own certificates: what it says about them, steps that help, and how it reloads them while it runs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import sys
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import side_by_side as load_tests  # noqa: F401
from tests import support
from tests.support import Lab, Server, ServerCase, Talk, copy_of_lab, issue, lab, other_lab

sys.path.insert(0, str(support.ROOT / "server"))
import certificates as module
from certificates import Certificates
from problems import Unusable, in_words

from server import tls_context

EXPIRED = "20200101000000Z", "20200201000000Z"


def of(name: str, source: Lab | None = None) -> bytes:
    """A file of the lab, or of another one."""
    return ((source or lab()).certs / name).read_bytes()


def failure(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost", then: bytes | None = None) -> str:
    """Why a handshake in memory fails, in the server's words; "" if it does not.

    After its hello the client sends ``then`` and leaves, if that is given.
    """
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name)
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    for round_trip in range(4):
        if then is None or not round_trip:
            with contextlib.suppress(ssl.SSLError):
                theirs.do_handshake()
        else:
            to_server.write(then)
            to_server.write_eof()
        try:
            ours.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLError as error:
            return str(in_words(error))
    return ""


class TestWords(unittest.TestCase):
    """What the log says about a failed handshake."""

    def test_who_refused_whom(self) -> None:
        """A client that refuses us, one that we refuse, and one that leaves; without OpenSSL's history."""
        issue(copy := copy_of_lab("words"), "expired", "/CN=localhost", "subjectAltName = DNS:localhost", *EXPIRED)
        ours, wrong_job, expired = (tls_context(copy.certs) for _ in range(3))
        for context, name in (wrong_job, "client"), (expired, "expired"):
            context.load_cert_chain(copy.certs / f"{name}.crt", copy.certs / f"{name}.key")
        old = copy.context(maximum_version=ssl.TLSVersion.TLSv1_2)

        def alert(code: int) -> str:
            return failure(ours, old, then=b"\x15\x03\x03\0\2\2" + bytes([code]))

        by_client, by_us = r"^the client refused our certificate \(alert {}\): .*", "^client certificate refused: "
        for said, words in (
                (failure(ours, other_lab().context()), by_client.format("unknown ca") + "does not trust the CA"),
                (failure(ours, old, "example.org"), by_client.format("bad certificate") + "the names in server.crt"),
                (failure(expired, old), by_client.format("certificate expired") + "server.crt has expired"),
                (failure(wrong_job, old), by_client.format("unsupported certificate") + "not for a server"),
                (alert(44), by_client.format("certificate revoked")), (alert(51), by_client.format("decrypt error")),
                (alert(40), r"^the client ended the handshake \(alert handshake failure\)$"),
                (alert(112), r"^the client ended the handshake \(alert unrecognized name\)$"),
                (failure(ours, old, then=b""), r"^the client closed the connection during the handshake \(eof\)"),
                (failure(ours, copy.context(None)), "^peer did not return a certificate$"),
                (failure(ours, copy.context("expired")), by_us + "certificate has expired$"),
                (failure(ours, copy.context("server")), by_us + ".* purpose; it is not for a client"),
                (failure(ours, copy.context(of=other_lab())), by_us + ".*; no CA in ca.crt has signed it$"),
                (in_words(OSError("a\nb\x1b[31m" + "x" * 500)), r"^a\?b\?\[31mx*$")):
            with self.subTest(words):
                self.assertRegex(said, words)
                self.assertRegex(said, r"\A[ -~]{1,200}\Z")


RENEW = "bash certs/gen_certs.sh renew"
REMADE, ANOTHER = "openssl req -new -x509 .* -key certs/ca.key", f"mv certs/server.key certs/server.old.key && {RENEW}"
CAUSES: list[tuple[str, ...]] = [   # what spoils a lab, and what the server says, step by step
    ("rm ca.crt", f"ca.crt is missing; .*: {REMADE}"),
    ("rm ca.crt ca.key", "copy it from where .*, or .* new CA: bash certs/gen_certs.sh$"),
    ("rm *.key server.crt ca.crt", "ca.crt is missing; .* CA included: bash certs/gen_certs.sh$"),
    (": >ca.crt", f"ca.crt is empty, .*: {REMADE}"),
    ("sed -i.old 5d ca.crt", f"ca.crt is damaged; .*: {REMADE}"),
    ("openssl x509 -outform DER -in ca.crt -out a; mv a ca.crt", "in DER, .*: openssl x509 -inform DER"),
    ("cp server.crt ca.crt", f"ca.crt is not a CA certificate; .*: {REMADE}"),
    ("rm server.crt server.key client.crt", f"server.crt is missing; .*: {RENEW}$"),
    ("rm server.crt; mkdir server.crt", "is a folder .*: rmdir certs/server.crt$", f"is missing; .*: {RENEW} server$"),
    ("cp server.csr server.crt", rf"holds a certificate request \(CSR\), .*: {RENEW}"),
    ("sed -i.old 5d server.crt", f"server.crt is damaged; .*: {RENEW}"),
    ("cp server.key server.crt", f"server.crt holds a private key, .*: {RENEW}"),
    ("openssl pkcs12 -export -passout pass:secret -inkey server.key -in server.crt -out a; cp a server.crt; "
     "mv a server.key", r"server.crt holds a PFX \(PKCS#12\), .*: openssl pkcs12 -clcerts",
     "server.key holds .*pkcs12 -nocerts"),
    ('cp "$OTHER"/server.* .', f"server.crt is not signed by the CA in ca.crt; .*: {RENEW}"),
    ("cp client.crt server.crt; cp client.key server.key", f"server.crt is not for a server .*; .*: {RENEW}"),
    ("rm server.key", f"server.key is missing; .*: {RENEW}"),
    ("echo junk >server.key", f"server.key holds something unknown, .*: {ANOTHER}"),
    ("sed -i.old 5d server.key", f"server.key is damaged; .*: {ANOTHER}"),
    ("cp client.key server.key", f"server.key does not match server.crt; .*: {RENEW}"),
    ("openssl ecparam -name prime256v1 -genkey -noout -out server.key", "server.key does not match"),
    ("openssl pkey -outform DER -in server.key -out a; mv a server.key", "in DER, .*openssl pkey -inform DER"),
    ("openssl rsa -aes128 -passout pass:secret -in server.key -out a; mv a server.key",
     "holds a private key with a password, .*; remove the password: .*openssl pkey"),
    *([("echo >server.key; chmod 0 server.key", "Permission denied.; it is yours: chmod u.r certs/", ANOTHER)]
      if os.getuid() else []),   # root may read everything
]


class TestCauses(unittest.TestCase):
    """Files that cannot be used: which one, why, and a step that helps. The steps are taken, as they are printed."""

    def overcome(self, cause: tuple[str, ...]) -> str | None:
        """The server names these problems one after the other, and what it says to do helps against each.

        Returns what is wrong with that, if anything.
        """
        copy = copy_of_lab("spoilt", cause[0])
        try:
            for problem in cause[1:]:
                with self.assertRaisesRegex(Unusable, problem) as refusal:
                    Certificates(copy.certs, tls_context)
                step = re.search(r": ((?:bash|openssl|\(umask|mv|rmdir|chmod) [ -~]*)\Z", str(refusal.exception))
                copy.take(step[1] if step else "false")
            self.assertIsNone(Certificates(copy.certs, tls_context).warning)
            self.assertEqual((copy.certs / "server.key").stat().st_mode & 0o777, 0o600)
        except (AssertionError, Unusable) as error:
            return repr(error)
        return None

    def test_each_cause(self) -> None:
        """Missing, empty, damaged, in another form, something else, not matching."""
        for wrong, cause in zip(support.side_by_side(self.overcome, CAUSES), CAUSES, strict=True):
            with self.subTest(cause[0]):
                self.assertIsNone(wrong)


class TestLook(unittest.TestCase):
    """What happens when the files change."""

    def test_changes(self) -> None:
        """A new set is used from then on; an unusable one is not, and its problem is logged once."""
        self.addCleanup(setattr, module, "PATIENCE", module.PATIENCE)
        module.PATIENCE = 0.0
        copy = copy_of_lab("changes")
        key, aside = copy.certs / "server.key", copy.certs / "aside"
        in_use = r"^CERTIFICATES \| new ones are in use \| server.crt valid until [^|]* GMT"
        stay = r"^CERTIFICATES \| the former ones stay in use \| .*/server.key "
        both = of("ca.crt", other_lab()) + of("ca.crt")

        aside.with_name("large").write_bytes(b"x" * 2_000_000)

        def become_fifo() -> None:
            key.unlink()
            os.mkfifo(key)

        def replace(by: Lab) -> None:
            shutil.copytree(by.certs, copy.certs, dirs_exist_ok=True)

        changes: list[tuple[Callable[[], object], str]] = [
            (lambda: None, ""),
            (key.touch, ""),
            (lambda: copy.generate("renew", "server"), in_use + "$"),
            (lambda: key.rename(aside), stay + "is missing; .* renew"),
            (lambda: None, ""),
            (lambda: key.write_text("junk"), stay + "holds something unknown"),
            (become_fifo, stay + "is not a regular file"),
            (lambda: aside.with_name("large").replace(key), stay + "is too large"),
            (lambda: aside.replace(key), "the former ones are back"),
            (key.touch, ""),
            (lambda: (copy.certs / "ca.crt").write_bytes(both), in_use + r" \| ca.crt has changed$"),
            (lambda: replace(other_lab()), in_use + r" \| ca.crt has changed$"),
            (lambda: replace(lab()), in_use + r" \| the CA is new$"),
        ]
        certificates = Certificates(copy.certs, tls_context)
        for change, line in changes:
            with self.subTest(line):
                former = certificates.context
                change()
                self.assertRegex(certificates.look() or "", line or "^$")
                if "stay" in line:
                    self.assertIs(certificates.context, former)

    def test_warnings(self) -> None:
        """A certificate that clients will refuse is used, with a warning; what the warning says to do helps."""
        names = "subjectAltName = IP:127.0.0.1"
        for words, *case in ((": certificate has expired", names, *EXPIRED),
                             (": certificate is not yet valid", names, "20490101000000Z", "20490201000000Z"),
                             (" has no names", "extendedKeyUsage = serverAuth")):
            copy = copy_of_lab("warnings")
            certificates = Certificates(copy.certs, tls_context)
            issue(copy, "server", "/CN=localhost", *case)
            with self.subTest(words):
                warning = f"/server.crt{words}.*: clients will refuse it; .*: bash certs/gen_certs.sh renew server$"
                self.assertRegex(certificates.look() or "", rf" \| new ones are in use .* \| WARNING: .*{warning}")
                self.assertRegex(Certificates(copy.certs, tls_context).warning or "", warning)
                copy.generate("renew", "server")
                self.assertRegex(certificates.look() or "", "new ones are in use")
                self.assertIsNone(certificates.warning)

    def test_a_set_that_changes_while_it_is_loaded(self) -> None:
        """It could be half of one set and half of another: it is loaded again at the next look."""
        file = copy_of_lab("half").certs / "server.crt"
        changes: list[Callable[[], object]] = [lambda: None, file.touch]

        def slow(certs: Path) -> ssl.SSLContext:
            context = tls_context(certs)
            if changes:
                changes.pop(0)()
            return context

        certificates = Certificates(file.parent, slow)
        former = certificates.context
        file.write_bytes(file.read_bytes() + b"\n")
        self.assertIsNone(certificates.look())
        self.assertIs(certificates.context, former)
        self.assertRegex(certificates.look() or "", "new ones are in use")

    def test_two_cas(self) -> None:
        """ca.crt may hold the former CA and the new one: a client of either CA gets in."""
        for order in (lab(), other_lab()), (other_lab(), lab()):
            copy = copy_of_lab("two CAs")
            (copy.certs / "ca.crt").write_bytes(b"".join(of("ca.crt", one) for one in order))
            for server_of in order:
                for name in ("server.crt", "server.key"):
                    (copy.certs / name).write_bytes(of(name, server_of))
                certificates = Certificates(copy.certs, tls_context)
                self.assertEqual(certificates.in_use.issuer, of("ca.crt", server_of), "what is sent with server.crt")
                for version in ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3:
                    for client_of in order:
                        client = server_of.context(of=client_of, maximum_version=version)
                        self.assertEqual(failure(certificates.context, client), "")

    def test_many_changes_cost_nothing(self) -> None:
        """They leak no descriptor and no memory. (In a process of its own: here, other tests run meanwhile.)"""
        program = """if True:
            import os, resource, sys, tests.test_certificates as t
            certificates = t.Certificates(t.Path(sys.argv[1]), t.tls_context)
            def has(changes, start):
                for number in range(start, start + changes):
                    os.utime(certificates.folder / ("ca.crt", "server.crt", "server.key")[number % 3], (number, number))
                    assert certificates.look() is None and certificates.stamps[number % 3][2] == number * 10 ** 9
                free = os.open(os.devnull, os.O_RDONLY)
                os.close(free)
                return free, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(*has(30, 0), *has(100, 30))"""
        said = support.succeed(sys.executable, "-W", "error", "-c", program, copy_of_lab("many").certs,
                               cwd=support.ROOT)
        free, memory, free_then, memory_then = map(int, said.split())
        self.assertEqual(free, free_then)
        self.assertLess(memory_then, memory * 1.03)


class TestRunningServer(ServerCase):
    """A running server loads new certificates by itself."""

    def test_it_follows(self) -> None:
        """After renewal, all keeps working. After a new CA, only its clients get in; others lose their connections."""
        in_use = r"CERTIFICATES \| new ones are in use \| server\.crt valid until [^|]* GMT"
        copy = copy_of_lab("running")
        context = copy.context()
        with Server(copy) as server, Talk(server.connect(context=context)) as kept, ThreadPoolExecutor(1) as pool:
            def serial() -> object:
                with Talk(server.connect(context=context)) as talk:
                    self.assertEqual(talk.ask("GET", "/todo").status, 200)
                    return (talk.connection.getpeercert() or {})["serialNumber"]

            def make(line: str, *arguments: str, **variables: str) -> None:
                """Run gen_certs.sh until the log has this line; clients meanwhile are served or of the former CA."""
                def is_done() -> bool:
                    with contextlib.suppress(*([] if arguments else [ssl.SSLCertVerificationError])):
                        serial()
                    return making.done() and bool(re.search(rf"(?m)^\[SERVER\] {line}$", server.stderr.text()))

                making = pool.submit(copy.generate, *arguments, **variables)
                self.assertTrue(support.comes_true(is_done), server.stderr.now())
                making.result()

            before = serial()
            make(in_use, "renew", "server")
            self.assertNotEqual(serial(), before)
            make(in_use + r" \| the CA is new", PREPARED_SET="other")
            self.assertEqual(kept.ask("GET", "/todo").status, 200)
            self.assert_ends_well(kept)
            with (self.assertRaisesRegex(ssl.SSLError, "(?i)unknown.ca|decrypt.error"),
                  Talk(server.connect(context=copy.context(of=lab()))) as talk):
                talk.ask("GET", "/todo")
            self.assertRaises(ssl.SSLCertVerificationError, server.connect, context=context)
            server.stderr.wait_for("the client refused our certificate (alert ")
            context = copy.context()
            serial()
            self.assert_no_defect_logged(server)
