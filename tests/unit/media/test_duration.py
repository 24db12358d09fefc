"""The length of audio is measured in every common container, whatever the headers claim."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from pomelo.errors import PomeloError
from pomelo.media import audio as samples
from pomelo.media.audio import Swapper
from pomelo.media.duration import Measured, Measurer
from pomelo.media.store import MediaStore, sniff
from pomelo.providers.base import AudioSource
from tests.unit.media import corpus


@pytest.fixture(scope="module")
async def measurer() -> AsyncIterator[Measurer]:
    """A measurer whose processes are shared by these tests."""
    made = Measurer()
    yield made
    await made.aclose()


def tagged(data: bytes, size: int) -> bytes:
    """A file behind an ID3 tag of so many bytes."""
    length = bytes(size - 10 >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + length + bytes(size - 10) + data


MISLABELLED: dict[str, Callable[[], bytes]] = {
    "mp3 behind a tag": lambda: tagged(corpus.make("mp3"), 30_000),
    "adts behind a tag": lambda: tagged(corpus.make("adts"), 30_000),
    "flac behind a tag": lambda: tagged(corpus.make("flac"), 12_000),
    "mp3 behind two zero bytes": lambda: b"\0\0" + corpus.make("mp3"),
    "m4a behind a free atom": lambda: struct.pack(">I4s", 800, b"free") + bytes(792) + corpus.make("m4a"),
}


async def measure(measurer: Measurer, data: bytes, named: str = "") -> Measured:
    """Measures inline audio with a content type."""
    return await measurer.measure(AudioSource(sniff(named, data[:16]), len(data), data=data))


@pytest.mark.parametrize("name", corpus.CASES)
async def test_the_length_of_every_container_in_use_is_within_3_percent(
    measurer: Measurer, tmp_path: Path, name: str
) -> None:
    data = corpus.make(name)
    wanted = pytest.approx(1000 * corpus.SECONDS, rel=0.03)
    assert (await measure(measurer, data)).ms == wanted
    path = tmp_path / "file"
    path.write_bytes(data)
    assert (await measurer.measure(AudioSource("", len(data), path=path))).ms == wanted


@pytest.mark.parametrize(
    "name", ["mp3", "wav", "flac", "ogg opus", "webm opus", "adts", "fragmented mp4", "mpeg-ts"]
)
async def test_a_cut_file_has_the_length_of_what_is_left(measurer: Measurer, name: str) -> None:
    data = corpus.make(name)
    half = (await measure(measurer, data[: len(data) // 2])).ms
    # An incomplete Ogg page is lost: one second here.
    assert 300 * corpus.SECONDS < half < 550 * corpus.SECONDS


@pytest.mark.parametrize(
    "named", ["audio/pcm;rate=48000", "audio/basic", "audio/pcm", "audio/L16;rate=8000;channels=1"]
)
@pytest.mark.parametrize("name", [*corpus.CASES, *MISLABELLED])
async def test_the_bytes_outweigh_the_content_type(measurer: Measurer, named: str, name: str) -> None:
    data = MISLABELLED[name]() if name in MISLABELLED else corpus.make(name)
    measured = await measure(measurer, data, named)
    assert measured.ms == pytest.approx(1000 * corpus.SECONDS, rel=0.03)
    assert samples.raw(measured.content_type) is None


async def test_a_large_tag_before_a_short_sound_is_not_counted_as_samples(measurer: Measurer) -> None:
    data = b"ID3\4\0\0\0\3\x7f\x76" + bytes(65_526) + corpus.mp3(0.2)
    assert await measure(measurer, data, "audio/pcm;rate=48000") == Measured(209, "audio/mpeg")


async def test_labelled_bytes_that_may_be_frames_are_as_long_as_the_longer_reading(
    measurer: Measurer,
) -> None:
    # The tag of zeros behind the frames may just as well be silence.
    data = corpus.make("adts") + bytes(9_000)
    measured = await measure(measurer, data, "audio/pcm;rate=48000")
    assert measured.ms == pytest.approx(1000 * corpus.SECONDS, rel=0.03)
    assert measured.content_type == "audio/pcm;rate=48000"
    measured = await measure(measurer, data, "audio/basic")
    assert measured == Measured(-(-len(data) // 8), "audio/basic")


async def test_labelled_bytes_are_not_cheaper_where_the_demuxer_fails(tmp_path: Path) -> None:
    measurer = Measurer(workers=1, timeout=0.3)
    try:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        source = AudioSource("audio/pcm;rate=48000", 9_000, path=fifo)
        assert await measurer.measure(source) == Measured(0, "audio/pcm;rate=48000")
    finally:
        await measurer.aclose()


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (corpus.wav(6, per_second=0xFFFFFFFF), 6),
        (corpus.wav(6, per_second=1), 6),
        (corpus.wav(6, per_second=0), 6),
        (corpus.wav(6, data=0xFFFFFFFF), 6),
        (corpus.wav(6, data=0), 6),
        (
            corpus.mp3(26)
            + b"APETAGEX"
            + struct.pack("<IIII", 2000, 500_032, 1, 0xA0000000)
            + bytes(500_016),
            26,
        ),
        (corpus.mp3(26) + b"TAG" + bytes(125), 26),
        (b"ID3\4\0\0\0\0\x7f\x76" + bytes(16_374) + corpus.mp3(26), 26),
    ],
)
async def test_claims_of_a_header_or_a_tag_change_nothing(
    measurer: Measurer, data: bytes, seconds: float
) -> None:
    assert (await measure(measurer, data)).ms == pytest.approx(1000 * seconds, rel=0.02, abs=60)


async def test_a_xing_header_is_not_trusted(measurer: Measurer) -> None:
    for frames in (1, 10**8):
        head = bytearray(corpus.FRAME)
        head[36:52] = b"Xing" + struct.pack(">III", 3, frames, 417_000)
        assert (await measure(measurer, bytes(head) + corpus.mp3(26))).ms == pytest.approx(26_000, rel=0.01)


async def test_chained_streams_are_added_up(measurer: Measurer) -> None:
    for name in ("ogg opus", "ogg vorbis"):
        data = corpus.make(name)
        assert (await measure(measurer, data * 3)).ms == pytest.approx(3000 * corpus.SECONDS, rel=0.03), name


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(100_000), random.Random(1).randbytes(300_000), b"text " * 9_000]
)
async def test_data_without_audio_cannot_be_measured(measurer: Measurer, data: bytes) -> None:
    assert (await measure(measurer, data)).ms == 0


@pytest.mark.parametrize(
    ("named", "ms"),
    [
        ("audio/pcm", 2000),
        ("audio/pcm;rate=16000", 2000),
        ("audio/pcm; channels=1; rate=16000", 2000),
        ("Audio/PCM;rate=16000;channels=1", 2000),
        ("audio/pcm;rate=8000", 4000),
        ("audio/basic", 8000),
        ("audio/L16;rate=16000;channels=1", 2000),
        ("audio/x-alaw-basic", 8000),
    ],
)
async def test_bare_samples_are_counted_by_their_type(measurer: Measurer, named: str, ms: int) -> None:
    assert (await measure(measurer, bytes(64_000), named)).ms == ms
    # Samples that begin like an MP3 frame are still read as bare samples.
    noise = b"\xff\xfb" + random.Random(2).randbytes(63_998)
    assert await measure(measurer, noise, named) == Measured(ms, sniff(named, b""))


@pytest.mark.parametrize(
    "named",
    [
        "audio/L16;rate=11025",
        "audio/pcm;channels=2",
        "audio/pcm;rate=7",
        "audio/pcm;endian=big",
        "audio/pcm;rate",
    ],
)
def test_bare_samples_that_no_provider_takes_are_refused(named: str) -> None:
    with pytest.raises(PomeloError) as caught:
        sniff(named, bytes(16))
    assert (caught.value.code, caught.value.field) == ("invalid_parameter", "audio")


async def test_a_demuxer_that_hangs_or_dies_is_replaced(tmp_path: Path) -> None:
    measurer = Measurer(workers=1, timeout=0.3)
    try:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        assert (await measurer.measure(AudioSource("", 9, path=fifo))).ms == 0
        assert (await measure(measurer, corpus.mp3(5))).ms == pytest.approx(5000, rel=0.02)
        (worker,) = [p for p in psutil.Process().children() if "pomelo.media.demux" in " ".join(p.cmdline())][
            -1:
        ]
        worker.kill()
        worker.wait(5)
        assert (await measure(measurer, corpus.mp3(5))).ms in (0, pytest.approx(5000, rel=0.02))
        assert (await measure(measurer, corpus.mp3(5))).ms == pytest.approx(5000, rel=0.02)
    finally:
        await measurer.aclose()


async def test_an_account_with_slow_audio_keeps_no_other_waiting(tmp_path: Path) -> None:
    measurer = Measurer(workers=2, timeout=1.0)
    try:
        await measure(measurer, corpus.mp3(1))
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        slow = [
            asyncio.ensure_future(measurer.measure(AudioSource("", 9, path=fifo), "slow")) for _ in range(5)
        ]
        await asyncio.sleep(0)
        began = time.monotonic()
        data = corpus.mp3(5)
        measured = await measurer.measure(AudioSource("audio/mpeg", len(data), data=data), "other")
        assert measured.ms == pytest.approx(5000, rel=0.02)
        assert sum(task.done() for task in slow) <= 1, time.monotonic() - began
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    finally:
        await measurer.aclose()


def test_big_endian_samples_are_swapped_whatever_the_pieces() -> None:
    data = random.Random(3).randbytes(10_001)
    swapped = b"".join(data[i + 1 : i + 2] + data[i : i + 1] for i in range(0, 10_000, 2))
    for size in (1, 2, 3, 777, 20_000):
        swapper = Swapper("audio/l16;rate=16000")
        got = b"".join(swapper.swap(data[at : at + size]) for at in range(0, len(data), size))
        assert got == swapped
        assert swapper.size(len(data)) == len(swapped)


def test_big_endian_samples_are_kept_as_they_are_sent(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, b"s" * 32)
    with store.writer("ann", "audio/L16; rate=16000") as writer:
        writer.write(b"\0\1" * 100)
        media = writer.commit()
    assert media.content_type == store.find(media.media_id, "ann")[1].content_type == "audio/l16;rate=16000"
    assert (tmp_path / media.media_id).read_bytes() == b"\0\1" * 100
