"""Raw samples of the sandbox: PCM, G.711, and a text in the lowest bits of the samples.

The text is in the lowest bit of each of the first samples, where it can't be heard: a magic number, samples a
second, length, UTF-8, CRC-32; the highest bit of each byte first.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

MAX_TEXT_BYTES = 60_000
"""Bytes of UTF-8 that audio can contain; a longer text is left out."""

_MAGIC = b"PmS1"
_HEAD = struct.Struct(">4sII")
_CRC = struct.Struct(">I")
_CLEAR_LOWEST = bytes(value & 0xFE for value in range(256))
_LOWEST_AS_DIGIT = bytes(0x30 | value & 1 for value in range(256))


class TextEmbedder:
    """Embeds `text` in `samples` samples, chunk by chunk; embeds nothing if they are too few.

    `rate` is in samples a second, `width` in bytes a sample (2: signed 16-bit little-endian, 1: G.711).
    """

    def __init__(self, text: str, rate: int, samples: int, width: int) -> None:
        payload = _payload(text, rate)
        bits = len(payload) * 8
        # "0" and "1" differ only in their lowest bit, so the digits are the bits.
        digits = f"{int.from_bytes(payload):0{bits}b}".encode() if bits <= samples else b""
        self._bits = digits.translate(bytes(value & 1 for value in range(256)))
        self._width = width
        self._next = 0

    def embed(self, chunk: bytes) -> bytes:
        """The next chunk, of whole samples, with its part of the text."""
        bits = self._bits[self._next : self._next + len(chunk) // self._width]
        if not bits:
            return chunk
        self._next += len(bits)
        carriers = slice(0, len(bits) * self._width, self._width)
        low = int.from_bytes(chunk[carriers].translate(_CLEAR_LOWEST)) | int.from_bytes(bits)
        changed = bytearray(chunk)
        changed[carriers] = low.to_bytes(len(bits))
        return bytes(changed)


def _payload(text: str, rate: int) -> bytes:
    data = text.encode()
    head = _HEAD.pack(_MAGIC, rate, len(data)) + data
    return head + _CRC.pack(zlib.crc32(head))


MAX_EMBEDDED_BYTES = (_HEAD.size + MAX_TEXT_BYTES + _CRC.size) * 8 * 2
"""Bytes of samples, from the first one on, that can contain a text."""


def extract(data: bytes, width: int) -> tuple[str, int] | None:
    """The embedded text and the samples a second, or None without a text; `data` begins with the samples."""
    head = _lowest_bits(data, width, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, rate, length = _HEAD.unpack(head)
    if magic != _MAGIC or length > MAX_TEXT_BYTES or not rate:
        return None
    payload = _lowest_bits(data, width, _HEAD.size + length + _CRC.size)
    body, crc = payload[: _HEAD.size + length], payload[_HEAD.size + length :]
    if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(body):
        return None
    try:
        return body[_HEAD.size :].decode(), rate
    except UnicodeDecodeError:
        return None


def _lowest_bits(data: bytes, width: int, size: int) -> bytes:
    """Up to `size` bytes, made of the lowest bits; an incomplete byte is left out."""
    digits = data[0 : size * 8 * width : width].translate(_LOWEST_AS_DIGIT)
    whole = len(digits) // 8
    return int(digits[: whole * 8] or b"0", 2).to_bytes(whole)


def pcm(samples: Iterable[int]) -> bytes:
    """Signed 16-bit little-endian."""
    values = list(samples)
    return struct.pack(f"<{len(values)}h", *values)


def ulaw(samples: Iterable[int]) -> bytes:
    """G.711 µ-law, from 16-bit samples."""
    return bytes([_ulaw(sample) for sample in samples])


def alaw(samples: Iterable[int]) -> bytes:
    """G.711 A-law, from 16-bit samples."""
    return bytes([_alaw(sample) for sample in samples])


def _ulaw(sample: int) -> int:
    magnitude = min(abs(sample), 32635) + 132
    exponent = magnitude.bit_length() - 8
    code = exponent << 4 | magnitude >> (exponent + 3) & 15
    return ~(code | 0x80 if sample < 0 else code) & 0xFF


def _alaw(sample: int) -> int:
    magnitude = (sample if sample >= 0 else ~sample) >> 3
    exponent = magnitude.bit_length() - 5
    code = magnitude >> 1 if exponent < 1 else exponent << 4 | magnitude >> exponent & 15
    return code ^ (0xD5 if sample >= 0 else 0x55)
