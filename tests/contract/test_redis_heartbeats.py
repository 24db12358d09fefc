"""How the store on Redis opens, watches, and closes, at a server that fails or is emptied in between."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from redis import exceptions as errors

from pomelo.stores.accounts import Wallet
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import WORKERS, names
from pomelo.stores.redis.scripts import HEARTBEAT, RECOVER
from pomelo.stores.redis.workers import Worker
from tests.contract.ledger_rig import WALLET, request, settlement
from tests.contract.redis_rig import IDLE, ONE_SERVER, FaultyClient, Opener, abandon_dead
from tests.redis_server import RedisServer
from tests.unit.refusals import refused

pytestmark = ONE_SERVER


async def test_a_worker_that_the_server_refuses_does_not_open_and_leaves_nothing_running(
    opened: Opener,
) -> None:
    store = await opened(**IDLE)
    client = FaultyClient(store)
    client.error = lambda: errors.ResponseError("WRONGTYPE")
    client.hits = lambda command: command == ("HGETALL", WORKERS)
    worker = Worker(store._connection, store._wallet_index, time.monotonic)
    with refused("store_unavailable"):
        await worker.open()
    assert len(client.failed) == 1, "it would be refused again"
    assert [task.done() for task in worker._tasks] == [True]
    client.end()


async def test_a_closed_store_leaves_nothing_running(server: RedisServer, tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with open_redis(
        server.url, f"sqlite:{tmp_path / 'usage.db'}", timing=Timing(timeout=20.0)
    ) as store:
        store.drain_usage()  # type: ignore[attr-defined]
        assert asyncio.all_tasks() > before
    assert asyncio.all_tasks() == before


async def test_a_worker_reports_once_that_it_was_marked_dead_though_its_next_heartbeat_fails(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    async with open_redis(
        *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
        timing=Timing(timeout=20.0, dead_after=100.0, **IDLE),
        monotonic=lambda: clock[0],
    ) as store:
        worker: Worker = store._worker  # type: ignore[attr-defined]
        first = worker.id
        server.do("HSET", WORKERS, first, "dead")
        clock[0] += 100.0
        client = FaultyClient(store)
        client.error = lambda: errors.ResponseError("OOM")
        client.hits = lambda command: HEARTBEAT.digest in command and first not in command
        with refused("store_unavailable"):
            await worker.ensure_live()
        second = worker.id
        client.end()
        await worker.ensure_live()
        assert worker.id == second != first
        assert len([message for message in caplog.messages if "was marked dead" in message]) == 1
        assert server.do("HGET", WORKERS, second) == b"1"


async def test_a_process_that_sends_heartbeats_has_watched_the_others_meanwhile(
    server: RedisServer, tmp_path: Path, opened: Opener
) -> None:
    silent = await opened(**IDLE)
    await silent.reserve(request("a"))
    clock = [0.0]
    async with open_redis(
        *(server.url, f"sqlite:{tmp_path / 'usage.db'}"),
        timing=Timing(timeout=20.0, heartbeat=3600.0, dead_after=100.0),
        monotonic=lambda: clock[0],
    ) as store:
        worker: Worker = store._worker  # type: ignore[attr-defined]
        for _ in range(2):  # each is within three heartbeats of the last
            clock[0] += 2.5 * 3600.0
            await worker._send_heartbeat()
        await worker._check_workers()
        assert await store.drafts() == []


async def test_a_worker_whose_tasks_could_not_be_recovered_yet_stays_listed(
    server: RedisServer, opened: Opener
) -> None:
    dying, store = [await opened(**IDLE) for _ in range(2)]
    await dying.reserve(request("a"))
    await abandon_dead(dying, server)
    client = FaultyClient(store, 0.05)
    client.hits = lambda command: len(command) > 1 and command[1] in (RECOVER.digest, RECOVER.text)
    with refused("store_unavailable"):
        await store._worker._check_workers()
    assert server.do("HGET", WORKERS, dying._worker.id) == b"dead"
    client.end()
    found: dict[Any, Any] = server.do("HGETALL", WORKERS)
    assert set(found) == {dying._worker.id.encode(), store._worker.id.encode()}
    await store._worker._check_workers()
    assert server.do("HKEYS", WORKERS) == [store._worker.id.encode()]
    assert (await store.balance(WALLET)).held == 0


async def test_a_store_that_another_process_has_begun_anew_is_not_used(
    server: RedisServer, tmp_path: Path, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    store = await opened(**IDLE)
    await store.check()
    server.do("FLUSHALL")
    async with open_redis(server.url, f"sqlite:{tmp_path / 'other.db'}", timing=Timing(timeout=20.0)) as anew:
        await anew.check()
        for _ in range(2):
            with refused("store_unavailable"):
                await store.check()
    assert len([message for message in caplog.messages if "Redis has lost its data" in message]) == 1


async def test_the_record_of_a_settlement_that_nobody_awaited_is_moved_before_the_store_is_closed(
    server: RedisServer, tmp_path: Path
) -> None:
    timing = Timing(timeout=20.0, **IDLE)
    async with open_redis(server.url, f"sqlite:{tmp_path / 'usage.db'}", timing=timing) as store:
        await store.reserve(request("a", 0, account="default"))
        store.settle(settlement("a", 0, account="default"))
    assert server.do("XLEN", names(Wallet("default", True)).usage) == 0


async def test_the_check_of_a_store_fails_while_the_server_can_only_be_read(opened: Opener) -> None:
    store = await opened(**IDLE)
    client = FaultyClient(store)
    client.error = lambda: errors.ResponseError("MISCONF")
    client.hits = lambda command: command[0] in ("EVAL", "EVALSHA") and WORKERS in command
    with refused("store_unavailable"):
        await store._worker._send_heartbeat()
    for _ in range(2):
        with refused("store_unavailable"):
            await store.check()
    client.end()
    await store.check()
    assert not store._worker._failing


async def test_a_store_whose_exit_is_cancelled_is_closed_completely(
    server: RedisServer, tmp_path: Path
) -> None:
    keys, sent, may_go = names(Wallet("default", False)), asyncio.Event(), asyncio.Event()

    async def serve() -> None:
        async with open_redis(
            server.url, f"sqlite:{tmp_path / 'usage.db'}", timing=Timing(timeout=20.0, **IDLE)
        ) as store:
            client = FaultyClient(store, 20.0)
            execute = client._client.execute_command

            async def settle_late(command: tuple[Any, ...]) -> Any:
                if keys.usage in command and command[0] == "EVALSHA":
                    sent.set()
                    await may_go.wait()
                return await execute(*command)

            await store.reserve(request("a", account="default", live=False))
            client._execute = settle_late  # type: ignore[method-assign]
            store.settle(settlement("a", 5, account="default", live=False))

    serving = asyncio.create_task(serve())
    await sent.wait()
    serving.cancel()
    await asyncio.sleep(0.01)
    assert not serving.done()
    may_go.set()
    await asyncio.wait({serving})
    assert serving.cancelled()
    assert server.do("HGET", keys.wallet, "spent") == b"5"
    assert server.do("XLEN", keys.usage) == 0
    assert server.do("EXISTS", WORKERS) == 0
