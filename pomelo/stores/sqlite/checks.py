"""Complete checks of a file, in a thread of their own: one may take minutes, and others read meanwhile."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from pomelo.stores.sqlite.damage import check_completely
from pomelo.stores.sqlite.file import connect_read_only

_INTERRUPT_INTERVAL = 0.01
"""Seconds between two attempts to end what is being read, while a file is being closed."""


async def interrupt(read: Callable[[], sqlite3.Connection | None], ended: asyncio.Future[Any]) -> None:
    """Interrupts what the connection that `read` returns is reading, until `ended` is done."""
    while not ended.done():
        # Repeated, because it does not affect a statement that begins afterwards.
        with suppress(sqlite3.ProgrammingError):  # it was closed meanwhile
            if (connection := read()) is not None:
                connection.interrupt()
        await asyncio.wait([ended], timeout=_INTERRUPT_INTERVAL)


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
        await interrupt(lambda: self._connection, ended)

    def _connect(self, path: Path) -> sqlite3.Connection:
        self._connection = connect_read_only(path)
        return self._connection
