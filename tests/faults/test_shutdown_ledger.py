"""A terminated server: the delivered output of every task is in the books before the process exits."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from pathlib import Path

import pytest

from pomelo.testing import Answer, FaultUpstream, Gate
from tests.faults.drivers import ChunkCounter, Outcome
from tests.faults.server_process import SERVE, Deployment, ServerProcess
from tests.faults.vendor import Vendor, text
from tests.load.process_usage import queued_seconds

log = logging.getLogger("tests.shutdown")

STREAMS = 200
GRACE = 3.0
CREDITS = 10**12

pytestmark = pytest.mark.timeout(200)


async def wait_for_shutdown(process: ServerProcess) -> None:
    """Waits until the server logs that it is ending."""
    assert process.process.stderr is not None
    async with asyncio.timeout(30):
        while b"Ending" not in await process.process.stderr.readline():
            pass


@pytest.mark.parametrize("longer", [0, STREAMS // 2, STREAMS], ids=["short", "both", "long"])
async def test_two_hundred_streams_are_settled_when_the_server_is_terminated(
    longer: int, tmp_path: Path, upstream: FaultUpstream, vendor: Vendor
) -> None:
    short, long, watch = Gate(), Gate(), ChunkCounter()
    vendor.scripts = {
        "short": Answer("one two three four", at={2: short}),
        "long": Answer("one two three four", at={2: long}),
    }
    deployment = Deployment(tmp_path, upstream, *SERVE, POMELO_GRACE=str(GRACE))
    async with await deployment.prepare(CREDITS):
        process = await deployment.start(stderr=asyncio.subprocess.PIPE)
        async with process.drivers(STREAMS // 2) as clients:
            tasks: list[asyncio.Task[Outcome]] = []
            for index in range(STREAMS):
                name = "long" if index < longer else "short"
                call = clients[index % 2](text(name), f"{name}.{index}", stream=True, on_chunk=watch.add)
                tasks.append(asyncio.create_task(call))
            await watch.wait_for(2 * STREAMS)
            began = time.monotonic()
            queued = last = queued_seconds(process.process.pid)
            process.process.terminate()
            await wait_for_shutdown(process)
            short.open()
            ended = asyncio.create_task(process.wait())
            while not ended.done():  # the time for which it waits for a processor is not its own
                last = max(last, queued_seconds(process.process.pid))
                await asyncio.wait({ended}, timeout=0.02)
            assert ended.result() == 0
            took = time.monotonic() - began - (last - queued)
            outcomes = await asyncio.gather(*tasks)
        log.info("%d streams, %d of them too long: ended after %.2f s", STREAMS, longer, took)
        assert took < GRACE + 2
        assert Counter(outcome.code for outcome in outcomes) == Counter(
            ok=STREAMS - longer, shutting_down=longer
        )
        books = await deployment.books()
        books.check_idle()
        assert set(books.records) == {outcome.request_id for outcome in outcomes}
        for outcome in outcomes:
            (record,) = books.records[outcome.request_id]
            assert record["task_id"] == outcome.task_id
            assert record["complete"] == outcome.complete
            assert record["output_tokens"] == outcome.chunks == (4 if outcome.complete else 2)
