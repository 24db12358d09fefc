"""Images of the sandbox: circles on a gradient, derived from a hash, as PNG, JPEG or WebP."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from fractions import Fraction
from hashlib import shake_256
from itertools import islice

from pomelo.providers.sandbox.pyav import load_av

_ENCODERS = {
    "jpeg": ("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "3"}),
    "webp": ("libwebp", "yuv420p", {"quality": "85", "compression_level": "2"}),
}
_CIRCLES = 8


def draw(subject: str, width: int, height: int, file_format: str) -> Iterator[float | bytes]:
    """Draws the image of a subject; the same arguments always give the same file.

    Yields the progress (0, 0.25, 0.5, 0.75), then the file. `file_format` is png, jpeg or webp; sizes are in
    pixels, from 1.

    Raises:
        PomeloError: provider_not_configured, the format needs PyAV, which is not installed.
    """
    if file_format != "png":
        load_av(file_format, "png")
    rows: list[bytes] = []
    remaining = _rows(shake_256(subject.encode()).digest(6 + 6 * _CIRCLES), width, height)
    for quarter in range(4):
        yield quarter / 4
        rows += islice(remaining, height * (quarter + 1) // 4 - len(rows))
    yield encode(rows, width, height, file_format)


def _rows(digest: bytes, width: int, height: int) -> Iterator[bytes]:
    """The rows from the top, 3 bytes a pixel. Each byte of `digest` sets a colour, a position or a radius."""
    top, bottom = digest[:3], digest[3:6]
    circles = [digest[start : start + 6] for start in range(6, len(digest), 6)]
    for y in range(height):
        row = bytearray(bytes(a + (b - a) * y // height for a, b in zip(top, bottom, strict=True)) * width)
        for across, down, size, *colour in circles:
            radius = (64 + size) * min(width, height) / 1024
            chord = radius**2 - (y - down * height / 255) ** 2
            if chord > 0:
                x, half = across * width // 255, int(math.sqrt(chord))
                start, end = max(x - half, 0), min(x + half, width)
                row[start * 3 : end * 3] = bytes(colour) * (end - start)
        yield bytes(row)


def encode(rows: list[bytes], width: int, height: int, file_format: str) -> bytes:
    """Encodes rows of 3 bytes a pixel as png, jpeg or webp.

    Raises:
        PomeloError: provider_not_configured, the format needs PyAV, which is not installed.
    """
    if file_format == "png":
        return _png(rows, width, height)
    av = load_av(file_format, "png")
    name, pixel_format, options = _ENCODERS[file_format]
    frame = av.VideoFrame(width, height, "rgb24")
    padding = bytes(frame.planes[0].line_size - width * 3)
    frame.planes[0].update(padding.join(rows) + padding)
    codec = av.CodecContext.create(name, "w")
    codec.width, codec.height, codec.pix_fmt = width, height, pixel_format
    codec.framerate, codec.thread_count, codec.options = Fraction(1), 1, options
    packets = (*codec.encode(frame.reformat(format=pixel_format)), *codec.encode(None))
    return b"".join(map(bytes, packets))


def _png(rows: list[bytes], width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + b"\0".join(rows), 1)
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
