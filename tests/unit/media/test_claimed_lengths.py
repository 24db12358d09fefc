"""Whatever length a file claims to have, it is held and billed for no less than it is."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pomelo.catalog.catalog import Catalog
from pomelo.media.duration import Measurer
from pomelo.media.store import sniff
from pomelo.providers.base import AudioSource
from pomelo.tasks.base import AudioInfo
from tests.unit.media import corpus

Claim = tuple[str, Callable[[bytes], int], str]
"""A file of the corpus, where its claim is, and how that is packed."""


def after(mark: bytes, offset: int = 0, which: int = 0) -> Callable[[bytes], int]:
    """Finds the place so many bytes behind a mark; `which` counts the marks, -1 for the last."""

    def find(data: bytes) -> int:
        if which < 0:
            return data.rindex(mark) + len(mark) + offset
        place = -1
        for _ in range(which + 1):
            place = data.index(mark, place + 1)
        return place + len(mark) + offset

    return find


CLAIMS: dict[str, Claim] = {
    "the size of a WAV": ("wav", after(b"RIFF"), "<I"),
    "the byte rate of a WAV": ("wav", after(b"fmt ", 12), "<I"),
    "the data size of a WAV": ("wav", after(b"data"), "<I"),
    "the byte rate of ADPCM": ("wav of ima adpcm", after(b"fmt ", 12), "<I"),
    "the samples of ADPCM": ("wav of ima adpcm", after(b"fact", 4), "<I"),
    "the data size of ADPCM": ("wav of ms adpcm", after(b"data"), "<I"),
    "the data size of an RF64": ("rf64", after(b"ds64", 12), "<Q"),
    "the samples of an RF64": ("rf64", after(b"ds64", 20), "<Q"),
    "the frames of an AIFF": ("aiff", after(b"COMM", 6), ">I"),
    "the size of an AU": ("au", after(b".snd", 4), ">I"),
    "the samples of a FLAC": ("flac", after(b"fLaC", 4 + 14), ">I"),
    "the frames of an MP3": ("mp3", after(b"Info", 4), ">I"),
    "the bytes of an MP3": ("mp3", after(b"Info", 8), ">I"),
    "the movie of an M4A": ("m4a", after(b"mvhd", 16), ">I"),
    "the track of an M4A": ("m4a", after(b"tkhd", 20), ">I"),
    "the medium of an M4A": ("m4a", after(b"mdhd", 16), ">I"),
    "the edit of an M4A": ("m4a", after(b"elst", 8), ">I"),
    "the movie of a fragmented MP4": ("fragmented mp4", after(b"mvhd", 16), ">I"),
    "the movie of ALAC": ("m4a of alac", after(b"mdhd", 16), ">I"),
    "the last page of Opus": ("ogg opus", after(b"OggS", 2, -1), "<q"),
    "the first page of sound of Opus": ("ogg opus", after(b"OggS", 2, 2), "<q"),
    "the last page of Vorbis": ("ogg vorbis", after(b"OggS", 2, -1), "<q"),
    "the duration of WebM": ("webm opus", after(b"\x44\x89\x88"), ">d"),
    "the duration of Matroska": ("matroska aac", after(b"\x44\x89\x88"), ">d"),
    "the samples of TTA": ("tta", after(b"TTA1", 10), "<I"),
    "the samples of WavPack": ("wavpack", after(b"wvpk", 8), "<I"),
    "the packets of CAF": ("caf of alac", after(b"pakt", 8), ">q"),
    "the frames of CAF": ("caf of alac", after(b"pakt", 16), ">q"),
    "the duration of FLV": ("flv", after(b"duration", 1), ">d"),
    "the length of AVI": ("avi", after(b"auds", 28), "<I"),
}

SECONDS = 30.0
STT = Catalog.load().resolve("eleven-labs-stt")


@pytest.fixture(scope="module")
async def measurer() -> AsyncIterator[Measurer]:
    """A measurer whose processes are shared by these tests."""
    made = Measurer()
    yield made
    await made.aclose()


def packed(form: str, value: int) -> bytes:
    """A claim's bytes; a value that is too large for them is cut."""
    if form.endswith("d"):
        return struct.pack(form, float(value % 10**12))
    size = struct.calcsize(form)
    order = "little" if form[0] == "<" else "big"
    return (value % 2 ** (8 * size)).to_bytes(size, order)


@pytest.mark.parametrize("claim", CLAIMS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(value=0, label="")
@example(value=7, label="")
@example(value=1085, label="")
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
async def test_a_claim_never_makes_a_file_shorter_than_it_is(
    measurer: Measurer, claim: str, value: int, label: str
) -> None:
    name, find, form = CLAIMS[claim]
    data = bytearray(corpus.make(name, SECONDS))
    place = find(bytes(data))
    patch = packed(form, value)
    data[place : place + len(patch)] = patch
    kind = sniff(label, bytes(data[:16]))
    measured = await measurer.measure(AudioSource(kind, len(data), data=bytes(data)))
    held = AudioInfo(len(data), measured.ms).most(STT) / 1000
    assert held >= 0.92 * SECONDS, (claim, value, label, measured)


async def test_a_large_cover_makes_no_sound_longer(measurer: Measurer) -> None:
    sound = corpus.make("flac")
    cover = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s5I", 13, b"IHDR", 9, 9, 0x08020000, 0, 0) + bytes(3_000_000)
    )
    picture = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 9, 9, 24, 0, len(cover)) + cover
    data = sound[:42] + struct.pack(">I", 6 << 24 | len(picture)) + picture + sound[42:]
    measured = await measurer.measure(AudioSource("audio/flac", len(data), data=data))
    assert measured.ms == pytest.approx(1000 * corpus.SECONDS, rel=0.03)
