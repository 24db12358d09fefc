"""The store in one SQLite file.

`store` implements the roles, `file` opens the file, and `writer` is the thread that writes to it. `keys`,
`accounts`, `ledger` and `usage` have the SQL statements. `damage` checks files, `log_size` limits the log.
"""

from __future__ import annotations

from pomelo.stores.sqlite.store import SqliteStore, open_sqlite

__all__ = ["SqliteStore", "open_sqlite"]
