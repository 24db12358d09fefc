"""Parses the responses of ElevenLabs: audio and transcripts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pomelo.audio_formats import AudioFormat
from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, TimestampGranularity, Transcription
from pomelo.media.content_types import HEAD_BYTES, sniff
from pomelo.providers.base import Event
from pomelo.providers.http.errors import ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import parse
from pomelo.providers.transcripts import add_word

MAX_AUDIO_BYTES = 512 * 1024 * 1024
"""The largest audio file: more than an hour of the largest format."""

_FRAME_STARTS = (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2",
                 b"\xff\xf1", b"\xff\xf9")  # fmt: skip
"""First bytes of MP3 and ADTS files."""

_MAX_SECONDS = 1_000_000.0
"""Longer than any audio: a larger number is wrong."""

_SIGNATURE_BYTES = 12
"""Bytes of the shortest file, which suffice to recognize any format."""

_RAW_TYPES = re.compile(r"audio/(pcm|l16|basic|x-alaw-basic|pcma|pcmu|(x-)?mulaw|(x-)?alaw)")
"""Content types of raw samples."""

_TEXT = re.compile(
    rb"(\xef\xbb\xbf)?[\t\n\r -~]+|\xff\xfe([\t\n\r -~]\0)+.?|\xfe\xff(\0[\t\n\r -~])+\0?", re.DOTALL
)
_GZIP = b"\x1f\x8b\x08"
_CHECKED_BYTES = 64
"""First bytes that are checked: raw samples are never text for so long."""


class AudioStream:
    """Checks streamed audio, and makes events of it.

    Audio has no end marker: only the framing of the HTTP response shows that it is complete, so a response
    with neither a length nor chunks is refused.
    """

    __slots__ = ("_format", "_head", "_left", "_min_bytes", "_raw", "_started")

    def __init__(
        self, audio_format: AudioFormat, headers: Mapping[str, str], max_bytes: int = MAX_AUDIO_BYTES
    ) -> None:
        """A response with these headers, in `audio_format`, of at most `max_bytes`.

        Raises:
            UpstreamError: provider_failed; the response is not audio.
        """
        content_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if content_type.startswith("text/") or content_type.endswith(("json", "xml")):
            raise malformed_response("a response that is not audio")
        if headers.get("Content-Encoding", "").strip().lower() not in ("", "identity"):
            raise malformed_response("a response that is compressed without a request for it")
        if "Content-Length" not in headers and "chunked" not in headers.get("Transfer-Encoding", "").lower():
            raise malformed_response("a response whose end is not marked")
        self._format = audio_format
        self._left = max_bytes
        self._head = b""
        self._started = False
        # Raw samples have no signature, and may begin like a text. Only their content type rules that out.
        self._raw = audio_format.is_bare and _RAW_TYPES.fullmatch(content_type) is not None
        self._min_bytes = 1 if self._raw else _SIGNATURE_BYTES

    def feed(self, data: bytes) -> Event | None:
        """Return the event for the next bytes; None if there are too few.

        Raises:
            UpstreamError: provider_failed; the first bytes are text or JSON, or there are too many bytes.
        """
        self._left -= len(data)
        if self._left < 0:
            raise malformed_response("audio above the limit")
        content_type = ""
        if not self._started:
            data = self._head + data
            if len(data) < self._min_bytes:
                self._head = data
                return None
            if not self._is_audio(data[:_CHECKED_BYTES]):
                raise malformed_response("a response that is not audio")
            self._started = True
            self._head = b""
            # The vendor does not document, for example, the container of Opus.
            content_type = sniff(self._format.content_type, data[:HEAD_BYTES])
        event = Event()
        event.audio_chunk.data = data
        if content_type:
            event.audio_chunk.content_type = content_type
        return event

    def end(self) -> None:
        """Check the audio at the end of the response.

        Raises:
            UpstreamError: provider_failed; the response is empty, or shorter than any file.
        """
        if not self._started:
            raise malformed_response("empty audio")

    def _is_audio(self, head: bytes) -> bool:
        """Whether a response that begins with `head` can be audio: files have a signature, raw samples have
        none."""
        if self._format.is_bare:
            return self._raw or not (head.startswith(_GZIP) or _TEXT.fullmatch(head))
        return head.startswith(_FRAME_STARTS) or sniff("", head).startswith("audio/")


def transcript_event(response: bytes, options: SpeechToTextInput, error_mapping: ErrorMapping) -> Event:
    """Return the event of the transcript in a response, with the words or characters that `options` request.

    Spaces and noises are left out. The text was paid for, so other invalid parts are skipped or repaired: a
    word without text is skipped, an impossible time becomes that of the word before. `audio_seconds` is 0 if
    the vendor reports no length.

    Raises:
        UpstreamError: provider_failed if there is no text; the mapped error of an error object.
    """
    try:
        body = parse(response)
        if "text" not in body and "detail" in body:
            raise from_error_body(body, error_mapping)
        event = Event()
        transcript = event.completed.transcription
        # Not in the constructor, which accepts None for a missing text.
        transcript.text = body["text"]
        if language := _string(body.get("language_code")):
            transcript.language_code = language
        transcript.audio_seconds = _seconds(body.get("audio_duration_secs"), 0.0)
        if options.timestamps != TimestampGranularity.TIMESTAMP_GRANULARITY_NONE:
            _add_words(transcript, _objects(body.get("words")), options)
        return event
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise malformed_response("a transcript of another shape")


def _add_words(
    transcript: Transcription, words: Iterable[dict[str, Any]], options: SpeechToTextInput
) -> None:
    by_character = options.timestamps == TimestampGranularity.TIMESTAMP_GRANULARITY_CHARACTER
    last = 0.0
    for word in words:
        start = _seconds(word.get("start"), last)
        end = max(_seconds(word.get("end"), start), start)
        last = max(last, end)
        word_type = word.get("type")
        if isinstance(word_type, str) and word_type != "word":
            continue
        # Without diarize, the vendor reports one speaker for all words.
        speaker = _string(word.get("speaker_id")) if options.diarize else ""
        characters = list(_objects(word.get("characters"))) if by_character else []
        previous_end = start
        for part in characters or (word,):
            part_start = _seconds(part.get("start"), previous_end)
            previous_end = max(_seconds(part.get("end"), part_start), part_start)
            text = part.get("text")
            if isinstance(text, str):
                add_word(transcript, text, part_start, previous_end, speaker)


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    """The objects of a list; nothing if it is not a list."""
    return (value for value in values if isinstance(value, dict)) if isinstance(values, list) else iter(())


def _string(value: Any) -> str:
    """A string, or an integer as a string; empty for anything else."""
    return str(value) if isinstance(value, str) or (type(value) is int and abs(value) < 2**63) else ""


def _seconds(value: Any, default: float) -> float:
    """A credible time, from a number or a number as text; otherwise `default`."""
    try:
        number = float(value) if isinstance(value, str) or type(value) in (float, int) else -1.0
    except (OverflowError, ValueError):
        return default
    return number if 0 <= number <= _MAX_SECONDS else default  # false for NaN
