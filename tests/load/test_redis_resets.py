"""Connections to Redis that are reset under load: no caller receives a 500, no reservation is left, and every
vendor answer has exactly one usage record.

The server is `pomelo serve` in a process of its own, on uvloop, which raises other errors on a closed connection
than asyncio does. `make load` resets 500 connections; an ordinary run of the tests a few.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
from grpc.aio import insecure_channel
from redis import Redis

from pomelo.gen.v1.admin_service_pb2 import AuditRequest
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.stores.redis.key_names import names
from pomelo.testing import Answer, FaultUpstream, Received
from tests.faults.books import LIVE, Books
from tests.faults.drivers import GrpcDriver, Outcome, RestDriver, open_drivers
from tests.faults.server_process import SERVE, Deployment, ServerProcess
from tests.faults.tcp_proxy import Cut, TcpProxy
from tests.redis_server import RedisServer

RESETS = int(os.environ.get("LOAD_RESETS", "60"))
CALLERS = 20
STORM = 20
"""Consecutive resets, enough to make some calls fail."""
FREED_WITHIN = 35.0
"""Seconds from the last reset until nothing is held any more."""

CREDITS = 10**12
WORDS = "one two three four five six"


def answer(received: Received) -> Any:
    """What the vendor says: a few words, so fast that a task is mostly a matter of the store."""
    return Answer(WORDS, at=dict.fromkeys(range(6), 0.005))(received)


async def calling(
    wire: RestDriver | GrpcDriver, name: str, stop: asyncio.Event, chance: random.Random
) -> list[Outcome]:
    """Runs tasks one after another, unary and streamed, and abandons some half way, until `stop`."""
    told: list[Outcome] = []
    while not stop.is_set():
        request_id = f"{name}.{len(told)}"
        body = {"model": "gpt-4", "messages": [{"role": "user", "content": f"{request_id} Go on."}]}
        stream = chance.random() < 0.5
        asking = asyncio.ensure_future(wire(body, request_id, stream=stream))
        done, _ = await asyncio.wait({asking}, timeout=0.02 if chance.random() < 0.1 else 60)
        if done:
            told.append(asking.result())
        else:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            told.append(Outcome(request_id, body, code="left"))
        if told[-1].code not in ("ok", "left"):
            await asyncio.sleep(0.05)  # it was refused
    return told


async def resetting(proxy: TcpProxy, chance: random.Random) -> float:
    """Resets connections until there were enough; returns the time of the last reset. The store's own retries
    handle single resets; sometimes there are so many in a row that a call fails."""
    while proxy.cuts < RESETS:
        enough = proxy.cuts + chance.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, STORM])
        for _ in range(enough - proxy.cuts):
            proxy.cut(chance.choice(list(Cut)))
        async with asyncio.timeout(20):
            while proxy.cuts < enough:  # noqa: ASYNC110 (no event to wait for)
                await asyncio.sleep(0.002)
        await asyncio.sleep(chance.random() * 0.06)
    return time.monotonic()


def taken(redis: RedisServer) -> tuple[int, int]:
    """Microcredits that are held, and tasks that hold them, as Redis has them."""
    with Redis(port=redis.port, protocol=2) as server:
        return int(server.hget(names(LIVE).wallet, "held") or 0), int(server.hlen(names(LIVE).holds))


async def freed(redis: RedisServer, since: float) -> float:
    """Waits until nothing is held; returns the seconds since a given moment."""
    async with asyncio.timeout(FREED_WITHIN + 5):
        while taken(redis) != (0, 0):  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0.05)
    return time.monotonic() - since


async def on_uvloop(server: ServerProcess, workers: int) -> None:
    """Returns once so many processes serve, all on uvloop."""
    async with asyncio.timeout(60):
        while True:
            process = psutil.Process(server.process.pid)
            serving = [process] if workers == 1 else process.children()
            maps = [" ".join(found.path for found in one.memory_maps()) for one in serving]
            if sum("uvloop" in found for found in maps) == workers:
                return
            await asyncio.sleep(0.05)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [1, 2])
async def test_resets_under_load_leave_nothing_held_and_every_answer_on_the_record_once(
    tmp_path: Path, workers: int
) -> None:
    chance = random.Random(20261125)
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        upstream = await stack.enter_async_context(FaultUpstream())
        upstream.default = answer
        proxy = await stack.enter_async_context(TcpProxy(redis.port))
        variables = {"POMELO_STORE": f"redis://127.0.0.1:{proxy.port}", "POMELO_WORKERS": str(workers)}
        house = await stack.enter_async_context(Deployment(tmp_path, upstream, SERVE, **variables))
        await house.prepare(CREDITS)
        server = await house.start()
        await on_uvloop(server, workers)
        wires = await stack.enter_async_context(
            open_drivers(server.rest, server.grpc, house.key, concurrency=400)
        )
        stop = asyncio.Event()
        running = [
            asyncio.create_task(calling(wires[n % 2], f"caller.{n}", stop, chance)) for n in range(CALLERS)
        ]
        began = time.monotonic()
        last = await resetting(proxy, chance)
        stop.set()
        told = [one for many in await asyncio.gather(*running) for one in many]
        waited = await freed(redis, last)
        async with insecure_channel(f"unix:{house.data / 'admin.sock'}") as channel:
            audited = await AdminServiceStub(channel).Audit(AuditRequest())
        server.process.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        books = await house.books()
        codes = Counter(one.code for one in told)
        print(  # noqa: T201
            f"{workers} workers: {proxy.cuts} resets in {last - began:.1f} s, {len(told)} calls: {dict(codes)}; "
            f"nothing held {waited:.1f} s after the last"
        )
        assert waited < FREED_WITHIN
        log = house.errors.read_text()
        assert set(codes) <= {"ok", "left", "store_unavailable"}, log
        assert codes["ok"] > len(told) / 2
        assert "Traceback" not in log
        assert "builtins." not in log, "something was not foreseen"
        assert not audited.findings, audited
        assert audited.holds == 0
        books.check_idle()
        check_records(upstream, told, books)


def check_records(upstream: FaultUpstream, told: list[Outcome], books: Books) -> None:
    """Every vendor answer has exactly one usage record, and there are no other records."""
    count = Counter({request_id: len(records) for request_id, records in books.records.items()})
    asked = Counter(received.prompt.split()[0] for received in upstream.requests)
    assert set(asked.values()) == {1}
    assert set(count.values()) == {1}
    assert set(count) <= set(asked)
    for one in told:
        if one.code == "left":
            continue  # A caller that leaves before the first word pays nothing.
        assert (one.request_id in count) == (one.request_id in asked), one
        assert one.code != "ok" or books.records[one.request_id][0]["complete"]
