"""Triggers: every error, delays, stalls and cuts, for every task type."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, TextToSpeechInput
from pomelo.providers.base import Event
from pomelo.providers.sandbox import Sandbox
from pomelo.providers.sandbox.recognition import MAX_TEXT_FILE_BYTES
from pomelo.providers.sandbox.triggers import ERRORS, NO_TRIGGERS, Triggers, parse
from tests.unit.providers.sandbox.sandbox_jobs import (
    ask,
    decode,
    gather,
    job,
    join_chunks,
    source,
    synthesize,
    transcribe,
    user_input,
)
from tests.unit.refusals import refused
from tests.waiting import cancel

FRONT_END_ERRORS = {"unsupported_media_type", "not_found", "method_not_allowed", "model_not_found"}
CODES = sorted(set(TABLE) - FRONT_END_ERRORS)
TASK_TYPES: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "text": ("gpt-4", "messages", user_input),
    "image": ("flux-1-pro", "prompt", lambda text: ImageInput(prompt=text, width=64, height=64)),
    "text_to_speech": ("eleven-labs-tts", "text", lambda text: TextToSpeechInput(text=text, voice="adam")),
    "speech_to_speech": ("eleven-labs-sts", "audio", lambda text: SpeechToSpeechInput(voice="adam")),
    "speech_to_text": ("eleven-labs-stt", "audio", lambda text: SpeechToTextInput()),
}
NOW = 1_704_110_340.5
"""One minute before noon of New Year's Day 2024."""


def run(sandbox: Sandbox, task_type: str, text: str, *, stream: bool = True) -> AsyncIterator[Event]:
    """Runs a task whose text, or whose uploaded file, is `text`."""
    model, _, given = TASK_TYPES[task_type]
    audio = source(text.encode()) if task_type.startswith("speech") else None
    events: AsyncIterator[Event] = getattr(sandbox, task_type)(
        job(model, given(text), stream=stream, audio=audio)
    )
    return events


async def until_failure(events: AsyncIterator[Event]) -> tuple[list[Event], PomeloError]:
    """Returns the events before a failure, and the failure."""
    received: list[Event] = []
    try:
        async for event in events:
            received.append(event)
    except PomeloError as error:
        return received, error
    raise AssertionError("the task succeeded")


class Clock:
    """A clock whose sleeps are recorded and take no time."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Records the sleep."""
        self.slept.append(seconds)
        await asyncio.sleep(0)


def test_every_error_except_those_of_the_front_ends_can_be_triggered() -> None:
    assert set(CODES) == ERRORS


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("task_type", TASK_TYPES)
@pytest.mark.parametrize("code", CODES)
async def test_an_error_is_raised_before_the_first_event(code: str, task_type: str, stream: bool) -> None:
    sandbox = Sandbox(now=lambda: NOW)
    events = run(sandbox, task_type, f"[[error:{code}]]", stream=stream)
    with pytest.raises(PomeloError) as raised:
        await anext(events)
    error = raised.value
    assert error.code == code
    assert error.retry_after == TABLE[code].retry_after
    assert error.message


async def test_triggered_errors_have_the_messages_of_the_real_ones() -> None:
    async def error(code: str, task_type: str = "text") -> PomeloError:
        with pytest.raises(PomeloError) as raised:
            await anext(run(Sandbox(now=lambda: NOW), task_type, f"[[error:{code}]]"))
        return raised.value

    assert (
        await error("rate_limit_exceeded")
    ).message == "Rate limit exceeded. Reset at 2024-01-01T12:00:00Z"
    assert (await error("insufficient_credits")).message == "Insufficient credits for this operation"
    assert (await error("unsupported_model")).message == "Unsupported task type: gpt-4"
    for task_type, (_, field, _given) in TASK_TYPES.items():
        missing = await error("missing_parameter", task_type)
        assert (missing.message, missing.field) == (f"Missing required field: {field}", field)
        assert (await error("invalid_parameter", task_type)).field == field


@pytest.mark.parametrize("text", ["[[error:nothing]]", "[[error]]", "[[error:not_found]]", "[[delay:soon]]", "[[", "[[cut:1]]", "[[words:0]]", "[[calls:0]]", "[[calls:100]]", "[[what]]", "[[delay:-1]]", "[[delay:inf]]", "[[pace:1e9]]"])  # fmt: skip
async def test_an_unknown_trigger_is_plain_text(sandbox: Sandbox, text: str) -> None:
    assert parse(text) is NO_TRIGGERS
    (answer,) = await ask(sandbox, user_input(f"say {text} please"), stream=False)
    assert f"say {text} please" in answer.content


def test_triggers_can_be_combined() -> None:
    text = "a [[delay:1.5]] b [[pace:0.01]][[words:12]] [[cut]] [[delay:2]] [[calls:99]]"
    assert parse(text) == Triggers(delay=2, pace=0.01, words=12, calls=99, cut=True)


@given(st.text(alphabet="[]:.abcdelyrowst 0123456789_", max_size=80))
def test_any_text_can_be_parsed_for_triggers(text: str) -> None:
    triggers = parse(text)
    assert triggers.error in ERRORS | {""}
    assert 0 <= triggers.delay < 10_000


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("task_type", TASK_TYPES)
async def test_a_delay_comes_before_the_first_event(task_type: str, stream: bool) -> None:
    clock = Clock()
    events = run(Sandbox(sleep=clock.sleep), task_type, "[[delay:2.5]]", stream=stream)
    assert clock.slept == []
    await anext(events)
    assert clock.slept[0] == 2.5
    assert await gather(events) is not None


async def test_a_delay_comes_before_an_error() -> None:
    clock = Clock()
    with pytest.raises(PomeloError):
        await anext(run(Sandbox(sleep=clock.sleep), "text", "[[error:internal_error]] [[delay:3]]"))
    assert clock.slept == [3]


@pytest.mark.parametrize("task_type", ["text", "image", "text_to_speech", "speech_to_speech"])
async def test_a_pace_delays_each_event(task_type: str) -> None:
    clock = Clock()
    events = await gather(run(Sandbox(sleep=clock.sleep), task_type, "[[pace:0.5]] and so on " * 20))
    assert clock.slept.count(0.5) >= 4
    assert len(events) >= 4


@pytest.mark.parametrize("task_type", TASK_TYPES)
async def test_a_cut_fails_half_way_through_the_answer(sandbox: Sandbox, task_type: str) -> None:
    events, error = await until_failure(run(sandbox, task_type, "[[cut]] " + "and then some more " * 20))
    assert error.code == "provider_failed"
    if task_type == "speech_to_text":
        assert events == []
    elif task_type == "image":
        assert [event.image_progress.progress for event in events] == [0, 0.25, 0.5]
    elif task_type == "text":
        assert len(events) >= 10
        assert not any(event.HasField("completed") for event in events)
    else:
        half, full = join_chunks(events), await synthesize(sandbox, "xxxxxxx " + "and then some more " * 20)
        assert half.content_type == "audio/mpeg"
        assert len(half.data) == pytest.approx(len(full.data) / 2, rel=0.05)
        assert decode(half.data).seconds > 10


@pytest.mark.parametrize("output_format", ["opus_48000_64", "wav_44100", "pcm_16000", "ulaw_8000"])
async def test_every_format_can_be_cut_half_way(sandbox: Sandbox, output_format: str) -> None:
    text = "[[cut]] " + "and then some more " * 20
    given = TextToSpeechInput(text=text, voice="adam", output_format=output_format)
    events, _ = await until_failure(sandbox.text_to_speech(job("eleven-labs-tts", given)))
    full = await synthesize(sandbox, "x" + text[1:].replace("[", "x"), output_format)
    assert len(join_chunks(events).data) == pytest.approx(len(full.data) / 2, rel=0.05)


async def test_half_of_the_words_arrive_before_a_cut(sandbox: Sandbox) -> None:
    events, _ = await until_failure(run(sandbox, "text", "[[words:40]][[cut]]"))
    assert len(events) == 20


@pytest.mark.parametrize("task_type", ["text", "image", "speech_to_text"])
async def test_a_unary_answer_that_is_cut_yields_nothing(sandbox: Sandbox, task_type: str) -> None:
    with refused("provider_failed"):
        await anext(run(sandbox, task_type, "[[cut]]", stream=False))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("task_type", TASK_TYPES)
async def test_a_stall_lasts_until_it_is_cancelled(sandbox: Sandbox, task_type: str, stream: bool) -> None:
    received: asyncio.Queue[Event] = asyncio.Queue()

    async def watch() -> None:
        async with aclosing(run(sandbox, task_type, "[[stall]] and so on", stream=stream)) as events:  # type: ignore[type-var]
            async for event in events:
                received.put_nowait(event)

    task = asyncio.create_task(watch())
    if stream and task_type != "speech_to_text":
        await received.get()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(task)
    assert not task.done()
    await cancel(task)


async def test_a_trigger_in_generated_speech_takes_effect_when_it_is_recognized() -> None:
    clock = Clock()
    sandbox = Sandbox(sleep=clock.sleep)
    speech = await synthesize(sandbox, "[[delay:7]] Good evening.", "mp3_44100_128")
    clock.slept.clear()
    assert (await transcribe(sandbox, speech.source)).text == "[[delay:7]] Good evening."
    assert clock.slept == [7]


@pytest.mark.parametrize("longer", [0, 1])
async def test_a_text_file_above_the_limit_is_audio(sandbox: Sandbox, longer: int) -> None:
    text = "[[words:3]]".ljust(MAX_TEXT_FILE_BYTES + longer, "x")
    assert ((await transcribe(sandbox, source(text.encode()))).text == text) == (longer == 0)


@pytest.mark.parametrize("content_type", ["", "audio/mpeg", "text/plain", "audio/pcm;rate=16000"])
async def test_a_text_file_that_begins_with_a_trigger_is_accepted_as_audio(
    sandbox: Sandbox, content_type: str, tmp_path: Path
) -> None:
    text = b"[[words:3]] Good evening.\n"
    recognized = await transcribe(sandbox, source(text, content_type))
    assert recognized.text == "[[words:3]] Good evening."
    assert recognized.audio_seconds == pytest.approx(0.06 * 25)
    spoken = join_chunks(
        await gather(
            sandbox.speech_to_speech(
                job("eleven-labs-sts", SpeechToSpeechInput(voice="adam"), audio=source(text, content_type))
            )
        )
    )
    assert decode(spoken.data).seconds == pytest.approx(0.06 * 25, abs=0.03)
