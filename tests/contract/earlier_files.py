"""SQLite files that earlier versions have left."""

from __future__ import annotations

import sqlite3
from contextlib import AbstractAsyncContextManager, closing
from itertools import chain
from pathlib import Path

from pomelo.stores.base import Store
from pomelo.stores.schema import MIGRATIONS
from pomelo.stores.sqlite import open_sqlite


def left_by(version: int, folder: Path) -> Path:
    """A file as that version left it when its process died: its rows in the tables of its migrations, which do
    not change."""
    path = folder / "left" / "pomelo.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as old:
        old.execute("PRAGMA journal_mode = WAL")
        old.executescript(_tables(version) + Path(__file__).with_name(f"version_{version}.sql").read_text())
    return path


def _tables(version: int) -> str:
    with closing(sqlite3.connect(":memory:")) as new:
        for statement in chain.from_iterable(MIGRATIONS[:version]):
            new.execute(statement)
        created = new.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL").fetchall()
    return "".join(f"{sql};\n" for (sql,) in created)


def open_at(path: Path, at: float) -> AbstractAsyncContextManager[Store]:
    """The store of that file at that time (Unix seconds): what is stored in these files expires."""
    return open_sqlite(path, now=lambda: at, monotonic=lambda: 5.0)
