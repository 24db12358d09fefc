"""Parses media types of bare samples, and finds the samples of a WAV file.

`pomelo.media.duration` measures the length of audio files; nothing here decodes audio.
"""

from __future__ import annotations

import re
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pomelo.errors import invalid
from pomelo.media.media_types import MediaType

RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Samples a second that bare samples may have."""

_RATE = 16_000
"""Samples a second of bare samples whose type doesn't say."""

_PCM = "audio/pcm"
_BIG_ENDIAN = "audio/l16"
_MU_LAW = "audio/basic"
_A_LAW = "audio/x-alaw-basic"
_ONE_BYTE = (_MU_LAW, _A_LAW)
_ONE_BYTE_RATE = 8000
_SAMPLES = {
    **{name: name for name in (_PCM, _BIG_ENDIAN, _MU_LAW, _A_LAW)},
    "audio/x-pcm": _PCM,
    "audio/x-l16": _BIG_ENDIAN,
    **dict.fromkeys(("audio/pcmu", "audio/mulaw", "audio/x-mulaw", "audio/ulaw", "audio/x-ulaw"), _MU_LAW),
    **dict.fromkeys(("audio/pcma", "audio/alaw", "audio/x-alaw"), _A_LAW),
}
"""Names of media types of bare samples -> the canonical name."""

_OTHER_SAMPLES = re.compile(r"audio/(?:x-)?(?:l\d+|lpcm|linear\d*|raw|pcm[\w.-]*|[fsu]\d+(?:[bl]e)?)")
"""Media types of bare samples that no provider takes. As unknown bytes they would be held for hours."""

BIG_ENDIAN_TYPES = {rate: f"{_BIG_ENDIAN};rate={rate}" for rate in RATES}
"""The canonical media types of big-endian samples (RFC 2586), by rate."""

_CHUNKS = 1000


@dataclass(frozen=True, slots=True)
class WavData:
    """Where the samples of a WAV file are: first byte, bytes, bytes a second, bytes a sample."""

    start: int
    length: int
    per_second: int
    width: int


def raw(content_type: str) -> tuple[int, int] | None:
    """Samples a second and bytes a sample, where a canonical media type says that audio is bare samples."""
    name, _, rate = content_type.partition(";rate=")
    if name in (_PCM, _BIG_ENDIAN):
        return (int(rate) if rate.isdecimal() and 0 < len(rate) < 7 and int(rate) else _RATE), 2
    return (_ONE_BYTE_RATE, 1) if name in _ONE_BYTE else None


def raw_type(named: MediaType) -> str | None:
    """The canonical media type of bare samples, such as audio/pcm;rate=16000; None for other media types.

    Raises:
        PomeloError: invalid_parameter; samples that no provider takes.
    """
    name = _SAMPLES.get(named.name)
    if name is None:
        if _OTHER_SAMPLES.fullmatch(named.name):
            raise invalid(
                "audio",
                "samples as audio/pcm (16-bit little-endian), audio/L16 (big-endian), audio/basic (mu-law), "
                "audio/x-alaw-basic (A-law), or a file with a header",
            )
        return None
    one_byte = name in _ONE_BYTE
    given = dict(named.parameters) if named.parameters is not None else {"": ""}
    if given.pop("channels", "1") != "1" or set(given) - {"rate"}:
        example = name if one_byte else f"{name};rate=16000"
        raise invalid(
            "audio",
            f"one channel of samples, each parameter once, such as {example}, or a file with a header",
        )
    rate = given.get("rate", str(_ONE_BYTE_RATE if one_byte else _RATE))
    if rate not in map(str, (_ONE_BYTE_RATE,) if one_byte else RATES):
        rates = str(_ONE_BYTE_RATE) if one_byte else ", ".join(map(str, RATES))
        raise invalid("audio", f"bare samples of a known rate: {rates}")
    return name if one_byte else f"{name};rate={rate}"


def little_endian(content_type: str) -> str:
    """The media type of samples once `Swapper` has swapped their bytes; other media types are unchanged."""
    name, semicolon, rest = content_type.partition(";")
    return _PCM + semicolon + rest if name == _BIG_ENDIAN else content_type


class Swapper:
    """Swaps the bytes of 16-bit samples, piece by piece, where their canonical media type is audio/l16."""

    def __init__(self, content_type: str) -> None:
        self._swaps = content_type.partition(";")[0] == _BIG_ENDIAN
        self._rest = b""

    def size(self, size: int) -> int:
        """The bytes that `swap` returns of so many in total: half a sample at the end is dropped."""
        return size & ~1 if self._swaps else size

    def swap(self, data: bytes) -> bytes:
        """The samples that are complete so far."""
        if not self._swaps:
            return data
        data = self._rest + data
        whole = len(data) & ~1
        self._rest = data[whole:]
        samples = array("H", data[:whole])
        samples.byteswap()
        return samples.tobytes()


def wav_data(file: BinaryIO, size: int) -> WavData | None:
    """The samples of a WAV file; a data chunk that claims more than there is has what there is."""
    place, per_second, width = 12, 0, 0
    for _ in range(_CHUNKS):
        file.seek(place)
        chunk = file.read(8 + 16)
        if len(chunk) < 8:
            break
        name, length = struct.unpack_from("<4sI", chunk)
        place += 8
        if name == b"fmt " and len(chunk) == 24:
            per_second = int.from_bytes(chunk[16:20], "little")
            width = int.from_bytes(chunk[22:24], "little") // 8
        elif name == b"data":
            return WavData(place, min(length, size - place), per_second, width)
        place += length + length % 2
    return None


@dataclass(frozen=True, slots=True)
class AudioSource:
    """Input audio: a file of the media store, or bytes that came inline. Exactly one of the two is set.

    `ms` is its measured length in milliseconds, 0 if it can't be measured. Samples of the type audio/l16 are
    big-endian; `Swapper` swaps their bytes.
    """

    content_type: str
    size: int
    path: Path | None = None
    data: bytes = b""
    ms: int = 0
