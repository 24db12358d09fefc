"""The store in one SQLite file.

`store` implements the roles, `file` opens the file, and `writer` is the thread that writes to it. `keys`,
`accounts`, `ledger` and `usage` have the SQL statements. `damage` checks files, `log_size` limits the log.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pomelo.stores.base import Store
from pomelo.stores.sqlite.store import SqliteStore, open_sqlite

__all__ = ["SqliteStore", "open_sqlite", "open_url"]


def open_url(url: str, archive: str) -> AbstractAsyncContextManager[Store]:
    """Opens the store of `sqlite:PATH`. Usage records stay in its file, so `archive` is not used."""
    return open_sqlite(Path(url.removeprefix("sqlite:")))
