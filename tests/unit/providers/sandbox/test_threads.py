"""The sandbox's worker threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Transcription
from pomelo.providers.sandbox import Sandbox, recognition
from tests.unit.providers.sandbox.sandbox_jobs import source, transcribe


async def test_sandbox_tasks_do_not_occupy_the_threads_of_live_tasks() -> None:
    sandbox = Sandbox()
    proceed = threading.Event()

    def steps() -> Iterator[int]:
        proceed.wait(60)
        yield 1

    iterators = [sandbox._in_thread(steps()) for _ in range(50)]
    tasks = [asyncio.ensure_future(anext(iterator)) for iterator in iterators]
    try:
        async with asyncio.timeout(20):
            await asyncio.to_thread(lambda: None)
    finally:
        proceed.set()
    assert await asyncio.gather(*tasks) == [1] * 50
    for iterator in iterators:
        await iterator.aclose()
    await sandbox.aclose()


async def test_a_transcript_is_made_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def record(text: str, seconds: float, given: SpeechToTextInput) -> Transcription:
        threads.append(threading.current_thread())
        return recognition.transcribe(text, seconds, given)

    monkeypatch.setattr("pomelo.providers.sandbox.provider.transcribe", record)
    sandbox = Sandbox()
    assert (await transcribe(sandbox, source(b"[[words:3]] Good evening."))).words
    assert threads
    assert threading.current_thread() not in threads
    await sandbox.aclose()
