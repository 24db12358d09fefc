"""What the ElevenLabs provider makes of answers: sounds as they come, transcripts, voices by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from hashlib import sha256
from typing import Any

import pytest

from pomelo.gen.v1.speech_pb2 import (
    SpeechToSpeechInput,
    SpeechToTextInput,
    TextToSpeechInput,
    Timestamps,
)
from pomelo.providers.elevenlabs.answers import content_type
from pomelo.providers.elevenlabs.voices import DEFAULTS
from pomelo.providers.sandbox.speech import Speech as SandboxSpeech
from pomelo.tasks.fields import AUDIO_FORMATS as FORMATS
from pomelo.testing import FaultUpstream, Gate, Received, Reply, Speech, Stop, Transcript, VoiceList
from pomelo.testing.elevenlabs_wire import error_reply
from tests.providers.elevenlabs.rig import MP3, TEXT, events, failure, job, opened, sound, transcript

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
SPEAKING = pytest.mark.parametrize(
    "given",
    [TextToSpeechInput(text=TEXT, voice="adam"), SpeechToSpeechInput(voice="adam")],
    ids=["tts", "sts"],
)


@pytest.fixture(name="vendor")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="provider")
async def _provider(vendor: FaultUpstream) -> AsyncIterator[Any]:
    async with opened(vendor.elevenlabs_base_url) as provider:
        yield provider


# --- sounds


@pytest.mark.parametrize("wanted", sorted(FORMATS))
async def test_every_format_has_its_media_type_and_comes_byte_for_byte(
    vendor: FaultUpstream, provider: Any, wanted: str
) -> None:
    said, kind = await sound(provider, job(TextToSpeechInput(text=TEXT, voice="adam", output_format=wanted)))
    assert said == b"".join(Speech().sound(await vendor.received()))
    assert kind == SandboxSpeech.of(wanted, "", "", 0).content_type, "the sandbox says otherwise"


async def test_without_a_format_it_is_mp3(vendor: FaultUpstream, provider: Any) -> None:
    assert (await sound(provider, job()))[1] == "audio/mpeg"


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"OggS\x00\x02" + bytes(8), "audio/ogg"),
        (b"\x1aE\xdf\xa3\x00" + bytes(8), "audio/webm"),
        (b"fLaC" + bytes(8), "audio/flac"),
    ],
)
async def test_opus_is_told_from_its_first_bytes_even_if_they_come_one_by_one(
    vendor: FaultUpstream, provider: Any, head: bytes, kind: str
) -> None:
    packets = tuple(head[at : at + 1] for at in range(len(head)))
    vendor.script(Reply(headers={"Content-Type": "application/octet-stream"}, steps=packets))
    given = TextToSpeechInput(text="x", voice="adam", output_format="opus_48000_64")
    assert await sound(provider, job(given)) == (head, kind)
    assert content_type("opus_48000_64", head) == kind


@BOTH
@SPEAKING
async def test_sound_comes_while_the_vendor_still_speaks(
    vendor: FaultUpstream, provider: Any, given: Any, stream: bool
) -> None:
    gates = [Gate(), Gate()]
    vendor.script(Speech(size=20_000, at={1: gates[0], 2: gates[1]}))
    async with aclosing(events(provider, job(given, stream=stream))) as answer:
        first = await anext(answer)
        await gates[0].reached.wait()
        assert first.audio_chunk.content_type == "audio/mpeg"
        gates[0].open()
        second = await anext(answer)
        assert second.audio_chunk.data
        assert not second.audio_chunk.content_type
        gates[1].open()
        rest = [event.audio_chunk.data async for event in answer]
    whole = b"".join(Speech(size=20_000).sound(vendor.requests[0]))
    assert first.audio_chunk.data + second.audio_chunk.data + b"".join(rest) == whole


async def test_the_first_byte_is_passed_on_within_twenty_milliseconds(
    vendor: FaultUpstream, provider: Any
) -> None:
    clock = asyncio.get_running_loop().time
    took = []
    for _ in range(5):
        head, tail = Gate(), Gate()
        vendor.script(Speech(size=20_000, at={0: head, 1: tail}))
        async with aclosing(events(provider, job(stream=True))) as answer:
            first = asyncio.ensure_future(anext(answer))
            await head.reached.wait()
            since = clock()
            head.open()
            assert (await first).audio_chunk.data
            took.append(clock() - since)
    assert min(took) < 0.02


@pytest.mark.parametrize("length", [False, True], ids=["chunks", "length"])
async def test_ten_megabytes_come_whole_in_small_pieces(
    vendor: FaultUpstream, provider: Any, length: bool
) -> None:
    script = Speech(size=10_000_000, packet=200_000, length=length)
    vendor.script(script)
    digest = sha256()
    async with aclosing(events(provider, job(stream=True))) as answer:
        async for event in answer:
            assert len(event.audio_chunk.data) <= 65536
            digest.update(event.audio_chunk.data)
    expected = sha256()
    for packet in script.sound(vendor.requests[0]):
        expected.update(packet)
    assert digest.hexdigest() == expected.hexdigest()


async def test_a_reader_that_is_slow_slows_the_vendor_down(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Speech(size=40_000_000))
    async with aclosing(events(provider, job(stream=True))) as answer:
        await anext(answer)
        received = vendor.requests[0]
        sent = -1
        while sent != received.bytes_sent:  # until the vendor can't write on
            sent = received.bytes_sent
            for _ in range(1000):
                await asyncio.sleep(0)
        assert sent < 30_000_000
        assert not received.done.is_set()


@BOTH
async def test_each_paid_request_has_a_connection_of_its_own(
    vendor: FaultUpstream, provider: Any, stream: bool
) -> None:
    """A kept connection may break, and nobody could tell whether the vendor has done the work."""
    for _ in range(3):
        await sound(provider, job(stream=stream))
        await transcript(provider, job(SpeechToTextInput()))
    assert len({received.connection for received in vendor.requests}) == len(vendor.requests) == 6


async def test_many_at_once_do_not_mix(vendor: FaultUpstream, provider: Any) -> None:
    async def ask(number: int) -> None:
        text = f"number {number}"
        said, _ = await sound(
            provider, job(TextToSpeechInput(text=text, voice="adam"), stream=number % 2 == 0)
        )
        mine = next(received for received in vendor.requests if received.body["text"] == text)
        assert said == b"".join(Speech().sound(mine))

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(ask(number))


async def test_raw_samples_that_look_like_text_are_sound(vendor: FaultUpstream, provider: Any) -> None:
    for wanted in ("pcm_16000", "ulaw_8000", "alaw_8000"):
        # The content type says that they are samples.
        vendor.script(Reply(headers={"Content-Type": "audio/basic"}, steps=(b"{", b"<html>")))
        given = TextToSpeechInput(text="x", voice="adam", output_format=wanted)
        assert (await sound(provider, job(given)))[0] == b"{<html>"


@pytest.mark.parametrize("kind", ["application/octet-stream", "audio/mpeg"])
@pytest.mark.parametrize("wanted", ["pcm_16000", "ulaw_8000"])
async def test_samples_under_another_label_may_begin_like_a_text(
    vendor: FaultUpstream, provider: Any, wanted: str, kind: str
) -> None:
    samples = b"<p>{not a text" + bytes(range(128, 256))
    vendor.script(Reply(headers={"Content-Type": kind}, steps=(samples,)))
    given = TextToSpeechInput(text="x", voice="adam", output_format=wanted)
    assert (await sound(provider, job(given)))[0] == samples


@pytest.mark.parametrize("wanted", ["mp3_44100_128", "pcm_16000", "opus_48000_32"])
async def test_the_bytes_outweigh_the_format_that_was_asked_for(
    vendor: FaultUpstream, provider: Any, wanted: str
) -> None:
    wav = b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + bytes(100)
    vendor.script(Reply(headers={"Content-Type": "audio/mpeg"}, steps=(wav,)))
    given = TextToSpeechInput(text="x", voice="adam", output_format=wanted)
    assert await sound(provider, job(given)) == (wav, "audio/wav")


# --- transcripts

SAID = {
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


def told(**changes: Any) -> Reply:
    """A transcript as the vendor tells it, with changes."""
    return Reply(
        headers={"Content-Type": "application/json"}, steps=(json.dumps({**SAID, **changes}).encode(),)
    )


def words(said: Any) -> list[tuple[str, float, float, str]]:
    """The words of a transcript."""
    return [(word.text, word.start, word.end, word.speaker) for word in said.words]


async def test_a_transcript_has_words_times_and_speakers(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(told())
    said = await transcript(provider, job(SpeechToTextInput(diarize=True)))
    assert (said.text, said.language, said.audio_seconds) == ("Hi there. (laughs)", "eng", 1.6)
    assert words(said) == [("Hi", 0.1, 0.32, "speaker_0"), ("there.", 0.36, 0.7, "speaker_1")]


async def test_without_diarize_nobody_is_named(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(told())
    said = await transcript(provider, job(SpeechToTextInput()))
    assert [word.speaker for word in said.words] == ["", ""]


async def test_without_times_there_are_no_words(vendor: FaultUpstream, provider: Any) -> None:
    said = await transcript(provider, job(SpeechToTextInput(timestamps=Timestamps.TIMESTAMPS_NONE)))
    assert said.text.endswith(sha256(MP3).hexdigest())
    assert (words(said), said.audio_seconds) == ([], 1.25)
    vendor.script(told())
    said = await transcript(provider, job(SpeechToTextInput(timestamps=Timestamps.TIMESTAMPS_NONE)))
    assert words(said) == []


async def test_characters_are_timed_one_by_one(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Transcript("Hé yo"))
    given = SpeechToTextInput(timestamps=Timestamps.TIMESTAMPS_CHARACTER, diarize=True)
    said = await transcript(provider, job(given))
    assert words(said) == [
        ("H", 0.0, 0.1, "speaker_0"),
        ("é", 0.1, 0.2, "speaker_0"),
        ("y", 0.25, 0.35, "speaker_0"),
        ("o", 0.35, 0.45, "speaker_0"),
    ]
    vendor.script(told())  # it gave no characters
    said = await transcript(provider, job(given))
    assert [word.text for word in said.words] == ["Hi", "there."]


async def test_noises_are_not_among_the_words(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Transcript("Hi there."))
    said = await transcript(provider, job(SpeechToTextInput()))
    assert said.text == "Hi there."
    assert [word.text for word in said.words] == ["Hi", "there."]


@pytest.mark.parametrize("stream", [False, True])
async def test_one_result_streamed_or_not(vendor: FaultUpstream, provider: Any, stream: bool) -> None:
    said = await transcript(provider, job(SpeechToTextInput(), stream=stream))
    assert said.text == f"{len(MP3)} bytes with SHA-256 {sha256(MP3).hexdigest()}"


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
async def test_what_is_missing_odd_or_new_does_no_harm(
    vendor: FaultUpstream, provider: Any, changes: dict[str, Any], seconds: float
) -> None:
    vendor.script(told(**changes))
    said = await transcript(provider, job(SpeechToTextInput()))
    assert said.text == SAID["text"]
    assert said.audio_seconds == seconds


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("timestamps", [Timestamps.TIMESTAMPS_WORD, Timestamps.TIMESTAMPS_CHARACTER])
@pytest.mark.parametrize(
    ("word", "heard"),
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
async def test_an_odd_word_is_repaired_or_left_out(
    vendor: FaultUpstream, provider: Any, word: Any, heard: Any, timestamps: Any
) -> None:
    around = [{"text": "a", "start": 0, "end": 1}, {"text": "c", "start": 4, "end": 5}]
    vendor.script(told(words=[around[0], word, around[1]]))
    said = await transcript(provider, job(SpeechToTextInput(diarize=True, timestamps=timestamps)))
    assert said.text == SAID["text"]
    if isinstance(word, dict) and isinstance(word.get("characters"), list) and heard is None:
        by_character = timestamps == Timestamps.TIMESTAMPS_CHARACTER
        heard = ("b", 2.0, 3.0, "") if by_character else ("b", 1.0, 1.0, "")
    expected = [("a", 0.0, 1.0, ""), heard, ("c", 4.0, 5.0, "")]
    assert words(said) == [one for one in expected if one is not None]


async def test_a_missing_time_is_that_of_the_word_before(vendor: FaultUpstream, provider: Any) -> None:
    timed = [{"text": "a", "start": 1, "end": 2}, {"text": "b"}, {"text": "c", "start": 4, "end": 3}]
    vendor.script(told(words=[{**word, "type": "word"} for word in timed]))
    said = await transcript(provider, job(SpeechToTextInput()))
    assert words(said) == [("a", 1.0, 2.0, ""), ("b", 2.0, 2.0, ""), ("c", 4.0, 4.0, "")]


async def test_a_silent_sound_has_an_empty_transcript(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(told(text="", words=[]))
    said = await transcript(provider, job(SpeechToTextInput()))
    assert (said.text, words(said), said.audio_seconds) == ("", [], 1.6)


async def test_a_transcript_of_hours_is_read(vendor: FaultUpstream, provider: Any) -> None:
    text = "word " * 60_000
    vendor.script(Transcript(text.strip()))
    said = await transcript(provider, job(SpeechToTextInput()))
    assert vendor.requests[0].bytes_sent > 8 * 1024 * 1024
    assert len(said.words) == 60_000
    assert said.audio_seconds == 15_000


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
    vendor.aside = None
    vendor.default = lambda received: (listed if _lists(received) else Speech())(received)


def _lists(received: Received) -> bool:
    return received.path.endswith("/voices")


def speak(voice: str) -> Any:
    """A job for a voice."""
    return job(TextToSpeechInput(text="x", voice=voice))


def lists(vendor: FaultUpstream) -> int:
    """How often the list was asked for."""
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
async def test_a_voice_is_found_by_its_name_or_its_first_word(
    vendor: FaultUpstream, provider: Any, voice: str, used: str
) -> None:
    listing(vendor, *MINE)
    await sound(provider, speak(voice))
    assert vendor.requests[-1].path.endswith(used)


@pytest.mark.parametrize("voice", ["nobody", "evil", "de", "sarah-", "x" * 19, "X" * 21])
async def test_an_unknown_voice_is_the_callers_mistake(
    vendor: FaultUpstream, provider: Any, voice: str
) -> None:
    listing(vendor, *MINE)
    error, _ = await failure(provider, speak(voice))
    assert (error.code, error.field) == ("invalid_parameter", "voice")
    assert "voice" in error.message
    assert [_lists(received) for received in vendor.requests] == [True]


async def test_a_long_list_is_read_page_by_page_and_kept(vendor: FaultUpstream, provider: Any) -> None:
    listing(vendor, *((f"Nr{number} - A voice", f"{number:020d}") for number in range(250)))
    for _ in range(3):
        await sound(provider, speak("nr249"))
    await failure(provider, speak("nr250"))
    asked = [received for received in vendor.requests if _lists(received)]
    assert [received.query.get("next_page_token") for received in asked] == [None, "100", "200"]
    assert {received.query["page_size"] for received in asked} == {"100"}
    assert asked[0].method == "GET"


async def test_calls_that_wait_for_the_list_share_one_reading(vendor: FaultUpstream, provider: Any) -> None:
    gate = Gate()
    vendor.aside = None
    listed = VoiceList(MINE, before=(gate,))
    vendor.default = lambda received: (listed if _lists(received) else Speech())(received)
    asking = [asyncio.create_task(sound(provider, speak("otto"))) for _ in range(10)]
    await gate.reached.wait()
    await sound(provider, speak("A" * 20))  # a voice id does not wait
    asking.pop(0).cancel()
    gate.open()
    await asyncio.gather(*asking)
    assert lists(vendor) <= 2, "one for the call that left, one for all others"


async def test_a_list_that_fails_fails_all_that_wait_for_it_once(
    vendor: FaultUpstream, provider: Any
) -> None:
    gate = Gate()
    vendor.aside = None
    refusal = error_reply(429, "system_busy", kind="rate_limit_error", headers={"Retry-After": "7"})
    vendor.script(Reply(refusal.status, refusal.headers, refusal.steps, before=(gate,)))
    listing(vendor, *MINE)
    asking = [asyncio.create_task(failure(provider, speak("otto"))) for _ in range(10)]
    await gate.reached.wait()
    for _ in range(10):
        await asyncio.sleep(0)
    gate.open()
    errors = [error for error, _ in await asyncio.gather(*asking)]
    assert {(error.code, error.retry_after) for error in errors} == {("provider_unavailable", 7)}
    assert lists(vendor) == 1
    await sound(provider, speak("otto"))  # and the next one tries again


@pytest.mark.parametrize(
    "reply",
    [
        Reply(steps=(b"[]",)),
        Reply(steps=(b'{"voices": {}, "has_more": true, "next_page_token": 7}',)),
        Reply(steps=(b'{"voices": [7]}',)),
        Reply(steps=(b"<html>",)),
        Reply(before=(Stop.CLOSE,)),
        error_reply(401, "unauthorized", legacy="missing_permissions", kind="authentication_error"),
    ],
)
async def test_a_list_that_can_not_be_read_is_the_providers_failure(
    vendor: FaultUpstream, provider: Any, reply: Reply
) -> None:
    vendor.aside = None
    vendor.default = reply
    error, _ = await failure(provider, speak("otto"))
    assert error.code in ("provider_failed", "provider_unavailable")
    assert all(_lists(received) for received in vendor.requests), "it spoke without a voice"


async def test_a_list_without_an_end_is_read_for_a_while_only(vendor: FaultUpstream, provider: Any) -> None:
    vendor.aside = None
    page = Reply(steps=(b'{"voices": [], "has_more": true, "next_page_token": "1"}',))
    vendor.default = lambda received: page if _lists(received) else Speech()(received)
    error, _ = await failure(provider, speak("otto"))
    assert error.field == "voice"
    assert lists(vendor) == 50


@pytest.mark.parametrize("timestamps", ["word", "character"])
async def test_half_a_surrogate_pair_in_a_transcript_is_replaced(
    vendor: FaultUpstream, provider: Any, timestamps: str
) -> None:
    def reply(received: Received) -> Reply:
        body = json.loads(
            b"".join(step for step in Transcript(text="Hi there?")(received).steps if isinstance(step, bytes))
        )
        text = json.dumps(body).replace("?", "\\ud83d").replace("Hi", "H\\ud83d\\ude00")
        return Reply(steps=(text.encode(),))

    vendor.script(reply)
    given = SpeechToTextInput(timestamps=Timestamps.Value(f"TIMESTAMPS_{timestamps.upper()}"))
    heard = await transcript(provider, job(given))
    assert heard.text == "H😀 there\ufffd"
    assert "".join(word.text for word in heard.words) == (
        "H😀there\ufffd" if timestamps == "word" else "Hithere\ufffd"
    )
