"""README.md, executed: every command is run in a fresh copy of the project, every output compared.

A ``bash`` block is run under a terminal of its own; a ``text`` block that follows one is what it
must print, with ``...`` for what varies. A ``text server`` block is what the running server's
terminal shows since the last such block. The blocks below one heading share a copy of the
project; below "Testing Scenarios" each heading also starts on a fresh server. A block is left out
only if the line before it says so and why.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import unittest
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from tests import mistakes, test_mistakes
from tests.support import (
    PATIENCE,
    ROOT,
    Lab,
    environment,
    new_folder,
    once,
    prepared_path,
    side_by_side,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
SKIP_MARK = re.compile(r"\*Not run by the tests: (.+)\.\*")
NOT_RUN = {
    "it is the test command itself": 1,
    "it is the benchmark": 1,
    "it needs Docker": 5,
    "it needs Wireshark": 1,
    "it needs a browser": 0,   # a list of clicks, not a block
}
"""The reasons for which a bash block may be left out, and how many are."""


@dataclass
class Block:
    """A fenced block: its language, what is in it, and the reason why it is not run, if any."""

    language: str
    content: str
    line: int
    reason: str | None = None


@dataclass
class Section:
    """What stands below one heading, up to the next. ``chapter`` is the heading of level 2 above it."""

    title: str
    chapter: str
    blocks: list[Block] = field(default_factory=list)


def sections() -> list[Section]:
    """README.md, taken apart."""
    found = [Section("", "")]
    block: Block | None = None
    previous = ""
    for number, line in enumerate(README.splitlines(), 1):
        if block is not None:
            if line == "```":
                block = None
            else:
                block.content += line + "\n"
        elif line.startswith("```"):
            mark = SKIP_MARK.fullmatch(previous)
            block = Block(line[3:], "", number, mark[1] if mark else None)
            found[-1].blocks.append(block)
        elif heading := re.fullmatch(r"(##+) (.+)", line):
            title = heading[2]
            found.append(Section(title, title if heading[1] == "##" else found[-1].chapter))
        if line.strip():
            previous = line
    return found


class Terminal:
    """A command that runs under a terminal, in a thread that collects what it shows."""

    def __init__(self, script: str, cwd: Path, env: dict[str, str]) -> None:
        leader, follower = pty.openpty()
        # setsid and opening the terminal make it the controlling one: openssl asks on /dev/tty.
        start = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execvp('bash', ['bash', '-ec', sys.argv[1]])"
        self.process = subprocess.Popen([sys.executable, "-c", start, script], cwd=cwd, env=env, stdin=follower,
                                        stdout=follower, stderr=follower, start_new_session=True)
        os.close(follower)
        self._leader = leader
        self._shown = b""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()

    def _collect(self) -> None:
        answered = 0
        while True:
            # A password is typed once the terminal no longer echoes it, as a person would.
            if self._shown.count(b"Export Password:") > answered and not termios.tcgetattr(self._leader)[3] & termios.ECHO:
                os.write(self._leader, b"secret\n")
                answered += 1
            if not select.select([self._leader], [], [], 0.02)[0]:
                continue
            try:
                data = os.read(self._leader, 65536)
            except OSError:   # Linux says so when the last process has closed the terminal
                data = b""
            with self._changed:
                self._shown += data
                self._changed.notify_all()
            if not data:
                return

    def text(self) -> str:
        """What it has shown so far."""
        with self._changed:
            return self._shown.decode("utf-8", "backslashreplace").replace("\r", "")

    def wait(self, for_text: str | None = None) -> str:
        """Wait until it has ended, or shown the text; returns what it has shown."""
        deadline = time.monotonic() + PATIENCE
        while self._thread.is_alive() and not (for_text and for_text in self.text()):
            with self._changed:
                self._changed.wait(0.1)
            if time.monotonic() > deadline:
                raise AssertionError(f"did not end in {PATIENCE:.0f} s; it showed:\n{self.text()}")
        return self.text()

    def close(self) -> None:
        """End it, as Ctrl+C would."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self._thread.join()
            os.close(self._leader)


def copy_of_project(with_certificates: bool) -> Path:
    """A fresh copy of the project, as a clone would have it, without .git."""
    root = new_folder("readme") / "mtls-lab"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        ".git", "__pycache__", "*.key", "*.crt", "*.csr", "*.pfx", "*.srl", ".new.*", ".*_cache"))
    if with_certificates:
        shutil.copytree(certificates(), root / "certs", dirs_exist_ok=True)
    return root


@once
def certificates() -> Path:
    """A folder certs as gen_certs.sh leaves it."""
    fresh = Lab("readme certificates")
    fresh.generate(MTLS_PFX_PASSWORD="secret")
    return fresh.certs


def free_port() -> int:
    """A port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Scene:
    """One section at work: a copy of the project, a port, and the servers that it has started."""

    def __init__(self, section: Section) -> None:
        bash = [block.content for block in section.blocks if block.language == "bash" and not block.reason]
        makes_ca = bool(bash) and ("gen_certs.sh &&" in bash[0] or "-out certs/ca.key" in bash[0])
        self.port = str(free_port())
        self.root = copy_of_project(with_certificates=not makes_ca)
        # The second set of prepared keys: a CA made anew in a section has a new key, as in life.
        self.env = environment({"PATH": prepared_path(), "PREPARED_SET": "second", "MTLS_SERVER_PORT": self.port})
        # python3 is the Python that runs the tests.
        folder = new_folder("python")
        (folder / "python3").symlink_to(sys.executable)
        self.env["PATH"] = f"{folder}{os.pathsep}{self.env['PATH']}"
        self.terminals: list[Terminal] = []
        self.server: Terminal | None = None
        self.seen = 0
        if section.chapter == "Testing Scenarios" and bash and not self.starts_server(bash[0]):
            self.run("python3 server/server.py\n")

    @staticmethod
    def starts_server(script: str) -> bool:
        """Whether a script ends with a server that goes on running."""
        return "server/server.py" in script.rstrip().splitlines()[-1]

    def run(self, script: str) -> str:
        """Run a bash block; returns what it has shown when it ended or its server has started."""
        terminal = Terminal(script.replace("8443", self.port), self.root, self.env)
        self.terminals.append(terminal)
        ready = "Press Ctrl+C to stop.\n" if self.starts_server(script) else None
        shown = terminal.wait(ready)
        if ready and ready in shown:
            self.server, self.seen = terminal, len(shown)
        return shown

    def wait_for_server(self, text: str) -> None:
        """Wait until the server's terminal shows the last line of the text as often as it is in there."""
        last = text.splitlines()[-1]
        deadline = time.monotonic() + PATIENCE
        while self.server and self.server.text()[self.seen:].count(last) < text.count(last):
            if time.monotonic() > deadline:
                return   # the comparison that follows says it better
            time.sleep(0.02)

    def server_shows(self) -> str:
        """What the server's terminal shows since the last look."""
        assert self.server
        shown = self.server.text()[self.seen:]
        self.seen += len(shown)
        return shown

    def close(self) -> None:
        """End all that runs."""
        for terminal in reversed(self.terminals):
            terminal.close()


class TestReadme(unittest.TestCase):
    """What README.md says is what happens."""

    maxDiff = None

    def assert_shown(self, block: Block, got: str, port: str) -> None:
        """The output block, with its ``...``, fits what was shown."""
        self.assertTrue(block.content.replace("...", "").strip(), f"line {block.line}: a block of ... says nothing")
        want = test_mistakes.in_words_of_this_openssl(block.content).replace("8443", port)
        if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
            self.fail(f"README.md line {block.line} shows\n{want}\nbut what appears is\n{got}")

    def test_commands_and_outputs(self) -> None:
        """Each bash block runs and prints what the block after it shows."""
        found = [section for section in sections()
                 if any(block.language == "bash" and not block.reason for block in section.blocks)]
        copy_of_project(with_certificates=True)   # once before the threads that share it
        ran = 0
        for section, result in zip(found, side_by_side(self.outcome, found), strict=True):
            with self.subTest(section=section.title):
                if isinstance(result, AssertionError):
                    raise result
                ran += result
        self.assertGreater(ran, 25, "the blocks of README.md were not found")

    def outcome(self, section: Section) -> int | AssertionError:
        """Run one section in a copy of its own; returns how many blocks it has run, or what failed."""
        scene = Scene(section)
        try:
            return self.play(scene, [block for block in section.blocks if not block.reason])
        except AssertionError as error:
            return error
        finally:
            scene.close()

    def play(self, scene: Scene, blocks: list[Block]) -> int:
        """Run one section's blocks in order; returns how many."""
        ran = 0
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if block.language == "text server":
                assert scene.server
                scene.wait_for_server(block.content)
                self.assert_shown(block, scene.server_shows(), scene.port)
            if block.language != "bash":
                continue
            if block.content.startswith("curl") and not shutil.which("curl"):
                continue
            shown = scene.run(block.content)
            ran += 1
            if following and following.language == "text":
                self.assert_shown(following, shown, scene.port)
            elif scene.server is not scene.terminals[-1]:
                self.assertEqual(scene.terminals[-1].process.wait(PATIENCE), 0,
                                 f"line {block.line} failed:\n{shown}")
        return ran

    def test_what_is_not_run(self) -> None:
        """Only what cannot be run is left out, and each with a reason that the reader sees."""
        reasons = Counter(block.reason for section in sections() for block in section.blocks if block.reason)
        self.assertEqual(reasons, Counter(NOT_RUN))
        self.assertEqual(set(SKIP_MARK.findall(README)), set(NOT_RUN))

    def test_settings_are_python_that_works(self) -> None:
        """The TLS settings shown for server and client are what a program can use as they are."""
        code = [block.content for section in sections() for block in section.blocks if block.language == "python"]
        server, example, client = code
        root = copy_of_project(with_certificates=True)
        for shown in (server, client.replace("opener.open", "print")):
            subprocess.run([sys.executable, "-W", "error", "-c", "import ssl, urllib.request\n" + shown], cwd=root,
                           env=environment(), check=True, capture_output=True)
        decode = ("import ssl; c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); "
                  "c.load_verify_locations('certs/ca.crt'); print(c.get_ca_certs()[0]['subject'])")
        subject = subprocess.run([sys.executable, "-c", decode], cwd=root, env=environment(), check=True, text=True,
                                 capture_output=True).stdout.strip()
        self.assertIn(f"'issuer': {subject}", example)
        self.assertIn(f"'subject': {subject.replace('mTLS Lab Root CA', 'mtls-client')}", example)

    def test_other_excerpts(self) -> None:
        """Excerpts of the configuration and of a request are what the lab really has."""
        for section in sections():
            for block in section.blocks:
                if block.language == "ini":
                    config = (ROOT / "certs" / "server.cnf").read_text()
                    parts = re.findall(r"^\[ (?:req_ext|alt_names) \]\n(?:.+\n)+", config, re.MULTILINE)
                    self.assertEqual(block.content, "\n".join(parts))
                elif block.language == "json":
                    self.assertEqual(json.loads(block.content), {"task": "Añadir endpoint POST", "done": False})
                else:
                    self.assertIn(block.language, ("bash", "text", "text server", "python"))

    def test_folder_tree(self) -> None:
        """The tree shows the files that there are once the script has run, no more and no fewer."""
        tree = next(block.content for section in sections() if section.title == "Folder Structure"
                    for block in section.blocks)
        shown: set[str] = set()
        folder = ""
        for line in tree.splitlines()[1:]:
            entry = re.fullmatch(r"([│ ]*)[├└]── ([^ ]+)( .*)?", line)
            assert entry, line
            name = entry[2]
            if entry[1]:
                shown.add(folder + name)
            else:
                folder = name if name.endswith("/") else ""
                shown.add(name)
        root = copy_of_project(with_certificates=True)
        real = {path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith(".")}
        for name in ("certs", "client", "server"):
            real |= {f"{name}/{path.name}" for path in (root / name).iterdir() if not path.name.startswith(".")}
        self.assertEqual(shown, real)

    def test_settings_tables(self) -> None:
        """The settings in the tables are those of --help, each with its variable and default."""
        for script, title in (("server/server.py", "The server's settings"),
                              ("client/client.py", "The client's settings")):
            with self.subTest(script=script):
                text = README.partition(f"### {title}\n")[2].partition("\n#")[0]
                table = [[cell.strip(" `") for cell in row.split("|")[1:4]] for row in text.splitlines()
                         if row.startswith("| ")][1:]
                help_text = Lab("help").run(script, "--help", env={"COLUMNS": "500"}).stdout
                entries = {entry.split()[0]: " ".join(entry.split())
                           for entry in re.split(r"\n  (?=--|TASK)", help_text)[1:]}
                self.assertEqual([name.split()[0] for name, _, _ in table if name], list(entries))
                for name, variable, default in table:
                    if name:
                        self.assertIn(variable, entries[name.split()[0]])
                        self.assertIn(f"default {default}", entries[name.split()[0]])
                    else:
                        self.assertIn(variable, (ROOT / script).read_text(encoding="utf-8"))

    def test_numbers(self) -> None:
        """Limits, deadlines and counts in the text are those of the code."""
        module = importlib.util.spec_from_file_location("server", ROOT / "server" / "server.py")
        assert module and module.loader
        server = importlib.util.module_from_spec(module)
        sys.modules["server"] = server   # dataclasses and enum look it up there
        self.addCleanup(sys.modules.pop, "server")
        module.loader.exec_module(server)
        seconds = {phase.name: f"{limit:.0f} s" for phase, limit in server.DEADLINES.items()}
        items = len(json.loads(server.TodoStore().encoded("x"))["todos"])
        for claim in (
                f"{seconds['HANDSHAKE']} for a handshake, {seconds['REQUEST']} for a request, "
                f"{seconds['RESPONSE']} to take the response, {seconds['IDLE']} without a request",
                f"| 408 | The request was not complete within {seconds['REQUEST']} |",
                f"**At most {server.MAX_CONNECTIONS} connections.**",
                f"a non-empty string of at most {server.MAX_TASK:,} characters",
                f"the body has more than {server.MAX_BODY // 1024} KiB",
                f"The list is full: {server.MAX_ITEMS:,} items",
                f"let running requests finish, for {server.STOP_SECONDS:.0f} s at most",
                f"The list begins with {['no', 'one', 'two', 'three', 'four', 'five'][items]} items",
                f"[{len(mistakes.EXPERIMENTS)} experiments](#common-mistakes)"):
            self.assertIn(claim, README)
        source = (ROOT / "server" / "server.py").read_text(encoding="utf-8")
        used = {HTTPStatus[name] for name in re.findall(r"HTTPStatus\.([A-Z_]+)", source)} | {414, 501}   # http.server's
        listed = {int(status) for row in re.findall(r"^\| ([\d, ]+) \| ", README, re.MULTILINE)
                  for status in row.split(",")}
        self.assertEqual(listed, used - {HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.CONTINUE})

    def test_docker_commands(self) -> None:
        """The docker commands name the image, the user and the files that the Dockerfile has."""
        dockerfile = (ROOT / "Dockerfile").read_text()
        commands = [block.content for section in sections() for block in section.blocks
                    if block.reason == "it needs Docker"]
        base = re.findall(r"^FROM (.+)", dockerfile, re.MULTILINE)
        self.assertEqual(re.findall(r"(python:\S+)", "".join(commands)), base)
        user = re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE)
        self.assertEqual(re.findall(r"\(user (\d+)\)", README), user)
        files = re.findall(r"^COPY .*?(certs/\S+) certs/", dockerfile, re.MULTILINE)
        mounted = [re.findall(r'-v "\$PWD/(certs/\S+):/mtls-lab/(\S+):ro"', command) for command in commands]
        self.assertEqual([mounts for mounts in mounted if mounts], [[(file, file) for file in files]] * 2)
        for line in ("docker build -f Dockerfile -t <dockerhub-user>/mtls-server:latest .",
                     "docker run -d --rm --name mtls-server -p 8443:8443 <dockerhub-user>/mtls-server:latest",
                     "docker push <dockerhub-user>/mtls-server:latest"):
            self.assertIn(line + "\n", "".join(commands))

    def test_drawings(self) -> None:
        """The drawn handshakes have the messages that openssl sees, in their order and direction."""
        def name(message: str) -> str:
            return re.sub(r"[^A-Za-z]", "", message)

        for version, option in (("TLS 1.2", "-tls1_2"), ("TLS 1.3", "-tls1_3")):
            with self.subTest(version):
                drawing = next(block.content for section in sections() for block in section.blocks
                               if section.title == f"The handshake in {version}")
                drawn = [(">>>" if ">|" in line else "<<<", name(re.findall(r" ([A-Z][A-Za-z]+) ", line)[0]))
                         for line in drawing.splitlines()
                         if re.search(r"\| *(<?[-=]+ [A-Z])", line)]
                scene = Scene(Section("", "Testing Scenarios", [Block("bash", "true", 0)]))
                try:
                    shown = scene.run("openssl s_client -msg -connect 127.0.0.1:8443 -CAfile certs/ca.crt -cert "
                                      f"certs/client.crt -key certs/client.key {option} </dev/null 2>&1")
                finally:
                    scene.close()
                seen = [(way, name(message)) for way, message
                        in re.findall(r"^(>>>|<<<) .*Handshake \[length .*\], (\w+)", shown, re.MULTILINE)]
                self.assertEqual(drawn, [message for message in seen if message[1] != "NewSessionTicket"])

    def test_every_block_is_looked_at(self) -> None:
        """No block escapes the other tests: none is indented, and each output follows its command."""
        blocks = [(section, section.blocks) for section in sections()]
        self.assertEqual(len(re.findall(r"^\s*```", README, re.MULTILINE)), 2 * sum(len(some) for _, some in blocks))
        for section, some in blocks:
            for before, block in zip([None, *some], some, strict=False):
                if block.language == "text" and not (before and before.language == "bash" and not before.reason):
                    self.assertIn(section.title, ("Folder Structure", "The handshake in TLS 1.2",
                                                  "The handshake in TLS 1.3"), f"line {block.line}")

    def test_links(self) -> None:
        """Every link within the page leads to a heading, and every file named in a link exists."""
        headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL), re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        for link in re.findall(r"\]\(([^)]+)\)", README):
            with self.subTest(link=link):
                if link.startswith("#"):
                    self.assertIn(link[1:], anchors)
                else:
                    self.assertTrue((ROOT / link).exists())

    def test_mistakes_table(self) -> None:
        """The table has the experiments in their order, each with the messages that it really gives."""
        text = README.partition("### Common mistakes\n")[2].partition("\n### ")[0]
        rows = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in text.splitlines()
                if row.startswith("| ")][1:]
        rows = [row for row in rows if not set(row[0]) <= {"-"}]
        seen = {row[0]: tuple(message.strip("` ") for message in row[1].split("`; `")) for row in rows}
        self.assertEqual(list(seen.items()), list(test_mistakes.EXPECTED.items()))
        for row in rows:
            self.assertEqual(len(row), 4, row)

    def test_sections(self) -> None:
        """The sections have the names and the order that the lab's users know."""
        chapters = list(dict.fromkeys(section.chapter for section in sections()))
        known = ["Prerequisites", "Folder Structure", "Certificate Creation", "Server Setup", "Client Setup",
                 "Testing Scenarios", "Security Explanation"]
        self.assertEqual([chapter for chapter in chapters if chapter in known], known)
        self.assertLess(README.index("## Quick start"), 1000, "a newcomer must not have to scroll for the quick start")


if __name__ == "__main__":
    unittest.main()
