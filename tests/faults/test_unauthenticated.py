"""Over gRPC, calls without a key cost almost nothing, and calls with a free key at most its account's share.

The server is a separate process, so that its memory can be measured. With LOAD_CALLS the attack is larger,
and the test waits for the time limits of calls with a key.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.calls import bearer
from tests.faults.attack import (
    CHECK,
    DOWNLOAD,
    GZIP_BOMB,
    PARTIAL,
    REFLECTION,
    RUN_TASK,
    UPLOAD,
    WATCH,
    Attack,
    attack,
)
from tests.faults.other_callers import other_callers
from tests.integration.commands import pomelo
from tests.load.process_usage import MIB, peak_memory, resident
from tests.serving import Served, serve_interpreter

log = logging.getLogger(__name__)

LARGE = "LOAD_CALLS" in os.environ
CALLS = 300 if LARGE else 170
"""Calls of each of the six methods."""

GZIP = [("grpc-encoding", "gzip")]


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """`pomelo serve` with an unlimited account, warmed up."""
    async with serve_interpreter(tmp_path_factory.mktemp("served")) as process:
        await command(process, "accounts", "plan", "default", "unlimited")
        # The first call of each type allocates memory that does not count as growth.
        async with other_callers(process, "rest", "grpc") as callers, attack(process, 1) as attacking:
            attacking.start(2, RUN_TASK, [*bearer(process.key), *GZIP], GZIP_BOMB, end=True)
            await attacking.wait_ended()
        assert not callers.errors
        yield process


async def command(served: Served, *arguments: str) -> str:
    """Runs a command on the server's data folder; returns the last line of its output."""
    ended = await pomelo(served.data.parent, *arguments)
    assert ended.status == 0, ended.error
    return ended.out.strip().rpartition("\n")[2]


@asynccontextmanager
async def attacked(served: Served, max_growth: int, seconds: float) -> AsyncIterator[Attack]:
    """An attack, which is the body: it ends in time, the server's memory grows by less than `max_growth` bytes, and
    other callers get answers soon."""
    before = resident(served.pid)
    with peak_memory(served.pid) as peak:
        async with (
            asyncio.timeout(seconds),
            other_callers(served, "rest", "grpc") as callers,
            attack(served) as attacking,
        ):
            yield attacking
    grown = peak.bytes - before
    log.info(
        "%d calls: %d MiB, other callers waited at most %.3f s",
        len(attacking.calls), grown / MIB, max(callers.all_waits),
    )  # fmt: skip
    assert grown < max_growth
    assert not callers.errors
    assert len(callers.all_waits) > 10
    assert max(callers.all_waits) < 1.0


@pytest.mark.parametrize("authenticated", [False, True], ids=["own connections", "authenticated connections"])
async def test_calls_without_a_key_end_within_10_s_and_do_not_delay_other_callers(
    authenticated: bool, served: Served
) -> None:
    async with attacked(served, 64 * MIB, 60) as attacking:
        if authenticated:
            await attacking.authenticate(served.key)
        attacking.start(8, RUN_TASK, GZIP, GZIP_BOMB, end=True)
        for path in (RUN_TASK, UPLOAD, CHECK, WATCH, REFLECTION, DOWNLOAD):
            attacking.start(CALLS, path)
            attacking.start(10, path, [("authorization", "Bearer nope")], PARTIAL)
        await attacking.wait_ended()
        assert attacking.longest() < 11.0  # 10 on an idle machine


async def test_calls_with_a_free_key_cost_its_share_and_do_not_delay_other_callers(served: Served) -> None:
    await command(served, "accounts", "create", "hostile", "--plan", "free")
    metadata = bearer(await command(served, "keys", "create", "hostile"))
    # The account's share is 128 MiB; grpc frees its own buffers late.
    async with attacked(served, 208 * MIB, 110) as attacking:
        attacking.start(8, RUN_TASK, [*metadata, *GZIP], GZIP_BOMB, end=True)
        await attacking.wait_ended()
        attacking.start(30, RUN_TASK, metadata, PARTIAL)
        attacking.start(30, UPLOAD, metadata, PARTIAL)
        if LARGE:
            await attacking.wait_ended()
            assert attacking.longest() < 62
        else:
            await attacking.wait_sent(8 + 8 + 6)  # all others wait until these have ended
