"""The store in one SQLite file.

`store` implements the roles, `file` opens the file. `ledger` decides about tasks in memory, by the rules of
`wallets`; what must be kept is a batch of the `journal`, which the thread of `writer` commits. `stored`,
`keys`, `accounts` and `usage` have the other SQL statements. `damage` checks files, `log_size` limits the
log.
"""

from __future__ import annotations

import os
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from pomelo.stores.base import Store
from pomelo.stores.sqlite.file import check_version
from pomelo.stores.sqlite.store import SqliteStore, open_sqlite

__all__ = ["SqliteStore", "check_url", "open_sqlite", "open_url"]


def open_url(url: str, archive: str) -> AbstractAsyncContextManager[Store]:
    """Opens the store of `sqlite:PATH`. Usage records stay in its file, so `archive` is not used."""
    # SQLite puts the log of a linked file beside the file itself, where its lock belongs too.
    return open_sqlite(Path(os.path.realpath(url.removeprefix("sqlite:"))))


async def check_url(url: str, archive: str) -> None:
    """Checks the file of `sqlite:PATH`, as `pomelo.stores.check_store`."""
    check_version(Path(url.removeprefix("sqlite:")))
