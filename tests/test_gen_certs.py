"""certs/gen_certs.sh: what it makes and says, what the certificates are good for, and that nothing is lost."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import side_by_side as load_tests  # noqa: F401
from tests import support
from tests.support import ROOT, Lab, environment, lab, new_folder, once, openssl, prepared_path, succeed

SOURCES = ["ca.cnf", "client.cnf", "gen_certs.sh", "server.cnf"]
MADE = ["ca.crt", "ca.key", "ca.srl", "client.crt", "client.csr", "client.key", "client.pfx",
        "server.crt", "server.csr", "server.key"]
KINDS = ("crt", "csr", "key", "pfx")
ZOE = tuple(f"zoe.{kind}" for kind in KINDS)
PASSWORD = "it's \"from\" $HOME & 100% `env`; \\n ñ"

# The description's commands, and a check of the PFX, each with the step that is announced before it.
# Only the beginning of pkcs12: the rest sets the ciphers.
COMMANDS = [
    ("", "version"),
    ("[1/6]", "genrsa -out certs/ca.key 4096"),
    ("[2/6]", "req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf"),
    ("[3/6]", "genrsa -out certs/server.key 2048"),
    ("[3/6]", "req -new -key certs/server.key -out certs/server.csr -config certs/server.cnf"),
    ("[4/6]", "x509 -req -days 365 -in certs/server.csr -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial"
              " -out certs/server.crt -extensions v3_server -extfile certs/server.cnf"),
    ("[5/6]", "genrsa -out certs/client.key 2048"),
    ("[5/6]", "req -new -key certs/client.key -out certs/client.csr -config certs/client.cnf"),
    ("[5/6]", "x509 -req -days 365 -in certs/client.csr -CA certs/ca.crt -CAkey certs/ca.key -CAcreateserial"
              " -out certs/client.crt -extensions v3_client -extfile certs/client.cnf"),
    ("[6/6]", "pkcs12 -export -out certs/client.pfx -inkey certs/client.key -in certs/client.crt"
              " -certfile certs/ca.crt"),
    ("[6/6]", "asn1parse -inform DER -in certs/client.pfx"),
    ("[6/6]", "verify -x509_strict -purpose sslserver -CAfile certs/ca.crt certs/server.crt"),
    ("certs/server.crt: OK", "verify -x509_strict -purpose sslclient -CAfile certs/ca.crt certs/client.crt"),
]
DECISIVE = len(COMMANDS)   # the last call of openssl before the new set is moved into place

INTERRUPTED = "gen_certs.sh: interrupted; certs/ is unchanged\n"

# What a watched openssl or a meddling tool can do (sh). The script is its parent.
FAILS = 'i=0; while [ $i -lt 150 ]; do i=$((i + 1)); echo "out $i"; echo "err $i" >&2; done; exit 1'
CHATTER = [f"{stream} {number}" for number in range(1, 151) for stream in ("out", "err")]
CTRL_C = "kill -s INT 0"   # to the whole process group, as a terminal does

# What the tests' own caller ignores (nohup, &) would be ignored by the script as well; a handler is not passed on.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# Python ignores SIGXFSZ, and so does what it becomes: beyond this limit, writing fails as on a full disk.
LIMITED = """import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execvp(sys.argv[2], sys.argv[2:])"""


def tool(name: str, path: str, text: str) -> str:
    """The PATH, with a command of our own (sh) in front."""
    folder = new_folder("tool")
    (folder / name).write_text(f"#!/bin/sh\n{text}", encoding="utf-8")
    (folder / name).chmod(0o755)
    return f"{folder}{os.pathsep}{path}"


@once
def watched_path() -> str:
    """`prepared_path` with an openssl in front that notes each call in $WATCH/calls.

    A note is the last line that the script has printed until then, a tab, and the arguments. At call number WATCH_AT
    (0: each) it first does WATCH_ACTION, which may end it. Then it lets openssl work, or, if WATCH_READY is a folder,
    just takes the file to make from there: that is fast.
    """
    prepared, real = (shlex.quote(str(shutil.which("openssl", path=path))) for path in (prepared_path(), None))
    return tool("openssl", prepared_path(), f"""
last= count=0
[ ! -e "$WATCH/stdout" ] || while read -r line; do last=$line; done <"$WATCH/stdout"
printf '%s\\t%s\\n' "$last" "$*" >>"$WATCH/calls"
[ ! -e "$WATCH/count" ] || read -r count <"$WATCH/count"
echo "$((count += 1))" >"$WATCH/count"
case $WATCH_AT in 0 | "$count") eval "$WATCH_ACTION" ;; esac
export SSL_CERT_FILE=/dev/null   # openssl x509 would read all CAs of the system
case $WATCH_READY:$1 in :genrsa) exec {prepared} "$@" ;; :*) exec {real} "$@" ;; esac
all=$*
case $all in *"-out "*)
  file=${{all#*-out }}; file=${{file%% *}}
  ready=$WATCH_READY/${{file##*/}}
  [ -e "$ready" ] || ready=$WATCH_READY/client.${{file##*.}}
  cat "$ready" >"$file" || exit 1
esac
case $all in *-CAcreateserial*) cat "$WATCH_READY/ca.srl" >certs/ca.srl ;; esac
""")


@once
def ready_set() -> Path:
    """A folder with a complete set, other than the shared lab's."""
    made = Lab("ready")
    made.generate(PREPARED_SET="second", MTLS_PFX_PASSWORD="secret")
    return made.certs


@functools.cache
def path_without(*names: str) -> str:
    """A PATH with the commands that a script may use, the watched openssl among them, but without these."""
    folder = new_folder("commands")
    for command in ("bash", "cat", "chmod", "cp", "dirname", "env", "flock", "grep", "head", "ls", "mkdir", "mktemp",
                    "mv", "openssl", "perl", "rm", "sed", "sh", "sleep", "tr"):
        if command not in names and (found := shutil.which(command, path=watched_path())):
            (folder / command).symlink_to(found)
    return str(folder)


def meddling(name: str, before: str = ":", after: str = ":") -> dict[str, str]:
    """The environment's PATH with a ``name`` that does something (sh) before or after its work."""
    real = shutil.which(name)
    return {"PATH": tool(name, watched_path(), f'{before}\n{real} "$@"; code=$?\n{after}\nexit $code\n')}


class Run:
    """A run of gen_certs.sh to its end, at umask 022; its keys are of another set than the shared lab's.

    Then `code` (negative: the signal that ended it), `stdout`, `stderr`, certs/ `before` it, and the watched openssl's
    `folder` are known. ``at``, ``action``, ``fast``: see `watched_path`; ``command``: how the script is called; no file
    can grow beyond ``limit``; with ``answers``, see `in_terminal`, it has a terminal, and `stdout` is all that this
    showed. More ``options`` are for Popen.
    """

    def __init__(self, of: Lab, *arguments: str, at: int = 0, action: str = ":", fast: bool = False,
                 answers: Sequence[tuple[str, str]] | None = None, limit: int | None = None,
                 command: Sequence[str] = ("bash", "certs/gen_certs.sh"), env: Mapping[str, str] | None = None,
                 **options: Any) -> None:
        self.folder, self.lab, self.before = new_folder("watch"), of, contents(of)
        variables = {"PATH": watched_path(), "PREPARED_SET": "second", "MTLS_PFX_PASSWORD": "secret",
                     "WATCH": str(self.folder), "WATCH_AT": str(at), "WATCH_ACTION": action,
                     "WATCH_READY": str(ready_set()) if fast else "", **(env or {})}
        start = [*command, *arguments]
        if limit is not None:
            start = [sys.executable, "-ISc", LIMITED, str(limit), *start]
        if answers is not None:
            self.code, self.stdout = support.in_terminal(start, answers, of.root, variables)
            return
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            process = subprocess.Popen(start, env=environment(variables), umask=0o022, start_new_session=True, **{
                "cwd": of.root, "stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, **options})
        self.group = process.pid
        try:
            self.code = process.wait(support.PATIENCE)
        except BaseException:
            os.killpg(self.group, signal.SIGKILL)
            raise
        self.stdout, self.stderr = ((self.folder / name).read_text(encoding="utf-8", errors="replace")
                                    for name in ("stdout", "stderr"))

    def calls(self) -> list[tuple[str, str]]:
        """The calls of openssl: what was printed last until then, and the arguments."""
        lines = (self.folder / "calls").read_text(encoding="utf-8").splitlines()
        return [(last, arguments) for last, _, arguments in (line.partition("\t") for line in lines)]


@once
def first_run() -> tuple[Lab, Run, Run]:
    """A lab with a set, and with alice's certificate made on a terminal, to be read only; the runs, with PASSWORD."""
    lab()   # has the keys prepared
    made = Lab("first")
    env = {"PREPARED_SET": "first", "MTLS_PFX_PASSWORD": PASSWORD}
    return made, Run(made, env=env), Run(made, "client", "alice", env=env, answers=())


def file(name: str) -> Path:
    """One of the first run's files."""
    return first_run()[0].certs / name


def with_set(change: str = ":") -> Lab:
    """A lab of its own, in an odd place, with the certificates of the shared one; ``change`` (sh) is done there."""
    made = Lab("it's \"odd\" $HOME [a-z] * ñ")
    for path in lab().certs.iterdir():
        if path.name in MADE or path.stem == "mallory":   # other tests issue more, at any time
            shutil.copy2(path, made.certs)
    succeed("sh", "-c", change, cwd=made.certs)
    return made


def contents(of: Lab) -> dict[str, tuple[str, bytes]]:
    """Mode and content of every file in the lab's certs folder, hidden or not."""
    return {path.relative_to(of.certs).as_posix(): (stat.filemode(path.lstat().st_mode),
                                                   path.read_bytes() if path.is_file() else b"")
            for path in of.certs.rglob("*")}


def agrees(*arguments: str | Path) -> bool:
    """Whether openssl runs this without an error."""
    return not subprocess.run(["openssl", *map(str, arguments)], env=environment(), stdin=subprocess.DEVNULL,
                              capture_output=True, check=False).returncode


def opens(pfx: Path, password: str) -> bool:
    """Whether the password opens the PFX."""
    return agrees("pkcs12", "-in", pfx, "-noout", "-passin", f"pass:{password}")


def verifies(of: Lab, *names: str) -> bool:
    """Whether the present CA issued these certificates. Raises SSLError if a key does not match."""
    return all(of.context(name) and agrees("verify", "-CAfile", of.certs / "ca.crt", of.certs / f"{name}.crt")
               for name in names)


class GenCertsCase(unittest.TestCase):
    """What the tests below share."""

    def assert_changed(self, run: Run, *names: str) -> None:
        """In certs/, the run changed or added (content or mode) exactly these files."""
        before, now = run.before, contents(run.lab)
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        self.assertEqual(changed, sorted(names), "files in certs/ that were added, removed or changed")

    def assert_replaced(self, run: Run) -> None:
        """The whole set is new and verifies; everything else in certs/ is unchanged."""
        self.assert_changed(run, *MADE)
        self.assertTrue(verifies(run.lab, "server", "client"), "the new set does not verify")

    def works(self, of: Lab, *arguments: str, **options: Any) -> Run:
        """A run that succeeds and complains of nothing."""
        run = Run(of, *arguments, **options)
        self.assertEqual((run.code, run.stderr), (0, ""))
        return run

    def changes_nothing(self, of: Lab, *arguments: str, code: int = 1, **options: Any) -> Run:
        """A run that ends with this code and touches nothing."""
        run = Run(of, *arguments, **options)
        self.assertEqual(run.code, code, run.stdout if "answers" in options else run.stderr)
        self.assert_changed(run)
        return run

    def assert_refused(self, says: str, of: Lab, *arguments: str, **options: Any) -> Run:
        """It fails, prints these lines (a pattern) and nothing else, and touches nothing."""
        run = self.changes_nothing(of, *arguments, **options)
        self.assertEqual(run.stdout, "")
        self.assertRegex(run.stderr, rf"\A{says}\n\Z")
        return run


class WhatItMakes(GenCertsCase):
    """bash certs/gen_certs.sh [client NAME]"""

    def test_output(self) -> None:
        """It prints the steps, two OK lines, what exists now, until when, and what to do next, and no chatter."""
        run = first_run()[1]
        self.assertEqual((run.code, run.stderr), (0, ""))
        ca, server, client = (openssl("x509", "-noout", "-enddate", "-in", file(f"{name}.crt")).strip()
                              .replace("notAfter=", "valid until ") for name in ("ca", "server", "client"))
        self.assertRegex(run.stdout, r"\A" + "\n".join([
            r"\[1/6\] CA key .*", r"\[2/6\] CA certificate", r"\[3/6\] server key and CSR",
            r"\[4/6\] server certificate", r"\[5/6\] client key, CSR and certificate", r"\[6/6\] PFX",
            r"certs/server\.crt: OK", r"certs/client\.crt: OK", r"", r"Now in certs/:",
            rf"  ca\.crt, ca\.key  .*; {ca}", rf"  server\.crt, server\.key  for localhost, 127\.0\.0\.1; {server}",
            rf"  client\.crt, client\.key  CN mtls-client; {client}", r"  client\.pfx  .*",
            r"Next: python3 server/server\.py", r""]) + r"\Z")

    def test_commands(self) -> None:
        """It runs the description's commands in their order, and announces each step before its first command."""
        noted = first_run()[1].calls()
        self.assertGreaterEqual(len(noted), len(COMMANDS))
        for number, ((step, command), (announced, wanted)) in enumerate(zip(noted, COMMANDS, strict=False), 1):
            with self.subTest(f"call {number} should be: openssl {wanted}"):
                self.assertTrue(step.startswith(announced), f"announced was {step!r}, not {announced}")
                self.assertEqual(command[:len(wanted)] if wanted.startswith("pkcs12") else command, wanted)

    def test_modes(self) -> None:
        """Keys and PFX are 0600, certificates 0644, also with an openssl that leaves it all to the umask."""
        modes = {name: mode for name, (mode, _) in contents(first_run()[0]).items() if name not in SOURCES}
        self.assertEqual(modes, {name: "-rw-------" if name.endswith((".key", ".pfx", ".srl")) else "-rw-r--r--"
                                 for name in [*MADE, *(f"alice.{kind}" for kind in KINDS)]})

    def test_second_run_replaces_the_set(self) -> None:
        """It says that the CA is new, names the clients that are not from it, and how to renew them."""
        ready = with_set("openssl req -x509 -new -key mallory.key -subj /CN=foreign -config client.cnf "
                         "-out foreign.crt")   # not from this lab
        run = self.works(ready)
        self.assert_replaced(run)
        self.assertFalse(verifies(ready, "mallory"))
        self.assertRegex(run.stdout, r"\n  client\.pfx .*\nThe CA is new: .*\n"
                                     r"certs/mallory\.crt is from the former CA; renew it: .*\.sh renew mallory\n"
                                     r"A running server loads them by itself\.\n"
                                     r"Next, unless it runs already: python3 server/server\.py\n\Z")
        self.works(ready, "renew", "mallory")
        self.assertTrue(verifies(ready, "mallory", "client", "server"))

    def test_new_client(self) -> None:
        """It issues NAME's certificate from the existing CA and changes only the serial number."""
        ready = with_set()
        run = self.works(ready, "client", "zoe")
        self.assertRegex(run.stdout, r"\A\[1/2\] zoe key, CSR and certificate\n\[2/2\] PFX\n"
                                     r"certs/zoe\.crt: OK\n\nMade in certs/:\n"
                                     r"  zoe\.crt, zoe\.key        CN zoe; valid until .* GMT\n"
                                     r"  zoe\.pfx                 the same with the CA, for browsers\n"
                                     r"Next: python3 server/server\.py --allow-cn mtls-client mallory zoe\n"
                                     r"then: python3 client/client\.py --cert certs/zoe\.crt --key certs/zoe\.key\n\Z")
        self.assert_changed(run, "ca.srl", *ZOE)
        self.assertTrue(verifies(ready, "zoe", "mallory", "client", "server"))


class Renewal(GenCertsCase):
    """bash certs/gen_certs.sh renew [NAME]"""

    def test_renew(self) -> None:
        """New certificates and PFX from the existing CA and keys, with the names now in server.cnf."""
        ready = with_set("echo 'DNS.2 = lab.test' >>server.cnf")
        server = {"server.crt": "for localhost, 127.0.0.1, lab.test; valid until then"}
        client, mallory = ({f"{name}.crt": f"CN {cn}; valid until then",
                            f"{name}.pfx": "the same with the CA, for browsers"}
                           for name, cn in (("client", "mtls-client"), ("mallory", "mallory")))
        for arguments, rows in (((), server | client), (("server",), server), (("client",), client),
                                (("mallory",), mallory)):
            with self.subTest(f"gen_certs.sh renew {' '.join(arguments)}"):
                run = self.works(ready, "renew", *arguments, env={"MTLS_PFX_PASSWORD": f"new {arguments}"})
                self.assert_changed(run, "ca.srl", *rows, *["server.csr"] * (arguments == ()))   # with the new name
                self.assertEqual(re.sub("until .* GMT", "until then", run.stdout).partition("\n\n")[2], "".join((
                    "Renewed in certs/:\n", *(f"  {name:23} {what}\n" for name, what in rows.items()),
                    "A running server loads them by itself.\n" * ("server.crt" in rows))))
                self.assertTrue(verifies(ready, "server", "client", "mallory"))
                self.assertTrue(all(opens(ready.certs / name, f"new {arguments}") for name in rows if "pfx" in name))

    def test_repairs(self) -> None:
        """Whatever is missing or damaged is made again, except the CA's pair; existing keys stay."""
        leaves = " ".join(name for name in MADE if not name.startswith("ca."))
        for change, keys in (("rm server.key client.crt; echo junk >client.pfx; : >ca.srl", ["server"]),
                             (f"rm {leaves}", ["server", "client"])):
            with self.subTest(change):
                ready = with_set(change)
                run = self.works(ready, "renew")
                self.assert_changed(run, "ca.srl", "server.crt", "client.crt", "client.pfx",
                                    *(f"{name}.{kind}" for name in keys for kind in ("csr", "key")))
                self.assertEqual(re.findall(r"(?<=crt, )\w+(?=\.key  )", run.stdout), keys)
                self.assertTrue(verifies(ready, "server", "client", "mallory"))
                private = {mode for name, (mode, _) in contents(ready).items() if name[-3:] in {"key", "pfx", "srl"}}
                self.assertEqual(private, {"-rw-------"})


class Refusals(GenCertsCase):
    """What it refuses: one line says what is wrong and what to do, and nothing is touched."""

    def test_arguments(self) -> None:
        """Anything but the documented forms, or a NAME that cannot be both a file name and a common name: exit 2."""
        ready = with_set()
        for says, uses in (
            (r"gen_certs\.sh: cannot use these arguments: {all}; see: bash certs/gen_certs\.sh --help",
             (("banana",), ("",), ("client", "a", "b"), ("renew", "a", "b"), ("zoe", "client"), ("--help", "client"),
              ("client:foo", ""), ("client", "zoe", ""), ("", "zoe"), ("Client", "zoe"), ("2:client",))),
            (r"gen_certs\.sh: '{name}' is not a valid NAME: letters, digits, '\.', '_' and '-', not starting .*",
             [("renew", ""), ("renew", "../ca"), *(("client", name) for name in (
                 "", "-x", "--help", ".hidden", "a/b", "a b", "a\nb", "niño", "*", "$(id)", "a,CN=b"))]),
            (r"gen_certs\.sh: '{name}' belongs to the whole set; choose another NAME",
             [*(("client", name) for name in ("ca", "server", "client", "CA", "Server", "CLIENT")),
              *(("renew", name) for name in ("ca", "CA", "Server", "CLIENT"))]),
            (r"gen_certs\.sh: the NAME .* is missing; .*: bash certs/gen_certs\.sh client alice", [("client",)]),
            (r"gen_certs\.sh: .* at most 64 .*", [("client", "x" * 65), ("renew", "x" * 65)]),
        ):
            for arguments in uses:
                with self.subTest(f"gen_certs.sh {shlex.join(arguments)}"):
                    pattern = says.format(all=re.escape(" ".join(arguments)), name=re.escape(arguments[-1]))
                    self.assert_refused(pattern, ready, *arguments, code=2, env={"LC_ALL": "C.UTF-8"})

    def test_tools(self) -> None:
        """An openssl that is missing (--help works all the same), broken or too old, or nothing to take a lock with."""
        ready = with_set()
        for argument in ("--help", "-h"):
            shown = self.works(ready, argument, env={"PATH": path_without("openssl")}).stdout
            self.assertRegex(shown, r"(?s)\Ausage: bash certs/gen_certs\.sh .* client NAME .* renew \[NAME\] .* --help "
                                    r".*forgotten.*renew.* MTLS_PFX_PASSWORD ")
            self.assertLessEqual(max(map(len, shown.splitlines())), 80)
        for says, env in (
            ("openssl: command not found; install OpenSSL .*", {"PATH": path_without("openssl")}),
            ("openssl: no libssl; install OpenSSL .*", {"WATCH_ACTION": "echo openssl: no libssl >&2; exit 1"}),
            ("neither flock nor perl .*", {"PATH": path_without("flock", "perl")}),
            *((says, {"WATCH_AT": "1", "WATCH_ACTION": f'echo "{version}"; exit'}) for says, *versions in (
                (".* is too old; install OpenSSL .*", "OpenSSL 1.0.2k-fips  26 Jan 2017", "OpenSSL 1.1.0l  10 Sep 2019",
                 "LibreSSL 2.8.3", "LibreSSL 3.2.0"),
                ("'mallory' exists; .*", "OpenSSL 1.1.1w  11 Sep 2023", "OpenSSL 3.5.0 8 Apr 2025", "LibreSSL 3.3.6",
                 "LibreSSL 4.0.0")) for version in versions),   # the latter are accepted: it goes on to this check
        ):
            with self.subTest(says, env=env):
                self.assert_refused(f"gen_certs.sh: {says}", ready, "client", "mallory", env=env)

    def test_configuration(self) -> None:
        """A configuration is missing, has no place for NAME (no second mtls-client is issued), or has an error."""
        for arguments, change, says in (
            ((), "rm ca.cnf", r"certs/ca\.cnf is missing; restore it, .* with: git -C certs checkout ca\.cnf"),
            (("renew",), "rm client.cnf", r"certs/client\.cnf is missing; restore it, .* certs checkout client\.cnf"),
            (("client", "zoe"), "sed 's/CN =/commonName =/' client.cnf >x; mv x client.cnf",
             r"certs/client\.cnf has no line 'CN = .*"),
            (("renew",), f"cat '{ready_set()}/ca.crt' ca.crt >x; mv x ca.crt",
             "the first certificate in certs/ca.crt does not match certs/ca.key; move the one that does to the top"),
        ):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}, after: {change}"):
                self.assert_refused(f"gen_certs.sh: {says}", with_set(change), *arguments)
        for mistake in ("IP.2 = lab.test", "DNS.2 lab.test"):
            with self.subTest(f"in server.cnf: {mistake}"):
                ready = with_set(f"echo '{mistake}' >>server.cnf")
                self.assertTrue(self.changes_nothing(ready, "renew").stderr.endswith(
                    "\ngen_certs.sh: failed at [1/3] server certificate; certs/ is unchanged; "
                    "correct certs/server.cnf, as openssl says above\n"))
        config = (ready := with_set()).certs / "server.cnf"
        former = config.read_text()
        for wrong, right in (("::1", "IP.2 = ::1"), ("", "DNS.2 = lab.test"), ("lab.test:8443", "DNS.2 = lab.test"),
                             ("https://lab.test:8443/todo", "DNS.2 = lab.test"), ("127.0.0.2", "IP.2 = 127.0.0.2")):
            with self.subTest(f"in server.cnf: DNS.2 = {wrong}"):
                config.write_text(f"{former}DNS.2 = {wrong} # not a host name\n")
                self.assert_refused(rf"gen_certs\.sh: certs/server\.cnf: DNS\.2 = '{wrong}' is not a host name; write "
                                    f"instead: {right}", ready, "renew", "server")
                config.write_text(f"{former}{right}\n")
        self.assertIn("for localhost, 127.0.0.1, 127.0.0.2;", self.works(ready, "renew", "server").stdout)

    def test_next_steps(self) -> None:
        """The command at the end of the message, taken literally, helps; what the CA has issued goes on working."""
        anew, renew, zoe = "bash certs/gen_certs.sh", ("renew", "server"), ("client", "zoe")
        lost, unusable = "if you cannot, make a new CA and all certificates", r"(holds no .* in PEM form|is missing)"
        again = "openssl req -new -x509 -days 3650 -key certs/ca.key -out certs/ca.crt -config certs/ca.cnf"
        convert = "(umask 077; openssl pkey{} -in certs/ca.key -out certs/new.pem) && mv certs/new.pem certs/ca.key"
        taken = set()
        for arguments, changes, says, step in (
            (renew, ("openssl x509 -in ca.crt -outform DER -out x; mv x ca.crt", ": >ca.crt", "rm ca.crt"),
             f"certs/ca.crt {unusable}; .* again from its key", again),
            (zoe, ("mv old.key ca.key; mv old.crt ca.crt",), "certs/ca.crt has expired; .* from its key", again),
            (renew, ("echo junk >ca.key", "rm ca.key"), f"certs/ca.key {unusable}; .* it; {lost}", anew),
            (renew, (f"cp '{ready_set()}/ca.crt' .",), f"certs/ca.key does not match certs/ca.crt; .* {lost}", anew),
            (renew, ("cp server.crt ca.crt",), "certs/ca.crt is not a CA certificate; .* from its key", again),
            (renew, ("rm ca.key ca.crt",), "there is no CA yet; make it first", anew),
            (zoe, ("openssl rsa -in ca.key -aes128 -passout pass:secret -out x; mv x ca.key",),
             "certs/ca.key has a password; remove it", convert.format("")),
            (zoe, ("openssl rsa -in ca.key -outform DER -out x; mv x ca.key",),
             "certs/ca.key is in DER form; convert it", convert.format(" -inform DER")),
            (("renew", "client"), (": >client.key",), f"certs/client.key {unusable}; for a new one, move it",
             "mv certs/client.key certs/client.old.key"),
            (("renew",), ("openssl req -x509 -new -key client.key -subj /CN=x -config client.cnf -out client.crt",),
             "certs/client.crt is not from .*; to .*, first move it", "mv certs/client.crt certs/client.old.crt"),
            (("renew", "zoe"), (":",), "'zoe' has no certificate; make one", "bash certs/gen_certs.sh client zoe"),
            (("renew", "Mallory.crt"), (":",), r"there is no Mallory.crt, but mallory.crt \(CN mallory\); renew that",
             "bash certs/gen_certs.sh renew mallory"),
            (("renew", "mtls-client"), (":",), r"there is no mtls-client.crt, but client.crt .*; renew that",
             "bash certs/gen_certs.sh renew client"),
            (zoe, ("echo >zoe.crt", "rm zoe.crt; cp mallory.key zoe.key"),
             "'zoe' exists; choose another NAME, or renew it", "bash certs/gen_certs.sh renew zoe"),
            ((), ("rm server.csr; mkdir server.csr",), r"certs/server.csr is a folder \(Docker .*\); remove it",
             "rmdir certs/server.csr"),
        ):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}, after: {'; '.join(changes)}"):
                ready = with_set()
                if "old" in changes[0]:
                    support.issue(ready, "old", "/CN=mTLS Lab Root CA", start="20200101000000Z", end="20200102000000Z")
                for change in changes:
                    succeed("sh", "-c", change, cwd=ready.certs)
                    self.assert_refused(f"gen_certs.sh: {says}: {re.escape(step)}", ready, *arguments)
                if step in taken:
                    continue
                taken.add(step)
                ready.take(step)
                if "gen_certs.sh" not in step:
                    self.works(ready, *arguments)
                self.assertTrue(verifies(ready, "server", "client", *["mallory"] * bool(arguments and step != anew)))

    def test_what_belongs_to_others(self) -> None:
        """Files that cannot be read or written: it names the owner, and suggests no chmod that gives others access."""
        # Root can read everything, so as root this runs as the user nobody, in a folder that nobody can reach.
        place = Path(tempfile.mkdtemp(prefix="mtls lab tests ")).resolve()
        self.addCleanup(shutil.rmtree, place)
        ready = with_set()
        ready.certs = shutil.copytree(ready.certs, place / "certs")
        root, zoe, own = os.geteuid() == 0, ("client", "zoe"), r"chmod u\+[rw] certs/"
        nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if root else {}
        for path in (place, ready.certs, *ready.certs.iterdir()):
            os.chown(path, nobody.get("user", -1), nobody.get("group", -1))

        def run(*command: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, cwd=place, env=environment(), stdin=subprocess.DEVNULL, text=True,
                                  capture_output=True, check=False, **nobody)

        for arguments, name, mode, what, step in (
            ((), "", 0o555, "write certs/", own), ((), "gen_certs.sh", 0o444, r"write .* \(for the lock\)", own),
            ((), "ca.cnf", 0, "read certs/ca.cnf", own), (zoe, "ca.key", 0, "read certs/ca.key", own),
            (zoe, "ca.srl", 0, "read certs/ca.srl", own), (("renew",), "server.key", 0, "read certs/server.key", own),
            *[(zoe, "ca.crt", 0o600, "read certs/ca.crt", r'sudo chown -R "\$\(id -un\)" certs')] * root,
        ):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}, with mode {mode:03o} of certs/{name}"):
                path, before = ready.certs / name, [data for _, data in contents(ready).values()]
                path.chmod(mode)
                if step != own:
                    os.chown(path, 0, 0)
                result = run("bash", "certs/gen_certs.sh", *arguments)
                self.assertEqual((result.returncode, result.stdout), (1, ""))
                says = rf"gen_certs\.sh: cannot {what}: it belongs to {path.owner()}, mode \S+; {step}"
                self.assertRegex(result.stderr, rf"\A{says}.*\n\Z")
                if step == own:
                    taken = run("sh", "-c", result.stderr.rpartition("; ")[2])
                    gained = stat.S_IMODE(path.stat().st_mode) & ~mode
                    self.assertEqual((taken.stderr, gained & 0o077, gained != 0), ("", 0, True), "only the owner gains")
                self.assertEqual([data for _, data in contents(ready).values()], before)


class Surroundings(GenCertsCase):
    """Where it is run from, by which shell, and what that shell has inherited."""

    def test_any_folder(self) -> None:
        """All files are put beside the script, wherever it is run from; NAME may have up to 64 letters and so on."""
        odd = with_set()
        link = new_folder("links") / "link to the lab"
        link.symlink_to(odd.root)
        for name, script, cwd, env in (
            ("9.b_C-", "gen_certs.sh", odd.certs, {}),
            ("x" * 64, f"{link.name}/certs/gen_certs.sh", link.parent, {"TMPDIR": "/nonexistent", "LC_ALL": "C.UTF-8"}),
        ):
            with self.subTest(f"called as {script}, for {name}"):
                refused = self.changes_nothing(odd, "renew", name, command=("bash", script), cwd=cwd).stderr
                run = self.works(odd, command=("bash", "-c", refused.partition("one: ")[2]), cwd=cwd, env=env)
                paths = re.sub("--(cert|key)", "", run.stdout.partition("\nthen: python3 ")[2])
                succeed("bash", "-c", f"ls {paths}", cwd=cwd)   # all of them are there, seen from here
                self.assert_changed(run, "ca.srl", *(f"{name}.{kind}" for kind in KINDS))
        self.assertRegex(openssl("x509", "-noout", "-subject", "-in", odd.certs / f"{name}.crt"), rf"CN ?= ?{name}\n")

    def test_inherited(self) -> None:
        """Nothing that bash takes from the environment spoils a run, or lets it print its secret."""
        decoy = new_folder("decoy")
        (decoy / "certs").mkdir()
        (decoy / "settings").write_text("set -f -C; rm() { :; }; alias mv=false; shopt -s expand_aliases nullglob\n")
        functions = ("exec", "unset", "set", "cd", "mv", "rm", "cp", "openssl", "printf", "[")
        for env in ({"SHELLOPTS": "noglob:noclobber:keyword", "CDPATH": str(decoy)},
                    {"SHELLOPTS": "xtrace:verbose", "IFS": "c/.", "BASH_ENV": f"{decoy}/settings",
                     "BASHOPTS": "failglob:nullglob:dotglob:nocasematch:nocaseglob"},
                    {"POSIXLY_CORRECT": "1"}, {f"BASH_FUNC_{name}%%": "() { :; }" for name in functions}):
            with self.subTest(f"with {env}"):
                ready = with_set()
                run = Run(ready, fast=True, env={
                    "MTLS_PFX_PASSWORD": "", **env}, action='[ "$1" != rand ] || { echo s3cret >"$4"; exit; }')
                self.assertEqual(run.code, 0, run.stderr)
                self.assert_replaced(run)
                self.assertIn("(shown only now): s3cret\n", run.stdout)
                self.assertNotIn("s3cret", run.stderr)
                self.assertEqual(list((decoy / "certs").iterdir()), [])

    def test_other_shells(self) -> None:
        """Where sh is a bash it works; in any other shell, it says what is needed."""
        ready = with_set()
        sh = new_folder("sh") / "sh"
        sh.symlink_to(shutil.which("bash") or "")
        self.works(ready, "client", "zoe", command=(str(sh), "certs/gen_certs.sh"), fast=True)
        for shell in (("dash",), ("zsh",), ("busybox", "sh"), ("ksh",)):
            for arguments in ((), ("renew", "zoe")) if shutil.which(shell[0]) else ():
                with self.subTest(shell[0], arguments=arguments):
                    step = " ".join(("bash certs/gen_certs.sh", *arguments))   # without renew it would replace the CA
                    self.assert_refused(f"gen_certs.sh: needs bash; run it with: {step}", ready, *arguments,
                                        command=(*shell, "certs/gen_certs.sh"))


@unittest.skipUnless(shutil.which("git"), "git is not on this machine")
class Repository(GenCertsCase):
    """What git does with the project's folders."""

    def git(self, root: Path, *arguments: str) -> list[str]:
        """The lines that git prints, undisturbed by the developer's own settings."""
        alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_DIR": None, "GIT_WORK_TREE": None}
        return succeed("git", *arguments, cwd=root, env=alone).splitlines()

    def test_nothing_made_gets_in(self) -> None:
        """`git add` takes nothing that the script makes, nor what a killed run leaves."""
        made = Lab("repository")
        shutil.copy(ROOT / ".gitignore", made.root)
        for arguments in ((), ("client", "zoe")):
            self.works(made, *arguments, fast=True)
        self.assertEqual(Run(made, at=DECISIVE, action="kill -s KILL 0", fast=True).code, -signal.SIGKILL)
        self.assertEqual(len(list(made.certs.glob(".new.*/certs/*.key"))), 3)
        self.git(made.root, "init", "-q")
        self.git(made.root, "add", "--all")
        self.assertEqual(self.git(made.root, "ls-files", "certs"), [f"certs/{name}" for name in SOURCES])

    def test_line_ends(self) -> None:
        """A checkout of Git for Windows has LF in every folder, as bash, and what runs in WSL, need it."""
        folder = new_folder("windows")
        here = (f"--git-dir={folder}/git", f"--work-tree={ROOT}", "-c", "core.autocrlf=true")
        self.git(ROOT, *here, "init", "-q")
        self.git(ROOT, *here, "add", "README.md", "certs", "server", "client", "tests")
        self.git(ROOT, *here, "checkout-index", "--all", f"--prefix={folder}/checkout/")
        crlf = [path.name for path in (folder / "checkout").rglob("*")
                if path.is_file() and b"\r\n" in path.read_bytes()]
        self.assertEqual(crlf, ["README.md"], "of which we promise nothing")


class Password(GenCertsCase):
    """Where the PFX's password comes from, and where it never shows up: openssl's arguments among others."""

    def test_asked_for_on_a_terminal(self) -> None:
        """openssl asks for it, twice, and again after a slip; MTLS_PFX_PASSWORD being empty is as if it were unset."""
        prompts = ("Enter Export Password:", "Verifying - Enter Export Password:")
        differ = ["gen_certs.sh: no password, or the two differ"]
        empty = ["gen_certs.sh: the password must not be empty"]
        end = ["gen_certs.sh: no password after 3 attempts; certs/ is unchanged"]
        ready = with_set()
        for arguments, pfx, typed, complaints in (
            ((), "client.pfx", "typed $ecret,typed $ecret", []),
            (("client", "zoe"), "zoe.pfx", ",,typed one,typed two,typed $ecret,typed $ecret", empty + differ),
            (("renew", "zoe"), "zoe.pfx", "typed one,typed two,,,typed one,", differ + empty + differ + end),
        ):
            with self.subTest(f"for {pfx}, typed is {typed!r}"):
                run = Run(ready, *arguments, env={"MTLS_PFX_PASSWORD": ""},
                          answers=[(prompts[at % 2], f"{text}\n") for at, text in enumerate(typed.split(","))])
                said = [line for line in run.stdout.splitlines() if line.startswith("gen_certs.sh: ")]
                self.assertNotRegex(run.stdout, "typed|shown only now|Can't read")   # the last: openssl, of a slip
                self.assertNotIn("typed", str(run.calls()))
                self.assertEqual((run.code, said), (len(complaints) // 4, complaints), run.stdout)
                self.assertTrue(opens(ready.certs / pfx, "typed $ecret"))
                if run.code:
                    self.assert_changed(run)

    def test_made_up(self) -> None:
        """Without terminal and variable it makes up a password, a new one each time, and prints it once."""
        ready = with_set()
        seen = set()
        for command in ("client", "renew"):
            run = self.works(ready, command, "zoe", env={"MTLS_PFX_PASSWORD": ""})
            password, = re.findall(r"(?m)^Password of certs/zoe\.pfx .*: (\S{20,})$", run.stdout)
            self.assertEqual(run.stdout.count(password), 1)
            self.assertTrue(opens(ready.certs / "zoe.pfx", password))
            self.assertNotIn(password, str([call for _, call in run.calls()]))
            seen.add(password)
        self.assertEqual(len(seen), 2, "the same password twice")

    def test_git_bash(self) -> None:
        """There it is made up, also on a terminal, and has no CR of a Windows openssl; python is called python."""
        ready = with_set()
        windows = ('case "$*" in rand*) printf "s3cret\\r\\n" >"$4"; exit ;; '
                   '*-enddate*) printf "notAfter=then\\r\\n"; exit ;; esac')
        run = Run(ready, "client", "zoe", action=windows, env={"MTLS_PFX_PASSWORD": "", "OSTYPE": "msys"})
        self.assertRegex(run.stdout, r"CN zoe; valid until then\n.*\nPassword .*: s3cret\nNext: python server.*\n"
                                     r"then: python client.*\n\Z")
        self.assertTrue(opens(ready.certs / "zoe.pfx", "s3cret"))
        run = Run(ready, action=windows, answers=(), fast=True, env={"MTLS_PFX_PASSWORD": "", "OSTYPE": "cygwin"})
        self.assertEqual((run.code, "(shown only now): s3cret\n" in run.stdout), (0, True), run.stdout)


class NothingLost(GenCertsCase):
    """Whatever happens before the new set is complete, the old one stays, and nothing temporary does."""

    seconds = 5

    def test_openssl_fails(self) -> None:
        """Whichever command: its output appears, all of it, then the step, and nothing has changed."""
        ready = with_set()
        self.works(ready, fast=True)   # from now on mallory's certificate is of a former CA: it can be replaced
        for arguments, announced, command, password in (
            *(((), step if step.startswith("[") else "[6/6]", command, "secret") for step, command in COMMANDS[1:]),
            ((), "[6/6]", "rand", ""), (("client", "mallory"), "[1/2]", "genrsa", "secret"),
            (("client", "mallory"), "[2/2]", "verify -x509_strict", "secret"),
        ):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}: openssl {command} fails"):
                run = self.changes_nothing(ready, *arguments, action=f'case "$*" in "{command}"*) {FAILS} ;; esac',
                                           fast=not arguments, env={"MTLS_PFX_PASSWORD": password})
                self.assertEqual(run.stderr.splitlines()[:-1], CHATTER)
                self.assertNotIn("out 1", run.stdout)
                self.assertRegex(run.stderr, rf"\ngen_certs\.sh: failed at {re.escape(announced)} .*unchanged\n\Z")

    def test_interrupts(self) -> None:
        """Ctrl+C during any call of openssl; kill and a closed terminal at some; Ctrl+C at the work of other tools."""
        kill, hangup, alone = "kill -s TERM 0", "kill -s HUP 0", "kill -s TERM $PPID"
        codes = {CTRL_C: 130, kill: 143, hangup: 129, alone: 143}
        ready = with_set()
        for arguments, at, action in (
            *(((), at, CTRL_C) for at in range(2, DECISIVE + 1)), ((), 2, kill), ((), 6, alone), ((), 11, hangup),
            *((("client", "zoe"), at, CTRL_C) for at in (4, 7, 11)),
            *((("renew",), at, CTRL_C) for at in (3, 7, 13, 16)),
        ):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}: {action} during call {at}"):
                run = self.changes_nothing(ready, *arguments, at=at, action=action, fast=True, code=codes[action])
                self.assertEqual((run.stderr, len(run.calls())), (INTERRUPTED, at))
        again = f'[ "$(wc -l <"$WATCH/calls")" -lt 6 ] || {CTRL_C}'   # at the end; there is also one rm before that
        for what in ("after mktemp", "before cp", "after chmod", "before rm", "after rm"):
            with self.subTest(f"Ctrl+C {what}"):
                when, name = what.split()
                at, action = (6, again) if name == "rm" else (0, CTRL_C)
                run = self.changes_nothing(ready, at=at, action=CTRL_C if at else ":", fast=True, code=130,
                                           env=meddling(name, **{when: action}))
                self.assertEqual(run.stderr, INTERRUPTED)

    def test_from_the_move_on(self) -> None:
        """Once the certificates are being moved, neither a signal nor a failing openssl can spoil the run."""
        for what, env, at, action in (
            ("Ctrl+C before mv", meddling("mv", before=CTRL_C), 0, ":"),
            ("Ctrl+C after mv, then kill", meddling("mv", after=CTRL_C), DECISIVE + 1, "kill -s TERM 0"),
            ("openssl fails from then on", {}, 0, f'case "$*" in x509*-noout*) {FAILS} ;; esac'),
        ):
            with self.subTest(what):
                run = Run(with_set(), at=at, action=action, fast=True, env=env)
                self.assertIn("-enddate", run.calls()[DECISIVE][1])
                self.assertEqual(run.code, 0, run.stderr)
                self.assert_replaced(run)
                self.assertTrue(run.stdout.endswith("Next, unless it runs already: python3 server/server.py\n"))

    def test_interrupts_on_a_terminal(self) -> None:
        """Ctrl+C at the terminal, while a key is made and when the password is asked for."""
        prompt = "Enter Export Password:"
        ready = with_set()
        for at, shown in ((2, ["held"]), (9, ["held"]), (99, [prompt]), (99, [prompt, f"Verifying - {prompt}"])):
            with self.subTest(f"Ctrl+C at {shown[-1]!r}, call {at}"):
                # The newline is for an openssl that was hit just before it began to read: it reads on all the same.
                answers = [*((text, "typed\n") for text in shown[:-1]), (shown[-1], "\x03\n")]
                run = self.changes_nothing(ready, at=at, action="echo held >/dev/tty; read -r line </dev/tty",
                                           answers=answers, code=130, env={"MTLS_PFX_PASSWORD": ""})
                self.assertNotIn("same", run.stdout)
                self.assertTrue(run.stdout.endswith(f"\n{INTERRUPTED}"), run.stdout)

    def test_killed(self) -> None:
        """kill -9 changes nothing either; what it leaves is for its owner alone, and the next run removes it."""
        for at, arguments in ((2, ("client", "zoe")), (DECISIVE, ("renew",))):
            with self.subTest(f"kill -9 during call {at}, then gen_certs.sh {' '.join(arguments)}"):
                killed = Run(with_set(), at=at, action="kill -s KILL 0", fast=True)
                self.assertEqual(killed.code, -signal.SIGKILL)
                certs, now = killed.lab.certs, contents(killed.lab)
                left, = {name.partition("/")[0] for name in now} - {*killed.before}
                self.assertEqual({mode[4:] for name, (mode, _) in now.items() if name.startswith(left)}, {"------"})
                self.assertEqual({name: now[name] for name in killed.before}, killed.before)
                shutil.copytree(certs / left, certs / ".new.older")   # and one of another run
                self.works(killed.lab, *arguments, fast=True)
                self.assertEqual(list(certs.glob(".*")), [])
        for what, moved in (("some of the former files", "*/server.key*old/"),
                            ("the new ones, too", "*certs/ca.crt*certs/server.crt*")):
            with self.subTest(f"kill -9 when it had moved {what}; the next run puts the former ones back first"):
                kill = f'case "$*" in {moved}) kill -s KILL 0 ;; esac'
                killed = Run(with_set(), fast=True, env=meddling("mv", after=kill))
                now = contents(killed.lab)
                self.assertNotEqual({name: now.get(name) for name in killed.before}, killed.before, "not half a move")
                self.works(killed.lab, "client", "zoe", fast=True)
                self.assert_changed(killed, "ca.srl", *ZOE)

    def test_a_move_that_fails(self) -> None:
        """If a file cannot be replaced or moved into place, it is named, and files already moved are put back."""
        refuse = "echo 'mv: x: Operation not permitted' >&2; exit 1"
        # Only the move into place has many arguments: it does three files, and fails.
        half = f'[ $# -le 3 ] || {{ for to; do :; done; {shutil.which("mv")} "$2" "$3" "$4" "$to"; {refuse}; }}'
        for arguments, gone, meddle, what in (
            ((), "", f'case "$*" in *client.pfx*) {refuse} ;; esac', "replace certs/client.pfx"),
            ((), "ca.crt ca.srl client.pfx", half, "write to certs/"), (("client", "zoe"), "", half, "write to certs/"),
        ):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}: it cannot {what}, without {gone or 'nothing'}"):
                ready = with_set(f"rm -f {gone}")
                run = self.changes_nothing(ready, *arguments, fast=True, env=meddling("mv", meddle))
                self.assertEqual(run.stderr, f"gen_certs.sh: cannot {what}: Operation not permitted; certs/ is "
                                             "unchanged\n")

    def test_nowhere_to_write(self) -> None:
        """It ends when a file cannot grow, first or last, or if pkcs12 does not report that it wrote half a PFX."""
        ready = with_set("for name in *.cnf; do : >$name; done")   # which nobody reads in a fast run
        pfx = ready_set() / "client.pfx"
        size = pfx.stat().st_size
        for steps, limit in ((1, (ready_set() / "ca.key").stat().st_size - 1), (6, size - 1)):
            with self.subTest(f"no file may grow beyond {limit} bytes, too few for step {steps}"):
                run = self.changes_nothing(ready, limit=limit, env={"LC_ALL": "C"}, fast=True)
                self.assertIn("too large", run.stderr, "what openssl said")
                self.assertEqual(run.stdout.count("/6]"), steps)
        for says, options in (
            ("copy certs/ca.cnf: File too large", {"limit": 99}),
            ("write to standard output", {"command": ("sh", "-c", 'exec bash certs/gen_certs.sh >&-')}),
            ("write certs/: Read-only file system", {"env": meddling("mktemp", "echo Read-only file system; exit 1")}),
        ):
            with self.subTest(says):
                self.assert_refused(f"gen_certs.sh: cannot {says}; certs/ is unchanged", with_set(), **options)
        for limit in (0, size - 1):
            with self.subTest(f"a PFX's first {limit} bytes"):
                cut = f'case $1 in pkcs12) head -c {limit} {shlex.quote(str(pfx))} >certs/client.pfx; exit ;; esac'
                self.assertIn("failed at [6/6] PFX; ", self.changes_nothing(with_set(), action=cut).stderr)
        with self.subTest("nobody reads its output any more, as in gen_certs.sh | head -1"):
            reader, writer = os.pipe()
            os.close(reader)
            self.addCleanup(os.close, writer)
            self.changes_nothing(ready, fast=True, stdout=writer, code=-signal.SIGPIPE)


class OneAtATime(GenCertsCase):
    """Two runs never mix their files, and a killed one blocks nobody."""

    def test_lock(self) -> None:
        """While one runs, others say so and change nothing; a killed one blocks none, even if its openssl lives on."""
        for name, path in (("flock", {}), ("perl", {"PATH": path_without("flock")})):
            if not shutil.which(name):
                continue
            with self.subTest(f"with {name}, two others while one runs"):
                ready = with_set()
                other = f"bash {shlex.quote(str(ready.certs / 'gen_certs.sh'))}"
                others = f'for way in "" "client zoe"; do {other} $way; echo $?; done >"$WATCH/others" 2>&1'
                run = self.works(ready, at=6, action=others, fast=True, env=path)
                self.assertRegex((run.folder / "others").read_text(),
                                 r"\A(gen_certs\.sh: another run is at work .*\n1\n){2}\Z")
                self.assert_replaced(run)
            for at, password in ((2, "given"), (10, "")):
                with self.subTest(f"with {name}, killed during call {at}"):
                    killed = Run(with_set(), at=at, action="kill -s KILL $PPID; sleep 60", fast=True,
                                 env={"MTLS_PFX_PASSWORD": password, **path})
                    try:
                        self.assertEqual(killed.code, -signal.SIGKILL)
                        self.works(killed.lab, "client", "zoe", fast=True, env=path)
                    finally:
                        os.killpg(killed.group, signal.SIGKILL)   # fails if openssl does not live on
                    self.assert_changed(killed, "ca.srl", *ZOE)


def extensions(certificate: Path) -> dict[str, tuple[bool, str]]:
    """Name -> (critical, value), without the "X509v3" of each name. OpenSSL before 3 writes "keyid:" before a key."""
    block = openssl("x509", "-text", "-noout", "-in", certificate).partition("X509v3 extensions:\n")[2]
    found = re.findall(r"^ {12}(?:X509v3 )?(\S[^:\n]*): *(critical)? *\n((?: {16}.*\n)+)", block, re.MULTILINE)
    return {name: (bool(critical), " ".join(value.split()).removeprefix("keyid:")) for name, critical, value in found}


class Certificates(unittest.TestCase):
    """What they contain, what they can be used for, and what not."""

    def test_extensions(self) -> None:
        """Exactly the extensions of RFC 5280's profile, critical where it says so."""
        found = {name: extensions(file(f"{name}.crt")) for name in ("ca", "server", "client", "alice")}
        key_of = {name: found[name]["Subject Key Identifier"][1] for name in found}
        leaf = {"Basic Constraints": (True, "CA:FALSE")}
        client = leaf | {"Key Usage": (True, "Digital Signature"),
                         "Extended Key Usage": (False, "TLS Web Client Authentication")}
        for name, expected in {
            "ca": {"Basic Constraints": (True, "CA:TRUE, pathlen:0"),
                   "Key Usage": (True, "Certificate Sign, CRL Sign")},
            "server": leaf | {"Key Usage": (True, "Digital Signature, Key Encipherment"),
                              "Extended Key Usage": (False, "TLS Web Server Authentication"),
                              "Subject Alternative Name": (False, "DNS:localhost, IP Address:127.0.0.1")},
            "client": client, "alice": client,
        }.items():
            with self.subTest(f"the extensions of {name}.crt"):
                self.assertEqual(found[name], expected | {"Subject Key Identifier": (False, key_of[name]),
                                                          "Authority Key Identifier": (False, key_of["ca"])})
                self.assertRegex(key_of[name], r"^([0-9A-F]{2}:){19}[0-9A-F]{2}$", "a SHA-1 hash")
        self.assertEqual(len(set(key_of.values())), 4, "each key has an identifier of its own")

    def test_fields(self) -> None:
        """One common name in UTF-8, the CA issues all; RSA and SHA-256; days; key, CSR and certificate are a set."""
        for name, subject, bits, days in (("ca", "mTLS Lab Root CA", 4096, 3650), ("server", "localhost", 2048, 365),
                                          ("client", "mtls-client", 2048, 365), ("alice", "alice", 2048, 365)):
            with self.subTest(f"{name}.crt"):
                shown = openssl("x509", "-text", "-pubkey", "-in", file(f"{name}.crt"))
                for line in (rf"Subject: ?CN ?= ?{subject}", "Issuer: ?CN ?= ?mTLS Lab Root CA", r"Version: 3 \(0x2\)",
                             rf".*Public-Key: \({bits} bit\)", "Public Key Algorithm: rsaEncryption"):
                    self.assertRegex(shown, rf"(?m)^ *{line}$")
                self.assertEqual(set(re.findall(r"Signature Algorithm: (.*)", shown)), {"sha256WithRSAEncryption"})
                self.assertRegex(openssl("asn1parse", "-in", file(f"{name}.crt")), rf"UTF8STRING +:{subject}\n")
                start, end = map(ssl.cert_time_to_seconds, re.findall(r"Not (?:Before|After) *: (.*)", shown))
                self.assertEqual(end - start, days * 24 * 3600)
                self.assertTrue(-2 <= file(f"{name}.crt").stat().st_mtime - start <= 60, "it is valid from now on")
                self.assertIn(openssl("pkey", "-pubout", "-in", file(f"{name}.key")), shown, "it is not the key's")
                if name != "ca":
                    self.assertIn(openssl("req", "-noout", "-pubkey", "-in", file(f"{name}.csr")), shown)

    def test_serials(self) -> None:
        """Serial numbers are random in the beginning, 64 bits or more, and counted from there; ca.srl has the last."""
        ca, server, client, alice = (
            int(openssl("x509", "-noout", "-serial", "-in", file(f"{name}.crt")).partition("=")[2], 16)
            for name in ("ca", "server", "client", "alice"))
        for number in (ca, server):   # OpenSSL's 159 bits are fewer than 64 once in 2**95; LibreSSL's 64 start with 1
            self.assertTrue(64 <= number.bit_length() < 160, "RFC 5280 4.1.2.2: 20 octets at most, and positive")
        last = int(file("ca.srl").read_text(encoding="ascii"), 16)
        self.assertEqual([client, alice, last], [server + 1, server + 2, server + 2])

    def test_pfx(self) -> None:
        """It opens with MTLS_PFX_PASSWORD alone, never shown; it has the client's certificate, key and CA, named."""
        for name, run in zip(("client", "alice"), first_run()[1:], strict=True):   # alice's on a terminal
            with self.subTest(f"{name}.pfx"):
                self.assertEqual(run.code, 0, run.stdout)
                self.assertNotRegex(f"{run.stdout} {run.calls()}", "from|Password")   # PASSWORD has a "from"
                pfx, bundle = file(f"{name}.pfx"), new_folder("pfx") / "bundle.pem"
                bundle.write_text(openssl("pkcs12", "-in", pfx, "-passin", f"pass:{PASSWORD}", "-nodes"))
                found = re.findall(r"(?s)-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", bundle.read_text())
                self.assertEqual(found, [file(f"{each}.crt").read_text() for each in (name, "ca")])
                self.assertEqual(len(re.findall("BEGIN [A-Z ]*PRIVATE KEY", bundle.read_text())), 1)
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(bundle)   # fails if its key is another's
                self.assertIn(f"friendlyName: mTLS Lab {name}\n", bundle.read_text())
                for password in ("", "wrong", PASSWORD + " ", PASSWORD[:-1]):
                    self.assertFalse(opens(pfx, password), f"{password!r} opens it")
            with self.subTest(f"{name}.pfx: 3DES and a SHA-1 MAC, which everything imports; every part is encrypted"):
                shown = openssl("pkcs12", "-in", pfx, "-passin", f"pass:{PASSWORD}", "-info", "-noout")
                self.assertEqual(re.findall(r"(?:PKCS7 Encrypted data|Shrouded Keybag): ([^,]*),", shown),
                                 ["pbeWithSHA1And3-KeyTripleDES-CBC"] * 2, shown)
                structure = openssl("asn1parse", "-inform", "DER", "-in", pfx)
                self.assertEqual(re.findall(r"OBJECT +:(.*)", structure), ["pkcs7-data", "sha1"],
                                 "the digest of the MAC should be SHA-1")
