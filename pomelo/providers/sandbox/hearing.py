"""What the sandbox hears in a sound that it is given: how long it is, and what it says.

`provider.py` calls `listen` in a worker thread. Bytes of callers are only ever measured here, by their
headers, in plain Python: nothing decodes them.
"""

import hashlib
import math
import struct
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from pomelo.errors import PomeloError, invalid
from pomelo.providers.base import AudioSource
from pomelo.providers.sandbox import mp3, ogg, samples
from pomelo.providers.sandbox.melody import CHARACTER_SECONDS

SCRIPT_MOST = 64 * 1024
"""Bytes of a text that passes for a sound because it begins with a trigger."""

_RAW = {"audio/basic": (8000, 1), "audio/x-alaw-basic": (8000, 1)}
_UNKNOWN = (16_000, 2)
_LOOKS = 20_000
_CHUNKS = 1000
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


def listen(audio: AudioSource, most: int) -> Heard:
    """Hears a sound of at most `most` seconds (0: any length). Blocks on the disk.

    Raises:
        PomeloError: invalid_parameter when it is empty or too long; store_unavailable.
    """
    if not audio.size:
        raise invalid("audio", "a sound that is not empty")
    try:
        with audio.path.open("rb") if audio.path is not None else BytesIO(audio.data) as file:
            text, seconds = _hear(file, audio.size, audio.content_type)
            if seconds > most > 0:
                raise invalid("audio", f"a sound of at most {most} seconds")
            return Heard(text or _invent(file, seconds), seconds)
    except OSError as error:
        raise PomeloError("store_unavailable") from error


def spoken_seconds(text: str, speed: float = 1) -> float:
    """How long the sandbox takes to say a text: 60 ms a character, 0.3 s at the least."""
    return max(0.3, len(text) * CHARACTER_SECONDS / speed)


def _hear(file: BinaryIO, size: int, content_type: str) -> tuple[str | None, float]:
    head = file.read(samples.MOST + 4096)
    script = _script(head, size)
    if script is not None:
        return script, spoken_seconds(script)
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return _wav(file, head, size)
    if head.startswith(b"OggS"):
        return ogg.read_text(head), ogg.seconds(file, size) or _raw_seconds(size, *_UNKNOWN)
    named = _named(content_type)
    for width in (2, 1) if named is None else (named[1],):
        found = samples.recover(head, width)
        if found is not None:
            return found[0], _raw_seconds(size, *(named or (found[1], width)))
    if named is not None:
        return None, _raw_seconds(size, *named)
    return mp3.read_text(head), _tagged_seconds(file) or _raw_seconds(size, *_UNKNOWN)


def _script(head: bytes, size: int) -> str | None:
    if head.startswith(b"[[") and size <= SCRIPT_MOST:
        try:
            return head.decode().strip()
        except UnicodeDecodeError:
            pass
    return None


def _named(content_type: str) -> tuple[int, int] | None:
    """Samples a second and bytes a sample, where the media type says that a sound is raw."""
    kind, _, rate = content_type.partition(";rate=")
    if kind == "audio/pcm":
        return (int(rate) if rate.isdecimal() and 0 < len(rate) < 7 and int(rate) else _UNKNOWN[0]), 2
    return _RAW.get(kind)


def _raw_seconds(size: int, rate: int, width: int) -> float:
    return size / (rate * width)


def _wav(file: BinaryIO, head: bytes, size: int) -> tuple[str | None, float]:
    """Walks the chunks; a data chunk that claims more than there is has what there is."""
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
            text = samples.recover(head[place:], 2) if width == 2 else None
            seconds = min(length, size - place) / per_second if per_second else 0.0
            return text[0] if text else None, seconds or _raw_seconds(size, *_UNKNOWN)
        place += length + length % 2
    return None, _raw_seconds(size, *_UNKNOWN)


def _tagged_seconds(file: BinaryIO) -> float | None:
    """The length of a file that tinytag knows: MP3, FLAC, MP4 and some more."""
    from tinytag import TinyTag, TinyTagException

    file.seek(0)
    try:
        seconds = TinyTag.get(file_obj=_Bounded(file), tags=False).duration  # type: ignore[arg-type]
    except TinyTagException:
        return None
    return seconds if seconds is not None and math.isfinite(seconds) and seconds > 0 else None


class _Bounded:
    """A file that can be looked at so often and not more: garbage can make a parser crawl through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = _LOOKS

    def read(self, size: int = -1) -> bytes:
        """As of a file."""
        self._left -= 1
        if self._left < 0:
            raise ValueError("too many looks")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As of a file."""
        return self._file.tell()


def _invent(file: BinaryIO, seconds: float) -> str:
    """Words for a sound that bears none: the same for the same bytes, more for a longer sound."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]
    count = min(max(int(seconds * 2.5), 3), 60)
    words = [_WORDS[(digest[index % 32] + index) % len(_WORDS)] for index in range(count)]
    sentences = [" ".join(words[start : start + 10]).capitalize() for start in range(0, count, 10)]
    return ". ".join(sentences) + "."
