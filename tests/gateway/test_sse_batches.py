"""Batching of server-sent events: ready events share a write, and no event waits for a later one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from gateway.app import open_rest
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.providers.base import Job
from tests.gateway.gateway_app import GatewayApp, text_events

REQUEST = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
MANY = [f"word{number} " for number in range(500)]


def request(gateway: GatewayApp, protocol: str = "HTTP/1.1") -> bytes:
    """A request for a stream, with `Connection: close`."""
    body = json.dumps(REQUEST)
    return (
        f"POST /api/v1/task {protocol}\r\nHost: {gateway.host}\r\nAuthorization: {gateway.headers['Authorization']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


def chunks(body: bytes) -> list[bytes]:
    """The HTTP chunks of a body; the server sends each in one write."""
    parsed = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parsed.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return parsed


def text(body: bytes) -> list[str]:
    """The texts of a stream's events; the last entry is `[DONE]` or the error code."""
    parsed = []
    for block in body.decode().split("\n\n")[:-1]:
        data = block.rpartition("data: ")[2]
        value: Any = {} if data == "[DONE]" else json.loads(data)
        if "error" in value:
            parsed.append(value["error"]["code"])
        elif not value:
            parsed.append("[DONE]")
        elif (content := value["choices"][0]["delta"].get("content")) is not None:
            parsed.append(content)
    return parsed


async def test_events_that_are_ready_together_share_writes_in_order(gateway: GatewayApp) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        for event in text_events(*MANY):
            yield event

    gateway.provider.script = script
    head, _, body = (await gateway.exchange(request(gateway))).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    sent = chunks(body)
    assert text(b"".join(sent)) == [*MANY, "[DONE]"]
    assert len(sent) < len(MANY) / 3
    assert text(sent[0]) == MANY[:1]


async def test_an_http_1_0_client_receives_the_same_events(gateway: GatewayApp) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        for event in text_events(*MANY):
            yield event

    gateway.provider.script = script
    _, _, body = (await gateway.exchange(request(gateway, "HTTP/1.0"))).partition(b"\r\n\r\n")
    assert text(body) == [*MANY, "[DONE]"]


async def test_ready_events_are_sent_before_the_next_event_arrives(gateway: GatewayApp) -> None:
    gate = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        *pieces, last = text_events("one", "two", "three", "four", "five")
        for event in pieces[:4]:
            yield event
        await gate.wait()
        yield pieces[4]
        yield last

    gateway.provider.script = script
    async with asyncio.timeout(10), gateway.post_task(REQUEST) as response:
        received_audio = [await response.content.readuntil(b"\n\n") for _ in range(4)]
        assert text(b"".join(received_audio)) == ["one", "two", "three", "four"]
        gate.set()
        assert text(await response.read()) == ["five", "[DONE]"]


@pytest.mark.parametrize("pieces", [0, 1, 2, 3, 50])
async def test_events_before_a_failure_are_sent_before_the_error(gateway: GatewayApp, pieces: int) -> None:
    async def script(job: Job) -> AsyncIterator[Event]:
        yield text_events("first")[0]
        for event in text_events(*MANY)[:pieces]:
            yield event
        raise PomeloError("provider_failed")

    gateway.provider.script = script
    async with asyncio.timeout(10), gateway.post_task(REQUEST) as response:
        assert text(await response.read()) == ["first", *MANY[:pieces], "provider_failed"]


async def test_a_client_that_does_not_read_stops_the_stream(gateway: GatewayApp) -> None:
    made = 0
    begun = asyncio.Event()

    async def script(job: Job) -> AsyncIterator[Event]:
        nonlocal made
        while True:
            yield text_events("x" * 1000)[0]
            made += 1
            begun.set()

    gateway.provider.script = script
    _, writer = await asyncio.open_connection(gateway.host, gateway.port, limit=1)
    try:
        writer.write(request(gateway))
        async with asyncio.timeout(20):
            await begun.wait()
            before = 0
            while before < made:
                before = made
                await asyncio.sleep(0.5)
        assert made < 20_000
    finally:
        writer.transport.abort()
    await asyncio.wait_for(gateway.provider.closed.wait(), 5)


class ReadyTasks:
    """Tasks whose streams yield every event, or fail, without waiting."""

    def __init__(self, failure: PomeloError | None) -> None:
        self._failure = failure

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[Event]]:
        """Streams the events of a task."""

        async def events() -> AsyncIterator[Event]:
            *pieces, last = text_events(*MANY)
            for event in pieces:
                yield event
            if self._failure is not None:
                raise self._failure
            yield last

        yield events()


@pytest.mark.parametrize("failure", [None, "provider_failed"])
async def test_a_stream_that_never_waits_is_sent_completely(gateway: GatewayApp, failure: str | None) -> None:
    ready: Any = ReadyTasks(PomeloError(failure) if failure else None)
    services = replace(gateway.services, tasks=ready)
    async with (
        open_rest(services, None, "127.0.0.1", 0) as (host, port),
        gateway.http.post(
            f"http://{host}:{port}/api/v1/task", json=REQUEST, headers=gateway.headers
        ) as response,
    ):
        assert text(await response.read()) == [*MANY, failure or "[DONE]"]
