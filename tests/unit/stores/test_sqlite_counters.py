"""What the SQLite store keeps of counters: no more than is in use."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from pomelo.stores.ledger import Counter, ReserveRequest
from tests.contract.ledger_rig import SqliteRig, record


def stored(rig: SqliteRig) -> dict[str, list[float | None]]:
    """The counts of the wallet in the file."""
    with closing(sqlite3.connect(rig.path)) as connection:
        (text,) = connection.execute("SELECT counters FROM wallets WHERE account = 'default'").fetchone()
    found: dict[str, list[float | None]] = json.loads(text)
    return found


async def test_counts_of_ended_tasks_and_windows_are_deleted_by_the_next_write(tmp_path: Path) -> None:
    rig = SqliteRig(tmp_path)
    await rig.open()
    try:
        for key in ("ann", "bob"):
            draft = record(key, account="default", live=False)
            taken = (Counter(f"streams:{key}"), Counter(f"calls:{key}", window=60.0))
            await rig.store.reserve(ReserveRequest(draft, 0, 0, taken))
        assert set(stored(rig)) == {"streams:ann", "calls:ann", "streams:bob", "calls:bob"}
        rig.clock.passes(60)
        await rig.store.void(record("ann", account="default", live=False).wallet, "ann")
        assert stored(rig) == {"streams:bob": [1, None, None]}
    finally:
        await rig.close()
