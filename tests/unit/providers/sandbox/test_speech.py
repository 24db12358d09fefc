"""Generated speech in every output format, read with PyAV and tinytag."""

from __future__ import annotations

import asyncio
import io
import math
import struct
from contextlib import aclosing

import pytest
from tinytag import TinyTag

from pomelo.audio_formats import AUDIO_FORMATS as FORMATS
from pomelo.gen.v1.speech_pb2 import TextToSpeechInput, VoiceSettings
from pomelo.providers.sandbox import Sandbox
from tests.unit.loop import watched
from tests.unit.media.built import checksum
from tests.unit.providers.sandbox.sandbox_jobs import decode, job, synthesize
from tests.waiting import soon

TEXT = "Hello, this is a test of the text-to-speech service. How does it sound?"
SECONDS = len(TEXT) * 0.06


def raw_demuxer(output_format: str) -> tuple[str | None, dict[str, str]]:
    """Returns the demuxer and options that PyAV needs for raw samples."""
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
async def test_speech_has_the_requested_format_rate_and_length(sandbox: Sandbox, output_format: str) -> None:
    speech = await synthesize(sandbox, TEXT, output_format)
    assert speech.content_type == expected_type(output_format)
    name, options = raw_demuxer(output_format)
    decoded = decode(speech.data, name, **options)
    assert decoded.rate == int(output_format.split("_")[1])
    assert decoded.channels == 1
    assert decoded.seconds == pytest.approx(SECONDS, abs=0.03)
    assert (
        decoded.codec
        == {
            "mp3": "mp3float",
            "opus": "opus",
            "pcm": "pcm_s16le",
            "wav": "pcm_s16le",
            "ulaw": "pcm_mulaw",
            "alaw": "pcm_alaw",
        }[output_format.split("_")[0]]
    )
    rms = math.sqrt(sum(sample * sample for sample in decoded.samples) / len(decoded.samples))
    assert 500 < rms < 12_000
    assert max(map(abs, decoded.samples)) < 32_000


@pytest.mark.parametrize("output_format", sorted(f for f in FORMATS if f.startswith(("mp3", "opus"))))
async def test_encoded_speech_has_the_requested_bit_rate(sandbox: Sandbox, output_format: str) -> None:
    text = TEXT * 4
    speech = await synthesize(sandbox, text, output_format)
    audio_bytes = len(speech.data) - len(text.encode())
    kbits = int(output_format.split("_")[2])
    assert audio_bytes * 8 / (len(text) * 60) == pytest.approx(kbits, rel=0.03)


async def test_the_default_is_mp3_at_44100_and_128(sandbox: Sandbox) -> None:
    assert (await synthesize(sandbox, TEXT)).data == (await synthesize(sandbox, TEXT, "mp3_44100_128")).data


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "mp3_22050_32", "opus_48000_64"])
@pytest.mark.parametrize("text", [TEXT, "Grüße 😀 — 你好", " padded ", "two\nlines"])
async def test_tinytag_reads_the_text_and_the_exact_length(
    sandbox: Sandbox, output_format: str, text: str
) -> None:
    speech = await synthesize(sandbox, text, output_format)
    tag = TinyTag.get(file_obj=io.BytesIO(speech.data))
    assert tag.other["lyrics"] == [text]
    assert tag.duration == pytest.approx(decode(speech.data).seconds, abs=0.001)


async def test_the_length_in_a_long_mp3_is_exact_to_the_frame(sandbox: Sandbox) -> None:
    times = 8  # after 30 seconds tinytag would estimate the length that the file does not state
    speech = await synthesize(sandbox, TEXT * times, "mp3_22050_32")
    tag = TinyTag.get(file_obj=io.BytesIO(speech.data))
    assert times * SECONDS > 30
    assert tag.duration == pytest.approx(times * SECONDS, abs=0.03)
    assert tag.duration == pytest.approx(decode(speech.data).seconds, abs=0.001)


@pytest.mark.parametrize("output_format", sorted(f for f in FORMATS if f.startswith("mp3")))
@pytest.mark.parametrize("times", [1, 5, 12])
async def test_the_info_frame_of_an_mp3_has_the_right_counts(
    sandbox: Sandbox, output_format: str, times: int
) -> None:
    speech = await synthesize(sandbox, TEXT * times, output_format)
    # The first chunk is the tag and the info frame with the counts; the others are the audio frames.
    first, *frames = speech.chunks
    magic, flags, count, size = struct.unpack_from(">4sIII", first, first.rindex(b"Info"))
    rate = int(output_format.split("_")[1])
    per_frame = 1152 if rate == 44100 else 576
    info = len(first) - 10 - int.from_bytes(first[8:10]) // 256 * 128 - first[9]
    assert (magic, flags) == (b"Info", 3)
    assert count == round(decode(speech.data).seconds * rate / per_frame)
    assert size == sum(map(len, frames)) + info


async def test_a_wav_header_describes_its_data(sandbox: Sandbox) -> None:
    data = (await synthesize(sandbox, TEXT, "wav_22050")).data
    riff, size, wave, fmt, _, encoding, channels, rate, per_second, align, bits, magic, length = (
        struct.unpack("<4sI4s4sIHHIIHH4sI", data[:44])
    )
    assert (riff, wave, fmt, magic) == (b"RIFF", b"WAVE", b"fmt ", b"data")
    assert (encoding, channels, rate, per_second, align, bits) == (1, 1, 22050, 44100, 2, 16)
    assert (size, length) == (len(data) - 8, len(data) - 44)


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "opus_48000_64", "wav_16000", "ulaw_8000"])
async def test_text_voice_and_seed_each_change_the_samples(sandbox: Sandbox, output_format: str) -> None:
    clips = [
        await synthesize(sandbox, "one red balloon", output_format),
        await synthesize(sandbox, "two red balloon", output_format),
        await synthesize(sandbox, "one red balloon", output_format, voice="bella"),
        await synthesize(sandbox, "one red balloon", output_format, seed=1),
        await synthesize(sandbox, "one red balloon", output_format, seed=2),
    ]
    name, options = raw_demuxer(output_format)
    decoded = [decode(speech.data, name, **options).samples for speech in clips]
    for index, one in enumerate(decoded):
        for other in decoded[:index]:
            different = sum(abs(a - b) > 500 for a, b in zip(one, other, strict=False))
            assert different > len(one) // 20


@pytest.mark.parametrize("output_format", sorted(FORMATS))
async def test_the_same_input_gives_the_same_bytes(sandbox: Sandbox, output_format: str) -> None:
    assert (await synthesize(sandbox, TEXT, output_format)).data == (
        await synthesize(Sandbox(), TEXT, output_format)
    ).data


@pytest.mark.parametrize("speed", [0.25, 0.5, 2.0, 4.0])
async def test_speed_scales_the_length(sandbox: Sandbox, speed: float) -> None:
    speech = await synthesize(sandbox, TEXT, "wav_8000", voice_settings=VoiceSettings(speed=speed))
    assert decode(speech.data).seconds == pytest.approx(SECONDS / speed, abs=0.001)


async def test_the_case_of_a_voices_name_changes_nothing(sandbox: Sandbox) -> None:
    upper = await synthesize(sandbox, TEXT, "wav_8000", voice="BELLA")
    assert upper.data == (await synthesize(sandbox, TEXT, "wav_8000", voice="bella")).data


async def test_other_voice_settings_do_not_change_the_length(sandbox: Sandbox) -> None:
    settings = VoiceSettings(stability=0.5, similarity_boost=0.5)
    speech = await synthesize(sandbox, TEXT, "wav_8000", voice_settings=settings)
    assert decode(speech.data).seconds == pytest.approx(SECONDS, abs=0.001)


@pytest.mark.parametrize(
    "output_format", ["mp3_44100_128", "opus_48000_32", "wav_8000", "pcm_8000", "alaw_8000"]
)
async def test_a_single_character_is_short_speech(sandbox: Sandbox, output_format: str) -> None:
    speech = await synthesize(sandbox, "a", output_format, voice_settings=VoiceSettings(speed=4.0))
    name, options = raw_demuxer(output_format)
    assert decode(speech.data, name, **options).seconds == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("output_format", ["wav_48000", "pcm_44100", "mp3_44100_192", "opus_48000_192"])
async def test_long_speech_is_streamed_in_small_chunks(sandbox: Sandbox, output_format: str) -> None:
    speech = await synthesize(sandbox, "😀" * 2000, output_format)
    assert all(0 < len(chunk) <= 64 * 1024 for chunk in speech.chunks)
    assert len(speech.chunks) > 10


async def test_ten_thousand_characters_are_ten_minutes_of_one_opus_file(sandbox: Sandbox) -> None:
    text = ("All work and no play makes a dull test. " * 250)[:10_000]
    speech = await synthesize(sandbox, text, "opus_48000_32")
    tag = TinyTag.get(file_obj=io.BytesIO(speech.data))
    assert tag.duration == pytest.approx(600, abs=0.001)
    assert tag.other["lyrics"] == [text]


async def test_the_checksum_of_every_ogg_page_is_correct(sandbox: Sandbox) -> None:
    data = (await synthesize(sandbox, TEXT * 3, "opus_48000_64")).data
    offset = 0
    granules: list[int] = []
    page_types: list[int] = []
    while offset < len(data):
        magic, _, page_type, granule, _, sequence, crc, segments = struct.unpack_from(
            "<4sBBqIIIB", data, offset
        )
        lacing = data[offset + 27 : offset + 27 + segments]
        end = offset + 27 + segments + sum(lacing)
        page = bytearray(data[offset:end])
        page[22:26] = bytes(4)
        assert (magic, sequence) == (b"OggS", len(granules))
        assert crc == checksum(bytes(page))
        granules.append(granule)
        page_types.append(page_type)
        offset = end
    assert granules == sorted(granules)
    assert page_types == [2] + [0] * (len(page_types) - 2) + [4]


async def test_a_cancelled_stream_generates_no_more_speech(sandbox: Sandbox) -> None:
    given = TextToSpeechInput(text="word " * 2000, voice="adam")
    async with aclosing(sandbox.text_to_speech(job("eleven-labs-tts", given))) as events:
        assert (await anext(events)).audio_chunk.content_type == "audio/mpeg"
        await anext(events)
    with pytest.raises(StopAsyncIteration):
        await anext(events)


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "opus_48000_64", "wav_48000", "ulaw_8000"])
async def test_the_event_loop_is_not_blocked_while_speech_is_generated(
    sandbox: Sandbox, output_format: str
) -> None:
    loop = asyncio.get_running_loop()
    await synthesize(sandbox, "warm up", output_format)

    async def longest_share(_: int) -> float:
        began = loop.time()
        async with watched() as gaps:
            await synthesize(sandbox, TEXT * 30, output_format)
        assert len(gaps) > 10
        return max(gaps) / max(0.1, loop.time() - began)

    # Work in the loop itself would be one gap as long as the task; a busy machine stretches both.
    await soon(longest_share, 0.5)
