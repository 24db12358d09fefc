"""The size of the write-ahead log: it is emptied between two commits once it is large.

SQLite begins the log anew only at a moment when nobody reads it; with one report after another that moment
never comes, and the log grows. So a report reads in steps, and waits before a step while the log is being
emptied. The writer's connection is the only one that ever does that.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LARGE = 4 * 1024 * 1024
"""Bytes of the log from which on it is to be emptied."""

STEP_WAIT = 0.05
"""Seconds that commits wait for the end of a step that is being read."""

STEP_PAUSE = 0.25
"""Seconds until the next try, where a step took longer than that."""

BUSY_PAUSE = 1.0
"""Seconds until the next try, where another program has the file open and reads it."""

log = logging.getLogger("pomelo.stores")


class LogSize:
    """Keeps the log of one file small. `keep_small` is for the thread that writes, `reading` for reports."""

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path.with_name(path.name + "-wal")
        self._monotonic = monotonic
        self._turnstile = threading.Lock()
        """Held while the log is being emptied or that is waited for: no step begins."""
        self._step = threading.Lock()
        """Held while a step is read."""
        self._not_before = 0.0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A step of a report. What is read inside is read to its end there."""
        with self._turnstile:
            pass
        with self._step:
            yield

    def keep_small(self, connection: sqlite3.Connection) -> None:
        """Empties the log if it is large and nobody reads it. To be called between two transactions."""
        if self._size() < LARGE or self._monotonic() < self._not_before:
            return
        with self._turnstile:
            if not self._step.acquire(timeout=STEP_WAIT):
                self._not_before = self._monotonic() + STEP_PAUSE
                return
            try:
                busy = _empty(connection)
            except sqlite3.Error as error:
                log.warning("The write-ahead log could not be emptied: %s", error)
                busy = True
            finally:
                self._step.release()
        if busy:
            self._not_before = self._monotonic() + BUSY_PAUSE

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:  # There is none before the first commit.
            return 0


def _empty(connection: sqlite3.Connection) -> bool:
    """Puts the log into the file and empties it. True: another program reads, and kept it from that."""
    (wait,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0")  # Commits don't wait for other programs.
    try:
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {wait}")
    return bool(busy)
