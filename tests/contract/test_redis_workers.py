"""The workers of the store on Redis, and how a store opens and closes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as errors

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Balance, Grant, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.keys import KeyRecord
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import WALLETS, WORKERS, names, search_turn
from pomelo.stores.redis.scripts import HEARTBEAT
from pomelo.stores.redis.workers import Worker
from tests.contract.ledger_rig import WALLET, abandon, request, run_task, settlement
from tests.contract.redis_rig import (
    IDLE,
    ONE_SERVER,
    FaultyClient,
    Opener,
    abandon_dead,
    lose_replies,
    open_on,
    open_with_credits,
    until,
)
from tests.redis_server import RedisServer
from tests.unit.refusals import refused

pytestmark = ONE_SERVER

NAMES = names(WALLET)


# --- workers


async def test_opening_recovers_the_tasks_of_workers_that_are_known_to_be_dead(
    server: RedisServer, tmp_path: Path, opened: Opener
) -> None:
    dying = await opened(**IDLE)
    await dying.reserve(request("a"))
    await abandon_dead(dying, server)
    async with open_on(server.url, tmp_path, **IDLE) as store:
        assert await store.drafts() == []
        assert server.do("HKEYS", WORKERS) == [store._worker.id.encode()]


async def test_opening_watches_workers_that_only_their_reservations_name(
    server: RedisServer, tmp_path: Path, opened: Opener
) -> None:
    dying = await opened(**IDLE)
    await dying.reserve(request("a"))
    await abandon(dying)
    server.do("DEL", WORKERS)
    async with open_on(server.url, tmp_path, **IDLE) as store:
        workers = {dying._worker.id.encode(), store._worker.id.encode()}
        assert set(server.do("HKEYS", WORKERS)) == workers
        assert [each.task_id for each in await store.drafts()] == ["a"]
    async with open_on(server.url, tmp_path, heartbeat=0.01) as store:
        server.do("HDEL", WORKERS, dying._worker.id)
        await until(lambda: server.do("HEXISTS", WORKERS, dying._worker.id) == 1)


@pytest.mark.parametrize("command", [HEARTBEAT.digest, "HGETALL"])
async def test_opening_waits_for_a_busy_server(opened: Opener, command: str) -> None:
    store = await opened(**IDLE)
    client = FaultyClient(store, timeout=0.1)
    busy_until = time.monotonic() + 0.5
    client.error = errors.ConnectionError
    client.hits = lambda sent: command in sent and time.monotonic() < busy_until
    worker = Worker(store._connection, store._wallet_index, time.monotonic)
    await worker.open()
    assert client.failed
    client.end()
    await worker.stop()


@pytest.fixture
async def clock() -> list[float]:
    return [5_000.0]


@pytest.fixture
async def clocked(server: RedisServer, tmp_path: Path, clock: list[float]) -> AsyncIterator[Any]:
    """A store whose worker is dead after 100 s of `clock[0]`, and does nothing by itself."""
    async with open_redis(
        *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
        timing=Timing(timeout=20.0, dead_after=100.0, **IDLE),
        monotonic=lambda: clock[0],
    ) as store:
        yield store


async def test_a_worker_that_was_silent_for_long_sends_a_heartbeat_before_it_reserves(
    server: RedisServer, clocked: Any, clock: list[float]
) -> None:
    worker = clocked._worker
    first = worker.id
    await clocked.reserve(request("a", 0, account="default"))
    for seconds, heartbeats in ((59.0, b"1"), (2.0, b"2"), (59.0, b"2"), (2.0, b"3")):
        clock[0] += seconds
        await clocked.reserve(request(f"t{clock[0]}", 0, account="default"))
        assert server.do("HGET", WORKERS, worker.id) == heartbeats
    assert worker.id == first
    # If it was marked dead meanwhile, its new reservations are those of another worker.
    server.do("HSET", WORKERS, first, "dead")
    clock[0] += 61.0
    await clocked.reserve(request("new", 0, account="default"))
    assert worker.id != first
    assert server.do("HGET", WORKERS, worker.id) == b"1"
    found = {one.record.task_id: one.own for one in await clocked.reservations()}
    assert (found["a"], found["new"]) == (False, True)


async def test_a_worker_is_silent_since_it_has_sent_its_last_heartbeat_not_since_the_reply(
    server: RedisServer, clocked: Any, clock: Any
) -> None:
    worker = clocked._worker
    # Its reply takes 40 s.
    FaultyClient(clocked, 20.0).hits = lambda command: bool(clock.append(clock.pop() + 40.0))
    await worker._send_heartbeat()
    assert worker.is_live
    clock[0] += 21.0
    assert not worker.is_live


async def test_a_worker_that_was_removed_while_it_was_silent_gets_a_new_id(
    server: RedisServer, clocked: Any, clock: list[float]
) -> None:
    worker = clocked._worker
    first = worker.id
    server.do("HDEL", WORKERS, first)  # as a server does that has lost what it had
    clock[0] += 59.0
    await worker._send_heartbeat()
    assert worker.id == first
    server.do("HDEL", WORKERS, first)  # as a process does that has recovered its tasks
    clock[0] += 61.0
    await clocked.reserve(request("new", 0, account="default"))
    assert worker.id != first
    assert [one.own for one in await clocked.reservations()] == [True]


async def test_a_worker_that_was_removed_gets_a_new_id_although_the_reply_to_a_heartbeat_is_lost(
    server: RedisServer, clocked: Any, clock: list[float]
) -> None:
    worker = clocked._worker
    first = worker.id
    server.do("HDEL", WORKERS, first)
    clock[0] += 61.0
    faults = lose_replies(clocked, first)
    await worker.ensure_live()
    assert len(faults.failed) == 2
    assert worker.id != first
    assert server.do("HKEYS", WORKERS) == [worker.id.encode()]


async def test_heartbeats_that_find_their_worker_marked_dead_agree_on_a_new_id(
    server: RedisServer, opened: Opener
) -> None:
    worker = (await opened(**IDLE))._worker
    server.do("HSET", WORKERS, worker.id, "dead")
    await asyncio.gather(*[worker._send_heartbeat() for _ in range(3)])
    live = [name for name in server.do("HKEYS", WORKERS) if server.do("HGET", WORKERS, name) != b"dead"]
    assert live == [worker.id.encode()]


@asynccontextmanager
async def open_watched(
    server: RedisServer, tmp_path: Path, clock: Sequence[float]
) -> AsyncIterator[tuple[Any, Any]]:
    """A store with the running task a; and one whose worker finds others dead after 100 s of `clock[0]`."""
    opening = open_redis(
        *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
        timing=Timing(timeout=20.0, heartbeat=3600.0, dead_after=100.0),
        monotonic=lambda: clock[0],
    )
    async with AsyncExitStack() as stack:
        other = await open_with_credits(stack, server, tmp_path, **IDLE)
        await other.reserve(request("a"))
        yield other, await stack.enter_async_context(opening)


async def test_the_process_that_recovers_a_task_is_the_only_one_that_logs_it(
    server: RedisServer, caplog: pytest.LogCaptureFixture, opened: Opener
) -> None:
    dying, *others = [await opened(**IDLE) for _ in range(3)]
    for task in ("a", "b", "damaged"):
        await dying.reserve(request(task, 0, live=task != "damaged"))
    await abandon(dying)
    damaged = names(Wallet(WALLET.account, False)).usage
    server.do("SET", damaged, "not a stream")
    found = await others[0]._wallet_index.reservations()
    for other in others:
        with refused("store_unavailable"):
            await other._worker._recover_all({dying._worker.id}, found)
    logged = [message for message in caplog.messages if "were recovered" in message]
    assert logged == ["2 tasks of processes that ended were recovered"]
    server.do("DEL", damaged)


async def test_all_wallets_are_not_searched_in_each_round_for_a_task_that_can_not_be_ended(
    server: RedisServer, opened: Opener
) -> None:
    dying, store = [await opened(**IDLE) for _ in range(2)]
    await dying.reserve(request("a"))
    await abandon_dead(dying, server)
    server.do("SET", NAMES.usage, "not a stream")
    server.do("SET", search_turn("reservations"), "")
    searches = []

    def searched(command: tuple[Any, ...]) -> bool:
        if command[0] == "SSCAN":
            searches.append(store._worker._rounds)
        return False

    FaultyClient(store, 20.0).hits = searched
    for _ in range(20):
        with suppress(PomeloError):
            await store._worker._watch()
    assert searches == [1, 10, 20]
    server.do("DEL", NAMES.usage)


async def test_a_worker_that_is_alive_is_not_marked_dead(server: RedisServer, tmp_path: Path) -> None:
    clock = [0.0]
    async with open_watched(server, tmp_path, clock) as (other, watcher):

        async def check(seconds: float) -> None:
            clock[0] += seconds
            await watcher._worker._check_workers()

        for _ in range(5):
            await check(99.0)
            await other._worker._send_heartbeat()
            await check(0.5)
        await check(99.0)
        assert other._worker.id.encode() in server.do("HKEYS", WORKERS)
        # Its own count does not change either, as it sends no heartbeats here.
        await check(1.0)
        assert server.do("HKEYS", WORKERS) == [watcher._worker.id.encode()]
        assert await watcher.drafts() == []


async def test_a_time_in_which_nobody_watched_marks_no_worker_dead(
    server: RedisServer, tmp_path: Path
) -> None:
    clock = [0.0]
    async with open_watched(server, tmp_path, clock) as (_, watcher):
        # This process, or the server, was stopped for more than three of its own heartbeats.
        for seconds, running in ((3 * 3600.0 + 21.0, ["a"]), (99.0, ["a"]), (1.0, [])):
            clock[0] += seconds
            await watcher._worker._check_workers()
            assert [each.task_id for each in await watcher.drafts()] == running


async def test_a_heartbeat_that_comes_during_a_check_saves_its_worker(
    server: RedisServer, tmp_path: Path
) -> None:
    clock = [0.0]
    async with open_watched(server, tmp_path, clock) as (other, watcher):
        worker = other._worker.id
        count, _ = watcher._worker._counts[worker]
        await other._worker._send_heartbeat()
        watcher._worker._counts[worker] = (server.do("HGET", WORKERS, worker), 0.0)
        clock[0] = 101.0
        faults = FaultyClient(watcher, 20.0)

        def beats(command: tuple[Any, ...]) -> bool:
            """Lets the other worker send a heartbeat just before it would be marked dead."""
            if command[0] == "EVALSHA" and worker in command:
                server.do("HINCRBY", WORKERS, worker, 1)
            return False

        faults.hits = beats
        await watcher._worker._check_workers()
        assert int(server.do("HGET", WORKERS, worker)) == int(count) + 2
        assert [each.task_id for each in await watcher.drafts()] == ["a"]


async def test_a_store_that_can_not_recover_its_tasks_closes_as_a_dead_worker_and_stops_no_other(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path, **IDLE)
        await store.reserve(request("a"))
        server.do("DEL", NAMES.usage)
        server.do("SET", NAMES.usage, "not a stream")
        await stack.aclose()
        assert server.do("HGETALL", WORKERS) == {store._worker.id.encode(): b"dead"}
        caplog.clear()
        async with open_on(server.url, tmp_path, **IDLE) as other:
            assert len(await other.drafts()) == 1
        assert any(message.startswith("A task of live/acme can't be ended") for message in caplog.messages)
        server.do("DEL", NAMES.usage)
        async with open_on(server.url, tmp_path, **IDLE) as again:
            assert await again.drafts() == []


async def test_closing_moves_the_records_of_this_process_and_recovers_its_tasks(
    server: RedisServer, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path, **IDLE)
        await run_task(store, "a")
        await store.reserve(request("left"))
    assert (server.do("XLEN", NAMES.usage), server.do("HLEN", NAMES.holds)) == (0, 0)


async def test_closing_reads_the_wallets_of_this_process_alone(server: RedisServer, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path, **IDLE)
        other = await open_with_credits(stack, server, tmp_path, **IDLE)
        await other.reserve(request("other", 0, live=False))
        await store.reserve(request("a"))
        sent: list[tuple[Any, ...]] = []

        def sends(command: tuple[Any, ...]) -> bool:
            sent.append(command)
            return False

        FaultyClient(store, 20.0).hits = sends
        await store.close()
        assert server.do("HKEYS", NAMES.holds) == []
        assert server.do("HKEYS", WORKERS) == [other._worker.id.encode()]
        assert [command for command in sent if "HGETALL" in command] == [("HGETALL", NAMES.holds)]
        assert not [command for command in sent if WALLETS in command]


async def test_closing_waits_for_a_settlement_that_is_repeated(server: RedisServer, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        store = await open_with_credits(stack, server, tmp_path, close=30.0, **IDLE)
        await store.reserve(request("a"))
        faults = FaultyClient(store, 0.02)
        faults.hits = lambda command: NAMES.usage in command
        with pytest.raises(PomeloError):
            await store.settle(settlement("a", 7))
        closing = asyncio.create_task(stack.aclose())
        failed = len(faults.failed)
        await until(lambda: len(faults.failed) > failed)
        assert not closing.done()
        faults.end()
        await closing
        async with open_on(server.url, tmp_path, **IDLE) as again:
            assert await again.balance(WALLET) == Balance(1_000, 7, 0)


async def test_the_list_of_wallets_is_restored_after_a_failover(server: RedisServer, opened: Opener) -> None:
    store = await opened(heartbeat=0.01, drain=3600.0)
    await store.reserve(request("a", 0, live=False))
    before = set(server.do("SMEMBERS", WALLETS))
    assert before == {b"live/acme", b"test/acme", b"test/default"}
    server.do("DEL", WALLETS)
    await until(lambda: set(server.do("SMEMBERS", WALLETS)) == before)


# --- replies that are lost

KEY = KeyRecord("k1", "acme", True, b"x", (), 5.0)
CHANGES: dict[str, tuple[Callable[[Any, Act], Awaitable[Any]], Any]] = {
    "add_account": (lambda store, act: store.add_account("bee", "pro", 1.0, act), True),
    "set_plan": (lambda store, act: store.set_plan("acme", "scale", act), True),
    "set_disabled": (lambda store, act: store.set_disabled("acme", 1.0, act), True),
    "grant": (lambda store, act: store.grant(Grant("h", WALLET, 5, 1.0), act), Balance(1_005)),
    "set_credit_limit": (
        lambda store, act: store.set_credit_limit(WALLET, 5, act),
        Balance(1_000, credit_limit=5),
    ),
    "add_key": (lambda store, act: store.add_key(replace(KEY, key_id="k2"), act), None),
    "revoke_key": (lambda store, act: store.revoke_key("k1", 9.0, act), replace(KEY, revoked=9.0)),
    "replace_key": (lambda store, act: store.replace_key("k1", replace(KEY, key_id="k2"), 9.0, act), True),
    "set_budget": (lambda store, act: store.set_budget("k1", "5/day", act), True),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_whose_reply_is_lost_is_made_once(change: str, opened: Opener) -> None:
    act = Act("act", 5.0, "test", account="acme")
    do, expected = CHANGES[change]
    store = await opened(**IDLE)
    await store.add_key(KEY)
    faults = lose_replies(store, "act")
    assert await do(store, act) == expected
    assert len(faults.failed) == 2
    assert len(await store.list_acts(limit=9)) == 1
