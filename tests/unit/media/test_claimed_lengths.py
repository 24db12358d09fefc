"""A file is reserved and billed for at least its real length, whatever its headers declare."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pomelo.catalog.catalog import Catalog
from pomelo.media.content_types import sniff
from pomelo.media.duration import Measurer
from pomelo.providers.base import AudioSource
from pomelo.tasks.base import AudioInfo
from tests.unit.media import corpus

Claim = tuple[str, Callable[[bytes], int], str]
"""A file of the corpus, the position of a declared length in it, and the format of its bytes."""


def after(marker: bytes, offset: int = 0, which: int = 0) -> Callable[[bytes], int]:
    """Finds the position `offset` bytes after a marker: the one numbered `which`, from 0; -1 for the last."""

    def find(data: bytes) -> int:
        if which < 0:
            return data.rindex(marker) + len(marker) + offset
        position = -1
        for _ in range(which + 1):
            position = data.index(marker, position + 1)
        return position + len(marker) + offset

    return find


CLAIMS: dict[str, Claim] = {
    "the size of a WAV": ("wav", after(b"RIFF"), "<I"),
    "the byte rate of a WAV": ("wav", after(b"fmt ", 12), "<I"),
    "the data size of a WAV": ("wav", after(b"data"), "<I"),
    "the byte rate of ADPCM": ("wav of ima adpcm", after(b"fmt ", 12), "<I"),
    "the samples of ADPCM": ("wav of ima adpcm", after(b"fact", 4), "<I"),
    "the data size of ADPCM": ("wav of ms adpcm", after(b"data"), "<I"),
    "the byte rate of WMA": ("wav of wma", after(b"fmt ", 12), "<I"),
    "the data size of an RF64": ("rf64", after(b"ds64", 12), "<Q"),
    "the samples of an RF64": ("rf64", after(b"ds64", 20), "<Q"),
    "the frames of an AIFF": ("aiff", after(b"COMM", 6), ">I"),
    "the size of an AU": ("au", after(b".snd", 4), ">I"),
    "the samples of a FLAC": ("flac", after(b"fLaC", 4 + 14), ">I"),
    "the frames of an MP3": ("mp3", after(b"Info", 4), ">I"),
    "the bytes of an MP3": ("mp3", after(b"Info", 8), ">I"),
    "the movie of an M4A": ("m4a", after(b"mvhd", 16), ">I"),
    "the track of an M4A": ("m4a", after(b"tkhd", 20), ">I"),
    "the media of an M4A": ("m4a", after(b"mdhd", 16), ">I"),
    "the edit of an M4A": ("m4a", after(b"elst", 8), ">I"),
    "the movie of a fragmented MP4": ("fragmented mp4", after(b"mvhd", 16), ">I"),
    "the movie of ALAC": ("m4a of alac", after(b"mdhd", 16), ">I"),
    "the last page of Opus": ("ogg opus", after(b"OggS", 2, -1), "<q"),
    "the first audio page of Opus": ("ogg opus", after(b"OggS", 2, 2), "<q"),
    "the last page of Vorbis": ("ogg vorbis", after(b"OggS", 2, -1), "<q"),
    "the duration of WebM": ("webm opus", after(b"\x44\x89\x88"), ">d"),
    "the duration of Matroska": ("matroska aac", after(b"\x44\x89\x88"), ">d"),
    "the time scale of A-law in MOV": ("mov of a-law", after(b"mdhd", 12), ">I"),
    "the time scale of 24 bits in MOV": ("mov of 24 bits", after(b"mdhd", 12), ">I"),
    "the samples of TTA": ("tta", after(b"TTA1", 10), "<I"),
    "the samples of WavPack": ("wavpack", after(b"wvpk", 8), "<I"),
    "the packets of CAF": ("caf of alac", after(b"pakt", 8), ">q"),
    "the frames of CAF": ("caf of alac", after(b"pakt", 16), ">q"),
    "the bytes per packet of mu-law in CAF": ("caf of mu-law", after(b"desc", 24), ">I"),
    "the duration of FLV": ("flv", after(b"duration", 1), ">d"),
    "the length of AVI": ("avi", after(b"auds", 28), "<I"),
}

SECONDS = 30.0
STT = Catalog.load().by_any_name["eleven-labs-stt"]


def packed(pack_format: str, value: int) -> bytes:
    """The bytes of a declared value; a value that is too large for them is truncated."""
    if pack_format.endswith("d"):
        return struct.pack(pack_format, float(value % 10**12))
    size = struct.calcsize(pack_format)
    order: Literal["little", "big"] = "little" if pack_format[0] == "<" else "big"
    return (value % (1 << 8 * size)).to_bytes(size, order)


def claiming(claim: Claim, value: int) -> bytes:
    """A file of the corpus that declares another value."""
    name, find, pack_format = claim
    data = bytearray(corpus.make(name, SECONDS))
    position, patch = find(bytes(data)), packed(pack_format, value)
    data[position : position + len(patch)] = patch
    return bytes(data)


@pytest.mark.parametrize("claim", CLAIMS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(value=0, label="")
@example(value=7, label="")
@example(value=1085, label="")
@example(value=1_000_000, label="")
@example(value=1, label="audio/mpeg")
@example(value=2**32 - 1, label="audio/pcm")
@example(value=2**63 - 1, label="audio/wav")
@given(
    value=st.one_of(st.integers(0, 10**7), st.integers(0, 2**64 - 1)),
    label=st.sampled_from(
        [
            "",
            "audio/mpeg",
            "audio/pcm;rate=16000",
            "audio/basic",
            "video/mp4",
            "audio/L16;rate=8000",
            "text/plain",
        ]
    ),
)
async def test_a_declared_length_never_makes_a_file_shorter(
    measurer: Measurer, claim: str, value: int, label: str
) -> None:
    data = claiming(CLAIMS[claim], value)
    measured = await measurer.measure(AudioSource(sniff(label, data[:16]), len(data), data=data))
    reserved = AudioInfo(len(data), measured.ms).max_ms(STT) / 1000
    assert reserved >= 0.92 * SECONDS, (claim, value, label, measured)


DENSE: dict[str, Claim] = {
    "the sample rate of a WAV": ("wav", after(b"fmt ", 8), "<I"),
    "the sample rate of an RF64": ("rf64", after(b"fmt ", 8), "<I"),
    "the sample rate of ADPCM": ("wav of ima adpcm", after(b"fmt ", 8), "<I"),
    "the sample rate of an AU": ("au", after(b".snd", 12), ">I"),
    "the sample rate of a CAF": ("caf", after(b"desc", 8), ">d"),
    "the sample rate of ALAC in CAF": ("caf of alac", after(b"desc", 8), ">d"),
    "the sample rate of A-law in MOV": ("mov of a-law", after(b"alaw", 28), ">H"),
    "the sample rate of samples in Matroska": ("matroska pcm", after(b"\xb5\x88"), ">d"),
    "the channels of a WAV": ("wav", after(b"fmt ", 6), "<H"),
    "the channels of an AU": ("au", after(b".snd", 16), ">I"),
    "the channels of an AIFF": ("aiff", after(b"COMM", 4), ">h"),
}
"""What makes the same bytes shorter, in formats that do not say it in each frame."""


@pytest.mark.parametrize("value", [0, 200, 250, 384_001, 10**6, 10**9, 2**31 - 1, 2**32 - 1])
@pytest.mark.parametrize("claim", DENSE)
async def test_audio_with_more_samples_a_second_than_there_can_be_is_not_measured(
    measurer: Measurer, claim: str, value: int
) -> None:
    data = claiming(DENSE[claim], value)
    measured = await measurer.measure(AudioSource("audio/wav", len(data), data=data))
    assert AudioInfo(len(data), measured.ms).max_ms(STT) / 1000 >= 0.92 * SECONDS


@pytest.mark.parametrize(
    ("rate", "channels", "bits"), [(192_000, 2, 32), (384_000, 2, 32), (96_000, 8, 24), (48_000, 16, 24)]
)
async def test_audio_of_the_highest_rates_in_use_is_measured(
    measurer: Measurer, rate: int, channels: int, bits: int
) -> None:
    width = channels * bits // 8
    body = bytes(rate * width // 10)
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * width, width, bits)
    data = b"RIFF" + struct.pack("<I", 36 + len(body)) + b"WAVEfmt " + head
    data += b"data" + struct.pack("<I", len(body)) + body
    assert (await measurer.measure(AudioSource("audio/wav", len(data), data=data))).ms == 100


async def test_a_large_cover_image_does_not_make_audio_longer(measurer: Measurer) -> None:
    audio = corpus.make("flac")
    cover = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s5I", 13, b"IHDR", 9, 9, 0x08020000, 0, 0) + bytes(3_000_000)
    )
    image = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 9, 9, 24, 0, len(cover)) + cover
    data = audio[:42] + struct.pack(">I", 6 << 24 | len(image)) + image + audio[42:]
    measured = await measurer.measure(AudioSource("audio/flac", len(data), data=data))
    assert measured.ms == pytest.approx(1000 * corpus.SECONDS, rel=0.03)
