"""The lab's tests: ``python3 -m unittest discover -s tests -t .``

Tests spend most of their time waiting, so the test classes run side by side, in threads of this one
process; the tests of one class run one after the other. A test's report is held until the test
ends, and then passed on as a whole, so that the output looks as usual.

unittest calls `load_tests` of a package or module if it exists. If a test module's classes should
run side by side even when it runs alone, it has: ``from tests import side_by_side as load_tests``.
"""

import os
import sys
import threading
import unittest
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

refusal = ""
if sys.version_info < (3, 10):   # noqa: UP036   # old versions must be able to parse this file
    refusal = (f"The lab needs Python 3.10 or newer, and this is {sys.version.split()[0]}. On a Mac, Apple's python3 "
               "is too old: install one from python.org or with Homebrew.")
elif sys.platform == "win32" and sys.argv[0].endswith("unittest"):   # tests.mistakes does run on Windows
    refusal = "The tests need a Unix system. On Windows, run them in WSL."
if refusal:
    print(refusal, file=sys.stderr, flush=True)
    os._exit(1)   # unittest would turn sys.exit() into a failed test

AT_ONCE = 6
"""How many classes run side by side. More would only wait for a processor."""


def load_tests(loader: unittest.TestLoader, _: unittest.TestSuite, pattern: str) -> unittest.TestSuite:
    """All tests in this folder, side by side."""
    return side_by_side(loader, loader.discover(str(Path(__file__).parent), pattern))


def side_by_side(_: unittest.TestLoader, tests: unittest.TestSuite, *__: object) -> unittest.TestSuite:
    """These tests, with their classes side by side."""
    classes: dict[type, list[unittest.TestCase]] = {}
    for test in each(tests):
        classes.setdefault(type(test), []).append(test)
    # The slowest first, by their own estimate, so that no slow one runs alone at the end.
    ordered = sorted(classes, key=lambda kind: -getattr(kind, "seconds", 0))
    return SideBySide(unittest.TestSuite(classes[kind]) for kind in ordered)


def each(suite: Iterable[Any]) -> Iterable[unittest.TestCase]:
    """The tests in a suite of suites."""
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from each(one)
        else:
            yield one


class SideBySide(unittest.TestSuite):
    """Runs its suites in threads."""

    def run(self, result: unittest.TestResult, debug: bool = False) -> unittest.TestResult:
        """All of them; see unittest.TestSuite."""
        turn = threading.Lock()
        suites: list[Any] = list(self)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            running = [pool.submit(suite, Record(result, turn), debug) for suite in suites]
            try:
                for one in running:
                    one.result()
            except KeyboardInterrupt:
                result.stop()   # start no more tests
                raise
        return result


class Record(unittest.TestResult):
    """Collects what one suite reports, and passes it on to the real result when a test ends."""

    def __init__(self, result: unittest.TestResult, turn: Any) -> None:
        super().__init__()
        self.result, self.turn = result, turn
        self.kept: list[tuple[str, tuple[Any, ...]]] = []
        for name in ("startTest", "addSuccess", "addError", "addFailure", "addSkip", "addExpectedFailure",
                     "addUnexpectedSuccess", "addSubTest", "addDuration", "stopTest"):
            setattr(self, name, lambda *arguments, name=name: self.keep(name, *arguments))

    def keep(self, name: str, *arguments: Any) -> None:
        """Keep it. At the end of a test, or on a failure outside of a test (in setUpClass), pass everything on."""
        self.kept.append((name, arguments))
        if name == "stopTest" or self.kept[0][0] != "startTest":
            with self.turn:
                for kept, its_arguments in self.kept:
                    if hasattr(self.result, kept):   # addDuration is new in Python 3.12
                        getattr(self.result, kept)(*its_arguments)
            self.kept.clear()
            self.shouldStop = self.result.shouldStop
