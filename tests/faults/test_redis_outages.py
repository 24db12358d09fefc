"""The store on Redis while its server, or the way there, is in trouble: nothing is taken unseen, nothing charged
twice, and what ran is settled when the server is back."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as errors

from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    Grant,
    LostReservationError,
    Reserved,
    ReserveRequest,
    Settlement,
    UsageQuery,
    UsageRecord,
    Wallet,
)
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import OWNERS
from tests.faults.tcp_proxy import TcpProxy
from tests.redis_server import RedisServer

SETTLES = int(os.environ.get("POMELO_REDIS_SETTLES", "2000"))
"""How many tasks run while answers are lost."""

WALLET = Wallet("default", True)
ALL = UsageQuery()
CREDITS = 10**12


def record(task_id: str, **changes: Any) -> UsageRecord:
    values = {"request_id": "r", "account": "default", "live": True, "key_id": "k", "wire": "rest"}
    return UsageRecord(task_id, **(values | {"model": "gpt-4", "task_type": "text"} | changes))


def taking(task_id: str) -> ReserveRequest:
    return ReserveRequest(record(task_id), 10, 10, tokens=5)


def ending(task_id: str, cost: int = 7) -> Settlement:
    return Settlement(record(task_id, cost=cost, at=5.0), 5)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


def opening(url: str, folder: Path, **timing: float) -> Any:
    return open_redis(url, f"sqlite:{folder / 'usage.db'}", timing=Timing(**timing))


@pytest.fixture
async def store(server: RedisServer, tmp_path: Path) -> AsyncIterator[Store]:
    async with opening(server.url, tmp_path) as opened:
        await opened.grant(Grant("g", WALLET, CREDITS, 1.0))
        yield opened


async def fails_within_a_second(asked: Awaitable[Any]) -> None:
    begun = time.monotonic()
    with pytest.raises(PomeloError) as caught:
        await asked
    assert caught.value.code == "store_unavailable"
    assert time.monotonic() - begun < 1.0 + LATE


LATE = 0.3
"""How late a busy machine may be."""


async def comes_back(store: Store) -> None:
    """Waits until the store does again what it is asked."""
    async with asyncio.timeout(30):
        while True:
            try:
                await store.balance(WALLET)
            except PomeloError:
                await asyncio.sleep(0.01)
            else:
                return


async def holds(store: Store, *expected: str) -> None:
    """Waits until just these tasks hold something."""
    async with asyncio.timeout(30):
        while sorted([held.task_id for held in await store.held()]) != sorted(expected):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def until(there: Callable[[], bool]) -> None:
    """Waits for a condition."""
    async with asyncio.timeout(30):
        while not there():  # noqa: ASYNC110 - nothing tells when.
            await asyncio.sleep(0.005)


async def audit(store: Store, tasks: set[str], cost: int = 7) -> None:
    """The tasks were charged once each, and nothing else was."""
    kept, after = await store.list_usage(ALL, limit=len(tasks) + 10)
    assert after == ""
    assert sorted(found.task_id for found in kept) == sorted(tasks)
    found = await store.balance(WALLET)
    assert (found.granted, found.spent, found.held) == (CREDITS, sum(r.cost for r in kept), 0)
    assert found.spent == cost * len(tasks)
    assert (await store.limit_status(WALLET)).concurrency == 0


async def run_through_a_fault(store: Store, begin: Any, end: Any) -> None:
    """A task that runs is settled after the fault; in it, all fails in time and nothing is taken."""
    assert isinstance(await store.reserve(taking("before")), Reserved)
    begin()
    settling = asyncio.ensure_future(store.settle(ending("before")))
    for number in range(3):
        await fails_within_a_second(store.reserve(taking(f"in{number}")))
    await fails_within_a_second(settling)
    await fails_within_a_second(store.balance(WALLET))
    await fails_within_a_second(store.get_key("a"))
    await fails_within_a_second(store.note([record("before", cost=3)]))
    await fails_within_a_second(store.list_usage(ALL, limit=1))
    end()
    await comes_back(store)
    await holds(store)
    assert (await store.settle(ending("before"))).record.cost == 7
    assert isinstance(await store.reserve(taking("after")), Reserved)
    await store.settle(ending("after"))
    await audit(store, {"before", "after"})


async def test_a_server_that_is_killed_and_started_again(server, store):
    await run_through_a_fault(store, server.kill, server.start)


async def test_a_server_that_hangs(server, store):
    await run_through_a_fault(store, server.stop, server.go_on)


async def test_a_server_whose_clients_are_paused(server, store):
    await run_through_a_fault(
        store,
        lambda: server.do("CLIENT", "PAUSE", "600000", "ALL"),
        # It answers nobody until it is started again.
        lambda: (server.kill(), server.start()),
    )


async def test_a_server_that_became_a_replica(server, store):
    await store.reserve(taking("before"))
    server.do("REPLICAOF", "127.0.0.1", "1")
    await fails_within_a_second(store.reserve(taking("in")))
    await fails_within_a_second(store.settle(ending("before")))
    server.do("REPLICAOF", "NO", "ONE")
    await holds(store)
    await audit(store, {"before"})


async def test_a_server_that_is_out_of_memory_takes_nothing_and_settles_what_runs(server, store):
    await store.reserve(taking("before"))
    server.do("CONFIG", "SET", "maxmemory", "1")
    await fails_within_a_second(store.reserve(taking("in")))
    await fails_within_a_second(store.grant(Grant("more", WALLET, 5, 1.0)))
    assert (await store.settle(ending("before"))).record.cost == 7
    await audit(store, {"before"})
    server.do("CONFIG", "SET", "maxmemory", "0")
    assert isinstance(await store.reserve(taking("after")), Reserved)


def is_loading(server: RedisServer) -> bool:
    try:
        server.do("PING")
    except errors.BusyLoadingError:
        return True
    except errors.ConnectionError:
        pass
    return False


async def test_a_server_that_is_loading(server, store):
    await store.reserve(taking("t0"))
    # Each key takes it a millisecond, once it is started again.
    server.do("EVAL", "for n = 1, 3000 do redis.call('SET', 'other' .. n, '') end", 0)
    server.do("BGREWRITEAOF")
    await until(lambda: not server.do("INFO", "persistence")["aof_rewrite_in_progress"])
    server.kill()
    starting = asyncio.get_running_loop().run_in_executor(
        None,
        lambda: server.start("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"),
    )
    await until(lambda: is_loading(server))
    await fails_within_a_second(store.reserve(taking("in")))
    assert is_loading(server)
    await starting
    await comes_back(store)
    await store.settle(ending("t0"))
    assert (await store.balance(WALLET)).spent == 7


async def test_scripts_that_the_server_forgot_are_sent_again(server, store):
    for number in range(5):
        await store.reserve(taking(f"t{number}"))
        server.do("SCRIPT", "FLUSH")
        await store.settle(ending(f"t{number}"))
        server.do("SCRIPT", "FLUSH")
    await audit(store, {f"t{number}" for number in range(5)})


async def test_a_key_of_a_wrong_type_changes_nothing(server, store):
    await store.reserve(taking("a"))
    usage = b"pomelo:{default/live}:usage"
    server.do("SET", usage, "not a stream")
    before = await store.balance(WALLET)
    await fails_within_a_second(store.settle(ending("a")))
    assert await store.balance(WALLET) == before
    assert [held.task_id for held in await store.held()] == ["a"]
    server.do("DEL", usage)
    await holds(store)
    await audit(store, {"a"})


async def test_answers_that_are_lost_charge_nobody_twice(server, tmp_path):
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(server.port))
        store = await stack.enter_async_context(opening(f"redis://127.0.0.1:{proxy.port}", tmp_path))
        await store.grant(Grant("g", WALLET, CREDITS, 1.0))
        proxy.every = 7
        done: set[str] = set()
        numbers = iter(range(SETTLES))

        async def caller() -> None:
            for number in numbers:
                task_id = f"t{number}"
                try:
                    taken = await store.reserve(taking(task_id))
                except PomeloError:
                    continue  # It costs nothing.
                assert isinstance(taken, Reserved)
                done.add(task_id)
                # Where the outcome is unknown, it is settled all the same, a little later.
                with suppress(PomeloError):
                    assert (await store.settle(ending(task_id))).record.cost == 7

        await asyncio.gather(*[caller() for _ in range(20)])
        proxy.every = 0
        await holds(store)
        assert proxy.cuts > SETTLES / 200
        assert len(done) > SETTLES * 0.9
        await audit(store, done)


async def test_a_killed_server_has_all_that_it_said_it_kept(server, tmp_path):
    async with opening(server.url, tmp_path, limit=0.4, attempt=0.2) as store:
        await store.grant(Grant("g", WALLET, CREDITS, 1.0))
        said: set[str] = set()
        asked: set[str] = set()
        failed = 0
        for turn in range(3):
            ended = asyncio.Event()

            async def caller(name: str, ended: asyncio.Event = ended) -> None:
                nonlocal failed
                number = 0
                while not ended.is_set():
                    number += 1
                    task_id = f"{name}-{number}"
                    try:
                        await store.reserve(taking(task_id))
                        asked.add(task_id)
                        await store.settle(ending(task_id))
                        said.add(task_id)
                    except PomeloError:
                        failed += 1

            callers = [asyncio.create_task(caller(f"{turn}-{n}")) for n in range(8)]
            enough = len(said) + 100
            await until(lambda enough=enough: len(said) >= enough)
            server.kill()
            before = failed
            await until(lambda before=before: failed > before)
            server.start()
            await comes_back(store)
            ended.set()
            await asyncio.gather(*callers)
        await holds(store)
        kept = {found.task_id for found in (await store.list_usage(ALL, limit=10**6))[0]}
        assert said <= kept <= asked
        await audit(store, kept)


async def test_an_archive_that_can_not_be_written_stops_no_settlement(store, tmp_path):
    with closing(sqlite3.connect(tmp_path / "usage.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for number in range(20):
            await store.reserve(taking(f"t{number}"))
            await store.settle(ending(f"t{number}"))
        with pytest.raises(PomeloError) as caught:
            await store.list_usage(ALL, limit=1)
        assert caught.value.code == "store_unavailable"
        other.execute("ROLLBACK")
    await audit(store, {f"t{number}" for number in range(20)})


async def test_a_process_that_was_only_paused_finds_its_tasks_gone(server, tmp_path):
    async with AsyncExitStack() as stack:
        quick = {"beat": 0.05, "dead": 0.4}
        paused = await stack.enter_async_context(opening(server.url, tmp_path, **quick))
        await paused.grant(Grant("g", WALLET, CREDITS, 1.0))
        other = await stack.enter_async_context(opening(server.url, tmp_path, **quick))
        await paused.reserve(taking("a"))
        await paused.reserve(taking("b"))
        await paused.note([record("a", cost=3)])
        await paused._owner.stop()
        await holds(other)
        assert await paused.note([record("a", cost=4), record("b", cost=1)]) == ["a", "b"]
        for task_id in ("a", "b"):
            with pytest.raises(LostReservationError):
                await paused.settle(ending(task_id))
        # It lives, and what it takes now stays.
        assert isinstance(await paused.reserve(taking("c")), Reserved)
        await paused.settle(ending("c", 3))
        kept, _ = await other.list_usage(ALL, limit=9)
        assert {found.task_id: (found.cost, found.source, found.complete) for found in kept} == {
            "a": (3, "recovered", False),
            "c": (3, "provider", True),
        }
        await audit(other, {"a", "c"}, cost=3)


async def test_a_server_that_hung_for_long_lets_nobody_be_taken_for_dead(server, tmp_path):
    async with AsyncExitStack() as stack:
        quick = {"beat": 0.05, "dead": 0.6, "limit": 0.1, "attempt": 0.05}
        stores = [await stack.enter_async_context(opening(server.url, tmp_path, **quick)) for _ in range(2)]
        await stores[0].grant(Grant("g", WALLET, CREDITS, 1.0))
        for number, store in enumerate(stores):
            await store.reserve(taking(f"t{number}"))
        server.stop()
        hung = time.monotonic()
        while time.monotonic() - hung < 2 * quick["dead"]:
            await fails_within_a_second(stores[0].balance(WALLET))
        server.go_on()
        await comes_back(stores[0])
        before = sorted(map(int, server.do("HVALS", OWNERS)))
        assert len(before) == len(stores)
        # By then, each store has checked several times whether the other one has stopped.
        await until(lambda: min(map(int, server.do("HVALS", OWNERS))) > before[-1] + 5)
        for number, store in enumerate(stores):
            assert (await store.settle(ending(f"t{number}"))).record.cost == 7
        await audit(stores[1], {"t0", "t1"})


def is_primary(server: RedisServer) -> bool:
    """Whether a server has been promoted. Sentinel closes all its connections then, this one too."""
    try:
        return bool(server.do("INFO", "replication")["role"] == "master")
    except errors.ConnectionError:
        return False


async def test_a_failover_by_sentinel_goes_on_with_what_the_replica_had(server, tmp_path):
    server.do("CONFIG", "SET", "repl-diskless-sync-delay", "0")
    with (
        RedisServer("--replicaof", f"127.0.0.1 {server.port}") as replica,
        sentinel(server, tmp_path) as watching,
    ):
        await until(lambda: replica.do("INFO", "replication")["master_link_status"] == "up")
        await until(lambda: len(watching.do("SENTINEL", "REPLICAS", "main")) == 1)
        async with opening(f"redis+sentinel://127.0.0.1:{watching.port}/main", tmp_path) as store:
            await store.grant(Grant("g", WALLET, CREDITS, 1.0))
            await store.reserve(taking("before"))
            written = server.do("INFO", "replication")["master_repl_offset"]
            await until(lambda: replica.do("INFO", "replication")["slave_repl_offset"] >= written)
            server.kill()
            await fails_within_a_second(store.reserve(taking("in")))
            store.settle(ending("before"))
            await until(lambda: is_primary(replica))
            await comes_back(store)
            await holds(store)
            assert isinstance(await store.reserve(taking("after")), Reserved)
            await store.settle(ending("after"))
            await audit(store, {"before", "after"})


@contextmanager
def sentinel(primary: RedisServer, folder: Path) -> Iterator[RedisServer]:
    """A Sentinel that takes the primary for dead after two seconds: later than a task gives up on it."""
    config = folder / "sentinel.conf"
    config.write_text(
        f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds main 2000\n"
        "sentinel failover-timeout main 5000\n"
    )
    with RedisServer.sentinel(config) as started:
        yield started
