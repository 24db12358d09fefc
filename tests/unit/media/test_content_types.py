"""The content type of media is that of their bytes, else the declared one if it is known."""

from __future__ import annotations

import pytest

from pomelo.media.content_types import UNKNOWN, image_type, is_complete_image, sniff, storable_type
from pomelo.testing.images import make_image
from tests.unit.media.files import PNG
from tests.unit.refusals import refused


@pytest.mark.parametrize(
    ("declared", "head", "stored"),
    [
        ("image/png", PNG, "image/png"),
        ("text/html", PNG, "image/png"),
        ("audio/pcm;rate=16000", b"GIF89a", "image/gif"),
        ("audio/basic", b"\xff\xd8\xff\xe0" + bytes(12), "audio/basic"),
        ("audio/pcm;rate=16000", b"\xff\xd8\xff\xe0" + bytes(12), "audio/pcm;rate=16000"),
        ("audio/basic", b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1", "image/jpeg"),
        ("audio/mpeg", b"\xff\xd8\xff\xe0" + bytes(12), "image/jpeg"),
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


JPEG = (
    b"\xff\xd8"
    b"\xff\xe1\0\x10Exif\xff\xd8\xff\xda..\xff\xd9.."  # a segment with a preview
    b"\xff\xff\xdb\0\x03."  # after a fill byte
    b"\xff\xda\0\x03.samples\xff\0\xff\xd0"
    b"\xff\xd9"
)
WEBP = b"RIFF\x10\0\0\0WEBPVP8 \x04\0\0\0abcd"
SMALL_PNG = b"\x89PNG\r\n\x1a\n....\0\0\0\0IEND\xaeB`\x82"


@pytest.mark.parametrize("image", [JPEG, WEBP, SMALL_PNG])
def test_an_image_is_complete_with_its_end_and_with_more(image: bytes) -> None:
    assert is_complete_image(image)
    assert is_complete_image(image + b"\0\n")
    for size in range(12, len(image)):
        assert not is_complete_image(image[:size]), size


@pytest.mark.parametrize("file_format", ["png", "jpeg", "webp"])
def test_an_image_that_an_encoder_wrote_is_complete(file_format: str) -> None:
    image = make_image(file_format, 200, 120)
    assert is_complete_image(image)
    assert not is_complete_image(image[:-1])


@pytest.mark.parametrize("data", [b"GIF89a", b"", b"ID3", b"\xff\xfb"])
def test_only_images_can_be_incomplete(data: bytes) -> None:
    assert is_complete_image(data)


def test_a_jpeg_of_very_many_segments_is_searched_for_its_end_in_bounded_time() -> None:
    assert is_complete_image(b"\xff\xd8\xff\xe0\0\2" + b"\xff\xe1\0\2" * 1_000_000 + b"\xff\xd9")


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("audio/pcm;rate=16000", "audio/pcm;rate=16000"),
        ("audio/pcm;rate=11025", UNKNOWN),
        ("audio/L16; rate=24000; channels=2", UNKNOWN),
        ("audio/mpeg", "audio/mpeg"),
    ],
)
def test_samples_of_a_provider_that_callers_can_not_send_are_stored_without_a_type(
    given: str, stored: str
) -> None:
    assert storable_type(given) == stored
