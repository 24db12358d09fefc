"""Complete checks of a file, in a thread of their own: one may take minutes, and others read meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from pomelo.stores.sqlite.damage import check_completely
from pomelo.stores.sqlite.file import connect_read_only

INTERRUPT_INTERVAL = 0.01
"""Seconds between two attempts to end what is being read, while the file is being closed."""


class Checks:
    """The checks of one file, one at a time. Use it in one event loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-check")
        self._connection: sqlite3.Connection | None = None
        """Of the last check."""

    async def run(self) -> list[str]:
        """As `check_completely`.

        Raises:
            sqlite3.Error: the file can't be checked, or `close` has ended the check.
            RuntimeError: it is closed.
        """
        check = partial(check_completely, self._path, self._connect, references=True)
        return await asyncio.get_running_loop().run_in_executor(self._thread, check)

    async def close(self) -> None:
        """Ends all checks. Later ones fail."""
        ended = asyncio.get_running_loop().run_in_executor(self._thread, lambda: None)
        self._thread.shutdown(wait=False)
        while not ended.done():
            # Repeated, because it does not affect a statement that begins afterwards.
            with suppress(sqlite3.ProgrammingError):  # it was closed meanwhile
                if self._connection is not None:
                    self._connection.interrupt()
            await asyncio.wait([ended], timeout=INTERRUPT_INTERVAL)

    def _connect(self, path: Path) -> sqlite3.Connection:
        self._connection = connect_read_only(path)
        return self._connection
