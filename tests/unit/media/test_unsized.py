"""A file that was written into a pipe has no sizes in its header, and is measured up to its end."""

from __future__ import annotations

import io
import struct

import av
import pytest

from pomelo.media import demux
from pomelo.media.unsized import with_size
from tests.unit.media import corpus

PIPED = ["wav", "rf64", "w64", "aiff", "au", "caf"]


class Pipe(io.RawIOBase):
    """A file that can't seek."""

    def __init__(self) -> None:
        self.written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        self.written += data
        return len(data)


def piped(name: str) -> bytes:
    """A file of a case as its muxer writes it into a pipe."""
    muxer, codec, options = corpus.CASES[name]
    pipe = Pipe()
    with (
        av.open(io.BytesIO(corpus.make(name)), "r") as source,
        av.open(pipe, "w", format=muxer, options=options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.audio[0])
        assert stream.codec_context.name == codec
        for packet in source.demux():
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    return bytes(pipe.written)


def measured(data: bytes) -> float:
    return demux.measure(io.BytesIO(data), len(data), False)[0] / 1000


@pytest.mark.parametrize("name", PIPED)
def test_a_file_that_was_written_into_a_pipe_is_measured(name: str) -> None:
    data = piped(name)
    assert measured(data) == pytest.approx(corpus.SECONDS, rel=0.03)
    assert measured(data[: len(data) // 2]) == pytest.approx(corpus.SECONDS / 2, rel=0.03)


@pytest.mark.parametrize("name", ["rf64", "w64", "aiff"])
def test_a_piped_file_is_as_long_as_the_same_file_with_sizes(name: str) -> None:
    assert measured(piped(name)) == measured(corpus.make(name))


@pytest.mark.parametrize("name", PIPED)
def test_a_file_with_sizes_is_not_changed(name: str) -> None:
    data = corpus.make(name)
    file = io.BytesIO(data)
    assert with_size(file, len(data)) is file
    assert file.tell() == 0


@pytest.mark.parametrize("name", ["rf64", "w64", "aiff"])
def test_every_read_of_a_piped_file_has_the_size(name: str) -> None:
    data = piped(name)[:300]
    file = with_size(io.BytesIO(data), len(data))
    whole = file.read()
    assert len(whole) == len(data)
    assert whole != data
    for count in (1, 3, 7):
        file.seek(0)
        assert b"".join(file.read(count) for _ in range(len(whole))) == whole
    for start in range(len(whole)):
        file.seek(start)
        assert file.read(5) == whole[start : start + 5]
    assert file.seek(-4, io.SEEK_END) == len(whole) - 4
    assert file.tell() == len(whole) - 4


@pytest.mark.parametrize(
    "data",
    [
        b"RF64" + b"\xff" * 4 + b"WAVEds64" + bytes(24),
        b"RF64" + b"\xff" * 4 + b"WAVEds64" + struct.pack("<I", 28) + bytes(28) + b"data",
        b"FORM" + bytes(4) + b"AIFF",
        b"FORM" + bytes(4) + b"AIFFCOMM" + b"\xff" * 4,
        b"FORM" + bytes(4) + b"AIFF" + b"JUNK\0\0\0\0" * 20_000 + b"SSND" + bytes(4),
        b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0" + bytes(24) + b"fmt " + bytes(20),
        b"",
    ],
)
def test_a_header_without_samples_is_not_changed(data: bytes) -> None:
    file = io.BytesIO(data)
    assert with_size(file, len(data)) is file
    assert measured(data) == 0


def test_the_missing_sizes_are_those_up_to_the_end_of_the_file() -> None:
    samples = bytes(range(50))
    junk = b"JUNK" + struct.pack("<I", 3) + b"abc\0"
    rf64 = (
        b"RF64\xff\xff\xff\xffWAVEds64" + struct.pack("<I", 28) + bytes(28) + junk + b"data\xff\xff\xff\xff"
    )
    sized = rf64[:28] + struct.pack("<Q", 50) + rf64[36:]
    assert contents(rf64 + samples) == sized + samples
    for byte in range(28, 36):  # any size is one
        given = bytearray(rf64)
        given[byte] = 1
        assert contents(bytes(given) + samples) == bytes(given) + samples

    name = b"NAME" + struct.pack(">I", 3) + b"abc\0"
    aiff = b"FORM\0\0\0\0AIFF" + name + b"SSND\0\0\0\0"
    sized = b"FORM" + struct.pack(">I", 4 + 12 + 8 + 50) + aiff[8:-4] + struct.pack(">I", 50)
    assert contents(aiff + samples) == sized + samples

    head = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0" + bytes(24)
    other = b"fmt " + bytes(12) + struct.pack("<Q", 29) + bytes(8)  # 24 + 5, and 3 bytes of padding
    data = b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0\x4f\x8e\xdb\x8a"
    for missing in (0, 24, 2**62, 2**64 - 1):
        w64 = head + other + data + struct.pack("<Q", missing)
        assert contents(w64 + samples) == head + other + data + struct.pack("<Q", 74) + samples
    for size in (25, 74, 2**62 - 1):
        w64 = head + other + data + struct.pack("<Q", size)
        assert contents(w64 + samples) == w64 + samples


def contents(data: bytes) -> bytes:
    return with_size(io.BytesIO(data), len(data)).read()


def test_the_size_of_a_file_above_4_gib_is_the_largest_that_its_header_has() -> None:
    aiff = b"FORM\0\0\0\0AIFFSSND\0\0\0\0"
    for size, sizes in ((2**32 + 8, (2**32 - 1, 2**32 - 12)), (2**33, (2**32 - 1, 2**32 - 1))):
        data = with_size(io.BytesIO(aiff), size).read()
        assert (data[4:8], data[16:20]) == tuple(struct.pack(">I", each) for each in sizes)
