"""A server whose Redis hangs or dies: no new task reaches a provider, and running tasks are settled
afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pomelo.testing import Answer, FaultUpstream, Gate
from tests.faults.server_process import SERVE, Deployment
from tests.faults.vendor import Vendor, text
from tests.integration.commands import pomelo
from tests.redis_server import RedisServer
from tests.waiting import first

REFUSED_WITHIN = 1.0
"""Seconds from a task to its refusal."""

OUTAGES: dict[str, tuple[Callable[[RedisServer], object], Callable[[RedisServer], object]]] = {
    "it hangs": (RedisServer.stop, RedisServer.resume),
    "it is killed and started again": (RedisServer.kill, RedisServer.start),
}


@pytest.mark.parametrize("outage", OUTAGES)
async def test_no_provider_is_called_in_an_outage_and_running_tasks_are_settled_after_it(
    tmp_path: Path, upstream: FaultUpstream, vendor: Vendor, outage: str
) -> None:
    begin, end = OUTAGES[outage]
    gate = Gate()
    vendor.scripts["running"] = Answer("one two three", at={2: gate})
    with RedisServer() as redis:
        deployment = Deployment(tmp_path, upstream, *SERVE, POMELO_STORE=redis.url)
        async with await deployment.prepare(10**12):
            process = await deployment.start()
            async with process.drivers() as (rest, _):
                assert (await rest(text("before"), "before")).complete
                running = asyncio.create_task(rest(text("running"), "running", stream=True))
                await gate.reached.wait()
                begin(redis)
                for number in range(3):
                    began = time.monotonic()
                    refused = await rest(text(f"refused-{number}"), f"refused-{number}")
                    assert time.monotonic() - began < REFUSED_WITHIN + 3
                    assert (refused.status, refused.code) == (503, "store_unavailable")
                assert set(vendor.calls) == {"before", "running"}, (
                    "a provider was called without a reservation"
                )
                await asyncio.to_thread(end, redis)
                gate.open()
                outcome = await running
                assert outcome.status == 200
                await first(lambda: rest(text("after"), "after"), lambda after: after.complete)
            # What a refused call may have reserved is released in the background, once its outcome is known.
            audited = await first(
                lambda: pomelo(tmp_path, "audit", POMELO_STORE=redis.url),
                lambda audited: ", 0 running tasks;" in audited.out,
            )
            assert audited.status == 0, audited.out
            assert audited.out.strip().endswith("Difference: none")
            process.process.terminate()
            assert await process.wait() == 0
            books = await deployment.books()
            books.check_idle()
            assert all(len(records) == 1 for records in books.records.values())
            assert {"before", "after"} <= set(books.records) <= {"before", "running", "after"}
            assert "running" in books.records or not outcome.complete
