"""Playable audio, made from a format's name, a size and a seed; the same arguments give the same bytes.

It is silence or faint noise. The seed changes bytes that a player skips, or that are not audible.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

_LOW = bytes(byte & 0x7F for byte in range(256))
_MP3_KBITS = {
    1: {32: 1, 40: 2, 48: 3, 56: 4, 64: 5, 80: 6, 96: 7, 112: 8, 128: 9, 160: 10, 192: 11},
    2: {8: 1, 16: 2, 24: 3, 32: 4, 40: 5, 48: 6},
}
_OPUS_RATE = 48000
_OPUS_PACKET = 960  # samples
_OPUS_PAGE = 50  # packets


def rate_of(output_format: str) -> float:
    """Return the approximate bytes per second of a format such as mp3_44100_128."""
    codec, rate, *kbits = output_format.split("_")
    if kbits:
        return int(kbits[0]) * 125
    return int(rate) * (1 if codec in ("ulaw", "alaw") else 2)


def packets(output_format: str, size: int, seed: str, packet: int = 16 * 1024) -> list[bytes]:
    """Return audio of at least `size` bytes (exactly, except for mp3 and opus), in packets of about `packet`
    bytes. Packets are repeated, so long audio takes little memory.
    """
    codec, rate, *kbits = output_format.split("_")
    if codec == "mp3":
        block, frame = _mp3(int(rate), int(kbits[0]), seed, packet)
        return _repeated(block, -(-max(size, 1) // frame) * frame)
    if codec == "opus":
        return list(_opus(int(kbits[0]), size, seed))
    if codec in ("ulaw", "alaw"):
        return _repeated(_bytes(seed, packet), size)
    faint = bytearray(packet // 2 * 2)
    faint[::2] = _bytes(seed, packet // 2)
    size += size % 2
    if codec == "wav":
        return [_wav_head(int(rate), size - 44), *_repeated(bytes(faint), size - 44)]
    return _repeated(bytes(faint), size)


def _bytes(seed: str, count: int) -> bytes:
    return hashlib.shake_256(seed.encode()).digest(count)


def _repeated(block: bytes, size: int) -> list[bytes]:
    count, rest = divmod(max(size, 1), len(block))
    return [block] * count + ([block[:rest]] if rest else [])


def _mp3(rate: int, kbits: int, seed: str, packet: int) -> tuple[bytes, int]:
    """Whole frames of silence, with noise in bytes that players skip; and the size of a frame."""
    version = 1 if rate >= 32000 else 2
    size = (144 if version == 1 else 72) * kbits * 1000 // rate
    index = _MP3_KBITS[version][kbits] << 4 | {44100: 0, 22050: 0, 24000: 1}[rate] << 2
    head = bytes((0xFF, 0xFB if version == 1 else 0xF3, index, 0xC0))
    side = bytes(17 if version == 1 else 9)
    count = max(1, packet // size)
    loose = size - len(head) - len(side)
    noise = _bytes(seed, count * loose).translate(_LOW)
    return b"".join(head + side + noise[at : at + loose] for at in range(0, count * loose, loose)), size


def _wav_head(rate: int, size: int) -> bytes:
    form = (16, 1, 1, rate, rate * 2, 2, 16)
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", size + 36, b"WAVE", b"fmt ", *form, b"data", size)


def _opus(kbits: int, size: int, seed: str) -> Iterator[bytes]:
    serial = int.from_bytes(_bytes(seed, 4), "little")
    noise = _bytes(seed, kbits * 1000 // 8 // 50)
    # A packet of one frame, marked as silence; players skip the rest of it.
    one = b"\xf8\xff\xfe" + noise[3:]
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 312, _OPUS_RATE, 0, 0)
    tags = b"OpusTags" + struct.pack("<I4sI", 4, b"test", 0)
    yield _page(2, 0, serial, 0, [head]) + _page(0, 0, serial, 1, [tags])
    pages = max(1, -(-size // (len(one) * _OPUS_PAGE)))
    for number in range(1, pages + 1):
        last = 4 if number == pages else 0
        yield _page(last, number * _OPUS_PAGE * _OPUS_PACKET, serial, number + 1, [one] * _OPUS_PAGE)


def _page(flags: int, position: int, serial: int, number: int, parts: list[bytes]) -> bytes:
    lacing = b"".join(b"\xff" * (len(part) // 255) + bytes((len(part) % 255,)) for part in parts)
    head = struct.pack("<4sBBQII", b"OggS", 0, flags, position, serial, number)
    body = bytes((len(lacing),)) + lacing + b"".join(parts)
    return head + struct.pack("<I", _checksum(head + bytes(4) + body)) + body


def _table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (0x04C11DB7 if value & 0x80000000 else 0)) & 0xFFFFFFFF
        table.append(value)
    return table


_CHECKSUMS = _table()


def _checksum(data: bytes) -> int:
    value = 0
    for byte in data:
        value = (value << 8 & 0xFFFFFFFF) ^ _CHECKSUMS[value >> 24 ^ byte]
    return value
