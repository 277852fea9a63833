"""certs/gen_certs.sh: what it makes and says, and that it loses nothing whatever happens to it."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.support import (
    PATIENCE,
    ROOT,
    Lab,
    environment,
    in_terminal,
    lab,
    new_folder,
    once,
    openssl,
    prepared_path,
    scratch,
)

SOURCES = ["ca.cnf", "client.cnf", "gen_certs.sh", "server.cnf"]
MADE = ["ca.crt", "ca.key", "ca.srl", "client.crt", "client.csr", "client.key", "client.pfx",
        "server.crt", "server.csr", "server.key"]

# The description's commands, and a check of the PFX, each with the step that is announced before it.
# Of pkcs12 only the beginning: the rest chooses ciphers.
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
DECISIVE = len(COMMANDS)
"""The last call of openssl before the new set is moved into place, with MTLS_PFX_PASSWORD set."""

# What a watched openssl can do at one of its calls (sh).
FAILS = 'i=0; while [ $i -lt 150 ]; do i=$((i + 1)); echo "out $i"; echo "err $i" >&2; done; exit 1'
CHATTER = [f"{stream} {number}" for number in range(1, 151) for stream in ("out", "err")]
CTRL_C = "kill -s INT 0"   # as a terminal does: to the whole process group
KILL_SCRIPT = 'kill -s KILL "$SCRIPT_PID"'
HOLD = 'while [ -e "$WATCH/hold" ]; do sleep 0.02; done'


# --- Runs under observation ----------------------------------------------------------------


@once
def watched_path() -> str:
    """`prepared_path` with an openssl in front that notes each call in $WATCH/calls.

    A note is the last line that the script has printed until then, a tab, and the arguments. At
    call number WATCH_AT (0: each) it first does WATCH_ACTION, which may end it. Then it lets openssl
    work, or, if WATCH_READY is a folder, just takes the file to make from there: that is fast.
    """
    prepared = prepared_path()
    real = shutil.which("openssl", path=prepared)
    assert real
    folder = new_folder("watched")
    fake = folder / "openssl"
    fake.write_text(f"""#!/bin/sh
read -r count <"$WATCH/count"
count=$((count + 1))
echo "$count" >"$WATCH/count"
last=
[ ! -e "$WATCH/stdout" ] || while read -r line; do last=$line; done <"$WATCH/stdout"
printf '%s\\t%s\\n' "$last" "$*" >>"$WATCH/calls"
case $WATCH_AT in 0 | "$count") eval "$WATCH_ACTION" ;; esac
[ -n "$WATCH_READY" ] || exec {shlex.quote(real)} "$@"
before=
for argument; do
  if [ "$before" = -out ]; then
    ready="$WATCH_READY/${{argument##*/}}"
    [ -e "$ready" ] || ready="$WATCH_READY/client.${{argument##*.}}"
    cat "$ready" >"$argument" || exit 1
  fi
  before=$argument
done
case "$1 $*" in
  version*) echo "OpenSSL 3.0.0" ;;
  *-CAcreateserial*) cat "$WATCH_READY/ca.srl" >certs/ca.srl ;;
  *-enddate*) echo "notAfter=Jan  1 00:00:00 2030 GMT" ;;
  verify*) echo "$argument: OK" ;;
esac
""", encoding="utf-8")
    fake.chmod(0o755)
    return f"{folder}{os.pathsep}{prepared}"


@once
def ready_set() -> Path:
    """A folder with a whole set that is not the shared lab's."""
    made = Lab("ready")
    made.generate(PREPARED_SET="second", MTLS_PFX_PASSWORD="secret")
    return made.certs


@functools.cache
def path_without(*names: str) -> str:
    """A PATH with the commands that a script may use, the watched openssl among them, but without these."""
    folder = new_folder("commands")
    for command in ("awk", "basename", "bash", "cat", "chmod", "cmp", "cp", "cut", "date", "dirname", "env", "flock",
                    "grep", "head", "id", "ln", "ls", "mkdir", "mktemp", "mv", "openssl", "perl", "readlink", "rm",
                    "rmdir", "sed", "sh", "sleep", "sort", "tail", "touch", "tr", "uname", "wc"):
        found = shutil.which(command, path=watched_path())
        if found and command not in names:
            (folder / command).symlink_to(found)
    return str(folder)


def meddling(tool: str, before: str = ":", after: str = ":") -> str:
    """A PATH whose ``tool`` does something (sh) before or after its work, once $WATCH/armed exists."""
    folder = new_folder("meddling")
    real = shutil.which(tool)
    assert real
    wrapper = folder / tool
    wrapper.write_text(f"""#!/bin/sh
[ ! -e "$WATCH/armed" ] || {{ {before}; }}
{shlex.quote(real)} "$@"; code=$?
[ ! -e "$WATCH/armed" ] || {{ {after}; }}
exit $code
""", encoding="utf-8")
    wrapper.chmod(0o755)
    return f"{folder}{os.pathsep}{watched_path()}"


def watch(at: int = 0, action: str = ":", variables: Mapping[str, str] | None = None,
          fast: bool = False) -> tuple[Path, dict[str, str]]:
    """A folder for the watched openssl's notes, and the variables for a run; keys are of another set than `lab`'s."""
    folder = new_folder("watch")
    (folder / "count").write_text("0\n")
    return folder, {"PATH": watched_path(), "PREPARED_SET": "second", "MTLS_PFX_PASSWORD": "secret",
                    "WATCH": str(folder), "WATCH_AT": str(at), "WATCH_ACTION": action,
                    "WATCH_READY": str(ready_set()) if fast else "", **(variables or {})}


class Run:
    """A run of gen_certs.sh without a terminal, at umask 022, in a process group of its own.

    ``at``, ``action``, ``fast``: see `watched_path`; ``armed``: see `meddling`; ``hold``: for HOLD;
    no file can grow beyond ``limit``.
    """

    def __init__(self, of: Lab, *arguments: str, at: int = 0, action: str = ":", fast: bool = False,
                 armed: bool = False, hold: bool = False, limit: int | None = None, stdout: int | None = None,
                 command: str | None = None, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        self.folder, variables = watch(at, action, env, fast)
        if armed:
            (self.folder / "armed").touch()
        if hold:
            (self.folder / "hold").touch()
        start = ["sh", "-c", 'umask 022; SCRIPT_PID=$$; export SCRIPT_PID; exec "$@"', "sh"]
        if limit is not None:   # Python ignores SIGXFSZ, and so does what it becomes: writing fails as on a full disk
            start += [sys.executable, "-c", "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, "
                      f"({limit}, {limit})); os.execvp(sys.argv[1], sys.argv[1:])"]
        with open(self.folder / "stdout", "wb") as out, open(self.folder / "stderr", "wb") as err:
            self.process = subprocess.Popen(
                [*start, "bash", command or str(of.certs / "gen_certs.sh"), *arguments],
                cwd=cwd or scratch(), env=environment(variables), stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout, stderr=err, start_new_session=True)

    def wait(self) -> Run:
        """Until it ends."""
        try:
            self.process.wait(PATIENCE)
        finally:
            self.end()
        return self

    def end(self) -> None:
        """If it still runs, end it with all that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def reached(self, number: int) -> bool:
        """Whether it is at this call of openssl."""
        return len(self.calls) == number

    def release(self) -> None:
        """Let a held openssl go on."""
        (self.folder / "hold").unlink(missing_ok=True)

    @property
    def code(self) -> int:
        """Its exit code; negative: the signal that ended it."""
        return self.process.returncode

    @property
    def stdout(self) -> str:
        """What it has printed."""
        return (self.folder / "stdout").read_text(encoding="utf-8", errors="replace")

    @property
    def stderr(self) -> str:
        """What it has complained about."""
        return (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")

    @property
    def calls(self) -> list[tuple[str, str]]:
        """The calls of openssl: what the script had printed last, and the arguments."""
        return calls(self.folder)


def calls(folder: Path) -> list[tuple[str, str]]:
    """The calls that the watched openssl has noted in this folder."""
    if not (folder / "calls").exists():
        return []
    lines = (folder / "calls").read_text(encoding="utf-8").splitlines()
    return [(last, arguments) for last, _, arguments in (line.partition("\t") for line in lines)]


def eventually(holds: Callable[[], object], what: str) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain until {what}")
        time.sleep(0.01)


def with_set() -> Lab:
    """A lab of its own with the shared lab's certificates, mallory's too."""
    made = Lab("réady lab")
    for file in lab().certs.iterdir():
        shutil.copy2(file, made.certs / file.name)
    return made


def contents(of: Lab) -> dict[str, tuple[str, bytes]]:
    """Mode and bytes of all there is in the lab's certs folder, hidden or not."""
    return {path.relative_to(of.certs).as_posix(): (stat.filemode(path.lstat().st_mode),
                                                   path.read_bytes() if path.is_file() else b"")
            for path in of.certs.rglob("*")}


def opens(pfx: Path, password: str) -> bool:
    """Whether the password opens the PFX."""
    return subprocess.run(["openssl", "pkcs12", "-in", str(pfx), "-noout", "-passin", "env:PASSWORD"],
                          env=environment({"PASSWORD": password}), stdin=subprocess.DEVNULL, capture_output=True,
                          check=False).returncode == 0


def verifies(of: Lab, *names: str) -> bool:
    """Whether these certificates are the CA's of now, and the keys are theirs."""
    for name in names:
        try:
            of.context(name)
            openssl("verify", "-CAfile", of.certs / "ca.crt", of.certs / f"{name}.crt")
        except (AssertionError, OSError):
            return False
    return True


def setUpModule() -> None:
    """Signals that the tests' own caller ignores (nohup, &) would be ignored by the script as well."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
            unittest.addModuleCleanup(signal.signal, number, signal.SIG_IGN)


class GenCertsCase(unittest.TestCase):
    """What the tests below share."""

    def assert_untouched(self, of: Lab, before: dict[str, tuple[str, bytes]]) -> None:
        """Everything in certs/ is byte for byte what it was, modes included, and nothing new is there."""
        now = contents(of)
        changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        self.assertEqual(changed, [], "files in certs/ that were added, removed or changed")

    def assert_replaced(self, of: Lab, before: dict[str, tuple[str, bytes]]) -> None:
        """The whole set is new and verifies; all else in certs/ is as it was."""
        now = contents(of)
        kept = [name for name in MADE if now.get(name) == before.get(name)]
        self.assertEqual(kept, [], "files of the former set that are still there")
        others = {name for name in {*before, *now} if name not in MADE and before.get(name) != now.get(name)}
        self.assertEqual(others, set(), "files beside the set that were added, removed or changed")
        self.assertTrue(verifies(of, "server", "client"), "the new set does not verify")


# --- What it does --------------------------------------------------------------------------


class TheWholeSet(GenCertsCase):
    """bash certs/gen_certs.sh"""

    def test_first_run(self) -> None:
        """It makes the set, prints the steps, two OK lines, what exists now and what to do next, and no chatter."""
        fresh = Lab("fresh")
        run = Run(fresh).wait()
        self.assertEqual((run.code, run.stderr), (0, ""))
        until = r"valid until [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4} GMT"
        self.assertRegex(run.stdout, r"\A" + "\n".join([
            r"\[1/6\] CA key .*", r"\[2/6\] CA certificate", r"\[3/6\] server key and CSR",
            r"\[4/6\] server certificate", r"\[5/6\] client key, CSR and certificate", r"\[6/6\] PFX",
            r"certs/server\.crt: OK", r"certs/client\.crt: OK", r"", r"Now in certs/:",
            rf"  ca\.crt, ca\.key  .*; {until}", rf"  server\.crt, server\.key  .*localhost.*127\.0\.0\.1; {until}",
            rf"  client\.crt, client\.key  .*mtls-client; {until}", r"  client\.pfx  .*",
            r"Next: python3 server/server\.py", r""]) + r"\Z")
        self.assertEqual(sorted(contents(fresh)), sorted(SOURCES + MADE))
        self.assertTrue(verifies(fresh, "server", "client"))
        for name in ("ca", "server", "client"):
            with self.subTest(f"the end of {name}.crt's validity is shown"):
                end = openssl("x509", "-noout", "-enddate", "-in", fresh.certs / f"{name}.crt")
                self.assertRegex(run.stdout, rf"(?m)^  {name}\.crt.*; valid until {end.partition('=')[2]}")

    def test_commands(self) -> None:
        """It runs the description's commands in their order, and announces each step before its first command."""
        run = Run(Lab("commands")).wait()
        for number, ((step, command), (announced, wanted)) in enumerate(zip(run.calls, COMMANDS, strict=False), 1):
            with self.subTest(f"call {number} should be: openssl {wanted}"):
                self.assertTrue(step.startswith(announced), f"announced was {step!r}, not {announced}")
                self.assertEqual(command[:len(wanted)] if wanted.startswith("pkcs12") else command, wanted)
        self.assertGreaterEqual(len(run.calls), len(COMMANDS))

    def test_modes(self) -> None:
        """Keys and PFX are 0600, certificates 0644, also with an openssl that leaves it all to the umask."""
        fresh = Lab("modes")
        # A file that is there already keeps its mode: this PFX gets the one that the umask leaves.
        run = Run(fresh, action='case "$1 $2" in "pkcs12 -export") : >certs/client.pfx ;;'
                                ' "verify -x509_strict") ls -la . certs >"$WATCH/listing" ;; esac').wait()
        self.assertEqual((run.code, run.stderr), (0, ""))
        for name, (mode, _) in contents(fresh).items():
            if name in MADE:
                with self.subTest(f"the mode of certs/{name}"):
                    private = name.endswith((".key", ".pfx", ".srl"))
                    self.assertEqual(mode, "-rw-------" if private else "-rw-r--r--")
        modes = {line.split()[-1]: line[:10] for line in (run.folder / "listing").read_text().splitlines()
                 if line.startswith(("-", "d"))}
        for name in [*(name for name in MADE if name.endswith((".key", ".pfx"))), "."]:
            with self.subTest(f"before anything is moved, {name} is its owner's alone"):
                self.assertEqual(modes[name][4:], "------")

    def test_second_run_replaces_the_set(self) -> None:
        """It says that the CA is new, names the clients that it has not issued, and how to reissue them."""
        ready = with_set()
        stranger = "stranger"   # a certificate that is not of this lab
        for kind in ("crt", "key"):
            shutil.copy2(ready.certs / f"mallory.{kind}", ready.certs / f"{stranger}.{kind}")
        openssl("req", "-x509", "-new", "-key", ready.certs / "mallory.key", "-days", "1", "-subj", "/CN=stranger",
                "-config", ready.certs / "client.cnf", "-out", ready.certs / "stranger.crt")
        before = contents(ready)
        run = Run(ready).wait()
        self.assertEqual((run.code, run.stderr), (0, ""))
        self.assert_replaced(ready, before)
        self.assertFalse(verifies(ready, "mallory"))
        lines = run.stdout.splitlines()
        news = lines[lines.index("Now in certs/:") + 5:]
        self.assertRegex("\n".join(news), r"\AThe CA is new: .*\n"
                                          r"certs/mallory\.crt is of a former CA; reissue it: .*\nNext: .*\Z")
        with self.subTest("the command that it names reissues the certificate"):
            command = news[1].partition("reissue it: ")[2]
            self.assertEqual(command, "bash certs/gen_certs.sh client mallory")
            again = Run(ready, *command.split()[2:], command="certs/gen_certs.sh", cwd=ready.root).wait()
            self.assertEqual((again.code, again.stderr), (0, ""))
            self.assertTrue(verifies(ready, "mallory", "client", "server"))
        with self.subTest("a certificate that is not of this lab is not reissued"):
            again = Run(ready, "client", stranger).wait()
            self.assertEqual(again.code, 1)
            self.assertIn("exists", again.stderr)


class Password(GenCertsCase):
    """Where the PFX's password comes from, and where it never shows up."""

    def assert_secret(self, folder: Path, password: str) -> None:
        """The password was in no openssl's arguments."""
        noted = calls(folder)
        self.assertTrue(any(arguments.startswith("pkcs12") for _, arguments in noted))
        for _, arguments in noted:
            self.assertNotIn(password, arguments)

    def typed(self, of: Lab, first: str, second: str, *arguments: str) -> tuple[int, str, Path]:
        """Run it under a terminal and type these passwords: exit code, what was to be seen, and the calls' folder."""
        folder, env = watch(variables={"MTLS_PFX_PASSWORD": ""})
        code, shown = in_terminal(["bash", str(of.certs / "gen_certs.sh"), *arguments],
                                  [("Enter Export Password:", first), ("Verifying - Enter Export Password:", second)],
                                  env=env)
        return code, shown, folder

    def test_asked_for_on_a_terminal(self) -> None:
        """On a terminal openssl asks for it, twice; MTLS_PFX_PASSWORD being empty is as if it were not there."""
        ready = with_set()
        for arguments, pfx in (((), "client.pfx"), (("client", "zoe"), "zoe.pfx")):
            with self.subTest(f"the password of {pfx}"):
                code, shown, folder = self.typed(ready, "typed $ecret\n", "typed $ecret\n", *arguments)
                self.assertEqual(code, 0, shown)
                self.assertTrue(opens(ready.certs / pfx, "typed $ecret"))
                self.assertFalse(opens(ready.certs / pfx, ""))
                self.assertNotIn("typed", shown)
                self.assertNotIn("shown only now", shown)
                self.assert_secret(folder, "typed")

    def test_wrong_confirmation(self) -> None:
        """When the two passwords differ it ends, and nothing has changed."""
        ready = with_set()
        before = contents(ready)
        for arguments in ((), ("client", "zoe")):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}, with two passwords that differ"):
                code, shown, _ = self.typed(ready, "typed one\n", "typed two\n", *arguments)
                self.assertEqual(code, 1, shown)
                self.assertRegex(shown, r"gen_certs\.sh: failed at \[./.\] .*PFX; .* unchanged\n\Z")
                self.assert_untouched(ready, before)

    def test_taken_from_the_variable(self) -> None:
        """MTLS_PFX_PASSWORD is used as it is, with and without a terminal, and not printed."""
        password = "it's \"from\" $HOME & 100% `env`; \\n ñ"
        ready = with_set()
        for name, terminal in (("client", False), ("zoe", True)):
            with self.subTest(f"the password of {name}.pfx, {'with' if terminal else 'without'} a terminal"):
                folder, env = watch(variables={"MTLS_PFX_PASSWORD": password})
                command = ["bash", str(ready.certs / "gen_certs.sh"), *(["client", name] if name != "client" else [])]
                if terminal:
                    code, shown = in_terminal(command, env=env)
                else:
                    result = subprocess.run(command, env=environment(env), stdin=subprocess.DEVNULL, text=True,
                                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
                    code, shown = result.returncode, result.stdout
                self.assertEqual(code, 0, shown)
                self.assertTrue(opens(ready.certs / f"{name}.pfx", password))
                self.assertNotIn("from", shown)
                self.assertNotIn("Password", shown)
                self.assert_secret(folder, "from")

    def test_made_up(self) -> None:
        """Without terminal and variable it makes up a password, a new one each time, and prints it once."""
        ready = with_set()
        seen = set()
        for name in ("client", "zoe"):
            with self.subTest(f"the password of {name}.pfx"):
                run = Run(ready, *(() if name == "client" else ("client", name)), env={"MTLS_PFX_PASSWORD": ""}).wait()
                self.assertEqual((run.code, run.stderr), (0, ""))
                found = re.findall(rf"^Password of certs/{name}\.pfx .*: (\S+)$", run.stdout, re.MULTILINE)
                self.assertEqual(len(found), 1, run.stdout)
                password = found[0]
                self.assertGreaterEqual(len(password), 20)
                self.assertEqual(run.stdout.count(password), 1)
                self.assertTrue(opens(ready.certs / f"{name}.pfx", password))
                self.assertFalse(opens(ready.certs / f"{name}.pfx", ""))
                self.assert_secret(run.folder, password)
                seen.add(password)
        self.assertEqual(len(seen), 2, "the same password twice")


class OpensslCommand(GenCertsCase):
    """Which openssl it works with."""

    def test_missing(self) -> None:
        """Without openssl it says so in one line, and touches nothing."""
        ready = with_set()
        before = contents(ready)
        for arguments in ((), ("client", "zoe")):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}"):
                run = Run(ready, *arguments, env={"PATH": path_without("openssl")}).wait()
                self.assertEqual((run.code, run.stdout), (1, ""))
                self.assertRegex(run.stderr, r"\Agen_certs\.sh: .*openssl.*missing.*1\.1\.1.*3\.3.*\n\Z")
                self.assert_untouched(ready, before)

    def test_versions(self) -> None:
        """OpenSSL before 1.1.1 and LibreSSL before 3.3 are refused in one line, with nothing touched."""
        ready = with_set()
        before = contents(ready)
        for version in ("OpenSSL 0.9.8zh 14 Jan 2016", "OpenSSL 1.0.2k-fips  26 Jan 2017",
                        "OpenSSL 1.1.0l  10 Sep 2019", "LibreSSL 2.8.3", "LibreSSL 3.2.0"):
            with self.subTest(f"{version} is refused"):
                run = Run(ready, at=1, action=f'echo "{version}"; exit 0').wait()
                self.assertEqual((run.code, run.stdout), (1, ""))
                self.assertRegex(run.stderr, rf"\Agen_certs\.sh: {re.escape(version)} is too old; .*\n\Z")
                self.assert_untouched(ready, before)
        for version in ("OpenSSL 1.1.1w  11 Sep 2023", "OpenSSL 3.0.19 27 Jan 2026", "OpenSSL 3.5.0 8 Apr 2025",
                        "LibreSSL 3.3.6", "LibreSSL 4.0.0"):
            with self.subTest(f"{version} is accepted"):
                # This run goes on to the next check, for a file that exists.
                run = Run(ready, "client", "mallory", at=1, action=f'echo "{version}"; exit 0').wait()
                self.assertEqual(run.code, 1)
                self.assertIn("certs/mallory.crt exists", run.stderr)


class Places(GenCertsCase):
    """Where it is called from, and what is around it."""

    def test_any_folder(self) -> None:
        """All files land beside the script, wherever it is called from and whatever its path looks like."""
        odd = with_set()
        new = odd.root.parent / "it's \"odd\" $HOME [a-z] * ñ"
        odd.root.rename(new)
        odd.root, odd.certs = new, new / "certs"
        decoy = new_folder("decoy")
        (decoy / "certs").mkdir()
        (scratch() / "link to the lab").unlink(missing_ok=True)
        (scratch() / "link to the lab").symlink_to(new)
        for number, (how, command, cwd, env) in enumerate((
            ("from its own folder", "gen_certs.sh", odd.certs, {}),
            ("from below", "../certs/gen_certs.sh", odd.root / "server", {}),
            ("through a link", "link to the lab/certs/gen_certs.sh", scratch(), {}),
            ("with CDPATH set", "certs/gen_certs.sh", odd.root, {"CDPATH": str(decoy)}),
            ("by its whole path, without a usable TMPDIR", str(odd.certs / "gen_certs.sh"), scratch(),
             {"TMPDIR": "/nonexistent", "LC_ALL": "C.UTF-8"}),
        )):
            with self.subTest(f"called {how}"):
                before = contents(odd)
                run = Run(odd, "client", f"c{number}", command=command, cwd=cwd, env=env, fast=True).wait()
                self.assertEqual((run.code, run.stderr), (0, ""))
                self.assertEqual({*contents(odd)} - {*before}, {f"c{number}.{kind}" for kind in
                                                              ("crt", "csr", "key", "pfx")})
                self.assertEqual(list((decoy / "certs").iterdir()), [])
        with self.subTest("the whole set, with CDPATH and LC_ALL=C"):
            before = contents(odd)
            run = Run(odd, command="certs/gen_certs.sh", cwd=odd.root,
                      env={"CDPATH": str(decoy), "LC_ALL": "C"}).wait()
            self.assertEqual((run.code, run.stderr), (0, ""))
            self.assert_replaced(odd, before)

    def test_missing_configuration(self) -> None:
        """Without one of the .cnf files it says which and how to get it back, and touches nothing."""
        for name in ("ca.cnf", "server.cnf", "client.cnf"):
            with self.subTest(f"{name} is missing"):
                ready = with_set()
                (ready.certs / name).unlink()
                before = contents(ready)
                run = Run(ready).wait()
                self.assertEqual((run.code, run.stdout), (1, ""))
                self.assertRegex(run.stderr, rf"\Agen_certs\.sh: certs/{name} is missing; restore it, .*\n\Z")
                self.assert_untouched(ready, before)

    def test_configuration_without_a_name(self) -> None:
        """Without a CN in client.cnf there is no place for NAME: it says so instead of issuing another mtls-client."""
        ready = with_set()
        settings = ready.certs / "client.cnf"
        settings.write_text(settings.read_text().replace("CN =", "commonName ="))
        before = contents(ready)
        run = Run(ready, "client", "zoe").wait()
        self.assertEqual((run.code, run.stdout), (1, ""))
        self.assertRegex(run.stderr, r"\Agen_certs\.sh: certs/client\.cnf .*CN = .*\n\Z")
        self.assert_untouched(ready, before)

    def test_folder_in_the_way(self) -> None:
        """A folder of a file's name (Docker makes one for a mount that is not there) is named, and nothing moved."""
        for name, arguments in (("client.key", ()), ("zoe.pfx", ("client", "zoe"))):
            with self.subTest(f"certs/{name} is a folder"):
                ready = with_set()
                (ready.certs / name).unlink(missing_ok=True)
                (ready.certs / name).mkdir()
                before = contents(ready)
                run = Run(ready, *arguments, fast=True).wait()
                self.assertEqual(run.code, 1)
                self.assertIn(f"gen_certs.sh: certs/{name} ", run.stderr)
                self.assert_untouched(ready, before)

    def test_folder_that_cannot_be_written(self) -> None:
        """In a folder, or with a script, that is not ours to write in, it says so and touches nothing."""
        # Root may write everywhere, so root lets nobody do it, in a folder that nobody can reach.
        place = Path(tempfile.mkdtemp(prefix="mtls lab tests "))
        self.addCleanup(shutil.rmtree, place)
        place.chmod(0o755)
        ready = with_set()
        shutil.copytree(ready.certs, place / "certs")
        certs = ready.certs = place / "certs"
        before = contents(ready)
        self.addCleanup(certs.chmod, 0o755)
        nobody: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        for what, script, mode in (("the folder", 0o666, 0o555), ("the script", 0o444, 0o777),
                                   ("either", 0o444, 0o555)):
            with self.subTest(f"no right to write in {what}"):
                (certs / "gen_certs.sh").chmod(script)
                certs.chmod(mode)
                now = contents(ready)
                result = subprocess.run(["bash", str(certs / "gen_certs.sh")], cwd="/", env=environment(),
                                        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                                        **nobody)
                self.assertEqual((result.returncode, result.stdout), (1, ""), result.stderr)
                self.assertIn(f"gen_certs.sh: cannot write in {certs.resolve()}\n", result.stderr)
                self.assertEqual(contents(ready), now)
        self.assertEqual({name: data for name, (_, data) in contents(ready).items()},
                         {name: data for name, (_, data) in before.items()})


class Arguments(GenCertsCase):
    """--help, and what it does not understand."""

    def test_help(self) -> None:
        """--help explains both uses, even without openssl."""
        fresh = Lab("help")
        before = contents(fresh)
        for arguments in (("--help",), ("-h",), ("client", "--help"), ("client", "-h")):
            with self.subTest(f"gen_certs.sh {' '.join(arguments)}"):
                run = Run(fresh, *arguments, env={"PATH": path_without("openssl")}).wait()
                self.assertEqual((run.code, run.stderr), (0, ""))
                for wanted in ("usage: bash certs/gen_certs.sh ", "bash certs/gen_certs.sh client NAME",
                               "MTLS_PFX_PASSWORD"):
                    self.assertIn(wanted, run.stdout)
                self.assert_untouched(fresh, before)

    def test_senseless(self) -> None:
        """Anything else: exit 2 with the usage on stderr; in no case does it replace the set."""
        ready = with_set()
        before = contents(ready)
        for arguments, wanted in ((("banana",), "banana"), (("--version",), "--version"), (("",), "usage"),
                                  (("client",), "needs a NAME"), (("client", ""), "needs a NAME"),
                                  (("client", "a", "b"), "client a b"), (("client", "", "b"), "usage"),
                                  (("zoe", "client"), "zoe client"), (("--help", "client"), "--help client")):
            with self.subTest(f"gen_certs.sh {shlex.join(arguments)}"):
                run = Run(ready, *arguments).wait()
                self.assertEqual((run.code, run.stdout), (2, ""))
                self.assertIn(wanted, run.stderr)
                self.assertIn("bash certs/gen_certs.sh", run.stderr)
                self.assert_untouched(ready, before)


class OneMoreClient(GenCertsCase):
    """bash certs/gen_certs.sh client NAME"""

    def test_new_client(self) -> None:
        """It issues NAME's certificate from the existing CA and touches nothing else but the serial number."""
        ready = with_set()
        before = contents(ready)
        run = Run(ready, "client", "zoe").wait()
        self.assertEqual((run.code, run.stderr), (0, ""))
        self.assertRegex(run.stdout, r"\A\[1/2\] zoe: key, CSR and certificate\n\[2/2\] zoe: PFX\n"
                                     r"certs/zoe\.crt: OK\n\n"
                                     r"Made certs/zoe\.crt, \.key, \.csr and \.pfx, CN zoe, valid until .* GMT\.\n"
                                     r"Next: python3 client/client\.py --cert certs/zoe\.crt --key certs/zoe\.key\n\Z")
        now = contents(ready)
        self.assertEqual({name: mode for name, (mode, _) in now.items() if name not in before},
                         {"zoe.key": "-rw-------", "zoe.pfx": "-rw-------", "zoe.crt": "-rw-r--r--",
                          "zoe.csr": "-rw-r--r--"})
        self.assertEqual([name for name in before if now[name] != before[name]], ["ca.srl"])
        self.assertTrue(verifies(ready, "zoe", "mallory", "client", "server"))
        for _, arguments in run.calls:
            self.assertNotIn("-subj", arguments, "LibreSSL would ignore it and issue a second mtls-client")
        self.assertEqual([step for step, arguments in run.calls if arguments.startswith(("genrsa", "pkcs12"))],
                         ["[1/2] zoe: key, CSR and certificate", "[2/2] zoe: PFX"])

    def test_good_names(self) -> None:
        """Letters, digits, '.', '_' and '-' make a NAME, up to 64 of them; serial numbers are counted."""
        ready = with_set()
        expected = int((ready.certs / "ca.srl").read_text(), 16)
        for name in ("a", "_", "9.b_C-", "ca.old", "x" * 64):
            with self.subTest(f"a client called {name}"):
                run = Run(ready, "client", name).wait()
                self.assertEqual((run.code, run.stderr), (0, ""))
                shown = openssl("x509", "-noout", "-subject", "-serial", "-in", ready.certs / f"{name}.crt")
                self.assertRegex(shown, rf"subject= ?/?CN ?= ?{re.escape(name)}\n")
                expected += 1
                self.assertEqual(int(shown.rpartition("serial=")[2], 16), expected)
                self.assertTrue(verifies(ready, name))

    def test_refused_names(self) -> None:
        """Any other NAME is refused in one line, with nothing touched."""
        ready = with_set()
        before = contents(ready)
        taken = "would overwrite the lab's own files; choose another NAME"
        made = "made with the whole set: bash certs/gen_certs.sh"
        unusable = "NAME: letters, digits, '.', '_' and '-', beginning with"
        for name, reason in {"-x": unusable, ".hidden": unusable, "..": unusable, "../zoe": unusable, "a/b": unusable,
                             "a b": unusable, "a\nb": unusable, "niño": unusable, "ñ": unusable, "*": unusable,
                             "$(id)": unusable, "a,CN=b": unusable, "a/CN=b": unusable, "a=b": unusable,
                             "x" * 65: "at most 64", "ca": taken, "server": taken, "client": made,
                             "CA": taken, "Server": taken, "CLIENT": made}.items():
            for locale in ("C", "C.UTF-8") if not name.isascii() else ("C",):
                with self.subTest(f"a client called {name!r} (LC_ALL={locale})"):
                    run = Run(ready, "client", name, env={"LC_ALL": locale}).wait()
                    self.assertEqual((run.code, run.stdout), (1, ""))
                    self.assertRegex(run.stderr, r"(?s)\Agen_certs\.sh: .*\n\Z")
                    self.assertEqual(run.stderr.count("\n"), 1 + name.count("\n"))
                    self.assertIn(reason, run.stderr)
                    self.assert_untouched(ready, before)

    def test_existing_files(self) -> None:
        """A NAME of which any file exists is refused, with the way out, which works."""
        ready = with_set()
        for kind in ("crt", "csr", "key", "pfx"):
            with self.subTest(f"zoe.{kind} exists"):
                (ready.certs / f"zoe.{kind}").write_text("precious")
                before = contents(ready)
                run = Run(ready, "client", "zoe").wait()
                self.assertEqual((run.code, run.stdout), (1, ""))
                self.assertRegex(run.stderr, rf"\Agen_certs\.sh: certs/zoe\.{kind} exists; .*: rm .*\n\Z")
                self.assert_untouched(ready, before)
                (ready.certs / f"zoe.{kind}").unlink()
        with self.subTest("a client of the present CA is not reissued, until its files are removed as proposed"):
            before = contents(ready)
            run = Run(ready, "client", "mallory").wait()
            self.assertEqual(run.code, 1)
            self.assert_untouched(ready, before)
            (ready.certs / "mallory.two.key").write_text("another client's")
            before = contents(ready)
            remove = run.stderr.strip().rpartition(": ")[2]
            self.assertTrue(remove.startswith("rm certs/mallory."), remove)
            subprocess.run(["bash", "-c", remove], cwd=ready.root, check=True)
            self.assertEqual({*before} - {*contents(ready)}, {f"mallory.{kind}" for kind in
                                                             ("crt", "csr", "key", "pfx")})
            self.assertEqual(Run(ready, "client", "mallory").wait().code, 0)

    def test_no_authority(self) -> None:
        """Without a CA, or with half of one, it says how to make it, and touches nothing."""
        for gone in (("ca.crt", "ca.key"), ("ca.crt",), ("ca.key",)):
            with self.subTest(f"without {' and '.join(gone)}"):
                ready = with_set()
                for name in gone:
                    (ready.certs / name).unlink()
                before = contents(ready)
                run = Run(ready, "client", "zoe").wait()
                self.assertEqual((run.code, run.stdout), (1, ""))
                self.assertRegex(run.stderr, r"\Agen_certs\.sh: there is no CA yet; .*: bash certs/gen_certs\.sh\n\Z")
                self.assert_untouched(ready, before)

    def test_authority_that_does_not_fit(self) -> None:
        """With another CA's key it shows what openssl says, and touches nothing."""
        ready = with_set()
        shutil.copy(ready.certs / "server.key", ready.certs / "ca.key")
        before = contents(ready)
        run = Run(ready, "client", "zoe").wait()
        self.assertEqual(run.code, 1)
        self.assertRegex(run.stderr, r"(?s)match.*gen_certs\.sh: failed at \[1/2\] zoe: .*unchanged\n\Z")
        self.assert_untouched(ready, before)

    def test_lost_serial(self) -> None:
        """Without ca.srl the count starts anew, from a random number."""
        ready = with_set()
        former = int((ready.certs / "ca.srl").read_text(), 16)
        (ready.certs / "ca.srl").unlink()
        self.assertEqual(Run(ready, "client", "zoe").wait().code, 0)
        number = int(openssl("x509", "-noout", "-serial", "-in", ready.certs / "zoe.crt").partition("=")[2], 16)
        self.assertGreaterEqual(number.bit_length(), 64)
        self.assertNotEqual(number, former + 1)


# --- What can happen to it -----------------------------------------------------------------


class NothingLost(GenCertsCase):
    """Whatever happens before the new set is complete, the old one stays, and nothing temporary does."""

    def setUp(self) -> None:
        self.start()

    def start(self) -> None:
        """With the shared lab's set, as it was."""
        self.ready = with_set()
        self.before = contents(self.ready)

    def test_openssl_fails(self) -> None:
        """At whichever call: its output appears, all of it, then the step; and nothing has changed."""
        for at, (step, command) in enumerate(COMMANDS, 1):
            with self.subTest(f"call {at} fails: openssl {command}"):
                run = Run(self.ready, at=at, action=FAILS, fast=True).wait()
                self.assertEqual(run.code, 1)
                self.assertNotIn("out 1", run.stdout)
                lines = run.stderr.splitlines()
                if at == 1:
                    self.assertRegex(lines[-1], r"^gen_certs\.sh: the openssl command does not run; ")
                else:
                    self.assertEqual(lines[:-1], CHATTER)
                    announced = step if step.startswith("[") else "[6/6]"
                    self.assertTrue(lines[-1].startswith(f"gen_certs.sh: failed at {announced} "), lines[-1])
                    self.assertTrue(lines[-1].endswith("unchanged"), lines[-1])
                self.assert_untouched(self.ready, self.before)
        with self.subTest("no password can be made up"):
            run = Run(self.ready, at=10, action=FAILS, fast=True, env={"MTLS_PFX_PASSWORD": ""}).wait()
            self.assertTrue(run.calls[9][1].startswith("rand "))
            self.assertEqual((run.code, run.stderr.splitlines()[:-1]), (1, CHATTER))
            self.assert_untouched(self.ready, self.before)

    def test_openssl_fails_for_another_client(self) -> None:
        """The same when a client's certificate of a former CA is reissued: its old files stay."""
        Run(self.ready).wait()
        before = contents(self.ready)
        # Before these: the version, and for each of the four files two calls, for whose mallory's certificate is.
        for at, command in enumerate(("genrsa", "req", "x509", "pkcs12", "asn1parse", "verify"),
                                     1 + 4 * 2 + 1):
            with self.subTest(f"call {at} fails: openssl {command}"):
                run = Run(self.ready, "client", "mallory", at=at, action=FAILS).wait()
                self.assertEqual(run.calls[at - 1][1].split()[0], command)
                self.assertEqual((run.code, run.stderr.splitlines()[:-1]), (1, CHATTER))
                self.assert_untouched(self.ready, before)
        with self.subTest("and at last it works"):
            self.assertEqual(Run(self.ready, "client", "mallory").wait().code, 0)
            self.assertTrue(verifies(self.ready, "mallory"))

    def test_interrupts(self) -> None:
        """Ctrl+C during any call of openssl; kill and a closed terminal at some: nothing has changed."""
        for at, (_, command) in enumerate(COMMANDS, 1):
            kinds = [("Ctrl+C", CTRL_C, 130)]
            if at in (2, 6, 11):
                kinds += [("kill", "kill -s TERM 0", 143), ("a hangup", "kill -s HUP 0", 129),
                          ("a kill of the script alone", 'kill -s TERM "$SCRIPT_PID"', 143)]
            for what, action, code in kinds:
                with self.subTest(f"{what} during call {at}: openssl {command}"):
                    run = Run(self.ready, at=at, action=action, fast=True).wait()
                    self.assertIn(run.code, (code, 128 - code) if at == 1 else (code,))
                    self.assert_untouched(self.ready, self.before)

    def test_interrupts_for_another_client(self) -> None:
        """The same with one more client."""
        for at, what, action, code in ((2, "Ctrl+C", CTRL_C, 130), (4, "a hangup", "kill -s HUP 0", 129),
                                       (5, "kill", "kill -s TERM 0", 143), (7, "Ctrl+C", CTRL_C, 130)):
            with self.subTest(f"{what} during call {at}"):
                run = Run(self.ready, "client", "zoe", at=at, action=action, fast=True).wait()
                self.assertEqual(run.code, code)
                self.assert_untouched(self.ready, self.before)

    def test_interrupts_between(self) -> None:
        """Ctrl+C at work other than openssl's; from the moment of the move on, the run is finished all the same."""
        for tool, when, code in (("mktemp", "before", 130), ("mktemp", "after", 130), ("mkdir", "after", 130),
                                 ("cp", "before", 130), ("chmod", "before", 130), ("chmod", "after", 130),
                                 ("mv", "before", 0), ("mv", "after", 0)):
            with self.subTest(f"Ctrl+C {when} {tool}"):
                run = Run(self.ready, armed=True, fast=True, env={"PATH": meddling(tool, **{when: CTRL_C})}).wait()
                self.assertEqual(run.code, code, run.stderr)
                if code:
                    self.assert_untouched(self.ready, self.before)
                else:
                    self.assert_replaced(self.ready, self.before)
                    self.assertTrue(run.stdout.endswith("Next: python3 server/server.py\n"))
                    self.start()

    def test_second_interrupt(self) -> None:
        """Whoever presses Ctrl+C again while it cleans up does not keep it from it."""
        for when in ("before", "after"):
            with self.subTest(f"again {when} rm"):
                run = Run(self.ready, at=6, action=f': >"$WATCH/armed"; {CTRL_C}', fast=True,
                          env={"PATH": meddling("rm", **{when: CTRL_C})}).wait()
                self.assertEqual(run.code, 130)
                self.assert_untouched(self.ready, self.before)

    def test_interrupts_on_a_terminal(self) -> None:
        """Ctrl+C at the terminal, while a key is made and when the password is asked for."""
        prompt = "Enter Export Password:"
        for at, what, text in ((2, "while the CA's key is made", "held"), (9, "while it signs", "held"),
                               (99, "instead of the password", prompt),
                               (99, "instead of its confirmation", f"Verifying - {prompt}")):
            with self.subTest(f"Ctrl+C {what}"):
                folder, env = watch(at, f"echo held >/dev/tty; {HOLD}", {"MTLS_PFX_PASSWORD": ""})
                (folder / "hold").touch()
                first = [(prompt, "typed\n")] if text.startswith("Verifying") else []
                # The newline is for an openssl that was hit just before it began to read: it reads on all the same.
                code, shown = in_terminal(["bash", str(self.ready.certs / "gen_certs.sh")],
                                          [*first, (text, "\x03\n")], env=env)
                self.assertEqual(code, 130, shown)
                self.assert_untouched(self.ready, self.before)

    def test_killed(self) -> None:
        """kill -9 changes nothing either; what it leaves is for its owner alone, and the next run removes it."""
        for at, arguments in ((2, ()), (7, ("client", "zoe")), (DECISIVE, ())):
            with self.subTest(f"kill -9 during call {at}, then gen_certs.sh {' '.join(arguments)}"):
                run = Run(self.ready, at=at, action="kill -s KILL 0", fast=True).wait()
                self.assertEqual(run.code, -signal.SIGKILL)
                left = [path for path in self.ready.certs.iterdir() if path.name not in self.before]
                self.assertEqual(len(left), 1, "this test should leave a folder to be cleaned up")
                self.assertEqual(stat.filemode(left[0].stat().st_mode), "drwx------")
                shutil.copytree(left[0], self.ready.certs / ".new.older")   # and one of another run
                now = contents(self.ready)
                self.assertEqual({name: now[name] for name in self.before}, self.before)
                self.assertEqual(Run(self.ready, *arguments, fast=True).wait().code, 0)
                self.assertEqual([path.name for path in self.ready.certs.iterdir() if path.name.startswith(".")], [])
                self.before = contents(self.ready)

    def test_full_disk(self) -> None:
        """When files cannot grow any further it ends, whether at the first or at the last of them."""
        for name in ("ca.cnf", "client.cnf", "server.cnf"):   # which nobody reads here
            (self.ready.certs / name).write_text("#" * 1000, encoding="ascii")
        self.before = contents(self.ready)
        for steps, limit in ((0, 700), (1, (ready_set() / "ca.key").stat().st_size - 1),
                             (6, (ready_set() / "client.pfx").stat().st_size - 1)):
            with self.subTest(f"no file may grow beyond {limit} bytes, which is too few for step {steps}"):
                run = Run(self.ready, fast=True, limit=limit, env={"LC_ALL": "C"}).wait()
                self.assertNotEqual(run.code, 0)
                self.assertIn("too large", run.stderr, "what openssl said")
                self.assert_untouched(self.ready, self.before)
                self.assertEqual(run.stdout.count("/6]"), steps)

    def test_half_a_pfx(self) -> None:
        """A PFX that has been cut short, about which openssl's pkcs12 says nothing, is noticed."""
        whole = ready_set() / "client.pfx"
        for size in (0, 100, whole.stat().st_size - 1):
            with self.subTest(f"the first {size} bytes of a PFX"):
                cut = f"head -c {size} {shlex.quote(str(whole))} >certs/client.pfx; exit 0"
                run = Run(self.ready, at=10, action=cut).wait()
                self.assertTrue(run.calls[9][1].startswith("pkcs12 "))
                self.assertEqual(run.code, 1)
                self.assertIn("failed at [6/6] PFX; ", run.stderr)
                self.assert_untouched(self.ready, self.before)

    def test_nobody_listens(self) -> None:
        """When its output goes nowhere (as in gen_certs.sh | head -1) it ends."""
        reader, writer = os.pipe()
        os.close(reader)
        try:
            run = Run(self.ready, fast=True, stdout=writer).wait()
        finally:
            os.close(writer)
        self.assertNotEqual(run.code, 0)
        self.assert_untouched(self.ready, self.before)

    def test_after_the_move(self) -> None:
        """Once the new set is in place, neither a failing openssl nor a signal can spoil it."""
        for what, action in (("openssl fails", FAILS), ("Ctrl+C", CTRL_C), ("kill", "kill -s TERM 0")):
            with self.subTest(what):
                run = Run(self.ready, at=DECISIVE + 1, action=action, fast=True).wait()
                self.assertIn("-enddate", run.calls[DECISIVE][1])
                self.assertEqual(run.code, 0)
                self.assert_replaced(self.ready, self.before)
                self.start()


class OneAtATime(GenCertsCase):
    """Two runs never mix their files, and a killed one stands in nobody's way."""

    def locks(self) -> dict[str, str]:
        """How the lock is taken -> a PATH."""
        paths = {"flock": watched_path(), "perl": path_without("flock")}
        return {tool: path for tool, path in paths.items() if shutil.which(tool)}

    def test_two_runs(self) -> None:
        """The second says that another is running, and changes nothing; the first is not disturbed."""
        self.assertTrue(self.locks(), "neither flock nor perl is there")
        for tool, path in self.locks().items():
            with self.subTest(f"with {tool}"):
                ready = with_set()
                before = contents(ready)
                first = Run(ready, at=6, action=HOLD, hold=True, fast=True, env={"PATH": path})
                self.addCleanup(first.end)
                eventually(functools.partial(first.reached, 6), "the first run holds")
                now = contents(ready)
                for arguments in ((), ("client", "zoe")):
                    second = Run(ready, *arguments, fast=True, env={"PATH": path}).wait()
                    self.assertEqual((second.code, second.stdout), (1, ""))
                    self.assertRegex(second.stderr, r"\Agen_certs\.sh: another run is at work .*\n\Z")
                    self.assert_untouched(ready, now)
                first.release()
                self.assertEqual(first.wait().code, 0, first.stderr)
                self.assert_replaced(ready, before)
                self.assertEqual(Run(ready, "client", "zoe", fast=True, env={"PATH": path}).wait().code, 0)

    def test_no_lock(self) -> None:
        """Where there is nothing to lock with it says so, and touches nothing."""
        ready = with_set()
        before = contents(ready)
        run = Run(ready, env={"PATH": path_without("flock", "perl")}).wait()
        self.assertEqual((run.code, run.stdout), (1, ""))
        self.assertRegex(run.stderr, r"\Agen_certs\.sh: neither flock nor perl .*\n\Z")
        self.assert_untouched(ready, before)

    def test_killed_run_does_not_block(self) -> None:
        """After a kill -9 the next run starts at once, even while the killed one's openssl lives on."""
        for tool, at, password in (("flock", 2, "given"), ("flock", 10, "given"), ("flock", 10, ""),
                                   ("perl", 2, "given")):
            if not (path := self.locks().get(tool)):
                continue
            with self.subTest(f"with {tool}, killed during call {at}, password {password or 'made up'}"):
                ready = with_set()
                before = contents(ready)
                killed = Run(ready, at=at, action=f'{KILL_SCRIPT}; {HOLD}; : >"$WATCH/over"; exit 1', hold=True,
                             fast=True, env={"PATH": path, "MTLS_PFX_PASSWORD": password}).wait()
                try:
                    self.assertEqual(killed.code, -signal.SIGKILL)
                    after = Run(ready, "client", "zoe", fast=True, env={"PATH": path}).wait()
                    self.assertEqual((after.code, after.stderr), (0, ""))
                finally:
                    killed.release()
                    eventually((killed.folder / "over").exists, "the killed run's openssl has ended")
                self.assertEqual({name for name, data in contents(ready).items() if data != before.get(name)},
                                 {"ca.srl", "zoe.crt", "zoe.csr", "zoe.key", "zoe.pfx"})


class Style(unittest.TestCase):
    """The script's text."""

    @unittest.skipUnless(shutil.which("shellcheck"), "shellcheck is not on this machine")
    def test_shellcheck(self) -> None:
        """shellcheck has nothing to say about it."""
        result = subprocess.run(["shellcheck", str(ROOT / "certs" / "gen_certs.sh")], stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, check=False)
        self.assertEqual((result.returncode, result.stdout), (0, ""))


if __name__ == "__main__":
    unittest.main()
