"""Keeps the write-ahead log small: once it is large, it is emptied between two commits.

Its file keeps its size, and is overwritten from its beginning: a commit takes about a third of the time if
the size of the file stays as it is. Only a file that grew far beyond its bound is truncated.

SQLite restarts the log only while nobody reads it. Under continuous reports that never happens, and the log
grows. So reports read in steps, and wait before a step while the writer empties the log.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGE = 4 * 1024 * 1024
"""Size in bytes from which the log is emptied."""

TOO_LARGE = 2 * LARGE
"""Size in bytes from which its file is truncated, too."""

STEP_WAIT = 0.05
"""Seconds that commits wait for the current step of a report."""

STEP_PAUSE = 0.25
"""Seconds until the next attempt after a step took longer than STEP_WAIT."""

BUSY_PAUSE = 1.0
"""Seconds until the next attempt after another program's read prevented it."""

log = logging.getLogger("pomelo.stores")


class LogSize:
    """The write-ahead log of one file. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = str(path.with_name(path.name + "-wal"))
        self._turnstile = threading.Lock()
        """Locked while the log is being emptied or about to be: no step starts."""
        self._step = threading.Lock()
        """Locked while a step is read."""
        self._not_before = 0.0
        self._overwritten = 0
        """The size of the file when it was last emptied: until it grows, it is being overwritten."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Surrounds a step of a report. Fetch all rows inside the block."""
        with self._turnstile:
            pass
        with self._step:
            yield

    def keep_small(self, connection: sqlite3.Connection) -> None:
        """Empties the log if it is large and nobody reads it. Call between two transactions."""
        size = self._size()
        if size < LARGE or size == self._overwritten or time.monotonic() < self._not_before:
            return
        with self._turnstile:
            if not self._step.acquire(timeout=STEP_WAIT):
                self._not_before = time.monotonic() + STEP_PAUSE
                return
            try:
                busy = _empty(connection, truncate=size >= TOO_LARGE)
            except sqlite3.Error as error:
                log.warning("The write-ahead log could not be emptied: %s", error)
                busy = True
            finally:
                self._step.release()
        if busy:
            self._not_before = time.monotonic() + BUSY_PAUSE
        else:
            self._overwritten = self._size()

    def _size(self) -> int:
        try:
            return os.stat(self._path).st_size  # noqa: PTH116 (pathlib would take three times as long)
        except OSError:  # it does not exist before the first commit
            return 0


def _empty(connection: sqlite3.Connection, *, truncate: bool) -> bool:
    """Copies the log into the file and empties it. True: another program's read prevented it."""
    mode = "TRUNCATE" if truncate else "RESTART"
    (wait,) = connection.execute("PRAGMA busy_timeout").fetchone()
    connection.execute("PRAGMA busy_timeout = 0")  # Commits don't wait for other programs.
    try:
        busy, *_ = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
    finally:
        connection.execute(f"PRAGMA busy_timeout = {wait}")
    return bool(busy)
