"""What is read of a write-ahead log to see whether it is damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from pomelo.stores.sqlite.damage import last_commits


def test_a_transaction_of_many_frames_is_one_commit(tmp_path: Path) -> None:
    path = tmp_path / "pomelo.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        (page,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE texts (text TEXT)")
        ends = []
        for _ in range(3):
            frames = (path.with_name("pomelo.db-wal").stat().st_size - 32) // (page + 24)
            ends.append(frames)
            connection.execute("INSERT INTO texts VALUES (?)", ("x" * 10 * page,))
        assert ends[2] - ends[1] > 10
        found = last_commits(path)
        assert found is not None
        assert found[:3] == ends
        assert len(found) == 4
