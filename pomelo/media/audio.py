"""Parses the media types of bare samples (audio without a header), and finds the samples of a WAV file.

Nothing here decodes audio; `pomelo.media.duration` measures the length of audio files.
"""

from __future__ import annotations

import re
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pomelo.audio_formats import SAMPLE_RATES
from pomelo.errors import invalid
from pomelo.media.media_types import MediaType
from pomelo.media.unsized import riff_chunks

_DEFAULT_RATE = 16_000
"""The sample rate of bare samples whose media type has none."""

_PCM = "audio/pcm"
_BIG_ENDIAN = "audio/l16"
_MU_LAW = "audio/basic"
_A_LAW = "audio/x-alaw-basic"
_ONE_BYTE = (_MU_LAW, _A_LAW)
_ONE_BYTE_RATE = 8000
_SAMPLE_TYPES = {
    **{name: name for name in (_PCM, _BIG_ENDIAN, _MU_LAW, _A_LAW)},
    "audio/x-pcm": _PCM,
    "audio/x-l16": _BIG_ENDIAN,
    **dict.fromkeys(("audio/pcmu", "audio/mulaw", "audio/x-mulaw", "audio/ulaw", "audio/x-ulaw"), _MU_LAW),
    **dict.fromkeys(("audio/pcma", "audio/alaw", "audio/x-alaw"), _A_LAW),
}
"""Name of a media type of bare samples -> the canonical name."""

_UNSUPPORTED_SAMPLES = re.compile(
    r"audio/(?:x-)?(?:l\d+|lpcm|linear\d*|raw|pcm[\w.-]*|[fsu]\d+(?:[bl]e)?|basic|u-?law|a-?law|mu-?law)"
    r"(?:[^\w.-].*)?",
    re.DOTALL,
)
"""Media types of bare samples that no provider takes, and malformed ones (`audio/pcm,rate=16000`). As unknown
bytes they would reserve hours of audio."""

BIG_ENDIAN_TYPES = {rate: f"{_BIG_ENDIAN};rate={rate}" for rate in SAMPLE_RATES}
"""Sample rate -> the canonical media type of big-endian samples (RFC 2586)."""

_WAV_ENCODINGS = {_PCM: 1, _BIG_ENDIAN: 1, _A_LAW: 6, _MU_LAW: 7}
"""Canonical name of a media type -> the encoding of its samples in a WAV file."""


@dataclass(frozen=True, slots=True)
class WavData:
    """The samples of a WAV file: first byte, number of bytes, bytes per second and bytes per sample."""

    start: int
    length: int
    per_second: int
    width: int


def sample_format(content_type: str) -> tuple[int, int] | None:
    """The sample rate and the bytes per sample of a canonical media type of bare samples; None for others."""
    name, _, rate = content_type.partition(";rate=")
    if name in (_PCM, _BIG_ENDIAN):
        return (int(rate) if rate.isdecimal() and 0 < len(rate) < 7 and int(rate) else _DEFAULT_RATE), 2
    return (_ONE_BYTE_RATE, 1) if name in _ONE_BYTE else None


def sample_type(media_type: MediaType) -> str | None:
    """The canonical media type of bare samples, such as audio/pcm;rate=16000; None for other media types.

    Raises:
        PomeloError: invalid_parameter; no provider takes such samples.
    """
    name = _SAMPLE_TYPES.get(media_type.name)
    if name is None:
        if _UNSUPPORTED_SAMPLES.fullmatch(media_type.name):
            raise invalid(
                "audio",
                "samples as audio/pcm (16-bit little-endian), audio/L16 (big-endian), audio/basic (mu-law), "
                "audio/x-alaw-basic (A-law), or a file with a header",
            )
        return None
    one_byte = name in _ONE_BYTE
    parameters = dict(media_type.parameters) if media_type.parameters is not None else {"": ""}
    if parameters.pop("channels", "1") != "1" or set(parameters) - {"rate"}:
        example = name if one_byte else f"{name};rate=16000"
        raise invalid(
            "audio",
            f"one channel of samples, each parameter once, such as {example}, or a file with a header",
        )
    rate = parameters.get("rate", str(_ONE_BYTE_RATE if one_byte else _DEFAULT_RATE))
    if rate not in map(str, (_ONE_BYTE_RATE,) if one_byte else SAMPLE_RATES):
        rates = str(_ONE_BYTE_RATE) if one_byte else ", ".join(map(str, SAMPLE_RATES))
        raise invalid("audio", f"bare samples of a known rate: {rates}")
    return name if one_byte else f"{name};rate={rate}"


def little_endian(content_type: str) -> str:
    """The media type of samples after `Swapper` has swapped their bytes; other media types are unchanged."""
    name, semicolon, rest = content_type.partition(";")
    return _PCM + semicolon + rest if name == _BIG_ENDIAN else content_type


def wav_header(content_type: str, size: int) -> bytes:
    """The header of a WAV file with `size` bytes of samples of a canonical media type, swapped if they are
    big-endian.

    Raises:
        ValueError: the media type is not one of bare samples.
    """
    samples = sample_format(content_type)
    if samples is None:
        raise ValueError(f"not bare samples: {content_type}")
    rate, width = samples
    encoding = _WAV_ENCODINGS[content_type.partition(";")[0]]
    return struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, encoding, 1, rate, rate * width, width, 8 * width),
        *(b"data", size),
    )


class Swapper:
    """Converts samples of the type audio/l16 to little-endian, chunk by chunk. Other data is unchanged."""

    def __init__(self, content_type: str) -> None:
        self._swaps = content_type.partition(";")[0] == _BIG_ENDIAN
        self._rest = b""

    def size(self, size: int) -> int:
        """The total bytes that `swap` returns for `size` bytes: half a sample at the end is dropped."""
        return size & ~1 if self._swaps else size

    def swap(self, data: bytes) -> bytes:
        """The samples that `data` completes, swapped."""
        if not self._swaps:
            return data
        data = self._rest + data
        complete = len(data) & ~1
        self._rest = data[complete:]
        samples = array("H", data[:complete])
        samples.byteswap()
        return samples.tobytes()


def wav_data(file: BinaryIO, size: int) -> WavData | None:
    """The samples of a WAV file; the size of a data chunk is cut to the end of the file."""
    per_second = width = 0
    for start, name, length in riff_chunks(file):
        if name == b"fmt " and len(content := file.read(16)) == 16:
            channels, rate, declared, _, bits = struct.unpack_from("<HIIHH", content, 2)
            width = bits // 8
            # Decoders ignore the declared bytes per second. Only compressed samples have no other.
            per_second = rate * channels * width or declared
        elif name == b"data":
            return WavData(start, min(length, size - start), per_second, width)
    return None


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Input audio: a file of the media store, or inline bytes. Exactly one of `path` and `data` is set.

    `ms` is its measured length in milliseconds, 0 if it can't be measured. Samples of the type audio/l16 are
    big-endian; `Swapper` converts them.
    """

    content_type: str
    size: int
    path: Path | None = None
    data: bytes = b""
    ms: int = 0
