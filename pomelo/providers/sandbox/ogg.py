"""Ogg Opus files of the sandbox, with the spoken text as a comment.

PyAV's muxer is not used: it takes a random serial number, and a page must be the same every time.
"""

from __future__ import annotations

import struct
import zlib

_PAGE = struct.Struct("<4sBBqIIIB")
_FIRST, _LAST = 2, 4
"""Flags of the first and of the last page."""
_SERIAL = 0x506F6D65
_VENDOR = b"Pomelo sandbox"
_KEY = b"LYRICS="
_REVERSED = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))


class Writer:
    """Makes the pages of one file, in their order."""

    def __init__(self) -> None:
        self._sequence = 0

    def head(self, opus_head: bytes, text: str) -> bytes:
        """The pages of the two headers: `opus_head`, from the encoder, and a comment with `text`."""
        comment = _KEY + text.encode()
        vendor = struct.pack("<I", len(_VENDOR)) + _VENDOR
        tags = b"OpusTags" + vendor + struct.pack("<II", 1, len(comment)) + comment
        return self._page([opus_head], 0, _FIRST) + self._page([tags], 0, 0)

    def page(self, packets: list[bytes], granule: int, *, last: bool) -> bytes:
        """A page of whole packets, at most 255 segments. `granule` is its end in samples at 48,000 Hz."""
        return self._page(packets, granule, _LAST if last else 0)

    def _page(self, packets: list[bytes], granule: int, flags: int) -> bytes:
        lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes((len(packet) % 255,)) for packet in packets)
        header = _PAGE.pack(b"OggS", 0, flags, granule, _SERIAL, self._sequence, 0, len(lacing))
        self._sequence += 1
        page = bytearray(b"".join((header, lacing, *packets)))
        page[22:26] = struct.pack("<I", _crc(bytes(page)))
        return bytes(page)


def _crc(data: bytes) -> int:
    # Ogg's CRC is zlib's with the bits of each byte reversed, and without its inversions.
    reversed_crc = zlib.crc32(data.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(reversed_crc.to_bytes(4, "little").translate(_REVERSED))


def read_text(head: bytes) -> str | None:
    """The comment in the first bytes of a file that the sandbox made, else None."""
    second = head.find(b"OggS", 4, 256)
    if second < 0 or len(head) < second + _PAGE.size:
        return None
    start = second + _PAGE.size + head[second + _PAGE.size - 1]
    prefix = b"OpusTags" + struct.pack("<I", len(_VENDOR)) + _VENDOR + struct.pack("<I", 1)
    body = head[start : start + len(prefix) + 4]
    if not body.startswith(prefix) or len(body) < len(prefix) + 4:
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
