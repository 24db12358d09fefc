"""Small valid images for the fake vendors."""

from __future__ import annotations

from pomelo.providers.sandbox.image import encode


def make_image(file_format: str = "png", width: int = 32, height: int = 32) -> bytes:
    """Return an orange image; `file_format` is png, jpeg or webp. All but PNG need PyAV."""
    return encode([b"\xf5\x82\x20" * width] * height, width, height, file_format)
