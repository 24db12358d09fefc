"""Providers that cancel their task, ignore its cancellation or fail while they are closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from pomelo.providers.base import Event, Job
from tests.app import RunningApp
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, STREAM
from tests.integration.faulty_provider import FAULTY, LAST, WORD, ask, check, faulty_app, yielding
from tests.tasks import text_body
from tests.waiting import current_task, until

app = faulty_app()


@PROTOCOL
async def test_a_call_is_cancelled_when_its_caller_leaves_or_its_deadline_passes(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        started.set()
        try:
            await asyncio.sleep(60)
            yield LAST
        except asyncio.CancelledError:
            cancelled.set()
            raise

    FAULTY.act = act
    for within in (0.2, 1, 5):
        outcome = await ask(app, protocol, within=within)
        assert outcome.code == "deadline_exceeded"
        if started.is_set():  # on a busy machine, a deadline may pass before the provider is called
            break
    await asyncio.wait_for(cancelled.wait(), 20)
    started.clear()
    cancelled.clear()
    task = asyncio.create_task(ask(app, protocol))
    await asyncio.wait_for(started.wait(), 20)
    task.cancel()
    await asyncio.wait_for(cancelled.wait(), 20)
    assert "the provider" not in caplog.text


async def keep_waiting() -> None:
    await asyncio.sleep(60)


async def continue_immediately() -> None:
    pass


@STREAM
@pytest.mark.parametrize("begun", [(), (WORD,)], ids=["before", "after"])
@pytest.mark.parametrize("then", [keep_waiting, continue_immediately])
async def test_a_provider_that_cancels_its_own_task_is_provider_failed_and_logged(
    app: RunningApp, caplog: pytest.LogCaptureFixture, then: Any, begun: tuple[Event, ...], stream: bool
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        for event in begun:
            yield event
        current_task().cancel()
        await then()
        yield LAST

    FAULTY.act = act
    await check(app, caplog, text_body(), stream=stream)
    assert "cancelled the task that runs it" in caplog.text


async def test_a_method_that_cancels_its_task_when_called_is_provider_failed(
    app: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    def act(job: Job[Any]) -> Any:
        current_task().cancel()
        return yielding(WORD, LAST)(job)

    FAULTY.act = act
    for stream in (False, True):
        await check(app, caplog, text_body(), stream=stream)


@PROTOCOL_AND_STREAM
async def test_a_provider_that_cancels_its_task_later_fails_only_that_task(
    app: RunningApp, caplog: pytest.LogCaptureFixture, stream: bool, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        if protocol == "grpc":
            yield WORD
        asyncio.get_running_loop().call_later(0.05, current_task().cancel)
        await asyncio.sleep(60)
        yield LAST

    def errors() -> int:
        return sum(record.levelno >= logging.ERROR for record in caplog.records)

    FAULTY.act = act
    async with asyncio.timeout(20):
        outcome = await ask(app, protocol, stream=stream)
        assert outcome.code == "internal_error"
        # Over gRPC the line may follow the answer: only sending it shows that the caller is still there.
        await until(lambda: errors() > 0)
        assert errors() == 1
        FAULTY.act = yielding(WORD, LAST)
        outcome = await ask(app, protocol, stream=stream)
    assert (outcome.code, outcome.content) == ("ok", "Hello")
    assert errors() == 1


async def swallow() -> None:
    """Ignores every cancellation."""
    for _ in range(300):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)


async def wait_when_cancelled() -> None:
    """Waits again when it is cancelled."""
    try:
        await asyncio.sleep(30)
    finally:
        await asyncio.sleep(30)


@PROTOCOL
@pytest.mark.parametrize("act_on", [swallow, wait_when_cancelled])
async def test_a_provider_that_ignores_cancellation_delays_its_caller_by_a_second_at_most(
    app: RunningApp, caplog: pytest.LogCaptureFixture, act_on: Any, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        await act_on()
        yield LAST

    FAULTY.act = act
    account = await app.account()
    start = asyncio.get_running_loop().time()
    outcome = await app.ask(protocol, account.live, text_body(), within=1)
    assert outcome.code == "deadline_exceeded"
    assert asyncio.get_running_loop().time() - start < 10, "the provider would wait for 30 s"
    await app.idle(account, live=True)
    assert (await app.balance(account, live=True)).held == 0
    # Over gRPC the client then cancels the call, which ends the second wait.
    if act_on is swallow or protocol == "rest":
        assert "went on after it was cancelled, and was stopped" in caplog.text


@PROTOCOL
async def test_a_provider_that_waits_while_closing_delays_its_caller_by_a_second_at_most(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        try:
            yield WORD
            yield None
        finally:
            await asyncio.sleep(30)

    FAULTY.act = act
    async with asyncio.timeout(20):  # the provider would wait for 30 s
        outcome = await ask(app, protocol, stream=True)
    assert outcome.code == "provider_failed"
    assert "went on after it was closed, and was stopped" in caplog.text


@PROTOCOL
async def test_a_provider_can_use_its_own_timeouts_and_task_groups(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def fail() -> None:
        raise ValueError

    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        try:
            async with asyncio.timeout(0.05):
                await asyncio.sleep(60)
        except TimeoutError:
            yield WORD
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
                await asyncio.sleep(60)
        except* ValueError:
            await asyncio.sleep(1.2)
        yield LAST

    FAULTY.act = act
    outcome = await ask(app, protocol, stream=True)
    assert (outcome.code, outcome.content, outcome.done) == ("ok", "Hello", True)
    assert "the provider" not in caplog.text


@PROTOCOL
async def test_an_error_while_a_provider_is_closed_is_logged_and_changes_nothing(
    app: RunningApp, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def act(job: Job[Any]) -> AsyncIterator[Any]:
        try:
            yield WORD
            yield None
        finally:
            raise SystemExit(3)

    FAULTY.act = act
    outcome = await ask(app, protocol, stream=True)
    assert outcome.code == "provider_failed"
    assert "failed unexpectedly while it was closed" in caplog.text
    FAULTY.act = yielding(WORD, LAST)
    outcome = await ask(app, protocol, stream=True)
    assert (outcome.code, outcome.content, outcome.done) == ("ok", "Hello", True)
