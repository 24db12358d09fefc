"""Speech to text and speech to speech: what is heard in sounds of the sandbox, of others, and in garbage."""

from __future__ import annotations

import io
import struct
import time
import wave
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pomelo.errors import PomeloError
from pomelo.gen.v1.speech_pb2 import Timestamps, Transcription
from pomelo.providers.base import AudioSource
from pomelo.providers.sandbox import Sandbox
from pomelo.tasks.fields import AUDIO_FORMATS as FORMATS
from tests.unit.media import corpus
from tests.unit.providers.sandbox.sandbox_jobs import decode, hear, respeak, source, speak

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
    """A WAV that the sandbox did not make."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(struct.pack("<h", 1000) * int(seconds * rate) * channels)
    return file.getvalue()


def foreign(container: str, codec: str, seconds: float, rate: int = 44_100) -> bytes:
    """A sound in another container, made by PyAV."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=rate, layout="mono")
        size = stream.codec_context.frame_size or 4096
        for start in range(0, int(seconds * rate), size):
            frame = av.AudioFrame(stream.codec_context.format, "mono", size)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize("output_format", sorted(FORMATS))
async def test_the_text_of_a_sound_comes_back(sandbox: Sandbox, output_format: str) -> None:
    sound = await speak(sandbox, TEXT, output_format)
    heard = await hear(sandbox, sound.source)
    assert heard.text == TEXT
    assert heard.audio_seconds == pytest.approx(len(TEXT) * 0.06, abs=0.03)


@pytest.mark.parametrize(
    "text", ["a", "Grüße 😀 你好", "\x00 nul", " padded ", "two\nlines\n", "x" * 9000, "😀" * 500]
)
@pytest.mark.parametrize("output_format", FAMILIES)
async def test_any_text_comes_back_from_every_family(sandbox: Sandbox, output_format: str, text: str) -> None:
    sound = await speak(sandbox, text, output_format, voice_settings={"speed": 4.0})
    assert (await hear(sandbox, sound.source)).text == text


@pytest.mark.parametrize("output_format", FAMILIES)
async def test_a_sound_in_a_file_is_heard_as_one_in_memory(
    sandbox: Sandbox, output_format: str, tmp_path: Path
) -> None:
    sound = await speak(sandbox, TEXT, output_format)
    path = tmp_path / "sound"
    path.write_bytes(sound.data)
    on_disk = replace(sound.source, data=b"", path=path)
    assert await hear(sandbox, on_disk) == await hear(sandbox, sound.source)


@pytest.mark.parametrize("output_format", FAMILIES)
async def test_a_sound_without_a_type_is_heard_with_its_own_length(
    sandbox: Sandbox, output_format: str
) -> None:
    sound = await speak(sandbox, TEXT, output_format)
    heard = await hear(sandbox, source(sound.data, "application/octet-stream"))
    assert heard.text == TEXT
    assert heard.audio_seconds == pytest.approx(len(TEXT) * 0.06, abs=0.03)


async def test_a_text_of_speech_in_a_file_that_went_away_is_a_failed_store(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    with pytest.raises(PomeloError) as failed:
        await hear(sandbox, AudioSource("audio/wav", 100, path=tmp_path / "gone"))
    assert failed.value.code == "store_unavailable"


# --- transcripts


async def test_words_are_timed_from_the_beginning_to_the_end(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, TEXT, "wav_8000")
    heard = await hear(sandbox, sound.source)
    assert [word.text for word in heard.words] == TEXT.split()
    assert heard.words[0].start == 0
    assert heard.words[-1].end == pytest.approx(heard.audio_seconds, abs=0.001)
    for word, following in zip(heard.words, list(heard.words)[1:], strict=False):
        assert word.start < word.end <= following.start
    assert heard.words[0].end == pytest.approx(5 * 0.06, abs=0.001)
    assert all(word.speaker == "" for word in heard.words)


async def test_a_word_is_timed_where_its_tone_sounds(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, "one   two", "wav_8000")
    heard = await hear(sandbox, sound.source)
    samples = decode(sound.data).samples
    for word in heard.words:
        inside = samples[int(word.start * 8000) : int(word.end * 8000)]
        assert max(map(abs, inside)) > 2000
    rest = samples[int(heard.words[0].end * 8000) + 1 : int(heard.words[1].start * 8000) - 1]
    assert max(map(abs, rest)) <= 1


async def test_characters_can_be_timed(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, TEXT, "wav_8000")
    heard = await hear(sandbox, sound.source, timestamps=Timestamps.TIMESTAMPS_CHARACTER)
    assert "".join(word.text for word in heard.words) == TEXT
    assert [word.start for word in heard.words] == pytest.approx(
        [0.06 * n for n in range(len(TEXT))], abs=0.001
    )


async def test_no_times_means_no_words(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, TEXT)
    heard = await hear(sandbox, sound.source, timestamps=Timestamps.TIMESTAMPS_NONE)
    assert (heard.text, len(heard.words)) == (TEXT, 0)


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
    sound = await speak(sandbox, TEXT)
    heard = await hear(sandbox, sound.source, diarize=True, **given)
    assert [word.speaker for word in heard.words] == speakers


async def test_the_language_is_english_or_the_asked_one(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, TEXT)
    assert (await hear(sandbox, sound.source)).language == "en"
    assert (await hear(sandbox, sound.source, language_code="deu")).language == "deu"


# --- sounds of others


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (foreign_wav(2.5), 2.5),
        (foreign_wav(1.5, 44_100, 2), 1.5),
        (foreign("mp3", "libmp3lame", 3), 3),
        (foreign("ogg", "libopus", 3, 48_000), 3),
        (corpus.make("ogg vorbis", 2), 2),
        (foreign("flac", "flac", 2), 2),
        (foreign("mp4", "aac", 4), 4),
    ],
    ids=["wav", "stereo wav", "mp3", "opus", "vorbis", "flac", "m4a"],
)
async def test_the_length_of_a_foreign_sound_is_found(sandbox: Sandbox, data: bytes, seconds: float) -> None:
    heard = await hear(sandbox, source(data))
    assert heard.audio_seconds == pytest.approx(seconds, abs=0.12)
    assert len(heard.text.split()) >= 3
    assert heard == await hear(Sandbox(), source(data))
    for output_format in ("mp3_44100_128", "opus_48000_32", "wav_16000", "ulaw_8000"):
        again = await respeak(sandbox, source(data), output_format)
        back = await hear(sandbox, again.source)
        assert back.audio_seconds == pytest.approx(heard.audio_seconds, abs=0.03)
        assert back.text == heard.text


async def test_different_foreign_sounds_say_different_things(sandbox: Sandbox) -> None:
    one = await hear(sandbox, source(foreign_wav(2)))
    other = await hear(sandbox, source(foreign_wav(2)[:-2] + b"\1\2"))
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
    heard = await hear(sandbox, source(bytes(per_second * 2), content_type))
    assert heard.audio_seconds == pytest.approx(2)


async def test_a_wav_that_claims_more_than_it_has_is_as_long_as_what_it_has(sandbox: Sandbox) -> None:
    data = bytearray(foreign_wav(2))
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert (await hear(sandbox, source(bytes(data)))).audio_seconds == pytest.approx(2)


async def test_an_empty_sound_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(PomeloError) as refused:
        await hear(sandbox, source(b""))
    assert (refused.value.code, refused.value.field) == ("invalid_parameter", "audio")


async def test_a_sound_that_is_too_long_for_the_model_is_refused(sandbox: Sandbox) -> None:
    just = source(bytes(300 * 8000), "audio/basic")
    longer = source(bytes(300 * 8000 + 4001), "audio/basic")  # encoders may add half a second
    assert (await respeak(sandbox, just, "ulaw_8000")).data
    with pytest.raises(PomeloError) as refused:
        await respeak(sandbox, longer, "ulaw_8000")
    assert (refused.value.code, refused.value.field) == ("invalid_parameter", "audio")
    assert "300" in refused.value.message
    assert (await hear(sandbox, longer)).audio_seconds > 300


async def hear_or_refuse(sandbox: Sandbox, audio: AudioSource) -> Transcription | None:
    """None where the sound is refused, as one whose header claims more than the model takes may be."""
    try:
        return await hear(sandbox, audio)
    except PomeloError as error:
        if error.code != "invalid_parameter" or "36000" not in error.message:
            raise
        return None


HEADS = [
    b"", b"ID3\x04\0\0", b"ID3\x04\0\0\0\0\1\0USLT\0\0\x7f\x7f\0\0\x03undPomelo sandbox\0x", b"\xff\xfb\x90\xc4",
    b"OggS\0\2" + bytes(20) + b"\1\x13OpusHead\1\1", b"OggS", b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0", b"RIFF\0\0\0\0WAVE",
    b"RIFF\0\0\0\0WAVEdata\xff\xff\xff\xff", b"fLaC\0\0\0\x22", b"\0\0\0\x18ftypM4A ", b"FORM\0\0\0\0AIFFCOMM\0\0\0\x12", b"[[", b"[[error:",
    b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel" + bytes(13) + b"\2", b"PmS1",
]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(
    st.sampled_from(HEADS),
    st.binary(max_size=300),
    st.sampled_from(["", "audio/mpeg", "audio/pcm;rate=0", "audio/pcm;rate=x"]),
)
async def test_garbage_is_heard_as_some_sound(
    sandbox: Sandbox, head: bytes, tail: bytes, content_type: str
) -> None:
    if not head + tail:
        return
    heard = await hear_or_refuse(sandbox, source(head + tail, content_type))
    assert heard is None or (heard.text and heard.audio_seconds > 0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(st.sampled_from(FAMILIES), st.data())
async def test_a_damaged_sound_is_heard_as_some_sound(
    sandbox: Sandbox, output_format: str, data: st.DataObject
) -> None:
    sound = bytearray((await speak(sandbox, "Hello there.", output_format)).data)
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, min(len(sound) - 1, 400)))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(sound)))
    heard = await hear_or_refuse(sandbox, source(bytes(sound[:cut])))
    assert heard is None or (heard.text and heard.audio_seconds > 0)


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
async def test_a_file_made_to_be_slow_is_measured_quickly(sandbox: Sandbox, data: bytes) -> None:
    began = time.process_time()
    heard = await hear(sandbox, source(data))
    assert heard.audio_seconds > 0
    assert time.process_time() - began < 2


# --- speech to speech


@pytest.mark.parametrize("output_format", sorted(FORMATS))
@pytest.mark.parametrize("input_format", FAMILIES)
async def test_speech_to_speech_keeps_length_and_text(
    sandbox: Sandbox, input_format: str, output_format: str
) -> None:
    first = await speak(sandbox, TEXT, input_format)
    second = await respeak(sandbox, first.source, output_format)
    before, after = await hear(sandbox, first.source), await hear(sandbox, second.source)
    assert after.text == TEXT
    assert after.audio_seconds == pytest.approx(before.audio_seconds, abs=0.03)


async def test_the_decoded_length_is_the_inputs(sandbox: Sandbox) -> None:
    for output_format in ("mp3_44100_128", "opus_48000_64", "wav_44100"):
        sound = await respeak(sandbox, source(foreign_wav(7.3)), output_format)
        assert decode(sound.data).seconds == pytest.approx(7.3, abs=0.03)


async def test_words_of_converted_speech_are_timed_where_their_tones_are(sandbox: Sandbox) -> None:
    converted = await respeak(sandbox, source(foreign_wav(30)), "wav_8000")
    recognized = await hear(sandbox, converted.source)
    samples = decode(converted.data).samples
    assert recognized.words[-1].end == pytest.approx(30, abs=0.01)
    for word, following in zip(recognized.words, list(recognized.words)[1:], strict=False):
        assert max(map(abs, samples[int(word.start * 8000) : int(word.end * 8000)])) > 2000
        assert max(map(abs, samples[int(word.end * 8000) + 8 : int(following.start * 8000) - 8])) <= 1


async def test_the_length_does_not_drift_over_many_turns(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, TEXT)
    length = (await hear(sandbox, sound.source)).audio_seconds
    for output_format in ("mp3_22050_32", "opus_48000_32", "mp3_44100_128", "ulaw_8000", "mp3_24000_48") * 2:
        sound = await respeak(sandbox, sound.source, output_format)
    assert (await hear(sandbox, sound.source)).audio_seconds == pytest.approx(length, abs=0.05)


async def test_the_voice_changes_the_sound_and_speed_its_length(sandbox: Sandbox) -> None:
    first = await speak(sandbox, TEXT, "wav_8000")
    one = await respeak(sandbox, first.source, "wav_8000", voice="bella")
    other = await respeak(sandbox, first.source, "wav_8000", voice="george")
    assert len(one.data) == len(other.data) == len(first.data)
    assert one.data != other.data
    assert one.data == (await respeak(Sandbox(), first.source, "wav_8000", voice="bella")).data
    for speed in (0.5, 2.0):
        settings = {"speed": speed}
        sound = await respeak(sandbox, first.source, "wav_8000", voice="bella", voice_settings=settings)
        assert decode(sound.data).seconds == pytest.approx(decode(one.data).seconds / speed, abs=0.01)
