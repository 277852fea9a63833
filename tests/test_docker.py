"""The container image: what the Dockerfile may contain, and, where an engine is, the image at work."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import unittest
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.support import PATIENCE, ROOT, Lab, lab, once

COPIED = ["server/server.py", "certs/ca.crt", "certs/server.crt", "certs/server.key"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def values(word: str) -> list[str]:
    """The arguments of each instruction of that name."""
    return [rest for name, rest in instructions() if name == word]


class TestDockerfile(unittest.TestCase):
    """Without any engine."""

    def test_base(self) -> None:
        """An official slim image, pinned to a released minor version that the lab supports."""
        self.assertEqual(len(values("FROM")), 1)
        match = re.fullmatch(r"python:3\.(\d+)-slim", values("FROM")[0])
        assert match, values("FROM")
        self.assertIn(int(match[1]), range(10, 15))

    def test_nothing_installed(self) -> None:
        """No instruction runs, adds or downloads anything."""
        self.assertEqual({word for word, _ in instructions()},
                         {"FROM", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "CMD"})

    def test_what_is_copied(self) -> None:
        """Four files one by one, that the project has or the script makes; the key for the server's user alone."""
        copies = [rest.split() for rest in values("COPY")]
        sources = [[word for word in words if not word.startswith("--")][:-1] for words in copies]
        self.assertEqual(sources, [[name] for name in COPIED])
        for name in COPIED:
            self.assertTrue((lab().root / name).is_file(), name)
        key = next(words for words in copies if "certs/server.key" in words)
        user = values("USER")[0]
        self.assertIn(f"--chown={user}", key)
        self.assertIn("--chmod=0400", key)

    def test_build_context(self) -> None:
        """.dockerignore lets in exactly what is copied."""
        rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
        self.assertEqual(rules, ["*", *(f"!{name}" for name in COPIED)])

    def test_process(self) -> None:
        """A fixed numeric user that is not root; python itself is process 1; no bytecode, no buffering."""
        uid, _, gid = values("USER")[0].partition(":")
        self.assertGreater(int(uid), 0)
        self.assertGreater(int(gid), 0)
        self.assertEqual(json.loads(values("CMD")[0]), ["python3", "server/server.py"])
        env = dict(setting.split("=", 1) for rest in values("ENV") for setting in rest.split())
        self.assertEqual(env, {"MTLS_SERVER_HOST": "0.0.0.0", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"})
        self.assertEqual(values("EXPOSE"), ["8443"])


@once
def engine() -> str | None:
    """The docker or podman command, if it works and has the base image; None otherwise."""
    base = values("FROM")[0]
    for command in ("docker", "podman"):
        if shutil.which(command) and subprocess.run([command, "image", "inspect", base], capture_output=True,
                                                    check=False).returncode == 0:
            return command
    return None


@unittest.skipUnless(sys.platform == "linux" and engine(), "needs docker or podman on Linux, with the base image pulled")
class TestImage(unittest.TestCase):
    """With an engine: build, run, serve, stop. The container is on the host's network."""

    tag: str

    @staticmethod
    def docker(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run the engine's command; output and errors together."""
        return subprocess.run([str(engine()), *map(str, arguments)], text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=check, timeout=PATIENCE * 4)

    @classmethod
    def setUpClass(cls) -> None:
        """Build the image from a copy of the project that has certificates."""
        cls.tag = f"mtls-lab-test-{uuid.uuid4().hex[:12]}:latest"
        cls.project = cls.with_docker_files(lab())
        cls.docker("build", "-f", cls.project / "Dockerfile", "-t", cls.tag, cls.project)
        cls.addClassCleanup(cls.docker, "image", "rm", "-f", cls.tag, check=False)

    project: Path

    @staticmethod
    def with_docker_files(of: Lab) -> Path:
        """The lab's folder, with the Dockerfile and .dockerignore in it."""
        for name in ("Dockerfile", ".dockerignore"):
            shutil.copy(ROOT / name, of.root / name)
        return of.root

    def start(self, *options: str | Path) -> tuple[str, str]:
        """Start a container on a free port; returns its name and the server's URL."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        name = f"mtls-lab-test-{uuid.uuid4().hex[:12]}"
        self.docker("run", "-d", "--name", name, "--network", "host", "-e", f"MTLS_SERVER_PORT={port}", *options, self.tag)
        self.addCleanup(self.docker, "rm", "-f", name, check=False)
        self.wait(lambda: "Press Ctrl+C" in self.docker("logs", name).stdout, name)
        return name, f"https://127.0.0.1:{port}/todo"

    def wait(self, happened: Callable[[], bool], name: str) -> None:
        """Wait until something has happened."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            self.assertLess(time.monotonic(), deadline, self.docker("logs", name, check=False).stdout)
            time.sleep(0.1)

    def test_at_work(self) -> None:
        """Locked down it serves the clients from the host, logs as a terminal would, and stops at once with 0."""
        for title, options in (("plain", ()), ("locked down", ("--read-only", "--cap-drop=ALL", "--security-opt",
                                                               "no-new-privileges"))):
            with self.subTest(title):
                name, url = self.start(*options)
                self.assertEqual(lab().run("client/client.py", "--url", url).returncode, 0)
                self.assertEqual(lab().run("client/client_no_cert.py", "--url", url).returncode, 0)
                began = time.monotonic()
                self.docker("stop", name)
                self.assertLess(time.monotonic() - began, 9, "after 10 s the engine kills it")
                log = self.docker("logs", name).stdout
                for line in ("[SERVER] mTLS server listening on https://0.0.0.0:", "creating TODO", "Añadir",
                             "peer did not return a certificate", "[SERVER] Stopped."):
                    self.assertIn(line, log)
                self.assertEqual(self.docker("inspect", "-f", "{{.State.ExitCode}}", name).stdout.strip(), "0")

    def test_certificates_mounted(self) -> None:
        """Certificates made later, mounted over those in the image, for the user who owns them."""
        renewed = Lab("renewed")
        renewed.generate(PREPARED_SET="renewed")
        user = (renewed.certs / "server.key").stat()
        mounts = [option for name in ("ca.crt", "server.crt", "server.key")
                  for option in ("-v", f"{renewed.certs / name}:/mtls-lab/certs/{name}:ro")]
        _, url = self.start("--user", f"{user.st_uid}:{user.st_gid}", *mounts)
        self.assertEqual(renewed.run("client/client.py", "--url", url).returncode, 0)
        self.assertEqual(lab().run("client/client.py", "--url", url).returncode, 1)

    def test_interrupt(self) -> None:
        """Ctrl+C, which the engine delivers as SIGINT, ends it, too."""
        name, _ = self.start()
        self.docker("kill", "-s", str(int(signal.SIGINT)), name)
        self.assertEqual(self.docker("wait", name).stdout.strip(), "0")

    def test_before_the_certificates(self) -> None:
        """Building without certificates fails, and docker's output says what to run first."""
        project = self.with_docker_files(Lab("no certificates"))
        result = self.docker("build", "-f", project / "Dockerfile", "-t", self.tag + "-none", project, check=False)
        self.assertNotEqual(result.returncode, 0)
        if engine() == "docker":   # podman does not show the lines around the one that failed
            self.assertIn("bash certs/gen_certs.sh", result.stdout)


if __name__ == "__main__":
    unittest.main()
