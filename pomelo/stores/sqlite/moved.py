"""Notices that the files of an open database were removed or replaced, for example by a restored backup.

What is written to them then is lost when the process ends. SQLite itself refuses to write to such a database,
but not in WAL mode.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from pathlib import Path

INTERVAL = 1.0
"""Seconds between two looks at the files, if anything is written."""

_ENDINGS = ("", "-wal", ".lock")
"""The files of a database: its own, its write-ahead log, and its lock, which keeps other processes away."""

log = logging.getLogger("pomelo.stores")


class MovedFiles:
    """The files of an open database. For the thread that writes to it."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self._path = path
        self._connection = connection
        self._identities: dict[Path, tuple[int, int]] = {}
        """Device and number of each file, since it was first seen."""
        self._moved = False
        self._next_look = 0.0
        self.look()

    def look(self) -> None:
        """Forbids the connection to write while a file is not where it was, and allows it again. Looks at
        most once in INTERVAL."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + INTERVAL
        moved = not all(self._is_there(self._path.with_name(self._path.name + end)) for end in _ENDINGS)
        if moved == self._moved:
            return
        self._connection.execute(f"PRAGMA query_only = {'ON' if moved else 'OFF'}")
        self._moved = moved
        if moved:
            log.error(
                "%s, its log or its lock was removed or replaced while Pomelo uses it, so nothing is "
                "written. Put it back, or stop Pomelo and restore a backup: docs/maintenance.md, Backups",
                self._path,
            )
        else:
            log.warning("%s is back, and is written again", self._path)

    def _is_there(self, path: Path) -> bool:
        try:
            found = path.stat()
        except FileNotFoundError:
            return path not in self._identities  # SQLite creates the log with the first commit
        except OSError:
            return True  # unknown; SQLite reports a disk that fails
        identity = found.st_dev, found.st_ino
        return self._identities.setdefault(path, identity) == identity
