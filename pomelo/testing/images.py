"""Small valid images for the fake vendors."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext

CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

_ENCODERS = {"jpeg": ("mjpeg", "yuvj420p"), "webp": ("libwebp", "yuv420p")}


def make_image(file_format: str = "png", width: int = 32, height: int = 32) -> bytes:
    """Return an image file with an orange square; `file_format` is a key of CONTENT_TYPES."""
    row = b"\xf5\x82\x20" * width
    if file_format == "png":
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        pixels = zlib.compress((b"\0" + row) * height)
        chunks = ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)
    import av  # slow to import, and needed by few tests

    name, pixel_format = _ENCODERS[file_format]
    frame = av.VideoFrame(width, height, "rgb24")
    plane = frame.planes[0]
    plane.update((row + bytes(plane.line_size - len(row))) * height)
    codec = cast("VideoCodecContext", av.CodecContext.create(name, "w"))
    codec.width, codec.height, codec.pix_fmt = width, height, pixel_format
    codec.framerate = Fraction(1)
    return b"".join(
        bytes(packet) for packet in (*codec.encode(frame.reformat(format=pixel_format)), *codec.encode(None))
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
