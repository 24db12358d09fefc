"""Periodic work: no exception ends it, but cancellation does."""

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
async def test_no_exception_ends_periodic_work(
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
    messages = [one.getMessage() for one in caplog.records]
    if isinstance(error, PomeloError):
        assert messages == [], "it was logged when it was raised"
    else:
        assert len(messages) == 1, "once, however often it happened"
        assert messages[0].startswith("It failed\n")
        assert "secret" not in messages[0]


async def test_cancellation_ends_periodic_work() -> None:
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


def test_an_error_is_logged_once_a_minute_per_line_of_code(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    unforeseen = UnexpectedErrors(log, clock=lambda: now[0])

    def fail(error_type: type[Exception]) -> None:
        try:
            raise error_type
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
