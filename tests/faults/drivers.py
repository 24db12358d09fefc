"""Drivers that run tasks over REST and gRPC and record their outcomes, even if the server is killed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import reason_of
from tests.tasks import to_task

GONE = "gone"
"""The code of a call whose connection was lost without an answer."""

CONNECTION_STREAMS = 100
"""Concurrent calls that a server accepts on one connection."""


@dataclass(slots=True)
class Outcome:
    """The outcome of a task. `complete`: a whole response or the end of a stream was received, so the task's
    settlement is acknowledged."""

    request_id: str
    body: Mapping[str, Any]
    complete: bool = False
    task_id: str = ""
    chunks: int = 0
    """Received chunks of a stream."""
    usage: tuple[int, int] | None = None
    """Input and output tokens of a text task."""
    code: str = ""
    """An error code, GONE, or "ok"."""
    status: Any = None
    """The HTTP status or the gRPC status code."""
    headers: dict[str, str] = field(default_factory=dict)


class ChunkCounter:
    """Counts the chunks of many streams, and waits for a count."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Event()

    def add(self) -> None:
        self.count += 1
        self._changed.set()

    async def wait_for(self, count: int) -> None:
        """Returns when `count` chunks have been received."""
        async with asyncio.timeout(60):
            while self.count < count:
                self._changed.clear()
                await self._changed.wait()


class RestDriver:
    """Runs tasks over REST."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        self._session = session
        self._url = f"{url}/api/v1/task"
        self._key = key

    async def __call__(
        self,
        body: Mapping[str, Any],
        request_id: str,
        *,
        stream: bool = False,
        idempotency_key: str | None = None,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Runs a task to its end; calls `on_chunk` for each chunk of a stream."""
        outcome = Outcome(request_id, body)
        headers = {"Authorization": f"Bearer {self._key}", "X-Request-Id": request_id}
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        try:
            async with self._session.post(
                self._url, json={**body, "stream": stream}, headers=headers
            ) as response:
                outcome.status = response.status
                outcome.headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status == 200 and stream:
                    await self._read_stream(response, outcome, on_chunk)
                else:
                    self._read_json(await response.json(), outcome)
        except (aiohttp.ClientError, ConnectionError):
            outcome.code = GONE
        return outcome

    async def _read_stream(
        self, response: aiohttp.ClientResponse, outcome: Outcome, on_chunk: Callable[[], None]
    ) -> None:
        failed = False
        async for line in response.content:
            text = line.decode().strip()
            failed = failed or text == "event: error"
            if not text.startswith("data: "):
                continue
            if text == "data: [DONE]":
                outcome.complete, outcome.code = True, "ok"
                continue
            event = json.loads(text.removeprefix("data: "))
            if failed:
                outcome.code = event["error"]["code"]
                continue
            outcome.task_id = event["id"]
            if event["object"] == "task.completion.chunk":
                has_output = bool(event["choices"][0]["delta"].get("content"))
                if event["choices"][0]["finish_reason"]:
                    outcome.usage = _tokens(event)
            else:
                has_output = event["object"].endswith(".chunk")
            if has_output:
                outcome.chunks += 1
                on_chunk()
        outcome.code = outcome.code or GONE

    def _read_json(self, answer: dict[str, Any], outcome: Outcome) -> None:
        if "error" in answer:
            outcome.code = answer["error"]["code"]
            return
        outcome.complete, outcome.code, outcome.task_id = True, "ok", answer["id"]
        if "usage" in answer:
            outcome.usage = _tokens(answer)


def _tokens(answer: dict[str, Any]) -> tuple[int, int]:
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


class GrpcDriver:
    """Runs tasks over gRPC, on each of the channels in turn."""

    def __init__(self, channels: list[grpc.aio.Channel], key: str) -> None:
        self._stubs = [TaskServiceStub(channel) for channel in channels]
        self._key = key
        self._next = 0

    async def __call__(
        self,
        body: Mapping[str, Any],
        request_id: str,
        *,
        stream: bool = False,
        idempotency_key: str | None = None,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Runs a task to its end; calls `on_chunk` for each chunk of a stream."""
        outcome = Outcome(request_id, body)
        metadata = [("authorization", f"Bearer {self._key}"), ("x-request-id", request_id)]
        if idempotency_key is not None:
            metadata.append(("idempotency-key", idempotency_key))
        stub = self._stubs[self._next % len(self._stubs)]
        self._next += 1
        task = to_task(body)
        call: Any
        try:
            if stream:
                call = stub.StreamTask(StreamTaskRequest(task=task), metadata=metadata)
                async for event in call:
                    self._read_event(event, outcome, on_chunk)
            else:
                call = stub.RunTask(RunTaskRequest(task=task), metadata=metadata)
                result = (await call).result
                outcome.task_id = result.id
                if result.HasField("text"):
                    usage = result.text.usage
                    outcome.usage = (usage.prompt_tokens, usage.completion_tokens)
            outcome.complete, outcome.code, outcome.status = True, "ok", grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            # An error without details is the client's own: the server sends an ErrorInfo with every error.
            outcome.status, outcome.code = error.code(), reason_of(error) or GONE
        with suppress(grpc.aio.AioRpcError):
            for pairs in (await call.initial_metadata(), await call.trailing_metadata()):
                outcome.headers |= {str(k): str(v) for k, v in pairs or ()}
        return outcome

    def _read_event(self, event: Any, outcome: Outcome, on_chunk: Callable[[], None]) -> None:
        match event.WhichOneof("event"):
            case "started":
                outcome.task_id = event.started.id
            case "text_delta":
                if event.text_delta.finish_reason:
                    usage = event.text_delta.usage
                    outcome.usage = (usage.prompt_tokens, usage.completion_tokens)
                if event.text_delta.content:
                    outcome.chunks += 1
                    on_chunk()
            case "audio_chunk":
                outcome.chunks += 1
                on_chunk()


@asynccontextmanager
async def open_drivers(
    rest_url: str, grpc_address: str, key: str, concurrency: int = 100
) -> AsyncIterator[tuple[RestDriver, GrpcDriver]]:
    """Opens a driver for each protocol, with enough connections for `concurrency` calls on each."""
    channels = [
        grpc.aio.insecure_channel(grpc_address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-concurrency // CONNECTION_STREAMS))
    ]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
        try:
            yield RestDriver(session, rest_url, key), GrpcDriver(channels, key)
        finally:
            for channel in channels:
                await channel.close()
