"""Batching of server-sent events: ready events share a write, and no event waits for a later one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.providers.base import Job
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import HI, events, raw_task
from tests.gateway.scripts import ScriptedTasks, play, text_events, word

STREAM = {**HI, "stream": True}
MANY = [f"word{number} " for number in range(500)]


def chunks(body: bytes) -> list[bytes]:
    """The HTTP chunks of a body; the server sends each in one write."""
    parsed = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parsed.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return parsed


def texts(body: bytes) -> list[str]:
    """The texts of a stream's events; the last entry is `[DONE]` or the error code."""
    parsed = []
    for _, value in events(body):
        if value == "[DONE]":
            parsed.append(value)
        elif "error" in value:
            parsed.append(value["error"]["code"])
        elif (content := value["choices"][0]["delta"].get("content")) is not None:
            parsed.append(content)
    return parsed


async def test_events_that_are_ready_together_share_writes_in_order(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*text_events(*MANY))
    head, _, body = (await gateway.exchange(raw_task(STREAM))).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    sent = chunks(body)
    assert texts(b"".join(sent)) == [*MANY, "[DONE]"]
    assert len(sent) < len(MANY) / 3
    assert texts(sent[0]) == MANY[:1]


async def test_an_http_1_0_client_receives_the_same_events(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*text_events(*MANY))
    _, _, body = (await gateway.exchange(raw_task(STREAM, version="1.0"))).partition(b"\r\n\r\n")
    assert texts(body) == [*MANY, "[DONE]"]


async def test_ready_events_are_sent_before_the_next_event_arrives(gateway: GatewayApp) -> None:
    gate = asyncio.Event()
    *pieces, fifth, last = text_events("one", "two", "three", "four", "five")
    gateway.provider.script = play(*pieces, gate.wait, fifth, last)
    async with asyncio.timeout(20), gateway.post_task(STREAM) as response:
        received = [await response.content.readuntil(b"\n\n") for _ in range(4)]
        assert texts(b"".join(received)) == ["one", "two", "three", "four"]
        gate.set()
        assert texts(await response.read()) == ["five", "[DONE]"]


@pytest.mark.parametrize("pieces", [0, 1, 2, 3, 50])
async def test_events_before_a_failure_are_sent_before_the_error(gateway: GatewayApp, pieces: int) -> None:
    begin = map(word, ["first", *MANY[:pieces]])
    gateway.provider.script = play(*begin, PomeloError("provider_failed"))
    async with asyncio.timeout(20), gateway.post_task(STREAM) as response:
        assert texts(await response.read()) == ["first", *MANY[:pieces], "provider_failed"]


async def test_a_client_that_does_not_read_stops_the_stream(gateway: GatewayApp) -> None:
    made = 0
    begun = asyncio.Event()

    async def script(job: Job[Any]) -> AsyncIterator[Event]:
        nonlocal made
        while True:
            yield word("x" * 1000)
            made += 1
            begun.set()

    gateway.provider.script = script
    async with gateway.connect(raw_task(STREAM), limit=1):
        await begun.wait()
        before = 0
        while before < made:
            before = made
            await asyncio.sleep(0.5)
        assert made < 20_000
    await asyncio.wait_for(gateway.provider.closed.wait(), 20)


@pytest.mark.parametrize("failure", [None, "provider_failed"])
async def test_a_stream_that_never_waits_is_sent_completely(gateway: GatewayApp, failure: str | None) -> None:
    *pieces, last = text_events(*MANY)
    tasks = ScriptedTasks(*pieces, PomeloError(failure) if failure else last)
    async with gateway.over(tasks=tasks) as scripted:
        _, _, body = (await scripted.exchange(raw_task(STREAM))).partition(b"\r\n\r\n")
    sent = chunks(body)
    assert texts(b"".join(sent)) == [*MANY, failure or "[DONE]"]
    assert max(map(len, sent)) < 17 * 1024
