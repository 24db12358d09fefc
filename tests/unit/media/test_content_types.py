"""The content type of media is that of their bytes, else the declared one if it is known."""

from __future__ import annotations

import pytest

from pomelo.media.content_types import image_type, sniff
from tests.unit.media.files import PNG
from tests.unit.refusals import refused


@pytest.mark.parametrize(
    ("declared", "head", "stored"),
    [
        ("image/png", PNG, "image/png"),
        ("text/html", PNG, "image/png"),
        ("audio/pcm;rate=16000", b"GIF89a", "application/octet-stream"),
        ("text/html", b"<script>", "application/octet-stream"),
        ("image/svg+xml", b"<svg>", "application/octet-stream"),
        ("", b"ID3\x04", "audio/mpeg"),
        ("", b"\xff\xfb\x90\x00", "audio/mpeg"),
        ("audio/pcm;rate=16000", b"\xff\xfb\x90\x00", "audio/pcm;rate=16000"),
        ("audio/pcm; rate=16000", b"\xff\xff\xff\xff", "audio/pcm;rate=16000"),
        ("", b"RIFF\x00\x00\x00\x00WAVE", "audio/wav"),
        ("", b"OggS", "audio/ogg"),
        ("", b"fLaC", "audio/flac"),
        ("", b"\0\0\0\x20ftypM4A ", "audio/mp4"),
        ("", b"\x1aE\xdf\xa3", "audio/webm"),
        *[(f"audio/{alias}", b"?", "audio/wav") for alias in ("wav", "x-wav", "wave")],
        *[("audio/x-flac", b"?", "audio/flac"), ("audio/x-m4a", b"?", "audio/mp4")],
        *[("audio/opus", b"?", "audio/ogg"), ("image/jpg", b"?", "image/jpeg")],
        ("AUDIO/MP3", b"????", "audio/mpeg"),
    ],
)
def test_a_media_file_is_stored_with_a_known_type(declared: str, head: bytes, stored: str) -> None:
    assert sniff(declared, head) == stored


@pytest.mark.parametrize(
    "parameters",
    [
        *("L16;rate=11025", "pcm;channels=2", "pcm;rate=7", "pcm;endian=big", "pcm;rate", "L24;rate=16000"),
        *("pcm,rate=16000", "L16, rate=8000", "pcm rate=16000", "basic,rate=8000", "pcm:16000", "raw/16000"),
    ],
)
def test_bare_samples_that_no_provider_takes_are_refused(parameters: str) -> None:
    with refused("invalid_parameter", "audio"):
        sniff(f"audio/{parameters}", bytes(16))


@pytest.mark.parametrize(
    ("head", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF87a", "image/gif"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x04\0\0\0WEBPVP8 ", "image/webp"),
        (b"RIFF\x04\0\0\0WAVE", None),
        (b"<svg xmlns=", None),
        (b"BM\0\0\0\0", None),
        (b"", None),
    ],
)
def test_an_image_is_recognised_by_its_bytes(head: bytes, media_type: str | None) -> None:
    assert image_type(head) == media_type
