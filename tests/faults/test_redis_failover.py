"""Stores on Redis whose process or server seems dead: a paused process, a hanging server, and a failover."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from redis import exceptions as errors

from pomelo.stores.ledger import LostReservationError
from pomelo.stores.redis.key_names import WORKERS
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
from tests.redis_server import RedisServer
from tests.waiting import until


async def test_a_process_that_was_only_paused_has_lost_its_reservations(
    server: RedisServer, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        quick = {"heartbeat": 0.05, "dead_after": 0.4}
        paused = await stack.enter_async_context(open_on(server.url, tmp_path, **quick))
        other = await stack.enter_async_context(open_on(server.url, tmp_path, **quick))
        await paused.reserve(request("a"))
        await paused.reserve(request("b"))
        await paused.note([record("a", cost=3)])
        worker = paused._worker  # type: ignore[attr-defined]
        await worker.stop()
        await wait_until_released(other)
        assert await paused.note([record("a", cost=4), record("b", cost=1)]) == ["a", "b"]
        for task_id in ("a", "b"):
            with pytest.raises(LostReservationError):
                await paused.settle(settlement(task_id))
        # It lives, and its new reservations stay.
        await run(paused, "c", cost=3)
        kept, _ = await other.list_usage(ALL, limit=9)
        assert {found.task_id: (found.cost, found.source, found.complete) for found in kept} == {
            "a": (3, "recovered", False),
            "c": (3, "provider", True),
        }
        await audit(other, {"a", "c"}, cost=3)


async def test_no_worker_is_marked_dead_because_the_server_hung(server: RedisServer, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        quick = {"heartbeat": 0.05, "dead_after": 1.5, "timeout": 0.3, "attempt_timeout": 0.15}
        stores = [await stack.enter_async_context(open_on(server.url, tmp_path, **quick)) for _ in range(2)]
        for number, store in enumerate(stores):
            await store.reserve(request(f"t{number}"))
        server.stop()
        stopped = time.monotonic()
        while time.monotonic() - stopped < 2 * quick["dead_after"]:
            await fails_within_a_second(stores[0].balance(WALLET))
        server.resume()
        await wait_until_available(stores[0])
        before = sorted(map(int, server.do("HVALS", WORKERS)))
        assert len(before) == len(stores)
        # By then, each store has checked several times whether the other one has stopped.
        await until(lambda: min(map(int, server.do("HVALS", WORKERS))) > before[-1] + 5)
        for number, store in enumerate(stores):
            assert (await store.settle(settlement(f"t{number}"))).record.cost == 7
        await audit(stores[1], {"t0", "t1"})


def is_primary(server: RedisServer) -> bool:
    """Whether a server has been promoted. Sentinel closes all its connections then, including this one."""
    with suppress(errors.ConnectionError):
        return bool(server.do("INFO", "replication")["role"] == "master")
    return False


async def test_a_failover_by_sentinel_continues_with_the_data_of_the_replica(
    server: RedisServer, tmp_path: Path
) -> None:
    server.do("CONFIG", "SET", "repl-diskless-sync-delay", "0")
    with (
        RedisServer("--replicaof", f"127.0.0.1 {server.port}") as replica,
        sentinel(server, tmp_path) as watching,
    ):
        await until(lambda: replica.do("INFO", "replication")["master_link_status"] == "up")
        await until(lambda: len(watching.do("SENTINEL", "REPLICAS", "main")) == 1)
        async with open_on(f"redis+sentinel://127.0.0.1:{watching.port}/main", tmp_path) as store:
            await store.reserve(request("before"))
            written = server.do("INFO", "replication")["master_repl_offset"]
            await until(lambda: replica.do("INFO", "replication")["slave_repl_offset"] >= written)
            server.kill()
            await fails_within_a_second(store.reserve(request("in")))
            store.settle(settlement("before"))
            await until(lambda: is_primary(replica))
            await wait_until_available(store)
            await wait_until_released(store)
            await run(store, "after")
            await audit(store, {"before", "after"})


@contextmanager
def sentinel(primary: RedisServer, folder: Path) -> Iterator[RedisServer]:
    """A Sentinel that considers the primary dead after two seconds, which is longer than a task waits."""
    config = folder / "sentinel.conf"
    config.write_text(
        f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
        "sentinel down-after-milliseconds main 2000\n"
        "sentinel failover-timeout main 5000\n"
    )
    with RedisServer.sentinel(config) as started:
        yield started
