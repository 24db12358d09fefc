"""Speech recognition of the sandbox: the text of audio that it made itself, invented words for any other; and
transcripts, with the times of the words in speech that the sandbox generates.

Nothing is decoded: the length was measured before, and audio of the sandbox contains its text.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

from pomelo.catalog.catalog import ENCODER_PADDING_MS
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, TimestampGranularity, Transcription
from pomelo.media import audio
from pomelo.providers.base import AudioSource
from pomelo.providers.sandbox import mp3, ogg, samples
from pomelo.providers.sandbox.speech import CHARACTER_SECONDS
from pomelo.providers.transcripts import add_word

MAX_TEXT_FILE_BYTES = 64 * 1024
"""Bytes of a text file that is accepted as audio because it begins with a trigger."""

_DEFAULT_RATE, _DEFAULT_WIDTH = 16_000, 2
"""Samples a second and bytes a sample of audio of an unknown format."""

_WORDS = (
    "amber", "river", "quiet", "lantern", "morning", "silver", "garden", "window",
    "distant", "music", "paper", "mountain", "gentle", "orange", "harbour", "winter",
    "letter", "copper", "island", "candle", "meadow", "velvet", "thunder", "pocket",
    "ribbon", "marble", "whisper", "summer", "bridge", "feather",
)  # fmt: skip

_WORD = re.compile(r"\S+")
_ENDS = (".", "!", "?", "…", "。", "\uff01", "\uff1f")
_SPEAKERS = 2


@dataclass(frozen=True, slots=True)
class Recognition:
    """What was recognized: the text, and the length of the audio in seconds."""

    text: str
    seconds: float


def recognize(source: AudioSource, limit: int) -> Recognition:
    """Recognizes audio of at most `limit` seconds (0: any length). Blocks on the disk.

    Raises:
        PomeloError: invalid_parameter, the audio is empty or too long; store_unavailable, it can't be read.
    """
    if not source.size:
        raise invalid("audio", "audio that is not empty")
    try:
        with source.path.open("rb") if source.path is not None else BytesIO(source.data) as file:
            text, seconds = _read(file, source)
            if limit and seconds * 1000 > limit * 1000 + ENCODER_PADDING_MS:
                raise invalid("audio", f"audio of at most {limit} seconds", maximum=limit)
            return Recognition(text or _invent(file, seconds), seconds)
    except OSError as error:
        raise PomeloError("store_unavailable") from error


def speech_seconds(text: str, speed: float = 1) -> float:
    """How long the speech of a text is: 60 ms a character at speed 1, at least 0.3 s."""
    return max(0.3, len(text) * CHARACTER_SECONDS / speed)


def _read(file: BinaryIO, source: AudioSource) -> tuple[str | None, float]:
    """The text, None for audio that contains none, and the length in seconds."""
    head = file.read(samples.MAX_EMBEDDED_BYTES + 4096)
    text = _trigger_text(head, source.size)
    if text is not None:
        return text, speech_seconds(text)
    text, rate, width = _embedded_text(file, head, source.size, source.content_type)
    return text, source.ms / 1000 if source.ms else source.size / (rate * width)


def _embedded_text(file: BinaryIO, head: bytes, size: int, content_type: str) -> tuple[str | None, int, int]:
    """The embedded text, and the samples a second and bytes a sample to assume for unmeasured audio."""
    default = _DEFAULT_RATE, _DEFAULT_WIDTH
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        data = audio.wav_data(file, size)
        found = samples.extract(head[data.start :], 2) if data is not None and data.width == 2 else None
        return (found[0] if found else None), *default
    if head.startswith(b"OggS"):
        return ogg.read_text(head), *default
    raw = audio.sample_format(content_type)
    head = audio.Swapper(content_type).swap(head)
    for width in (2, 1) if raw is None else (raw[1],):
        found = samples.extract(head, width)
        if found is not None:
            return *found, width
    return (mp3.read_text(head) if raw is None else None), *default


def _trigger_text(head: bytes, size: int) -> str | None:
    """The content of a text file that begins with a trigger, else None."""
    if head.startswith(b"[[") and size <= MAX_TEXT_FILE_BYTES:
        try:
            return head.decode().strip()
        except UnicodeDecodeError:
            pass
    return None


def _invent(file: BinaryIO, seconds: float) -> str:
    """Words for audio without a text: the same for the same bytes, more for longer audio."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").digest()  # type: ignore[arg-type]
    count = min(max(int(seconds * 2.5), 3), 60)
    words = [_WORDS[(digest[index % 32] + index) % len(_WORDS)] for index in range(count)]
    sentences = [" ".join(words[start : start + 10]).capitalize() for start in range(0, count, 10)]
    return ". ".join(sentences) + "."


def transcribe(text: str, seconds: float, given: SpeechToTextInput) -> Transcription:
    """The transcript of `text`, spoken in `seconds`, with the timestamps and speakers that `given` requests.

    Every character takes the same time. With diarization, the speakers alternate by sentence.
    """
    language = given.language_code or "en"
    transcription = Transcription(text=text, language_code=language, audio_seconds=seconds)
    if given.timestamps == TimestampGranularity.TIMESTAMP_GRANULARITY_NONE:
        return transcription
    each = seconds / len(text) if text else 0.0
    by_character = given.timestamps == TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER
    speakers = 0
    if given.diarize:
        speakers = min(given.num_speakers, _SPEAKERS) if given.HasField("num_speakers") else _SPEAKERS
    sentence = 0
    for match in _WORD.finditer(text):
        start, end = match.span()
        speaker = f"speaker_{sentence % speakers}" if speakers else ""
        if by_character:
            for index in range(start, end):
                add_word(transcription, text[index], _time(index * each), _time((index + 1) * each), speaker)
        else:
            add_word(transcription, match[0], _time(start * each), _time(end * each), speaker)
        if match[0].endswith(_ENDS):
            sentence += 1
    return transcription


def _time(seconds: float) -> float:
    return round(seconds, 3)
