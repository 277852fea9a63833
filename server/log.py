"""The server's log on stderr, written by a thread of its own: the event loop never waits for its reader.

What is waiting to be written is limited: to `MAX_ENTRIES` entries, and callers limit every part that
a peer chooses, see `quoted`. Any more entries are dropped and counted.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time

MAX_ENTRIES = 1000    # that may be waiting to be written
MAX_QUOTED = 200      # characters of a name that a peer chose


def quoted(text: str | None) -> str:
    """The text as it appears in a log line: in quotes, escaped, and cut off if it is very long.

    Without the escapes, a name could forge a line or send control codes to the terminal.
    """
    return repr(text) if text is None or len(text) <= MAX_QUOTED else repr(text[:MAX_QUOTED]) + "..."


class Log:
    """Entries are lines that belong together. One thread calls `write` and `close`."""

    def __init__(self) -> None:
        self.entries: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.dropped = 0     # changed only by the thread that calls `write`
        self.reported = 0    # how many of these the log mentions; changed only by the writer
        self.closed = False
        self.writer = threading.Thread(target=self.write_all, daemon=True)
        self.writer.start()

    def write(self, *lines: str) -> None:
        """Add an entry; if too many are waiting already, only count it."""
        if self.entries.qsize() < MAX_ENTRIES:
            self.entries.put("".join(f"[SERVER] {line}\n" for line in lines))
        else:
            self.dropped += 1

    def write_all(self) -> None:
        """The writer thread: until `close`, write entries, and after the last one how many were dropped."""
        while not self.closed or not self.entries.empty():
            text = self.entries.get() + "".join(self.entries.get() for _ in range(self.entries.qsize()))
            missing = self.dropped - self.reported
            if missing and self.entries.empty():
                text += f"[SERVER] LOG | {missing} entries dropped: the log was not read fast enough\n"
                self.reported += missing
            with contextlib.suppress(AttributeError, OSError, ValueError):   # stderr may be closed
                sys.stderr.write(text)
                sys.stderr.flush()
            time.sleep(0.002)   # entries that arrive meanwhile share one write: a wake-up for each would cost more

    def close(self) -> None:
        """Write what is still waiting, if somebody reads it within a second."""
        self.closed = True
        self.entries.put("")
        self.writer.join(1.0)
