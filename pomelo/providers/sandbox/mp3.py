"""MP3 files of the sandbox: an ID3 tag with the spoken text, and the Info frame that states the length."""

from __future__ import annotations

import struct

from pomelo.media.containers import from_synchsafe

_DESCRIPTION = b"\x03undPomelo sandbox\0"
"""How the content of our USLT frame begins: UTF-8, undetermined language, the name of its author."""

_INFO_OFFSETS = {3: 21, 2: 13}
"""The position of "Info" in a mono frame, by the MPEG version bits of the frame's header."""


def tag(text: str) -> bytes:
    """An ID3v2.4 tag with `text` as the lyrics (USLT)."""
    content = _DESCRIPTION + text.encode()
    frame = b"USLT" + _synchsafe(len(content)) + b"\0\0" + content
    return b"ID3\x04\0\0" + _synchsafe(len(frame)) + frame


def read_text(head: bytes) -> str | None:
    """The lyrics in the first bytes of a file that the sandbox made, else None."""
    if not head.startswith(b"ID3\x04\0\0") or head[10:14] != b"USLT" or len(head) < 20:
        return None
    size = from_synchsafe(head[14:18])
    content = head[20 : 20 + size]
    if not content.startswith(_DESCRIPTION) or len(content) < size:
        return None
    try:
        return content[len(_DESCRIPTION) :].decode()
    except UnicodeDecodeError:
        return None


def frames_size(frames: int, frame_samples: int, rate: int, kbits: int) -> int:
    """The bytes of `frames` frames at a constant bit rate.

    Some frames have a byte of padding, so that the average is right; LAME's first one has none.
    """
    whole, part = divmod(frame_samples // 8 * kbits * 1000, rate)
    return frames * whole - (1 - frames) * part // rate


def info(first: bytes, frames: int, size: int) -> bytes:
    """The silent frame before the `first` one. It states the number of frames and their `size` in bytes.

    Without it a player estimates the length from the first frames, about 0.1 % wrong.
    """
    padded = first[2] >> 1 & 1
    # The header without the padding bit, so this frame is as long as one without padding. It has no CRC.
    header = bytes((first[0], first[1] | 1, first[2] & 0xFD, first[3]))
    length = len(first) - padded
    offset = _INFO_OFFSETS[first[1] >> 3 & 3]
    content = struct.pack(">4sIII", b"Info", 0b11, frames, size + length)
    return (header.ljust(offset, b"\0") + content).ljust(length, b"\0")


def _synchsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))
