"""A caller that leaves before its task has ended."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.app import RunningApp
from tests.calls import bearer
from tests.tasks import to_options, to_task
from tests.waiting import cancel


class LeavingClient:
    """A caller that runs one task, reads its output and can leave at any time. `chunks` counts the output that
    it has received, `audio_bytes` the audio."""

    def __init__(
        self, app: RunningApp, protocol: str, key: str, body: dict[str, Any], *, stream: bool
    ) -> None:
        self.chunks = 0
        self.audio_bytes = 0
        self._received = asyncio.Condition()
        self._stream = stream
        run: Callable[[], Awaitable[None]] = self._grpc if protocol == "grpc" else self._rest
        self._app, self._protocol, self._key, self._body = app, protocol, key, body
        self.task = asyncio.ensure_future(run())

    async def has(self, chunks: int) -> None:
        """Returns when at least that many chunks have been received."""
        async with asyncio.timeout(20), self._received:
            await self._received.wait_for(lambda: self.chunks >= chunks)

    async def has_audio(self, size: int) -> None:
        """Returns when at least that many bytes of audio have been received."""
        async with asyncio.timeout(20), self._received:
            await self._received.wait_for(lambda: self.audio_bytes >= size)

    async def leave(self) -> None:
        """Cancels the task, whatever it is waiting for."""
        await cancel(self.task)

    async def _receive(self, audio: bytes = b"") -> None:
        async with self._received:
            self.chunks += 1
            self.audio_bytes += len(audio)
            self._received.notify_all()

    async def _grpc(self) -> None:
        tasks = TaskServiceStub(self._app.channel)
        spec, options = to_task(self._body), to_options(self._body, stream=self._stream)
        metadata = bearer(self._key)
        if not self._stream:
            await tasks.RunTask(RunTaskRequest(spec=spec, options=options), metadata=metadata)
            return
        call = tasks.StreamTask(StreamTaskRequest(spec=spec, options=options), metadata=metadata)
        try:
            async for response in call:
                if response.event.text_delta.text or response.event.audio_chunk.data:
                    await self._receive(response.event.audio_chunk.data)
        finally:
            call.cancel()

    async def _rest(self) -> None:
        headers = {"Authorization": f"Bearer {self._key}"}
        url = f"{self._app.urls[self._protocol]}/api/v1/task"
        body = self._body | {"stream": self._stream}
        async with self._app.session.post(url, json=body, headers=headers) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    audio = json.loads(line.removeprefix(b"data: ")).get("audio") or {}
                    await self._receive(base64.b64decode(audio.get("b64_json", "")))
