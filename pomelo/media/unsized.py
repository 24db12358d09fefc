"""Gives audio that was written into a pipe its size, which the writer could not go back to fill in.

The demuxer refuses an RF64, W64 or AIFF file whose header has no size for its samples. WAV, AU and CAF files
without one are read to their end by the demuxer itself.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

from pomelo.media.containers import ReadOnlyFile

_MAX_CHUNKS = 1000
_MAX_PATCH = 64 * 1024
"""Bytes of the chunks before the samples of an AIFF file, which the patch repeats."""

_RF64 = (b"RF64", b"BW64")
_AIFF = (b"AIFF", b"AIFC")
_W64_FILE = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0"
_W64_DATA = b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0\x4f\x8e\xdb\x8a"
_W64_HEADER = 24
"""Bytes of a W64 chunk's GUID and size; the size includes them."""


class _PatchedFile(ReadOnlyFile):
    """A file in which the bytes from `at` on are replaced by `patch`."""

    def __init__(self, file: BinaryIO, at: int, patch: bytes) -> None:
        self._file = file
        self._at = at
        self._patch = patch

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1, /) -> bytes:
        position = self._file.tell()
        data = self._file.read(size)
        first = max(self._at, position)
        last = min(self._at + len(self._patch), position + len(data))
        if first >= last:
            return data
        patch = self._patch[first - self._at : last - self._at]
        return data[: first - position] + patch + data[last - position :]


def riff_chunks(file: BinaryIO, order: str = "<", most: int = 1000) -> Iterator[tuple[int, bytes, int]]:
    """The position of the content, the name and the size of at most so many chunks of a RIFF or AIFF file.
    `order` is the byte order of sizes, as `struct` writes it. The file is then at the content."""
    at = 12
    for _ in range(most):
        file.seek(at)
        head = file.read(8)
        if len(head) < 8:
            return
        name, length = struct.unpack(f"{order}4sI", head)
        yield at + 8, name, length
        at += 8 + length + length % 2


def with_size(file: BinaryIO, size: int) -> BinaryIO:
    """The file itself; or, if its header has no size for its samples, with the size up to the file's end."""
    file.seek(0)
    head = file.read(40)
    patch = None
    if head[:4] in _RF64 and head[8:16] == b"WAVEds64":
        patch = _rf64_patch(file, head, size)
    elif head[:4] == b"FORM" and head[8:12] in _AIFF:
        patch = _aiff_patch(file, size)
    elif head.startswith(_W64_FILE):
        patch = _w64_patch(file, size)
    file.seek(0)
    return _PatchedFile(file, *patch) if patch is not None else file


def _rf64_patch(file: BinaryIO, head: bytes, size: int) -> tuple[int, bytes] | None:
    if any(head[28:36]):  # the size of the samples, in the chunk ds64
        return None
    starts = (start for start, name, _ in riff_chunks(file) if name == b"data")
    start = next(starts, None)
    return None if start is None else (28, struct.pack("<Q", size - start))


def _aiff_patch(file: BinaryIO, size: int) -> tuple[int, bytes] | None:
    for start, name, length in riff_chunks(file, ">", _MAX_PATCH // 8):
        if start >= _MAX_PATCH + 8 or (name == b"SSND" and length):
            break
        if name == b"SSND":
            file.seek(8)  # the size of the whole file is missing, too
            between = file.read(start - 12)
            sizes = [struct.pack(">I", min(size - at, 2**32 - 1)) for at in (8, start)]
            return 4, between.join(sizes)
    return None


def _w64_patch(file: BinaryIO, size: int) -> tuple[int, bytes] | None:
    at = 40  # after the file's GUID, its size, and the GUID of its type
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        chunk = file.read(_W64_HEADER)
        if len(chunk) < _W64_HEADER:
            break
        length = int.from_bytes(chunk[16:], "little")
        if chunk.startswith(_W64_DATA):
            sized = _W64_HEADER < length < 2**62
            return None if sized else (at + 16, struct.pack("<Q", size - at))
        if not _W64_HEADER <= length <= size:
            break
        at += (length + 7) & ~7
    return None
