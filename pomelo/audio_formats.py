"""The output formats of speech, such as mp3_44100_128: codec, sample rate in Hz, kbit/s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SAMPLE_RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Sample rates of bare samples, of the caller's audio and of speech, in Hz."""

_CONTENT_TYPES = {
    "pcm": "audio/pcm;rate={}",
    "wav": "audio/wav",
    "ulaw": "audio/basic",
    "alaw": "audio/x-alaw-basic",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
}
"""Codec -> its media type, with a place for the sample rate."""


@dataclass(frozen=True, slots=True)
class AudioFormat:
    """One output format, mono. `rate` is in samples per second; `kbits` is in kbit/s, 0 if the samples are
    not compressed."""

    name: str
    codec: str
    rate: int
    kbits: int
    content_type: str
    bytes_per_second: int
    """Without the bytes of a file's header."""
    is_bare: bool
    """Whether it consists of samples alone, without a header that describes them."""

    @classmethod
    def of(cls, output_format: str) -> AudioFormat:
        """Returns the format of that name; empty means the default.

        Raises:
            KeyError: there is no such format.
        """
        return AUDIO_FORMATS[output_format or DEFAULT_AUDIO_FORMAT]


def _parse(name: str) -> AudioFormat:
    codec, rate, *more = name.split("_")
    kbits = int(more[0]) if more else 0
    width = 1 if codec in ("ulaw", "alaw") else 2
    return AudioFormat(
        name=name,
        codec=codec,
        rate=int(rate),
        kbits=kbits,
        content_type=_CONTENT_TYPES[codec].format(rate),
        bytes_per_second=kbits * 125 if kbits else int(rate) * width,
        is_bare=codec in ("pcm", "ulaw", "alaw"),
    )


AUDIO_FORMATS: Mapping[str, AudioFormat] = {
    name: _parse(name)
    for name in (
        *[f"mp3_44100_{kbits}" for kbits in (32, 64, 96, 128, 192)],
        *["mp3_22050_32", "mp3_24000_48", "ulaw_8000", "alaw_8000"],
        *[f"{codec}_{rate}" for codec in ("pcm", "wav") for rate in SAMPLE_RATES],
        *[f"opus_48000_{kbits}" for kbits in (32, 64, 96, 128, 192)],
    )
}
"""The formats by their names."""

DEFAULT_AUDIO_FORMAT = "mp3_44100_128"
"""The output_format of speech if the caller does not set it."""

OUTPUT_FORMATS: Mapping[str, str] = {
    "mp3": DEFAULT_AUDIO_FORMAT,
    "opus": "opus_48000_64",
    "wav": "wav_24000",
    "pcm": "pcm_24000",
}
"""The output_format for a caller who names only a codec; bare samples are those of OpenAI."""
