"""Answers of the ElevenLabs provider: streamed audio, transcripts, voices by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from hashlib import sha256
from typing import Any

import pytest

from pomelo.fields import AUDIO_FORMATS as FORMATS
from pomelo.gen.v1.speech_pb2 import SpeechToSpeechInput, SpeechToTextInput, Timestamps
from pomelo.providers.elevenlabs.responses import audio_content_type
from pomelo.providers.elevenlabs.voices import DEFAULTS
from pomelo.providers.sandbox.speech import Speech as SandboxSpeech
from pomelo.testing import FaultUpstream, Gate, Received, Reply, Speech, Stop, Transcript, VoiceList
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.providers.elevenlabs.rig import MAKE, MP3, failure, job, read_audio, say, transcript
from tests.providers.rig import PROMPT, Rig, open_rig, run

SPEAKING = pytest.mark.parametrize(
    "speech_input", [say(PROMPT), SpeechToSpeechInput(voice="adam")], ids=["tts", "sts"]
)


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(MAKE, "elevenlabs") as rig:
        yield rig


# --- audio


@pytest.mark.parametrize("audio_format", sorted(FORMATS))
async def test_every_format_has_its_content_type_and_arrives_byte_for_byte(
    rig: Rig, audio_format: str
) -> None:
    result, kind = await read_audio(rig.provider, job(say(PROMPT, output_format=audio_format)))
    assert result == b"".join(Speech().audio(await rig.received()))
    assert kind == SandboxSpeech.of(audio_format, "", "", 0).content_type, "the sandbox says otherwise"


async def test_without_a_format_it_is_mp3(rig: Rig) -> None:
    assert (await read_audio(rig.provider, job()))[1] == "audio/mpeg"


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"OggS\x00\x02" + bytes(8), "audio/ogg"),
        (b"\x1aE\xdf\xa3\x00" + bytes(8), "audio/webm"),
        (b"fLaC" + bytes(8), "audio/flac"),
    ],
)
async def test_opus_is_recognized_by_its_first_bytes_even_if_they_arrive_one_by_one(
    rig: Rig, head: bytes, kind: str
) -> None:
    packets = tuple(head[at : at + 1] for at in range(len(head)))
    rig.script(Reply(headers={"Content-Type": "application/octet-stream"}, steps=packets))
    speech_input = say(output_format="opus_48000_64")
    assert await read_audio(rig.provider, job(speech_input)) == (head, kind)
    assert audio_content_type("opus_48000_64", head) == kind


@SPEAKING
async def test_audio_arrives_while_the_vendor_still_sends(rig: Rig, speech_input: Any, stream: bool) -> None:
    gates = [Gate(), Gate()]
    rig.script(Speech(size=20_000, at={1: gates[0], 2: gates[1]}))
    async with aclosing(run(rig.provider, job(speech_input, stream=stream))) as answer:
        first = await anext(answer)
        await gates[0].reached.wait()
        assert first.audio_chunk.content_type == "audio/mpeg"
        gates[0].open()
        second = await anext(answer)
        assert second.audio_chunk.data
        assert not second.audio_chunk.content_type
        gates[1].open()
        rest = [event.audio_chunk.data async for event in answer]
    whole = b"".join(Speech(size=20_000).audio(rig.requests[0]))
    assert first.audio_chunk.data + second.audio_chunk.data + b"".join(rest) == whole


async def test_the_first_byte_is_passed_on_within_twenty_milliseconds(rig: Rig) -> None:
    clock = asyncio.get_running_loop().time
    took = []
    for _ in range(5):
        head, tail = Gate(), Gate()
        rig.script(Speech(size=20_000, at={0: head, 1: tail}))
        async with aclosing(run(rig.provider, job(stream=True))) as answer:
            first = asyncio.ensure_future(anext(answer))
            await head.reached.wait()
            since = clock()
            head.open()
            assert (await first).audio_chunk.data
            took.append(clock() - since)
    assert min(took) < 0.02


@pytest.mark.parametrize("length", [False, True], ids=["chunks", "length"])
async def test_ten_megabytes_arrive_complete_in_small_chunks(rig: Rig, length: bool) -> None:
    script = Speech(size=10_000_000, packet=200_000, length=length)
    rig.script(script)
    digest = sha256()
    async with aclosing(run(rig.provider, job(stream=True))) as answer:
        async for event in answer:
            assert len(event.audio_chunk.data) <= 65536
            digest.update(event.audio_chunk.data)
    expected = sha256()
    for packet in script.audio(rig.requests[0]):
        expected.update(packet)
    assert digest.hexdigest() == expected.hexdigest()


async def test_a_reader_that_is_slow_slows_the_vendor_down(rig: Rig) -> None:
    rig.script(Speech(size=40_000_000))
    async with aclosing(run(rig.provider, job(stream=True))) as answer:
        await anext(answer)
        received = rig.requests[0]
        sent = -1
        while sent != received.bytes_sent:  # until the vendor can't write on
            sent = received.bytes_sent
            for _ in range(1000):
                await asyncio.sleep(0)
        assert sent < 30_000_000
        assert not received.done.is_set()


async def test_each_charged_request_has_its_own_connection(rig: Rig, stream: bool) -> None:
    """If a kept-alive connection breaks, it is unknown whether the vendor has done the work."""
    for _ in range(3):
        await read_audio(rig.provider, job(stream=stream))
        await transcript(rig.provider, job(SpeechToTextInput()))
    assert len({received.connection for received in rig.requests}) == len(rig.requests) == 6


async def test_concurrent_requests_do_not_mix(rig: Rig) -> None:
    async def ask(number: int) -> None:
        text = f"number {number}"
        result, _ = await read_audio(rig.provider, job(say(text), stream=number % 2 == 0))
        mine = next(received for received in rig.requests if received.body["text"] == text)
        assert result == b"".join(Speech().audio(mine))

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(ask(number))


async def test_raw_samples_that_look_like_text_are_audio(rig: Rig) -> None:
    for audio_format in ("pcm_16000", "ulaw_8000", "alaw_8000"):
        # The content type says that they are samples.
        rig.script(Reply(headers={"Content-Type": "audio/basic"}, steps=(b"{", b"<html>")))
        speech_input = say(output_format=audio_format)
        assert (await read_audio(rig.provider, job(speech_input)))[0] == b"{<html>"


@pytest.mark.parametrize("kind", ["application/octet-stream", "audio/mpeg"])
@pytest.mark.parametrize("audio_format", ["pcm_16000", "ulaw_8000"])
async def test_samples_with_another_content_type_may_begin_like_a_text(
    rig: Rig, audio_format: str, kind: str
) -> None:
    samples = b"<p>{not a text" + bytes(range(128, 256))
    rig.script(Reply(headers={"Content-Type": kind}, steps=(samples,)))
    speech_input = say(output_format=audio_format)
    assert (await read_audio(rig.provider, job(speech_input)))[0] == samples


@pytest.mark.parametrize("audio_format", ["mp3_44100_128", "pcm_16000", "opus_48000_32"])
async def test_the_bytes_count_before_the_requested_format(rig: Rig, audio_format: str) -> None:
    wav = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(100)
    rig.script(Reply(headers={"Content-Type": "audio/mpeg"}, steps=(wav,)))
    speech_input = say(output_format=audio_format)
    assert await read_audio(rig.provider, job(speech_input)) == (wav, "audio/wav")


# --- transcripts

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
    return [(word.text, word.start, word.end, word.speaker) for word in result.words]


async def test_a_transcript_has_words_times_and_speakers(rig: Rig) -> None:
    rig.script(reported())
    result = await transcript(rig.provider, job(SpeechToTextInput(diarize=True)))
    assert (result.text, result.language, result.audio_seconds) == ("Hi there. (laughs)", "eng", 1.6)
    assert words(result) == [("Hi", 0.1, 0.32, "speaker_0"), ("there.", 0.36, 0.7, "speaker_1")]


async def test_without_diarize_no_speaker_is_named(rig: Rig) -> None:
    rig.script(reported())
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert [word.speaker for word in result.words] == ["", ""]


async def test_without_times_there_are_no_words(rig: Rig) -> None:
    result = await transcript(rig.provider, job(SpeechToTextInput(timestamps=Timestamps.TIMESTAMPS_NONE)))
    assert result.text.endswith(sha256(MP3).hexdigest())
    assert (words(result), result.audio_seconds) == ([], 1.25)
    rig.script(reported())
    result = await transcript(rig.provider, job(SpeechToTextInput(timestamps=Timestamps.TIMESTAMPS_NONE)))
    assert words(result) == []


async def test_each_character_has_its_own_timestamps(rig: Rig) -> None:
    rig.script(Transcript("Hé yo"))
    speech_input = SpeechToTextInput(timestamps=Timestamps.TIMESTAMPS_CHARACTER, diarize=True)
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


@pytest.mark.parametrize("timestamps", [Timestamps.TIMESTAMPS_WORD, Timestamps.TIMESTAMPS_CHARACTER])
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
        by_character = timestamps == Timestamps.TIMESTAMPS_CHARACTER
        received_audio = ("b", 2.0, 3.0, "") if by_character else ("b", 1.0, 1.0, "")
    expected = [("a", 0.0, 1.0, ""), received_audio, ("c", 4.0, 5.0, "")]
    assert words(result) == [one for one in expected if one is not None]


async def test_a_missing_time_is_that_of_the_previous_word(rig: Rig) -> None:
    timed: list[dict[str, Any]] = [
        {"text": "a", "start": 1, "end": 2},
        {"text": "b"},
        {"text": "c", "start": 4, "end": 3},
    ]
    rig.script(reported(words=[{**word, "type": "word"} for word in timed]))
    result = await transcript(rig.provider, job(SpeechToTextInput()))
    assert words(result) == [("a", 1.0, 2.0, ""), ("b", 2.0, 2.0, ""), ("c", 4.0, 4.0, "")]


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


# --- voices

MINE = (
    ("Sarah - Mine", "A" * 20),
    ("Otto - The Great", "B" * 20),
    ("otto", "C" * 20),
    ("Otto", "D" * 20),
    ("Anna, calm", "E" * 20),
    ("Evil", "../../v1/user"),
    ("  ", "F" * 20),
    ("Zoë de Vries", "G" * 20),
)


def listing(vendor: FaultUpstream, *voices: tuple[str, str]) -> None:
    """Lets the vendor list these voices, and speak."""
    listed = VoiceList(voices)
    vendor.unscripted = None
    vendor.default = lambda received: (listed if _lists(received) else Speech())(received)


def _lists(received: Received) -> bool:
    return received.path.endswith("/voices")


def speak(voice: str) -> Any:
    """A job for a voice."""
    return job(say(voice=voice))


def lists(vendor: FaultUpstream) -> int:
    """Returns the number of requests for the list."""
    return sum(_lists(received) for received in vendor.requests)


@pytest.mark.parametrize(
    ("voice", "used"),
    [
        ("sarah", "A" * 20),
        ("sarah - mine", "A" * 20),
        ("adam", DEFAULTS["adam"]),
        ("otto", "C" * 20),
        ("OTTO", "C" * 20),
        ("Otto  - the great", "B" * 20),
        ("anna", "E" * 20),
        ("zoë", "G" * 20),
        ("Zoë de Vries", "G" * 20),
    ],
)
async def test_a_voice_is_found_by_its_name_or_its_first_word(rig: Rig, voice: str, used: str) -> None:
    listing(rig, *MINE)
    await read_audio(rig.provider, speak(voice))
    assert rig.requests[-1].path.endswith(used)


@pytest.mark.parametrize("voice", ["nobody", "evil", "de", "sarah-", "x" * 19, "X" * 21])
async def test_an_unknown_voice_is_the_callers_mistake(rig: Rig, voice: str) -> None:
    listing(rig, *MINE)
    error, _ = await failure(rig.provider, speak(voice))
    assert (error.code, error.field) == ("invalid_parameter", "voice")
    assert "voice" in error.message
    assert [_lists(received) for received in rig.requests] == [True]


async def test_a_long_list_is_read_page_by_page_and_cached(rig: Rig) -> None:
    listing(rig, *((f"Nr{number} - A voice", f"{number:020d}") for number in range(250)))
    for _ in range(3):
        await read_audio(rig.provider, speak("nr249"))
    await failure(rig.provider, speak("nr250"))
    speech_job = [received for received in rig.requests if _lists(received)]
    assert [received.query.get("next_page_token") for received in speech_job] == [None, "100", "200"]
    assert {received.query["page_size"] for received in speech_job} == {"100"}
    assert speech_job[0].method == "GET"


async def test_calls_that_wait_for_the_list_share_one_read(rig: Rig) -> None:
    gate = Gate()
    rig.unscripted = None
    listed = VoiceList(MINE, before=(gate,))
    rig.default = lambda received: (listed if _lists(received) else Speech())(received)
    calls = [asyncio.create_task(read_audio(rig.provider, speak("otto"))) for _ in range(10)]
    await gate.reached.wait()
    await read_audio(rig.provider, speak("A" * 20))  # a voice id does not wait
    calls.pop(0).cancel()
    gate.open()
    await asyncio.gather(*calls)
    assert lists(rig) <= 2, "one for the call that left, one for all others"


async def test_a_list_that_fails_fails_all_that_wait_for_it_once(rig: Rig) -> None:
    gate = Gate()
    rig.unscripted = None
    refusal = error_reply(429, "system_busy", error_type="rate_limit_error", headers={"Retry-After": "7"})
    rig.script(Reply(refusal.status, refusal.headers, refusal.steps, before=(gate,)))
    listing(rig, *MINE)
    calls = [asyncio.create_task(failure(rig.provider, speak("otto"))) for _ in range(10)]
    await gate.reached.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    gate.open()
    errors = [error for error, _ in await asyncio.gather(*calls)]
    assert {(error.code, error.retry_after) for error in errors} == {("provider_unavailable", 7)}
    assert lists(rig) == 1
    await read_audio(rig.provider, speak("otto"))  # and the next one tries again


@pytest.mark.parametrize(
    "reply",
    [
        Reply(steps=(b"[]",)),
        Reply(steps=(b'{"voices": {}, "has_more": true, "next_page_token": 7}',)),
        Reply(steps=(b'{"voices": [7]}',)),
        Reply(steps=(b"<html>",)),
        Reply(before=(Stop.CLOSE,)),
        error_reply(401, "unauthorized", legacy="missing_permissions", error_type="authentication_error"),
    ],
)
async def test_an_unreadable_list_is_reported_as_provider_failed(rig: Rig, reply: Reply) -> None:
    rig.unscripted = None
    rig.default = reply
    error, _ = await failure(rig.provider, speak("otto"))
    assert error.code in ("provider_failed", "provider_unavailable")
    assert all(_lists(received) for received in rig.requests), "it spoke without a voice"


async def test_a_list_without_an_end_is_read_for_a_limited_time(rig: Rig) -> None:
    rig.unscripted = None
    page = Reply(steps=(b'{"voices": [], "has_more": true, "next_page_token": "1"}',))
    rig.default = lambda received: page if _lists(received) else Speech()(received)
    error, _ = await failure(rig.provider, speak("otto"))
    assert error.field == "voice"
    assert lists(rig) == 50


@pytest.mark.parametrize("timestamps", ["word", "character"])
async def test_half_a_surrogate_pair_in_a_transcript_is_replaced(rig: Rig, timestamps: str) -> None:
    def reply(received: Received) -> Reply:
        body = json.loads(
            b"".join(step for step in Transcript(text="Hi there?")(received).steps if isinstance(step, bytes))
        )
        text = json.dumps(body).replace("?", "\\ud83d").replace("Hi", "H\\ud83d\\ude00")
        return Reply(steps=(text.encode(),))

    rig.script(reply)
    speech_input = SpeechToTextInput(timestamps=Timestamps.Value(f"TIMESTAMPS_{timestamps.upper()}"))
    received_audio = await transcript(rig.provider, job(speech_input))
    assert received_audio.text == "H😀 there\ufffd"
    assert "".join(word.text for word in received_audio.words) == (
        "H😀there\ufffd" if timestamps == "word" else "Hithere\ufffd"
    )
