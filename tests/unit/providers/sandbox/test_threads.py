"""The sandbox's worker threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Transcription
from pomelo.gen.v1.text_pb2 import JsonSchema, TextFormat, Tool
from pomelo.providers.sandbox import Sandbox, examples, recognition, text, tools
from tests.unit.providers.sandbox.sandbox_jobs import job, source, transcribe, user_input


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


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [Tool(name="f", parameters_json="{}")]},
        {"format": TextFormat(json_schema=JsonSchema(name="f", schema_json="{}"))},
    ],
)
async def test_an_example_of_a_schema_is_made_in_a_thread(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    threads: list[threading.Thread] = []

    def record(schema: Any, *more: int) -> Any:
        threads.append(threading.current_thread())
        return examples.example_of(schema, *more)

    for module in (text, tools):
        monkeypatch.setattr(module, "example_of", record)
    sandbox = Sandbox()
    await sandbox.complete_text(job("gpt-4", user_input("Hi", **fields)))
    assert threads
    assert threading.current_thread() not in threads
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
