"""Playable audio, made from a format's name, a size and a seed; the same arguments give the same bytes.

It is silence or faint noise. The seed changes bytes that a player skips, or that are not audible.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from pomelo.audio_formats import AudioFormat
from pomelo.media.audio import wav_header
from pomelo.providers.sandbox.ogg import Writer

_LOW = bytes(byte & 0x7F for byte in range(256))
_MP3_KBITS = {
    1: {32: 1, 40: 2, 48: 3, 56: 4, 64: 5, 80: 6, 96: 7, 112: 8, 128: 9, 160: 10, 192: 11},
    2: {8: 1, 16: 2, 24: 3, 32: 4, 40: 5, 48: 6},
}
_OPUS_RATE = 48000
_OPUS_PACKET = 960  # samples
_OPUS_PAGE = 50  # packets


def packets(output_format: str, size: int, seed: str, packet: int = 16 * 1024) -> list[bytes]:
    """Return audio of at least `size` bytes (exactly, except for mp3 and opus), in packets of about `packet`
    bytes. Packets are repeated, so long audio takes little memory.
    """
    audio_format = AudioFormat.of(output_format)
    codec = audio_format.codec
    if codec == "mp3":
        block, frame = _mp3(audio_format.rate, audio_format.kbits, seed, packet)
        return _repeated(block, -(-max(size, 1) // frame) * frame)
    if codec == "opus":
        return list(_opus(audio_format.kbits, size, seed))
    if codec in ("ulaw", "alaw"):
        return _repeated(_bytes(seed, packet), size)
    faint = bytearray(packet // 2 * 2)
    faint[::2] = _bytes(seed, packet // 2)
    size += size % 2
    if codec == "wav":
        header = wav_header(f"audio/pcm;rate={audio_format.rate}", size - 44)
        return [header, *_repeated(bytes(faint), size - 44)]
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


def _opus(kbits: int, size: int, seed: str) -> Iterator[bytes]:
    # A packet of one frame, marked as silence; players skip the rest of it.
    packet = b"\xf8\xff\xfe" + _bytes(seed, kbits * 1000 // 8 // 50)[3:]
    writer = Writer()
    yield writer.head(b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 312, _OPUS_RATE, 0, 0), "")
    pages = max(1, -(-size // (len(packet) * _OPUS_PAGE)))
    for number in range(1, pages + 1):
        end = number * _OPUS_PAGE * _OPUS_PACKET
        yield writer.page([packet] * _OPUS_PAGE, end, last=number == pages)
