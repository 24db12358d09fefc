"""The length of audio is measured in every common container, whatever the headers declare."""

from __future__ import annotations

import asyncio
import io
import os
import random
import struct
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from resource import RLIMIT_AS, RLIMIT_CORE, RLIMIT_FSIZE

import psutil
import pytest

from pomelo.media import audio as samples
from pomelo.media.audio import Swapper
from pomelo.media.content_types import sniff
from pomelo.media.demux import MAX_MEMORY
from pomelo.media.duration import Measured, Measurer
from pomelo.media.store import MediaStore
from pomelo.providers.base import AudioSource
from tests.unit.loop import iterations
from tests.unit.media import corpus
from tests.unit.media.built import id3
from tests.waiting import cancel, until

MISLABELLED: dict[str, Callable[[], bytes]] = {
    "mp3 after a tag": lambda: id3(30_000) + corpus.make("mp3"),
    "adts after a tag": lambda: id3(30_000) + corpus.make("adts"),
    "flac after a tag": lambda: id3(12_000) + corpus.make("flac"),
    "mp3 after two zero bytes": lambda: b"\0\0" + corpus.make("mp3"),
    "m4a after a free atom": lambda: struct.pack(">I4s", 800, b"free") + bytes(792) + corpus.make("m4a"),
}


async def measure(measurer: Measurer, data: bytes, content_type: str = "") -> Measured:
    return await measurer.measure(AudioSource(sniff(content_type, data[:16]), len(data), data=data))


@pytest.mark.parametrize("name", corpus.CASES)
async def test_the_length_of_every_container_in_use_is_within_3_percent(
    measurer: Measurer, tmp_path: Path, name: str
) -> None:
    data = corpus.make(name)
    expected = pytest.approx(1000 * corpus.SECONDS, rel=0.03)
    assert (await measure(measurer, data)).ms == expected
    path = tmp_path / "file"
    path.write_bytes(data)
    assert (await measurer.measure(AudioSource("", len(data), path=path))).ms == expected


@pytest.mark.parametrize("extension", ["bin", "png", "jpg", "mp3", "ulaw"])
@pytest.mark.parametrize("name", ["ac3", "mp2", "mpeg program stream", "latm", "caf before another chunk"])
async def test_a_file_is_as_long_as_the_same_bytes_in_memory(
    measurer: Measurer, tmp_path: Path, name: str, extension: str
) -> None:
    if name in corpus.CASES:
        data = corpus.make(name)
    else:  # whose size is larger than any file can be
        data = corpus.make("caf") + b"next" + struct.pack(">Q", 2**60)
    path = tmp_path / f"audio.{extension}"
    path.write_bytes(data)
    measured = await measure(measurer, data)
    assert measured.ms > 0
    assert await measurer.measure(AudioSource(sniff("", data[:16]), len(data), path=path)) == measured


@pytest.mark.parametrize(
    "name", ["mp3", "wav", "flac", "ogg opus", "webm opus", "adts", "fragmented mp4", "mpeg-ts"]
)
async def test_a_truncated_file_has_the_length_of_the_rest(measurer: Measurer, name: str) -> None:
    data = corpus.make(name)
    half = (await measure(measurer, data[: len(data) // 2])).ms
    # An incomplete Ogg page is lost: one second here.
    assert 300 * corpus.SECONDS < half < 550 * corpus.SECONDS


@pytest.mark.parametrize(
    "content_type", ["audio/pcm;rate=48000", "audio/basic", "audio/pcm", "audio/L16;rate=8000;channels=1"]
)
@pytest.mark.parametrize("name", [*corpus.CASES, *MISLABELLED])
async def test_the_bytes_override_the_content_type(measurer: Measurer, content_type: str, name: str) -> None:
    data = MISLABELLED[name]() if name in MISLABELLED else corpus.make(name)
    measured = await measure(measurer, data, content_type)
    assert measured.ms == pytest.approx(1000 * corpus.SECONDS, rel=0.03)
    assert samples.sample_format(measured.content_type) is None


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("mp3", "audio/mpeg"),
        ("flac", "audio/flac"),
        ("ogg opus", "audio/ogg"),
        ("m4a", "audio/mp4"),
        ("webm opus", "audio/webm"),
        ("rf64", "audio/wav"),
        ("adts", "audio/aac"),
        ("aiff", "audio/aiff"),
        ("asf", "video/x-ms-wmv"),
        ("avi", "video/x-msvideo"),
        ("flv", "video/x-flv"),
        ("mpeg program stream", "video/mpeg"),
        ("mpeg-ts", "video/mpeg"),
        ("caf", "application/octet-stream"),
    ],
)
@pytest.mark.parametrize("declared", ["", "audio/mpeg", "audio/wav", "audio/x-m4a", "video/mp4"])
@pytest.mark.parametrize("tag_bytes", [0, 12_000])
async def test_the_content_type_is_that_of_the_bytes_after_a_tag(
    measurer: Measurer, name: str, content_type: str, declared: str, tag_bytes: int
) -> None:
    data = corpus.make(name)
    if tag_bytes and name in ("mp3", "flac", "ogg opus", "adts"):
        data = id3(tag_bytes) + data
    assert (await measure(measurer, data, declared)).content_type == content_type


async def test_a_large_tag_before_short_audio_is_not_counted_as_samples(measurer: Measurer) -> None:
    data = id3(65_526) + corpus.mp3(0.2)
    assert await measure(measurer, data, "audio/pcm;rate=48000") == Measured(209, "audio/mpeg")


async def test_declared_samples_that_may_be_frames_have_the_longer_of_both_lengths(
    measurer: Measurer,
) -> None:
    # The zeros after the frames may just as well be silence.
    data = corpus.make("adts") + bytes(9_000)
    measured = await measure(measurer, data, "audio/pcm;rate=48000")
    assert measured.ms == pytest.approx(1000 * corpus.SECONDS, rel=0.03)
    assert measured.content_type == "audio/pcm;rate=48000"
    measured = await measure(measurer, data, "audio/basic")
    assert measured == Measured(-(-len(data) // 8), "audio/basic")


async def test_declared_samples_that_look_like_frames_which_cannot_be_decoded_are_samples(
    measurer: Measurer,
) -> None:
    data = (b"\x56\xe0\x10" + bytes(16)) * 500  # a tone of this period; to a demuxer, LATM
    assert await measure(measurer, data, "audio/pcm;rate=24000") == Measured(198, "audio/pcm;rate=24000")


async def test_a_recording_in_a_law_is_not_measured_longer_because_it_begins_with_silence(
    measurer: Measurer,
) -> None:
    data = b"\xd5" * 8_000 + bytes(range(0x80, 0xC0)) * 8_000  # silence in A-law is frames of GSM, too
    assert await measure(measurer, data, "audio/PCMA") == Measured(65_000, "audio/x-alaw-basic")


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A file that a demuxer never finishes to read."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def demuxers() -> list[psutil.Process]:
    """The processes that measure audio for this one, in the order in which they were started."""
    # Not in the order of their ids, which begin again at some time.
    children = sorted(psutil.Process().children(), key=psutil.Process.create_time)
    return [child for child in children if "pomelo.media.demux" in " ".join(child.cmdline())]


async def test_the_process_that_reads_audio_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POMELO_SECRET", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GROQ_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    before = demuxers()
    async with aclosing(Measurer(workers=1, timeout=20)) as measurer:
        assert (
            await measurer.measure(
                AudioSource("audio/mpeg", len(corpus.mp3(1)), data=corpus.mp3(1)), "acme", "r"
            )
        ).ms
        (process,) = [one for one in demuxers() if one not in before]
        assert "hunter2" not in process.environ().values()


async def test_no_file_of_the_current_folder_replaces_a_module_of_the_process_that_reads_audio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("av.py", "resource.py"):
        (tmp_path / name).write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    async with aclosing(Measurer(workers=1, timeout=20)) as measurer:
        assert (await measure(measurer, corpus.mp3(1))).ms


async def test_declared_samples_are_not_cheaper_if_the_demuxer_fails(
    fifo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with aclosing(Measurer(workers=1, timeout=0.3)) as measurer:
        source = AudioSource("audio/pcm;rate=48000", 9_000, path=fifo)
        assert await measurer.measure(source, "acme", "req_1") == Measured(0, "audio/pcm;rate=48000")
    (line,) = caplog.records
    assert line.__dict__["fields"] == {"request_id": "req_1"}


APE_HEAD = b"APETAGEX" + struct.pack("<IIII", 2000, 500_032, 1, 0xA0000000)


@pytest.mark.parametrize(
    ("data", "seconds"),
    [
        (corpus.wav(6, per_second=0xFFFFFFFF), 6),
        (corpus.wav(6, per_second=1), 6),
        (corpus.wav(6, per_second=0), 6),
        (corpus.wav(6, data=0xFFFFFFFF), 6),
        (corpus.wav(6, data=0), 6),
        (corpus.mp3(26) + APE_HEAD + bytes(500_016), 26),
        (corpus.mp3(26) + b"TAG" + bytes(125), 26),
        (id3(16_374) + corpus.mp3(26), 26),
    ],
)
async def test_a_header_or_a_tag_does_not_change_the_length(
    measurer: Measurer, data: bytes, seconds: float
) -> None:
    assert (await measure(measurer, data)).ms == pytest.approx(1000 * seconds, rel=0.02, abs=60)


async def test_a_xing_header_is_not_trusted(measurer: Measurer) -> None:
    for frames in (1, 10**8):
        head = bytearray(corpus.FRAME)
        head[36:52] = b"Xing" + struct.pack(">III", 3, frames, 417_000)
        assert (await measure(measurer, bytes(head) + corpus.mp3(26))).ms == pytest.approx(26_000, rel=0.01)


@pytest.mark.parametrize("name", ["ogg opus", "ogg vorbis"])
async def test_chained_streams_are_added_up(measurer: Measurer, name: str) -> None:
    data = corpus.make(name) * 3
    assert (await measure(measurer, data)).ms == pytest.approx(3000 * corpus.SECONDS, rel=0.03)


@pytest.mark.parametrize(
    "data", [b"", b"x", bytes(100_000), random.Random(1).randbytes(300_000), b"text " * 9_000]
)
async def test_data_without_audio_cannot_be_measured(measurer: Measurer, data: bytes) -> None:
    assert (await measure(measurer, data)).ms == 0


@pytest.mark.parametrize(
    ("content_type", "ms"),
    [
        *[("audio/pcm", 2000), ("audio/pcm;rate=16000", 2000), ("audio/pcm; channels=1; rate=16000", 2000)],
        *[("Audio/PCM;rate=16000;channels=1", 2000), ("audio/L16;rate=16000;channels=1", 2000)],
        *[("audio/pcm;rate=8000", 4000), ("audio/basic", 8000), ("audio/x-alaw-basic", 8000)],
    ],
)
async def test_bare_samples_are_measured_by_their_type(
    measurer: Measurer, content_type: str, ms: int
) -> None:
    assert (await measure(measurer, bytes(64_000), content_type)).ms == ms
    # Samples that begin like an MP3 frame are still read as bare samples.
    noise = b"\xff\xfb" + random.Random(2).randbytes(63_998)
    assert await measure(measurer, noise, content_type) == Measured(ms, sniff(content_type, b""))


async def test_a_demuxer_that_hangs_or_dies_is_replaced(fifo: Path) -> None:
    data, before = corpus.mp3(5), demuxers()
    async with aclosing(Measurer(workers=1, timeout=0.3)) as measurer:
        assert (await measurer.measure(AudioSource("", 9, path=fifo))).ms == 0
        assert demuxers() == before
        assert (await measure(measurer, data)).ms == pytest.approx(5000, rel=0.02)
        demuxer = demuxers()[-1]
        demuxer.kill()
        demuxer.wait(5)
        assert (await measure(measurer, data)).ms in (0, pytest.approx(5000, rel=0.02))
        assert (await measure(measurer, data)).ms == pytest.approx(5000, rel=0.02)


async def test_a_demuxer_that_does_not_start_in_time_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomelo.media.duration.START_TIMEOUT", 0.0)
    before = demuxers()
    async with aclosing(Measurer(workers=1, timeout=5.0)) as measurer:
        assert (await measure(measurer, corpus.mp3(1))).ms == 0
        assert demuxers() == before


async def test_a_demuxer_whose_caller_leaves_while_it_starts_is_ended() -> None:
    before = demuxers()
    async with aclosing(Measurer(workers=1, timeout=5.0)) as measurer:
        measuring = asyncio.create_task(measure(measurer, corpus.mp3(1)))
        await until(lambda: demuxers() != before)
        await iterations(50)  # until its first line is awaited
        await cancel(measuring)
        assert demuxers() == before


async def test_idle_demuxers_end_with_their_measurer() -> None:
    before = demuxers()
    measurer = Measurer(workers=1, timeout=5.0)
    await measure(measurer, corpus.mp3(1))
    assert len(demuxers()) == len(before) + 1
    await measurer.aclose()
    assert demuxers() == before


async def test_a_demuxer_is_limited() -> None:
    async with aclosing(Measurer(workers=1, timeout=5.0)) as measurer:
        await measure(measurer, corpus.mp3(1))
        demuxer = demuxers()[-1]
        assert os.getsid(demuxer.pid) == demuxer.pid, (
            "a Ctrl-C in the terminal would end it before its server"
        )
        assert demuxer.nice() == min(os.nice(0) + 5, 19)
        limits = {name: demuxer.rlimit(name) for name in (RLIMIT_AS, RLIMIT_FSIZE, RLIMIT_CORE)}
        assert limits == {RLIMIT_AS: (MAX_MEMORY, MAX_MEMORY), RLIMIT_FSIZE: (0, 0), RLIMIT_CORE: (0, 0)}


async def test_a_demuxer_that_died_while_it_was_idle_is_not_asked() -> None:
    data = corpus.mp3(5)
    async with aclosing(Measurer(workers=1, timeout=5.0)) as measurer:
        await measure(measurer, data)
        demuxers()[-1].kill()
        await until(lambda: not measurer._idle[0].alive)
        assert (await measure(measurer, data)).ms == pytest.approx(5000, rel=0.02)


async def test_a_demuxer_ends_after_its_last_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomelo.media.duration._MAX_FILES_PER_WORKER", 2)
    before = demuxers()
    async with aclosing(Measurer(workers=1, timeout=5.0)) as measurer:
        for number in range(4):
            assert (await measure(measurer, corpus.mp3(1))).ms == pytest.approx(1000, rel=0.05)
            assert len(demuxers()) - len(before) == (number + 1) % 2


async def test_slow_audio_of_an_account_does_not_delay_other_accounts(fifo: Path) -> None:
    async with aclosing(Measurer(workers=2, timeout=1.0)) as measurer:
        await measure(measurer, corpus.mp3(1))
        source = AudioSource("", 9, path=fifo)
        slow = [asyncio.ensure_future(measurer.measure(source, "slow")) for _ in range(5)]
        await asyncio.sleep(0)
        began = time.monotonic()
        data = corpus.mp3(5)
        measured = await measurer.measure(AudioSource("audio/mpeg", len(data), data=data), "other")
        assert measured.ms == pytest.approx(5000, rel=0.02)
        assert sum(task.done() for task in slow) <= 1, time.monotonic() - began
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


@pytest.mark.parametrize(
    ("channels", "declared", "length", "found"),
    [(2, 7, 40, 40), (2, 7, 4_000_000_000, 60), (0, 7, 40, 40)],
)
def test_the_samples_of_a_wav_file_are_found_after_chunks_of_any_length(
    channels: int, declared: int, length: int, found: int
) -> None:
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 0, b"WAVE", b"fmt ", 16, 1, channels, 100, declared, 4, 16)
    file = head + struct.pack("<4sI4s", b"LIST", 3, b"abc") + struct.pack("<4sI", b"data", length) + bytes(60)
    wav = samples.wav_data(io.BytesIO(file), len(file))
    assert wav == samples.WavData(len(file) - 60, found, 400 if channels else declared, 2)


def test_big_endian_samples_are_swapped_in_chunks_of_any_size() -> None:
    data = random.Random(3).randbytes(10_001)
    expected = b"".join(data[i + 1 : i + 2] + data[i : i + 1] for i in range(0, 10_000, 2))
    for size in (1, 2, 3, 777, 20_000):
        swapper = Swapper("audio/l16;rate=16000")
        swapped = b"".join(swapper.swap(data[at : at + size]) for at in range(0, len(data), size))
        assert swapped == expected
        assert swapper.size(len(data)) == len(expected)


def test_big_endian_samples_are_stored_unchanged(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, b"s" * 32)
    with store.writer("ann", "audio/L16; rate=16000") as writer:
        writer.write(b"\0\1" * 100)
        media = writer.commit()
    assert media.content_type == store.find(media.id, "ann")[1].content_type == "audio/l16;rate=16000"
    assert (tmp_path / media.id).read_bytes() == b"\0\1" * 100
