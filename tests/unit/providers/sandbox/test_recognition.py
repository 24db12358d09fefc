"""Speech to text and speech to speech from audio of the sandbox, other audio, and garbage."""

from __future__ import annotations

import io
import struct
import time
import wave
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomelo.audio_formats import AUDIO_FORMATS as FORMATS
from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import TimestampGranularity, Transcription
from pomelo.providers.base import AudioSource
from pomelo.providers.sandbox import Sandbox
from tests.processor import slowness
from tests.unit.media import corpus
from tests.unit.providers.sandbox.sandbox_jobs import (
    convert,
    decode,
    end,
    source,
    start,
    synthesize,
    transcribe,
)
from tests.unit.refusals import refused

FAMILIES = [
    "mp3_44100_128",
    "mp3_22050_32",
    "opus_48000_64",
    "wav_22050",
    "pcm_16000",
    "ulaw_8000",
    "alaw_8000",
]
TEXT = "Hello there. How are you today? I am fine!"


def foreign_wav(seconds: float, rate: int = 16_000, channels: int = 1) -> bytes:
    """Returns a WAV file that the sandbox did not generate."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(struct.pack("<h", 1000) * int(seconds * rate) * channels)
    return file.getvalue()


@pytest.mark.parametrize("output_format", sorted(FORMATS))
async def test_the_text_of_generated_speech_is_recognized(sandbox: Sandbox, output_format: str) -> None:
    speech = await synthesize(sandbox, TEXT, output_format)
    recognized = await transcribe(sandbox, speech.source)
    assert recognized.text == TEXT
    assert recognized.audio_seconds == pytest.approx(len(TEXT) * 0.06, abs=0.03)


@pytest.mark.parametrize(
    "text", ["a", "Grüße 😀 你好", "\x00 nul", " padded ", "two\nlines\n", "x" * 9000, "😀" * 500]
)
@pytest.mark.parametrize("output_format", FAMILIES)
async def test_any_text_is_recognized_in_every_format_family(
    sandbox: Sandbox, output_format: str, text: str
) -> None:
    speech = await synthesize(sandbox, text, output_format, voice_settings={"speed": 4.0})
    assert (await transcribe(sandbox, speech.source)).text == text


@pytest.mark.parametrize("output_format", FAMILIES)
async def test_audio_in_a_file_is_recognized_like_audio_in_memory(
    sandbox: Sandbox, output_format: str, tmp_path: Path
) -> None:
    speech = await synthesize(sandbox, TEXT, output_format)
    path = tmp_path / "audio"
    path.write_bytes(speech.data)
    on_disk = replace(speech.source, data=b"", path=path)
    assert await transcribe(sandbox, on_disk) == await transcribe(sandbox, speech.source)


@pytest.mark.parametrize("output_format", FAMILIES)
async def test_audio_without_a_content_type_has_its_measured_length(
    sandbox: Sandbox, output_format: str
) -> None:
    speech = await synthesize(sandbox, TEXT, output_format)
    recognized = await transcribe(sandbox, source(speech.data, "application/octet-stream"))
    assert recognized.text == TEXT
    assert recognized.audio_seconds == pytest.approx(len(TEXT) * 0.06, abs=0.03)


async def test_a_missing_audio_file_is_reported_as_store_unavailable(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    with refused("store_unavailable"):
        await transcribe(sandbox, AudioSource("audio/wav", 100, path=tmp_path / "gone"))


# --- transcripts


async def test_words_are_timed_from_the_beginning_to_the_end(sandbox: Sandbox) -> None:
    speech = await synthesize(sandbox, TEXT, "wav_8000")
    recognized = await transcribe(sandbox, speech.source)
    assert [word.text for word in recognized.words] == TEXT.split()
    assert start(recognized.words[0]) == 0
    assert end(recognized.words[-1]) == pytest.approx(recognized.audio_seconds, abs=0.001)
    for word, following in zip(recognized.words, list(recognized.words)[1:], strict=False):
        assert start(word) < end(word) <= start(following)
    assert end(recognized.words[0]) == pytest.approx(5 * 0.06, abs=0.001)
    assert not any(word.HasField("speaker") for word in recognized.words)


async def test_a_word_is_timed_where_its_tone_is_audible(sandbox: Sandbox) -> None:
    speech = await synthesize(sandbox, "one   two", "wav_8000")
    recognized = await transcribe(sandbox, speech.source)
    samples = decode(speech.data).samples
    for word in recognized.words:
        inside = samples[int(start(word) * 8000) : int(end(word) * 8000)]
        assert max(map(abs, inside)) > 2000
    rest = samples[int(end(recognized.words[0]) * 8000) + 1 : int(start(recognized.words[1]) * 8000) - 1]
    assert max(map(abs, rest)) <= 1


async def test_characters_can_be_timed(sandbox: Sandbox) -> None:
    speech = await synthesize(sandbox, TEXT, "wav_8000")
    recognized = await transcribe(
        sandbox, speech.source, timestamps=TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER
    )
    # As with a live key, the spaces between words have no times.
    timed = [(character, 0.06 * n) for n, character in enumerate(TEXT) if character != " "]
    assert [word.text for word in recognized.words] == [character for character, _ in timed]
    assert [start(word) for word in recognized.words] == pytest.approx([at for _, at in timed], abs=0.001)


async def test_without_timestamps_there_are_no_words(sandbox: Sandbox) -> None:
    speech = await synthesize(sandbox, TEXT)
    recognized = await transcribe(
        sandbox, speech.source, timestamps=TimestampGranularity.TIMESTAMP_GRANULARITY_NONE
    )
    assert (recognized.text, len(recognized.words)) == (TEXT, 0)


@pytest.mark.parametrize(
    ("given", "speakers"),
    [
        ({}, ["speaker_0"] * 2 + ["speaker_1"] * 4 + ["speaker_0"] * 3),
        ({"num_speakers": 1}, ["speaker_0"] * 9),
        ({"num_speakers": 32}, ["speaker_0"] * 2 + ["speaker_1"] * 4 + ["speaker_0"] * 3),
    ],
)
async def test_speakers_take_turns_by_sentence(
    sandbox: Sandbox, given: dict[str, int], speakers: list[str]
) -> None:
    speech = await synthesize(sandbox, TEXT)
    recognized = await transcribe(sandbox, speech.source, diarize=True, **given)
    assert [word.speaker for word in recognized.words] == speakers


async def test_the_language_is_the_requested_one_and_english_by_default(sandbox: Sandbox) -> None:
    speech = await synthesize(sandbox, TEXT)
    assert (await transcribe(sandbox, speech.source)).language_code == "en"
    assert (await transcribe(sandbox, speech.source, language_code="deu")).language_code == "deu"


# --- audio from other sources


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (foreign_wav(2.5), 2.5),
        (foreign_wav(1.5, 44_100, 2), 1.5),
        (corpus.make("mp3", 3), 3),
        (corpus.make("ogg opus", 3), 3),
        (corpus.make("ogg vorbis", 2), 2),
        (corpus.make("flac", 2), 2),
        (corpus.make("m4a", 4), 4),
    ],
    ids=["wav", "stereo wav", "mp3", "opus", "vorbis", "flac", "m4a"],
)
async def test_the_length_of_foreign_audio_is_measured(sandbox: Sandbox, data: bytes, seconds: float) -> None:
    recognized = await transcribe(sandbox, source(data))
    assert recognized.audio_seconds == pytest.approx(seconds, abs=0.12)
    assert len(recognized.text.split()) >= 3
    assert recognized == await transcribe(Sandbox(), source(data))
    for output_format in ("mp3_44100_128", "opus_48000_32", "wav_16000", "ulaw_8000"):
        converted = await convert(sandbox, source(data), output_format)
        transcript = await transcribe(sandbox, converted.source)
        assert transcript.audio_seconds == pytest.approx(recognized.audio_seconds, abs=0.03)
        assert transcript.text == recognized.text


async def test_different_foreign_audio_has_different_transcripts(sandbox: Sandbox) -> None:
    one = await transcribe(sandbox, source(foreign_wav(2)))
    other = await transcribe(sandbox, source(foreign_wav(2)[:-2] + b"\1\2"))
    assert one.text != other.text
    assert one.text[0].isupper()
    assert one.text.endswith(".")


@pytest.mark.parametrize(
    ("content_type", "per_second"),
    [
        ("audio/pcm;rate=16000", 32_000),
        ("audio/pcm;rate=44100", 88_200),
        ("audio/pcm", 32_000),
        ("audio/basic", 8000),
        ("audio/x-alaw-basic", 8000),
        ("", 32_000),
        ("application/octet-stream", 32_000),
    ],
)
async def test_raw_samples_are_as_long_as_their_type_says(
    sandbox: Sandbox, content_type: str, per_second: int
) -> None:
    recognized = await transcribe(sandbox, source(bytes(per_second * 2), content_type))
    assert recognized.audio_seconds == pytest.approx(2)


async def test_a_wav_with_too_large_a_header_length_is_measured_by_its_data(sandbox: Sandbox) -> None:
    data = bytearray(foreign_wav(2))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert (await transcribe(sandbox, source(bytes(data)))).audio_seconds == pytest.approx(2)


async def test_empty_audio_is_refused(sandbox: Sandbox) -> None:
    with refused("invalid_parameter", "audio"):
        await transcribe(sandbox, source(b""))


async def test_audio_that_is_too_long_for_the_model_is_refused(sandbox: Sandbox) -> None:
    longest = source(bytes(300 * 8000), "audio/basic")
    too_long = source(bytes(300 * 8000 + 4001), "audio/basic")  # encoders may add half a second
    assert (await convert(sandbox, longest, "ulaw_8000")).data
    with refused("invalid_parameter", "audio", "300"):
        await convert(sandbox, too_long, "ulaw_8000")
    assert (await transcribe(sandbox, too_long)).audio_seconds > 300


async def recognize_or_refuse(sandbox: Sandbox, audio: AudioSource) -> Transcription | None:
    """Returns None if the audio is refused because its header declares more than the model accepts."""
    try:
        return await transcribe(sandbox, audio)
    except PomeloError as error:
        if error.code != "invalid_parameter" or "36000" not in error.message:
            raise
        return None


FILE_HEADS = [
    b"", b"ID3\x04\0\0", b"ID3\x04\0\0\0\0\1\0USLT\0\0\x7f\x7f\0\0\x03undPomelo sandbox\0x", b"\xff\xfb\x90\xc4",
    b"OggS\0\2" + bytes(20) + b"\1\x13OpusHead\1\1", b"OggS", b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0", b"RIFF\0\0\0\0WAVE",
    b"RIFF\0\0\0\0WAVEdata\xff\xff\xff\xff", b"fLaC\0\0\0\x22", b"\0\0\0\x18ftypM4A ", b"FORM\0\0\0\0AIFFCOMM\0\0\0\x12", b"[[", b"[[error:",
    b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel" + bytes(13) + b"\2", b"PmS1",
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(
    st.sampled_from(FILE_HEADS),
    st.binary(max_size=300),
    st.sampled_from(["", "audio/mpeg", "audio/pcm;rate=0", "audio/pcm;rate=x"]),
)
async def test_garbage_is_recognized_as_audio_of_some_length(
    sandbox: Sandbox, head: bytes, tail: bytes, content_type: str
) -> None:
    if not head + tail:
        return
    recognized = await recognize_or_refuse(sandbox, source(head + tail, content_type))
    assert recognized is None or (recognized.text and recognized.audio_seconds > 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.sampled_from(FAMILIES), st.data())
async def test_damaged_speech_is_recognized_as_audio_of_some_length(
    sandbox: Sandbox, output_format: str, data: st.DataObject
) -> None:
    speech = bytearray((await synthesize(sandbox, "Hello there.", output_format)).data)
    for _ in range(data.draw(st.integers(1, 4))):
        speech[data.draw(st.integers(0, min(len(speech) - 1, 400)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(speech)))
    recognized = await recognize_or_refuse(sandbox, source(bytes(speech[:cut])))
    assert recognized is None or (recognized.text and recognized.audio_seconds > 0)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20_000_000,
        b"\xff\xfb\x90\xc4" + b"\0" * 20_000_000,
        b"\xff\xfb\x90\xc4\xff" * 4_000_000,
        b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + bytes(1000),
        b"fLaC" + b"\x01\0\0\0" * 5_000_000,
        b"RIFF\0\0\0\0WAVE" + b"abcd\0\0\0\0" * 2_500_000,
        b"\0\0\0\x18ftypM4A " + b"\0\0\0\x08free" * 2_500_000,
        b"\0\0\0\x08ftyp" + b"\0\0\0\x09moov" * 2_000_000,
        b"OggS" + b"\0" * 20_000_000,
        b"FORM\0\0\0\0AIFF" + b"abcd\0\0\0\0" * 2_500_000,
    ],
    ids=["ff", "one frame", "many heads", "big tag", "flac", "wav", "mp4", "nested mp4", "ogg", "aiff"],
)
async def test_a_file_crafted_to_be_slow_is_measured_quickly(sandbox: Sandbox, data: bytes) -> None:
    began = time.process_time()
    recognized = await transcribe(sandbox, source(data))
    assert recognized.audio_seconds > 0
    assert time.process_time() - began < 2 * slowness()


# --- speech to speech


@pytest.mark.parametrize("output_format", sorted(FORMATS))
@pytest.mark.parametrize("input_format", FAMILIES)
async def test_speech_to_speech_keeps_length_and_text(
    sandbox: Sandbox, input_format: str, output_format: str
) -> None:
    first = await synthesize(sandbox, TEXT, input_format)
    second = await convert(sandbox, first.source, output_format)
    before, after = await transcribe(sandbox, first.source), await transcribe(sandbox, second.source)
    assert after.text == TEXT
    assert after.audio_seconds == pytest.approx(before.audio_seconds, abs=0.03)


async def test_converted_speech_has_the_length_of_its_input(sandbox: Sandbox) -> None:
    for output_format in ("mp3_44100_128", "opus_48000_64", "wav_44100"):
        speech = await convert(sandbox, source(foreign_wav(7.3)), output_format)
        assert decode(speech.data).seconds == pytest.approx(7.3, abs=0.03)


async def test_words_of_converted_speech_are_timed_where_their_tones_are(sandbox: Sandbox) -> None:
    converted = await convert(sandbox, source(foreign_wav(30)), "wav_8000")
    recognized = await transcribe(sandbox, converted.source)
    samples = decode(converted.data).samples
    assert end(recognized.words[-1]) == pytest.approx(30, abs=0.01)
    for word, following in zip(recognized.words, list(recognized.words)[1:], strict=False):
        assert max(map(abs, samples[int(start(word) * 8000) : int(end(word) * 8000)])) > 2000
        assert max(map(abs, samples[int(end(word) * 8000) + 8 : int(start(following) * 8000) - 8])) <= 1


async def test_the_length_does_not_drift_over_many_conversions(sandbox: Sandbox) -> None:
    speech = await synthesize(sandbox, TEXT)
    length = (await transcribe(sandbox, speech.source)).audio_seconds
    for output_format in ("mp3_22050_32", "opus_48000_32", "mp3_44100_128", "ulaw_8000", "mp3_24000_48") * 2:
        speech = await convert(sandbox, speech.source, output_format)
    assert (await transcribe(sandbox, speech.source)).audio_seconds == pytest.approx(length, abs=0.05)


async def test_the_voice_changes_the_samples_and_the_speed_changes_the_length(sandbox: Sandbox) -> None:
    first = await synthesize(sandbox, TEXT, "wav_8000")
    one = await convert(sandbox, first.source, "wav_8000", voice="bella")
    other = await convert(sandbox, first.source, "wav_8000", voice="george")
    assert len(one.data) == len(other.data) == len(first.data)
    assert one.data != other.data
    assert one.data == (await convert(Sandbox(), first.source, "wav_8000", voice="bella")).data
    for speed in (0.5, 2.0):
        settings = {"speed": speed}
        speech = await convert(sandbox, first.source, "wav_8000", voice="bella", voice_settings=settings)
        assert decode(speech.data).seconds == pytest.approx(decode(one.data).seconds / speed, abs=0.01)
