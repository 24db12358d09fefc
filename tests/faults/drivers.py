"""Drivers that run tasks over REST and gRPC and record their outcomes, even if the server is killed."""

from __future__ import annotations

import asyncio
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc

from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import as_dict, reason_of
from tests.tasks import to_options, to_task

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
    on_chunk: Callable[[], None] = lambda: None

    def add_chunk(self) -> None:
        self.chunks += 1
        self.on_chunk()


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


class Driver(ABC):
    """Runs tasks with a key over one protocol."""

    def __init__(self, key: str) -> None:
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
        headers = {"authorization": f"Bearer {self._key}", "x-request-id": request_id}
        if idempotency_key is not None:
            headers["idempotency-key"] = idempotency_key
        outcome = Outcome(request_id, body, on_chunk=on_chunk)
        await self._run(outcome, headers, stream)
        return outcome

    @abstractmethod
    async def _run(self, outcome: Outcome, headers: dict[str, str], stream: bool) -> None: ...


class RestDriver(Driver):
    def __init__(self, session: aiohttp.ClientSession, url: str, key: str) -> None:
        super().__init__(key)
        self._session = session
        self._url = f"{url}/api/v1/task"

    async def _run(self, outcome: Outcome, headers: dict[str, str], stream: bool) -> None:
        body = {**outcome.body, "stream": stream}
        try:
            async with self._session.post(self._url, json=body, headers=headers) as response:
                outcome.status = response.status
                outcome.headers = {name.lower(): value for name, value in response.headers.items()}
                if response.status == 200 and stream:
                    await self._read_stream(response, outcome)
                else:
                    self._read_json(await response.json(), outcome)
        except (aiohttp.ClientError, ConnectionError):
            outcome.code = GONE

    async def _read_stream(self, response: aiohttp.ClientResponse, outcome: Outcome) -> None:
        failed = False
        async for line in response.content:
            text = line.decode().strip()
            failed = failed or text == "event: error"
            if text == "data: [DONE]":
                outcome.complete, outcome.code = True, "ok"
            elif text.startswith("data: "):
                event = json.loads(text.removeprefix("data: "))
                if failed:
                    outcome.code = event["error"]["code"]
                else:
                    self._read_event(event, outcome)
        outcome.code = outcome.code or GONE

    def _read_event(self, event: dict[str, Any], outcome: Outcome) -> None:
        outcome.task_id = event["id"]
        if event["object"] == "task.completion.chunk":
            (choice,) = event["choices"]
            has_output = bool(choice["delta"].get("content"))
            if choice["finish_reason"]:
                outcome.usage = _tokens(event["usage"])
        else:
            has_output = event["object"].endswith(".chunk")
        if has_output:
            outcome.add_chunk()

    def _read_json(self, answer: dict[str, Any], outcome: Outcome) -> None:
        if "error" in answer:
            outcome.code = answer["error"]["code"]
            return
        outcome.complete, outcome.code, outcome.task_id = True, "ok", answer["id"]
        if "usage" in answer:
            outcome.usage = _tokens(answer["usage"])


def _tokens(usage: dict[str, int]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


class GrpcDriver(Driver):
    """Runs tasks over gRPC, on each of the channels in turn."""

    def __init__(self, channels: list[grpc.aio.Channel], key: str) -> None:
        super().__init__(key)
        self._stubs = itertools.cycle([TaskServiceStub(channel) for channel in channels])

    async def _run(self, outcome: Outcome, headers: dict[str, str], stream: bool) -> None:
        stub, task, metadata = next(self._stubs), to_task(outcome.body), list(headers.items())
        options = to_options(outcome.body, stream=stream)
        call: Any
        try:
            if stream:
                call = stub.StreamTask(StreamTaskRequest(spec=task, options=options), metadata=metadata)
                async for response in call:
                    self._read_event(response.event, outcome)
            else:
                call = stub.RunTask(RunTaskRequest(spec=task, options=options), metadata=metadata)
                result = (await call).result
                outcome.task_id = result.id
                if result.HasField("text"):
                    self._read_usage(result, outcome)
            outcome.complete, outcome.code, outcome.status = True, "ok", grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            # An error without details is the client's own: the server sends an ErrorInfo with every error.
            outcome.status, outcome.code = error.code(), reason_of(error) or GONE
        with suppress(grpc.aio.AioRpcError):
            outcome.headers |= as_dict(await call.initial_metadata()) | as_dict(
                await call.trailing_metadata()
            )

    def _read_event(self, event: TaskEvent, outcome: Outcome) -> None:
        if event.HasField("started"):
            outcome.task_id = event.started.id
        if event.completed.HasField("text"):
            self._read_usage(event.completed, outcome)
        if event.text_delta.text or event.HasField("audio_chunk"):
            outcome.add_chunk()

    def _read_usage(self, result: TaskResult, outcome: Outcome) -> None:
        outcome.usage = (result.usage.input_tokens, result.usage.output_tokens)


@asynccontextmanager
async def open_drivers(
    rest_url: str, grpc_address: str, key: str, concurrency: int = 100
) -> AsyncIterator[tuple[RestDriver, GrpcDriver]]:
    """Opens a driver for each protocol, with enough connections for `concurrency` calls on each."""
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(grpc_address, [("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(-(-concurrency // CONNECTION_STREAMS))
        ]
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=100),
            read_bufsize=2**20,
        )
        await stack.enter_async_context(session)
        yield RestDriver(session, rest_url, key), GrpcDriver(channels, key)
