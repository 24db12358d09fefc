"""API keys: their format, the principals they authenticate, and when they expire. On a real store."""

from __future__ import annotations

import string
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.accounts.key_format import make_key, parse
from pomelo.accounts.keys import CACHE_SIZE, Keyring
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.stores.accounts import UnknownAccountError
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from tests.unit.clock import Clock
from tests.unit.refusals import refused

ROOT = b"r" * 64


class CountingStore:
    """Wraps a store and records its key look-ups; `on_look_up` runs once, during the next look-up."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.look_ups: list[str] = []
        self.on_look_up: Callable[[], Awaitable[object]] | None = None

    async def get_key(self, key_id: str) -> KeyRecord | None:
        self.look_ups.append(key_id)
        record = await self.store.get_key(key_id)
        if self.on_look_up is not None:
            on_look_up, self.on_look_up = self.on_look_up, None
            await on_look_up()
        return record

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


@pytest.fixture(name="store")
def _store(store: Store) -> CountingStore:
    return CountingStore(store)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keyring(store: CountingStore, clock: Clock) -> Keyring:
    return Keyring(store, ROOT, clock=clock, monotonic=clock)


def call(key: str | None, address: str = "") -> Call:
    return Call(api_key=key, request_id="req_1", protocol="rest", deadline=0.0, address=address)


async def refusal(keyring: Keyring, key: str | None, address: str = "") -> PomeloError:
    request = call(key, address)
    with pytest.raises(PomeloError) as caught:
        await keyring.authenticate(request)
    assert "X-Pomelo-Mode" not in request.response_headers
    return caught.value


async def assert_refused(keyring: Keyring, key: str | None) -> str:
    error = await refusal(keyring, key)
    assert error.code == "invalid_api_key"
    return error.message


# --- format


@given(live=st.booleans(), draw=st.randoms(use_true_random=False))
def test_parse_returns_the_id_of_a_key(live: bool, draw: Random) -> None:
    key, key_id = make_key(live, draw.choice)
    assert key.startswith(f"pml_{'live' if live else 'test'}_{key_id}_")
    assert len(key) == 60
    assert parse(key) == key_id


@given(index=st.integers(0, 59), other=st.sampled_from(string.printable + "é\ud800"), live=st.booleans())
def test_a_key_with_one_wrong_character_is_malformed(index: int, other: str, live: bool) -> None:
    key, _ = make_key(live)
    changed = key[:index] + other + key[index + 1 :]
    assert changed == key or parse(changed) is None


@given(st.text(max_size=80))
def test_any_other_text_is_malformed(text: str) -> None:
    assert parse(text) is None


def test_keys_and_their_ids_are_unique() -> None:
    keys = {make_key(False)[0] for _ in range(1000)}
    assert len(keys) == len({key[9:21] for key in keys}) == 1000


# --- authentication


async def test_a_key_authenticates_its_account_mode_and_models(keyring: Keyring) -> None:
    record, key = await keyring.create("default", live=True, models=("gpt-4",))
    good = call(key)
    principal = await keyring.authenticate(good)
    assert (principal.account, principal.key_id, principal.live) == ("default", record.key_id, True)
    assert principal.models == frozenset({"gpt-4"})
    assert good.response_headers["X-Pomelo-Mode"] == "live"


async def test_a_test_key_for_all_models_has_no_list_of_models(keyring: Keyring) -> None:
    _, key = await keyring.create()
    good = call(key)
    assert (await keyring.authenticate(good)).models is None
    assert good.response_headers["X-Pomelo-Mode"] == "test"


async def test_a_missing_and_a_bad_key_are_the_same_error_and_its_message_does_not_repeat_the_key(
    keyring: Keyring,
) -> None:
    assert "Missing API key" in await assert_refused(keyring, None)
    key, _ = make_key(False)
    for bad in ("", "x", key, "pml_test_" + "é" * 51, "\ud800" * 60, key * 1000):
        message = await assert_refused(keyring, bad)
        assert bad == "" or bad not in message or bad == "x"


async def test_a_malformed_key_does_not_reach_the_store(keyring: Keyring, store: CountingStore) -> None:
    key, _ = make_key(False)
    for malformed in ("", "x" * 60, key[:-1] + ("a" if key[-1] != "a" else "b"), "' OR 1=1 --"):
        await assert_refused(keyring, malformed)
    assert store.look_ups == []
    await assert_refused(keyring, key)
    assert len(store.look_ups) == 1


async def test_an_existing_id_with_another_secret_or_mode_is_refused_cached_or_not(keyring: Keyring) -> None:
    record, key = await keyring.create()
    new, new_id = make_key(False)
    forged = new.replace(new_id, record.key_id)
    for _ in range(2):
        for bad in (forged, key.replace("pml_test_", "pml_live_"), key + "0"):
            await assert_refused(keyring, bad)
        await keyring.authenticate(call(key))


async def test_a_key_is_invalid_under_another_root_secret(keyring: Keyring, store: CountingStore) -> None:
    _, key = await keyring.create()
    await assert_refused(Keyring(store, b"other" * 10), key)


async def test_a_key_of_the_previous_secret_is_valid_and_needs_it_no_more_once_it_was_used(
    keyring: Keyring, store: CountingStore, clock: Clock
) -> None:
    record, key = await keyring.create()
    (_, forged), (_, unused) = await keyring.create(), await keyring.create(live=True)
    forged = forged.replace(forged[9:21], record.key_id)
    both = Keyring(store, b"n" * 64, clock=clock, monotonic=clock, previous=[b"o" * 64, ROOT])
    for _ in range(2):  # a forged key that comes first must not be what the id stands for
        await assert_refused(both, forged)
        await both.authenticate(call(key))
    new, _ = await both.create()
    await both.finish()
    listed = await store.list_keys()
    assert await both.keys_of_previous_secrets(listed) == {
        each.key_id for each in listed if each.key_id not in (record.key_id, new.key_id)
    }
    current = Keyring(store, b"n" * 64, clock=clock, monotonic=clock)
    await current.authenticate(call(key))
    await assert_refused(current, unused)
    await assert_refused(Keyring(store, ROOT), key)
    assert await current.keys_of_previous_secrets(listed) == set()


async def test_a_key_of_the_current_secret_made_before_the_rotation_is_noted_when_it_is_used(
    keyring: Keyring, store: CountingStore, clock: Clock
) -> None:
    record, key = await keyring.create()
    both = Keyring(store, ROOT, clock=clock, monotonic=clock, previous=[b"n" * 64])
    assert await both.keys_of_previous_secrets([record]) == {record.key_id}
    await both.authenticate(call(key))
    await both.finish()
    assert await both.keys_of_previous_secrets([record]) == set()
    assert (await store.list_keys()) == [record]


async def test_servers_that_replace_a_digest_in_both_directions_lose_no_key(
    keyring: Keyring, store: CountingStore, clock: Clock
) -> None:
    _, key = await keyring.create()
    servers = [
        Keyring(store, current, clock=clock, monotonic=clock, previous=[previous])
        for current, previous in ((ROOT, b"n" * 64), (b"n" * 64, ROOT))
    ]
    for _ in range(3):
        clock.now += 31
        for server in servers:
            await server.authenticate(call(key))
        for server in servers:
            await server.finish()


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir()]


async def test_the_store_does_not_contain_the_secret(
    keyring: Keyring, store: CountingStore, tmp_path: Path
) -> None:
    _, key = await keyring.create()
    secret = key[22:54].encode()
    assert contents(tmp_path)
    assert not any(secret in content for content in contents(tmp_path))


async def test_no_key_can_be_created_for_an_unknown_account(keyring: Keyring, store: CountingStore) -> None:
    with pytest.raises(UnknownAccountError):
        await keyring.create("nobody")
    assert await store.list_keys() == []


# --- expiry and revocation


async def test_a_valid_key_is_looked_up_once_in_thirty_seconds(
    keyring: Keyring, store: CountingStore, clock: Clock
) -> None:
    _, key = await keyring.create()
    for _ in range(3):
        await keyring.authenticate(call(key))
    assert len(store.look_ups) == 1
    clock.now += 30
    await keyring.authenticate(call(key))
    assert len(store.look_ups) == 2


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
    keyring: Keyring, store: CountingStore, clock: Clock
) -> None:
    record, key = await keyring.create()
    other = Keyring(store, ROOT, clock=clock, monotonic=clock)
    await other.authenticate(call(key))
    await keyring.revoke(record.key_id)
    clock.now += 30
    await assert_refused(other, key)


async def test_a_key_that_is_revoked_during_its_look_up_is_not_cached(
    keyring: Keyring, store: CountingStore
) -> None:
    record, key = await keyring.create()
    store.on_look_up = partial(keyring.revoke, record.key_id)
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


async def test_rotation_keeps_the_account_of_a_key(keyring: Keyring, store: CountingStore) -> None:
    await store.add_account("acme", "pro", 1.0)
    record, _ = await keyring.create("acme")
    _, new = await keyring.rotate(record.key_id)
    principal = await keyring.authenticate(call(new))
    assert (principal.account, principal.plan) == ("acme", "pro")


async def test_a_new_plan_applies_to_the_next_call_of_its_account(
    keyring: Keyring, store: CountingStore
) -> None:
    await store.add_account("acme", "free", 1.0)
    keys = [(await keyring.create(account))[1] for account in ("acme", "default")]
    for key in keys:
        await keyring.authenticate(call(key))
    look_ups = len(store.look_ups)
    await store.set_plan("acme", "scale")
    keyring.forget_account("acme")
    assert [(await keyring.authenticate(call(key))).plan for key in keys] == ["scale", "pro"]
    assert len(store.look_ups) == look_ups + 1


async def test_a_plan_that_changes_during_a_look_up_is_not_cached(
    keyring: Keyring, store: CountingStore
) -> None:
    _, key = await keyring.create()

    async def change_plan() -> None:
        await store.set_plan("default", "scale")
        keyring.forget_account("default")

    store.on_look_up = change_plan
    await keyring.authenticate(call(key))
    await keyring.authenticate(call(key))
    assert len(store.look_ups) == 2


async def test_a_revoked_or_expired_key_can_not_be_rotated(
    keyring: Keyring, store: CountingStore, clock: Clock
) -> None:
    revoked, _ = await keyring.create()
    await keyring.revoke(revoked.key_id)
    expired, _ = await keyring.create(expires=clock.now)
    for record in (revoked, expired):
        with refused("invalid_parameter", "id"):
            await keyring.rotate(record.key_id)
    assert len(await store.list_keys()) == 2


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


async def test_above_the_limit_a_malformed_or_repeated_key_is_not_looked_up(
    keyring: Keyring, store: CountingStore
) -> None:
    unknown, _ = make_key(False)
    for _ in range(20):
        await refusal(keyring, unknown, ADDRESS)
    look_ups = len(store.look_ups)
    for _ in range(50):
        assert (await refusal(keyring, unknown, ADDRESS)).code == "rate_limit_exceeded"
    for _ in range(50):
        await refusal(keyring, "junk", ADDRESS)
    assert len(store.look_ups) == look_ups
