"""Bare samples: their media types, the WAV header before them, and their byte order."""

from __future__ import annotations

import io
import struct

import pytest

from pomelo.media.audio import (
    Swapper,
    WavData,
    little_endian,
    sample_format,
    sample_type,
    wav_data,
    wav_header,
)
from pomelo.media.media_types import parse
from tests.unit.refusals import refused


@pytest.mark.parametrize(
    ("content_type", "encoding", "rate", "width"),
    [
        ("audio/pcm;rate=24000", 1, 24_000, 2),
        ("audio/l16;rate=8000", 1, 8000, 2),
        ("audio/x-alaw-basic", 6, 8000, 1),
        ("audio/basic", 7, 8000, 1),
    ],
)
def test_a_wav_header_describes_the_samples_after_it(
    content_type: str, encoding: int, rate: int, width: int
) -> None:
    header = wav_header(content_type, 1000)
    assert len(header) == 44
    assert struct.unpack("<4sI8sI", header[:20]) == (b"RIFF", 1036, b"WAVEfmt ", 16)
    assert struct.unpack("<HHIIHH", header[20:36]) == (encoding, 1, rate, rate * width, width, 8 * width)
    assert struct.unpack("<4sI", header[36:]) == (b"data", 1000)
    found = wav_data(io.BytesIO(header + bytes(1000)), 1044)
    assert found == WavData(44, 1000, rate * width, width)


def test_only_bare_samples_have_a_header() -> None:
    with pytest.raises(ValueError, match="not bare samples: audio/mpeg"):
        wav_header("audio/mpeg", 1000)


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        *[("audio/pcm;rate=8000", (8000, 2)), ("audio/l16;rate=999999", (999_999, 2))],
        *[
            (f"audio/pcm{rate}", (16_000, 2))
            for rate in ("", ";rate=", ";rate=0", ";rate=1000000", ";rate=x")
        ],
        *[("audio/basic", (8000, 1)), ("audio/x-alaw-basic", (8000, 1)), ("audio/mpeg", None)],
    ],
)
def test_samples_have_a_rate_and_a_size(content_type: str, expected: tuple[int, int] | None) -> None:
    assert sample_format(content_type) == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("audio/l24", r"audio/pcm \(16-bit little-endian\)"),
        ("audio/pcm;channels=2", "such as audio/pcm;rate=16000, or a file"),
        ("audio/pcm;rate=16000;rate=16000", "each parameter once"),
        ("audio/basic;channels=2", "such as audio/basic, or a file"),
        ("audio/pcm;bits=16", "one channel of samples"),
        ("audio/pcm;rate=11025", "a known rate: 8000, 16000"),
        ("audio/basic;rate=16000", "a known rate: 8000$"),
    ],
)
def test_samples_that_no_provider_takes_are_refused(name: str, message: str) -> None:
    with refused("invalid_parameter", "audio", message):
        sample_type(parse(name))


def test_swapped_samples_are_little_endian() -> None:
    assert little_endian("audio/l16;rate=8000") == "audio/pcm;rate=8000"
    assert little_endian("audio/l16") == "audio/pcm"
    for other in ("audio/basic", "audio/pcm;rate=8000", "audio/mpeg;x=audio/l16"):
        assert little_endian(other) == other
        swapper = Swapper(other)
        assert (swapper.size(7), swapper.swap(b"123")) == (7, b"123")


def test_the_samples_of_a_wav_file_are_found_behind_many_chunks() -> None:
    chunks = b"JUNK\0\0\0\0"
    end = b"data" + struct.pack("<I", 20) + bytes(20)
    assert wav_data(io.BytesIO(bytes(12) + chunks * 999 + end), 12 + 999 * 8 + 28) == WavData(
        12 + 1000 * 8, 20, 0, 0
    )
    assert wav_data(io.BytesIO(bytes(12) + chunks * 1000 + end), 12 + 1000 * 8 + 28) is None
    assert wav_data(io.BytesIO(bytes(12) + end[:7]), 19) is None
    assert wav_data(io.BytesIO(bytes(12) + end[:8]), 20) == WavData(20, 0, 0, 0)
    short = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16_000, 2, 16)
    assert wav_data(io.BytesIO(bytes(12) + short), 36) is None
    assert wav_data(io.BytesIO(bytes(12) + short + end), 64) == WavData(44, 20, 16_000, 2)
