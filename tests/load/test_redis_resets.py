"""Resets of connections to Redis under load: no 500, no reservation left, one usage record for each answer.

The server is `pomelo serve` on uvloop, which raises other errors on a closed connection than asyncio. `make
load` resets 500 connections, `make test` fewer.
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

import pytest
from grpc.aio import insecure_channel
from redis import Redis

from pomelo.gen.admin.v1.admin_service_pb2 import AuditLedgerRequest
from pomelo.gen.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.stores.redis.key_names import names
from pomelo.testing import Answer, FaultUpstream
from tests.faults.books import LIVE, Books
from tests.faults.drivers import Driver, Outcome
from tests.faults.server_process import SERVE, Deployment
from tests.faults.tcp_proxy import Cut, TcpProxy
from tests.faults.vendor import WORDS, Vendor, text
from tests.load.process_usage import processes_on_uvloop
from tests.redis_server import RedisServer
from tests.waiting import until

RESETS = int(os.environ.get("LOAD_RESETS", "60"))
CALLERS = 20
STORM = 20
"""Consecutive resets, enough to make some calls fail."""

RELEASED_WITHIN = 35.0
"""Seconds from the last reset until no reservation is left."""

CREDITS = 10**12


async def run_tasks(
    driver: Driver, name: str, stop: asyncio.Event, rng: random.Random, codes: Counter[str]
) -> list[Outcome]:
    """Runs tasks one after another, unary and streamed, and cancels some half way, until `stop` is set. Counts
    their codes."""
    outcomes: list[Outcome] = []
    while not stop.is_set():
        request_id = f"{name}.{len(outcomes)}"
        body, stream = text(request_id), rng.random() < 0.5
        call = asyncio.ensure_future(driver(body, request_id, stream=stream))
        done, _ = await asyncio.wait({call}, timeout=0.02 if rng.random() < 0.1 else 60)
        if done:
            outcomes.append(call.result())
        else:
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            outcomes.append(Outcome(request_id, body, code="cancelled"))
        codes[outcomes[-1].code] += 1
        if outcomes[-1].code not in ("ok", "cancelled"):
            await asyncio.sleep(0.05)  # a refused caller backs off
    return outcomes


async def reset_connections(proxy: TcpProxy, rng: random.Random, codes: Counter[str]) -> float:
    """Makes RESETS resets; returns the time of the last one. The store's own retries handle single resets;
    sometimes there are so many in a row that a call fails. Then it waits for successful calls."""
    last = 0.0
    while proxy.cuts < RESETS:
        target = proxy.cuts + rng.choice([1, 1, 1, 1, 1, 1, 1, 1, 1, STORM])
        for _ in range(target - proxy.cuts):
            proxy.cut(rng.choice(list(Cut)))
        await until(lambda: proxy.cuts >= target, 20)  # noqa: B023 (awaited here)
        last = time.monotonic()
        enough = codes["ok"] + rng.randrange(2 * CALLERS)
        await until(lambda: codes["ok"] >= enough)  # noqa: B023 (awaited here)
    return last


def nothing_reserved(redis: RedisServer) -> bool:
    """Whether Redis has no reserved microcredits and no reservations."""
    with Redis(port=redis.port, protocol=2) as server:
        return not int(server.hget(names(LIVE).wallet, "held") or 0) and not server.hlen(names(LIVE).holds)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [1, 2])
async def test_resets_under_load_leave_no_reservation_and_one_usage_record_for_each_answer(
    tmp_path: Path, workers: int
) -> None:
    rng = random.Random(20261125)
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        upstream = await stack.enter_async_context(FaultUpstream())
        upstream.default = vendor = Vendor()
        # So fast that a task mostly waits for the store.
        vendor.text = Answer(WORDS, at=dict.fromkeys(range(6), 0.005))
        proxy = await stack.enter_async_context(TcpProxy(redis.port))
        variables = {"POMELO_STORE": f"redis://127.0.0.1:{proxy.port}", "POMELO_WORKERS": str(workers)}
        deployment = await stack.enter_async_context(Deployment(tmp_path, upstream, *SERVE, **variables))
        await deployment.prepare(CREDITS)
        server = await deployment.start()
        await until(lambda: processes_on_uvloop(server.process.pid) == workers, 60)
        drivers = await stack.enter_async_context(server.drivers(400))
        stop = asyncio.Event()
        codes: Counter[str] = Counter()
        running = [
            asyncio.create_task(run_tasks(drivers[n % 2], f"caller.{n}", stop, rng, codes))
            for n in range(CALLERS)
        ]
        began = time.monotonic()
        last = await reset_connections(proxy, rng, codes)
        stop.set()
        outcomes = [outcome for results in await asyncio.gather(*running) for outcome in results]
        await until(lambda: nothing_reserved(redis), RELEASED_WITHIN + 5)
        waited = time.monotonic() - last
        async with insecure_channel(f"unix:{deployment.data / 'admin.sock'}") as channel:
            audited = await AdminServiceStub(channel).AuditLedger(AuditLedgerRequest())
        server.process.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
        books = await deployment.books()
        print(  # noqa: T201
            f"{workers} workers: {proxy.cuts} resets in {last - began:.1f} s, {len(outcomes)} calls: {dict(codes)}; "
            f"nothing reserved {waited:.1f} s after the last"
        )
        assert waited < RELEASED_WITHIN
        log = deployment.errors.read_text()
        assert set(codes) <= {"ok", "cancelled", "store_unavailable"}, log
        assert codes["ok"] > len(outcomes) / 2
        assert "Traceback" not in log
        assert "builtins." not in log, "an unexpected exception"
        assert not audited.findings, audited
        assert audited.reservations == 0
        books.check_idle()
        check_records(vendor, outcomes, books)


def check_records(vendor: Vendor, outcomes: list[Outcome], books: Books) -> None:
    """Every vendor answer has exactly one usage record, and there are no other records."""
    count = Counter({request_id: len(records) for request_id, records in books.records.items()})
    assert set(vendor.calls.values()) == {1}
    assert set(count.values()) == {1}
    assert set(count) <= set(vendor.calls)
    for outcome in outcomes:
        if outcome.code == "cancelled":
            continue  # a call that is cancelled before the first word costs nothing
        assert (outcome.request_id in count) == (outcome.request_id in vendor.calls), outcome
        assert outcome.code != "ok" or books.records[outcome.request_id][0]["complete"]
