"""Callers who write down what they were told: over REST and gRPC, until the end or until the server is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import grpc
from google.rpc import error_details_pb2, status_pb2

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.tasks import to_task

GONE = "gone"
"""In place of a code: the server went away."""

CONNECTION_STREAMS = 100
"""Calls that a server takes at once on one connection."""


@dataclass(slots=True)
class Told:
    """What one caller was told.

    `whole`: an answer came whole, or a stream with its end: it is acknowledged. `pieces` have come of a
    stream. `code` is that of an error, GONE, or "ok".
    """

    request_id: str
    body: Mapping[str, Any]
    whole: bool = False
    task_id: str = ""
    pieces: int = 0
    usage: tuple[int, int] | None = None
    """Tokens in and out of a text task."""
    code: str = ""
    status: Any = None
    """The HTTP status, or grpc's."""
    headers: dict[str, str] = field(default_factory=dict)


class Watch:
    """Counts pieces over all callers, for who waits until so many have come."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = asyncio.Event()

    def came(self) -> None:
        """One more."""
        self.count += 1
        self._changed.set()

    async def reaches(self, count: int) -> None:
        """Returns when so many have come."""
        async with asyncio.timeout(60):
            while self.count < count:
                self._changed.clear()
                await self._changed.wait()


class Rest:
    """Calls over REST."""

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
        repeat_key: str | None = None,
        piece: Callable[[], None] = lambda: None,
    ) -> Told:
        """Asks, and listens until the end; `piece` is called for each that comes."""
        told = Told(request_id, body)
        headers = {"Authorization": f"Bearer {self._key}", "X-Request-Id": request_id}
        if repeat_key is not None:
            headers["Idempotency-Key"] = repeat_key
        try:
            async with self._session.post(
                self._url, json={**body, "stream": stream}, headers=headers
            ) as answer:
                told.status = answer.status
                told.headers = {name.lower(): value for name, value in answer.headers.items()}
                if answer.status == 200 and stream:
                    await self._stream(answer, told, piece)
                else:
                    self._answer(await answer.json(), told)
        except (aiohttp.ClientError, ConnectionError):
            told.code = GONE
        return told

    async def _stream(self, answer: aiohttp.ClientResponse, told: Told, piece: Callable[[], None]) -> None:
        failed = False
        async for line in answer.content:
            text = line.decode().strip()
            failed = failed or text == "event: error"
            if not text.startswith("data: "):
                continue
            if text == "data: [DONE]":
                told.whole, told.code = True, "ok"
                continue
            found = json.loads(text.removeprefix("data: "))
            if failed:
                told.code = found["error"]["code"]
                continue
            told.task_id = found["id"]
            if found["object"] == "task.completion.chunk":
                came = bool(found["choices"][0]["delta"].get("content"))
                if found["choices"][0]["finish_reason"]:
                    told.usage = (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"])
            else:
                came = found["object"].endswith(".chunk")
            if came:
                told.pieces += 1
                piece()
        told.code = told.code or GONE

    def _answer(self, found: dict[str, Any], told: Told) -> None:
        if "error" in found:
            told.code = found["error"]["code"]
            return
        told.whole, told.code, told.task_id = True, "ok", found["id"]
        if "usage" in found:
            told.usage = (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"])


class Grpc:
    """Calls over gRPC."""

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
        repeat_key: str | None = None,
        piece: Callable[[], None] = lambda: None,
    ) -> Told:
        """Asks, and listens until the end; `piece` is called for each that comes."""
        told = Told(request_id, body)
        metadata = [("authorization", f"Bearer {self._key}"), ("x-request-id", request_id)]
        if repeat_key is not None:
            metadata.append(("idempotency-key", repeat_key))
        stub = self._stubs[self._next % len(self._stubs)]
        self._next += 1
        task = to_task(body)
        call: Any
        try:
            if stream:
                call = stub.StreamTask(StreamTaskRequest(task=task), metadata=metadata)
                async for event in call:
                    self._event(event, told, piece)
            else:
                call = stub.RunTask(RunTaskRequest(task=task), metadata=metadata)
                result = (await call).result
                told.task_id = result.id
                if result.HasField("text"):
                    usage = result.text.usage
                    told.usage = (usage.prompt_tokens, usage.completion_tokens)
            told.whole, told.code, told.status = True, "ok", grpc.StatusCode.OK
        except grpc.aio.AioRpcError as error:
            told.status, told.code = error.code(), _code(error)
        with suppress(grpc.aio.AioRpcError):
            for pairs in (await call.initial_metadata(), await call.trailing_metadata()):
                told.headers |= {str(k): str(v) for k, v in pairs or ()}
        return told

    def _event(self, event: Any, told: Told, piece: Callable[[], None]) -> None:
        match event.WhichOneof("event"):
            case "started":
                told.task_id = event.started.id
            case "text_delta":
                if event.text_delta.finish_reason:
                    usage = event.text_delta.usage
                    told.usage = (usage.prompt_tokens, usage.completion_tokens)
                if event.text_delta.content:
                    told.pieces += 1
                    piece()
            case "audio_chunk":
                told.pieces += 1
                piece()


def _code(error: grpc.aio.AioRpcError) -> str:
    """The code of the error table; GONE where it was not the server that said something."""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            status = status_pb2.Status()
            status.ParseFromString(value)
            info = error_details_pb2.ErrorInfo()
            if any(detail.Unpack(info) for detail in status.details):
                return str(info.reason).lower()
    return GONE


@asynccontextmanager
async def callers(
    rest: str, grpc_address: str, key: str, at_once: int = 100
) -> AsyncIterator[tuple[Rest, Grpc]]:
    """Both ways to a server, for so many calls at once on each."""
    channels = [
        grpc.aio.insecure_channel(grpc_address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-at_once // CONNECTION_STREAMS))
    ]
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=100)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
        try:
            yield Rest(session, rest, key), Grpc(channels, key)
        finally:
            for channel in channels:
                await channel.close()
