"""The services of a server that shuts down: every call is counted, and refused from then on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, cast

import pytest

from pomelo.draining import Draining
from pomelo.errors import PomeloError
from pomelo.service import Services

METHODS = (
    ("tasks", "run_task"),
    ("models", "list_models"),
    ("models", "get_model"),
    ("media", "upload_media"),
    ("accounts", "get_account"),
    ("accounts", "list_usage"),
)
CONTEXTS = (("tasks", "stream_task"), ("media", "download_media"))


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
    assert draining.running == 1
    draining.drain()
    with pytest.raises(PomeloError) as refused:
        await call("first", "second")
    assert refused.value.code == "shutting_down"
    inner.end.set()
    assert await running == ("first", "second")
    assert draining.running == 0


@pytest.mark.parametrize(("service", "method"), CONTEXTS)
async def test_every_stream_is_counted_and_refused_after_a_drain(service: str, method: str) -> None:
    draining = Draining()
    open_stream = getattr(getattr(guarded(draining, Waiting()), service), method)
    async with open_stream("first", "second") as value:
        assert value == ("first", "second")
        assert draining.running == 1
        draining.drain()
        with pytest.raises(PomeloError) as refused:
            async with open_stream("first", "second"):
                pytest.fail("it was opened")
    assert refused.value.code == "shutting_down"
    assert draining.running == 0


async def test_the_admission_of_a_call_is_not_counted_but_refused_after_a_drain() -> None:
    draining, inner = Draining(), Waiting()
    admit = cast(Any, guarded(draining, inner).access.admit)
    admitting = asyncio.create_task(admit("call"))
    await asyncio.sleep(0)
    assert draining.running == 0
    inner.end.set()
    assert await admitting == ("call",)
    draining.drain()
    with pytest.raises(PomeloError) as refused:
        await admit("call")
    assert refused.value.code == "shutting_down"


async def test_a_stop_refuses_new_calls_and_may_be_repeated_while_a_call_ends() -> None:
    draining, ending, end = Draining(), asyncio.Event(), asyncio.Event()

    async def end_slowly() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            async with asyncio.timeout(10):
                await end.wait()

    running = asyncio.create_task(draining.counted(end_slowly)())
    await asyncio.sleep(0)
    draining.stop()
    await ending.wait()
    draining.stop()
    with pytest.raises(PomeloError) as refused:
        await draining.counted(asyncio.sleep)(0)
    assert refused.value.code == "shutting_down"
    end.set()
    with pytest.raises(PomeloError) as ended:
        await running
    assert ended.value.code == "shutting_down"


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
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not idle.done()
    async with asyncio.timeout(5):
        await idle
