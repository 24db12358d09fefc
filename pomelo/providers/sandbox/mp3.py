"""What goes around MP3 frames: an ID3 tag with the spoken text, and the frame that tells the length.

`sound.py` writes with it, `hearing.py` reads the tag.
"""

from __future__ import annotations

import struct

_DESCRIPTION = b"\x03undPomelo sandbox\0"
"""Begins the content of our USLT frame: UTF-8, no language, whose it is."""

_INFO_OFFSETS = {3: 21, 2: 13}
"""Where the Info mark stands in a mono frame, by the MPEG version bits of its header."""


def tag(text: str) -> bytes:
    """An ID3v2.4 tag with `text` as its transcript (USLT)."""
    content = _DESCRIPTION + text.encode()
    frame = b"USLT" + _synchsafe(len(content)) + b"\0\0" + content
    return b"ID3\x04\0\0" + _synchsafe(len(frame)) + frame


def read_text(head: bytes) -> str | None:
    """The transcript in the beginning of a file that the sandbox made, else None."""
    if not head.startswith(b"ID3\x04\0\0") or head[10:14] != b"USLT" or len(head) < 20:
        return None
    content = head[20 : 20 + _plain(head[14:18])]
    if not content.startswith(_DESCRIPTION) or len(content) < _plain(head[14:18]):
        return None
    try:
        return content[len(_DESCRIPTION) :].decode()
    except UnicodeDecodeError:
        return None


def frames_size(frames: int, frame_samples: int, rate: int, kbits: int) -> int:
    """Bytes of so many frames at a constant bit rate.

    A frame has a byte more, the padding, as often as keeps the rate; LAME begins without.
    """
    whole, part = divmod(frame_samples // 8 * kbits * 1000, rate)
    return frames * whole - (1 - frames) * part // rate


def info(first: bytes, frames: int, size: int) -> bytes:
    """A silent frame that goes before the `first` one and tells how many there are, and their `size`.

    Without it a player guesses the length from the first frames, some 0.1 % wrong.
    """
    padded = first[2] >> 1 & 1
    # The padding bit off: the frame is one byte shorter than one with it. No CRC: our frames have none.
    header = bytes((first[0], first[1] | 1, first[2] & 0xFD, first[3]))
    length = len(first) - padded
    offset = _INFO_OFFSETS[first[1] >> 3 & 3]
    mark = struct.pack(">4sIII", b"Info", 0b11, frames, size + length)
    return (header.ljust(offset, b"\0") + mark).ljust(length, b"\0")


def _synchsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def _plain(synchsafe: bytes) -> int:
    number = 0
    for byte in synchsafe:
        number = number << 7 | byte & 0x7F
    return number
