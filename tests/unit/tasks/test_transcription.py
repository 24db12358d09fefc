"""Transcripts: the billed length, the language, and the times of words."""

from __future__ import annotations

from math import inf, nan

import pytest
from google.protobuf.duration_pb2 import Duration

from pomelo.catalog.pricing import Usage
from pomelo.fields import MANY_WORDS
from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.protobuf.times import from_duration, to_duration
from pomelo.tasks.base import Estimate
from tests.unit.tasks.collectors import collector, finish


def transcript(
    seconds: float, words: list[tuple[float, float]], input_audio_ms: int = 9_800, language: str = "eng"
) -> tuple[Transcription, Usage, bool]:
    """The result of a transcript of audio that has at most 10 s, and what is billed for it."""
    limit = Usage(audio_ms=10_000)
    collected = collector("eleven-labs-stt", estimate=Estimate(limit, limit, input_audio_ms=input_audio_ms))
    event = TaskEvent()
    found = event.completed.transcription
    found.text, found.language_code, found.audio_seconds = "some words", language, seconds
    for start, end in words:
        found.words.add(text="word", start_offset=to_duration(start), end_offset=to_duration(end))
    collected.add(event)
    result = finish(collected)
    assert collected.must_count == (len(words) > MANY_WORDS)
    if collected.must_count:
        collected.count()
    return result.transcription, *collected.usage(None)


@pytest.mark.parametrize(
    ("seconds", "ms", "counted"),
    [
        *[
            (10.0, 10_000, True),
            (1.0001, 1_001, True),
            (4.009, 4_009, True),
            (0.0001, 1, True),
            (10.001, 9_800, False),
        ],
        *[(impossible, 9_800, False) for impossible in (0.0, -1.0, inf, nan)],
    ],
)
def test_a_plausible_reported_length_is_billed(seconds: float, ms: int, counted: bool) -> None:
    result, used, by_provider = transcript(seconds, [])
    assert (used, by_provider) == (Usage(audio_ms=ms), counted)
    assert result.audio_seconds == ms / 1000


def test_an_impossible_length_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    transcript(12.5, [])
    assert caplog.messages == ["a provider reported 12.5 s of audio that has at most 10000 ms"]


def test_audio_of_unknown_length_is_billed_by_its_bound_and_lasts_to_its_last_word() -> None:
    result, used, counted = transcript(0.0, [(0.5, 1.5), (2.0, 2.5)], input_audio_ms=0)
    assert (used, counted) == (Usage(audio_ms=10_000), False)
    assert result.audio_seconds == 2.5
    assert transcript(0.0, [], input_audio_ms=0)[0].audio_seconds == 0


def test_a_long_transcript_is_completed_afterwards_in_a_thread() -> None:
    result, used, _ = transcript(0.0, [(0.5, 1.0), (nan, inf)] * (MANY_WORDS // 2) + [(2.0, nan)], 0)
    assert len(result.words) == MANY_WORDS + 1
    assert [from_duration(word.end_offset) for word in result.words[-3:]] == [1.0, 1.0, 2.0]
    assert (result.audio_seconds, used) == (2.0, Usage(audio_ms=10_000))


def test_times_that_are_no_numbers_are_replaced_by_those_before() -> None:
    result, _, _ = transcript(5.0, [(0.5, 1.0), (nan, 2.0), (2.5, inf), (nan, nan)])
    times = [(from_duration(word.start_offset), from_duration(word.end_offset)) for word in result.words]
    assert times == [(0.5, 1.0), (1.0, 2.0), (2.5, 2.5), (2.5, 2.5)]


def test_times_that_are_no_durations_are_replaced_by_those_before() -> None:
    wrong = Duration(seconds=5, nanos=-1)
    collected = collector("eleven-labs-stt", estimate=Estimate(Usage(audio_ms=9_000), Usage(audio_ms=9_000)))
    event = TaskEvent()
    words = event.completed.transcription.words
    words.add(start_offset=Duration(seconds=1), end_offset=Duration(seconds=2))
    words.add(start_offset=wrong, end_offset=Duration(seconds=3))
    words.add(start_offset=Duration(seconds=4), end_offset=wrong)
    collected.add(event)
    offsets = [
        (from_duration(word.start_offset), from_duration(word.end_offset))
        for word in finish(collected).transcription.words
    ]
    assert offsets == [(1, 2), (2, 3), (4, 4)]


@pytest.mark.parametrize(
    ("reported", "language"), [("eng", "en"), ("en-US", "en"), ("haw", "haw"), ("nowhere", None), ("", None)]
)
def test_the_language_is_reported_by_its_shortest_code_if_it_is_known(
    reported: str, language: str | None
) -> None:
    result = transcript(5.0, [], language=reported)[0]
    assert (result.language_code if result.HasField("language_code") else None) == language
