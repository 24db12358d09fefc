"""When keys were used last: to the minute, never lost to an outage, and not inherited by a successor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pomelo.accounts.keys import CACHE_SECONDS, Keyring
from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from tests.unit.accounts.key_rig import ROOT, call
from tests.unit.clock import Clock
from tests.unit.refusals import refused
from tests.waiting import cancel


class FailingStore:
    """A store that stores no use of keys while it is `failing`; then, `meanwhile` is called."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.failing = False
        self.meanwhile: Any = None

    async def record_key_use(self, used: dict[str, float]) -> None:
        if self.failing:
            if self.meanwhile is not None:
                await self.meanwhile()
            raise PomeloError("store_unavailable")
        await self._store.record_key_use(used)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


async def used(store: Store, key_id: str) -> float | None:
    """When a key was used last, as it is stored."""
    record = await store.get_key(key_id)
    assert record is not None
    return record.used


async def test_the_last_use_is_stored_to_the_minute(store: Store, keyring: Keyring, clock: Clock) -> None:
    record, key = await keyring.create()
    assert await used(store, record.key_id) is None
    clock.now = 6_000.0 + 59.5
    await keyring.authenticate(call(key))
    await keyring.save_use()
    assert await used(store, record.key_id) == 6_000.0


async def test_the_use_of_an_outage_is_stored_after_it(store: Store, clock: Clock) -> None:
    failing = FailingStore(store)
    keyring = Keyring(failing, ROOT, clock=clock, monotonic=clock)  # type: ignore[arg-type]
    record, key = await keyring.create()
    other, other_key = await keyring.create()
    clock.now = 6_000.0
    for each in (key, other_key):
        await keyring.authenticate(call(each))

    async def use_again() -> None:
        clock.now += CACHE_SECONDS + 60
        await keyring.authenticate(call(key))

    failing.failing, failing.meanwhile = True, use_again
    with pytest.raises(PomeloError):
        await keyring.save_use()
    failing.failing = False
    await keyring.save_use()
    assert await used(store, record.key_id) == clock.now - clock.now % 60 > 6_000.0
    assert await used(store, other.key_id) == 6_000.0


async def test_a_successor_was_not_used(store: Store, keyring: Keyring) -> None:
    record, key = await keyring.create()
    await keyring.authenticate(call(key))
    await keyring.save_use()
    assert await used(store, record.key_id) is not None
    successor, _ = await keyring.rotate(record.key_id)
    assert successor.used is None
    assert await used(store, successor.key_id) is None


async def test_only_the_holder_of_a_valid_key_learns_that_the_account_is_disabled(
    store: Store, keyring: Keyring
) -> None:
    revoked, revoked_key = await keyring.create()
    _, valid_key = await keyring.create()
    await keyring.revoke(revoked.key_id)
    await store.set_disabled("default", 1.0)
    for key, reported in ((valid_key, True), (revoked_key, False), (valid_key[:-1] + "!", False)):
        with refused("invalid_api_key") as caught:
            await keyring.authenticate(call(key))
        assert ("disabled" in caught.value.message) == reported


async def test_the_last_use_is_stored_when_the_process_ends(store: Store, keyring: Keyring) -> None:
    record, key = await keyring.create()
    keeping = asyncio.create_task(keyring.keep_use())
    await asyncio.sleep(0)
    await keyring.authenticate(call(key))
    await cancel(keeping)
    assert await used(store, record.key_id) is not None


async def test_a_use_that_was_being_stored_when_the_process_ends_is_stored_again(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.accounts.keys.USE_INTERVAL", 0.001)
    failing = FailingStore(store)
    keyring = Keyring(failing, ROOT, clock=clock, monotonic=clock)  # type: ignore[arg-type]
    record, key = await keyring.create()
    await keyring.authenticate(call(key))
    storing = asyncio.Event()

    async def hang() -> None:
        storing.set()
        await asyncio.Event().wait()

    failing.failing, failing.meanwhile = True, hang
    keeping = asyncio.create_task(keyring.keep_use())
    async with asyncio.timeout(20):
        await storing.wait()
    failing.failing = False
    await cancel(keeping)
    assert await used(store, record.key_id) is not None
