"""What the sandbox hears in a sound that it is given: what it says, and how long it is.

`provider.py` calls `listen` in a worker thread. Nothing is decoded: the length was measured before,
and audio made by the sandbox contains its words as text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from pomelo.catalog.catalog import ENCODER_PADDING_MS
from pomelo.errors import PomeloError, invalid
from pomelo.media import audio
from pomelo.providers.base import AudioSource
from pomelo.providers.sandbox import mp3, ogg, samples
from pomelo.providers.sandbox.melody import CHARACTER_SECONDS

SCRIPT_MOST = 64 * 1024
"""Bytes of a text that passes for a sound because it begins with a trigger."""

_UNKNOWN = (16_000, 2)
_WORDS = (
    "amber", "river", "quiet", "lantern", "morning", "silver", "garden", "window",
    "distant", "music", "paper", "mountain", "gentle", "orange", "harbour", "winter",
    "letter", "copper", "island", "candle", "meadow", "velvet", "thunder", "pocket",
    "ribbon", "marble", "whisper", "summer", "bridge", "feather",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Heard:
    """A sound's words and its length in seconds."""

    text: str
    seconds: float


def listen(source: AudioSource, most: int) -> Heard:
    """Hears a sound of at most `most` seconds (0: any length). Blocks on the disk.

    Raises:
        PomeloError: invalid_parameter when it is empty or too long; store_unavailable.
    """
    if not source.size:
        raise invalid("audio", "a sound that is not empty")
    try:
        with source.path.open("rb") if source.path is not None else BytesIO(source.data) as file:
            text, seconds = _hear(file, source.size, source.content_type, source.ms)
            if most and seconds * 1000 > most * 1000 + ENCODER_PADDING_MS:
                raise invalid("audio", f"a sound of at most {most} seconds")
            return Heard(text or _invent(file, seconds), seconds)
    except OSError as error:
        raise PomeloError("store_unavailable") from error


def spoken_seconds(text: str, speed: float = 1) -> float:
    """How long the sandbox takes to say a text: 60 ms a character, 0.3 s at the least."""
    return max(0.3, len(text) * CHARACTER_SECONDS / speed)


def _hear(file: BinaryIO, size: int, content_type: str, ms: int) -> tuple[str | None, float]:
    head = file.read(samples.MOST + 4096)
    script = _script(head, size)
    if script is not None:
        return script, spoken_seconds(script)
    text, rate, width = _text(file, head, size, content_type)
    return text, ms / 1000 if ms else size / (rate * width)


def _text(file: BinaryIO, head: bytes, size: int, content_type: str) -> tuple[str | None, int, int]:
    """What the sandbox hid in a sound of its own, and the samples a second and bytes a sample of a sound that
    doesn't tell them."""
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        data = audio.wav_data(file, size)
        found = samples.recover(head[data.start :], 2) if data is not None and data.width == 2 else None
        return (found[0] if found else None), *_UNKNOWN
    if head.startswith(b"OggS"):
        return ogg.read_text(head), *_UNKNOWN
    raw = audio.sample_format(content_type)
    head = audio.Swapper(content_type).swap(head)
    for width in (2, 1) if raw is None else (raw[1],):
        found = samples.recover(head, width)
        if found is not None:
            return found[0], found[1], width
    return (mp3.read_text(head) if raw is None else None), *_UNKNOWN


def _script(head: bytes, size: int) -> str | None:
    if head.startswith(b"[[") and size <= SCRIPT_MOST:
        try:
            return head.decode().strip()
        except UnicodeDecodeError:
            pass
    return None


def _invent(file: BinaryIO, seconds: float) -> str:
    """Words for a sound that bears none: the same for the same bytes, more for a longer sound."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]
    count = min(max(int(seconds * 2.5), 3), 60)
    words = [_WORDS[(digest[index % 32] + index) % len(_WORDS)] for index in range(count)]
    sentences = [" ".join(words[start : start + 10]).capitalize() for start in range(0, count, 10)]
    return ". ".join(sentences) + "."
