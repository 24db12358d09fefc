"""Triggers: every error, delays, stalls and cuts, in every kind of task."""

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
from pomelo.providers.sandbox.triggers import ERRORS, NO_TRIGGERS, Triggers, parse
from tests.unit.providers.sandbox.sandbox_jobs import ask, decode, gather, hear, job, made, say, source, speak

DOORS = {"unsupported_media_type", "not_found", "method_not_allowed"}
CODES = sorted(set(TABLE) - DOORS)
KINDS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "text": ("gpt-4", "messages", say),
    "image": ("flux-1-pro", "prompt", lambda text: ImageInput(prompt=text, width=64, height=64)),
    "text_to_speech": ("eleven-labs-tts", "text", lambda text: TextToSpeechInput(text=text, voice="adam")),
    "speech_to_speech": ("eleven-labs-sts", "audio", lambda text: SpeechToSpeechInput(voice="adam")),
    "speech_to_text": ("eleven-labs-stt", "audio", lambda text: SpeechToTextInput()),
}
NOW = 1_704_110_340.5
"""One minute before noon of New Year's Day 2024."""


def run(sandbox: Sandbox, kind: str, text: str, *, stream: bool = True) -> AsyncIterator[Event]:
    """A task of a kind whose text, or whose uploaded file, is `text`."""
    model, _, given = KINDS[kind]
    audio = source(text.encode()) if kind.startswith("speech") else None
    events: AsyncIterator[Event] = getattr(sandbox, kind)(job(model, given(text), stream=stream, audio=audio))
    return events


async def until_failure(events: AsyncIterator[Event]) -> tuple[list[Event], PomeloError]:
    """What comes before a failure, and the failure."""
    came: list[Event] = []
    try:
        async for event in events:
            came.append(event)
    except PomeloError as error:
        return came, error
    raise AssertionError("it came to a good end")


class Clock:
    """Sleeps that take no time, and are written down."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Sleeps."""
        self.slept.append(seconds)
        await asyncio.sleep(0)


def test_every_error_but_those_of_the_doors_can_be_provoked() -> None:
    assert set(CODES) == ERRORS


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", CODES)
async def test_an_error_is_raised_before_anything_is_yielded(code: str, kind: str, stream: bool) -> None:
    sandbox = Sandbox(now=lambda: NOW)
    events = run(sandbox, kind, f"[[error:{code}]]", stream=stream)
    with pytest.raises(PomeloError) as raised:
        await anext(events)
    error = raised.value
    assert error.code == code
    assert error.retry_after == TABLE[code].retry_after
    assert error.message


async def test_errors_are_worded_as_the_real_ones() -> None:
    async def error(code: str, kind: str = "text") -> PomeloError:
        with pytest.raises(PomeloError) as raised:
            await anext(run(Sandbox(now=lambda: NOW), kind, f"[[error:{code}]]"))
        return raised.value

    assert (
        await error("rate_limit_exceeded")
    ).message == "Rate limit exceeded. Reset at 2024-01-01T12:00:00Z"
    assert (await error("insufficient_credits")).message == "Insufficient credits for this operation"
    assert (await error("unsupported_model")).message == "Unsupported task type: gpt-4"
    for kind, (_, field, _given) in KINDS.items():
        missing = await error("missing_parameter", kind)
        assert (missing.message, missing.field) == (f"Missing required field: {field}", field)
        assert (await error("invalid_parameter", kind)).field == field


@pytest.mark.parametrize("text", ["[[error:nothing]]", "[[error]]", "[[error:not_found]]", "[[delay:soon]]", "[[", "[[cut:1]]", "[[words:0]]", "[[what]]", "[[delay:-1]]", "[[delay:inf]]", "[[pace:1e9]]"])  # fmt: skip
async def test_what_is_no_trigger_is_plain_text(sandbox: Sandbox, text: str) -> None:
    assert parse(text) is NO_TRIGGERS
    (whole,) = await ask(sandbox, say(f"say {text} please"), stream=False)
    assert f"say {text} please" in whole.content


def test_triggers_add_up() -> None:
    text = "a [[delay:1.5]] b [[pace:0.01]][[words:12]] [[cut]] [[delay:2]]"
    assert parse(text) == Triggers(delay=2, pace=0.01, words=12, cut=True)


@given(st.text(alphabet="[]:.abcdelyrowst 0123456789_", max_size=80))
def test_any_text_has_a_script(text: str) -> None:
    triggers = parse(text)
    assert triggers.error in ERRORS | {""}
    assert 0 <= triggers.delay < 10_000


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_delay_comes_before_the_first_event(kind: str, stream: bool) -> None:
    clock = Clock()
    events = run(Sandbox(sleep=clock.sleep), kind, "[[delay:2.5]]", stream=stream)
    assert clock.slept == []
    await anext(events)
    assert clock.slept[0] == 2.5
    assert await gather(events) is not None


async def test_a_delay_comes_before_an_error() -> None:
    clock = Clock()
    with pytest.raises(PomeloError):
        await anext(run(Sandbox(sleep=clock.sleep), "text", "[[error:internal_error]] [[delay:3]]"))
    assert clock.slept == [3]


@pytest.mark.parametrize("kind", ["text", "image", "text_to_speech", "speech_to_speech"])
async def test_a_pace_is_kept_between_events(kind: str) -> None:
    clock = Clock()
    events = await gather(run(Sandbox(sleep=clock.sleep), kind, "[[pace:0.5]] and so on " * 20))
    assert clock.slept.count(0.5) >= 4
    assert len(events) >= 4


@pytest.mark.parametrize("kind", KINDS)
async def test_a_cut_ends_half_way_in_a_failure(sandbox: Sandbox, kind: str) -> None:
    events, error = await until_failure(run(sandbox, kind, "[[cut]] " + "and then some more " * 20))
    assert error.code == "provider_failed"
    if kind == "speech_to_text":
        assert events == []
    elif kind == "image":
        assert [event.image_progress.progress for event in events] == [0, 0.25, 0.5]
    elif kind == "text":
        assert len(events) >= 10
        assert not any(event.text_delta.finish_reason for event in events)
    else:
        half, full = made(events), await speak(sandbox, "xxxxxxx " + "and then some more " * 20)
        assert half.content_type == "audio/mpeg"
        assert len(half.data) == pytest.approx(len(full.data) / 2, rel=0.05)
        assert decode(half.data).seconds > 10


@pytest.mark.parametrize("output_format", ["opus_48000_64", "wav_44100", "pcm_16000", "ulaw_8000"])
async def test_every_format_can_be_cut_half_way(sandbox: Sandbox, output_format: str) -> None:
    text = "[[cut]] " + "and then some more " * 20
    given = TextToSpeechInput(text=text, voice="adam", output_format=output_format)
    events, _ = await until_failure(sandbox.text_to_speech(job("eleven-labs-tts", given)))
    full = await speak(sandbox, "x" + text[1:].replace("[", "x"), output_format)
    assert len(made(events).data) == pytest.approx(len(full.data) / 2, rel=0.05)


async def test_half_of_the_words_come_before_a_cut_or_a_stall(sandbox: Sandbox) -> None:
    events, _ = await until_failure(run(sandbox, "text", "[[words:40]][[cut]]"))
    assert len(events) == 20


@pytest.mark.parametrize("kind", ["text", "image", "speech_to_text"])
async def test_a_whole_answer_that_is_cut_gives_nothing(sandbox: Sandbox, kind: str) -> None:
    with pytest.raises(PomeloError) as cut:
        await anext(run(sandbox, kind, "[[cut]]", stream=False))
    assert cut.value.code == "provider_failed"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_stall_lasts_until_it_is_cancelled(sandbox: Sandbox, kind: str, stream: bool) -> None:
    seen: asyncio.Queue[Event] = asyncio.Queue()

    async def watch() -> None:
        async with aclosing(run(sandbox, kind, "[[stall]] and so on", stream=stream)) as events:  # type: ignore[type-var]
            async for event in events:
                seen.put_nowait(event)

    task = asyncio.create_task(watch())
    if stream and kind != "speech_to_text":
        await seen.get()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await asyncio.shield(task)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_sound_that_says_a_trigger_triggers_when_it_is_heard() -> None:
    clock = Clock()
    sandbox = Sandbox(sleep=clock.sleep)
    sound = await speak(sandbox, "[[delay:7]] Good evening.", "mp3_44100_128")
    clock.slept.clear()
    assert (await hear(sandbox, sound.source)).text == "[[delay:7]] Good evening."
    assert clock.slept == [7]


@pytest.mark.parametrize("content_type", ["", "audio/mpeg", "text/plain", "audio/pcm;rate=16000"])
async def test_a_text_file_that_begins_with_a_trigger_passes_for_a_sound(
    sandbox: Sandbox, content_type: str, tmp_path: Path
) -> None:
    text = b"[[words:3]] Good evening.\n"
    heard = await hear(sandbox, source(text, content_type))
    assert heard.text == "[[words:3]] Good evening."
    assert heard.audio_seconds == pytest.approx(0.06 * 25)
    spoken = made(
        await gather(
            sandbox.speech_to_speech(
                job("eleven-labs-sts", SpeechToSpeechInput(voice="adam"), audio=source(text, content_type))
            )
        )
    )
    assert decode(spoken.data).seconds == pytest.approx(0.06 * 25, abs=0.03)
