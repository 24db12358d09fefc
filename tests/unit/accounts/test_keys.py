"""API keys: their format, the principals they authenticate, and when they expire. On a real store."""

from __future__ import annotations

import string
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.accounts.key_format import make_key, parse
from pomelo.accounts.keys import Keyring
from pomelo.stores.accounts import UnknownAccountError
from tests.unit.accounts.key_rig import ROOT, CountingStore, assert_refused, call
from tests.unit.clock import Clock


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


def test_a_key_that_was_issued_stays_valid() -> None:
    assert parse(f"pml_live_{'0' * 12}_{'z' * 32}0fGASF") == "0" * 12


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


async def test_a_malformed_key_does_not_reach_the_store(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    key, _ = make_key(False)
    for malformed in ("", "x" * 60, key[:-1] + ("a" if key[-1] != "a" else "b"), "' OR 1=1 --"):
        await assert_refused(keyring, malformed)
    assert counting_store.look_ups == []
    await assert_refused(keyring, key)
    assert len(counting_store.look_ups) == 1


async def test_an_existing_id_with_another_secret_or_mode_is_refused_cached_or_not(keyring: Keyring) -> None:
    record, key = await keyring.create()
    new, new_id = make_key(False)
    forged = new.replace(new_id, record.key_id)
    for _ in range(2):
        for bad in (forged, key.replace("pml_test_", "pml_live_"), key + "0"):
            await assert_refused(keyring, bad)
        await keyring.authenticate(call(key))


async def test_a_key_is_invalid_under_another_root_secret(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    _, key = await keyring.create()
    await assert_refused(Keyring(counting_store, b"other" * 10), key)


async def test_a_key_of_the_previous_secret_is_valid_and_needs_it_no_more_once_it_was_used(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    record, key = await keyring.create()
    (_, forged), (_, unused) = await keyring.create(), await keyring.create(live=True)
    forged = forged.replace(forged[9:21], record.key_id)
    both = Keyring(counting_store, b"n" * 64, clock=clock, monotonic=clock, previous=[b"o" * 64, ROOT])
    for _ in range(2):  # a forged key that comes first must not be what the id stands for
        await assert_refused(both, forged)
        await both.authenticate(call(key))
    new, _ = await both.create()
    await both.finish()
    listed = await counting_store.list_keys()
    assert await both.keys_of_previous_secrets(listed) == {
        each.key_id for each in listed if each.key_id not in (record.key_id, new.key_id)
    }
    current = Keyring(counting_store, b"n" * 64, clock=clock, monotonic=clock)
    await current.authenticate(call(key))
    await assert_refused(current, unused)
    await assert_refused(Keyring(counting_store, ROOT), key)
    assert await current.keys_of_previous_secrets(listed) == set()


async def test_a_key_of_the_current_secret_made_before_the_rotation_is_noted_when_it_is_used(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    record, key = await keyring.create()
    both = Keyring(counting_store, ROOT, clock=clock, monotonic=clock, previous=[b"n" * 64])
    assert await both.keys_of_previous_secrets([record]) == {record.key_id}
    await both.authenticate(call(key))
    await both.finish()
    assert await both.keys_of_previous_secrets([record]) == set()
    assert (await counting_store.list_keys()) == [record]


async def test_servers_that_replace_a_digest_in_both_directions_lose_no_key(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    _, key = await keyring.create()
    servers = [
        Keyring(counting_store, current, clock=clock, monotonic=clock, previous=[previous])
        for current, previous in ((ROOT, b"n" * 64), (b"n" * 64, ROOT))
    ]
    for _ in range(3):
        clock.now += 31
        for server in servers:
            await server.authenticate(call(key))
        for server in servers:
            await server.finish()


async def test_the_digest_of_a_cached_key_is_replaced_once(
    keyring: Keyring, counting_store: CountingStore, clock: Clock
) -> None:
    _, key = await keyring.create()
    current = Keyring(counting_store, b"n" * 64, clock=clock, monotonic=clock, previous=[ROOT])
    for _ in range(3):
        await current.authenticate(call(key))
        await current.finish()
    assert counting_store.rehashed == 1


def contents(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in folder.iterdir()]


async def test_the_store_does_not_contain_the_secret(
    keyring: Keyring, counting_store: CountingStore, tmp_path: Path
) -> None:
    _, key = await keyring.create()
    secret = key[22:54].encode()
    assert contents(tmp_path)
    assert not any(secret in content for content in contents(tmp_path))


async def test_no_key_can_be_created_for_an_unknown_account(
    keyring: Keyring, counting_store: CountingStore
) -> None:
    with pytest.raises(UnknownAccountError):
        await keyring.create("nobody")
    assert await counting_store.list_keys() == []
