"""Ogg pages around Opus packets, written and read; the spoken text is a comment.

`sound.py` writes with it, `hearing.py` reads the text. Written here because a granule position must
be exact to the sample and a page the same every time, which a muxer with random serials does not give.
"""

from __future__ import annotations

import struct
import zlib

RATE = 48_000
"""Granule positions of Opus count samples at this rate, whatever the sound's own."""

_PAGE = struct.Struct("<4sBBqIIIB")
_SERIAL = 0x506F6D65
_VENDOR = b"Pomelo sandbox"
_KEY = b"LYRICS="
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


class Writer:
    """Makes the pages of one file."""

    def __init__(self) -> None:
        self._sequence = 0

    def head(self, opus_head: bytes, text: str) -> bytes:
        """The pages of the two headers; `opus_head` is the encoder's, `text` becomes a comment."""
        comment = _KEY + text.encode()
        counted = struct.pack("<I", len(_VENDOR)) + _VENDOR + struct.pack("<II", 1, len(comment)) + comment
        return self.page([opus_head], 0, kind=2) + self.page([b"OpusTags" + counted], 0)

    def page(self, packets: list[bytes], granule: int, *, kind: int = 0) -> bytes:
        """A page of whole packets, at most 255 segments; `kind` is 2 for the first page, 4 for the last."""
        lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes((len(packet) % 255,)) for packet in packets)
        header = _PAGE.pack(b"OggS", 0, kind, granule, _SERIAL, self._sequence, 0, len(lacing))
        self._sequence += 1
        page = bytearray(b"".join((header, lacing, *packets)))
        page[22:26] = struct.pack("<I", _crc(bytes(page)))
        return bytes(page)


def _crc(data: bytes) -> int:
    # Ogg's CRC is the mirror image of zlib's, without its inversions.
    mirrored = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(mirrored.to_bytes(4, "little").translate(_REVERSED))


def read_text(head: bytes) -> str | None:
    """The comment in the beginning of a file that the sandbox made, else None."""
    second = head.find(b"OggS", 4, 256)
    if second < 0 or len(head) < second + _PAGE.size:
        return None
    start = second + _PAGE.size + head[second + _PAGE.size - 1]
    mark = b"OpusTags" + struct.pack("<I", len(_VENDOR)) + _VENDOR + struct.pack("<I", 1)
    body = head[start : start + len(mark) + 4]
    if not body.startswith(mark) or len(body) < len(mark) + 4:
        return None
    start += len(body)
    length = int.from_bytes(body[-4:], "little")
    comment = head[start : start + length]
    if len(comment) < length or not comment.startswith(_KEY):
        return None
    try:
        return comment[len(_KEY) :].decode()
    except UnicodeDecodeError:
        return None
