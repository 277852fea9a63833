"""The two clients: what they print, which servers they trust, how long they wait, and how they fail."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests import side_by_side as load_tests  # noqa: F401
from tests import support
from tests.support import PATIENCE, Lab, Server, copy_of_lab, forked, issue, lab, openssl, succeed
from tests.test_readme import section

CLIENT, NEGATIVE = "client", "client_no_cert"

Behaviour = Callable[[socket.socket], object]
"""What a foreign server does with a TCP connection; the connection is closed afterwards."""


@contextlib.contextmanager
def other_server(behave: Behaviour) -> Iterator[str]:
    """A server with this behaviour. Yields its URL."""
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(PATIENCE)
            with contextlib.suppress(OSError):
                behave(self.request)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever, 0.02)
        try:
            yield f"https://127.0.0.1:{server.server_address[1]}/todo"
        finally:
            server.shutdown()


def hear(connection: socket.socket) -> bytes:
    """The next bytes; ConnectionError if there are none."""
    if not (received := connection.recv(65536)):
        raise ConnectionError
    return received


def drip(connection: socket.socket, data: bytes) -> None:
    """Send the same again and again, for ten seconds or more."""
    for _ in range(200):
        connection.sendall(data)
        time.sleep(0.05)


def alerts(connection: socket.socket, code: int) -> None:
    """Read what is sent and answer with an unprotected fatal alert."""
    hear(connection)
    connection.sendall(b"\x15\x03\x03\x00\x02\x02" + bytes([code]))
    hear(connection)


def resets(connection: socket.socket) -> None:
    """Wait for the first bytes and answer with a TCP reset."""
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    connection.close()


@functools.cache
def speaks_tls(certificate: Path | None = None) -> ssl.SSLContext:
    """A server's context, for any client. It shows ``certificate`` (a path without .crt), or the lab's."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = certificate or lab().certs / "server"
    context.load_cert_chain(f"{path}.crt", f"{path}.key")
    return context


def answers(data: bytes, certificate: Path | None = None, dripping: bool = False) -> Behaviour:
    """Speak TLS, read a request's head, send ``data``, close."""
    def behave(connection: socket.socket) -> None:
        with speaks_tls(certificate).wrap_socket(connection, server_side=True) as tls:
            head = b""
            while b"\r\n\r\n" not in head:
                head += hear(tls)
            drip(tls, data) if dripping else tls.sendall(data)
            with contextlib.suppress(OSError):
                tls.unwrap()
    return behave


def refuses_late(data: bytes = b"", forged: int | None = None) -> Behaviour:
    """Prove who it is, send ``data``, and answer the request with an alert (bad_record_mac), as if it were damaged.

    With ``forged``, a man in the middle of TLS 1.2 sends that alert as soon as the server has proved who it is.
    """
    def behave(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = speaks_tls().wrap_bio(incoming, outgoing, server_side=True)
        finished = False
        while not finished:
            incoming.write(hear(connection))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                finished = True
                tls.write(data)
            connection.sendall(outgoing.read())
            if forged is not None:
                alerts(connection, forged)
        record = incoming.read() or hear(connection)   # the request may be here already
        incoming.write(record[:-1] + bytes([record[-1] ^ 1]))
        with contextlib.suppress(ssl.SSLError):
            tls.read(65536)
        connection.sendall(outgoing.read())
        hear(connection)
    return behave


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    """A response."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Case(NamedTuple):
    """A run of a client and how it should end."""

    program: str
    words: str                    # a regular expression, to be found in what it prints
    code: int = 1                 # the exit code
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str | None] = {}
    before: str = ""              # Python code that runs between the import and main()
    server: Behaviour | None = None
    host: str = "127.0.0.1"       # that the URL of this server names


VERDICTS = {(CLIENT, 1): "[CLIENT] ERROR: ", (NEGATIVE, 0): "[NEGATIVE TEST] PASS: ",
            (NEGATIVE, 1): "[NEGATIVE TEST] FAIL: ", (NEGATIVE, 2): "[NEGATIVE TEST] ERROR: "}
"""How the last line begins, by exit code."""


def run(case: Case, root: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the client of ``root``, or the shared lab's, to its end; with another server, if the case has one.

    A proxy of the environment is not there.
    """
    if case.server:
        with other_server(case.server) as url:
            arguments = ("--url", url.replace("127.0.0.1", case.host), *case.arguments)
            return run(case._replace(server=None, arguments=arguments))
    code = (f"import sys; sys.path.insert(0, {str((root or lab().root) / 'client')!r})\n"
            f"import exchange, {case.program} as program\n{case.before}\nprogram.main()")
    env = {"https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9", **case.env}
    return forked(code, case.program, *case.arguments, env=env, cwd=root or lab().root)


class ClientCase(unittest.TestCase):
    """What tests of both clients share."""

    def check(self, cases: list[Case], root: Path | None = None) -> None:
        """Run the clients, a few at a time; each must end as its case says, and print no control characters."""
        for case, result in zip(cases, support.side_by_side(lambda case: run(case, root), cases), strict=True):
            with self.subTest(case.program, words=case.words):
                said = result.stdout + result.stderr
                self.assertEqual(result.returncode, case.code, said)
                self.assertRegex(said, case.words)
                self.assertEqual([c for c in said if not c.isprintable() and c != "\n"], [])
                self.assertEqual("PASS" in said, case.program == NEGATIVE and case.code == 0)
                if not result.stderr.startswith("usage: "):
                    last = said.splitlines(keepends=True)[-1]
                    self.assertTrue(last.startswith(VERDICTS.get((case.program, case.code), "")), said)
                    self.assertEqual(result.stderr, last if " ERROR: " in last else "")


class TestOurServer(ClientCase):
    """With the lab's server: exactly what the description shows, whatever the environment."""

    def test_client(self) -> None:
        """On a fresh server it prints what the page shows; a proxy or a foreign locale changes nothing."""
        page = section("With a certificate").blocks[1].content
        for encoding, letter in ((None, "ñ"), ("ascii", r"\xf1")):   # ascii: a terminal that cannot show it
            with self.subTest(encoding), Server(lab()) as server:
                env = {"LC_ALL": "C", "PYTHONIOENCODING": encoding, "MTLS_SERVER_PORT": str(server.port),
                       "https_proxy": "http://127.0.0.1:9", "ALL_PROXY": "http://127.0.0.1:9"}
                result = lab().run("client/client.py", env=env)
                shown = page.replace("8443", str(server.port)).replace("ñ", letter)
                self.assertEqual((result.returncode, result.stderr, result.stdout), (0, "", shown))

    def test_verbose(self) -> None:
        """-v shows what was agreed on before TLS 1.3 refuses; TLS 1.2 refuses during the handshake.

        The negative test passes with OpenSSL's own words, with -v or without.
        """
        yesterday = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() - 25 * 3600))
        issue(lab(), "quaint", "/CN=a\x1bb/CN=c", "subjectAltName = IP:127.0.0.1, DNS:*.lab.test, URI:a:%0a",
              "20200101000000Z", yesterday)
        issue(lab(), "new", "/CN=new", start="20440101000000Z", end="20450101000000Z")
        prints = {name: openssl("x509", "-noout", "-fingerprint", "-sha256", "-in", lab().certs / f"{name}.crt").split(
            "=")[1].strip() for name in ("server", "client", "quaint")}
        of_server = (r"TLS: TLSv1\.3, TLS_AES_\w+, (key exchange \w+, )?new session, ALPN none\n"
                     r".*Server's certificate: CN localhost\n"
                     r".*  names in its SAN: DNS:localhost, IP Address:127\.0\.0\.1\n.*  issued by: mTLS Lab Root CA\n"
                     rf".*  valid until: \w+ .* GMT \(in 36[45] days\)\n.*  SHA-256: {prints['server']}\n")
        of_client = rf"asks for one\): CN mtls-client\n[^:]*: none\n.*\n.*\n.*  SHA-256: {prints['client']}\n"
        required = r"TLSV13_ALERT_CERTIFICATE_REQUIRED\] tlsv13 alert certificate required"
        quaint, new, serving = (("--verbose", f"--cert=certs/{name}.crt", f"--key=certs/{name}.key")
                                     for name in ("quaint", "new", "server"))
        with Server(lab()) as server:
            self.check([
                Case(CLIENT, rf"{of_server}.*{of_client}\[CLIENT\] POST.*\n(.*\n)+.*GET.*\n.*TLS: .*\n.*as before\n", 0,
                     ("-v", "--url", server.url)),
                Case(CLIENT, rf"{of_server}.*CN a\\u001bb, c\n.* DNS:\*.lab.test, URI:a:%0a\n.*\n.* GMT \(expired "
                             rf"1 day ago\)\n.*{prints['quaint']}\n.*refused us: certificate expired; .*quaint$",
                     1, ("--url", server.url, *quaint)),
                Case(CLIENT, r" 2044 GMT \(not valid yet\)\n.* 2045 GMT \(in \d+ ", 1, ("--url", server.url, *new)),
                Case(CLIENT, rf"{of_server}.*server.crt cannot be shown \(unsuitable certificate purpose\)", 1,
                     ("--url", server.url, *serving)),
                *(Case(NEGATIVE, rf"{shown}.*rejected as expected\.\n.*Error: \[SSL: {alert} \(_ssl\.c:\d+\)\n", 0,
                       ("--url", server.url, *options)) for options, shown, alert in (
                    ((), r"/todo\n", required), (("-v",), rf"{of_server}.*Our certificate: none\n", required),
                    (("-v", "--tls-max", "1.2"), "TLS: the handshake did not complete\n",
                     r"SSLV3_ALERT_HANDSHAKE_FAILURE\] .+ alert handshake failure")))])

    def test_output_that_fails(self) -> None:
        """If the reader leaves or the disk is full, the client blames nobody, least of all the server."""
        cases = [(f"{head} >/dev/null", "") for head in ("| head -n 1", "-v | head -n 2", "| head -n 15")]
        if Path("/dev/full").exists():   # only Linux has it
            cases.append(("2>&1 >/dev/full; [ $? = {} ]", r".* ERROR: cannot write the output \(No space .*\)\n"))
        with Server(lab()) as server:
            for (name, code), (how, words) in itertools.product(((CLIENT, 1), (NEGATIVE, 2)), cases):
                with self.subTest(name, how=how):
                    command = f'"$0" "client/{name}.py" --url "$1" {how.format(code)}'
                    printed = succeed("sh", "-c", command, sys.executable, server.url, cwd=lab().root)
                    self.assertRegex(printed, rf"\A{words}\Z")

    def test_key_log(self) -> None:
        """SSLKEYLOGFILE gets the session's secrets, in a file that is its owner's alone."""
        folder = support.new_folder("keylog")
        (folder / "old").write_text("# before\n")
        (folder / "old").chmod(0o644)
        (folder / "link").symlink_to("target")
        (folder / "target").write_text("mine\n")
        theirs = Path("/dev/null")   # root's
        if os.getuid() == 0:
            theirs = folder / "theirs"
            theirs.touch(0o666)
            os.chown(theirs, 65534, -1)
        words = r"cannot use SSLKEYLOGFILE=.* \(.+\); name a new file in a folder of your own$"
        with Server(lab()) as server:
            self.check([Case(CLIENT, words, code, ("--url", server.url), {"SSLKEYLOGFILE": str(folder / name)})
                        for name, words, code in (("new", "POST", 0), ("old", "POST", 0), ("link", words, 1),
                                                  (str(theirs), words, 1), ("no/such", words, 1))])
        for name, start in (("new", ""), ("old", "# before\n")):
            self.assertRegex((folder / name).read_text(), rf"\A{start}[\s\S]*CLIENT_HANDSHAKE_TRAFFIC_SECRET")
            self.assertEqual((folder / name).stat().st_mode & 0o777, 0o600)
        self.assertEqual((folder / "target").read_text(), "mine\n")


class TestStart(ClientCase):
    """Problems before anything is sent: arguments, variables, files, no server or a silent one, an old Python."""

    seconds = 10

    def test_files(self) -> None:
        """Files that are missing or that we may not read. If there is a CA, no step replaces it."""
        certs = copy_of_lab("files", "cp client.key locked.key; chmod 0 locked.key; "
                            "openssl rsa -aes128 -passout pass:secret -in client.key -out secret.key").certs
        # Root may read everything, so it becomes nobody, who can reach the files only from inside their folder.
        leave = f"import gettext, locale, os, shutil; os.chdir({str(certs)!r}); os.getuid() or os.setuid(65534)"
        secret = public = "give yourself access: chmod u.r "
        if os.getuid() == 0:
            secret, public = f"it belongs to {certs.owner()}, and a private key is for its owner", "no secret.$"
        self.check([
            *(Case(CLIENT, fr"\(No such .*\); {step}\?$", arguments=(*arguments.split(),)) for arguments, step in (
                *((f"--key certs/{name}", "is this the right path") for name in ("b;b.key", "Client.key", "alice")),
                *((f"--cert certs/client{end}", "did you mean --cert certs/client.crt") for end in ("", ".")),
                ("--cert certs/mallory.crt --key certs/mall.key", "did you mean --key certs/mallory.key"))),
            *(Case(program, words, code, (option, file)) for program, code, option in (
                (CLIENT, 1, "--cert"), (CLIENT, 1, "--key"), (CLIENT, 1, "--cacert"), (NEGATIVE, 2, "--cacert"))
              for file, words in (("/no/such", r"\(No such .*; is this the right"), ("/dev/null", "is empty; is"))),
            Case(CLIENT, "Is a directory.*right path", arguments=("--cert", str(support.scratch()))),
            Case(CLIENT, f"locked.*{secret}", 1, ("--cacert=ca.crt", "--cert=ca.crt", "--key=locked.key"), {}, leave),
            Case(NEGATIVE, f"locked.key .*{public}", 2, ("--cacert", "locked.key"), before=leave),
        ])
        code, shown = support.in_terminal([sys.executable, str(lab().root / "client" / "client.py"),
                                   "--key", str(certs / "secret.key")])   # where OpenSSL could ask for the password
        self.assertEqual(code, 1)
        self.assertRegex(shown, r"\A\[CLIENT\] ERROR: .*secret.key: it has a password; ")

    def test_nothing_there(self) -> None:
        """Without certificates, both name the command for them; with a silent server they give up at 10 s."""
        words = "make the certificates: bash certs/gen_certs.sh$"
        self.check([Case(CLIENT, words), Case(NEGATIVE, words, 2)], Lab("no certificates").root)
        with socket.create_server(("127.0.0.1", 0)) as silent:   # nobody accepts
            port = str(silent.getsockname()[1])
            self.check([Case(program, f"no answer from .*:{port}/todo within 10 s; is our server on port {port}", code,
                             env={"MTLS_SERVER_PORT": port}) for program, code in ((CLIENT, 1), (NEGATIVE, 2))])

    def test_interrupted(self) -> None:
        """Ctrl+C ends each program at once and without a word, during its imports and while a client waits."""
        slow = support.new_folder("slow")
        (slow / "argparse.py").write_text("import time\nprint('imports', flush=True)\ntime.sleep(60)\n")
        with socket.create_server(("127.0.0.1", 0)) as silent:   # nobody accepts
            url = f"--url=https://127.0.0.1:{silent.getsockname()[1]}/"
            for script, line in (("client/client.py", "imports"), ("client/client_no_cert.py", "imports"),
                                 ("server/server.py", "imports"), ("client/client.py", "Creating")):
                with self.subTest(script, line=line), subprocess.Popen(
                        [sys.executable, lab().root / script, url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        env=support.environment({"PYTHONPATH": str(slow) if line == "imports" else ""})) as process:
                    self.assertTrue(any(line.encode() in printed for printed in process.stdout or ()))
                    process.send_signal(signal.SIGINT)
                    self.assertEqual((process.communicate(timeout=5)[0], process.poll()), (b"", -signal.SIGINT))

    def test_senseless_arguments(self) -> None:
        """Invalid URLs, ports and a TASK that is not text: exit 2, with the reason."""
        urls = {"must begin with https://": ("http://127.0.0.1/", "localhost:8443/todo", "file:///etc/passwd", "x"),
                "is not a URL such as https://127.0.0.1:8443/todo": (
                    "https://", "https://127.0.0.1:99999/", "https://127.0.0.1:port/", "https://127.0.0.1:0/",
                    "https://[::1/", "https://127.0.0.1/ñ", "https://127.0.0.1/a b", "https://a..b/")}
        ports = ((CLIENT, "abc"), (CLIENT, "0"), (CLIENT, "65536"), (CLIENT, "1_0"), (CLIENT, "²"), (NEGATIVE, "abc"))
        self.check([
            *(Case(CLIENT, f"error: argument --url: '.*' {words}$", 2, ("--url", url))
              for words, those in urls.items() for url in those),
            Case(NEGATIVE, "must begin with https://$", 2, ("--url", "http://127.0.0.1/")),
            *(Case(program, f"error: MTLS_SERVER_PORT: '{port}' is not a port", 2, env={"MTLS_SERVER_PORT": port})
              for program, port in ports),
            Case(CLIENT, "TASK: is not valid text", 2, ("\udcff",)),
            Case(CLIENT, r"TASK: certs/client.key is a file; did you mean --key certs/client.key\?$", 2,
                 ("--cert", "certs/client.crt", "certs/client.key")),
            Case(CLIENT, "MTLS_SERVER_PORT", 0, ("--help",)),
        ])


class Trouble(NamedTuple):
    """Something that is wrong in a lab, what client.py says about it, and what fixes it."""

    cause: str                    # shell commands in certs/ that bring it about
    words: str                    # what the client says before the step, a regular expression
    step: str                     # the step: options, or a command
    arguments: str = ""           # the client's
    then: str | None = None       # its arguments after the step, if others
    serve: bool = False           # whether the lab has a server of its own, rather than the shared one


RENEW, NEW_CA = "bash certs/gen_certs.sh renew", "bash certs/gen_certs.sh"
NEW, MISSING, MISFIT = "; make a new certificate: ", r" \(No such file or directory\)", "do not belong together; "
MEANT, RENEW_CLIENT = "did you mean ", RENEW + " client"
CLIENTS, SERVERS, ALICE, MALLORY = (f"--cert certs/{name}.crt --key certs/{name}.key" for name in (
    "client", "server", "alice", "mallory"))
TROUBLES = [
    # A file is missing, or is not what it should be
    Trouble("rm client.crt", f" certs/client.crt{MISSING}{NEW}", RENEW_CLIENT),
    Trouble("rm client.key", f" certs/client.key{MISSING}; make another: ", RENEW_CLIENT),
    *(Trouble(cause, f"certs/ca.crt.*{words}; make it again from its key: ",
              "openssl req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf")
      for cause, words in (
        ("rm ca.crt", MISSING), (": >ca.crt", "it is empty"), ("echo x >ca.crt", "no certificate"))),
    Trouble("rm *.crt *.key", MISSING + "; make the certificates: ", NEW_CA, serve=True),
    Trouble("rm client.key ca.key", MISSING + "; copy it from the machine that has ca.key; .*: ", NEW_CA, serve=True),
    Trouble("echo junk >client.crt", "it holds no certificate" + NEW, RENEW_CLIENT),
    Trouble("sed -i.old 5d client.crt", "/client.crt: it is damaged" + NEW, RENEW_CLIENT),
    *(Trouble(cause, f"/client.key.* {words}; move it and make another: ",
              "mv certs/client.key certs/client.old.key; " + RENEW_CLIENT, CLIENTS)
      for cause, words in ((": >client.key", "is empty"), ("sed -i.old 5d client.key", "is damaged"))),
    Trouble("", "alice.crt" + MISSING + NEW, NEW_CA + " client alice", ALICE),
    Trouble("rm mallory.crt", "/mallory.crt" + MISSING + NEW, RENEW + " mallory", MALLORY),
    # The wrong file
    *(Trouble(cause, words + MEANT, "--key certs/mallory.key", "--cert certs/mallory.crt")
      for cause, words in (("", MISFIT), ("rm client.key", MISSING + "; "))),
    Trouble("", MISFIT + MEANT, "--cert certs/mallory.crt", "--key certs/mallory.key"),
    Trouble("openssl ecparam -name prime256v1 -genkey -noout -out client.key", MISFIT + NEW[2:], RENEW_CLIENT),
    Trouble("", r"holds a certificate request \(CSR\); .*: ", "--cert certs/client.crt", "--cert certs/client.csr"),
    Trouble("", "holds a private key; .*: ", "--cert certs/client.crt", "--cert certs/client.key"),
    Trouble("", "holds a certificate; .*: ", "--key certs/client.key", "--key certs/client.crt"),
    Trouble("", "is not the certificate of a CA; .*: ", "--cacert certs/ca.crt", "--cacert certs/server.crt"),
    # The wrong format
    Trouble("openssl rsa -aes128 -passout pass:secret -in client.key -out a.key", "has a password; .*: ",
            "(umask 077; openssl pkey -in certs/a.key -out certs/a.plain.key)",
            "--key certs/a.key", "--key certs/a.plain.key"),
    Trouble("openssl pkcs12 -export -in client.crt -inkey client.key -certfile ca.crt -passout pass:secret "
            "-out client.pfx", "is a PFX, .*: ",
            "(umask 077; openssl pkcs12 -in certs/client.pfx -clcerts -nodes -out certs/client.pem)",
            "--cert certs/client.pfx", "--cert certs/client.pem --key certs/client.pem"),
    Trouble("printf '0\\0\\2\\1\\3' >a.pfx", "is a PFX; .*: ", "--cacert certs/ca.crt", "--cacert certs/a.pfx"),
    *(Trouble(f"openssl {tool} -in client.{ending} -outform DER -out a.der", "is in DER form, .*: ",
              f"(umask 077; openssl {tool} -inform DER -in certs/a.der -out certs/a.pem)",
              f"{option} certs/a.der", f"{option} certs/a.pem")
      for tool, ending, option in (("x509", "crt", "--cert"), ("pkey", "key", "--key"))),
    # What the server refuses
    Trouble('for e in crt key; do cp "$LAB"/expired-client.$e client.$e; done',
            "refused us: certificate expired; certs/client.crt has expired" + NEW, RENEW_CLIENT),
    Trouble('cp "$OTHER"/client.* .', "refused us: unknown ca; it does not trust the CA that issued "
            "certs/client.crt: is it our server. If so" + NEW.replace(";", ","), RENEW_CLIENT),
    Trouble('cp "$OTHER"/client.* ..', "issued client.crt: .*If so, make one of its CA: ",
            NEW_CA + " client NAME", "--cert client.crt --key client.key", ALICE),
    Trouble("", "unsupported certificate; .*: ", CLIENTS, SERVERS),
    # What the client refuses
    Trouble("openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out server.crt",
            r"address mismatch; add IP.2 = 127.0.0.1 \(.*, unless it is there, then: ", RENEW + " server", serve=True),
    Trouble('for e in crt key; do cp "$LAB"/expired-server.$e server.$e; done',
            "certificate has expired; renew it where the server runs: ", RENEW + " server", serve=True),
]


class TestNextSteps(ClientCase):
    """Each cause is produced for real, the step that the client suggests is taken, and then the client is served."""

    seconds = 20

    def test_steps(self) -> None:
        """What is wrong with files and certificates."""
        for name, subject, use in (("client", "/CN=mtls-client", "extendedKeyUsage = clientAuth"),
                                   ("server", "/CN=localhost", "subjectAltName = IP:127.0.0.1")):
            issue(lab(), f"expired-{name}", subject, use, "20200101000000Z", "20200201000000Z")
        with Server(lab(), "--allow-cn", "mtls-client", "mallory", "alice") as server:
            outcomes = support.side_by_side(functools.partial(self.overcome, server.url), TROUBLES)
        for trouble, (before, after) in zip(TROUBLES, outcomes, strict=True):
            with self.subTest(cause=trouble.cause, arguments=trouble.arguments):
                self.assertRegex(before, rf"\[CLIENT\] ERROR: .*{trouble.words}{re.escape(trouble.step)}\??\n\Z")
                self.assertLess(len(before.splitlines()[-1]), 220)
                self.assertIn("[CLIENT] Response (HTTP 200)", after)

    def overcome(self, shared: str, trouble: Trouble) -> tuple[str, str]:
        """What the client says in a lab with this trouble, and after the step."""
        own = copy_of_lab("trouble", trouble.cause)

        def says(arguments: str) -> str:
            with contextlib.ExitStack() as stack:
                serve = trouble.serve and (own.certs / "server.crt").exists()
                url = stack.enter_context(Server(own)).url if serve else shared
                result = run(Case(CLIENT, "", arguments=("--url", url, *arguments.split())), own.root)
            return result.stdout + result.stderr

        before = says(trouble.arguments)
        if trouble.step.startswith("--"):
            return before, says(f"{trouble.arguments} {trouble.step}")
        said = own.take(trouble.step.replace("NAME", "alice"))
        if "umask" in trouble.step:
            self.assertEqual((own.root / trouble.step.rstrip(")").split()[-1]).stat().st_mode & 0o777, 0o600)
        return before, f"{said}\n{says(trouble.arguments if trouble.then is None else trouble.then)}"

    def test_server(self) -> None:
        """Trouble with where the server listens, or with which clients it admits."""
        port = support.free_port()
        mallory = tuple(word.replace("certs", str(lab().certs)) for word in MALLORY.split())
        refused = (rf"no server at .*:{port}/todo; start it there: python3 server/server.py --port {port}; "
                   r"if it runs on another port, name that: export MTLS_SERVER_PORT=PORT \(or --url\)$")
        to_admit = "to admit it, add mallory to the names after the server's --allow-cn .see its log.$"
        with Server(lab()) as server:
            self.check([
                Case(CLIENT, refused, env={"MTLS_SERVER_PORT": port}),
                Case(NEGATIVE, f"nothing is proved: .*{refused}", 2, env={"MTLS_SERVER_PORT": port}),
                Case(CLIENT, "nothing listens on port 443, the default; .*: --url https://127.0.0.1:8443/todo$",
                     arguments=("--url", "https://127.0.0.1/"),
                     before=f"program.http.client.HTTPSConnection.default_port = {port}"),
                Case(CLIENT, "name no.invalid cannot be resolved .*: --url https://127.0.0.1:8443/todo$", 1,
                     ("--url", "https://no.invalid:1/"), {"RES_OPTIONS": "timeout:1 attempts:1"}),
                Case(CLIENT, to_admit, 1, mallory, {"MTLS_SERVER_PORT": str(server.port)})])
        with Server(lab(), "--port", port, "--allow-cn", "mtls-client", "mallory"):
            self.check([Case(CLIENT, "HTTP 200", 0, who, {"MTLS_SERVER_PORT": port}) for who in ((), mallory)])


class TestOtherServers(ClientCase):
    """Each failure is one line that says what to do; the negative test never passes for a wrong reason."""

    def test_untrusted(self) -> None:
        """A certificate that does not verify: both say why, and what to do about exactly that."""
        certs, host = lab().certs, "subjectAltName = IP:127.0.0.1"
        other = copy_of_lab("other", 'cp "$OTHER"/* .; cat server.crt ca.crt >chain.crt; cp server.key chain.key').certs
        issue(lab(), "expired", "/CN=s", host, "20200101000000Z", "20200201000000Z")
        issue(lab(), "early", "/CN=s", host, "20440101000000Z", "20450101000000Z")
        issue(lab(), "elsewhere", "/CN=127.0.0.1", "subjectAltName = DNS:localhost")
        issue(lab(), "no-san", "/CN=localhost", "extendedKeyUsage = serverAuth")
        another = "; not from the CA in certs/ca.crt; is port [0-9]+ your server's.*, try again$"
        names = r" mismatch; add {} \(or the next free number\) at the end of certs/server.cnf, unless .* renew server$"
        self.check([
            Case(program, f"the server's certificate is not trusted: .*{words}", code,
                 env={"SSL_CERT_FILE": str(other / "ca.crt")},   # what the system trusts is not what we trust
                 server=answers(http("200 OK", b"{}"), certificate),
                 host="localhost" if "localhost" in words else "127.0.0.1")
            for program, code in ((CLIENT, 1), (NEGATIVE, 2))
            for certificate, words in (
                (other / "server", another), (other / "chain", another), (other / "ca", another),
                (certs / "expired", "certificate has expired; renew it where the server runs"),
                (certs / "early", "certificate is not yet valid.*; set this machine's clock; .* renew server$"),
                (certs / "client", "unsuitable certificate purpose; it is not for servers"),
                (certs / "elsewhere", "IP address" + names.format("IP.2 = 127.0.0.1")),
                (certs / "no-san", "Hostname" + names.format("DNS.2 = localhost")))])

    def test_strange_answers(self) -> None:
        """What both say about other answers; what another client put on the list cannot control a terminal."""
        no_json, no_answer = "did not send the JSON", "no HTTP answer"
        too_long = "sent more than 1 MB|more than 100 interim responses"   # the latter: Python 3.15 itself
        let_in, in_http = r"HTTP {} .*: let in\.$", "HTTP {} .*: refused, but in HTTP, after TLS had let us in"
        silent, too_early = "without an alert or a whole answer .*may have", "before the server proved who it is"
        coded, begun = "it uses a transfer coding", "Server began to answer a client .*; only then: {}"
        ok, much = b"HTTP/1.1 200 OK\r\n", b"x" * 2 ** 21
        with Server(lab()) as refusing:
            cases: list[tuple[Behaviour, str, int, str]] = [
                (answers(http("507 Full", b'{"error": "the list\\nis \\u009b31m full"}')),
                 r"HTTP 507: the list is \\u009b31m full", 1, in_http.format(507)),
                *((answers(http("500 Long", body)), f"HTTP 500: {'x' * 200}$", 1, in_http.format(500))
                  for body in (b"x" * 999, b'{"error": "%s"}' % (b"x" * 999))),
                (answers(http("400 Bad", b"<a>\x1b\nmore")), r"HTTP 400: <a>\\u001b$", 1, in_http.format(400)),
                (answers(http("502 Bad", b"<html>\n<title>Bad\nGateway</title>")), "HTTP 502: Bad Gateway$", 1,
                 in_http.format(502)),
                (answers(http("404 Nowhere")), "HTTP 404: Nowhere", 1, in_http.format(404)),
                *((answers(http("302 Found", b"", f"Location: {target}")), "HTTP 302", 1, let_in.format(302))
                  for target in (refusing.url, "http://[x/")),
                *((answers(http("200 OK", body)), no_json, 1, let_in.format(200))
                  for body in (b"hello", b"[1, 2]", b'"\xff"', b"[" * 100_000, *(
                      b'{"todos": [%s], "client": "a"}' % todos
                      for todos in (b"NaN", b"1e999", b'{"a": 1, "a": 1}', b"[" * 9 + b"]" * 9)))),
                *((answers(ok + head + b"\r\n\r\n" + much), too_long, 1, let_in.format(200))
                  for head in (b"A: b", b"Content-Length: 9999999")),
                *((answers(ok + b"Transfer-Encoding: %s\r\n\r\n-1\r\n" % coding + much), coded, 1, let_in.format(200))
                  for coding in (b"chunked", b"gzip, chunked")),
                # What http.client reads line by line has the same limit as a body.
                *((answers(data), too_long, 1, begun.format(f".*({too_long})"))
                  for data in (b"HTTP/1.1 100 Go on\r\n\r\n" * 60_000, ok + (b"A: " + b"b" * 60_000 + b"\r\n") * 90)),
                (answers(ok + b"A: " + much), no_answer, 1, begun.format(".*header line")),
                *((answers(ok + b"Content-Length: %d\r\n\r\n{" % length), no_answer, 1, let_in.format(200))
                  for length in (9, 10 ** 18, 10 ** 19)),
                (answers(b"220 \x1b0;\x07\r\n"), no_answer + r".*220 \\u001b0;\\u0007", 1,
                 begun.format(r".*220 \\u001b0;\\u0007")),
                (answers(b"<html>hello"), no_answer, 1, begun.format(".*<html>hello")),   # as HTTP/0.9 did
                (answers(b"HTTP/2 200\r\n\r\n"), no_answer, 1, begun.format(".*HTTP/2")),
                (answers(b""), no_answer, 2, silent), (resets, no_answer, 2, silent), (hear, no_answer, 2, silent),
                (lambda connection: connection.sendall(http("200 OK")), "does not speak TLS", 2, "not speak TLS"),
                *((functools.partial(alerts, code=code), f"refused us: {words}", 2, of_negative)
                  for code, words, of_negative in (
                    (70, "protocol version; it speaks neither", "protocol version; that is not the alert for a"),
                    (42, "bad certificate; .* openssl x509 -noout -dates -in ", "bad certificate; that is not"),
                    (44, "certificate revoked; .* ask whoever runs", "certificate revoked; that is not"),
                    (116, "certificate required; .* see the server's log", too_early),
                    (40, "handshake failure; .* see the server's log", too_early))),
            ]
            self.check([case for server, words, code, words_of_negative in cases for case in (
                Case(CLIENT, words, server=server), Case(NEGATIVE, words_of_negative, code, server=server))])
        body = b'{"client": "a\\n[CLIENT]\\u001b", "todo": 0, "todos": ["\xc2\x9b31m", "\xe2\x80\xae", "\x7f"]}'
        shown = r'as: "a\\n\[CLIENT\]\\u001b"\n(.*\n)+ *"\\u009b31m",\n *"\\u202e",\n *"\\u007f"'
        self.check([Case(CLIENT, shown, 0, server=answers(http("200 OK", body)))])

    def test_late_refusals(self) -> None:
        """From a server that has proved who it is: PASS only for the right alert, and before any answer."""
        # No server here can be made to send certificate_required late, so another alert is counted as that.
        counted = 'program.REFUSALS.add("SSLV3_ALERT_BAD_RECORD_MAC")'
        old = ("--tls-max", "1.2")
        begun = "Server began to answer a client without a certificate; only then: bad record mac$"
        partly = refuses_late(b"HTTP/1.1 200 OK\r\nContent-Le")
        self.check([
            Case(NEGATIVE, "nothing is proved: .*refused us: unknown ca", 2, old, server=refuses_late(forged=48)),
            Case(NEGATIVE, "nothing is proved: .* us: certificate unknown", 2, old, server=refuses_late(forged=46)),
            Case(NEGATIVE, "PASS", 0, old, server=refuses_late(forged=40)),   # TLS 1.2 cannot tell who sent it
            Case(NEGATIVE, "nothing is proved: .*bad record mac", 2, server=refuses_late()),
            Case(NEGATIVE, "PASS", 0, before=counted, server=refuses_late()),
            Case(NEGATIVE, "PASS", 0, old, before=counted, server=refuses_late()),
            Case(NEGATIVE, begun, before=counted, server=partly),
            Case(NEGATIVE, begun, 1, old, before=counted, server=partly),
            Case(NEGATIVE, begun, before=counted, server=refuses_late(b"H"))])

    def test_drips(self) -> None:
        """A server that never finishes: both give up when the whole exchange takes too long."""
        hello: Behaviour = functools.partial(drip, data=b"\x16\x03\x03\x16\x03")   # the beginning of a long ServerHello
        begun = [answers(piece, dripping=True) for piece in (
            b"H", b"HTTP/1.1 100 Go on\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n")]
        body = answers(b"HTTP/1.1 200 OK\r\n\r\n", dripping=True)
        self.check([Case(program, f"{words}no complete answer from https://.* within 1 s", code,
                         before="exchange.EXCHANGE = 1", server=server)
                    for program, code, words, servers in (
                        (CLIENT, 1, "", [hello, *begun, body]), (NEGATIVE, 2, "nothing is proved: ", [hello]),
                        (NEGATIVE, 1, "FAIL: Server began .*; only then: ", begun)) for server in servers])
