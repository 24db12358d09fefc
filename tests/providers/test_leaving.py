"""A caller who disconnects closes the connection to the vendor immediately, at any point of the answer."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from pomelo.providers.base import Job
from pomelo.testing import Answer, Gate, Script, Speech
from tests.providers.elevenlabs import rig as elevenlabs
from tests.providers.rig import Rig, check_left, open_provider, open_rig, read_all, run
from tests.providers.text_rig import OPENAI, Vendor


@pytest.fixture
def vendor() -> Vendor:
    return OPENAI


async def test_a_closed_generator_closes_the_connection_immediately(rig: Rig) -> None:
    gate = Gate()
    rig.script(Answer("one two three", at={1: gate}))
    events = rig.provider.text(OPENAI.job(stream=True))
    assert (await anext(events)).text_delta.text == "one"
    await gate.reached.wait()
    since = asyncio.get_running_loop().time()
    await events.aclose()
    await check_left(rig.requests[0], since)
    assert rig.requests[0].tokens_sent == 1


FAST = pytest.mark.parametrize(
    ("make", "vendor", "job", "script"),
    [
        (OPENAI.make, "openai", OPENAI.job(stream=True), Answer(("x" * 1000 + " ") * 40_000)),
        (elevenlabs.MAKE, "elevenlabs", elevenlabs.job(stream=True), Speech(size=40_000_000)),
    ],
    ids=["openai", "elevenlabs"],
)
"""A provider, its vendor, a job, and an answer of 40 MB."""


@FAST
async def test_cancelling_stops_a_vendor_that_sends_as_fast_as_it_can(
    make: Any, vendor: str, job: Job[Any], script: Script
) -> None:
    async with open_rig(make, vendor) as rig:
        rig.script(script)
        async with aclosing(run(rig.provider, job)) as events:
            await anext(events)
        await check_left(rig.requests[0], asyncio.get_running_loop().time())
        assert rig.requests[0].bytes_sent < 40_000_000


@FAST
async def test_a_reader_that_is_slow_slows_the_vendor_down(
    make: Any, vendor: str, job: Job[Any], script: Script
) -> None:
    async with open_rig(make, vendor) as rig:
        rig.script(script)
        async with aclosing(run(rig.provider, job)) as events:
            await anext(events)
            received = rig.requests[0]
            sent = -1
            while sent != received.bytes_sent:  # until the vendor can't write on
                sent = received.bytes_sent
                for _ in range(1000):
                    await asyncio.sleep(0)
            assert sent < 30_000_000
            assert not received.done.is_set()


async def test_a_failure_that_the_reader_throws_closes_the_connection_too(rig: Rig) -> None:
    gate = Gate()
    rig.script(Answer("one two three", at={1: gate}))

    async def read_and_fail() -> None:
        async with aclosing(rig.provider.text(OPENAI.job(stream=True))) as events:
            await anext(events)
            await gate.reached.wait()
            raise KeyError

    with pytest.raises(KeyError):
        await read_and_fail()
    await check_left(rig.requests[0], asyncio.get_running_loop().time())


async def test_a_deadline_closes_the_connection_immediately(rig: Rig, stream: bool) -> None:
    gate = Gate()
    rig.script(Answer(at={1: gate}))
    loop = asyncio.get_running_loop()

    async def read() -> None:
        async with asyncio.timeout(None) as deadline:
            expiring = asyncio.create_task(expire(deadline))
            try:
                await read_all(rig.provider, OPENAI.job(stream=stream))
            finally:
                await expiring

    async def expire(deadline: asyncio.Timeout) -> None:
        await gate.reached.wait()
        deadline.reschedule(loop.time())

    with pytest.raises(TimeoutError):
        await read()
    await check_left(rig.requests[0], asyncio.get_running_loop().time())


async def test_closing_the_provider_closes_what_is_open(rig: Rig) -> None:
    async with open_provider(OPENAI.make, rig.openai_base_url) as provider:
        await read_all(provider, OPENAI.job(stream=True))
        assert rig.requests[0].left_at is None
    # The connection that was kept for later is gone: a new provider makes a new one.
    async with open_provider(OPENAI.make, rig.openai_base_url) as provider:
        await read_all(provider, OPENAI.job(stream=True))
    assert rig.requests[0].connection != rig.requests[1].connection
