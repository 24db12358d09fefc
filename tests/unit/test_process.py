"""Periodic work: no exception ends it, and cancellation does."""

from __future__ import annotations

import asyncio
import logging

import pytest

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors
from pomelo.process import periodically

log = logging.getLogger("tests.periodic")

ERRORS = [PomeloError("store_unavailable"), RuntimeError("secret"), OSError(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("immediately", [False, True])
async def test_nothing_that_it_raises_ends_it(
    error: BaseException, immediately: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = asyncio.Semaphore(0)

    async def work() -> None:
        rounds.release()
        raise error

    with caplog.at_level(logging.ERROR, "tests.periodic"):
        task = asyncio.create_task(
            periodically(work, 0.001, "It failed", UnexpectedErrors(log), immediately=immediately)
        )
        async with asyncio.timeout(10):
            for _ in range(5):
                await rounds.acquire()
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    told = [one.getMessage() for one in caplog.records]
    if isinstance(error, PomeloError):
        assert told == [], "it was logged where it was met"
    else:
        assert len(told) == 1, "once, however often it happened"
        assert told[0].startswith("It failed\n")
        assert "secret" not in told[0]


async def test_being_cancelled_in_the_middle_of_its_work_ends_it() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(
        periodically(work, 0.001, "It failed", UnexpectedErrors(log), immediately=True)
    )
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


def test_a_failure_is_logged_once_a_minute_for_each_place_that_it_came_from(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    unforeseen = UnexpectedErrors(log, clock=lambda: now[0])

    def fail(kind: type[Exception]) -> None:
        try:
            raise kind
        except Exception as error:
            unforeseen.log("It failed", error)

    def fail_elsewhere() -> None:
        try:
            raise KeyError
        except KeyError as error:
            unforeseen.log("It failed", error)

    with caplog.at_level(logging.ERROR, "tests.periodic"):
        for _ in range(10):
            fail(KeyError)
            fail(ValueError)
            fail_elsewhere()
        assert len(caplog.records) == 3
        now[0] = 59.9
        fail(KeyError)
        assert len(caplog.records) == 3
        now[0] = 60.0
        fail(KeyError)
        assert len(caplog.records) == 4
