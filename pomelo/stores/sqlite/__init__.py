"""The store in one SQLite file. `pomelo.stores.open_store` opens it; nothing else knows of SQLite.

`store` is the port's face, `file` opens the file, `writer` is the thread that writes it; `keys`, `accounts`,
`ledger`, `recovery` and `usage` are the statements.
"""

from __future__ import annotations

from pomelo.stores.sqlite.store import SqliteStore, open_sqlite

__all__ = ["SqliteStore", "open_sqlite"]
