"""Transcripts of the ElevenLabs provider."""

from __future__ import annotations

import asyncio
import json
from hashlib import sha256
from typing import Any

import pytest

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, TimestampGranularity
from pomelo.protobuf.times import from_duration
from pomelo.testing import Received, Reply, Transcript
from tests.providers.elevenlabs.rig import MP3, job, transcript
from tests.providers.rig import Rig

TRANSCRIPT = {
    "language_code": "eng",
    "language_probability": 0.98,
    "text": "Hi there. (laughs)",
    "words": [
        {
            "text": "Hi",
            "start": 0.1,
            "end": 0.32,
            "type": "word",
            "speaker_id": "speaker_0",
            "logprob": -0.01,
        },
        {"text": " ", "start": 0.32, "end": 0.36, "type": "spacing", "speaker_id": "speaker_0"},
        {"text": "there.", "start": 0.36, "end": 0.7, "type": "word", "speaker_id": "speaker_1"},
        {"text": "(laughs)", "start": 0.8, "end": 1.4, "type": "audio_event", "speaker_id": "speaker_1"},
    ],
    "transcription_id": "tr_T1",
    "audio_duration_secs": 1.6,
}


def reported(**changes: Any) -> Reply:
    """Returns the vendor's transcript, with changes."""
    return Reply(
        headers={"Content-Type": "application/json"}, steps=(json.dumps({**TRANSCRIPT, **changes}).encode(),)
    )


def words(result: Any) -> list[tuple[str, float, float, str]]:
    """The words of a transcript."""
    return [
        (word.text, from_duration(word.start_offset), from_duration(word.end_offset), word.speaker)
        for word in result.words
    ]


async def test_a_transcript_has_words_times_and_speakers(rig: Rig) -> None:
    rig.script(reported())
    result = await transcript(rig.provider, job(SpeechToTextInput(diarize=True)))
    assert (result.text, result.language_code, result.audio_seconds) == ("Hi there. (laughs)", "eng", 1.6)
    assert words(result) == [("Hi", 0.1, 0.32, "speaker_0"), ("there.", 0.36, 0.7, "speaker_1")]


@pytest.mark.parametrize("language", [None, "", {}])
async def test_an_unknown_language_is_absent(rig: Rig, language: Any) -> None:
    rig.script(reported(language_code=language))
    assert not (await transcript(rig.provider, job(SpeechToTextInput()))).HasField("language_code")


async def test_without_diarize_no_speaker_is_named(rig: Rig) -> None:
    rig.script(reported())
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert [word.HasField("speaker") for word in result.words] == [False, False]


async def test_without_times_there_are_no_words(rig: Rig) -> None:
    untimed = job(SpeechToTextInput(timestamps=TimestampGranularity.TIMESTAMP_GRANULARITY_NONE))
    result = await transcript(rig.provider, untimed)
    assert result.text.endswith(sha256(MP3).hexdigest())
    assert (words(result), result.audio_seconds) == ([], 1.25)
    rig.script(reported())
    assert words(await transcript(rig.provider, untimed)) == []


async def test_each_character_has_its_own_timestamps(rig: Rig) -> None:
    rig.script(Transcript("Hé yo"))
    speech_input = SpeechToTextInput(
        timestamps=TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER, diarize=True
    )
    result = await transcript(rig.provider, job(speech_input))
    assert words(result) == [
        ("H", 0.0, 0.1, "speaker_0"),
        ("é", 0.1, 0.2, "speaker_0"),
        ("y", 0.25, 0.35, "speaker_0"),
        ("o", 0.35, 0.45, "speaker_0"),
    ]
    rig.script(reported())  # it gave no characters
    result = await transcript(rig.provider, job(speech_input))
    assert [word.text for word in result.words] == ["Hi", "there."]


async def test_noises_are_not_among_the_words(rig: Rig) -> None:
    rig.script(Transcript("Hi there."))
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert result.text == "Hi there."
    assert [word.text for word in result.words] == ["Hi", "there."]


async def test_a_stream_and_a_unary_answer_have_one_result(rig: Rig, stream: bool) -> None:
    result = await transcript(rig.provider, job(SpeechToTextInput(), stream=stream))
    assert result.text == f"{len(MP3)} bytes with SHA-256 {sha256(MP3).hexdigest()}"


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({"audio_duration_secs": None}, 0.0),
        ({"audio_duration_secs": -1}, 0.0),
        ({"audio_duration_secs": 10**9}, 0.0),
        ({"audio_duration_secs": 10**400}, 0.0),
        ({"audio_duration_secs": float("nan")}, 0.0),
        ({"audio_duration_secs": float("inf")}, 0.0),
        ({"audio_duration_secs": "1.5"}, 1.5),
        ({"audio_duration_secs": "abc"}, 0.0),
        ({"audio_duration_secs": "nan"}, 0.0),
        ({"audio_duration_secs": True}, 0.0),
        ({"audio_duration_secs": [30]}, 0.0),
        ({"audio_duration_secs": {}}, 0.0),
        ({"audio_duration_secs": 0}, 0.0),
        ({"words": [{"text": "x", "start": -(10**400), "end": 10**400}]}, 1.6),
        ({"words": None}, 1.6),
        ({"words": []}, 1.6),
        ({"words": 7}, 1.6),
        ({"words": {"text": "x"}}, 1.6),
        ({"words": [{"text": "Hi", "type": "word"}]}, 1.6),
        ({"language_code": None}, 1.6),
        ({"detail": {"status": "rate_limit_exceeded"}}, 1.6),
        ({"language_code": 7}, 1.6),
        ({"language_code": ["en"]}, 1.6),
        ({"novelty": {"a": [1]}, "words": [{"text": "x", "start": None, "end": None}]}, 1.6),
    ],
)
async def test_missing_invalid_and_unknown_fields_are_ignored(
    rig: Rig, changes: dict[str, Any], seconds: float
) -> None:
    rig.script(reported(**changes))
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert result.text == TRANSCRIPT["text"]
    assert result.audio_seconds == seconds


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "timestamps",
    [TimestampGranularity.TIMESTAMP_GRANULARITY_WORD, TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER],
)
@pytest.mark.parametrize(
    ("word", "received_audio"),
    [
        (None, None),
        (7, None),
        ("b", None),
        ({}, None),
        ({"text": None, "start": 2, "end": 3}, None),
        ({"text": 7, "start": 2, "end": 3}, None),
        ({"text": "b", "start": "2", "end": "3.5"}, ("b", 2.0, 3.5, "")),
        ({"text": "b", "start": "soon", "end": True}, ("b", 1.0, 1.0, "")),
        ({"text": "b", "start": NAN, "end": INF}, ("b", 1.0, 1.0, "")),
        ({"text": "b", "start": [2], "end": {}}, ("b", 1.0, 1.0, "")),
        ({"text": "b", "start": 2, "end": 3, "type": None}, ("b", 2.0, 3.0, "")),
        ({"text": "b", "start": 2, "end": 3, "type": 7}, ("b", 2.0, 3.0, "")),
        ({"text": "b", "start": 2, "end": 3, "speaker_id": 5}, ("b", 2.0, 3.0, "5")),
        ({"text": "b", "start": 2, "end": 3, "speaker_id": {}}, ("b", 2.0, 3.0, "")),
        ({"text": "b", "start": 2, "end": 3, "speaker_id": 10**4000}, ("b", 2.0, 3.0, "")),
        ({"text": "b", "start": 2, "end": 3, "characters": 7}, ("b", 2.0, 3.0, "")),
        ({"text": "b", "start": 2, "end": 3, "characters": [None, 7]}, ("b", 2.0, 3.0, "")),
        ({"text": "b", "characters": [None, {"text": "b", "start": "2", "end": 3}]}, None),
    ],
)
async def test_an_invalid_word_is_repaired_or_left_out(
    rig: Rig, word: Any, received_audio: Any, timestamps: Any
) -> None:
    around = [{"text": "a", "start": 0, "end": 1}, {"text": "c", "start": 4, "end": 5}]
    rig.script(reported(words=[around[0], word, around[1]]))
    result = await transcript(rig.provider, job(SpeechToTextInput(diarize=True, timestamps=timestamps)))
    assert result.text == TRANSCRIPT["text"]
    if isinstance(word, dict) and isinstance(word.get("characters"), list) and received_audio is None:
        by_character = timestamps == TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER
        received_audio = ("b", 2.0, 3.0, "") if by_character else ("b", 1.0, 1.0, "")
    expected = [("a", 0.0, 1.0, ""), received_audio, ("c", 4.0, 5.0, "")]
    assert words(result) == [one for one in expected if one is not None]


@pytest.mark.parametrize(
    ("timed", "expected"),
    [
        (
            [{"text": "a", "start": 1, "end": 2}, {"text": "b"}, {"text": "c", "start": 4, "end": 3}],
            [("a", 1.0, 2.0, ""), ("b", 2.0, 2.0, ""), ("c", 4.0, 4.0, "")],
        ),
        (  # not before the end of an earlier word
            [{"text": "a", "start": 5, "end": 6}, {"text": "b", "start": 1, "end": 2}, {"text": "c"}],
            [("a", 5.0, 6.0, ""), ("b", 1.0, 2.0, ""), ("c", 6.0, 6.0, "")],
        ),
        (  # not before the start of a word that ends before it
            [{"text": "a", "start": 5, "end": 1}, {"text": "b"}],
            [("a", 5.0, 5.0, ""), ("b", 5.0, 5.0, "")],
        ),
    ],
)
async def test_a_missing_time_is_that_of_the_previous_words(
    rig: Rig, timed: list[dict[str, Any]], expected: list[tuple[str, float, float, str]]
) -> None:
    for word_type in ({}, {"type": "word"}):
        rig.script(reported(words=[word | word_type for word in timed]))
        assert words(await transcript(rig.provider, job(SpeechToTextInput()))) == expected


async def test_silent_audio_has_an_empty_transcript(rig: Rig) -> None:
    rig.script(reported(text="", words=[]))
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert (result.text, words(result), result.audio_seconds) == ("", [], 1.6)


async def test_a_transcript_of_hours_is_read(rig: Rig) -> None:
    text = "word " * 60_000
    rig.script(Transcript(text.strip()))
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert rig.requests[0].bytes_sent > 8 * 1024 * 1024
    assert len(result.words) == 60_000
    assert result.audio_seconds == 15_000


async def test_only_a_long_transcript_is_parsed_in_a_thread(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    to_thread = asyncio.to_thread

    def record(function: Any, response: bytes, *arguments: Any) -> Any:
        parsed.append(len(response))
        return to_thread(function, response, *arguments)

    monkeypatch.setattr(asyncio, "to_thread", record)
    for words_spoken in (10, 4_000):
        rig.script(Transcript(("word " * words_spoken).strip()))
        assert len((await transcript(rig.provider, job(SpeechToTextInput()))).words) == words_spoken
    (size,) = parsed
    assert size >= 256 * 1024


@pytest.mark.parametrize("timestamps", ["word", "character"])
async def test_half_a_surrogate_pair_in_a_transcript_is_replaced(rig: Rig, timestamps: str) -> None:
    def reply(received: Received) -> Reply:
        body = json.loads(
            b"".join(step for step in Transcript(text="Hi there?")(received).steps if isinstance(step, bytes))
        )
        text = json.dumps(body).replace("?", "\\ud83d").replace("Hi", "H\\ud83d\\ude00")
        return Reply(steps=(text.encode(),))

    rig.script(reply)
    speech_input = SpeechToTextInput(
        timestamps=TimestampGranularity.Value(f"TIMESTAMP_GRANULARITY_{timestamps.upper()}")
    )
    received_audio = await transcript(rig.provider, job(speech_input))
    assert received_audio.text == "H😀 there\ufffd"
    assert "".join(word.text for word in received_audio.words) == (
        "H😀there\ufffd" if timestamps == "word" else "Hithere\ufffd"
    )
