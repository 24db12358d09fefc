"""An MP4 file that plays the same bytes repeatedly is as long as what it plays, or too long for every limit."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import av
import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.media import demux
from pomelo.tasks.base import AudioInfo
from tests.unit.media import corpus

MODELS = Catalog.load().by_any_name


def measured(data: bytes) -> int:
    return demux.measure(io.BytesIO(data), len(data), raw=False)[0]


def played(data: bytes) -> float:
    """The seconds that FFmpeg decodes."""
    with av.open(io.BytesIO(data), "r") as container:
        frames: Iterator[Any] = container.decode(audio=0)
        return sum((float(frame.samples / frame.sample_rate) for frame in frames), 0.0)


def extended(data: bytearray, at: int, addition: bytes, *boxes: bytes) -> bytes:
    """A file with bytes added to these nested boxes, from the innermost to the outermost."""
    data[at:at] = addition
    for box in boxes:
        start = data.index(box) - 4
        size = int.from_bytes(data[start : start + 4], "big")
        data[start : start + 4] = struct.pack(">I", size + len(addition))
    return bytes(data)


def with_edits(times: int) -> bytes:
    """Six seconds of AAC that an edit list plays this often."""
    data = bytearray(corpus.make("m4a", silent=True))
    at = data.index(b"elst") + 8
    data[at : at + 4] = struct.pack(">I", times)
    edit = bytes(data[at + 4 : at + 16])
    return extended(data, at + 16, edit * (times - 1), b"elst", b"edts", b"trak", b"moov")


def with_chunks(times: int) -> bytes:
    """Six seconds of A-law that are this many chunks of a track."""
    data = bytearray(corpus.make("mov of a-law", silent=True))
    samples = int(corpus.SECONDS * corpus.RATE)
    for table, offset, value in (
        (b"stts", 12, samples * times),
        (b"stsz", 12, samples * times),
        (b"stco", 8, times),
    ):
        at = data.index(table) + offset
        data[at : at + 4] = struct.pack(">I", value)
    data = data.replace(b"edts", b"free")
    at = data.index(b"stco") + 12
    position = bytes(data[at : at + 4])
    return extended(
        data, at + 4, position * (times - 1), b"stco", b"stbl", b"minf", b"mdia", b"trak", b"moov"
    )


@pytest.mark.parametrize("repeated", [with_edits, with_chunks])
@pytest.mark.parametrize("times", [1, 2, 20])
def test_repetitions_are_counted(repeated: Callable[[int], bytes], times: int) -> None:
    data = repeated(times)
    assert played(data) == pytest.approx(times * corpus.SECONDS, rel=0.02)
    assert measured(data) == pytest.approx(1000 * played(data), rel=0.02)


@pytest.mark.parametrize("repeated", [with_edits, with_chunks])
def test_a_small_file_that_plays_for_hours_is_refused_before_its_packets_are_read(
    repeated: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = repeated(1)
    few = demux._packets
    monkeypatch.setattr(demux, "_packets", lambda *given: islice(few(*given), 1_000))
    assert measured(data) == pytest.approx(1000 * corpus.SECONDS, rel=0.02)  # it has fewer packets
    data = repeated(5_000)
    ms = measured(data)
    for model in ("eleven-labs-sts", "eleven-labs-stt"):
        assert AudioInfo(len(data), ms).exceeds(MODELS[model])


def test_a_long_file_without_repetitions_is_counted_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demux, "_MAX_REPEATED", 10)
    for name in ("m4a", "mov of a-law", "mp3", "ogg opus", "mpeg-ts", "avi"):
        assert measured(corpus.make(name)) == pytest.approx(1000 * corpus.SECONDS, rel=0.03)


def test_a_long_file_that_is_truncated_is_as_long_as_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demux, "_MAX_REPEATED", 10)
    data = corpus.make("fragmented mp4")
    assert measured(data[: len(data) // 2]) == pytest.approx(500 * corpus.SECONDS, rel=0.05)


def test_fragments_that_refer_to_the_same_bytes_are_not_counted_to_their_end() -> None:
    data = corpus.make("fragmented mp4")
    start = data.index(b"moof") - 4
    # It has the absolute position of its samples.
    fragment = data[start : start + int.from_bytes(data[start : start + 4], "big")]
    ms = measured(data)
    assert measured(data + fragment * 10) == pytest.approx(11 * ms, rel=0.05)
    data += fragment * 150
    assert AudioInfo(len(data), measured(data)).exceeds(MODELS["eleven-labs-stt"])
