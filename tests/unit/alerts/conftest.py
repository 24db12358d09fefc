"""A store, and the alerts that are sent about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.alerts.alert import Alert
from pomelo.stores.base import Store
from pomelo.stores.sqlite import open_sqlite


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(tmp_path / "pomelo.db") as opened:
        yield opened


@pytest.fixture
def sent() -> list[Alert]:
    return []
