"""README.md, executed: every command is run in a fresh copy of the project, every output compared.

A ``bash`` block is run under a terminal of its own; a ``text`` block that follows one is what it
must print, with ``...`` for what varies. A ``text server`` block is what the running server's
terminal shows since the last such block. The blocks below one heading share a copy of the
project. A block is left out only if the line before it says so and why.
"""

from __future__ import annotations

import contextlib
import doctest
import os
import re
import shutil
import subprocess
import sys
import time
import unittest
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests import mistakes, test_mistakes
from tests import side_by_side as load_tests  # noqa: F401  # load_tests: side by side also when alone
from tests.support import (
    PATIENCE,
    ROOT,
    Lab,
    Terminal,
    environment,
    free_port,
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
    "it needs Docker": 2,
    "it needs Windows": 1,
    "it needs a browser": 0,   # a list of clicks, not a block
    "it needs other people's programs": 0,
}
"""The reasons for which a block may be left out, and how many are."""

WITH_SERVER = ("Testing Scenarios", "Security Explanation", "Troubleshooting")
"""The chapters in which each heading starts on a fresh server."""
HANDSHAKES = ("The handshake in TLS 1.2", "The handshake in TLS 1.3")
DRAWINGS = ("Folder Structure", "Ours has three rooms", *HANDSHAKES)
"""The sections that begin with a drawing: a ``text`` block that no command prints."""


@dataclass
class Block:
    """A fenced block: its language, what is in it, and the reason why it is not run, if any."""

    language: str
    content: str
    line: int = 0
    reason: str | None = None

    @property
    def starts_server(self) -> bool:
        """Whether it ends with a server that goes on running."""
        return "server/server.py" in self.content.splitlines()[-1] or "serve_forever()" in self.content


SERVER = Block("bash", "python3 server/server.py\n")


@dataclass
class Section:
    """What stands below one heading, up to the next. ``chapter`` is the heading of level 2 above it."""

    title: str
    chapter: str
    text: str = ""
    blocks: list[Block] = field(default_factory=list)

    @property
    def commands(self) -> list[Block]:
        """The blocks that are run."""
        return [block for block in self.blocks if block.language == "bash" and not block.reason]


@once
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
        else:
            found[-1].text += line + "\n"
        if line.strip():
            previous = line
    return found


def section(title: str) -> Section:
    """The section with this heading."""
    return next(one for one in sections() if one.title == title)


def blocks(language: str) -> list[Block]:
    """All blocks of a language."""
    return [block for one in sections() for block in one.blocks if block.language == language]


def table(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without their heads, each a list of its cells."""
    rows = re.findall(r"^\|.*\|$(?!\n\|---)", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row[1:-1])] for row in rows if not row.startswith("|---")]


@once
def certificates() -> Path:
    """A folder certs as gen_certs.sh leaves it."""
    fresh = Lab("readme certificates")
    fresh.generate(MTLS_PFX_PASSWORD="secret")
    return fresh.certs


def copy_of_project(with_certificates: bool) -> Path:
    """A fresh copy of the project, as a clone would have it, without .git."""
    root = new_folder("readme") / "mtls-lab"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        ".git", "__pycache__", "*.key", "*.crt", "*.csr", "*.pfx", "*.srl", ".new.*", ".*_cache"))
    if with_certificates:
        shutil.copytree(certificates(), root / "certs", dirs_exist_ok=True)
    return root


class Scene:
    """One section at work: a copy of the project, ports, and the terminals that it has opened."""

    def __init__(self, with_certificates: bool = True) -> None:
        self.root = copy_of_project(with_certificates)
        self.ports = {"8443": free_port(), "8444": free_port()}
        python = new_folder("python")   # python3 is the Python that runs the tests
        (python / "python3").symlink_to(sys.executable)
        # The second set of prepared keys: a CA made anew in a section has a new key, as in life.
        self.env = {"PATH": f"{python}{os.pathsep}{prepared_path()}", "PREPARED_SET": "second",
                    "MTLS_SERVER_PORT": self.ports["8443"], "TMPDIR": str(new_folder("tmp"))}
        self.terminals: list[Terminal] = []
        self.server: Terminal | None = None
        self.seen = 0

    def run(self, block: Block) -> str:
        """Run a bash block; returns what it has shown when it ended or its server has started."""
        if block.starts_server and self.server:   # as with the page's Ctrl+C
            self.terminals.remove(self.server)
            self.server.close()
        script = re.sub("8443|8444", lambda port: self.ports[port[0]], block.content)
        terminal = Terminal(["bash", "-ec", script], [("Export Password:", "secret\n")] * 4, self.root, self.env)
        self.terminals.append(terminal)
        ready = "Press Ctrl+C to stop.\n" if block.starts_server else None
        shown = terminal.wait(ready)
        if ready and ready in shown:
            self.server, self.seen = terminal, len(shown)
        return shown

    def server_shows(self, text: str) -> str:
        """What the server's terminal shows since the last look, once the text's last line is there as often."""
        assert self.server
        last = text.splitlines()[-1]
        deadline = time.monotonic() + PATIENCE
        while self.server.text()[self.seen:].count(last) < text.count(last) and time.monotonic() < deadline:
            time.sleep(0.02)
        shown = self.server.text()[self.seen:]
        self.seen += len(shown)
        return shown

    def in_usual_words(self, shown: str) -> str:
        """What was shown, with the page's ports, and what ``openssl s_client -msg`` says as OpenSSL 3.0 says it.

        LibreSSL puts no comma there; OpenSSL 3.2 and newer may compress the certificate (RFC 8879).
        """
        for usual, port in self.ports.items():
            shown = shown.replace(port, usual)
        return re.sub(r"(TLS 1\.\d),? Handshake \[", r"\1, Handshake [", shown).replace("CompressedC", "C")

    def close(self) -> None:
        """End all that runs."""
        for terminal in reversed(self.terminals):
            terminal.close()


class CommandsTest(unittest.TestCase):
    """What README.md says is what happens."""

    seconds = 10
    maxDiff = None

    def assert_shown(self, block: Block, got: str, scene: Scene) -> None:
        """The output block, with its ``...``, fits what was shown."""
        self.assertTrue(block.content.replace("...", "").strip(), f"line {block.line}: a block of ... says nothing")
        want = test_mistakes.in_words_of_this_openssl(block.content)
        got = scene.in_usual_words(got)
        if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
            self.fail(f"README.md line {block.line} shows\n{want}\nbut what appears is\n{got}")

    def test_commands_and_outputs(self) -> None:
        """Each bash block runs and prints what the block after it shows."""
        found = [one for one in sections() if one.commands]
        certificates()   # once before the threads that share them
        ran = 0
        for one, result in zip(found, side_by_side(self.outcome, found), strict=True):
            with self.subTest(section=one.title):
                if isinstance(result, AssertionError):
                    raise result
                ran += result
        self.assertGreater(ran, 30, "the blocks of README.md were not found")

    def outcome(self, of: Section) -> int | AssertionError:
        """Run one section in a copy of its own; returns how many blocks it has run, or what failed."""
        first = of.commands[0]
        makes_ca = re.match(r"bash certs/gen_certs\.sh( &&|\n)|openssl genrsa", first.content)
        try:
            with contextlib.closing(Scene(with_certificates=not makes_ca)) as scene:
                if of.chapter in WITH_SERVER and not first.starts_server:
                    scene.run(SERVER)
                return self.play(scene, [block for block in of.blocks if not block.reason])
        except AssertionError as error:
            return error

    def play(self, scene: Scene, some: list[Block]) -> int:
        """Run one section's blocks in order; returns how many."""
        ran = 0
        for block, following in zip(some, [*some[1:], None], strict=True):
            if block.language == "text server":
                self.assert_shown(block, scene.server_shows(block.content), scene)
            if block.language != "bash" or ("curl " in block.content and not shutil.which("curl")):
                continue
            shown = scene.run(block)
            ran += 1
            if following and following.language == "text":
                self.assert_shown(following, shown, scene)
            elif scene.server is not scene.terminals[-1]:
                self.assertEqual(scene.terminals[-1].process.wait(PATIENCE), 0, f"line {block.line} failed:\n{shown}")
        return ran

    def test_drawings(self) -> None:
        """The drawn handshakes have the messages that openssl sees, in their order and direction."""
        for title, option in zip(HANDSHAKES, ("-tls1_2", "-tls1_3"), strict=True):
            with self.subTest(title):
                drawn = [(">>>" if ">|" in line else "<<<", message[1])
                         for line in section(title).blocks[0].content.splitlines()
                         if (message := re.search(r"\| *<?[-=]+ ([A-Z][A-Za-z]+) ", line))]
                with contextlib.closing(Scene()) as scene:
                    scene.run(SERVER)
                    shown = scene.in_usual_words(scene.run(Block("bash", (
                        "openssl s_client -msg -connect 127.0.0.1:8443 -CAfile certs/ca.crt -cert certs/client.crt "
                        f"-key certs/client.key {option} </dev/null 2>&1\n"))))
                seen = re.findall(r"^(>>>|<<<) .*Handshake \[length .*\], (\w+)", shown, re.MULTILINE)
                self.assertEqual(drawn, [message for message in seen if message[1] != "NewSessionTicket"])


class PageTest(unittest.TestCase):
    """What README.md says is what there is."""

    maxDiff = None

    def test_what_is_not_run(self) -> None:
        """Only what cannot be run is left out, and each with a reason that the reader sees."""
        reasons = Counter(block.reason for one in sections() for block in one.blocks if block.reason)
        self.assertEqual(reasons, Counter(NOT_RUN))
        self.assertEqual(set(SKIP_MARK.findall(README)), set(NOT_RUN))

    def test_settings_are_python_that_works(self) -> None:
        """The client's TLS settings are what a program can use as they are; the example is what Python returns."""
        example, client = [block.content for block in blocks("python")]
        script = "import ssl, urllib.request\n" + client.replace("opener.open", "print")
        script += "\nprint(context.get_ca_certs()[0]['subject'])"
        subject = subprocess.run([sys.executable, "-W", "error", "-c", script],
                                 cwd=copy_of_project(with_certificates=True), env=environment(), check=True, text=True,
                                 capture_output=True).stdout.splitlines()[-1]
        self.assertIn(f"'issuer': {subject}", example)
        self.assertIn(f"'subject': {subject.replace('mTLS Lab Root CA', 'mtls-client')}", example)

    def test_other_excerpts(self) -> None:
        """The excerpt of the configuration is what the lab really has, and no block is of another kind."""
        config = (ROOT / "certs" / "server.cnf").read_text()
        parts = re.findall(r"^\[ (?:req_ext|alt_names) \]\n(?:.+\n)+", config, re.MULTILINE)
        self.assertEqual([block.content for block in blocks("ini")], ["\n".join(parts)])
        self.assertEqual({block.language for one in sections() for block in one.blocks},
                         {"bash", "text", "text server", "python", "ini", "powershell"})

    def test_folder_tree(self) -> None:
        """The tree shows the files that there are once the script has run, no more and no fewer."""
        shown: set[str] = set()
        folder = ""
        for line in section("Folder Structure").blocks[0].content.splitlines()[1:]:
            entry = re.fullmatch(r"([│ ]*)[├└]── ([^ ]+)( .*)?", line)
            assert entry, line
            if not entry[1]:
                folder = entry[2] if entry[2].endswith("/") else ""
            shown.add(folder + entry[2] if entry[1] else entry[2])
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
                rows = [[cell.strip("`") for cell in row[:3]] for row in table(section(title).text) if row[0]]
                help_text = Lab("help").run(script, "--help", env={"COLUMNS": "500"}).stdout
                entries = {entry.split()[0]: " ".join(entry.split())
                           for entry in re.split(r"\n  (?=--|TASK)", help_text)[1:]}
                self.assertEqual([name.split()[0] for name, _, _ in rows], list(entries))
                for name, variable, default in rows:
                    self.assertIn(variable, entries[name.split()[0]])
                    self.assertIn(f"default {default}", entries[name.split()[0]])

    def test_numbers(self) -> None:
        """Limits and deadlines are those that test_connections, test_strict_http and test_server prove."""
        for claim in (
                "5 s for a handshake, 10 s for a request, 10 s to take the response, 15 s without a request",
                "**At most 256 connections are served.**", "Up to 512 may be in their handshake",
                "a non-empty string of at most 1,000 characters", "more than 64 KiB", "The list is full: 1,000 items",
                "| 408 | The request was not complete within 10 s |", "nested more than 100 levels deep",
                "let running requests finish, for 5 s at most", "The list begins with five items",
                "cut after 200 characters", "beyond 1,000 requests they are dropped",
                f"[{len(mistakes.EXPERIMENTS)} experiments](#common-mistakes)"):
            self.assertTrue(claim in README, f"not on the page: {claim}")
        statuses = sorted(re.findall(r"\b[45]\d\d\b", " ".join(row[0] for row in table(section("Endpoints").text))))
        self.assertEqual(" ".join(statuses), "400 403 404 405 408 411 413 414 415 431 501 505 507")

    def test_docker_commands(self) -> None:
        """The docker commands name the image, the user and the files that the Dockerfile has."""
        dockerfile = (ROOT / "Dockerfile").read_text()
        commands = "".join(block.content for block in blocks("bash") if block.reason == "it needs Docker")
        self.assertEqual(re.findall(r"(python:\S+)", commands), re.findall(r"^FROM (.+)", dockerfile, re.MULTILINE))
        self.assertEqual(re.findall(r"\(user (\d+)\)", README), re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE))
        files = re.findall(r"^COPY .*?(certs/\S+) certs/", dockerfile, re.MULTILINE)
        self.assertEqual(re.findall(r'-v "\$PWD/(\S+):/mtls-lab/(\S+):ro"', commands),
                         [(file, file) for file in ["server", *files]])
        for line in ("docker build -f Dockerfile -t <dockerhub-user>/mtls-server:latest .",
                     "docker run -d --rm --name mtls-server -p 8443:8443 <dockerhub-user>/mtls-server:latest"):
            self.assertIn(line + "\n", commands)
        self.assertTrue("`docker push <dockerhub-user>/mtls-server:latest`" in README)

    def test_every_block_is_looked_at(self) -> None:
        """No block escapes the tests: none is indented, and each output follows its command."""
        fences = re.findall(r"^\s*```", README, re.MULTILINE)
        self.assertEqual(len(fences), 2 * sum(len(one.blocks) for one in sections()))
        for one in sections():
            for before, block in zip([None, *one.blocks], one.blocks, strict=False):
                if block.language == "text" and not (before and before.language == "bash" and not before.reason):
                    self.assertIn(one.title, DRAWINGS, f"line {block.line}")
                    self.assertLessEqual(max(map(len, block.content.splitlines())), 80, f"line {block.line} is wide")

    def test_links(self) -> None:
        """Every link within the page leads to a heading, and every file named in a link exists."""
        anchors = {re.sub(r"[^\w\- ]", "", one.title.lower()).replace(" ", "-") for one in sections()}
        for link in re.findall(r"\]\(([^)]+)\)", README):
            with self.subTest(link=link):
                self.assertTrue(link[1:] in anchors if link.startswith("#") else (ROOT / link).exists())

    def test_mistakes_table(self) -> None:
        """The table has the experiments in their groups, with what each really shows, its reason and its cure."""
        seen, group = [], ""
        for title, messages, *explanation in table(section("Common mistakes").text):
            if not messages:
                group = title.strip("*")
                continue
            seen.append((group, title, tuple(messages.strip("`").split("`; `")),
                         *(cell.replace("`", "") for cell in explanation)))
        self.assertEqual(seen, [(one.group, one.title, test_mistakes.EXPECTED[one.group][one.title], *one.explanation())
                                for one in mistakes.EXPERIMENTS])
        for words in re.findall(r"`python3 -m tests\.mistakes (.+?)`", README):
            self.assertTrue(mistakes.chosen(words.split()), words)

    def test_sections(self) -> None:
        """Sections have the names and the order that the lab's users know; the quick start is on the first screen."""
        chapters = list(dict.fromkeys(one.chapter for one in sections()))
        known = ["Prerequisites", "Folder Structure", "Certificate Creation", "Server Setup", "Client Setup",
                 "Testing Scenarios", "Security Explanation"]
        self.assertEqual([chapter for chapter in chapters if chapter in known], known)
        self.assertLess(README.partition("## Quick start")[0].count("\n"), 20)


if __name__ == "__main__":
    unittest.main()
