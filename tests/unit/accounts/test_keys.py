"""Keys: how they look, whom they speak for, and how soon they end. On the real store."""

from __future__ import annotations

import string
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.accounts.keys import CACHE_SIZE, Keyring, make_key, parse
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.stores import open_store
from pomelo.stores.accounts import UnknownAccountError
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord

ROOT = b"r" * 64


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Counting:
    """A store that counts the look-ups, in front of a real one; `during` runs within the next."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.asked: list[str] = []
        self.during = None

    async def get_key(self, key_id: str) -> KeyRecord | None:
        self.asked.append(key_id)
        record = await self.store.get_key(key_id)
        if self.during is not None:
            during, self.during = self.during, None
            await during()
        return record

    def __getattr__(self, name):
        return getattr(self.store, name)


@pytest.fixture
async def store(tmp_path) -> AsyncIterator[Counting]:
    async with open_store(f"sqlite:{tmp_path / 'keys.db'}") as opened:
        yield Counting(opened)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keyring(store, clock) -> Keyring:
    return Keyring(store, ROOT, clock=clock, monotonic=clock)


def call(key: str | None) -> Call:
    return Call(api_key=key, request_id="req_1", protocol="rest", deadline=0.0)


async def refused(keyring: Keyring, key: str | None) -> str:
    bad = call(key)
    with pytest.raises(PomeloError) as caught:
        await keyring.authenticate(bad)
    assert caught.value.code == "invalid_api_key"
    assert "X-Pomelo-Mode" not in bad.response_headers
    return caught.value.message


# --- how they look


@given(live=st.booleans(), draw=st.randoms(use_true_random=False))
def test_a_key_is_read_back_to_its_id(live, draw):
    key, key_id = make_key(live, draw.choice)
    assert key.startswith(f"pml_{'live' if live else 'test'}_{key_id}_")
    assert len(key) == 60
    assert parse(key) == key_id


@given(place=st.integers(0, 59), other=st.sampled_from(string.printable + "é\ud800"), live=st.booleans())
def test_a_key_with_one_wrong_character_is_junk(place, other, live):
    key, _ = make_key(live)
    changed = key[:place] + other + key[place + 1 :]
    assert changed == key or parse(changed) is None


@given(st.text(max_size=80))
def test_any_text_is_junk(text):
    assert parse(text) is None


def test_no_two_keys_are_alike():
    keys = {make_key(False)[0] for _ in range(1000)}
    assert len(keys) == len({key[9:21] for key in keys}) == 1000


# --- whom they speak for


async def test_a_key_speaks_for_its_account_mode_and_models(keyring):
    record, key = await keyring.create("default", live=True, models=("gpt-4",))
    good = call(key)
    principal = await keyring.authenticate(good)
    assert (principal.account, principal.key_id, principal.live) == ("default", record.key_id, True)
    assert principal.models == {"gpt-4"}
    assert good.response_headers["X-Pomelo-Mode"] == "live"


async def test_a_test_key_for_all_models_says_so(keyring):
    _, key = await keyring.create()
    good = call(key)
    assert (await keyring.authenticate(good)).models is None
    assert good.response_headers["X-Pomelo-Mode"] == "test"


async def test_no_key_and_a_bad_key_are_the_same_error_and_the_key_is_not_repeated(keyring):
    assert "Missing API key" in await refused(keyring, None)
    key, _ = make_key(False)
    for bad in ("", "x", key, "pml_test_" + "é" * 51, "\ud800" * 60, key * 1000):
        message = await refused(keyring, bad)
        assert bad == "" or bad not in message or bad == "x"


async def test_junk_never_reaches_the_store(keyring, store):
    key, _ = make_key(False)
    for junk in ("", "x" * 60, key[:-1] + ("a" if key[-1] != "a" else "b"), "' OR 1=1 --"):
        await refused(keyring, junk)
    assert store.asked == []
    await refused(keyring, key)
    assert len(store.asked) == 1


async def test_another_secret_or_mode_with_a_known_id_is_refused_cached_or_not(keyring):
    record, key = await keyring.create()
    other, other_id = make_key(False)
    forged = other.replace(other_id, record.key_id)
    for _ in range(2):
        await refused(keyring, forged)
        await refused(keyring, key.replace("pml_test_", "pml_live_"))
        await refused(keyring, key + "0")
        await keyring.authenticate(call(key))


async def test_a_key_is_worth_nothing_under_another_root_secret(keyring, store):
    _, key = await keyring.create()
    await refused(Keyring(store, b"other" * 10), key)


async def test_the_store_never_sees_the_secret(keyring, store, tmp_path):
    _, key = await keyring.create()
    secret = key[22:54].encode()
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert files
    assert not any(secret in content for content in files)


async def test_an_unknown_account_gets_no_key(keyring):
    with pytest.raises(UnknownAccountError):
        await keyring.create("nobody")
    assert await keyring.list() == []


# --- how soon they end


async def test_a_known_key_is_looked_up_once_in_thirty_seconds(keyring, store, clock):
    _, key = await keyring.create()
    for _ in range(3):
        await keyring.authenticate(call(key))
    assert len(store.asked) == 1
    clock.now += 30
    await keyring.authenticate(call(key))
    assert len(store.asked) == 2


async def test_an_expired_key_is_refused_from_that_moment_on_though_it_is_cached(keyring, clock):
    _, key = await keyring.create(expires=clock.now + 5)
    await keyring.authenticate(call(key))
    clock.now += 5
    await refused(keyring, key)


async def test_a_revoked_key_is_refused_at_once_and_revoking_again_changes_nothing(keyring, clock):
    record, key = await keyring.create()
    await keyring.authenticate(call(key))
    first = await keyring.revoke(record.key_id)
    await refused(keyring, key)
    clock.now += 5
    assert await keyring.revoke(record.key_id) == first


async def test_another_process_sees_a_revocation_within_thirty_seconds(keyring, store, clock):
    record, key = await keyring.create()
    other = Keyring(store, ROOT, clock=clock, monotonic=clock)
    await other.authenticate(call(key))
    await keyring.revoke(record.key_id)
    clock.now += 30
    await refused(other, key)


async def test_a_key_that_is_revoked_while_it_is_looked_up_does_not_stay_known(keyring, store):
    record, key = await keyring.create()

    async def revoke() -> None:
        await keyring.revoke(record.key_id)

    store.during = revoke
    await keyring.authenticate(call(key))
    await refused(keyring, key)


async def test_a_rotated_key_ends_and_its_successor_is_like_it(keyring):
    record, key = await keyring.create(live=True, models=("gpt-4", "flux-1-pro"), expires=2_000_000.0)
    await keyring.authenticate(call(key))
    successor, new = await keyring.rotate(record.key_id)
    await refused(keyring, key)
    principal = await keyring.authenticate(call(new))
    assert (principal.live, principal.models) == (True, {"gpt-4", "flux-1-pro"})
    assert successor.expires == record.expires


async def test_a_revoked_or_expired_key_has_no_successor(keyring, clock):
    revoked, _ = await keyring.create()
    await keyring.revoke(revoked.key_id)
    expired, _ = await keyring.create(expires=clock.now)
    for record in (revoked, expired):
        with pytest.raises(PomeloError) as caught:
            await keyring.rotate(record.key_id)
        assert (caught.value.code, caught.value.field) == ("invalid_parameter", "key_id")
    assert len(await keyring.list()) == 2


async def test_an_unknown_key_can_not_be_rotated_or_revoked(keyring):
    for attempt in (keyring.rotate("nothing"), keyring.revoke("nothing")):
        with pytest.raises(PomeloError) as caught:
            await attempt
        assert caught.value.code == "not_found"


async def test_the_cache_does_not_grow_without_end(clock):
    class Any:
        """Knows every key."""

        async def get_key(self, key_id: str) -> KeyRecord | None:
            return KeyRecord(key_id, "default", False, b"", (), 0.0)

        async def get_account(self, name: str) -> None:
            return None

    keyring = Keyring(Any(), ROOT, clock=clock, monotonic=clock)
    for _ in range(CACHE_SIZE + 50):
        await refused(keyring, make_key(False)[0])
    assert len(keyring._known) == CACHE_SIZE


# --- failed keys of an address


async def refusal(keyring: Keyring, key: str | None, address: str = "192.0.2.1") -> PomeloError:
    bad = call(key)
    bad.address = address
    with pytest.raises(PomeloError) as caught:
        await keyring.authenticate(bad)
    return caught.value


async def test_too_many_failed_keys_of_an_address_get_rate_limit_exceeded(keyring, clock):
    record, revoked = await keyring.create()
    await keyring.revoke(record.key_id)
    bad = [None, "junk", revoked, make_key(False)[0]]
    assert {(await refusal(keyring, bad[n % 4])).code for n in range(20)} == {"invalid_api_key"}
    clock.now += 15
    for key in bad:
        error = await refusal(keyring, key)
        assert (error.code, error.retry_after) == ("rate_limit_exceeded", 45)
        assert "API key" in error.message
        assert key is None or key not in error.message
        assert (await refusal(keyring, key, "192.0.2.2")).code == "invalid_api_key"
    clock.now += 45
    assert (await refusal(keyring, "junk")).code == "invalid_api_key"


async def test_a_good_key_is_never_refused_for_its_address(keyring, clock):
    _, known = await keyring.create()
    await keyring.authenticate(call(known))
    for number in range(100):
        await refusal(keyring, "junk" if number % 2 else make_key(False)[0])
    _, new = await keyring.create()
    for key in (known, new):
        good = call(key)
        good.address = "192.0.2.1"
        assert (await keyring.authenticate(good)).account == "default"
    clock.now += 31
    good = call(known)
    good.address = "192.0.2.1"
    await keyring.authenticate(good)


async def test_an_address_above_the_limit_costs_no_look_up_for_junk_or_the_same_key_again(keyring, store):
    unknown, _ = make_key(False)
    for _ in range(20):
        await refusal(keyring, unknown)
    asked = len(store.asked)
    for _ in range(50):
        assert (await refusal(keyring, unknown)).code == "rate_limit_exceeded"
    for _ in range(50):
        await refusal(keyring, "junk")
    assert len(store.asked) == asked
