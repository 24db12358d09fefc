"""Parses the container of an audio file: its tags, the bytes that are not audio, and chained Ogg streams.

Nothing is decoded. Only chunks that a format defines as something other than audio count as structure, and
parsing stops at the first unknown chunk: after a wrong size there is audio, not a chunk. Every function takes
a seekable file and its size in bytes, and may move the file's position.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

MAX_CHUNKS = 200_000
"""Chunks of a file that are read; the bytes after them are not counted as structure."""

_SMALL_CHUNK = 64
"""Bytes. The two chunks of an MP4 fragment with a single frame have 160 together."""

_MAX_POSITION = 2**62
"""A chunk whose size is unknown claims to end there or later, beyond what a file's position can be."""

_TS_SEARCHED = 8192
"""Bytes in which the first transport packet is searched."""

_MAX_TAGS = 16
"""Tags that are read at the beginning, and at the end."""

_APE_MAGIC = b"APETAGEX"
_LYRICS = b"LYRICSBEGIN"
_MAX_LYRICS = 5120
"""Bytes of a Lyrics3 tag of the first version, whose size it does not have."""

_APE_SIZE_TOLERANCE = 64
"""Bytes by which the size of an APE tag may be wrong: encoders disagree on what it includes."""

_RIFF_METADATA = (
    "JUNK|junk|PAD |FLLR|LIST|id3 |ID3 |bext|iXML|fact|cue |smpl|inst|PEAK|fmt |ds64|idx1|axml|chna|umid|"
    "cart|_PMX|DISP|acid|afsp|elm1|levl|link|mext|minf|ovwf|plst|qlty|r64m|regn|strc|SMED"
)
_AIFF_METADATA = "COMM|NAME|AUTH|(c) |ANNO|ID3 |id3 |APPL|FVER|MARK|INST|MIDI|AESD|COMT|SAXL|PEAK|FLLR|CHAN"
_CAF_METADATA = "desc|free|info|kuki|chan|pakt|mark|strg|uuid|regn|edct|umid|midi|peak|ovvw|inst"
_MP4_METADATA = "ftyp|free|skip|wide|moov|moof|sidx|styp|uuid|udta|meta|mfra|emsg|prft|pdin|ssix|pnot"
"""Names of the chunks that are not audio, by format."""

_EBML_METADATA = frozenset(
    (0x1A45DFA3, 0xEC, 0x1941A469, 0x1C53BB6B, 0x1254C367, 0x114D9B74, 0x1549A966, 0x1654AE6B, 0x1043A770)
)
"""The EBML header, Void, Attachments, Cues, Tags, SeekHead, Info, Tracks and Chapters of Matroska."""

_EBML_PARENTS = (0x18538067, 0x1F43B675)
"""Segment and Cluster."""

_EBML_BLOCKS = (0xA3, 0xA0, 0xE7, 0xAB, 0xA7, 0x5854, 0xBF)
"""The elements of a Cluster besides Void."""


class ReadOnlyFile(io.RawIOBase, BinaryIO):
    """A file to be read only, for a demuxer."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class FileSlice(ReadOnlyFile):
    """A part of another file: `size` bytes from `start`."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file = file
        self._start = start
        self._size = size
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = max(offset + (0, self._position, self._size)[whence], 0)
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        left = max(self._size - self._position, 0)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def has_too_many_chunks(file: BinaryIO, size: int) -> bool:
    """Whether a RIFF or MP4 file, without tags before it, has more small chunks than any encoder writes, for
    which a demuxer takes seconds. Zeros after the last chunk count as some; chunks within others do not."""
    at, parse_head = _CHUNKED.get(_read_at(file, 0, 4), (0, _mp4_head))
    for _ in range(max(MAX_CHUNKS, size // _SMALL_CHUNK)):
        first = _read_at(file, at, 16)
        if len(first) < 16 or first.startswith(b"data\0\0\0\0"):  # samples up to the end of the file
            return False
        _, header, length = parse_head(first)
        if length < header:
            return False
        at += length
    return True


def tag_sizes(file: BinaryIO, size: int) -> tuple[int, int]:
    """The size of the ID3v2 tags at the beginning, which every decoder skips, and that of all other tags: an
    APE tag after them; APE, ID3v1, Lyrics3 and ID3v2 tags at the end."""
    front = other = 0
    for _ in range(_MAX_TAGS):
        head = _read_at(file, front, 10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 0x7F:
            break
        front += 10 + from_synchsafe(head[6:]) + (10 if head[5] & 0x10 else 0)
    front = min(front, size)
    head = _read_at(file, front, 32)
    if head[:8] == _APE_MAGIC:
        length = int.from_bytes(head[12:16], "little") + 32
        foot = max(front + length - 32 - _APE_SIZE_TOLERANCE, front + 32)
        if _APE_MAGIC in _read_at(file, foot, 2 * _APE_SIZE_TOLERANCE):
            other = min(length, size - front)
    start, end = front + other, size
    for _ in range(_MAX_TAGS):
        length = _last_tag_size(file, start, end)
        if not length:
            break
        end -= length
    return front, other + size - end


def _last_tag_size(file: BinaryIO, start: int, end: int) -> int:
    """The size of the tag that ends at `end`; 0 without one. Each has to have its beginning, too: otherwise a
    forged footer could declare audio to be a tag."""
    if end - start >= 128 and _read_at(file, end - 128, 3) == b"TAG":
        extended = end - start >= 355 and _read_at(file, end - 355, 4) == b"TAG+"
        return 355 if extended else 128
    foot = _read_at(file, max(end - 32, start), min(32, end - start))
    if foot[:8] == _APE_MAGIC and end - start >= 64:
        length = int.from_bytes(foot[12:16], "little") + 32
        head = max(end - length - _APE_SIZE_TOLERANCE, start)
        if _APE_MAGIC in _read_at(file, head, 2 * _APE_SIZE_TOLERANCE):
            return min(length, end - start)
    begin, length = b"", 0
    if foot[-10:-7] == b"3DI" and max(foot[-4:]) <= 0x7F:
        begin, length = b"ID3", 20 + from_synchsafe(foot[-4:])
    elif foot.endswith(b"LYRICS200") and foot[-15:-9].isdigit():
        begin, length = _LYRICS, 15 + int(foot[-15:-9])
    elif foot.endswith(b"LYRICSEND"):
        first = max(end - _MAX_LYRICS, start)
        at = _read_at(file, first, end - first).find(_LYRICS)
        begin, length = _LYRICS, end - first - at if at >= 0 else 0
    found = 0 < length <= end - start and _read_at(file, end - length, len(begin)) == begin
    return length if found else 0


def from_synchsafe(data: bytes) -> int:
    """A synchsafe number of ID3v2, which has seven bits in each byte."""
    number = 0
    for byte in data:
        number = number << 7 | byte & 0x7F
    return number


def chained_streams(file: BinaryIO, start: int, size: int) -> list[tuple[int, int]]:
    """The start and the size of each link of a chained Ogg; any other file is one link. `start` is the end of
    the tags before the audio.

    Streams that begin together play together and are one link.
    """
    starts = [start]
    in_first_pages = True
    ogg = _read_at(file, start, 4) == b"OggS"
    for at, flags, _ in _ogg_pages(file, start, size) if ogg else ():
        first = bool(flags & 2)
        if first and not in_first_pages:
            starts.append(at)
        in_first_pages = first
    return [(at, end - at) for at, end in zip(starts, [*starts[1:], size], strict=True)]


def structure_size(file: BinaryIO, size: int, name: str) -> int:
    """The bytes of a file that are not audio. `name` is that of the demuxer; the result is 0 for others."""
    measure = _STRUCTURE_SIZES.get(name)
    return measure(file, size) if measure is not None else 0


def _read_at(file: BinaryIO, at: int, count: int) -> bytes:
    """The bytes at a position; none after the end of the file, even if no file can be that long."""
    if at > _MAX_POSITION:
        return b""
    file.seek(at)
    return file.read(count)


_ParseHead = Callable[[bytes], tuple[bytes, int, int]]
"""Parses the first 16 bytes of a chunk: its name, the size of its header, and its total size."""


def _chunks(file: BinaryIO, at: int, size: int, parse_head: _ParseHead, names: str) -> int:
    """The total size of the chunks with these names, and of the headers of chunks with audio."""
    known = {name.encode() for name in names.split("|")}
    total = at
    for _ in range(MAX_CHUNKS):
        first = _read_at(file, at, 16)
        if len(first) < 16:
            break
        name, header, length = parse_head(first)
        if name in known:
            total += min(max(length, header), size - at)
        elif name in (b"data", b"SSND", b"mdat", b"movi"):
            total += header
        else:
            break
        at += max(length, header)
    return total


def _riff_head(first: bytes) -> tuple[bytes, int, int]:
    name, length = struct.unpack_from("<4sI", first)
    return (b"movi" if first[8:12] == b"movi" else name), 8, 8 + length + length % 2


def _aiff_head(first: bytes) -> tuple[bytes, int, int]:
    name, length = struct.unpack_from(">4sI", first)
    return name, 8, 8 + length + length % 2


def _caf_head(first: bytes) -> tuple[bytes, int, int]:
    name, length = struct.unpack_from(">4sQ", first)
    return name, 12, 12 + length


def _mp4_head(first: bytes) -> tuple[bytes, int, int]:
    length, name, large = struct.unpack(">I4sQ", first)
    if length == 1:
        return name, 16, large
    return name, 8, length or 2**63  # 0: to the end of the file


def _flac(file: BinaryIO, size: int) -> int:
    at = 4
    for _ in range(MAX_CHUNKS):
        head = _read_at(file, at, 4)
        if len(head) < 4 or head[0] & 0x7F > 6:
            break
        at += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    return min(at, size)


def _matroska(file: BinaryIO, size: int) -> int:
    at = total = 0
    for _ in range(MAX_CHUNKS):
        first = _read_at(file, at, 12)
        name, width = _vint(first, keep_marker=True)
        length, more = _vint(first[width:], keep_marker=False)
        if not width or not more:
            break
        header = width + more
        if name in _EBML_PARENTS:
            total += header
            at += header
            continue
        if name in _EBML_METADATA:
            total += min(header + length, size - at)
        elif name not in _EBML_BLOCKS:
            break
        at += header + length
    return total


def _vint(data: bytes, *, keep_marker: bool) -> tuple[int, int]:
    """An EBML number, with its length marker or without it, and its size in bytes; 0, 0 if it is invalid."""
    if not data or not data[0]:
        return 0, 0
    width = 9 - data[0].bit_length()
    if len(data) < width:
        return 0, 0
    value = int.from_bytes(data[:width], "big")
    return (value if keep_marker else value & (1 << 7 * width) - 1), width


def _mxf(file: BinaryIO, size: int) -> int:
    """The size of all packs except the essence (SMPTE 336M, 379M), which is audio and video."""
    at = total = 0
    for _ in range(MAX_CHUNKS):
        head = _read_at(file, at, 25)
        if len(head) < 25 or head[:4] != b"\x06\x0e\x2b\x34":
            break
        more = head[16] & 0x7F if head[16] & 0x80 else 0
        length = int.from_bytes(head[17 : 17 + more], "big") if more else head[16]
        essence = head[4:7] == b"\1\2\1" and head[8:13] == b"\x0d\1\3\1" + head[12:13]
        header = 17 + more
        total += min(header if essence else header + length, size - at)
        at += header + length
    return total


def _ogg_pages(file: BinaryIO, at: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The position and the flags of each page, and the number of its bytes that are not audio."""
    at = _next_ogg_page(file, at, size)
    headers = True
    while at < size:
        head = _read_at(file, at, 27)
        if len(head) < 27:
            return
        table = _read_at(file, at + 27, head[26])
        header = 27 + len(table)
        length = header + sum(table)
        # Header pages have the granule position 0, or none if no packet ends on them; audio pages do not.
        headers = (headers or bool(head[5] & 2)) and head[6:14] in (bytes(8), b"\xff" * 8)
        yield at, head[5], length if headers else header
        # If no page follows, this one was truncated or its size is wrong.
        following = at + length
        at = following if _read_at(file, following, 4) == b"OggS" else _next_ogg_page(file, at + 27, size)


def _next_ogg_page(file: BinaryIO, at: int, size: int) -> int:
    """The position of the first page from `at` on; `size` without one."""
    while at < size:
        offset = (data := _read_at(file, at, 65_536)).find(b"OggS")
        if offset >= 0:
            return at + offset
        at += max(len(data) - 3, 1)
    return size


def _ogg(file: BinaryIO, size: int) -> int:
    return sum(count for _, _, count in _ogg_pages(file, 0, size))


def _mpegts(file: BinaryIO, size: int) -> int:
    """The size of null packets, tables, and the headers of packets and of the PES packets in them."""
    stride, offset = _first_ts_packet(_read_at(file, 0, _TS_SEARCHED))
    tables: set[int] = set()
    total = 0
    file.seek(offset)
    while batch := file.read(stride * 4096):
        for at in range(0, len(batch) - 187, stride):
            if batch[at] != 0x47:
                return total
            total += _ts_packet(batch, at, tables)
    stamp = stride - 188
    return total + stamp * ((size - offset + stamp) // stride)


def _first_ts_packet(data: bytes) -> tuple[int, int]:
    """The distance between transport packets, 188 or 192 bytes, and the position of the first one: a
    recording may begin within a packet."""
    # The time stamp before a packet of 192 bytes may begin like a packet, and so may a payload.
    for stride, at in ((188, 0), (192, 4)):
        if data[at : at + 1] == b"G" and data[at + stride : at + stride + 1] in (b"G", b""):
            return stride, at
    at = -1
    while (at := data.find(b"G", at + 1)) >= 0:
        for stride in (188, 192):
            if data[at + stride : at + 3 * stride : stride] == b"GG":
                return stride, at
    return 188, 0


def _ts_packet(batch: bytes, at: int, tables: set[int]) -> int:
    """The bytes of a transport packet that are not payload. `tables` has the PIDs without PES packets."""
    pid = (batch[at + 1] & 0x1F) << 8 | batch[at + 2]
    fields = batch[at + 3]
    if pid == 0x1FFF or not fields & 0x10:
        return 188
    header = 4 + (1 + batch[at + 4] if fields & 0x20 else 0)
    if header >= 188:
        return 188
    if batch[at + 1] & 0x40:
        start = at + header
        if batch[start : start + 3] == b"\0\0\1" and header + 9 <= 188:
            tables.discard(pid)
            return min(header + 9 + batch[start + 8], 188)
        tables.add(pid)
    return 188 if pid in tables else header


_STRUCTURE_SIZES: dict[str, Callable[[BinaryIO, int], int]] = {
    **dict.fromkeys(("wav", "rf64", "avi"), lambda f, n: _chunks(f, 12, n, _riff_head, _RIFF_METADATA)),
    "aiff": lambda f, n: _chunks(f, 12, n, _aiff_head, _AIFF_METADATA),
    "caf": lambda f, n: _chunks(f, 8, n, _caf_head, _CAF_METADATA),
    "mov": lambda f, n: _chunks(f, 0, n, _mp4_head, _MP4_METADATA),
    "flac": _flac,
    "matroska": _matroska,
    "mxf": _mxf,
    "ogg": _ogg,
    "mpegts": _mpegts,
}

_CHUNKED = {
    **dict.fromkeys((b"RIFF", b"RF64", b"BW64"), (12, _riff_head)),
    b"RIFX": (12, _aiff_head),
}
