"""Sounds in every output format, heard through PyAV and tinytag."""

from __future__ import annotations

import asyncio
import io
import math
import struct
from contextlib import aclosing

import pytest
from tinytag import TinyTag

from pomelo.gen.v1.speech_pb2 import TextToSpeechInput, VoiceSettings
from pomelo.providers.sandbox import Sandbox
from pomelo.tasks.fields import AUDIO_FORMATS as FORMATS
from tests.unit.providers.sandbox.sandbox_jobs import decode, job, speak

TEXT = "Hello, this is a test of the text-to-speech service. How does it sound?"
SECONDS = len(TEXT) * 0.06


def raw_demuxer(output_format: str) -> tuple[str | None, dict[str, str]]:
    """How PyAV is told what raw samples are."""
    codec, rate = output_format.split("_")[:2]
    names = {"pcm": "s16le", "ulaw": "mulaw", "alaw": "alaw"}
    return (names[codec], {"sample_rate": rate}) if codec in names else (None, {})


def expected_type(output_format: str) -> str:
    codec, rate = output_format.split("_")[:2]
    types = {
        "mp3": "audio/mpeg",
        "wav": "audio/wav",
        "ulaw": "audio/basic",
        "alaw": "audio/x-alaw-basic",
        "opus": "audio/ogg",
    }
    return types.get(codec, f"audio/pcm;rate={rate}")


@pytest.mark.parametrize("output_format", sorted(FORMATS))
async def test_a_sound_plays_in_the_asked_format_rate_and_length(
    sandbox: Sandbox, output_format: str
) -> None:
    sound = await speak(sandbox, TEXT, output_format)
    assert sound.content_type == expected_type(output_format)
    name, options = raw_demuxer(output_format)
    heard = decode(sound.data, name, **options)
    assert heard.rate == int(output_format.split("_")[1])
    assert heard.channels == 1
    assert heard.seconds == pytest.approx(SECONDS, abs=0.03)
    assert (
        heard.codec
        == {
            "mp3": "mp3float",
            "opus": "opus",
            "pcm": "pcm_s16le",
            "wav": "pcm_s16le",
            "ulaw": "pcm_mulaw",
            "alaw": "pcm_alaw",
        }[output_format.split("_")[0]]
    )
    loud = math.sqrt(sum(sample * sample for sample in heard.samples) / len(heard.samples))
    assert 500 < loud < 12_000
    assert max(map(abs, heard.samples)) < 32_000


@pytest.mark.parametrize("output_format", sorted(f for f in FORMATS if f.startswith(("mp3", "opus"))))
async def test_an_encoded_sound_has_the_asked_bit_rate(sandbox: Sandbox, output_format: str) -> None:
    text = TEXT * 4
    sound = await speak(sandbox, text, output_format)
    bare = len(sound.data) - len(text.encode())
    kbits = int(output_format.split("_")[2])
    assert bare * 8 / (len(text) * 60) == pytest.approx(kbits, rel=0.03)


async def test_the_default_is_mp3_at_44100_and_128(sandbox: Sandbox) -> None:
    assert (await speak(sandbox, TEXT)).data == (await speak(sandbox, TEXT, "mp3_44100_128")).data


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "mp3_22050_32", "opus_48000_64"])
@pytest.mark.parametrize("text", [TEXT, "Grüße 😀 — 你好", " padded ", "two\nlines"])
async def test_tinytag_reads_the_text_and_the_exact_length(
    sandbox: Sandbox, output_format: str, text: str
) -> None:
    sound = await speak(sandbox, text, output_format)
    tag = TinyTag.get(file_obj=io.BytesIO(sound.data))
    assert tag.other["lyrics"] == [text]
    assert tag.duration == pytest.approx(decode(sound.data).seconds, abs=0.001)


async def test_a_long_mp3_tells_its_length_to_the_frame(sandbox: Sandbox) -> None:
    sound = await speak(sandbox, TEXT * 40, "mp3_22050_32")
    tag = TinyTag.get(file_obj=io.BytesIO(sound.data))
    assert tag.duration == pytest.approx(40 * SECONDS, abs=0.03)
    assert tag.duration == pytest.approx(decode(sound.data).seconds, abs=0.001)


@pytest.mark.parametrize("output_format", sorted(f for f in FORMATS if f.startswith("mp3")))
@pytest.mark.parametrize("times", [1, 5, 12])
async def test_an_mp3_counts_its_frames_and_bytes_rightly(
    sandbox: Sandbox, output_format: str, times: int
) -> None:
    sound = await speak(sandbox, TEXT * times, output_format)
    # The first piece is the tag and the frame that counts; all others are the frames.
    first, *frames = sound.chunks
    mark, flags, count, size = struct.unpack_from(">4sIII", first, first.rindex(b"Info"))
    rate = int(output_format.split("_")[1])
    per_frame = 1152 if rate == 44100 else 576
    info = len(first) - 10 - int.from_bytes(first[8:10]) // 256 * 128 - first[9]
    assert (mark, flags) == (b"Info", 3)
    assert count == round(decode(sound.data).seconds * rate / per_frame)
    assert size == sum(map(len, frames)) + info


async def test_a_wav_header_says_what_follows(sandbox: Sandbox) -> None:
    data = (await speak(sandbox, TEXT, "wav_22050")).data
    riff, size, wave, fmt, _, kind, channels, rate, per_second, align, bits, mark, length = struct.unpack(
        "<4sI4s4sIHHIIHH4sI", data[:44]
    )
    assert (riff, wave, fmt, mark) == (b"RIFF", b"WAVE", b"fmt ", b"data")
    assert (kind, channels, rate, per_second, align, bits) == (1, 1, 22050, 44100, 2, 16)
    assert (size, length) == (len(data) - 8, len(data) - 44)


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "opus_48000_64", "wav_16000", "ulaw_8000"])
async def test_text_voice_and_seed_each_change_the_sound(sandbox: Sandbox, output_format: str) -> None:
    sounds = [
        await speak(sandbox, "one red balloon", output_format),
        await speak(sandbox, "two red balloon", output_format),
        await speak(sandbox, "one red balloon", output_format, voice="bella"),
        await speak(sandbox, "one red balloon", output_format, seed=1),
        await speak(sandbox, "one red balloon", output_format, seed=2),
    ]
    name, options = raw_demuxer(output_format)
    heard = [decode(sound.data, name, **options).samples for sound in sounds]
    for index, one in enumerate(heard):
        for other in heard[:index]:
            different = sum(abs(a - b) > 500 for a, b in zip(one, other, strict=False))
            assert different > len(one) // 20


@pytest.mark.parametrize("output_format", sorted(FORMATS))
async def test_the_same_input_gives_the_same_bytes(sandbox: Sandbox, output_format: str) -> None:
    assert (await speak(sandbox, TEXT, output_format)).data == (
        await speak(Sandbox(), TEXT, output_format)
    ).data


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0, 4.0])
async def test_speed_scales_the_length(sandbox: Sandbox, speed: float) -> None:
    sound = await speak(sandbox, TEXT, "wav_8000", voice_settings=VoiceSettings(speed=speed))
    assert decode(sound.data).seconds == pytest.approx(SECONDS / speed, abs=0.001)


async def test_other_voice_settings_leave_the_length_alone(sandbox: Sandbox) -> None:
    settings = VoiceSettings(stability=0.5, similarity_boost=0.5)
    sound = await speak(sandbox, TEXT, "wav_8000", voice_settings=settings)
    assert decode(sound.data).seconds == pytest.approx(SECONDS, abs=0.001)


@pytest.mark.parametrize(
    "output_format", ["mp3_44100_128", "opus_48000_32", "wav_8000", "pcm_8000", "alaw_8000"]
)
async def test_a_single_character_is_a_short_sound(sandbox: Sandbox, output_format: str) -> None:
    sound = await speak(sandbox, "a", output_format, voice_settings=VoiceSettings(speed=4.0))
    name, options = raw_demuxer(output_format)
    assert decode(sound.data, name, **options).seconds == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("output_format", ["wav_48000", "pcm_44100", "mp3_44100_192", "opus_48000_192"])
async def test_pieces_are_small_and_come_as_they_are_made(sandbox: Sandbox, output_format: str) -> None:
    sound = await speak(sandbox, "😀" * 2000, output_format)
    assert all(0 < len(chunk) <= 64 * 1024 for chunk in sound.chunks)
    assert len(sound.chunks) > 10


async def test_ten_thousand_characters_are_ten_minutes_of_one_opus_file(sandbox: Sandbox) -> None:
    text = ("All work and no play makes a dull test. " * 250)[:10_000]
    sound = await speak(sandbox, text, "opus_48000_32")
    tag = TinyTag.get(file_obj=io.BytesIO(sound.data))
    assert tag.duration == pytest.approx(600, abs=0.001)
    assert tag.other["lyrics"] == [text]


async def test_every_ogg_page_is_whole_by_its_checksum(sandbox: Sandbox) -> None:
    data = (await speak(sandbox, TEXT * 3, "opus_48000_64")).data
    place, granules, kinds = 0, [], []
    while place < len(data):
        mark, _, kind, granule, _, sequence, crc, segments = struct.unpack_from("<4sBBqIIIB", data, place)
        lacing = data[place + 27 : place + 27 + segments]
        end = place + 27 + segments + sum(lacing)
        page = bytearray(data[place:end])
        page[22:26] = bytes(4)
        assert (mark, sequence) == (b"OggS", len(granules))
        assert crc == slow_ogg_crc(page)
        granules.append(granule)
        kinds.append(kind)
        place = end
    assert granules == sorted(granules)
    assert kinds == [2] + [0] * (len(kinds) - 2) + [4]


def slow_ogg_crc(page: bytes) -> int:
    """Bit by bit, as the format's description has it."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ 0x04C11DB7 if crc & 0x80000000 else crc << 1) & 0xFFFFFFFF
    return crc


async def test_a_sound_that_is_left_is_made_no_further(sandbox: Sandbox) -> None:
    given = TextToSpeechInput(text="word " * 2000, voice="adam")
    async with aclosing(sandbox.text_to_speech(job("eleven-labs-tts", given))) as events:
        assert (await anext(events)).audio_chunk.content_type == "audio/mpeg"
        await anext(events)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "opus_48000_64", "wav_48000", "ulaw_8000"])
async def test_the_loop_goes_on_while_a_sound_is_made(sandbox: Sandbox, output_format: str) -> None:
    loop = asyncio.get_running_loop()
    gaps = []

    async def watch() -> None:
        before = loop.time()
        while True:
            await asyncio.sleep(0)
            gaps.append(loop.time() - before)
            before = loop.time()

    await speak(sandbox, "warm up", output_format)
    watching = asyncio.create_task(watch())
    began = loop.time()
    await speak(sandbox, TEXT * 30, output_format)
    took = loop.time() - began
    watching.cancel()
    assert len(gaps) > 10
    # Work in the loop itself would be one gap as long as the task; a busy machine stretches both.
    assert max(gaps) < max(0.05, took / 2)
