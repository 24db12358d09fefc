"""The scripts of the store on Redis: what they leave in the server, and what they do with its damage."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from redis.exceptions import ResponseError

from pomelo.stores.accounts import Grant, OverdrawnError, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import Budget, IdempotencyKey, LostReservationError, Reserved, ReserveRequest
from pomelo.stores.redis import key_names
from pomelo.stores.redis.key_names import WALLETS, member, names
from pomelo.stores.redis.wallet_index import StoredReservation
from tests.contract.ledger_rig import KEY, WALLET, record, request, settlement
from tests.contract.redis_rig import FaultyClient, Opener
from tests.contract.test_ledger_budgets import DAY, NAME, limited
from tests.redis_server import RedisServer
from tests.unit.refusals import refused

NAMES = names(WALLET)
ACT = Act("act", 5.0, "test", account="acme")
API_KEY = KeyRecord("k1", "acme", True, b"x", (), 5.0, name="web", budget="5/day")


@pytest.fixture
async def store(opened: Opener) -> Any:
    """A store that is alone with its server, and remembers ends of tasks for longer than answers."""
    ttls = {"answer_ttl": 10_000.0, "tombstone_ttl": 50_000.0, "void_ttl": 50_000.0}
    return await opened(drain=3600.0, heartbeat=3600.0, **ttls)


# --- what stays

ENDS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "settled": lambda store: store.settle(settlement("a", answer=b"hello")),
    "voided": lambda store: store.void(WALLET, "a"),
    "recovered": lambda store: store.recover(WALLET, "a"),
    "undone before it arrived": lambda store: store._void(WALLET, "a", True, "another-call"),
}


@pytest.mark.parametrize("end", ENDS)
async def test_the_end_of_a_task_is_remembered_for_a_time(store: Any, server: RedisServer, end: str) -> None:
    if end != "undone before it arrived":
        await store.reserve(request("a", idempotency_key=KEY))
    await ENDS[end](store)
    assert 40_000 < server.do("TTL", NAMES.tombstone("a")) <= 50_000
    if end == "settled":
        assert 5_000 < server.do("TTL", NAMES.answer(KEY.key)) <= 10_000


async def test_a_task_that_was_never_begun_is_forgotten_soon(opened: Opener, server: RedisServer) -> None:
    store = await opened()
    for task_id in ("a", "b"):
        await store.reserve(request(task_id))
    await store.void(WALLET, "a", refund=True)
    await store.settle(settlement("b"))
    assert 0 < server.do("TTL", NAMES.tombstone("a")) <= 600
    assert server.do("TTL", NAMES.tombstone("b")) > 80_000


async def test_a_key_whose_task_is_gone_is_free_and_forgets_it(store: Any, server: RedisServer) -> None:
    await store.reserve(request("a", idempotency_key=KEY))
    server.do("HDEL", NAMES.holds, "a")
    server.do("HSET", NAMES.answer(KEY.key), "record", "{}")
    assert isinstance(await store.reserve(request("b", idempotency_key=KEY)), Reserved)
    assert server.do("HGETALL", NAMES.answer(KEY.key)) == {b"fingerprint": KEY.fingerprint, b"task": b"b"}


# --- calls that arrive late


@pytest.mark.parametrize("arrived_before", [False, True])
async def test_a_reserve_that_arrives_after_its_void_is_not_done(store: Any, arrived_before: bool) -> None:
    if arrived_before:
        assert isinstance(await store._reserve(request("a"), "call-1"), Reserved)
        await store.void(WALLET, "a")
    else:
        await store._void(WALLET, "a", True, "call-1")
    with pytest.raises(LostReservationError):
        await store._reserve(request("a"), "call-1")
    assert isinstance(await store._reserve(request("a"), "call-2"), Reserved)


async def test_only_the_worker_that_has_a_reservation_loses_it(store: Any, server: RedisServer) -> None:
    await store.reserve(request("a", idempotency_key=KEY))
    for worker, key in (("own_before", "=" + KEY.key), (store._worker.id, "")):
        await store._worker._recover(StoredReservation(WALLET, "a", worker, 10, key))
        assert server.do("HLEN", NAMES.holds) == 1
    assert (await store.settle(settlement("a", 7))).record.cost == 7


# --- damage


def task(task_id: str) -> ReserveRequest:
    """A task that uses every key of the wallet."""
    key = IdempotencyKey(f"order-{task_id}", b"f")
    return replace(request(task_id, tokens=3, idempotency_key=key), budget=Budget("budget:k1.day", 100, 5.0))


def of_task(task_id: str) -> list[str]:
    return NAMES.of_task(task_id, f"=order-{task_id}")


NEW_KEY = [
    *(key_names.KEYS, key_names.REVOKED, key_names.KEY_NAMES, key_names.BUDGETS),
    *(key_names.KEY_ORDER, key_names.key_order("acme"), key_names.KEY_ACTS),
]
CHANGES: dict[str, tuple[Callable[[Any], Awaitable[Any]], list[str]]] = {
    "reserve": (lambda store: store.reserve(task("b")), of_task("b")),
    "settle": (lambda store: store.settle(settlement("a", answer=b"hello")), [*of_task("a"), NAMES.usage]),
    "void": (lambda store: store.void(WALLET, "a", refund=True), of_task("a")),
    "recover": (lambda store: store.recover(WALLET, "a"), [*of_task("a"), NAMES.usage]),
    "note": (lambda store: store.note([record("a", cost=6)]), [NAMES.holds, NAMES.drafts]),
    "grant": (
        lambda store: store.grant(Grant("h", WALLET, 5, 1.0), ACT),
        [NAMES.wallet, NAMES.holds, NAMES.grants, NAMES.acts],
    ),
    "set_credit_limit": (
        lambda store: store.set_credit_limit(WALLET, 5, ACT),
        [NAMES.wallet, NAMES.holds, NAMES.acts],
    ),
    "add_account": (
        lambda store: store.add_account("bee", "pro", 1.0, ACT),
        [key_names.ACCOUNTS, key_names.PLANS, key_names.ACCOUNT_ORDER, key_names.ACCOUNT_ACTS],
    ),
    "set_plan": (
        lambda store: store.set_plan("acme", "scale", ACT),
        [key_names.ACCOUNTS, key_names.PLANS, key_names.ACCOUNT_ACTS],
    ),
    "set_disabled": (
        lambda store: store.set_disabled("acme", 1.0, ACT),
        [key_names.ACCOUNTS, key_names.DISABLED, key_names.ACCOUNT_ACTS],
    ),
    "add_key": (lambda store: store.add_key(replace(API_KEY, key_id="k2"), ACT), NEW_KEY),
    "replace_key": (
        lambda store: store.replace_key("k1", replace(API_KEY, key_id="k2"), 9.0, ACT, expires=8.0),
        NEW_KEY,
    ),
    "revoke_key": (
        lambda store: store.revoke_key("k1", 9.0, ACT),
        [key_names.KEYS, key_names.REVOKED, key_names.KEY_ACTS],
    ),
    "set_budget": (
        lambda store: store.set_budget("k1", "6/day", ACT),
        [key_names.KEYS, key_names.BUDGETS, key_names.KEY_ACTS],
    ),
    "rehash_key": (
        lambda store: store.rehash_key("k1", b"x", b"y", "s2"),
        [key_names.KEYS, key_names.KEY_SECRETS],
    ),
}


def contents(server: RedisServer, damaged: str) -> dict[bytes, bytes]:
    """What the scripts of a change write, but for the damaged key."""
    apart = {damaged, key_names.WORKERS, key_names.WALLETS, key_names.GRANTED}
    return {key: server.do("DUMP", key) for key in server.do("KEYS", "*") if key.decode() not in apart}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_key_of_a_wrong_type_leaves_no_change_half_done(
    store: Any, server: RedisServer, change: str
) -> None:
    do, used = CHANGES[change]
    for damaged in used:
        server.do("FLUSHALL")
        await store.add_account("acme", "pro", 1.0)
        await store.grant(Grant("g", WALLET, 1_000, 1.0))
        await store.add_key(API_KEY)
        await store.reserve(task("a"))
        await store.note([record("a", cost=5)])
        server.do("DEL", damaged)
        # A tombstone is a text, so a text would be right there.
        server.do("SADD", damaged, "wrong")
        before = contents(server, damaged)
        with refused("store_unavailable"):
            await do(store)
        assert contents(server, damaged) == before, damaged
    server.do("FLUSHALL")  # ends the repetitions of settle and void


async def test_acts_that_were_moved_to_the_log_do_not_stay_where_they_were_written(
    store: Any, server: RedisServer
) -> None:
    await store.set_plan("acme", "scale", ACT)
    await store.add_key(API_KEY, replace(ACT, act_id="key"))
    await store.grant(Grant("more", WALLET, 5, 1.0), replace(ACT, act_id="grant"))
    sources = [key_names.ACCOUNT_ACTS, key_names.KEY_ACTS, NAMES.acts]
    assert [server.do("HLEN", source) for source in sources] == [1, 1, 1]
    assert len(await store.list_acts(limit=9)) == 3
    assert [server.do("HLEN", source) for source in sources] == [0, 0, 0]


@pytest.mark.parametrize("expires", [None, 8.0])
async def test_a_key_that_changes_while_it_is_replaced_stays_as_it_is(
    store: Any, server: RedisServer, expires: float | None
) -> None:
    await store.add_key(API_KEY)

    def rehash(command: tuple[Any, ...]) -> bool:
        if "k2" in command:  # the command that replaces the key
            text = server.do("HGET", key_names.KEYS, "k1")
            server.do("HSET", key_names.KEYS, "k1", text.replace(b"78", b"79"))
        return False

    FaultyClient(store, 20.0).hits = rehash
    assert not await store.replace_key("k1", replace(API_KEY, key_id="k2"), 9.0, ACT, expires=expires)
    assert await store.list_keys("acme") == [replace(API_KEY, digest=b"y")]


async def test_a_wallet_that_was_overdrawn_gets_credits_and_a_higher_limit(
    store: Any, server: RedisServer
) -> None:
    server.do("HINCRBY", NAMES.wallet, "spent", 5_000)
    assert (await store.set_credit_limit(WALLET, 10)).available == 1_010 - 5_000
    assert (await store.grant(Grant("more", WALLET, 20, 1.0))).available == 1_030 - 5_000
    with pytest.raises(OverdrawnError):
        await store.set_credit_limit(WALLET, 9)


async def test_credits_that_lua_would_round_are_refused(store: Any, server: RedisServer) -> None:
    server.do("HSET", NAMES.wallet, "granted", 2**53 - 10)
    with refused("invalid_parameter", "credits"):
        await store.grant(Grant("more", WALLET, 10, 1.0))
    with refused("invalid_parameter", "credits"):
        await store.set_credit_limit(WALLET, 10)
    assert (await store.grant(Grant("more", Wallet("acme", False), 10, 1.0))).granted == 10
    assert (await store.grant(Grant("less", WALLET, 9, 1.0))).granted == 2**53 - 1


async def test_a_budget_below_what_a_task_returns_is_0(store: Any, server: RedisServer) -> None:
    await store.reserve(limited("a"))
    server.do("HSET", NAMES.wallet, NAME, 3)
    await store.void(WALLET, "a")
    assert (await store.budget_use(WALLET, [Budget(NAME, 100, DAY)]))[0].used == 0


async def test_balances_and_states_are_those_of_their_wallets(store: Any) -> None:
    """Several wallets in one call; only some have data."""
    test = Wallet("acme", False)
    await store.add_account("bee", "free", 2.0)
    await store.grant(Grant("t", test, 50, 1.0))
    await store.set_credit_limit(test, 7)
    await store.reserve(request("a", 20, live=False))
    listed = {each.name: each for each in await store.list_accounts()}
    for name in ("acme", "bee", "default"):
        assert listed[name].live == await store.balance(Wallet(name, True))
        assert listed[name].test == await store.balance(Wallet(name, False))


async def test_acts_stay_where_they_are_until_the_log_has_them(opened: Opener) -> None:
    store = await opened()
    await store.set_plan("acme", "scale", Act("a1", 1.0, "op", account="acme", new="scale"))
    faults = FaultyClient(store)
    faults.error = lambda: ResponseError("OOM command not allowed")
    faults.hits = lambda command: command[0] == "ZADD"
    with refused("store_unavailable"):
        await store.list_acts(limit=9)
    faults.end()
    assert [act.act_id for act in await store.list_acts(limit=9)] == ["a1"]
    assert [act.act_id for act in await store.list_acts("acme", limit=9)] == ["a1"]


async def test_a_wallet_that_could_not_be_listed_is_listed_by_the_next_reserve(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    await store.add_account("bee", "pro", 1.0)
    faults = FaultyClient(store)
    faults.error = lambda: ResponseError("OOM command not allowed")
    faults.hits = lambda command: command[0] == "SADD"
    with refused("store_unavailable"):
        await store.reserve(request("a", 0, account="bee"))
    faults.end()
    await store.reserve(request("a", 0, account="bee"))
    assert server.do("SISMEMBER", WALLETS, member(Wallet("bee", True))) == 1


async def test_a_task_that_ends_while_the_reservations_are_read_is_not_among_them(
    server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    for task in ("a", "b"):
        await store.reserve(request(task))
    keys = names(WALLET)

    def end_first(command: tuple[Any, ...]) -> bool:
        if command[0] == "HMGET" and keys.drafts in command:
            server.do("HDEL", keys.holds, "a")
            server.do("HDEL", keys.drafts, "a")
        return False

    FaultyClient(store, 20.0).hits = end_first
    assert [each.record.task_id for each in await store.reservations()] == ["b"]
