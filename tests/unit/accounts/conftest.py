"""A store of accounts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.stores import open_store
from pomelo.stores.base import Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An empty SQLite store."""
    async with open_store(f"sqlite:{tmp_path / 'pomelo.db'}") as opened:
        yield opened
