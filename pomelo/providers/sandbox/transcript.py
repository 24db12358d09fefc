"""Transcripts of the sandbox: the times and speakers of a text.

The times are those of the words in speech that the sandbox generates.
"""

from __future__ import annotations

import re

from pomelo.gen.v1.speech_pb2 import SpeechToTextInput, Timestamps, Transcription

_WORD = re.compile(r"\S+")
_ENDS = (".", "!", "?", "…", "。", "\uff01", "\uff1f")
_SPEAKERS = 2


def transcribe(text: str, seconds: float, given: SpeechToTextInput) -> Transcription:
    """The transcript of `text`, spoken in `seconds`, with the timestamps and speakers that `given` requests.

    Every character takes the same time. With diarization, the speakers alternate by sentence.
    """
    transcription = Transcription(text=text, language=given.language_code or "en", audio_seconds=seconds)
    if given.timestamps == Timestamps.TIMESTAMPS_NONE:
        return transcription
    each = seconds / len(text) if text else 0.0
    by_character = given.timestamps == Timestamps.TIMESTAMPS_CHARACTER
    speakers = 0
    if given.diarize:
        speakers = min(given.num_speakers, _SPEAKERS) if given.HasField("num_speakers") else _SPEAKERS
    sentence = 0
    add = transcription.words.add
    position = 0
    for match in _WORD.finditer(text):
        start, end = match.span()
        speaker = f"speaker_{sentence % speakers}" if speakers else ""
        if by_character:
            # The space before a word belongs to its speaker.
            for index in range(position, end):
                add(
                    text=text[index],
                    start=_time(index * each),
                    end=_time((index + 1) * each),
                    speaker=speaker,
                )
            position = end
        else:
            add(text=match[0], start=_time(start * each), end=_time(end * each), speaker=speaker)
        if match[0].endswith(_ENDS):
            sentence += 1
    return transcription


def _time(seconds: float) -> float:
    return round(seconds, 3)
