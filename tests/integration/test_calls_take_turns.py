"""Calls that never suspend yield to others: work is counted in loop iterations, so no clock is needed.

Sources and listeners are in this process and never suspend. Without yielding, each call would run from
start to finish in one iteration.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from pomelo.app import App, open_app
from pomelo.call import Call
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.gen.v1.text_pb2 import FinishReason, Role, TextInput, TokenUsage
from pomelo.providers.base import Job
from pomelo.settings import Settings
from tests.app import endow

AT_ONCE = 10
PIECES = 3000
MOST = AT_ONCE * PIECES // 10
"""Pieces of all calls in one iteration; the budget allows about a hundred."""


class Work:
    """The pieces that were made in each iteration of the loop."""

    def __init__(self) -> None:
        self.most = self.all = self._now = 0
        self._over = False

    def piece(self) -> None:
        """One was made."""
        self.all += 1
        self._now += 1
        self.most = max(self.most, self._now)

    def iteration(self) -> None:
        """Counts from here on, in each iteration."""
        self._now = 0
        if not self._over:
            asyncio.get_running_loop().call_soon(self.iteration)

    def stop(self) -> None:
        """Counts no more."""
        self._over = True


class Flood:
    """A provider whose answers are available immediately."""

    configured = True

    def __init__(self, work: Work) -> None:
        self._work = work

    async def text(self, job: Job) -> AsyncGenerator[Event, None]:
        """Many words."""
        for _ in range(PIECES):
            self._work.piece()
            event = Event()
            event.text_delta.content = "word "
            yield event
        last = Event()
        last.text_delta.finish_reason = FinishReason.FINISH_REASON_STOP
        last.text_delta.usage.CopyFrom(TokenUsage(prompt_tokens=1, completion_tokens=PIECES, total_tokens=1))
        yield last

    async def aclose(self) -> None:
        """There is nothing to close."""


def task() -> Task:
    """A text task."""
    message = TextInput()
    message.messages.add(role=Role.ROLE_USER, content="Go")
    return Task(model="gpt-4", text=message)


def call(key: str, **headers: str) -> Call:
    """A call with a key."""
    return Call.from_headers({"authorization": f"Bearer {key}", **headers}.get, wire="grpc")


async def streams(app: App, key: str, work: Work) -> None:
    """A stream."""
    async with app.services.tasks.stream_task(task(), call(key)) as events:
        assert len([event async for event in events]) == PIECES + 2


async def gathers(app: App, key: str, work: Work) -> None:
    """A unary answer of a provider that returns it in pieces."""
    result = await app.services.tasks.run_task(task(), call(key))
    assert result.text.content == "word " * PIECES


async def uploads(app: App, key: str, work: Work) -> None:
    """An upload."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(PIECES):
            work.piece()
            yield b"x"

    media = await app.services.media.upload_media("audio/mpeg", chunks(), call(key))
    assert media.size_bytes == PIECES


async def downloads(app: App, key: str, work: Work) -> None:
    """A download."""

    async def chunks() -> AsyncIterator[bytes]:
        yield bytes(PIECES)

    media = await app.services.media.upload_media("audio/mpeg", chunks(), call(key))
    async with app.services.media.download_media(media.media_id, "", call(key)) as (_, pieces):
        size = 0
        async for piece in pieces:
            work.piece()
            size += len(piece)
    assert size == PIECES


One = Callable[[App, str, Work], Coroutine[Any, Any, None]]


@pytest.mark.parametrize("one", [streams, gathers, uploads, downloads])
async def test_calls_that_never_wait_leave_the_loop_to_others(
    one: One, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.media.store.PIECE", 1)
    work = Work()
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path)
    async with open_app(settings, providers={"sandbox": Flood(work)}) as app:
        await endow(app.store)
        _, key = await app.keyring.create()
        work.iteration()
        try:
            async with asyncio.timeout(60):
                await asyncio.gather(*[one(app, key, work) for _ in range(AT_ONCE)])
        finally:
            work.stop()
        assert work.all == AT_ONCE * PIECES
        assert work.most < MOST


async def test_replaying_long_audio_takes_turns(tmp_path: Path) -> None:
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path)
    async with open_app(settings) as app:
        await endow(app.store)
        _, key = await app.keyring.create()
        given = Task(model="eleven-labs-tts")
        given.text_to_speech.text = "hello, world " * 400
        given.text_to_speech.voice = "adam"
        given.text_to_speech.output_format = "wav_48000"
        made = await app.services.tasks.run_task(given, call(key, **{"idempotency-key": "one"}))
        assert made.speech.media.size_bytes > 20_000_000
        work = Work()
        work.iteration()
        size = 0
        try:
            again = call(key, **{"idempotency-key": "one"})
            async with app.services.tasks.stream_task(given, again) as events:
                async for event in events:
                    work.piece()
                    size += len(event.audio_chunk.data)
        finally:
            work.stop()
        assert size == made.speech.media.size_bytes
        assert work.most < work.all / 4
