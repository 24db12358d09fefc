"""Detects the content type of media from their first bytes.

`EXTENSIONS` lists every content type that the media store serves, with the file extension in its ids.
"""

from __future__ import annotations

from collections.abc import Mapping

from pomelo.audio_formats import SAMPLE_RATES
from pomelo.errors import PomeloError
from pomelo.media.audio import BIG_ENDIAN_TYPES, sample_type
from pomelo.media.media_types import parse

UNKNOWN = "application/octet-stream"

HEAD_BYTES = 16
"""Bytes at the beginning of a file that identify its format."""

EXTENSIONS: Mapping[str, str] = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "image/gif": "gif",
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
    "audio/ogg": "ogg",
    "audio/flac": "flac",
    "audio/mp4": "m4a",
    "audio/webm": "webm",
    "audio/basic": "ulaw",
    "audio/x-alaw-basic": "alaw",
    UNKNOWN: "bin",
    **{f"audio/pcm;rate={rate}": f"pcm{rate}" for rate in SAMPLE_RATES},
    **{name: f"be{rate}" for rate, name in BIG_ENDIAN_TYPES.items()},
}
"""Content type -> file extension."""

CONTENT_TYPES: Mapping[str, str] = {extension: name for name, extension in EXTENSIONS.items()}
"""File extension -> content type."""

_ALIASES = {
    "audio/mp3": "audio/mpeg",
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/x-flac": "audio/flac",
    "audio/x-m4a": "audio/mp4",
    "audio/opus": "audio/ogg",
    "image/jpg": "image/jpeg",
}

_IMAGE_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)
_JPEG_NAMES = (b"JFIF", b"Exif")
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
"""The last chunk of a PNG file."""

_MAX_JPEG_SEGMENTS = 10_000
"""Segments of a JPEG file before its samples: in a file of 32 MiB, full ones are 512."""

_LAYER_3 = (b"\xfb", b"\xfa", b"\xf3", b"\xf2", b"\xe3", b"\xe2")
"""The second byte of an MP3 frame."""


def image_type(head: bytes) -> str | None:
    """The media type of the PNG, JPEG, GIF or WebP file that begins with `head` (12 bytes or more); None
    for anything else."""
    for signature, media_type in _IMAGE_SIGNATURES:
        if head.startswith(signature):
            return media_type
    return "image/webp" if head[:4] == b"RIFF" and head[8:12] == b"WEBP" else None


def is_complete_image(data: bytes) -> bool:
    """Whether the end of a PNG, JPEG or WebP file is in `data`; true for any other file. Nothing is decoded,
    and other bytes may follow the end."""
    match image_type(data[:HEAD_BYTES]):
        case "image/png":
            return data.rfind(_PNG_END) >= 0
        case "image/jpeg":
            return _has_jpeg_end(data)
        case "image/webp":
            return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return True


def _has_jpeg_end(data: bytes) -> bool:
    """Whether a JPEG file has its end marker. An image within a segment, such as a preview, has its own."""
    at = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        marker = data[at + 1 : at + 2]
        if data[at : at + 1] != b"\xff" or marker in (b"", b"\xda"):
            break  # here begin the samples, in which there is no other end marker
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4])
    return data.rfind(b"\xff\xd9", at) >= 0


def storable_type(content_type: str) -> str:
    """The content type to store a provider's audio with: UNKNOWN for samples that callers can't send."""
    try:
        sample_type(parse(content_type))
    except PomeloError:
        return UNKNOWN
    return content_type


def sniff(content_type: str, head: bytes) -> str:
    """The content type to store media with: that of the first HEAD_BYTES, else `content_type` if it is known.

    Recognized bytes override the given type. Bare samples have no signature, so their type is trusted here;
    `pomelo.media.duration` checks whether they are another format. Any other type becomes
    application/octet-stream: an arbitrary type that a caller sent is never served back.

    Raises:
        PomeloError: invalid_parameter; no provider takes such samples.
    """
    declared = parse(content_type)
    image = image_type(head)
    # Samples may begin with the three bytes of a JPEG; in most of these, a name follows.
    if image == "image/jpeg" and head[6:10] not in _JPEG_NAMES and sample_type(declared) is not None:
        image = None
    if image is not None:
        return image
    if head[:4] == b"RIFF":
        return "audio/wav" if head[8:12] == b"WAVE" else UNKNOWN
    if head.startswith(b"OggS"):
        return "audio/ogg"
    if head.startswith(b"fLaC"):
        return "audio/flac"
    if head[4:8] == b"ftyp":
        return "audio/mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "audio/webm"
    if (samples := sample_type(declared)) is not None:
        return samples
    if head.startswith(b"ID3") or (head[:1] == b"\xff" and head[1:2] in _LAYER_3):
        return "audio/mpeg"
    name = _ALIASES.get(declared.name, declared.name)
    return name if name in EXTENSIONS else UNKNOWN
