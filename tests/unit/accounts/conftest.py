"""A store of accounts, and the keyring of one that counts the look-ups of keys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.accounts.keys import Keyring
from pomelo.stores import open_store
from pomelo.stores.base import Store
from tests.unit.accounts.key_rig import ROOT, CountingStore
from tests.unit.clock import Clock


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    """An empty SQLite store."""
    async with open_store(f"sqlite:{tmp_path / 'pomelo.db'}") as opened:
        yield opened


@pytest.fixture
def counting_store(store: Store) -> CountingStore:
    return CountingStore(store)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keyring(counting_store: CountingStore, clock: Clock) -> Keyring:
    return Keyring(counting_store, ROOT, clock=clock, monotonic=clock)
