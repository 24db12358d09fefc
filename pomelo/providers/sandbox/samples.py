"""Raw samples: G.711, and a text hidden in their lowest bits.

`melody.py` codes its tones here, `sound.py` hides the spoken text in sounds that have no place for a tag,
`hearing.py` finds it again. The text rides in the lowest bit of each of the first samples, where nobody
hears it: mark, samples a second, length, UTF-8, CRC-32; each byte from its highest bit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

TEXT_MOST = 60_000
"""Bytes of UTF-8 that a sound can bear; a longer text is left out."""

_MARK = b"PmS1"
_HEAD = struct.Struct(">4sII")
_CRC = struct.Struct(">I")
_LOWEST_OFF = bytes(value & 0xFE for value in range(256))
_LOWEST_AS_DIGIT = bytes(0x30 | value & 1 for value in range(256))


class Hiding:
    """Hides `text` in a sound of `samples` samples as its pieces go by; hides nothing where it can't fit.

    `rate` is in samples a second, `width` in bytes a sample (2: signed 16-bit little-endian, 1: G.711).
    """

    def __init__(self, text: str, rate: int, samples: int, width: int) -> None:
        payload = _payload(text, rate)
        bits = len(payload) * 8
        # "0" and "1" differ in their lowest bit alone, so the digits are the bits.
        digits = f"{int.from_bytes(payload):0{bits}b}".encode() if bits <= samples else b""
        self._bits = digits.translate(bytes(value & 1 for value in range(256)))
        self._width = width
        self._next = 0

    def into(self, piece: bytes) -> bytes:
        """The next piece of the sound, whole samples, with its share of the text."""
        bits = self._bits[self._next : self._next + len(piece) // self._width]
        if not bits:
            return piece
        self._next += len(bits)
        carriers = slice(0, len(bits) * self._width, self._width)
        low = int.from_bytes(piece[carriers].translate(_LOWEST_OFF)) | int.from_bytes(bits)
        changed = bytearray(piece)
        changed[carriers] = low.to_bytes(len(bits))
        return bytes(changed)


def _payload(text: str, rate: int) -> bytes:
    data = text.encode()
    head = _HEAD.pack(_MARK, rate, len(data)) + data
    return head + _CRC.pack(zlib.crc32(head))


MOST = (_HEAD.size + TEXT_MOST + _CRC.size) * 8 * 2
"""Bytes at the beginning of a sound that can bear the text."""


def recover(data: bytes, width: int) -> tuple[str, int] | None:
    """The text hidden from the first of these samples on, and the samples a second; None without one."""
    head = _lowest_bits(data, width, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    mark, rate, length = _HEAD.unpack(head)
    if mark != _MARK or length > TEXT_MOST or not rate:
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
    """Up to `size` whole bytes out of the lowest bits."""
    digits = data[0 : size * 8 * width : width].translate(_LOWEST_AS_DIGIT)
    whole = len(digits) // 8
    return int(digits[: whole * 8] or b"0", 2).to_bytes(whole)


def pcm(samples: Iterable[int]) -> bytes:
    """Signed 16-bit little-endian."""
    values = list(samples)
    return struct.pack(f"<{len(values)}h", *values)


def ulaw(samples: Iterable[int]) -> bytes:
    """G.711 µ-law from 16-bit samples."""
    return bytes([_ulaw(sample) for sample in samples])


def alaw(samples: Iterable[int]) -> bytes:
    """G.711 A-law from 16-bit samples."""
    return bytes([_alaw(sample) for sample in samples])


def _ulaw(sample: int) -> int:
    size = min(abs(sample), 32635) + 132
    exponent = size.bit_length() - 8
    code = exponent << 4 | size >> (exponent + 3) & 15
    return ~(code | 0x80 if sample < 0 else code) & 0xFF


def _alaw(sample: int) -> int:
    size = (sample if sample >= 0 else ~sample) >> 3
    exponent = size.bit_length() - 5
    code = size >> 1 if exponent < 1 else exponent << 4 | size >> exponent & 15
    return code ^ (0xD5 if sample >= 0 else 0x55)
