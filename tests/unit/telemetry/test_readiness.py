"""Readiness: it follows a check, ignores one failure, and ends with the drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from pomelo.telemetry.readiness import REASONS, Readiness
from tests.waiting import until


class Check:
    """A check that a test makes fail or hang, and that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.outcomes: Iterator[bool] = iter(())
        self.fails = False
        self.free = asyncio.Event()
        self.free.set()
        self.cancelled = 0

    async def __call__(self) -> None:
        self.runs += 1
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if next(self.outcomes, self.fails):
            raise OSError


@asynccontextmanager
async def followed(check: Check, patience: float = 0.01) -> AsyncIterator[Readiness]:
    readiness = Readiness("store_unavailable")
    async with readiness.follow(check, "store_unavailable", interval=0.001, within=patience):
        yield readiness


async def test_a_process_is_ready_once_it_follows_a_check() -> None:
    assert Readiness("store_unavailable").code == "store_unavailable"
    async with followed(Check()) as readiness:
        assert readiness.code == ""


async def test_what_may_not_be_ready_yet_begins_as_its_first_check_says() -> None:
    for hangs, fails in ((False, False), (False, True), (True, False)):
        check = Check()
        check.fails = fails
        if hangs:
            check.free.clear()
        readiness = Readiness()
        following = readiness.follow(check, "server_unavailable", ready=False, interval=0.001, within=0.01)
        async with following:
            assert readiness.code == ("server_unavailable" if hangs or fails else "")
            change = readiness.next_change()
            runs = check.runs
            if not hangs:
                await until(lambda: check.runs > runs + 3)  # noqa: B023 (awaited in this turn)
                assert not change.is_set()
            check.fails = False
            check.free.set()
            if hangs or fails:
                await asyncio.wait_for(change.wait(), 20)
            assert readiness.code == ""


async def test_two_failures_in_a_row_make_it_not_ready_and_one_success_ready_again() -> None:
    check = Check()
    async with followed(check) as readiness:
        check.fails = True
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert readiness.code == "store_unavailable"
        assert check.runs >= 2
        check.fails = False
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert readiness.code == ""


async def test_the_second_failure_in_a_row_is_enough() -> None:
    check = Check()
    check.outcomes = iter([False, True, False, True, True] + [False] * 5)
    async with followed(check) as readiness:
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert readiness.code == "store_unavailable"


async def test_single_failures_between_successes_change_nothing() -> None:
    check = Check()
    check.outcomes = iter([True, False] * 20)
    async with followed(check) as readiness:
        change = readiness.next_change()
        await until(lambda: check.runs > 41)
        assert not change.is_set()


async def test_a_check_that_hangs_counts_as_failed_and_is_not_started_again() -> None:
    check = Check()
    check.free.clear()
    async with followed(check) as readiness:
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert (readiness.code, check.runs) == ("store_unavailable", 1)
        check.free.set()
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert readiness.code == ""


async def test_a_draining_process_is_never_ready_again() -> None:
    check = Check()
    async with followed(check) as readiness:
        change = readiness.next_change()
        readiness.drain()
        assert change.is_set()
        runs = check.runs
        await until(lambda: check.runs > runs + 3)
        assert (readiness.code, readiness.draining) == ("shutting_down", True)


async def test_leaving_ends_a_check_that_hangs() -> None:
    check = Check()
    check.free.clear()
    async with asyncio.timeout(20):
        async with followed(check, patience=60):
            await until(lambda: check.runs == 1)
            assert check.cancelled == 0
        await until(lambda: check.cancelled == 1)


def test_every_reason_is_in_words() -> None:
    assert all(reason and "_" not in reason for reason in REASONS.values())


async def test_a_check_that_is_cancelled_has_failed_and_is_not_the_last() -> None:
    runs = 0

    async def check() -> None:
        nonlocal runs
        runs += 1
        if runs < 5:
            raise asyncio.CancelledError

    readiness = Readiness("store_unavailable")
    async with readiness.follow(check, "store_unavailable", interval=0.001, within=20):
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert readiness.code == "store_unavailable"
        await asyncio.wait_for(readiness.next_change().wait(), 20)
        assert readiness.code == ""
