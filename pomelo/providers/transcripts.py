"""Words of transcripts, for all providers of speech to text."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from pomelo.gen.v1.speech_pb2 import Transcription

_NANOS = 10**9


def add_word(transcript: Transcription, text: str, start: float, end: float, speaker: str = "") -> None:
    """Add a word or a character: its times in seconds, and its speaker, "" if it is not known."""
    word = transcript.words.add()
    word.text = text
    _set_seconds(word.start_offset, start)
    _set_seconds(word.end_offset, end)
    if speaker:
        word.speaker = speaker


def _set_seconds(duration: Duration, seconds: float) -> None:
    # Rounded, so that a time of up to nine decimals is exact.
    duration.seconds, duration.nanos = divmod(round(seconds * _NANOS), _NANOS)
