"""A server that is terminated: the delivered output of every task is in the books before it ends."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pomelo.testing import Answer, FaultUpstream, Gate
from tests.faults.callers import Told, Watch, callers
from tests.faults.house import SERVE, House, Process

log = logging.getLogger("tests.shutdown")

STREAMS = 200
GRACE = 3.0
CREDITS = 10**12

pytestmark = pytest.mark.timeout(200)


def text(words: str) -> dict[str, Any]:
    """A text task."""
    return {"model": "gpt-4", "messages": [{"role": "user", "content": words}]}


@pytest.fixture
def vendor(upstream: FaultUpstream) -> Iterator[FaultUpstream]:
    """The fake vendors, without answers and requests."""
    upstream.reset()
    yield upstream
    upstream.reset()


async def wait_for_shutdown(process: Process) -> None:
    """Waits until the server logs that it is ending."""
    assert process.process.stderr is not None
    async with asyncio.timeout(30):
        while b"Ending" not in await process.process.stderr.readline():
            pass


@pytest.mark.parametrize("longer", [0, STREAMS // 2, STREAMS], ids=["short", "both", "long"])
async def test_two_hundred_streams_are_settled_when_the_server_is_terminated(
    longer: int, tmp_path: Path, vendor: FaultUpstream
) -> None:
    short, long, watch = Gate(), Gate(), Watch()
    vendor.when("short", Answer("one two three four", at={2: short}))
    vendor.when("long", Answer("one two three four", at={2: long}))
    house = House(tmp_path, vendor, SERVE, POMELO_GRACE=str(GRACE))
    async with await house.prepare(CREDITS):
        process = await house.start(errors=asyncio.subprocess.PIPE)
        async with callers(process.rest, process.grpc, house.key, at_once=STREAMS // 2) as clients:
            tasks: list[asyncio.Task[Told]] = []
            for one in range(STREAMS):
                name = "long" if one < longer else "short"
                asking = clients[one % 2](text(name), f"{name}.{one}", stream=True, piece=watch.came)
                tasks.append(asyncio.create_task(asking))
            await watch.reaches(2 * STREAMS)
            began = time.monotonic()
            process.process.terminate()
            await wait_for_shutdown(process)
            short.open()
            assert await process.ended() == 0
            took = time.monotonic() - began
            told = await asyncio.gather(*tasks)
        log.info("%d streams, %d of them too long: ended after %.2f s", STREAMS, longer, took)
        assert took < GRACE + 2
        assert Counter(one.code for one in told) == Counter(ok=STREAMS - longer, shutting_down=longer)
        books = await house.books()
        books.check_idle()
        assert set(books.records) == {one.request_id for one in told}
        for one in told:
            (record,) = books.records[one.request_id]
            assert record["task_id"] == one.task_id
            assert record["complete"] == one.whole
            assert record["output_tokens"] == one.pieces == (4 if one.whole else 2)
