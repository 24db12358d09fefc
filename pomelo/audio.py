"""How long a sound is, told from its headers.

The engine asks before a task is priced, and the sandbox. Bytes of callers are only ever measured here, in
plain Python, never decoded: a native demuxer in the server's process is no place for hostile bytes.
"""

import math
import struct
from dataclasses import dataclass
from typing import BinaryIO

_RAW = {"audio/basic": (8000, 1), "audio/x-alaw-basic": (8000, 1)}
_RATE = 16_000
"""Samples a second of a raw sound whose type doesn't say."""

_OPUS_RATE = 48_000
"""Granule positions of Opus count samples at this rate, whatever the sound's own."""

_PAGE = struct.Struct("<4sBBqIIIB")
_TAIL = 128 * 1024
_CHUNKS = 1000
_LOOKS = 20_000


@dataclass(frozen=True, slots=True)
class WavData:
    """Where the samples of a WAV file are: first byte, bytes, bytes a second, bytes a sample."""

    start: int
    length: int
    per_second: int
    width: int


def seconds(file: BinaryIO, size: int, content_type: str) -> float | None:
    """The length in seconds of a sound of `size` bytes, above 0; None where it can't be told. Blocks on the
    disk.

    Raises:
        OSError: it can't be read.
    """
    return _seconds(file, size, content_type) or None


def _seconds(file: BinaryIO, size: int, content_type: str) -> float | None:
    file.seek(0)
    head = file.read(16)
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        data = wav_data(file, size)
        return data.length / data.per_second if data is not None and data.per_second else None
    if head.startswith(b"OggS"):
        return _ogg_seconds(file, size)
    samples = raw(content_type)
    if samples is not None:
        return size / (samples[0] * samples[1])
    return _tagged_seconds(file)


def raw(content_type: str) -> tuple[int, int] | None:
    """Samples a second and bytes a sample, where the media type says that a sound is raw."""
    kind, _, rate = content_type.partition(";rate=")
    if kind == "audio/pcm":
        return (int(rate) if rate.isdecimal() and 0 < len(rate) < 7 and int(rate) else _RATE), 2
    return _RAW.get(kind)


def wav_data(file: BinaryIO, size: int) -> WavData | None:
    """The samples of a WAV file; a data chunk that claims more than there is has what there is."""
    place, per_second, width = 12, 0, 0
    for _ in range(_CHUNKS):
        file.seek(place)
        chunk = file.read(8 + 16)
        if len(chunk) < 8:
            break
        name, length = struct.unpack_from("<4sI", chunk)
        place += 8
        if name == b"fmt " and len(chunk) == 24:
            per_second = int.from_bytes(chunk[16:20], "little")
            width = int.from_bytes(chunk[22:24], "little") // 8
        elif name == b"data":
            return WavData(place, min(length, size - place), per_second, width)
        place += length + length % 2
    return None


def _ogg_seconds(file: BinaryIO, size: int) -> float | None:
    """The length of an Opus or Vorbis file of `size` bytes, from its first and its last page; else None."""
    file.seek(0)
    first = file.read(128)
    if len(first) < _PAGE.size or not first.startswith(b"OggS"):
        return None
    serial = _PAGE.unpack_from(first)[4]
    body = first[_PAGE.size + first[_PAGE.size - 1] :]
    if body.startswith(b"OpusHead") and len(body) >= 12:
        rate, skip = _OPUS_RATE, int.from_bytes(body[10:12], "little")
    elif body.startswith(b"\x01vorbis") and len(body) >= 16:
        rate, skip = int.from_bytes(body[12:16], "little"), 0
    else:
        return None
    file.seek(max(0, size - _TAIL))
    tail = file.read(_TAIL)
    place = len(tail)
    while (place := tail.rfind(b"OggS", 0, place)) >= 0:
        if len(tail) - place >= _PAGE.size:
            page = _PAGE.unpack_from(tail, place)
            granule = page[3]
            if page[4] == serial and granule >= 0 and rate:
                return float(max(0, granule - skip)) / rate
    return None


def _tagged_seconds(file: BinaryIO) -> float | None:
    """The length of a file that tinytag knows: MP3, FLAC, MP4 and some more."""
    from tinytag import TinyTag, TinyTagException

    file.seek(0)
    try:
        seconds = TinyTag.get(file_obj=_Bounded(file), tags=False).duration  # type: ignore[arg-type]
    except TinyTagException:
        return None
    return seconds if seconds is not None and math.isfinite(seconds) and seconds > 0 else None


class _Bounded:
    """A file that can be looked at so often and not more: garbage can make a parser crawl through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = _LOOKS

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many looks")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()
