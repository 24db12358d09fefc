"""A store on Redis with so many wallets that a search of all takes longer than a process may be silent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis.exceptions import ResponseError

from pomelo.stores.accounts import Wallet
from pomelo.stores.redis import open_redis
from pomelo.stores.redis.key_names import WALLETS, WORKERS, member, names, search_turn
from tests.contract.ledger_rig import abandon, request
from tests.contract.redis_rig import FaultyClient, Opener
from tests.faults.simulated_network import Network, SimulatedLoop
from tests.redis_server import RedisServer

EPOCH = 1_800_000_000.0
MANY = [Wallet(f"account-{number:05}", True) for number in range(36_000)]
DEFAULT = names(Wallet("default", True))


class FarNetwork(Network):
    """A network in which each delivery takes the same time."""

    seconds = 0.0

    def delay(self) -> float:
        return self.seconds


def simulate(work: Callable[[], Awaitable[None]]) -> None:
    loop = SimulatedLoop()
    try:
        loop.run_until_complete(asyncio.wait_for(work(), 10_000.0))
    finally:
        loop.close()


def add_wallets(server: RedisServer) -> None:
    for start in range(0, len(MANY), 1_000):
        server.do("SADD", WALLETS, *map(member, MANY[start : start + 1_000]))


async def open_far(
    stack: AsyncExitStack, server: RedisServer, folder: Path, seconds: float = 0.0
) -> tuple[Any, FarNetwork]:
    """Opens a store, in simulated time; `seconds` is how long its deliveries take."""
    network, loop = FarNetwork(server.port, Random(0)), asyncio.get_running_loop()
    network.seconds = seconds
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pomelo.stores.redis.url.open_link", network.open_link)
        opening = open_redis(
            *(server.url, f"sqlite:{folder / 'usage.db'}"),
            now=lambda: EPOCH,
            monotonic=loop.time,
            server_time=lambda: EPOCH + loop.time(),
        )
        return await stack.enter_async_context(opening), network


def test_a_store_opens_however_long_the_search_of_all_wallets_takes(
    server: RedisServer, tmp_path: Path
) -> None:
    add_wallets(server)

    async def work() -> None:
        begun = asyncio.get_running_loop().time()
        async with AsyncExitStack() as stack:
            store, _ = await open_far(stack, server, tmp_path, 0.18)
            assert asyncio.get_running_loop().time() - begun > store._connection.timing.open

    simulate(work)


def test_a_process_is_alive_while_it_searches_all_wallets(server: RedisServer, tmp_path: Path) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            searching, network = await open_far(stack, server, tmp_path)
            watching, _ = await open_far(stack, server, tmp_path)
            add_wallets(server)
            await searching.reserve(request("a", 0, account="default"))
            worker, network.seconds = searching._worker, 0.18
            await asyncio.sleep(100.0)
            assert worker._rounds >= 10
            assert server.do("HKEYS", DEFAULT.holds) == [b"a"]
            assert {worker.id.encode(), watching._worker.id.encode()} == set(server.do("HKEYS", WORKERS))

    simulate(work)


@pytest.mark.parametrize("seconds", [60.0, 100.0])
def test_a_process_that_died_is_found_in_time_by_one_that_searches_all_wallets(
    server: RedisServer, tmp_path: Path, seconds: float
) -> None:
    async def work() -> None:
        async with AsyncExitStack() as stack:
            watching, network = await open_far(stack, server, tmp_path)
            dying, _ = await open_far(stack, server, tmp_path)
            add_wallets(server)
            network.seconds = 0.18
            await asyncio.sleep(seconds)
            await abandon(dying)
            await asyncio.sleep(watching._connection.timing.dead_after + 8.0)
            assert server.do("HGET", WORKERS, dying._worker.id) in (b"dead", None)

    simulate(work)


async def test_the_wallets_of_a_process_are_added_again_in_parts(server: RedisServer, opened: Opener) -> None:
    store = await opened(heartbeat=3600.0)
    store._wallet_index._known.update(MANY[:2_500])
    server.do("DEL", WALLETS)
    faults = FaultyClient(store, 20.0)
    faults.hits = lambda command: command[0] == "SADD" and len(command) > 1_002
    faults.error = lambda: ResponseError("too long")
    await store._wallet_index.add_again()
    assert server.do("SCARD", WALLETS) == len(store._wallet_index._known)


# --- whose turn it is


async def test_one_process_at_a_time_searches_all_wallets(server: RedisServer, opened: Opener) -> None:
    one, two = [(await opened(heartbeat=3600.0))._wallet_index for _ in range(2)]
    assert await one.take_turn("test", 60.0)
    assert not await two.take_turn("test", 60.0)
    assert await two.take_turn("another", 60.0)
    assert 0 < server.do("TTL", search_turn("test")) <= 60
    server.do("DEL", search_turn("test"))
    assert await two.take_turn("test", 60.0)
    assert not await one.take_turn("test", 60.0)
    server.do("EXPIRE", search_turn("test"), 86_400)  # as if the clock of the server was set back
    assert not await one.take_turn("test", 60.0)
    assert await one.take_turn("test", 60.0)


async def test_unknown_workers_are_searched_by_the_process_whose_turn_it_is(
    server: RedisServer, opened: Opener
) -> None:
    dying, worker = await opened(heartbeat=3600.0), (await opened(heartbeat=3600.0))._worker
    await dying.reserve(request("a"))
    await abandon(dying)
    server.do("HDEL", WORKERS, dying._worker.id)
    for turns, listed in ((1, False), (0, True)):
        if turns:
            server.do("SET", search_turn("reservations"), "")
        else:
            server.do("DEL", search_turn("reservations"))
        for _ in range(10):
            await worker._watch()
        assert (server.do("HEXISTS", WORKERS, dying._worker.id) == 1) == listed
