"""The certificates themselves: RFC 5280 to the letter, one purpose each, and a PFX that every platform imports."""

from __future__ import annotations

import functools
import re
import ssl
import subprocess
import unittest
from pathlib import Path

from tests.support import Lab, environment, new_folder, once, openssl

PASSWORD = "a password, with $igns & spaces"

AUTHORITY = "X509v3 Authority Key Identifier"
CONSTRAINTS = "X509v3 Basic Constraints"
PURPOSE = "X509v3 Extended Key Usage"
SUBJECT = "X509v3 Subject Key Identifier"
USAGE = "X509v3 Key Usage"


@once
def certs() -> Path:
    """A folder with a set, a client of its own name, and PFX files of a known password."""
    lab = Lab("certificates")
    lab.generate(MTLS_PFX_PASSWORD=PASSWORD)
    lab.generate("client", "alice", MTLS_PFX_PASSWORD=PASSWORD)
    return lab.certs


def file(name: str) -> Path:
    """One of the files of that set."""
    return certs() / name


@functools.cache
def text(certificate: Path) -> str:
    """What openssl says about a certificate."""
    return openssl("x509", "-text", "-noout", "-in", certificate)


def field(certificate: Path, pattern: str) -> str:
    """The first group of the pattern in the certificate's text."""
    shown = text(certificate)
    found = re.search(pattern, shown)
    if not found:
        raise AssertionError(f"no {pattern!r} in {shown}")
    return found[1].strip()


def extensions(certificate: Path) -> dict[str, tuple[bool, str]]:
    """Name -> (critical, value). OpenSSL before 3 writes "keyid:" before an authority's key."""
    block = text(certificate).partition("X509v3 extensions:\n")[2]
    found = re.findall(r"^ {12}(\S[^:\n]*): *(critical)? *\n((?: {16}.*\n)+)", block, re.MULTILINE)
    return {name: (bool(critical), " ".join(value.split()).removeprefix("keyid:")) for name, critical, value in found}


def serial(certificate: Path) -> int:
    """Its serial number."""
    return int(openssl("x509", "-noout", "-serial", "-in", certificate).partition("=")[2], 16)


def public_key(kind: str, holder: Path) -> str:
    """The public key in a file of this kind: of a ``pkey`` the one that belongs to it."""
    return openssl(kind, *(["-noout", "-pubkey"] if kind != "pkey" else ["-pubout"]), "-in", holder)


def verify(*arguments: str | Path) -> str:
    """``openssl verify``: "OK", or why not."""
    result = subprocess.run(["openssl", "verify", *map(str, arguments)], env=environment(), stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode == 0 and result.stdout.rstrip().endswith(": OK"):
        return "OK"
    return result.stdout


def pkcs12(pfx: Path, password: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``openssl pkcs12`` on a PFX file."""
    return subprocess.run(["openssl", "pkcs12", "-in", str(pfx), "-passin", "env:PASSWORD", *arguments],
                          env=environment({"PASSWORD": password}), stdin=subprocess.DEVNULL, capture_output=True,
                          text=True, check=False)


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> None:
    """A whole TLS handshake between two contexts, in memory; raises what either side raises."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    waiting = [client.wrap_bio(to_client, to_server, server_hostname=name),
               server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(end)
        if not waiting:
            return
    raise AssertionError("the handshake does not come to an end")


class Contents(unittest.TestCase):
    """What is written in them."""

    def test_extensions(self) -> None:
        """Exactly the extensions of RFC 5280's profile, critical where it says so."""
        key_of = {name: extensions(file(f"{name}.crt"))[SUBJECT][1] for name in ("ca", "server", "client", "alice")}
        leaf = {CONSTRAINTS: (True, "CA:FALSE"), AUTHORITY: (False, key_of["ca"])}
        client = leaf | {USAGE: (True, "Digital Signature"), PURPOSE: (False, "TLS Web Client Authentication")}
        for name, expected in {
            "ca": {CONSTRAINTS: (True, "CA:TRUE, pathlen:0"), USAGE: (True, "Certificate Sign, CRL Sign"),
                   AUTHORITY: (False, key_of["ca"])},
            "server": leaf | {USAGE: (True, "Digital Signature, Key Encipherment"),
                              PURPOSE: (False, "TLS Web Server Authentication"),
                              "X509v3 Subject Alternative Name": (False, "DNS:localhost, IP Address:127.0.0.1")},
            "client": client,
            "alice": client,
        }.items():
            with self.subTest(f"the extensions of {name}.crt"):
                found = extensions(file(f"{name}.crt"))
                self.assertEqual(found, expected | {SUBJECT: (False, key_of[name])})
        for name, key in key_of.items():
            with self.subTest(f"the subject key identifier of {name}.crt is a SHA-1 hash"):
                self.assertRegex(key, r"^([0-9A-F]{2}:){19}[0-9A-F]{2}$")
        self.assertEqual(len(set(key_of.values())), 4, "each key has an identifier of its own")

    def test_names(self) -> None:
        """Each subject is one common name, in UTF-8; the CA issues all, itself included."""
        for name, subject in {"ca": "mTLS Lab Root CA", "server": "localhost", "client": "mtls-client",
                              "alice": "alice"}.items():
            with self.subTest(f"the names in {name}.crt"):
                self.assertRegex(field(file(f"{name}.crt"), r"Subject:(.*)"), rf"^CN ?= ?{subject}$")
                self.assertRegex(field(file(f"{name}.crt"), r"Issuer:(.*)"), r"^CN ?= ?mTLS Lab Root CA$")
                structure = openssl("asn1parse", "-in", file(f"{name}.crt"))
                self.assertRegex(structure, rf"UTF8STRING +:{subject}\n")

    def test_validity(self) -> None:
        """The CA is valid for 3650 days, what it issues for 365; both from now on."""
        for name, days in {"ca": 3650, "server": 365, "client": 365, "alice": 365}.items():
            with self.subTest(f"{name}.crt is valid for {days} days"):
                shown = openssl("x509", "-noout", "-dates", "-in", file(f"{name}.crt"))
                start, end = (ssl.cert_time_to_seconds(line.partition("=")[2]) for line in shown.splitlines())
                self.assertEqual(end - start, days * 24 * 3600)
                made = file(f"{name}.crt").stat().st_mtime
                self.assertTrue(-2 <= made - start <= 60, f"valid from {start}, made at {made}")

    def test_keys(self) -> None:
        """RSA of 4096 bits for the CA, 2048 for the others; SHA-256; key, CSR and certificate belong together."""
        for name, bits in {"ca": 4096, "server": 2048, "client": 2048, "alice": 2048}.items():
            with self.subTest(f"the key of {name}.crt"):
                certificate = file(f"{name}.crt")
                self.assertEqual(field(certificate, r"Public-Key: \((\d+) bit\)"), str(bits))
                self.assertEqual(field(certificate, r"Public Key Algorithm: (.*)"), "rsaEncryption")
                self.assertEqual(set(re.findall(r"Signature Algorithm: (.*)", text(certificate))),
                                 {"sha256WithRSAEncryption"})
                self.assertEqual(field(certificate, r"Version: (\d)"), "3")
                key = public_key("pkey", file(f"{name}.key"))
                self.assertEqual(public_key("x509", certificate), key, "certificate and key do not match")
                if name != "ca":
                    self.assertEqual(public_key("req", file(f"{name}.csr")), key, "CSR and key do not match")

    def test_serials(self) -> None:
        """Serial numbers are random in the beginning, 64 bits or more, and counted from there; ca.srl has the last."""
        numbers = {name: serial(file(f"{name}.crt")) for name in ("ca", "server", "client", "alice")}
        for name, number in numbers.items():
            with self.subTest(f"the serial number of {name}.crt, {number:x}, is long enough and legal"):
                # A random number of 159 bits (OpenSSL) is shorter than 64 once in 2**95; LibreSSL's 64 start with 1.
                self.assertGreaterEqual(number.bit_length(), 64)
                self.assertLess(number.bit_length(), 160, "RFC 5280 4.1.2.2: 20 octets at most, and positive")
        self.assertEqual(numbers["client"], numbers["server"] + 1)
        self.assertEqual(numbers["alice"], numbers["server"] + 2)
        self.assertNotIn(numbers["ca"], [numbers["server"], numbers["client"], numbers["alice"]])
        self.assertEqual(int(file("ca.srl").read_text(encoding="ascii"), 16), numbers["alice"])


class Verification(unittest.TestCase):
    """What they are good for, and what not."""

    def test_chains_verify_strictly_for_their_one_purpose(self) -> None:
        """Each leaf verifies for its purpose by RFC 5280 to the letter, and is refused for the other one."""
        for name, good, bad in (("server", "sslserver", "sslclient"), ("client", "sslclient", "sslserver"),
                                ("alice", "sslclient", "sslserver")):
            arguments = ("-x509_strict", "-CAfile", file("ca.crt"), file(f"{name}.crt"))
            with self.subTest(f"{name}.crt verifies as {good}"):
                self.assertEqual(verify("-purpose", good, *arguments), "OK")
            with self.subTest(f"{name}.crt is refused as {bad}"):
                self.assertRegex(verify("-purpose", bad, *arguments), "certificate purpose")

    def signed(self, folder: Path, name: str, request: str, by: tuple[Path, Path], constraints: str) -> Path:
        """A certificate for one of the set's requests, signed with the given certificate and key."""
        settings = folder / f"{name}.cnf"
        settings.write_text(f"[ v3 ]\nbasicConstraints = critical, {constraints}\nsubjectKeyIdentifier = hash\n"
                            f"authorityKeyIdentifier = keyid:always\n", encoding="ascii")
        made = folder / f"{name}.crt"
        openssl("x509", "-req", "-days", "1", "-in", file(request), "-CA", by[0], "-CAkey", by[1],
                "-set_serial", "7", "-out", made, "-extensions", "v3", "-extfile", settings)
        return made

    def refusal(self, folder: Path, chain: list[Path], key: Path) -> str:
        """Why a client of the lab refuses a server with this chain and key."""
        bundle = folder / "chain.pem"
        bundle.write_text("".join(each.read_text(encoding="ascii") for each in chain), encoding="ascii")
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(bundle, key)
        client = ssl.create_default_context(cafile=str(file("ca.crt")))
        client.check_hostname = False
        client.verify_flags &= ~ssl.VERIFY_X509_STRICT   # which would object to other things first
        with self.assertRaises(ssl.SSLCertVerificationError) as caught:
            handshake(server, client)
        return str(caught.exception.verify_message)

    def test_leaf_cannot_sign(self) -> None:
        """What a leaf's key has signed is worth nothing, nor is what a CA below the root has signed."""
        folder = new_folder("forged")
        for name, other in (("server", "client"), ("client", "server"), ("alice", "server")):
            with self.subTest(f"{name}.key cannot issue certificates"):
                own = file(f"{name}.crt")
                forged = self.signed(folder, f"by-{name}", f"{other}.csr", (own, file(f"{name}.key")), "CA:false")
                self.assertNotEqual(verify("-CAfile", file("ca.crt"), "-untrusted", own, forged), "OK")
                self.assertEqual(self.refusal(folder, [forged, own], file(f"{other}.key")), "invalid CA certificate")
        with self.subTest("the CA cannot be used to make another CA (pathlen:0)"):
            lower = self.signed(folder, "lower", "client.csr", (file("ca.crt"), file("ca.key")), "CA:true")
            self.assertEqual(verify("-CAfile", file("ca.crt"), lower), "OK")
            leaf = self.signed(folder, "leaf", "server.csr", (lower, file("client.key")), "CA:false")
            self.assertEqual(self.refusal(folder, [leaf, lower], file("server.key")), "path length constraint exceeded")

    def test_other_labs_are_strangers(self) -> None:
        """A certificate of another lab's CA, of the same name, does not verify."""
        other = Lab("other")
        other.generate(PREPARED_SET="second")
        self.assertEqual(verify("-CAfile", other.certs / "ca.crt", other.certs / "client.crt"), "OK")
        self.assertNotEqual(verify("-CAfile", file("ca.crt"), other.certs / "client.crt"), "OK")


class Handshakes(unittest.TestCase):
    """What Python's ssl makes of them, both sides as strict as it can be."""

    def server(self, certificate: str = "server") -> ssl.SSLContext:
        """A server that demands a certificate of the lab's CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(file("ca.crt"))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(file(f"{certificate}.crt"), file(f"{certificate}.key"))
        return context

    def client(self, certificate: str = "client") -> ssl.SSLContext:
        """Python's default context, with the strictness that 3.13 has added to it."""
        context = ssl.create_default_context(cafile=str(file("ca.crt")))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        context.load_cert_chain(file(f"{certificate}.crt"), file(f"{certificate}.key"))
        return context

    def test_strict_handshake(self) -> None:
        """The certificates are accepted, the server's under each of its names."""
        for name in ("localhost", "127.0.0.1"):
            for certificate in ("client", "alice"):
                with self.subTest(f"a handshake with {name}, as {certificate}"):
                    handshake(self.server(), self.client(certificate), name)

    def test_other_names_are_refused(self) -> None:
        """The server's certificate stands for localhost and 127.0.0.1 alone."""
        for name in ("example.org", "127.0.0.2", "sub.localhost", "mtls-client"):
            with self.subTest(f"the server cannot pose as {name}"):
                with self.assertRaisesRegex(ssl.SSLCertVerificationError, "is not valid for"):
                    handshake(self.server(), self.client(), name)

    def test_no_certificate_does_the_others_job(self) -> None:
        """The client's certificate is refused as a server's, and the server's as a client's."""
        for what, server, client in (("a server with the client's certificate", "client", "client"),
                                     ("a client with the server's certificate", "server", "server")):
            with self.subTest(f"{what} is refused"):
                with self.assertRaisesRegex(ssl.SSLCertVerificationError, "certificate purpose"):
                    handshake(self.server(server), self.client(client))


class Pfx(unittest.TestCase):
    """The bundle for browsers and key chains."""

    def test_round_trip(self) -> None:
        """It opens with its password and holds the client's certificate, its key, and the CA, under a name."""
        for name in ("client", "alice"):
            with self.subTest(f"{name}.pfx"):
                result = pkcs12(file(f"{name}.pfx"), PASSWORD, "-nodes")
                self.assertEqual(result.returncode, 0, result.stderr)
                found = [ssl.PEM_cert_to_DER_cert(block) for block in re.findall(
                    r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", result.stdout, re.DOTALL)]
                expected = [ssl.PEM_cert_to_DER_cert(file(f"{each}.crt").read_text(encoding="ascii"))
                            for each in (name, "ca")]
                self.assertEqual(found, expected, "not the client's certificate and the CA's")
                keys = re.findall(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----\n",
                                  result.stdout, re.DOTALL)
                self.assertEqual(len(keys), 1)
                key = new_folder("pfx") / "key.pem"
                key.write_text(keys[0], encoding="ascii")
                self.assertEqual(public_key("pkey", key), public_key("x509", file(f"{name}.crt")))
                self.assertIn(f"friendlyName: mTLS Lab: {name}\n", result.stdout)

    def test_wrong_password(self) -> None:
        """Without the password it does not open."""
        for password in ("", "wrong", PASSWORD + " ", PASSWORD[:-1]):
            with self.subTest(f"the password {password!r} does not open it"):
                result = pkcs12(file("client.pfx"), password, "-nodes")
                self.assertNotEqual(result.returncode, 0)
                self.assertNotIn("PRIVATE KEY", result.stdout)

    def test_ciphers(self) -> None:
        """3DES and a SHA-1 MAC, chosen because everything imports them; every part is encrypted."""
        for name in ("client", "alice"):
            with self.subTest(f"the ciphers of {name}.pfx"):
                result = pkcs12(file(f"{name}.pfx"), PASSWORD, "-info", "-noout")
                shown = result.stdout + result.stderr
                self.assertEqual(re.findall(r"(?:PKCS7 Encrypted data|Shrouded Keybag): ([^,]*),", shown),
                                 ["pbeWithSHA1And3-KeyTripleDES-CBC"] * 2, shown)
                structure = openssl("asn1parse", "-inform", "DER", "-in", file(f"{name}.pfx"))
                self.assertEqual(re.findall(r"OBJECT +:(.*)", structure), ["pkcs7-data", "sha1"],
                                 "the digest of the MAC should be SHA-1")


if __name__ == "__main__":
    unittest.main()
