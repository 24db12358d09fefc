"""A caller who disconnects closes the connection to the vendor immediately, at any point of the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from pomelo.testing import Answer, FaultUpstream, Gate, Received
from tests.providers.openai.rig import job, open_provider

AT_ONCE = 0.05
"""Seconds that may pass until the vendor sees it."""


@pytest.fixture(name="vendor")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="provider")
async def _provider(vendor: FaultUpstream) -> AsyncIterator[Any]:
    async with open_provider(vendor.openai_base_url) as provider:
        yield provider


async def collect(provider: Any, stream: bool) -> None:
    """Reads an answer to its end, as the engine does."""
    async with aclosing(provider.text(job(stream=stream))) as events:
        async for _ in events:
            pass


async def check_left(received: Received, since: float) -> None:
    """The vendor saw the connection close within AT_ONCE of `since`."""
    async with asyncio.timeout(5):
        await received.left.wait()
    assert received.left_at is not None
    assert received.left_at - since < AT_ONCE


async def test_a_closed_generator_closes_the_connection_immediately(
    vendor: FaultUpstream, provider: Any
) -> None:
    gate = Gate()
    vendor.script(Answer("one two three", at={1: gate}))
    events = provider.text(job(stream=True))
    assert (await anext(events)).text_delta.content == "one"
    await gate.reached.wait()
    since = asyncio.get_running_loop().time()
    await events.aclose()
    await check_left(vendor.requests[0], since)
    assert vendor.requests[0].tokens_sent == 1


async def test_cancelling_stops_a_vendor_that_sends_as_fast_as_it_can(
    vendor: FaultUpstream, provider: Any
) -> None:
    words = 200_000
    vendor.script(Answer("word " * words))
    async with aclosing(provider.text(job(stream=True))) as events:
        await anext(events)
    since = asyncio.get_running_loop().time()
    await check_left(vendor.requests[0], since)
    assert vendor.requests[0].tokens_sent < words


async def test_a_reader_that_is_slow_slows_the_vendor_down(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Answer(("x" * 1000 + " ") * 40_000))
    async with aclosing(provider.text(job(stream=True))) as events:
        await anext(events)
        received = vendor.requests[0]
        sent = -1
        while sent != received.bytes_sent:  # until the vendor can't write on
            sent = received.bytes_sent
            for _ in range(1000):
                await asyncio.sleep(0)
        assert sent < 30_000_000
        assert not received.done.is_set()


async def test_a_failure_that_the_reader_throws_closes_the_connection_too(
    vendor: FaultUpstream, provider: Any
) -> None:
    gate = Gate()
    vendor.script(Answer("one two three", at={1: gate}))

    async def read_and_fail() -> None:
        async with aclosing(provider.text(job(stream=True))) as events:
            await anext(events)
            await gate.reached.wait()
            raise KeyError

    with pytest.raises(KeyError):
        await read_and_fail()
    await check_left(vendor.requests[0], asyncio.get_running_loop().time())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_deadline_closes_the_connection_immediately(
    vendor: FaultUpstream, provider: Any, stream: bool
) -> None:
    vendor.script(Answer(at={1: Gate()}))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await collect(provider, stream)
    await check_left(vendor.requests[0], asyncio.get_running_loop().time())


async def test_closing_the_provider_closes_what_is_open(vendor: FaultUpstream) -> None:
    async with open_provider(vendor.openai_base_url) as provider:
        await collect(provider, stream=True)
        assert vendor.requests[0].left_at is None
    # The connection that was kept for later is gone: a new provider makes a new one.
    async with open_provider(vendor.openai_base_url) as provider:
        await collect(provider, stream=True)
    assert vendor.requests[0].connection != vendor.requests[1].connection
