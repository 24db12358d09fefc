"""Parses media types of bare samples, and finds the samples of a WAV file.

`pomelo.measure` measures the length of audio files; nothing here decodes audio.
"""

import re
import struct
from array import array
from dataclasses import dataclass
from typing import BinaryIO

from pomelo.errors import invalid

RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Samples a second that bare samples may have."""

FRAME_STARTS = (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2",
                b"\xff\xf1", b"\xff\xf9", b"\x0b\x77", b"#!AMR", b"\x7f\xfe\x80\x01")  # fmt: skip
"""First bytes of MP3, ADTS, AC-3, AMR and DTS files. Samples may match by chance: frames decide."""

_RATE = 16_000
"""Samples a second of bare samples whose type doesn't say."""

_PCM = "audio/pcm"
_BIG_ENDIAN = "audio/l16"
_ONE_BYTE = {"audio/basic": 8000, "audio/x-alaw-basic": 8000}
_PARAMETER = re.compile(r";([a-z]+)=([a-z0-9]{1,12})")
_TYPE = re.compile(r"audio/[a-z0-9-]+((?:;[a-z]+=[a-z0-9]{1,12})*)")
_CHUNKS = 1000


@dataclass(frozen=True, slots=True)
class WavData:
    """Where the samples of a WAV file are: first byte, bytes, bytes a second, bytes a sample."""

    start: int
    length: int
    per_second: int
    width: int


def raw(content_type: str) -> tuple[int, int] | None:
    """Samples a second and bytes a sample, where the media type says that audio is bare samples."""
    kind, _, rate = content_type.partition(";rate=")
    if kind == _PCM:
        return (int(rate) if rate.isdecimal() and 0 < len(rate) < 7 and int(rate) else _RATE), 2
    width = _ONE_BYTE.get(kind)
    return None if width is None else (width, 1)


def raw_type(named: str) -> str | None:
    """The canonical media type of bare samples; None for other media types.

    `named` is in lower case and without spaces. Parameters come in any order; one channel is understood. The
    big-endian samples of audio/L16 become audio/pcm: `Swapper` swaps their bytes.

    Raises:
        PomeloError: invalid_parameter; samples that no provider takes.
    """
    kind = named.partition(";")[0]
    if kind not in (_PCM, _BIG_ENDIAN) and kind not in _ONE_BYTE:
        return None
    match = _TYPE.fullmatch(named)
    given = dict(_PARAMETER.findall(match[1])) if match is not None else {}
    if match is None or given.pop("channels", "1") != "1" or set(given) - {"rate"}:
        raise invalid("audio", f"one channel of samples, such as {kind};rate=16000, or a file with a header")
    rate = given.pop("rate", str(_ONE_BYTE.get(kind, _RATE)))
    if rate not in map(str, (8000,) if kind in _ONE_BYTE else RATES):
        raise invalid("audio", f"bare samples of a known rate: {', '.join(map(str, RATES))}")
    return kind if kind in _ONE_BYTE else f"{_PCM};rate={rate}"


class Swapper:
    """Swaps the bytes of 16-bit samples, piece by piece, where their media type is audio/L16 (RFC 2586)."""

    def __init__(self, named: str) -> None:
        self._swaps = named.partition(";")[0].strip().lower() == _BIG_ENDIAN
        self._rest = b""

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
