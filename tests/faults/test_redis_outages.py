"""The store on Redis during failures of the server or the network: no reservation is lost, nothing is charged
twice, and running tasks are settled when the server is back."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, closing, suppress
from pathlib import Path

import pytest
from redis import exceptions as errors

from pomelo.errors import PomeloError
from pomelo.stores.accounts import Grant
from pomelo.stores.base import Store
from pomelo.stores.ledger import Reserved
from tests.faults.redis_rig import (
    ALL,
    WALLET,
    audit,
    fails_within_a_second,
    open_on,
    record,
    request,
    run,
    settlement,
    wait_until_available,
    wait_until_released,
)
from tests.faults.tcp_proxy import TcpProxy
from tests.redis_server import RedisServer
from tests.unit.refusals import refused
from tests.waiting import first, until

SETTLES = int(os.environ.get("POMELO_REDIS_SETTLES", "2000"))
"""The number of tasks that run while replies are lost."""


@pytest.fixture
async def store(server: RedisServer, tmp_path: Path) -> AsyncIterator[Store]:
    async with open_on(server.url, tmp_path) as opened:
        yield opened


def restart(server: RedisServer) -> None:
    server.kill()
    server.start()


OUTAGES: dict[str, tuple[Callable[[RedisServer], object], Callable[[RedisServer], object]]] = {
    "killed": (RedisServer.kill, RedisServer.start),
    "hanging": (RedisServer.stop, RedisServer.resume),
    "paused clients": (
        lambda server: server.do("CLIENT", "PAUSE", "600000", "ALL"),
        # the server answers no client until it is restarted
        restart,
    ),
}


@pytest.mark.parametrize("outage", OUTAGES)
async def test_calls_fail_in_time_during_an_outage_and_a_running_task_is_settled_after_it(
    outage: str, server: RedisServer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "pomelo.stores")
    begin, end = OUTAGES[outage]
    assert isinstance(await store.reserve(request("before")), Reserved)
    begin(server)
    settling = asyncio.ensure_future(store.settle(settlement("before")))
    for number in range(3):
        await fails_within_a_second(store.reserve(request(f"in{number}")))
    await fails_within_a_second(settling)
    await fails_within_a_second(store.balance(WALLET))
    await fails_within_a_second(store.get_key("a"))
    await fails_within_a_second(store.note([record("before", cost=3)]))
    await fails_within_a_second(store.list_usage(ALL, limit=1))
    end(server)
    await wait_until_available(store)
    await wait_until_released(store)
    assert (await store.settle(settlement("before"))).record.cost == 7
    await run(store, "after")
    await audit(store, {"before", "after"})
    lost, *_, back = [one.getMessage() for one in caplog.records if "Redis" in one.getMessage()]
    assert lost.startswith("Redis can't be reached: ")
    assert back.startswith("Redis is back after ")


@pytest.mark.parametrize("commands", ["WRITE", "ALL"])
async def test_a_server_that_is_busy_while_the_store_opens(
    commands: str, server: RedisServer, tmp_path: Path
) -> None:
    server.do("CLIENT", "PAUSE", "1500", commands)
    async with open_on(server.url, tmp_path) as store:
        await run(store, "after")
        await audit(store, {"after"})


async def test_a_server_that_became_a_replica(server: RedisServer, store: Store) -> None:
    await store.reserve(request("before"))
    server.do("REPLICAOF", "127.0.0.1", "1")
    await fails_within_a_second(store.reserve(request("in")))
    await fails_within_a_second(store.settle(settlement("before")))
    server.do("REPLICAOF", "NO", "ONE")
    await wait_until_released(store)
    await audit(store, {"before"})


async def test_a_server_that_is_out_of_memory_reserves_nothing_and_settles_running_tasks(
    server: RedisServer, store: Store
) -> None:
    await store.reserve(request("before"))
    server.do("CONFIG", "SET", "maxmemory", "1")
    await fails_within_a_second(store.reserve(request("in")))
    await fails_within_a_second(store.grant(Grant("more", WALLET, 5, 1.0)))
    assert (await store.settle(settlement("before"))).record.cost == 7
    await audit(store, {"before"})
    server.do("CONFIG", "SET", "maxmemory", "0")
    assert isinstance(await store.reserve(request("after")), Reserved)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["out of memory", "replica"],
)
async def test_the_check_of_a_store_fails_while_its_server_refuses_to_write(
    server: RedisServer, tmp_path: Path, begin: Sequence[str], end: Sequence[str]
) -> None:
    async def check() -> str:
        try:
            await opened.check()
        except PomeloError as error:
            return error.code
        return ""

    async with open_on(server.url, tmp_path, heartbeat=0.1) as opened:
        assert await check() == ""
        server.do(*begin)
        await first(check, "store_unavailable".__eq__)
        assert await opened.balance(WALLET)  # it can be read
        server.do(*end)
        await first(check, "".__eq__)
        await run(opened, "after")


def is_loading(server: RedisServer) -> bool:
    try:
        server.do("PING")
    except errors.ConnectionError as error:
        return isinstance(error, errors.BusyLoadingError)
    return False


async def test_a_server_that_is_loading(server: RedisServer, store: Store) -> None:
    await store.reserve(request("t0"))
    # After a restart, loading each key takes a millisecond.
    server.do("EVAL", "for n = 1, 3000 do redis.call('SET', 'other' .. n, '') end", 0)
    server.do("BGREWRITEAOF")
    await until(lambda: not server.do("INFO", "persistence")["aof_rewrite_in_progress"])
    server.kill()
    starting = asyncio.get_running_loop().run_in_executor(
        None,
        lambda: server.start("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"),
    )
    await until(lambda: is_loading(server))
    await fails_within_a_second(store.reserve(request("in")))
    assert is_loading(server)
    await starting
    await wait_until_available(store)
    await store.settle(settlement("t0"))
    assert (await store.balance(WALLET)).spent == 7


async def test_scripts_that_the_server_forgot_are_sent_again(server: RedisServer, store: Store) -> None:
    for number in range(5):
        await store.reserve(request(f"t{number}"))
        server.do("SCRIPT", "FLUSH")
        await store.settle(settlement(f"t{number}"))
        server.do("SCRIPT", "FLUSH")
    await audit(store, {f"t{number}" for number in range(5)})


async def test_a_redis_key_of_a_wrong_type_fails_the_settlement_and_changes_no_balance(
    server: RedisServer, store: Store
) -> None:
    await store.reserve(request("a"))
    usage = b"pomelo:{default/live}:usage"
    server.do("SET", usage, "not a stream")
    before = await store.balance(WALLET)
    await fails_within_a_second(store.settle(settlement("a")))
    assert await store.balance(WALLET) == before
    assert [draft.task_id for draft in await store.drafts()] == ["a"]
    server.do("DEL", usage)
    await wait_until_released(store)
    await audit(store, {"a"})


async def test_lost_replies_charge_no_account_twice(server: RedisServer, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(server.port))
        store = await stack.enter_async_context(open_on(f"redis://127.0.0.1:{proxy.port}", tmp_path))
        proxy.every = 7
        done: set[str] = set()
        refused = 0
        numbers = iter(range(SETTLES))
        recovering = asyncio.Lock()

        async def reserve(task_id: str) -> bool:
            try:
                assert isinstance(await store.reserve(request(task_id)), Reserved)
            except PomeloError:
                return False  # it costs nothing
            done.add(task_id)
            return True

        async def caller() -> None:
            nonlocal refused
            for number in numbers:
                task_id = f"t{number}"
                async with recovering:
                    pass
                if not await reserve(task_id):
                    refused += 1
                    # After an unknown outcome, the store lets one reserve at a time try: the other callers wait.
                    async with recovering:
                        while not await reserve(task_id := f"{task_id}-again"):  # noqa: ASYNC110
                            await asyncio.sleep(0.1)
                # If the outcome is unknown, the task is settled a little later.
                with suppress(PomeloError):
                    assert (await store.settle(settlement(task_id))).record.cost == 7

        await asyncio.gather(*[caller() for _ in range(20)])
        proxy.every = 0
        await wait_until_released(store)
        assert proxy.cuts > SETTLES / 200
        assert len(done) == SETTLES
        assert refused < SETTLES * 0.1
        await audit(store, done)


async def test_a_killed_server_keeps_all_acknowledged_settlements(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path, timeout=0.4, attempt_timeout=0.2) as store:
        acknowledged: set[str] = set()
        reserved: set[str] = set()
        failed = 0

        async def caller(name: str, ended: asyncio.Event) -> None:
            nonlocal failed
            for number in itertools.count():
                if ended.is_set():
                    return
                task_id = f"{name}-{number}"
                try:
                    await store.reserve(request(task_id))
                    reserved.add(task_id)
                    await store.settle(settlement(task_id))
                    acknowledged.add(task_id)
                except PomeloError:
                    failed += 1

        async def kill_under_load(turn: int) -> None:
            ended = asyncio.Event()
            callers = [asyncio.create_task(caller(f"{turn}-{n}", ended)) for n in range(8)]
            enough = len(acknowledged) + 100
            await until(lambda: len(acknowledged) >= enough)
            server.kill()
            before = failed
            await until(lambda: failed > before)
            server.start()
            await wait_until_available(store)
            ended.set()
            await asyncio.gather(*callers)

        for turn in range(3):
            await kill_under_load(turn)
        await wait_until_released(store)
        kept = {found.task_id for found in (await store.list_usage(ALL, limit=10**6))[0]}
        assert acknowledged <= kept <= reserved
        await audit(store, kept)


async def test_settlements_continue_while_the_archive_is_locked(store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "usage.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for number in range(20):
            await run(store, f"t{number}")
        with refused("store_unavailable"):
            await store.list_usage(ALL, limit=1)
        other.execute("ROLLBACK")
    await audit(store, {f"t{number}" for number in range(20)})


async def test_the_check_of_a_store_fails_if_its_server_has_lost_its_data(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_on(server.url, tmp_path) as opened:
        await opened.check()
        server.do("FLUSHALL")
        for _ in range(3):
            with refused("store_unavailable"):
                await opened.check()
        (line,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert line.getMessage().startswith("Redis has lost its data")
        async with open_on(server.url, tmp_path) as begun:  # anew
            await begun.check()
            with refused("store_unavailable"):
                await opened.check()
