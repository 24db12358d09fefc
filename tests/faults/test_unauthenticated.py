"""Callers without a key cost next to nothing over gRPC, and one with a free key costs its account's share.

The server is a process of its own, so that its memory can be read. LOAD_CALLS makes the attack larger, and waits
for all that a key may keep open.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.attack import (
    BOMB,
    CHECK,
    DOWNLOAD,
    HALF,
    MIB,
    REFLECTION,
    RUN_TASK,
    UPLOAD,
    WATCH,
    attack,
)
from tests.faults.good_callers import good_callers
from tests.load.memory import resident, watched
from tests.serving import Served, serve

log = logging.getLogger(__name__)

LARGE = "LOAD_CALLS" in os.environ
CALLS = 300 if LARGE else 170
"""Calls of each of six methods."""
GZIP = [("grpc-encoding", "gzip")]


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """`pomelo serve`, with a key of an account on the plan free beside the usual one."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        await command(process, "accounts", "plan", "default", "unlimited")
        # Memory loaded by the first call of each kind does not count as growth.
        async with good_callers(process, process.key) as good, attack(process, 1) as attacking:
            attacking.begin(2, RUN_TASK, [("authorization", f"Bearer {process.key}"), *GZIP], BOMB, end=True)
            await attacking.over()
        assert not good.refused
        yield process


async def command(served: Served, *arguments: str) -> str:
    """What a command prints on its last line."""
    run = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pomelo.cli", *arguments,
        env={**os.environ, "POMELO_DATA": str(served.data)},
        stdout=asyncio.subprocess.PIPE, cwd=Path.cwd(),
    )  # fmt: skip
    output, _ = await run.communicate()
    assert run.returncode == 0
    return output.decode().strip().rpartition("\n")[2]


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "on connections of callers"])
async def test_calls_without_a_key_are_over_in_10_s_and_good_callers_do_not_notice(
    shared: bool, served: Served
) -> None:
    before = resident(served.pid)
    with watched(served.pid) as peak:
        async with (
            asyncio.timeout(60),
            good_callers(served, served.key) as good,
            attack(served) as attacking,
        ):
            if shared:
                await attacking.show(served.key)
            attacking.begin(8, RUN_TASK, GZIP, BOMB, end=True)
            for path in (RUN_TASK, UPLOAD, CHECK, WATCH, REFLECTION, DOWNLOAD):
                attacking.begin(CALLS, path)
                attacking.begin(10, path, [("authorization", "Bearer nope")], HALF)
            await attacking.over()
            longest = attacking.longest()
    grown = peak.most - before
    log.info(
        "%d calls: %d MiB, waits %s, longest %.1f s", len(attacking.calls), grown / MIB, good.waits, longest
    )
    assert grown < 64 * MIB
    assert not good.refused
    assert good.count > 10
    assert max(good.waits.values()) < 1.0
    assert longest < 11.0  # 10 on an idle machine


async def test_a_free_key_costs_its_share_and_others_do_not_notice(served: Served) -> None:
    await command(served, "accounts", "create", "hostile", "--plan", "free")
    key = await command(served, "keys", "create", "hostile")
    metadata = [("authorization", f"Bearer {key}")]
    before = resident(served.pid)
    with watched(served.pid) as peak:
        async with (
            asyncio.timeout(110),
            good_callers(served, served.key) as good,
            attack(served) as attacking,
        ):
            attacking.begin(8, RUN_TASK, [*metadata, *GZIP], BOMB, end=True)
            await attacking.over()
            attacking.begin(30, RUN_TASK, metadata, HALF)
            attacking.begin(30, UPLOAD, metadata, HALF)
            if LARGE:
                await attacking.over()
                assert attacking.longest() < 62
            else:
                await attacking.sent(8 + 8 + 6)  # the rest waits for its turn
    grown = peak.most - before
    log.info("%d MiB, waits %s", grown / MIB, good.waits)
    assert grown < 208 * MIB  # 128 MiB are its share; what grpc buffers beside that is freed late
    assert not good.refused
    assert max(good.waits.values()) < 1.0
