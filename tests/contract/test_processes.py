"""The list of serving processes in Redis: it has the living ones alone."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from redis import exceptions as errors

from pomelo.stores.fleet import Fleet, Process
from pomelo.stores.redis import Timing
from pomelo.stores.redis.key_names import PROCESSES, WORKERS, reported
from pomelo.stores.redis.processes import read_fleet
from tests.contract.ledger_rig import abandon
from tests.contract.redis_rig import IDLE, FaultyClient, lose_replies, open_on
from tests.redis_server import RedisServer
from tests.unit.refusals import refused
from tests.waiting import until


def process(host: str, started: float = 1_790_000_000.5, **facts: str) -> Process:
    return Process(host, started, 0.25, facts)


async def hosts(server: RedisServer) -> list[str]:
    return [each.host for each in (await read_fleet(server.url))[0]]


async def test_a_process_is_listed_until_it_ends(server: RedisServer, tmp_path: Path) -> None:
    async with open_on(server.url, tmp_path) as first:
        assert isinstance(first, Fleet)
        assert await first.register(process("a", plans="1")) == []
        async with open_on(server.url, tmp_path) as second:
            younger = process("b", 1_790_000_001.5)
            assert await second.register(younger) == [process("a", plans="1")]
            assert await first.register(process("a", plans="2")) == [younger]
            assert (await read_fleet(server.url))[0] == [process("a", plans="2"), younger]
        assert await hosts(server) == ["a"]
    assert await hosts(server) == []
    assert server.do("EXISTS", PROCESSES, WORKERS) == 0


async def test_a_process_that_starts_waits_for_a_server_that_is_busy(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path, **IDLE) as store:
        client = FaultyClient(store, timeout=0.1)
        busy_until = [0.0]
        client.error, client.hits = errors.ConnectionError, lambda command: time.monotonic() < busy_until[0]
        for start in (store.clock_ahead, lambda: store.register(process("a"))):
            busy_until[0] = time.monotonic() + 0.5
            client.failed.clear()
            await start()
            assert client.failed
        client.end()
        assert await hosts(server) == ["a"]


async def test_a_process_that_died_is_removed(server: RedisServer, tmp_path: Path) -> None:
    quick = {"heartbeat": 0.05, "dead_after": 0.5}
    async with AsyncExitStack() as stack:
        dead = await stack.enter_async_context(open_on(server.url, tmp_path, **quick))
        await dead.register(process("dead"))
        await dead._worker.stop()
        other = await stack.enter_async_context(open_on(server.url, tmp_path, **quick))
        await other.register(process("other"))
        while await hosts(server) != ["other"]:
            pass
        await until(lambda: server.do("HLEN", PROCESSES) == 1)


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(heartbeat=0.05, dead_after=0.5, timeout=20.0, attempt_timeout=5.0)
    monkeypatch.setattr("pomelo.stores.redis.processes.Timing", lambda: timing)


@pytest.mark.usefixtures("_quick")
async def test_a_process_that_was_killed_is_left_out_of_the_living_ones_even_if_no_other_runs(
    server: RedisServer, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        killed = await stack.enter_async_context(open_on(server.url, tmp_path, heartbeat=0.05))
        await killed.register(process("killed"))
        assert await hosts(server) == ["killed"]
        assert (await read_fleet(server.url, living=True))[0] == [process("killed")]
        await abandon(killed)
        assert await hosts(server) == ["killed"]
        assert (await read_fleet(server.url, living=True))[0] == []
        assert server.do("EXISTS", PROCESSES, WORKERS) == 0


@pytest.mark.usefixtures("_quick")
async def test_no_process_is_taken_for_dead_while_the_server_refuses_heartbeats(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path, heartbeat=3600.0) as store:
        await store.register(process("a"))
        reading = asyncio.create_task(read_fleet(server.url, living=True))
        await until(lambda: server.do("HLEN", WORKERS) == 2)
        server.do("CONFIG", "SET", "maxmemory", 1)
        try:
            with refused("store_unavailable"):
                await reading
        finally:
            server.do("CONFIG", "SET", "maxmemory", 0)
        assert await hosts(server) == ["a"]


async def test_a_process_is_listed_again_after_it_was_taken_for_dead(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path, heartbeat=0.02) as store:
        await store.register(process("a"))
        server.do("HSET", WORKERS, store._worker.id, "dead")
        server.do("DEL", PROCESSES)
        while await hosts(server) != ["a"]:
            pass


async def test_the_clock_of_a_process_is_measured_again(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_on(server.url, tmp_path, heartbeat=0.02) as store:
        await store.register(replace(process("a"), clock=7.5))
        async with asyncio.timeout(20):
            while (found := (await read_fleet(server.url))[0][0]).clock == 7.5:
                pass
        assert abs(found.clock) < 1.0  # of the same machine
        assert replace(found, clock=0.25) == process("a")
        for clock in (-5.5, -6.0):
            await store._worker.register(replace(process("a"), clock=clock))
    warning = "The clock of this machine is %s s from that of Redis. Synchronise the clocks (NTP)"
    assert caplog.messages[0] == warning % "+7.5"
    assert caplog.messages[1] == warning % "-5.5"


async def test_entries_of_other_versions_do_no_harm(server: RedisServer, tmp_path: Path) -> None:
    newer = '{"host":"b","started":1,"clock":0,"facts":{"new":"1"},"more":[1]}'
    for worker, entry in (
        ("w1", newer),
        ("w2", "not JSON"),
        ("w3", "[]"),
        ("w4", '{"host":"c"}'),
        ("w5", newer),
    ):
        server.do("HSET", PROCESSES, worker, entry)
        if worker != "w5":  # whose process is gone
            server.do("HSET", WORKERS, worker, 1)
    async with open_on(server.url, tmp_path, heartbeat=3600.0) as store:
        server.do("HSET", PROCESSES, "w6", newer)
        server.do("HSET", WORKERS, "w6", "dead")
        assert await store.register(process("a")) == [Process("b", 1.0, 0.0, {"new": "1"})]


async def test_the_clock_is_compared_with_that_of_the_server(server: RedisServer, tmp_path: Path) -> None:
    async with open_on(server.url, tmp_path) as store:
        assert abs(await store.clock_ahead()) < 1.0  # of the same machine


async def test_a_change_is_news_for_the_first_process_that_notes_it(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path) as first, open_on(server.url, tmp_path) as second:
        assert isinstance(second, Fleet)
        assert await first.note_state("vendor: a {b}", "open", 60)
        assert not await second.note_state("vendor: a {b}", "open", 60)
        assert await second.note_state("another vendor", "open", 60)
        assert await second.note_state("vendor: a {b}", "closed", 60)
        assert not await first.note_state("vendor: a {b}", "closed", 60)
        assert not await second.note_state("vendor: a {b}", "closed", 600)  # it is remembered from now on
        other, again = sorted([server.do("TTL", key) for key in server.do("KEYS", "*reported*")])
        assert 0 < other <= 60 < again <= 600


async def test_a_change_whose_reply_is_lost_is_still_news(server: RedisServer, tmp_path: Path) -> None:
    async with open_on(server.url, tmp_path) as first, open_on(server.url, tmp_path) as second:
        faults = lose_replies(first, reported("acme"))
        assert await first.note_state("acme", "low", 60)
        assert len(faults.failed) == 2
        assert not await first.note_state("acme", "low", 60)
        assert not await second.note_state("acme", "low", 60)


async def test_a_state_that_an_earlier_version_has_noted_is_no_news(
    server: RedisServer, tmp_path: Path
) -> None:
    async with open_on(server.url, tmp_path) as store:
        server.do("SET", reported("acme"), "low", "EX", 60)
        assert not await store.note_state("acme", "low", 60)
        assert await store.note_state("acme", "high", 60)
