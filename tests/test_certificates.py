"""The server's own certificates: what it says of them, the step that helps, and how a running server takes up new ones."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import ssl
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import (ROOT, Lab, Server, ServerCase, Talk, environment, issue, lab, new_folder, once, openssl,
                           prepared_path, side_by_side, succeed)

sys.path.insert(0, str(ROOT / "server"))
import certificates as module  # type: ignore[import-not-found]  # noqa: E402
from certificates import FILES, Certificates, Unusable, in_words  # noqa: E402

ROUNDS = 1   # of making certificates beside a client


def make_context(certs: Path) -> ssl.SSLContext:
    """A server's context, as server.py makes one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(certs / "ca.crt")
    context.load_cert_chain(certs / "server.crt", certs / "server.key", password="")
    return context


@once
def other_lab() -> Lab:
    """Another CA of the same name."""
    other = Lab("other")
    other.generate(PREPARED_SET="other")
    return other


def copy_of_lab(source: Lab | None = None) -> Lab:
    """One whose files may be changed."""
    copy = Lab("copy")
    shutil.copytree((source or lab()).certs, copy.certs, dirs_exist_ok=True)
    return copy


def made(command: str) -> bytes:
    """What openssl makes of the lab's files."""
    result = new_folder("made") / "file"
    openssl(*command.split(), "-out", result, cwd=lab().certs)
    return result.read_bytes()


def failure(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost", then: bytes | None = None) -> str:
    """Why a handshake in memory fails, in the server's words; after its hello the client sends ``then`` and leaves."""
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
    raise AssertionError("the handshake has succeeded")


class TestWords(unittest.TestCase):
    """What the log says of a handshake that has failed."""

    def test_who_refused_whom(self) -> None:
        """A client that refuses us, one that we refuse, and what is no TLS; in one line without OpenSSL's history."""
        spoilt = copy_of_lab()
        expired = "20200101000000Z", "20200201000000Z"
        issue(spoilt, "expired", "/CN=localhost", "subjectAltName = DNS:localhost", *expired)
        issue(spoilt, "job", "/CN=localhost", "subjectAltName = DNS:localhost\nextendedKeyUsage = serverAuth")
        ours, old = make_context(spoilt.certs), spoilt.context(maximum_version=ssl.TLSVersion.TLSv1_2)
        wrong_job, too_old = make_context(spoilt.certs), make_context(spoilt.certs)
        wrong_job.load_cert_chain(spoilt.certs / "client.crt", spoilt.certs / "client.key")
        too_old.load_cert_chain(spoilt.certs / "expired.crt", spoilt.certs / "expired.key")
        of_other_ca = spoilt.context(None)
        of_other_ca.load_cert_chain(other_lab().certs / "client.crt", other_lab().certs / "client.key")
        by_them, by_us = r"^the client refused our certificate \(alert {}\): .*", "^client certificate refused: "
        cases: list[tuple[str, str]] = [
            (failure(ours, other_lab().context()), by_them.format("unknown ca") + "the CA that signed server.crt"),
            (failure(ours, spoilt.context(), "example.org"), by_them.format("bad certificate") + "names in server.crt"),
            (failure(too_old, spoilt.context()), by_them.format("certificate expired") + "server.crt has expired"),
            (failure(wrong_job, spoilt.context()), by_them.format("unsupported certificate") + "not for a server"),
            (failure(ours, spoilt.context(None)), "^peer did not return a certificate$"),
            (failure(ours, spoilt.context("expired")), by_us + "certificate has expired$"),
            (failure(ours, spoilt.context("job")), by_us + ".*purpose; it is not for a client"),
            (failure(ours, of_other_ca), by_us + ".*; no CA in ca.crt has signed it$"),
            (failure(ours, old, then=b""), r"^the client closed the connection during the handshake \(eof\)"),
            *((failure(ours, old, then=b"\x15\x03\x03\0\2\2" + bytes([code])), by_them.format(name))
              for code, name in ((44, "certificate revoked"), (46, "certificate unknown"), (51, "decrypt error"))),
            *((failure(ours, old, then=b"\x15\x03\x03\0\2\2" + bytes([code])),
               rf"^the client ended the handshake \(alert {name}\)$")
              for code, name in ((40, "handshake failure"), (70, "protocol version"), (112, "unrecognized name"))),
        ]
        for said, pattern in cases:
            with self.subTest(pattern):
                self.assertRegex(said, pattern)
                self.assertRegex(said, r"\A[ -~]{1,200}\Z")

    def test_no_peer_can_forge_a_line(self) -> None:
        """Whatever an error holds: one line of printable characters."""
        self.assertEqual(in_words(OSError("a\nb\x1b[31m" + "x" * 500)), "a?b?[31m" + "x" * 192)


class TestCauses(unittest.TestCase):
    """Files that cannot be used: which one, why, and a step that helps. The steps are taken, as they are printed."""

    def assert_steps(self, certs: Path, steps: list[str]) -> Certificates:
        """The server names these problems one after the other, and what it says to do helps against each."""
        for step in steps:
            with self.assertRaisesRegex(Unusable, step) as refusal:
                Certificates(certs, make_context)
            said = str(refusal.exception)
            self.assertRegex(said, r"\A[ -~]+\Z")
            command = re.search(r": ((?:bash|openssl|\(umask|mv|rmdir|chmod) .*)", said)
            assert command, said
            subprocess.run(["sh", "-c", command[1]], cwd=certs.parent, env=environment({"PATH": prepared_path()}),
                           input=b"secret\n", capture_output=True, check=True, start_new_session=True)
        return Certificates(certs, make_context)

    def test_each_cause(self) -> None:
        """Missing, empty, damaged, in another form, something else, not fitting."""
        def of(name: str, source: Lab | None = None) -> bytes:
            return ((source or lab()).certs / name).read_bytes()

        folder, unreadable = b"a folder", b"unreadable"
        remade, renew = "openssl req -new -x509 .* -key certs/ca.key", "bash certs/gen_certs.sh renew"
        another = "mv certs/server.key certs/server.old.key && " + renew
        damaged = b"-----BEGIN {0}-----\nAAAA\n-----END {0}-----\n"
        pfx = made("pkcs12 -export -passout pass:secret -inkey server.key -in server.crt")
        cases: list[tuple[dict[str, bytes | None], list[str]]] = [
            *(({name: content}, [f"{name}: {problem}; .*: {step}"])
              for name, step in (("ca.crt", remade), ("server.crt", renew), ("server.key", another))
              for content, problem in (
                  (b"", "holds nothing, .*"), (b"junk", "holds neither .*"),
                  (damaged.replace(b"{0}", b"PRIVATE KEY" if name == "server.key" else b"CERTIFICATE"), "is damaged"),
                  (of("server.csr"), r"holds a certificate request \(CSR\), .*"))),
            *(({name: None}, [f"{name}: is missing; .*: {step}"])
              for name, step in (("ca.crt", remade), ("server.crt", renew), ("server.key", renew))),
            ({"server.crt": folder}, ["is a folder .*: rmdir certs/server.crt$", f"is missing; .*: {renew}"]),
            (dict.fromkeys(("ca.key", *FILES)), ["ca.crt: is missing; .* CA included: bash certs/gen_certs.sh$"]),
            ({"server.crt": None, "server.key": None, "client.crt": None}, [f"server.crt: is missing; .*: {renew}$"]),
            ({"ca.crt": None, "ca.key": None}, ["copy it from where server.crt was made, or .*: bash certs/gen_certs.sh$"]),
            *(({name: made(f"x509 -outform DER -in {name}")}, ["in DER, .*: openssl x509 -inform DER"])
              for name in ("ca.crt", "server.crt")),
            ({"server.key": made("pkey -outform DER -in server.key")}, ["in DER, .*openssl pkey -inform DER"]),
            ({"server.key": made("rsa -aes128 -passout pass:secret -in server.key")},
             ["holds a private key with a password, .*; remove the password: .*openssl pkey"]),
            ({"server.crt": pfx, "server.key": pfx},
             [r"server.crt: holds a PFX \(PKCS#12\), .*openssl pkcs12 -clcerts", "server.key: .*pkcs12 -nocerts"]),
            ({"server.crt": of("server.key")}, [f"server.crt: holds a private key, .*: {renew}"]),
            ({"server.key": of("server.crt")}, [f"server.key: holds a certificate, .*: {another}"]),
            ({"server.key": of("client.key")}, [f"server.key: does not belong to server.crt; .*: {renew}"]),
            ({"server.key": made("ecparam -name prime256v1 -genkey -noout")}, [f"server.key: does not belong to server.crt; .*: {renew}"]),
            ({"ca.crt": of("server.crt")}, [f"ca.crt: is no CA's certificate; .*: {remade}"]),
            ({name: of(name, other_lab()) for name in ("server.crt", "server.key")},
             [f"server.crt: is not signed by the CA in ca.crt; .*: {renew}"]),
            ({f"server.{ending}": of(f"client.{ending}") for ending in ("crt", "key")},
             [f"server.crt: is not for a server .*; .*: {renew}"]),
        ]
        if os.getuid():   # root may read everything
            cases.append(({"server.key": unreadable}, ["server.key: may not be read; it is yours: chmod u.r certs/server.key$"]))

        def take_steps(case: tuple[dict[str, bytes | None], list[str]]) -> Exception | None:
            copy = copy_of_lab()
            for name, content in case[0].items():
                (copy.certs / name).unlink()
                if content is folder:
                    (copy.certs / name).mkdir()
                elif content is not None:
                    (copy.certs / name).write_bytes(content)
                    (copy.certs / name).chmod(0 if content is unreadable else 0o600)
            try:
                self.assertIsNone(self.assert_steps(copy.certs, case[1]).warning)
                self.assertEqual((copy.certs / "server.key").stat().st_mode & 0o777, 0o600)
            except (AssertionError, Unusable, subprocess.CalledProcessError) as error:
                return error
            return None

        for error, (files, _) in zip(side_by_side(take_steps, cases), cases, strict=True):
            with self.subTest(files=files):
                self.assertIsNone(error, error)

    def test_warnings(self) -> None:
        """With a certificate that clients will refuse the server starts, and says what to do; which helps."""
        for problem, extensions, *dates in (
                ("certificate has expired", "subjectAltName = IP:127.0.0.1", "20200101000000Z", "20200201000000Z"),
                ("certificate is not yet valid", "subjectAltName = IP:127.0.0.1", "20490101000000Z", "20490201000000Z"),
                ("has no names", "extendedKeyUsage = serverAuth")):
            copy = copy_of_lab()
            issue(copy, "server", "/CN=localhost", extensions, *dates)
            with self.subTest(problem):
                certificates = Certificates(copy.certs, make_context)
                self.assertRegex(certificates.warning, f"server.crt: {problem}.*: clients will refuse it; .*: bash certs/gen_certs.sh renew")
                copy.generate("renew")
                self.assertRegex(certificates.look(), "new ones are in use")
                self.assertIsNone(certificates.warning)


class TestLook(unittest.TestCase):
    """What becomes of changes to the files, in the process of the test."""

    def test_changes(self) -> None:
        """A new set is used from then on; one that is of no use is not, and its problem is told once, after a while."""
        self.addCleanup(setattr, module, "PATIENCE", module.PATIENCE)
        module.PATIENCE = 0.0   # type: ignore[attr-defined]
        copy = copy_of_lab()
        certificates, key, spare = Certificates(copy.certs, make_context), copy.certs / "server.key", copy.certs / "spare"
        certificate, both = copy.certs / "server.crt", [(of.certs / "ca.crt").read_bytes() for of in (other_lab(), lab())]
        in_use, stay = r"^CERTIFICATES \| new ones are in use \| server.crt valid until .* GMT", "the former ones stay in use"
        for change, line, generation in (
                (lambda: None, None, 0), (key.touch, None, 0),
                (lambda: copy.generate("renew", "server"), in_use + "$", 0),
                (lambda: shutil.move(key, spare), stay + r" \| .*/server.key: is missing; .* renew", 0),
                (lambda: None, None, 0),
                (lambda: key.write_text("junk"), stay + r" \| .*/server.key: holds neither PEM nor DER", 0),
                (key.touch, None, 0),
                (lambda: shutil.move(spare, key), "the former ones are back", 0), (key.touch, None, 0),
                (lambda: issue(copy, "server", "/CN=a", "subjectAltName=DNS:a", "20200101000000Z", "20200201000000Z"),
                 in_use + r" \| WARNING: .*/server.crt: certificate has expired", 0),
                (lambda: copy.generate("renew", "server"), in_use + "$", 0),
                (lambda: (copy.certs / "ca.crt").write_bytes(b"".join(both)), in_use + r" \| ca.crt has changed$", 1),
                (lambda: copy.generate(PREPARED_SET="other"), in_use + r" \| ca.crt has changed$", 2),
                (lambda: copy.generate(PREPARED_SET="third"), in_use + r" \| the CA is new$", 3)):
            with self.subTest(line):
                context = certificates.context
                change()
                said = certificates.look()
                self.assertRegex(said, line) if line else self.assertIsNone(said)
                self.assertEqual(certificates.generation, generation)
                if stay in (line or ""):
                    self.assertIs(certificates.context, context, "the former one should be in use")
        self.assertTrue(certificate.exists())

    def test_a_set_that_changes_while_it_is_loaded(self) -> None:
        """It could be half of one and half of another: it is loaded once more at the next look."""
        copy = copy_of_lab()
        changes = [lambda: None, lambda: copy.generate(PREPARED_SET="third")]

        def slow(certs: Path) -> ssl.SSLContext:
            context = make_context(certs)
            if changes:
                changes.pop(0)()
            return context

        certificates = Certificates(copy.certs, slow)
        former = certificates.context
        (copy.certs / "server.crt").touch()
        self.assertIsNone(certificates.look())
        self.assertIs(certificates.context, former)
        self.assertRegex(certificates.look(), "the CA is new")

    def test_two_cas(self) -> None:
        """ca.crt may hold the former CA and the new one: clients that trust either, and have its certificate, get in."""
        for order in (lab(), other_lab()), (other_lab(), lab()):
            copy = copy_of_lab()
            (copy.certs / "ca.crt").write_bytes(b"".join((of.certs / "ca.crt").read_bytes() for of in order))
            server = Certificates(copy.certs, make_context).context
            for version in ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3:
                other = lab().context(None, maximum_version=version)
                other.load_cert_chain(other_lab().certs / "client.crt", other_lab().certs / "client.key")
                for client in lab().context(maximum_version=version), other:
                    with self.assertRaisesRegex(AssertionError, "succeeded"):
                        failure(server, client)

    def test_many_changes_cost_nothing(self) -> None:
        """No descriptor and no memory is lost by them. (In a process of its own: here, others run meanwhile.)"""
        program = """if True:
            import os, resource, sys, tests.test_certificates as t
            certificates = t.Certificates(t.Path(sys.argv[1]), t.make_context)
            def has(changes, start):
                for number in range(start, start + changes):
                    os.utime(certificates.folder / t.FILES[number % 3], (number, number))
                    assert certificates.look() is None and certificates.stamps[number % 3][2] == number * 10 ** 9
                free = os.open(os.devnull, os.O_RDONLY)
                os.close(free)
                return free, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(*has(50, 0), *has(250, 50))"""
        said = succeed(sys.executable, "-W", "error", "-c", program, copy_of_lab().certs, cwd=ROOT)
        free, memory, free_then, memory_then = map(int, said.split())
        self.assertEqual(free, free_then)
        self.assertLess(memory_then, memory * 1.05)


class TestRunningServer(ServerCase):
    """A running server takes up new certificates by itself."""

    def test_it_follows(self) -> None:
        """Renewed: all goes on. A new CA: its clients get in, the former's do not, and their connections end."""
        copy = copy_of_lab()
        former = copy.context()
        with Server(copy) as server, Talk(server.connect(context=former)) as kept:
            def serial() -> object:
                with Talk(server.connect(context=former)) as talk:
                    self.assertEqual(talk.ask("GET", "/todo").status, 200)
                    return (talk.connection.getpeercert() or {})["serialNumber"]

            before = serial()
            copy.generate("renew")
            line = server.stderr.wait_for("CERTIFICATES")[-1]
            self.assertRegex(line, r"^\[SERVER\] CERTIFICATES \| new ones are in use \| server\.crt valid until .* GMT$")
            self.assertNotEqual(serial(), before)
            for _ in range(2):
                self.assertEqual(kept.ask("GET", "/todo").status, 200, "its CA is still the same")

            shutil.copytree(copy.certs, copy.root / "former")
            copy.generate(PREPARED_SET="other")
            self.assertRegex(server.stderr.wait_for("the CA is new")[-1], r"GMT \| the CA is new$")
            self.assertEqual(kept.ask("GET", "/todo").status, 200)
            self.assert_ends_well(kept)
            refused = copy.context(None)
            refused.load_cert_chain(copy.root / "former" / "client.crt", copy.root / "former" / "client.key")
            with self.assertRaisesRegex(ssl.SSLError, "(?i)unknown.ca|decrypt.error"), Talk(server.connect(context=refused)) as talk:
                talk.ask("GET", "/todo")
            self.assertRaises(ssl.SSLCertVerificationError, server.connect, context=former)
            server.stderr.wait_for("the client refused our certificate (alert ")
            with Talk(server.connect(context=copy.context())) as talk:
                self.assertEqual(talk.ask("GET", "/todo").status, 200)
            self.assert_no_defect_logged(server)

    def test_nobody_is_refused_in_between(self) -> None:
        """While certificates are made, a client with a consistent set gets an answer, or is of the former CA."""
        copy = copy_of_lab()
        with Server(copy) as server, ThreadPoolExecutor(1) as pool:
            context, outcomes = copy.context(), set()
            for number, arguments in enumerate(((), ("renew",), (), ("renew", "server")) * ROUNDS):
                making = pool.submit(copy.generate, *arguments, PREPARED_SET=f"set {number % 3}")
                changed = False
                while not changed:
                    changed = making.done() and len([one for one in server.stderr.now() if "new ones" in one]) > number
                    try:
                        with Talk(server.connect(context=context)) as talk:
                            outcomes.add(talk.ask("GET", "/todo").status)
                    except ssl.SSLCertVerificationError:   # the former CA's client
                        self.assertEqual(arguments, ())
                making.result()
                context = copy.context()
                with Talk(server.connect(context=context)) as talk:
                    outcomes.add(talk.ask("GET", "/todo").status)
            self.assertEqual(outcomes, {200})
            self.assert_no_defect_logged(server)
