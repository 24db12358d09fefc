"""When the store is asked for a key, and when keys expire, are revoked, rotated or refused because of their address."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from pomelo.accounts.key_format import make_key
from pomelo.accounts.keys import CACHE_SECONDS, CACHE_SIZE, Keyring
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from tests.unit.accounts.key_rig import ROOT, CountingStore, assert_refused, call, refusal
from tests.unit.clock import Clock
from tests.unit.refusals import refused


async def test_a_valid_key_is_looked_up_once_in_thirty_seconds(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    _, key = await keyring.create()
    for _ in range(3):
        await keyring.authenticate(call(key))
    assert len(counting_store.look_ups) == 1
    clock.now += 30
    await keyring.authenticate(call(key))
    assert len(counting_store.look_ups) == 2


async def test_an_expired_key_is_refused_even_if_it_is_cached(keyring: Keyring, clock: Clock) -> None:
    _, key = await keyring.create(expires=clock.now + 5)
    await keyring.authenticate(call(key))
    clock.now += 5
    await assert_refused(keyring, key)


async def test_a_revoked_key_is_refused_immediately_and_revoking_it_again_changes_nothing(
    keyring: Keyring, clock: Clock
) -> None:
    record, key = await keyring.create()
    await keyring.authenticate(call(key))
    first = await keyring.revoke(record.key_id)
    await assert_refused(keyring, key)
    clock.now += 5
    assert await keyring.revoke(record.key_id) == first


async def test_another_process_sees_a_revocation_within_thirty_seconds(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    record, key = await keyring.create()
    other = Keyring(counting_store, ROOT, clock=clock, monotonic=clock)
    await other.authenticate(call(key))
    await keyring.revoke(record.key_id)
    clock.now += 30
    await assert_refused(other, key)


async def test_a_look_up_in_a_store_that_hangs_ends(
    keyring: Keyring, counting_store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.accounts.keys.LOOK_UP_TIME", 0.01)
    _, key = await keyring.create()
    counting_store.on_look_up = asyncio.Event().wait
    assert (await refusal(keyring, key)).code == "store_unavailable"
    await keyring.authenticate(call(key))


async def test_a_key_that_is_revoked_during_its_look_up_is_not_cached(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    record, key = await keyring.create()
    counting_store.on_look_up = partial(keyring.revoke, record.key_id)
    await keyring.authenticate(call(key))
    await assert_refused(keyring, key)


async def test_rotation_revokes_a_key_and_creates_one_with_the_same_properties(keyring: Keyring) -> None:
    record, key = await keyring.create(live=True, models=("gpt-4", "flux-1-pro"), expires=2_000_000.0)
    await keyring.authenticate(call(key))
    successor, new = await keyring.rotate(record.key_id)
    await assert_refused(keyring, key)
    principal = await keyring.authenticate(call(new))
    assert (principal.live, principal.models) == (True, frozenset({"gpt-4", "flux-1-pro"}))
    assert successor.expires == record.expires


async def test_rotation_keeps_the_account_of_a_key(keyring: Keyring, counting_store: CountingStore) -> None:
    await counting_store.add_account("acme", "pro", 1.0)
    record, _ = await keyring.create("acme")
    _, new = await keyring.rotate(record.key_id)
    principal = await keyring.authenticate(call(new))
    assert (principal.account, principal.plan) == ("acme", "pro")


async def test_a_new_plan_applies_to_the_next_call_of_its_account(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    await counting_store.add_account("acme", "free", 1.0)
    keys = [(await keyring.create(account))[1] for account in ("acme", "default")]
    for key in keys:
        await keyring.authenticate(call(key))
    look_ups = len(counting_store.look_ups)
    await counting_store.set_plan("acme", "scale")
    keyring.forget_account("acme")
    assert [(await keyring.authenticate(call(key))).plan for key in keys] == ["scale", "pro"]
    assert len(counting_store.look_ups) == look_ups + 1


async def test_a_plan_that_changes_during_a_look_up_is_not_cached(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    _, key = await keyring.create()

    async def change_plan() -> None:
        await counting_store.set_plan("default", "scale")
        keyring.forget_account("default")

    counting_store.on_look_up = change_plan
    await keyring.authenticate(call(key))
    await keyring.authenticate(call(key))
    assert len(counting_store.look_ups) == 2


async def test_a_revoked_or_expired_key_can_not_be_rotated(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    revoked, _ = await keyring.create()
    await keyring.revoke(revoked.key_id)
    expired, _ = await keyring.create(expires=clock.now)
    for record in (revoked, expired):
        with refused("invalid_parameter", "id"):
            await keyring.rotate(record.key_id)
    assert len(await counting_store.list_keys()) == 2


async def test_an_unknown_key_can_not_be_rotated_or_revoked(keyring: Keyring) -> None:
    for attempt in (keyring.rotate("nothing"), keyring.revoke("nothing")):
        with refused("not_found", "id", "There is no key 'nothing'") as error:
            await attempt
        assert error.value.values == {"keyId": "nothing"}


async def test_the_size_of_the_cache_is_limited(clock: Clock) -> None:
    class StoreOfAllKeys:
        """Has a record for every key id."""

        async def get_key(self, key_id: str) -> KeyRecord | None:
            return KeyRecord(key_id, "default", False, b"", (), 0.0)

        async def get_account(self, name: str) -> None:
            return None

    store: Any = StoreOfAllKeys()
    keyring = Keyring(store, ROOT, clock=clock, monotonic=clock)
    for _ in range(CACHE_SIZE + 50):
        await assert_refused(keyring, make_key(False)[0])
    assert len(keyring._cache) == CACHE_SIZE


# --- the limit on failed keys of an address


ADDRESS = "192.0.2.1"


async def test_an_address_with_too_many_failed_keys_gets_rate_limit_exceeded(
    keyring: Keyring, clock: Clock
) -> None:
    record, revoked = await keyring.create()
    await keyring.revoke(record.key_id)
    bad = [None, "junk", revoked, make_key(False)[0]]
    assert {(await refusal(keyring, bad[n % 4], ADDRESS)).code for n in range(20)} == {"invalid_api_key"}
    clock.now += 15
    for key in bad:
        error = await refusal(keyring, key, ADDRESS)
        assert (error.code, error.retry_after) == ("rate_limit_exceeded", 45)
        assert error.values == {"quota": "failed_keys_per_minute", "retryAfter": "45"}
        assert "API key" in error.message
        assert key is None or key not in error.message
        assert (await refusal(keyring, key, "192.0.2.2")).code == "invalid_api_key"
    clock.now += 45
    assert (await refusal(keyring, "junk", ADDRESS)).code == "invalid_api_key"


async def test_a_valid_key_is_never_refused_because_of_its_address(keyring: Keyring, clock: Clock) -> None:
    _, known = await keyring.create()
    await keyring.authenticate(call(known))
    for number in range(100):
        await refusal(keyring, "junk" if number % 2 else make_key(False)[0], ADDRESS)
    _, new = await keyring.create()
    for key in (known, new):
        assert (await keyring.authenticate(call(key, ADDRESS))).account == "default"
    clock.now += 31
    await keyring.authenticate(call(known, ADDRESS))


async def test_above_the_limit_a_key_is_valid_as_soon_as_its_account_is_enabled(
    keyring: Keyring, store: Store, clock: Clock
) -> None:
    _, key = await keyring.create()
    await store.set_disabled("default", 1.0)
    for _ in range(25):
        error = await refusal(keyring, key, ADDRESS)
    assert error.code == "rate_limit_exceeded"
    clock.now += CACHE_SECONDS
    assert "is disabled" in (await refusal(keyring, key, ADDRESS)).message
    await store.set_disabled("default", None)
    keyring.forget_account("default")
    await keyring.authenticate(call(key, ADDRESS))


async def test_above_the_limit_a_malformed_or_repeated_key_is_not_looked_up(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    unknown, _ = make_key(False)
    for _ in range(20):
        await refusal(keyring, unknown, ADDRESS)
    look_ups = len(counting_store.look_ups)
    for _ in range(50):
        assert (await refusal(keyring, unknown, ADDRESS)).code == "rate_limit_exceeded"
    for _ in range(50):
        await refusal(keyring, "junk", ADDRESS)
    assert len(counting_store.look_ups) == look_ups
