"""The container image: what the Dockerfile contains, and, if there is a container engine, the image in use."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
import unittest
import uuid
from pathlib import Path

from tests import side_by_side as load_tests  # noqa: F401
from tests.support import PATIENCE, ROOT, Lab, Server, comes_true, lab, once


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments; no comments, continued lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n|\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def values(word: str) -> list[str]:
    """The arguments of each instruction of that name."""
    return [rest for name, rest in instructions() if name == word]


class TestDockerfile(unittest.TestCase):
    """What can be checked without an engine."""

    def test_what_is_copied(self) -> None:
        """Single files, the key readable only by the server's user; .dockerignore admits exactly these files."""
        files = [rest.split()[-1] for rest in values("COPY")]
        options = {"certs/server.key": f"--chown={values('USER')[0]} --chmod=0400"}
        self.assertEqual(values("COPY"), [f"{options.get(name, '--chmod=0444')} {name} {name}" for name in files])
        self.assertEqual([name for name in files if not name.startswith("server/")],
                         ["certs/ca.crt", "certs/server.crt", "certs/server.key"])
        rules = (ROOT / ".dockerignore").read_text().splitlines()
        self.assertEqual([rule for rule in rules if rule[:1] not in ("", "#")], ["*", *(f"!{name}" for name in files)])

    def test_it_is_enough(self) -> None:
        """The server needs no other files."""
        image = Lab("image")
        shutil.rmtree(image.root)
        for rest in values("COPY"):
            name = rest.split()[-1]
            (image.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(lab().root / name, image.root / name)
        with Server(image) as server:
            self.assertEqual(lab().run("client/client.py", "--url", server.url).returncode, 0)

    def test_settings(self) -> None:
        """An official slim image of a supported Python, nothing installed, not root; python is process 1."""
        self.assertEqual([word for word, _ in instructions() if word not in ("ENV", "COPY")],
                         ["FROM", "WORKDIR", "USER", "EXPOSE", "CMD"], "nothing that runs, adds or downloads anything")
        self.assertRegex(values("FROM")[0], r"\Apython:3\.1[0-5]-slim\Z")
        self.assertRegex(values("USER")[0], r"\A[1-9]\d*:[1-9]\d*\Z", "numbers, and neither is root's")
        self.assertEqual(json.loads(values("CMD")[0]), ["python3", "server/server.py"])
        env = dict(setting.split("=", 1) for rest in values("ENV") for setting in rest.split())
        self.assertEqual(env, {"MTLS_SERVER_HOST": "0.0.0.0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"})
        self.assertEqual(values("EXPOSE"), ["8443"])


@once
def engine() -> str | None:
    """The docker or podman command, if it works and has the base image; None otherwise."""
    found = (command for command in ("docker", "podman") if shutil.which(command) and subprocess.run(
        [command, "image", "inspect", values("FROM")[0]], capture_output=True, check=False).returncode == 0)
    return next(found, None)


@unittest.skipUnless(sys.platform == "linux" and engine(), "needs docker or podman on Linux, and the base image")
class TestImage(unittest.TestCase):
    """With an engine: build, run, serve, stop. The container is on the host's network."""

    tag = f"mtls-lab-test-{uuid.uuid4().hex[:12]}:latest"

    @staticmethod
    def docker(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the engine's command; output and errors together."""
        return subprocess.run([str(engine()), *map(str, arguments)], text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=check, timeout=PATIENCE * 4)

    @classmethod
    def build(cls, of: Lab, tag: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Build an image from a copy of the project."""
        for name in ("Dockerfile", ".dockerignore"):
            shutil.copy(ROOT / name, of.root / name)
        return cls.docker("build", "-f", of.root / "Dockerfile", "-t", tag, of.root, check=check)

    @classmethod
    def setUpClass(cls) -> None:
        """Build the image from a project that has certificates."""
        cls.build(lab(), cls.tag)
        cls.addClassCleanup(cls.docker, "image", "rm", "-f", cls.tag, check=False)

    def start(self, *options: str | Path) -> tuple[str, str]:
        """Start a container on a free port; returns its name and the server's URL."""
        name = f"mtls-lab-test-{uuid.uuid4().hex[:12]}"
        self.docker("run", "-d", "--name", name, "--network", "host", "-e", "MTLS_SERVER_PORT=0", *options, self.tag)
        self.addCleanup(self.docker, "rm", "-f", name, check=False)
        self.assertTrue(comes_true(lambda: "Press Ctrl+C" in self.docker("logs", name, check=False).stdout))
        port, = re.findall(r"listening on \S+:(\d+)", self.docker("logs", name).stdout)
        return name, f"https://127.0.0.1:{port}/todo"

    def test_at_work(self) -> None:
        """It serves clients on the host, even if locked down, logs as in a terminal, and stops at once with code 0."""
        locked_down = ("--read-only", "--cap-drop=ALL", "--security-opt", "no-new-privileges")
        for options, end in (((), ("kill", "-s", "INT")), (locked_down, ("stop",))):
            with self.subTest(f"{options}, ended with {end[0]}"):
                name, url = self.start(*options)
                self.assertEqual(lab().run("client/client.py", "--url", url).returncode, 0)
                self.assertEqual(lab().run("client/client_no_cert.py", "--url", url).returncode, 0)
                began = time.monotonic()
                self.docker(*end, name)
                self.assertEqual(self.docker("wait", name).stdout.strip(), "0")
                self.assertLess(time.monotonic() - began, 9, "after 10 s the engine kills it")
                log = self.docker("logs", name).stdout
                for line in ("[SERVER] mTLS server listening on https://0.0.0.0:", "creating TODO", "Añadir",
                             "peer did not return a certificate", "[SERVER] Stopped."):
                    self.assertIn(line, log)

    def test_certificates_mounted(self) -> None:
        """New certificates can be mounted over those in the image, if the user in the container owns them."""
        renewed = Lab("renewed")
        renewed.generate(PREPARED_SET="renewed")
        user = (renewed.certs / "server.key").stat()
        mounts = [option for name in ("ca.crt", "server.crt", "server.key")
                  for option in ("-v", f"{renewed.certs / name}:/mtls-lab/certs/{name}:ro")]
        _, url = self.start("--user", f"{user.st_uid}:{user.st_gid}", *mounts)
        self.assertEqual(renewed.run("client/client.py", "--url", url).returncode, 0)
        self.assertEqual(lab().run("client/client.py", "--url", url).returncode, 1)

    def test_before_the_certificates(self) -> None:
        """A build without certificates fails, and docker's output says what to run first."""
        result = self.build(Lab("no certificates"), self.tag + "-none", check=False)
        self.assertNotEqual(result.returncode, 0)
        if engine() == "docker":   # podman does not show the lines around the failed one
            self.assertIn("bash certs/gen_certs.sh", result.stdout)
