"""Transcripts of the sandbox: the times and speakers of a text.

The times are those of the words in speech that the sandbox generates.
"""

from __future__ import annotations

import re

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, TimestampGranularity, Transcription
from pomelo.providers.transcripts import add_word

_WORD = re.compile(r"\S+")
_ENDS = (".", "!", "?", "…", "。", "\uff01", "\uff1f")
_SPEAKERS = 2


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
    position = 0
    for match in _WORD.finditer(text):
        start, end = match.span()
        speaker = f"speaker_{sentence % speakers}" if speakers else ""
        if by_character:
            # The space before a word belongs to its speaker.
            for index in range(position, end):
                add_word(transcription, text[index], _time(index * each), _time((index + 1) * each), speaker)
            position = end
        else:
            add_word(transcription, match[0], _time(start * each), _time(end * each), speaker)
        if match[0].endswith(_ENDS):
            sentence += 1
    return transcription


def _time(seconds: float) -> float:
    return round(seconds, 3)
