"""The pages, executed: every command is run in a fresh copy of the project, every output compared.

Each ``bash`` block runs in a terminal of its own; a ``text`` block after it is what it must print,
with ``...`` for what varies; a ``text server`` block is what the server's terminal has shown since the
last one. The blocks below a heading share a copy, and a server if they need one. A block is skipped
only if the line before it says why.
"""

from __future__ import annotations

import contextlib
import doctest
import itertools
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import unittest
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests import mistakes, support
from tests import side_by_side as load_tests  # noqa: F401  # load_tests: side by side also when alone
from tests.support import PATIENCE, ROOT, Lab, Server, Terminal, environment, free_port, new_folder, once, openssl

LIMITS = {"README.md": 520, "certs/README.md": 260, "server/README.md": 320, "client/README.md": 330,
          "tests/README.md": 200}
"""The pages, and the most lines that each may have: they should be readable in one sitting."""
PAGES = {page: (ROOT / page).read_text(encoding="utf-8") for page in LIMITS}
ALL = "\n".join(PAGES.values())
SKIP_MARK = re.compile(r"\*Not run by the tests: (.+)\.\*")
NOT_RUN = {"it is the test command itself": 2, "it is the benchmark": 1, "it needs the linters": 1,
           "it needs Docker": 3, "it needs Windows": 1, "it needs a browser": 0, "it needs other people's programs": 0}
"""The reasons for which a block may be skipped, and how many blocks have each (none: it marks a table)."""
HANDSHAKES = (("The handshake in TLS 1.2", "client/README.md"), ("The handshake in TLS 1.3", "README.md"))
DRAWINGS = (("Folder Structure", "README.md"), ("How it is built", "server/README.md"), *HANDSHAKES)
"""The sections that begin with a drawing: a ``text`` block that no command prints."""


@dataclass
class Block:
    """A fenced block: its language, its content, where it is, and the line before it."""

    language: str
    content: str
    place: str = ""
    introduction: str = ""

    @property
    def reason(self) -> str | None:
        """Why it is not run; None if it is."""
        return mark[1] if (mark := SKIP_MARK.fullmatch(self.introduction)) else None

    @property
    def starts_server(self) -> bool:
        """Whether it ends with a server that keeps running."""
        return "server/server.py" in self.content.splitlines()[-1] or "serve_forever()" in self.content

    @property
    def needs_server(self) -> bool:
        """Whether it connects to a server, or is what a server prints."""
        asks = self.language == "bash" and re.search("127.0.0.1:8443|client/client", self.content)
        return bool(asks) or self.language == "text server"


@dataclass
class Section:
    """The text from one heading to the next. ``chapter`` is the level-2 heading above it."""

    page: str
    title: str
    chapter: str
    text: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def commands(self) -> list[Block]:
        """The blocks that are run."""
        return [block for block in self.blocks if block.language == "bash" and not block.reason]


@once
def sections() -> list[Section]:
    """The pages, parsed."""
    found: list[Section] = []
    for page, whole in PAGES.items():
        for part in re.finditer(r"^(##+) (.+)\n([\s\S]*?)(?=^##|\Z)", whole, re.MULTILINE):
            level, title, text = part.groups()
            found.append(Section(page, title, title if level == "##" else found[-1].chapter, text))
            for block in re.finditer(r"^(.*)\n\n?```(.*)\n([\s\S]*?)^```$", text, re.MULTILINE):
                line = whole.count("\n", 0, part.start(3) + block.start(2)) + 1
                found[-1].blocks.append(Block(block[2], block[3], f"{page} line {line}", block[1]))
    return found


def section(title: str, page: str = "README.md") -> Section:
    """The section of a page with this heading."""
    return next(one for one in sections() if (one.title, one.page) == (title, page))


def blocks(language: str) -> list[Block]:
    """All blocks of a language."""
    return [block for one in sections() for block in one.blocks if block.language == language]


def table(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without the header rows, each as a list of cells."""
    rows = re.findall(r"^\|.*\|$(?!\n\|---)", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row[1:-1])] for row in rows if not row.startswith("|---")]


def in_words_of_this_openssl(text: str) -> str:
    """The text with OpenSSL 3.0's words replaced by those of this Python's OpenSSL, where they differ."""
    if ssl.OPENSSL_VERSION_INFO < (3,):
        return text.replace("unsuitable certificate purpose", "unsupported certificate purpose").replace(
            "self-signed certificate", "self signed certificate")
    if ssl.OPENSSL_VERSION_INFO >= (3, 6):
        return text.replace("is not yet valid", "is not yet valid or the system clock is incorrect")
    return text


@once
def made() -> Lab:
    """A lab with certificates, and the PFX password that the pages name."""
    fresh = Lab("readme certificates")
    fresh.generate(MTLS_PFX_PASSWORD="secret")
    return fresh


def copy_of_project(with_certificates: bool) -> Path:
    """A fresh copy of the project, as a clone would have it, without .git."""
    root = new_folder("readme") / "mtls-lab"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
        ".git", "__pycache__", "*.key", "*.crt", "*.csr", "*.pfx", "*.srl", ".new.*", ".*_cache"))
    if with_certificates:
        shutil.copytree(made().certs, root / "certs", dirs_exist_ok=True)
    return root


class Scene:
    """One section at work: a copy of the project, ports, and the terminals that it has opened."""

    def __init__(self, with_certificates: bool = True) -> None:
        self.root = copy_of_project(with_certificates)
        self.ports = {"8443": free_port(), "8444": free_port()}
        python = new_folder("python")   # python3 is the Python that runs the tests
        (python / "python3").symlink_to(sys.executable)
        # The second set of prepared keys: a new CA in a section has a new key, as in life.
        self.env = {"PATH": f"{python}{os.pathsep}{support.prepared_path()}", "PREPARED_SET": "second",
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
        script += "" if block.starts_server else ":\n"   # keeps bash: mv as the last program hangs up its own terminal
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
        last = text.splitlines()[-1].partition("...")[0]
        deadline = time.monotonic() + PATIENCE
        while self.server.text()[self.seen:].count(last) < text.count(last) and time.monotonic() < deadline:
            time.sleep(0.02)
        shown = self.server.text()[self.seen:]
        self.seen += len(shown)
        return shown

    def close(self) -> None:
        """End all that runs."""
        for terminal in reversed(self.terminals):
            terminal.close()


class CommandsTest(unittest.TestCase):
    """What the pages say happens, happens."""

    seconds = 10
    maxDiff = None

    def assert_shown(self, block: Block, got: str, scene: Scene) -> None:
        """The output block, with its ``...``, matches what was shown."""
        self.assertTrue(block.content.replace("...", "").strip(), f"{block.place}: a block of ... says nothing")
        want = in_words_of_this_openssl(block.content)
        for usual, port in scene.ports.items():
            got = got.replace(port, usual)
        # In s_client -msg, LibreSSL puts no comma there; OpenSSL 3.2 and newer may compress the certificate (RFC 8879).
        got = re.sub(r"(TLS 1\.\d),? Handshake \[", r"\1, Handshake [", got).replace("CompressedC", "C")
        if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
            self.fail(f"{block.place} shows\n{want}\nbut what appears is\n{got}")

    def test_commands_and_outputs(self) -> None:
        """Each bash block runs and prints what the block after it shows."""
        found = [one for one in sections() if one.commands]
        self.assertGreater(sum(len(one.commands) for one in found), 30, "the blocks of the pages were not found")
        made()   # once before the threads that share them
        for one, problem in zip(found, support.side_by_side(self.play, found), strict=True):
            with self.subTest(page=one.page, section=one.title):
                self.assertFalse(problem, problem)

    def play(self, of: Section) -> str:
        """Run one section in a copy of its own, block by block; returns what is wrong, or an empty string."""
        makes_ca = re.match(r"bash certs/gen_certs\.sh\n|openssl genrsa", of.commands[0].content)
        some = [block for block in of.blocks if not block.reason]
        alone = itertools.takewhile(lambda block: not block.starts_server, some)
        try:
            with contextlib.closing(Scene(with_certificates=not makes_ca)) as scene:
                if any(block.needs_server for block in alone):
                    scene.run(Block("bash", "python3 server/server.py\n"))
                for block, following in zip(some, [*some[1:], None], strict=True):
                    if block.language == "text server":
                        self.assert_shown(block, scene.server_shows(block.content), scene)
                    if block.language != "bash" or ("curl " in block.content and not shutil.which("curl")):
                        continue
                    shown = scene.run(block)
                    if following and following.language == "text":
                        self.assert_shown(following, shown, scene)
                    elif scene.server is not scene.terminals[-1]:
                        self.assertEqual(scene.terminals[-1].process.wait(PATIENCE), 0, f"{block.place}:\n{shown}")
        except AssertionError as error:
            return str(error)
        return ""

    def test_drawings(self) -> None:
        """The drawn handshakes have the messages that openssl shows, in the same order and direction."""
        certs = made().certs
        files = ("-CAfile", certs / "ca.crt", "-cert", certs / "client.crt", "-key", certs / "client.key",
                 "-groups", "P-256")   # which every server has, so neither side says hello twice
        message_seen = re.compile(r"^(>>>|<<<) .*Handshake \[length .*\], (?:Compressed)?(\w+)", re.MULTILINE)
        with Server(made()) as server:
            for place, option in zip(HANDSHAKES, ("-tls1_2", "-tls1_3"), strict=True):
                with self.subTest(place):
                    drawn = [(">>>" if ">|" in line else "<<<", message[1])
                             for line in section(*place).blocks[0].content.splitlines()
                             if (message := re.search(r"\| *<?[-=]+ ([A-Z][A-Za-z]+) ", line))]
                    seen = message_seen.findall(
                        openssl("s_client", "-msg", "-connect", f"127.0.0.1:{server.port}", *files, option))
                    self.assertEqual(drawn, [message for message in seen if message[1] != "NewSessionTicket"])


class PageTest(unittest.TestCase):
    """What the pages describe exists."""

    maxDiff = None

    def test_blocks(self) -> None:
        """No block escapes the tests: each output follows its command and an introduction; a skipped one says why."""
        every = [block for one in sections() for block in one.blocks]
        self.assertEqual(len(re.findall(r"^\s*```", ALL, re.MULTILINE)), 2 * len(every), "indented?")
        self.assertEqual({block.language for block in every},
                         {"bash", "text", "text server", "python", "ini", "powershell"})
        self.assertEqual(Counter(block.reason for block in every if block.reason), Counter(NOT_RUN))
        self.assertEqual(set(SKIP_MARK.findall(ALL)), set(NOT_RUN))
        for one in sections():
            for before, block in zip([None, *one.blocks], one.blocks, strict=False):
                if block.language == "text" and not (before and before.language == "bash" and not before.reason):
                    self.assertIn((one.title, one.page), DRAWINGS, block.place)
                    self.assertLessEqual(max(map(len, block.content.splitlines())), 80, f"{block.place} is wide")
                elif block.language.startswith("text"):   # when rendered, it looks like a command
                    self.assertRegex(block.introduction, ":$", block.place)

    def test_excerpts(self) -> None:
        """The client's settings work as they are, getpeercert() returns what is shown, server.cnf has what is shown."""
        client, example = [block.content for block in blocks("python")]   # of README.md, of the server's page
        script = "import ssl, urllib.request\n" + client.replace("opener.open", "print")
        script += "\nprint(context.get_ca_certs()[0]['subject'])"
        subject = subprocess.run([sys.executable, "-W", "error", "-c", script],
                                 cwd=copy_of_project(with_certificates=True), env=environment(), check=True, text=True,
                                 capture_output=True).stdout.splitlines()[-1]
        self.assertIn(f"'issuer': {subject}", example)
        self.assertIn(f"'subject': {subject.replace('mTLS Lab Root CA', 'mtls-client')}", example)
        parts = re.findall(r"^\[ (?:req_ext|alt_names) \]\n(?:.+\n)+", (ROOT / "certs" / "server.cnf").read_text(),
                           re.MULTILINE)
        self.assertEqual([block.content for block in blocks("ini")], ["\n".join(parts)])

    def test_folder_tree(self) -> None:
        """The tree shows the files that exist after the script has run; the tests' page names all test files."""
        _, tree = section("Folder Structure").blocks[0].content.split("\n", 1)
        entries = re.findall(r"^([│ ]*)[├└]── ([^ \n]+)(?: .*)?$", tree, re.MULTILINE)
        self.assertEqual(len(entries), tree.count("\n"), "lines that are no entries")
        folder, shown = "", set[str]()
        for within, name in entries:
            folder = folder if within else name
            shown.add(folder + name if within else name)
        root = copy_of_project(with_certificates=True)
        real = {path.relative_to(root).as_posix() + "/" * path.is_dir()
                for folder in ("", "certs/", "client/", "server/") for path in root.glob(f"{folder}[!.]*")}
        self.assertEqual(shown, real)
        self.assertEqual(set(re.findall(r"`(test_\w+)`", PAGES["tests/README.md"])),
                         {path.stem for path in (ROOT / "tests").glob("test_*.py")})

    def test_settings_tables(self) -> None:
        """The tables have the same settings as --help, each with its variable and default."""
        for script in ("server/server.py", "client/client.py"):
            with self.subTest(script=script):
                text = section("Settings", f"{Path(script).parent}/README.md").text
                rows = [[cell.strip("`") for cell in row[:3]] for row in table(text) if row[0]]
                help_text = Lab("help").run(script, "--help", env={"COLUMNS": "500"}).stdout
                entries = {entry.split()[0]: " ".join(entry.split())
                           for entry in re.split(r"\n  (?=--|-v|TASK)", help_text)[1:]}
                self.assertCountEqual([name.split()[0] for name, _, _ in rows], entries)
                for name, variable, default in rows:
                    self.assertIn(variable, entries[name.split()[0]])
                    self.assertIn(f"default {default}" if default else "", entries[name.split()[0]])

    def test_claims(self) -> None:
        """Limits and deadlines are those that other tests check; the Docker commands are as specified."""
        for claim in (
                "5 s for a handshake, 10 s for a request, 10 s to read the response, 15 s without a request",
                "at most 1,024 clients are served,** at most 32 of them not on the list", "**Places: 512.**",
                "16 KB for the ClientHello** (a real one has 4 KB at most), 64 KB for the whole handshake",
                "**Sessions: about 100.**", "waits up to 15 s for a place", "of at most 1,000 characters",
                "more than 64 KiB", "not complete within 10 s", "more than 100 levels deep", "for 5 s at most",
                "begins with five items", "after 200 characters", "beyond 1,000 requests", "is full: 1,000 items",
                "\ndocker build -f Dockerfile -t <dockerhub-user>/mtls-server:latest .\n",
                "\ndocker run -d --rm --name mtls-server -p 8443:8443 <dockerhub-user>/mtls-server:latest\n",
                "`docker push <dockerhub-user>/mtls-server:latest`",
                f"[{len(mistakes.EXPERIMENTS)} experiments](tests/README.md#the-experiments)"):
            self.assertTrue(claim in ALL, f"not on the pages: {claim}")
        rows = table(section("Endpoints", "server/README.md").text)
        statuses = sorted(re.findall(r"\b[45]\d\d\b", " ".join(row[0] for row in rows)))
        self.assertEqual(" ".join(statuses), "400 403 404 405 408 411 413 414 415 431 500 501 505 507")

    def test_docker_commands(self) -> None:
        """The docker commands name the image, the user and the files that the Dockerfile has."""
        dockerfile = (ROOT / "Dockerfile").read_text()
        commands = "".join(block.content for block in blocks("bash") if block.reason == "it needs Docker")
        self.assertEqual(re.findall(r"(python:\S+)", commands), re.findall(r"^FROM (.+)", dockerfile, re.MULTILINE))
        self.assertEqual(re.findall(r"\(user (\d+)\)", ALL), re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE))
        files = re.findall(r"^COPY .*?(certs/\S+) certs/", dockerfile, re.MULTILINE)
        self.assertEqual(re.findall(r'-v "\$PWD/(\S+):/mtls-lab/(\S+):ro"', commands),
                         [(file, file) for file in ["server", *files]])

    def test_links(self) -> None:
        """Every link leads to a heading or a file; words that select experiments select at least one."""
        anchors: dict[Path, set[str]] = {(ROOT / page): set() for page in PAGES}
        for one in sections():
            anchors[ROOT / one.page].add(re.sub(r"[^\w\- ]", "", one.title.lower()).replace(" ", "-"))
        for page, text in PAGES.items():
            for link in re.findall(r"\]\(([^)]+)\)", text):
                with self.subTest(page=page, link=link):
                    path, _, anchor = link.partition("#")
                    target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
                    self.assertTrue(anchor in anchors.get(target, ()) if anchor else target.is_file())
        chosen = re.findall(r"`python3 -m tests\.mistakes (.+?)`", ALL)
        for words in chosen + [row[-1].strip("`") for row in table(section("Common mistakes").text)]:
            self.assertTrue(mistakes.chosen(words.split()), words)

    def test_sections(self) -> None:
        """The chapters have the specified names and order; the quick start is on the first screen."""
        chapters = list(dict.fromkeys(one.chapter for one in sections() if one.page == "README.md"))
        known = ["Prerequisites", "Folder Structure", "Certificate Creation", "Server Setup", "Client Setup",
                 "Testing Scenarios", "Security Explanation"]
        self.assertEqual([chapter for chapter in chapters if chapter in known], known)
        self.assertLess(PAGES["README.md"].partition("## Quick start")[0].count("\n"), 20)

    def test_sizes(self) -> None:
        """No page is too long; the experiments are in groups, and their tables fit the width of a code host's page."""
        self.assertEqual([page for page, text in PAGES.items() if text.count("\n") > LIMITS[page]], [])
        groups = [one.title.lower() for one in sections() if one.chapter == "The experiments"]
        self.assertEqual(groups[1:], list(dict.fromkeys(one.group.lower() for one in mistakes.EXPERIMENTS)))
        for one in sections():
            words = " ".join(itertools.chain(*table(one.text))).split() if one.chapter == "The experiments" else []
            self.assertEqual([word for word in words if len(word.strip("`")) > 30], [])
