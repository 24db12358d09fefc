"""Comments that keep a silent stream alive."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import aiohttp
import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.providers.base import Job
from tests.gateway.gateway_app import OpenApp
from tests.gateway.requests import HI, events, raw_task
from tests.gateway.scripts import play, text_events, word
from tests.waiting import soon

STREAM = {**HI, "stream": True}
COMMENT = b": keep-alive\n\n"


async def test_keep_alive_comments_are_sent_during_silence_and_open_the_stream(open_gateway: OpenApp) -> None:
    async with open_gateway(keep_alive=0.05) as gateway:
        go_on = asyncio.Event()
        gateway.provider.script = play(go_on.wait, *text_events("one"))
        async with asyncio.timeout(20), gateway.post_task(STREAM) as response:
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == COMMENT
            go_on.set()
            assert events(await response.read())[-1] == ("message", "[DONE]")

        gateway.provider.script = play(go_on.wait, PomeloError("provider_failed"))
        go_on.clear()
        async with gateway.post_task(STREAM) as response:
            assert response.status == 200
            await response.content.readuntil(b"\n\n")
            go_on.set()
            assert events(await response.read())[-1][0] == "error"


async def test_a_finished_stream_sends_no_comments_into_the_next_response(
    open_gateway: OpenApp, caplog: pytest.LogCaptureFixture
) -> None:
    proceed = asyncio.Event()
    async with open_gateway(keep_alive=0.05) as gateway:
        one = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1))
        post = partial(one.post, f"{gateway.url}/api/v1/task", headers=gateway.headers, json=STREAM)
        async with asyncio.timeout(20), one:
            async with post() as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            gateway.provider.script = play(proceed.wait, *text_events("one", "two"))
            async with post() as response:
                for _ in range(4):
                    assert await response.content.readuntil(b"\n\n") == COMMENT
                proceed.set()
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
        gc.collect()  # a failure in the background is logged when it is freed
    assert not caplog.records


async def test_a_comment_is_sent_only_after_silence(open_gateway: OpenApp) -> None:
    loop = asyncio.get_running_loop()
    sent_at: list[float] = []

    async def script(job: Job[Any]) -> AsyncIterator[Event]:
        for event in text_events(*["word"] * 12):
            sent_at.append(loop.time())
            yield event
            await asyncio.sleep(0.03)  # a busy stream

    async with open_gateway(keep_alive=0.2) as gateway, asyncio.timeout(20):
        gateway.provider.script = script
        async with gateway.post_task(STREAM) as response:
            received = 0
            while line := await response.content.readline():
                received += line.startswith(b"data: ")
                # However busy this machine is, the interval lies between an event and the comment behind it.
                assert line != COMMENT[:-1] or loop.time() - sent_at[received - 1] > 0.19


async def test_a_comment_is_sent_soon_after_the_keep_alive_time(open_gateway: OpenApp) -> None:
    loop = asyncio.get_running_loop()
    async with open_gateway(keep_alive=0.6) as gateway, asyncio.timeout(30):

        async def comment(number: int) -> float:
            end = asyncio.Event()
            young = partial(asyncio.sleep, 0.05)  # so that the silence is younger than the stream
            gateway.provider.script = play(young, word(), end.wait, *text_events())
            async with gateway.post_task(STREAM) as response:
                await response.content.readuntil(b"\n\n")
                sent_at = loop.time()
                assert await response.content.readuntil(b"\n\n") == COMMENT
                waited = loop.time() - sent_at
                end.set()
                await response.read()
            return waited

        await soon(comment, 1.05)


async def test_a_client_that_reads_nothing_gets_no_comments(open_gateway: OpenApp) -> None:
    sent = 0
    enough = asyncio.Event()

    async def script(job: Job[Any]) -> AsyncIterator[Event]:
        nonlocal sent
        while not enough.is_set():
            yield word("x" * 50_000)
            sent += 1
        for event in text_events():
            yield event

    async with open_gateway(keep_alive=0.1, write_timeout=60) as gateway:
        gateway.provider.script = script
        async with gateway.connect(raw_task(STREAM), limit=1) as (reader, _):
            before = -1
            while not sent or before < sent:
                before = sent
                await asyncio.sleep(0.2)
            await asyncio.sleep(0.5)  # the time in which comments would be due
            enough.set()
            received = b""
            while piece := await reader.read(1 << 20):
                received += piece
        assert b"data: [DONE]" in received
        assert received.count(COMMENT) < 3
