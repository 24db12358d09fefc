"""Words of transcripts, for all providers of speech to text."""

from __future__ import annotations

from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.protobuf.times import to_duration


def add_word(transcript: Transcription, text: str, start: float, end: float, speaker: str = "") -> None:
    """Add a word or a character: its times in seconds, and its speaker, "" if it is not known."""
    transcript.words.add(
        text=text, start_offset=to_duration(start), end_offset=to_duration(end), speaker=speaker or None
    )
