"""Calls over both protocols that record everything they receive, to search it for markers."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import aiohttp
import grpc

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import Answer, FaultUpstream, Gate, Reply
from tests.calls import bearer
from tests.faults.leak_markers import (
    AUDIO,
    MARKER,
    TASKS,
    Fault,
    answers,
)
from tests.faults.leak_requests import (
    HELLO,
    SECRETS,
    WORD,
    invalid_fields,
    invalid_posts,
    labelled,
    malformed_requests,
)
from tests.tasks import to_options

MODES = ("whole", "stream", "raw", "form", "grpc whole", "grpc stream")
HALVES = (("whole", "raw", "grpc stream"), ("stream", "form", "grpc whole"))
"""Modes that have whole and streamed tasks over both protocols."""
RAW = frozenset(("eleven-labs-tts", "eleven-labs-sts", "flux-1-pro"))


class Driver:
    """Makes calls with a live key over both protocols, and records everything it receives: `delivered` is output,
    `errors` is everything else."""

    def __init__(
        self,
        url: str,
        channel: grpc.aio.Channel,
        session: aiohttp.ClientSession,
        key: str,
        upstream: FaultUpstream,
    ) -> None:
        self.url = url
        self.key = key
        self.upstream = upstream
        self.errors: list[bytes] = []
        self.delivered: list[bytes] = []
        self.call_count = self.failure_count = 0
        self.metadata = bearer(key)
        self._session = session
        self._channel = channel
        self._tasks = TaskServiceStub(channel)

    async def post(self, **request: Any) -> int:
        """Posts a REST request and records the response; returns the status, or 0 without a response."""
        headers = {"Authorization": f"Bearer {self.key}"} | request.pop("headers", {})
        self.call_count += 1
        with suppress(aiohttp.ClientError):
            async with self._session.post(f"{self.url}/api/v1/task", headers=headers, **request) as response:
                self.errors.append(str((response.reason, response.raw_headers)).encode())
                body = b""
                try:
                    async for data in response.content.iter_any():
                        body += data
                finally:
                    output, error_event, error = body.partition(b"event: error")
                    failed = response.status != 200
                    self.failure_count += failed or bool(error_event)
                    self.errors.append(body if failed else error)
                    self.delivered.append(b"" if failed else output)
                return response.status
        return 0

    async def rest(self, model: str, mode: str, seconds: float) -> None:
        """Runs a task over REST; `mode` is whole, stream or raw."""
        headers = {"X-Request-Timeout": str(seconds)}
        if mode == "raw":
            headers["Accept"] = "audio/*, image/*"
        await self.post(json={"model": model, "stream": mode == "stream", **TASKS[model]}, headers=headers)

    async def form(self, model: str, mode: str, seconds: float) -> None:
        """Runs a task with audio over REST, as a form with a file."""
        form = aiohttp.FormData({"model": model, "stream": str(mode == "stream").lower()})
        if model == "eleven-labs-sts":
            form.add_field("voice", "adam")
        form.add_field("audio", AUDIO, filename=f"{MARKER}-file.ogg", content_type="audio/ogg")
        await self.post(data=form, headers={"X-Request-Timeout": str(seconds)})

    async def grpc(self, model: str, mode: str, seconds: float) -> None:
        """Runs a task over gRPC; `mode` is whole or stream."""
        body = {"model": model, **TASKS[model]}
        if mode == "stream":
            request = StreamTaskRequest(spec=labelled(body), options=to_options(body, stream=True))
            await self.record(self._tasks.StreamTask(request, metadata=self.metadata, timeout=seconds))
        else:
            await self.run_task(body, metadata=self.metadata, timeout=seconds)

    async def run_task(self, body: Mapping[str, Any], **options: Any) -> None:
        request = RunTaskRequest(spec=labelled(body), options=to_options(body))
        await self.record(self._tasks.RunTask(request, **options))

    async def record(self, call: Any) -> None:
        """Waits for the end of a gRPC call, and records what was received."""
        self.call_count += 1
        try:
            if hasattr(call, "__aiter__"):
                async for event in call:
                    self.delivered.append(event.SerializeToString())
            else:
                self.delivered.append((await call).SerializeToString())
        except grpc.aio.AioRpcError as error:
            self.failure_count += 1
            self.errors.append(str(error.details()).encode())
            self.errors.append(str(error.debug_error_string()).encode())
            pairs = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
            for part in itertools.chain.from_iterable(pairs):
                self.errors.append(part if isinstance(part, bytes) else part.encode())

    def calls(self, mode: str, seconds: float) -> list[Any]:
        """A call of every model in a mode; each model has its own route."""
        if mode.startswith("grpc"):
            return [self.grpc(model, mode.removeprefix("grpc "), seconds) for model in TASKS]
        if mode == "form":
            return [self.form(model, "whole", seconds) for model in ("eleven-labs-sts", "eleven-labs-stt")]
        return [self.rest(model, mode, seconds) for model in TASKS if mode != "raw" or model in RAW]

    async def run_fault(self, fault: Fault, modes: Iterable[str] = MODES) -> None:
        """Makes calls in these modes while the vendors have this fault, in the first half of them if each call fails
        several times. Keeps all circuit breakers closed."""
        failures = 0
        for mode in modes if fault.failures < 2 else HALVES[0]:
            if failures + fault.failures > 3:
                await self.recover()
                failures = 0
            self.upstream.default = fault.script
            await asyncio.gather(*self.calls(mode, fault.timeout))
            failures += fault.failures
        if failures:
            await self.recover()

    async def recover(self) -> None:
        """Makes so many successful calls that no circuit breaker opens: with three failures, the rate stays
        below FAILURE_RATE in every window."""
        for _ in range(2):
            await self.run_good("whole")

    async def run_good(self, mode: str) -> None:
        """Makes calls of every model while the vendors answer."""
        self.upstream.default = answers
        await asyncio.gather(*self.calls(mode, 20.0))

    async def cancel_calls(self) -> None:
        """Makes calls in every mode, and cancels them while they wait for a vendor."""
        for mode in ("whole", "stream", "form", "grpc whole", "grpc stream"):
            self.upstream.reset()
            self.upstream.default = Reply(before=(Gate(),))
            calls = [asyncio.create_task(call) for call in self.calls(mode, 20.0)]
            async with asyncio.timeout(20):
                received = [await self.upstream.received() for _ in calls]
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
                for request in received:
                    await request.left.wait()
        self.upstream.default = answers

    async def send_invalid(self) -> None:
        """Sends requests that are refused, with markers in all."""
        for model in TASKS:
            await asyncio.gather(*[self.post(json=body) for body in invalid_fields(model)])
        for request in invalid_posts():
            await self.post(**request)
        for secret in SECRETS:
            metadata = [("authorization", f"Bearer {secret.encode('ascii', 'ignore').decode()}")]
            await self.run_task(HELLO, metadata=metadata)
        # The answer is stored for a day, so it has no marker; the Idempotency-Key itself is not stored.
        self.upstream.script(Answer("No marker."))
        await self.post(json=HELLO, headers={"Idempotency-Key": WORD})
        for body in (
            {"model": "eleven-labs-tts", "text": WORD, "voice": WORD},
            {"model": "gpt-4", "prompt": WORD},
        ):
            await self.run_task(body, metadata=self.metadata)
        for path in ("/pomelo.v1.TaskService/RunTask", f"/pomelo.v1.TaskService/{WORD}"):
            garbage = self._channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
            await self.record(garbage(b"\xff\xff" + WORD.encode(), metadata=self.metadata))
        media = MediaServiceStub(self._channel)
        for chunks in ([], [b""], [AUDIO, b""]):
            messages = [UploadMediaRequest(header=UploadMediaHeader(content_type=WORD))] + [
                UploadMediaRequest(chunk=c) for c in chunks
            ]
            await self.record(media.UploadMedia(iter(messages), metadata=self.metadata))

    async def send_malformed(self, host: str, port: int) -> None:
        for request in malformed_requests():
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(request)
            writer.write_eof()
            with suppress(ConnectionError):
                async with asyncio.timeout(20):
                    self.errors.append(await reader.read())
            self.call_count += 1
            writer.close()
