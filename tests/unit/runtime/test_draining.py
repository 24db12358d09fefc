"""A draining server counts the calls of all services, refuses new ones and ends the running ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, cast

import pytest

from pomelo.call import Call
from pomelo.runtime.draining import Draining
from pomelo.service import Services
from tests.calls import call_of
from tests.unit.loop import iterations
from tests.unit.refusals import refused
from tests.waiting import cancel

METHODS = (
    ("tasks", "run_task"),
    ("models", "list_models"),
    ("models", "get_model"),
    ("media", "upload_media"),
    ("accounts", "get_account"),
    ("accounts", "list_usage"),
    ("accounts", "sum_usage"),
)
CONTEXTS = (("tasks", "stream_task"), ("media", "download_media"))


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
        assert len(draining.scopes) == 1
    assert len(draining.scopes) == 0


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
    await asyncio.wait_for(draining.idle(), 20)
    assert await running == 1


async def test_a_stop_ends_running_calls_with_shutting_down() -> None:
    draining, started = Draining(), asyncio.Event()
    running = asyncio.create_task(draining.counted(wait)(started))
    await started.wait()
    idle = asyncio.create_task(draining.idle())
    draining.stop()
    with refused("shutting_down"):
        await running
    await asyncio.wait_for(idle, 20)


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
    assert len(draining.scopes) == 0


async def test_a_cancelled_call_is_not_reported_as_a_shutdown() -> None:
    draining, started = Draining(), asyncio.Event()
    running = asyncio.create_task(draining.counted(wait)(started))
    await started.wait()
    await cancel(running)
    assert len(draining.scopes) == 0


class Waiting:
    """A service whose calls wait until `end` is set."""

    def __init__(self) -> None:
        self.end = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return self.stream if name in ("stream_task", "download_media") else self.call

    async def call(self, *arguments: object) -> object:
        await self.end.wait()
        return arguments

    @asynccontextmanager
    async def stream(self, *arguments: object) -> AsyncIterator[object]:
        yield arguments


def guarded(draining: Draining, inner: Waiting) -> Services:
    return draining.guard(Services(*[cast(Any, inner)] * 5))


@pytest.mark.parametrize(("service", "method"), METHODS)
async def test_every_call_is_counted_and_refused_after_a_drain(service: str, method: str) -> None:
    draining, inner = Draining(), Waiting()
    call = getattr(getattr(guarded(draining, inner), service), method)
    running = asyncio.create_task(call("first", "second"))
    await asyncio.sleep(0)
    assert len(draining.scopes) == 1
    draining.drain()
    with refused("shutting_down"):
        await call("first", "second")
    inner.end.set()
    assert await running == ("first", "second")
    assert len(draining.scopes) == 0


@pytest.mark.parametrize(("service", "method"), CONTEXTS)
async def test_every_stream_is_counted_and_refused_after_a_drain(service: str, method: str) -> None:
    draining = Draining()
    open_stream = getattr(getattr(guarded(draining, Waiting()), service), method)
    async with open_stream("first", "second") as value:
        assert value == ("first", "second")
        assert len(draining.scopes) == 1
        draining.drain()
        with refused("shutting_down"):
            async with open_stream("first", "second"):
                pytest.fail("it was opened")
    assert len(draining.scopes) == 0


async def test_the_admission_of_a_call_is_not_counted_but_refused_after_a_drain() -> None:
    draining, inner = Draining(), Waiting()
    admit = cast(Any, guarded(draining, inner).access.admit)
    admitting = asyncio.create_task(admit("call"))
    await asyncio.sleep(0)
    assert len(draining.scopes) == 0
    inner.end.set()
    assert await admitting == ("call",)
    draining.drain()
    with refused("shutting_down"):
        await admit("call")


async def test_a_stop_refuses_new_calls_and_may_be_repeated_while_a_call_ends() -> None:
    draining, ending, end = Draining(), asyncio.Event(), asyncio.Event()

    async def end_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            async with asyncio.timeout(20):
                await end.wait()

    running = asyncio.create_task(draining.counted(end_slowly)())
    await asyncio.sleep(0)
    draining.stop()
    await ending.wait()
    draining.stop()
    with refused("shutting_down"):
        await draining.counted(asyncio.sleep)(0)
    end.set()
    with refused("shutting_down"):
        await running


async def test_idle_waits_for_a_call_that_begins_as_the_last_one_ends() -> None:
    draining = Draining()
    async with AsyncExitStack() as stack:
        inner = Waiting()
        first = draining.counted_context(inner.stream)()
        await first.__aenter__()
        idle = asyncio.create_task(draining.idle())
        await asyncio.sleep(0)
        await first.__aexit__(None, None, None)
        await stack.enter_async_context(draining.counted_context(inner.stream)())
        await iterations(2)
        assert not idle.done()
    async with asyncio.timeout(20):
        await idle


async def test_a_stop_spares_a_call_whose_task_is_being_charged() -> None:
    draining, started = Draining(), asyncio.Event()
    charged, other = call_of(None), call_of(None)
    charged.settling = True

    async def settle(call: Call) -> int:
        started.set()
        await asyncio.sleep(0.05)
        return 7

    running = [asyncio.create_task(draining.counted(settle)(call)) for call in (charged, other)]
    await started.wait()
    draining.stop()
    with refused("shutting_down"):
        await running[1]
    assert await running[0] == 7


async def test_a_call_that_returns_although_it_was_stopped_leaves_no_cancellation() -> None:
    draining = Draining()

    async def ignore() -> int:
        asyncio.get_running_loop().call_soon(draining.stop)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return 7

    assert await draining.counted(ignore)() == 7
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
