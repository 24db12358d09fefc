"""Periodic work begins after one period, or immediately, and is done once a period."""

from __future__ import annotations

import asyncio
import logging

import pytest

from pomelo.logs import UnexpectedErrors
from pomelo.process import periodically


@pytest.mark.parametrize(("immediately", "rounds"), [(False, 0), (True, 1)])
async def test_the_first_round_waits_unless_it_is_immediate(immediately: bool, rounds: int) -> None:
    done = 0

    async def work() -> None:
        nonlocal done
        done += 1

    errors = UnexpectedErrors(logging.getLogger("tests.periods"))
    task = asyncio.create_task(periodically(work, 3600.0, "It failed", errors, immediately=immediately))
    for _ in range(10):
        await asyncio.sleep(0)
    assert done == rounds
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
