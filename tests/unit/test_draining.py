"""Draining counts calls, refuses new ones and ends the running ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pomelo.draining import Draining
from pomelo.service import Services
from tests.unit.refusals import refused


async def echo(value: int) -> int:
    """Returns its argument after one iteration of the event loop."""
    await asyncio.sleep(0)
    return value


async def wait(started: asyncio.Event) -> None:
    """Sets `started`, and waits until it is cancelled."""
    started.set()
    await asyncio.Event().wait()


@asynccontextmanager
async def numbers(count: int) -> AsyncIterator[range]:
    """Opens a context with a value."""
    yield range(count)


async def test_results_and_arguments_pass_through() -> None:
    draining = Draining()
    assert await draining.counted(echo)(7) == 7
    async with draining.counted_context(numbers)(3) as opened:
        assert list(opened) == [0, 1, 2]
        assert draining.running == 1
    assert draining.running == 0


async def test_a_new_call_is_refused_and_a_running_one_completes() -> None:
    draining = Draining()
    running = asyncio.create_task(draining.counted(echo)(1))
    await asyncio.sleep(0)
    draining.drain()
    with refused("shutting_down"):
        await draining.counted(echo)(2)
    with refused("shutting_down"):
        async with draining.counted_context(numbers)(2):
            pytest.fail("it was opened")
    await asyncio.wait_for(draining.idle(), 5)
    assert await running == 1


async def test_a_stop_ends_running_calls_with_shutting_down() -> None:
    draining, started = Draining(), asyncio.Event()
    running = asyncio.create_task(draining.counted(wait)(started))
    await started.wait()
    idle = asyncio.create_task(draining.idle())
    draining.stop()
    with refused("shutting_down"):
        await running
    await asyncio.wait_for(idle, 5)


async def test_a_stop_ends_the_body_of_an_open_context() -> None:
    draining, started = Draining(), asyncio.Event()

    async def hold() -> None:
        async with draining.counted_context(numbers)(1):
            await wait(started)

    running = asyncio.create_task(hold())
    await started.wait()
    draining.stop()
    with refused("shutting_down"):
        await running
    assert draining.running == 0


async def test_a_cancelled_call_is_not_reported_as_a_shutdown() -> None:
    draining, started = Draining(), asyncio.Event()
    running = asyncio.create_task(draining.counted(wait)(started))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert draining.running == 0


async def test_every_call_of_guarded_services_is_counted_and_refused_while_draining() -> None:
    draining = Draining()
    methods = ["run_task", "list_models", "get_model", "upload_media", "get_account", "list_usage", "admit"]
    contexts = ["stream_task", "download_media"]
    service: Any = SimpleNamespace(**dict.fromkeys(methods, echo), **dict.fromkeys(contexts, numbers))
    guarded = draining.guard(Services(service, service, service, service, service))
    calls: list[Any] = [
        *(guarded.tasks.run_task, guarded.models.list_models, guarded.models.get_model),
        *(guarded.media.upload_media, guarded.accounts.get_account, guarded.accounts.list_usage),
    ]
    opened: list[Any] = [guarded.tasks.stream_task, guarded.media.download_media]
    admit: Any = guarded.access.admit
    for call in calls:
        running = asyncio.create_task(call(7))
        await asyncio.sleep(0)
        assert draining.running == 1
        assert await running == 7
    for context in opened:
        async with context(2):
            assert draining.running == 1
    assert await admit(7) == 7
    draining.drain()
    for call in (*calls, admit):
        with refused("shutting_down"):
            await call(7)
    for context in opened:
        with refused("shutting_down"):
            async with context(2):
                pytest.fail("it was opened")
