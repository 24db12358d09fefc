"""What ElevenLabs answers: sounds, and transcripts; `elevenlabs` reads them with this.

It knows neither a request nor a connection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Timestamps, Transcription
from pomelo.media.content_types import sniff
from pomelo.providers.base import Event
from pomelo.providers.http.errors import ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import parse

PIECE = 64 * 1024
"""The most bytes of a piece of sound."""

SOUND_MOST = 512 * 1024 * 1024
"""Bytes of a sound: more than an hour of the largest format."""

_FRAME_STARTS = (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2",
                 b"\xff\xf1", b"\xff\xf9")  # fmt: skip
"""First bytes of MP3 and ADTS files."""

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
            raise malformed_response("an answer that is no sound")
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise malformed_response("an answer that is compressed unasked")
        if "Content-Length" not in headers and "chunked" not in headers.get("Transfer-Encoding", "").lower():
            raise malformed_response("an answer whose end can't be told")
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
            raise malformed_response("a sound above the limit")
        kind = ""
        if not self._started:
            piece = self._head + piece
            if len(piece) < self._needed:
                self._head = piece
                return
            if not self._is_sound(piece[:_TEXT_MOST]):
                raise malformed_response("an answer that is no sound")
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
            raise malformed_response("an empty sound")
        return iter(())

    def _is_sound(self, head: bytes) -> bool:
        """Whether an answer that begins with `head` can be audio: files have a mark, samples have none."""
        if self._wanted.partition("_")[0] in _CONTAINERS:
            return head.startswith(_FRAME_STARTS) or sniff("", head).startswith("audio/")
        return self._samples or not (head.startswith(_GZIP) or _TEXT.fullmatch(head))


def transcription(answer: bytes, given: SpeechToTextInput, dialect: ErrorMapping) -> Transcription:
    """The transcript of an answer.

    Words and characters alone: no spaces, no noises. The text has been paid for, so anything else that can't
    be read is left out or repaired: a word without a text is skipped, an impossible time is that of the word
    before. `audio_seconds` is 0 where the vendor tells no length.

    Raises:
        PomeloError: provider_failed where it has no text; what an error object in its place means.
    """
    try:
        body = parse(answer)
        if "text" not in body and "detail" in body:
            raise from_error_body(body, dialect)
        said = Transcription(language=_string(body.get("language_code")))
        # Set apart, because the constructor takes None for a text that is not there.
        said.text = body["text"]
        said.audio_seconds = _seconds(body.get("audio_duration_secs"), 0.0)
        if given.timestamps != Timestamps.TIMESTAMPS_NONE:
            _add_words(said, _objects(body.get("words")), given)
        return said
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise malformed_response("a transcript of another shape")


def _add_words(said: Transcription, words: Iterable[dict[str, Any]], given: SpeechToTextInput) -> None:
    """Adds what the caller asked for."""
    by_character = given.timestamps == Timestamps.TIMESTAMPS_CHARACTER
    last = 0.0
    for word in words:
        start = _seconds(word.get("start"), last)
        end = max(_seconds(word.get("end"), start), start)
        last = max(last, end)
        kind = word.get("type")
        if isinstance(kind, str) and kind != "word":
            continue
        # Without diarize the vendor still names one speaker for all.
        speaker = _string(word.get("speaker_id")) if given.diarize else ""
        characters = list(_objects(word.get("characters"))) if by_character else []
        at = start
        for part in characters or (word,):
            begun = _seconds(part.get("start"), at)
            at = max(_seconds(part.get("end"), begun), begun)
            text = part.get("text")
            if isinstance(text, str):
                said.words.add(start=begun, end=at, speaker=speaker).text = text


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    """The objects of a list; none if it is no list."""
    return (value for value in values if isinstance(value, dict)) if isinstance(values, list) else iter(())


def _string(value: Any) -> str:
    """A name, also where it is a number; empty for anything else."""
    return str(value) if isinstance(value, str) or (type(value) is int and abs(value) < 2**63) else ""


def _seconds(value: Any, otherwise: float) -> float:
    """A time that can be true, also where it is a number as text; or `otherwise`."""
    try:
        number = float(value) if isinstance(value, str) or type(value) in (float, int) else -1.0
    except (OverflowError, ValueError):
        return otherwise
    return number if 0 <= number <= _SECONDS_MOST else otherwise  # false for NaN
