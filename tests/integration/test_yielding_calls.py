"""Calls whose sources and readers never suspend still yield to other calls.

The tests count the chunks in each iteration of the event loop, so they need no clock. Without yielding, each
call would run from start to end in one iteration.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pomelo.app import App, open_app
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.text_pb2 import FinishReason, TextInput
from pomelo.providers.base import Event, Job
from pomelo.settings import Settings
from tests.app import endow
from tests.calls import call_of
from tests.tasks import text_task

CALLS = 10
CHUNKS = 3000
MAX_CHUNKS = CALLS * CHUNKS // 10
"""The maximum chunks of all calls in one iteration; the budget allows about a hundred."""


class ChunkCounter:
    """Counts chunks by iteration of the event loop."""

    def __init__(self) -> None:
        self.maximum = self.total = self._current = 0
        self._stopped = False

    def count(self) -> None:
        self.total += 1
        self._current += 1
        self.maximum = max(self.maximum, self._current)

    def start(self) -> None:
        """Starts a new count in each iteration from now on."""
        self._current = 0
        if not self._stopped:
            asyncio.get_running_loop().call_soon(self.start)

    def stop(self) -> None:
        self._stopped = True


class ImmediateProvider:
    """A provider whose answers are available immediately."""

    configured = True

    def __init__(self, counter: ChunkCounter) -> None:
        self._counter = counter

    async def text(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        for _ in range(CHUNKS):
            self._counter.count()
            event = Event()
            event.text_delta.text = "word "
            yield event
        last = Event()
        last.completed.text.finish_reason = FinishReason.FINISH_REASON_STOP
        last.completed.usage.input_tokens = 1
        last.completed.usage.output_tokens = CHUNKS
        yield last

    async def aclose(self) -> None:
        pass


async def stream(app: App, key: str, counter: ChunkCounter) -> None:
    async with app.services.tasks.stream_task(text_task("Go"), TaskOptions(), call_of(key)) as events:
        assert len([event async for event in events]) == CHUNKS + 2


async def run(app: App, key: str, counter: ChunkCounter) -> None:
    result = await app.services.tasks.run_task(text_task("Go"), TaskOptions(), call_of(key))
    assert result.text.message.content[0].text == "word " * CHUNKS


async def upload(app: App, key: str, counter: ChunkCounter) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(CHUNKS):
            counter.count()
            yield b"x"

    media = await app.services.media.upload_media("audio/mpeg", chunks(), call_of(key))
    assert media.size_bytes == CHUNKS


async def download(app: App, key: str, counter: ChunkCounter) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(CHUNKS)

    media = await app.services.media.upload_media("audio/mpeg", chunks(), call_of(key))
    async with app.services.media.download_media(media.id, "", call_of(key)) as (_, content):
        size = 0
        async for chunk in content:
            counter.count()
            size += len(chunk)
            sum(range(500))  # A byte from the file alone takes so little that thousands fit into one budget.
    assert size == CHUNKS


Operation = Callable[[App, str, ChunkCounter], Coroutine[Any, Any, None]]


@pytest.mark.parametrize("operation", [stream, run, upload, download])
async def test_calls_that_never_suspend_yield_to_other_calls(
    operation: Operation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.media.local.CHUNK_SIZE", 1)
    counter = ChunkCounter()
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path)
    async with open_app(settings, providers={"sandbox": ImmediateProvider(counter)}) as app:
        await endow(app.store)
        _, key = await app.keyring.create()
        counter.start()
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*[operation(app, key, counter) for _ in range(CALLS)])
        finally:
            counter.stop()
        assert counter.total == CALLS * CHUNKS
        assert counter.maximum < MAX_CHUNKS


async def test_the_replay_of_long_audio_yields_to_other_calls(tmp_path: Path) -> None:
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path)
    async with open_app(settings) as app:
        await endow(app.store)
        _, key = await app.keyring.create()
        speech = TaskSpec(model="eleven-labs-tts")
        speech.text_to_speech.text = "hello, world " * 400
        speech.text_to_speech.voice = "adam"
        speech.text_to_speech.output_format = "wav_48000"
        result = await app.services.tasks.run_task(speech, TaskOptions(), call_of(key, idempotency_key="one"))
        assert result.speech.media.size_bytes > 20_000_000
        counter = ChunkCounter()
        counter.start()
        size = 0
        try:
            again = call_of(key, idempotency_key="one")
            async with app.services.tasks.stream_task(speech, TaskOptions(), again) as events:
                async for event in events:
                    counter.count()
                    size += len(event.audio_chunk.data)
        finally:
            counter.stop()
        assert size == result.speech.media.size_bytes
        assert counter.maximum < counter.total / 4
