"""The length of answers is measured from their bytes, in chunks of any size and whatever the requested format."""

from __future__ import annotations

import io
import math
import struct
from fractions import Fraction
from typing import Any

import av
import pytest

from pomelo.audio_formats import AUDIO_FORMATS, AudioFormat
from pomelo.tasks.audio_meter import AudioMeter
from pomelo.testing.audio import packets
from tests.unit.media import corpus

WEBM = b"\x1aE\xdf\xa3" + bytes(5000)


def encoded(container: str, codec: str, seconds: float, rate: int, **options: Any) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=rate)
        stream.layout = options.pop("layout", "mono")
        stream.bit_rate = options.pop("bit_rate", 64_000)
        stream.options = {name: str(value) for name, value in options.items()}
        sent = 0
        while sent < seconds * rate:
            frame = av.AudioFrame(format="s16", layout=stream.layout.name, samples=rate // 10)
            silent = options.get("silent") or sent > rate
            width = 2 * len(stream.layout.channels)
            tone = [0 if silent else int(8000 * math.sin((sent + n) / 9)) for n in range(rate // 10)]
            data = b"".join(struct.pack("<h", value) * (width // 2) for value in tone)
            frame.planes[0].update(data + bytes(frame.planes[0].buffer_size - len(data)))
            frame.sample_rate, frame.pts, frame.time_base = rate, sent, Fraction(1, rate)
            out.mux(stream.encode(frame))
            sent += rate // 10
        out.mux(stream.encode(None))
    return file.getvalue()


def measured(audio: bytes, content_type: str, output_format: str, size: int = 1000) -> int | None:
    """The measured length of audio that is delivered in chunks of `size` bytes."""
    meter = AudioMeter(content_type, AudioFormat.of(output_format))
    for at in range(0, len(audio), size):
        meter.add(audio[at : at + size])
    return meter.ms


FILES = {
    "mp3 of a constant rate": encoded("mp3", "mp3", 3, 44100, bit_rate=32_000),
    "mp3 of a variable rate": encoded("mp3", "mp3", 3, 44100, q=4),
    "mp3 of half the sample rate": encoded("mp3", "mp3", 3, 22050, bit_rate=48_000),
    "mp3 of a quarter of the sample rate": encoded("mp3", "mp3", 3, 11025, bit_rate=16_000),
    "opus at 6 kbit/s": encoded("ogg", "libopus", 3, 48000, bit_rate=6_000),
    "opus without packets for silence": encoded("ogg", "libopus", 3, 48000, dtx=1, bit_rate=64_000),
    "wav": encoded("wav", "pcm_s16le", 3, 16000),
    "wav in stereo": encoded("wav", "pcm_s16le", 3, 44100, layout="stereo"),
}


@pytest.mark.parametrize("size", [1, 7, 1000, 10**6])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "output_format", ["mp3_44100_128", "wav_16000", "pcm_16000", "opus_48000_192", "ulaw_8000"]
)
def test_the_length_of_an_encoded_answer_is_its_playing_time(
    name: str, output_format: str, size: int
) -> None:
    ms = measured(FILES[name], "", output_format, size)
    assert ms is not None
    assert 2950 <= ms <= 3350  # encoders add a few frames


@pytest.mark.parametrize("output_format", sorted(AUDIO_FORMATS))
def test_every_format_is_measured(output_format: str) -> None:
    codec, rate, *kbits = output_format.split("_")
    per_second = int(kbits[0]) * 125 if kbits else int(rate) * (1 if codec in ("ulaw", "alaw") else 2)
    ms = measured(b"".join(packets(output_format, per_second * 4, "seed")), "", output_format)
    assert ms == pytest.approx(4000, rel=0.1 if codec == "opus" else 0.02)


def test_the_sample_rate_of_the_content_type_is_used() -> None:
    assert measured(bytes(88_200), "audio/pcm;rate=44100", "mp3_44100_128") == 1000
    assert measured(bytes(88_200), "audio/pcm;rate=44100", "pcm_16000") == 1000
    assert measured(bytes(88_200), "audio/pcm", "pcm_44100") == 1000


@pytest.mark.parametrize("output_format", ["mp3_44100_128", "opus_48000_32", "wav_16000"])
def test_audio_that_cannot_be_measured_has_no_length(output_format: str) -> None:
    assert measured(WEBM, "audio/webm", output_format) is None
    assert measured(bytes(5000), "audio/mpeg", output_format) is None
    tag = b"ID3\x04\x00\x00\x00\x00\x4e\x10" + bytes(10_000)
    assert measured(tag, "audio/mpeg", output_format) == 0
    assert measured(tag + corpus.make("adts"), "audio/mpeg", output_format) is None


@pytest.mark.parametrize("declared", [0, 1, 0xFFFFFFFF])
def test_the_declared_bytes_per_second_of_a_wav_file_do_not_change_its_length(declared: int) -> None:
    assert measured(corpus.wav(3, per_second=declared), "audio/wav", "wav_16000") == 3000


def test_samples_that_begin_like_a_frame_are_measured_as_samples() -> None:
    assert measured(b"\xff\xfb\x90\xc0" + bytes(31_996), "audio/pcm;rate=16000", "pcm_16000") == 1000
    mp3 = b"".join(packets("mp3_44100_128", 16_000, "seed"))[:2_000]
    assert measured(mp3 + bytes(30_000), "audio/pcm;rate=16000", "pcm_16000") == 1000


def test_tags_have_no_length_and_damage_does_not_shorten_audio() -> None:
    mp3 = b"".join(packets("mp3_44100_128", 16_000 * 3, "seed"))
    whole = measured(mp3, "audio/mpeg", "mp3_44100_128")
    tag = b"ID3\x04\x00\x00\x00\x00\x4e\x10" + bytes(10_000)
    assert measured(tag + mp3 + b"TAG" + bytes(125), "audio/mpeg", "mp3_44100_128") == whole
    footed = tag.replace(b"\x04\x00\x00", b"\x04\x00\x10") + b"3DI" + bytes(7)
    assert measured(footed + mp3, "audio/mpeg", "mp3_44100_128") == whole
    twice = measured(mp3 + mp3, "audio/mpeg", "mp3_44100_128")
    for size in (1, 7, 1000):
        assert measured(mp3 + footed + mp3, "audio/mpeg", "mp3_44100_128", size) == twice
    damaged = measured(mp3 + bytes(1000) + mp3, "audio/mpeg", "mp3_44100_128")
    assert whole is not None
    assert damaged == pytest.approx(2 * whole, abs=80)


def test_the_length_is_known_at_any_time() -> None:
    meter = AudioMeter("audio/ogg", AudioFormat.of("opus_48000_64"))
    ogg = FILES["opus at 6 kbit/s"]
    lengths = []
    for at in range(0, len(ogg), 100):
        meter.add(ogg[at : at + 100])
        lengths.append(meter.ms)
    assert lengths[0] == 0
    assert None not in lengths
    assert lengths == sorted(lengths, key=lambda ms: ms or 0)


def test_the_lengths_of_chained_streams_are_added() -> None:
    ogg = FILES["opus at 6 kbit/s"]
    once = measured(ogg, "audio/ogg", "opus_48000_64")
    assert once
    assert measured(ogg + ogg, "audio/ogg", "opus_48000_64") == pytest.approx(2 * once, abs=2)


def page(granule: int, flags: int, body: bytes) -> bytes:
    """A page of an Ogg stream."""
    return (
        b"OggS\0" + bytes((flags,)) + granule.to_bytes(8, "little") + bytes(12) + bytes((1, len(body))) + body
    )


def test_a_page_on_which_no_packet_ends_has_no_length() -> None:
    ogg = page(0, 2, b"OpusHead" + bytes(11)) + page(2**64 - 1, 0, bytes(255)) + page(48_000, 0, bytes(99))
    assert measured(ogg, "audio/ogg", "opus_48000_64") == 1000
