"""What ElevenLabs answers: sounds, and transcripts; `elevenlabs` reads them with this.

It knows neither a request nor a connection.
"""

import re
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from pomelo.audio import FRAME_STARTS
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Timestamps, Transcription
from pomelo.media import sniff
from pomelo.providers.base import Event
from pomelo.providers.failures import Dialect, complained, nonsense
from pomelo.providers.parsing import parse

PIECE = 64 * 1024
"""The most bytes of a piece of sound."""

SOUND_MOST = 512 * 1024 * 1024
"""Bytes of a sound: more than an hour of the largest format."""

_SECONDS_MOST = 1_000_000.0
"""More than any sound lasts: a length above it is a fault."""

_CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "opus": "audio/ogg",
    "ulaw": "audio/basic",
    "alaw": "audio/x-alaw-basic",
}
_CONTAINERS = frozenset(("mp3", "wav", "opus"))
_MARK = 12
"""Bytes at the beginning of a file that tell what it is."""

_SAMPLES = re.compile(r"audio/(pcm|l16|basic|x-alaw-basic|pcma|pcmu|(x-)?mulaw|(x-)?alaw)")
"""Content types of bare samples."""

_TEXT = re.compile(
    rb"(\xef\xbb\xbf)?[\t\n\r -~]+|\xff\xfe([\t\n\r -~]\0)+.?|\xfe\xff(\0[\t\n\r -~])+\0?", re.DOTALL
)
_GZIP = b"\x1f\x8b\x08"
_TEXT_MOST = 64
"""First bytes that are looked at: samples are not text for so long."""


def content_type(wanted: str, head: bytes = b"") -> str:
    """The media type of a sound in an output_format. Its first bytes, `head`, outweigh what was asked for.

    The vendor doesn't say, for example, what Opus comes in.
    """
    codec, rate, *_ = wanted.split("_")
    return sniff(f"audio/pcm;rate={rate}" if codec == "pcm" else _CONTENT_TYPES[codec], head[:16])


class Sound:
    """A sound as it comes, cut into events.

    A sound has no end marker: that it is whole is known from the framing of the answer alone, so one without
    a length and without chunks is refused.
    """

    __slots__ = ("_head", "_left", "_needed", "_samples", "_started", "_wanted")

    def __init__(self, wanted: str, headers: Mapping[str, str], most: int = SOUND_MOST) -> None:
        """An answer with these headers, in the output_format `wanted`, of at most `most` bytes.

        Raises:
            PomeloError: provider_failed; it is no sound.
        """
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind.startswith("text/") or kind.endswith(("json", "xml")):
            raise nonsense("an answer that is no sound")
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise nonsense("an answer that is compressed unasked")
        if "Content-Length" not in headers and "chunked" not in headers.get("Transfer-Encoding", "").lower():
            raise nonsense("an answer whose end can't be told")
        self._wanted = wanted
        self._left = most
        self._head = b""
        self._started = False
        bare = wanted.partition("_")[0] not in _CONTAINERS
        # Samples have no mark. They may begin like a text; with a content type of samples they are no text.
        self._samples = bare and _SAMPLES.fullmatch(kind) is not None
        self._needed = 1 if self._samples else _MARK

    def take(self, piece: bytes) -> Iterator[Event]:
        """The events for the next bytes.

        Raises:
            PomeloError: provider_failed; the first bytes are a page's or an object's, or there are too many.
        """
        self._left -= len(piece)
        if self._left < 0:
            raise nonsense("a sound above the limit")
        kind = ""
        if not self._started:
            piece = self._head + piece
            if len(piece) < self._needed:
                self._head = piece
                return
            if not self._is_sound(piece[:_TEXT_MOST]):
                raise nonsense("an answer that is no sound")
            self._started = True
            self._head = b""
            kind = content_type(self._wanted, piece)
        for start in range(0, len(piece), PIECE):
            event = Event()
            event.audio_chunk.data = piece[start : start + PIECE]
            if kind:
                event.audio_chunk.content_type = kind
                kind = ""
            yield event

    def rest(self) -> Iterator[Event]:
        """The events at the end: none.

        Raises:
            PomeloError: provider_failed; nothing has come, or less than any file has.
        """
        if not self._started:
            raise nonsense("an empty sound")
        return iter(())

    def _is_sound(self, head: bytes) -> bool:
        """Whether an answer that begins with `head` can be audio: files have a mark, samples have none."""
        if self._wanted.partition("_")[0] in _CONTAINERS:
            return head.startswith(FRAME_STARTS) or sniff("", head).startswith("audio/")
        return self._samples or not (head.startswith(_GZIP) or _TEXT.fullmatch(head))


def transcription(
    answer: bytes, given: SpeechToTextInput, dialect: Dialect, sent_ms: int = 0
) -> Transcription:
    """The transcript of an answer.

    Words and characters alone: no spaces, no noises. A time that is missing is that of the word before.
    `sent_ms` is the length of the audio that was sent, 0 if it is unknown.

    Raises:
        PomeloError: provider_failed where it is unusable; what an error object in its place means.
    """
    try:
        body = parse(answer)
        if "text" not in body and "detail" in body:
            raise complained(body, dialect)
        # Set apart, because the constructor takes None for a text that is not there.
        said = Transcription(language=body.get("language_code") or "")
        said.text = body["text"]
        end = _add_words(said, body.get("words") or (), given)
        length = body.get("audio_duration_secs")
        # If it is missing, as for silence, use the sent length: words may end long before it.
        otherwise = sent_ms / 1000 or end
        said.audio_seconds = otherwise if length is None else _seconds(length, otherwise)
        return said
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise nonsense("a transcript of another shape")


def _add_words(said: Transcription, words: Any, given: SpeechToTextInput) -> float:
    """Adds what the caller asked for; gives the end of the last word."""
    timed = given.timestamps != Timestamps.TIMESTAMPS_NONE
    by_character = given.timestamps == Timestamps.TIMESTAMPS_CHARACTER
    last = 0.0
    for word in words:
        start = _seconds(word.get("start"), last)
        end = max(_seconds(word.get("end"), start), start)
        if timed and word.get("type", "word") == "word":
            # Without diarize the vendor still names one speaker for all.
            speaker = (word.get("speaker_id") or "") if given.diarize else ""
            if by_character and word.get("characters"):
                at = start
                for character in word["characters"]:
                    begun = _seconds(character.get("start"), at)
                    at = max(_seconds(character.get("end"), begun), begun)
                    said.words.add(start=begun, end=at, speaker=speaker).text = character["text"]
            else:
                said.words.add(start=start, end=end, speaker=speaker).text = word["text"]
        last = max(last, end)
    return last


def _seconds(value: Any, otherwise: float) -> float:
    """A time that can be true, or `otherwise`.

    Raises:
        TypeError: it is no number.
    """
    if value is None:
        return otherwise
    if type(value) is not float and type(value) is not int:
        raise TypeError
    # The bounds come first: a whole number may be too large for a float.
    return float(value) if 0 <= value <= _SECONDS_MOST and isfinite(value) else otherwise
