"""The events of streams of every task type: their numbers and order, and what `completed` has."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP, ROLE_ASSISTANT, TextInput
from pomelo.providers.base import Event, Job
from pomelo.testing import Answer as Words
from pomelo.testing import Speech
from tests.tasks import EVENTS_BETWEEN
from tests.unit.engine.apps import LIVE, PROTOCOL, Answer, EngineApp, open_engine
from tests.unit.tasks.collectors import text_of

AUDIO = base64.b64encode(b"OggS" + b"some audio" * 100).decode()
BODIES: dict[str, dict[str, Any]] = {
    "text": {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50},
    "image": {"model": "flux-1-pro", "prompt": "A kite", "width": 256, "height": 256},
    "text_to_speech": {"model": "eleven-labs-tts", "text": "Good morning to you.", "voice": "adam"},
    "speech_to_speech": {"model": "eleven-labs-sts", "audio": AUDIO, "voice": "adam"},
    "speech_to_text": {"model": "eleven-labs-stt", "audio": AUDIO},
}
"""Task type -> a small task of it."""

TASK_TYPE = pytest.mark.parametrize("task_type", BODIES)
KEY = {"idempotency-key": "k"}


def events_of(answer: Answer, task_type: str) -> tuple[list[TaskEvent], TaskResult]:
    """The events between `started` and `completed`, and the result of `completed`. Asserts that the numbers are
    contiguous, and that the first and the last event are in their places and of one task."""
    assert answer.code == "ok"
    events: list[TaskEvent] = answer.events
    assert [event.sequence_number for event in events] == list(range(1, len(events) + 1))
    first, *between, last = events
    assert (first.WhichOneof("event"), last.WhichOneof("event")) == ("started", "completed")
    assert {str(event.WhichOneof("event")) for event in between} <= EVENTS_BETWEEN[task_type]
    started, result = first.started, last.completed
    assert (started.id, started.model) == (result.id, result.model)
    assert started.create_time == result.create_time
    assert started.create_time.seconds
    assert not started.create_time.nanos
    assert list(started.adjustments) == list(result.adjustments)
    return between, result


def output_of(between: list[TaskEvent], result: TaskResult) -> str | bytes:
    """The output of a stream, put together from its events and its result."""
    if result.HasField("speech"):
        return b"".join(event.audio_chunk.data for event in between)
    if result.HasField("text"):
        return "".join(event.text_delta.text for event in between) + text_of(result)
    return result.image.images[0].data if result.HasField("image") else result.transcription.text


@LIVE
@PROTOCOL
@TASK_TYPE
async def test_events_are_numbered_without_gaps_and_completed_is_the_last(
    engine: EngineApp, task_type: str, protocol: str, live: bool
) -> None:
    account = await engine.account(live=live)
    body = BODIES[task_type] | ({"stop": ["x"]} if task_type == "text" else {})
    answer = await engine.ask(account, body, stream=True, protocol=protocol)
    between, result = events_of(answer, task_type)
    assert bool(between) == bool(EVENTS_BETWEEN[task_type])
    assert output_of(between, result)
    assert [one.field for one in result.adjustments] == (["stop"] if task_type == "text" else [])
    (record,) = await engine.records(account)
    assert record.task_id == result.id


@PROTOCOL
@TASK_TYPE
@pytest.mark.parametrize("first_stream", [False, True], ids=["of a whole answer", "of a stream"])
async def test_a_replay_is_numbered_like_a_first_answer_and_has_its_usage_and_cost(
    engine: EngineApp, task_type: str, protocol: str, first_stream: bool
) -> None:
    account = await engine.account()
    body = BODIES[task_type]
    first = await engine.ask(account, body, stream=first_stream, protocol=protocol, headers=KEY)
    assert first.code == "ok"
    made = first.events[-1].completed if first_stream else first.events[-1]
    again = await engine.ask(account, body, stream=True, protocol=protocol, headers=KEY)
    assert again.call.response_headers["Idempotent-Replayed"] == "true"
    between, result = events_of(again, task_type)
    assert (result.id, result.create_time) == (made.id, made.create_time)
    assert result.usage == made.usage
    assert result.cost_micros == made.cost_micros > 0
    whole = await engine.ask(account, body, protocol=protocol, headers=KEY)
    assert (whole.events[0].id, whole.events[0].usage) == (made.id, made.usage)
    assert whole.events[0].cost_micros == made.cost_micros
    if first_stream:
        assert again.events[0] == first.events[0]
        assert output_of(between, result) == output_of(first.events[1:-1], made)
    (record,) = await engine.records(account)
    assert (await engine.balance(account)).spent == record.cost == made.cost_micros


@PROTOCOL
async def test_completed_has_no_text_that_the_deltas_have(engine: EngineApp, protocol: str) -> None:
    account = await engine.account()
    engine.upstream.when("words", Words("one two three"))
    body = BODIES["text"] | {"messages": [{"role": "user", "content": "words"}]}
    answer = await engine.ask(account, body, stream=True, protocol=protocol)
    between, result = events_of(answer, "text")
    assert [event.text_delta.text for event in between] == ["one", " two", " three"]
    assert not result.text.HasField("message")
    assert result.text.finish_reason == FINISH_REASON_STOP


@PROTOCOL
@pytest.mark.parametrize("delivery", ["unspecified", "url", "b64_json", "both"])
async def test_completed_has_no_audio_that_the_chunks_have(
    engine: EngineApp, delivery: str, protocol: str
) -> None:
    account = await engine.account()
    engine.upstream.when("Speak up", Speech(size=150_000))
    body = BODIES["text_to_speech"] | {"text": "Speak up", "response_format": delivery}
    answer = await engine.ask(account, body, stream=True, protocol=protocol)
    between, result = events_of(answer, "text_to_speech")
    assert result.speech.data == b""
    assert result.speech.content_type == between[0].audio_chunk.content_type == "audio/mpeg"
    assert not any(event.audio_chunk.content_type for event in between[1:])
    assert result.speech.HasField("media") == (delivery != "b64_json")
    audio = output_of(between, result)
    assert len(audio) >= 150_000
    if delivery != "b64_json":
        assert (engine.app.settings.data / "media" / result.speech.media.id).read_bytes() == audio


# --- streams without a delta


class Scripted:
    """A provider whose text has these deltas and this end."""

    configured = True

    def __init__(self) -> None:
        self.deltas: tuple[str, ...] = ()
        self.rest = ""

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        for text in self.deltas:
            event = Event()
            event.text_delta.text = text
            yield event
        last = Event()
        last.completed.text.finish_reason = FINISH_REASON_STOP
        last.completed.usage.input_tokens = 9
        last.completed.usage.output_tokens = int(any(self.deltas) or bool(self.rest))
        if self.rest:
            last.completed.text.message.role = ROLE_ASSISTANT
            last.completed.text.message.content.add(text=self.rest)
        yield last

    async def aclose(self) -> None:
        pass


@PROTOCOL
async def test_text_that_comes_with_the_end_of_a_stream_is_a_delta_of_its_own(
    tmp_path: Path, protocol: str
) -> None:
    provider = Scripted()
    provider.deltas, provider.rest = ("one", " two"), " three"
    async with open_engine(tmp_path, {"openai": provider}) as engine:
        answer = await engine.ask(await engine.account(), BODIES["text"], stream=True, protocol=protocol)
    between, result = events_of(answer, "text")
    assert [event.text_delta.text for event in between] == ["one", " two", " three"]
    assert not result.text.HasField("message")


@PROTOCOL
@pytest.mark.parametrize("headers", [{}, KEY], ids=["once", "kept"])
@pytest.mark.parametrize(
    ("deltas", "rest"),
    [((), ""), ((), "all of it"), (("one",), " two"), (("", "one", ""), ""), ((), "long " * 5_000)],
    ids=["empty", "only an end", "an end", "empty deltas", "a long end"],
)
async def test_a_stream_is_whole_whether_its_text_comes_in_deltas_or_with_its_end(
    tmp_path: Path, deltas: tuple[str, ...], rest: str, headers: dict[str, str], protocol: str
) -> None:
    provider = Scripted()
    provider.deltas, provider.rest = deltas, rest
    text = "".join(deltas) + rest
    async with open_engine(tmp_path, {"openai": provider}) as engine:
        account = await engine.account()
        for _ in range(2):
            answer = await engine.ask(
                account, BODIES["text"], stream=True, protocol=protocol, headers=headers
            )
            between, result = events_of(answer, "text")
            assert output_of(between, result) == text
            assert all(event.text_delta.text for event in between)
            assert all(len(event.text_delta.text) <= 8 * 1024 for event in between)
            assert not result.text.HasField("message")
            assert result.usage.input_tokens == 9
        records = await engine.records(account)
        assert len(records) == (1 if headers else 2)
        assert {record.output_tokens for record in records} == {int(bool(text))}
        assert {record.output_bytes for record in records} == {len(text.encode())}
