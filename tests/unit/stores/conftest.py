"""A store in a SQLite file, and a fake server of Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.ledger_rig import SqliteRig
from tests.unit.stores.fake_redis import server

__all__ = ["server"]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[SqliteRig]:
    created = SqliteRig(tmp_path)
    await created.open()
    yield created
    await created.close()
