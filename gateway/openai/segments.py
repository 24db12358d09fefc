"""Divides a transcript into pieces with times, and joins pieces to sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pomelo.gen.v1.speech_pb2 import Transcription, Word

MAX_PAUSE_MS = 2_000
"""A longer pause ends a sentence."""

MAX_SENTENCE_MS = 30_000
"""A sentence that takes longer is divided."""

_LOOKAHEAD = 200
"""Characters that a transcript has between two words, at most: spaces and punctuation."""

_SENTENCE_END = re.compile(r"""[.!?…。\uff01\uff1f]["'\u201d\u2019»)\]]*\s*$""")


@dataclass(slots=True)
class Piece:
    """A part of a transcript's text, with its times in milliseconds."""

    text: str
    start: int
    end: int
    speaker: str = ""


def sentences(transcription: Transcription) -> Iterator[list[Piece]]:
    """Yields the pieces of each sentence. A sentence also ends where the speaker changes, at a pause, and
    after 30 seconds."""
    sentence: list[Piece] = []
    for piece in _pieces(transcription):
        if sentence and _begins_sentence(piece, sentence):
            yield sentence
            sentence = []
        sentence.append(piece)
    if sentence:
        yield sentence


def join(pieces: Iterable[Piece]) -> str:
    """Returns the text of successive pieces."""
    return "".join([piece.text for piece in pieces]).strip()


def divide(piece: Piece, max_length: int) -> Iterator[Piece]:
    """Yields the words of a piece, each with at most one space after it. Words above `max_length` characters
    are cut. Each character takes the same share of the piece's time."""
    size, duration = len(piece.text.rstrip()), piece.end - piece.start
    for match in re.finditer(rf"(\S{{1,{max_length}}})(\s*)", piece.text):
        start, end = (piece.start + duration * at // size for at in match.span(1))
        yield Piece(match[1] + (" " if match[2] else ""), start, end, piece.speaker)


def _begins_sentence(piece: Piece, sentence: list[Piece]) -> bool:
    """Whether a piece begins a new sentence after `sentence`."""
    first, last = sentence[0], sentence[-1]
    return (
        piece.speaker != last.speaker
        or piece.start - last.end > MAX_PAUSE_MS
        or piece.end - first.start > MAX_SENTENCE_MS
        or _SENTENCE_END.search(last.text) is not None
    )


def _pieces(transcription: Transcription) -> list[Piece]:
    """Returns pieces whose texts together are the text of the transcript, and whose times don't overlap. Each
    begins with a word and ends before the next one. Words that the text lacks are left out; without any word
    the text is spread evenly over the audio."""
    text = transcription.text.strip()
    words = _find_words(text, transcription.words)
    if not words:
        whole = Piece(text, 0, round(transcription.audio_seconds * 1000))
        return list(divide(whole, max(len(text), 1)))
    pieces: list[Piece] = []
    begin = 0
    for at, word in words:
        start = max(word.start_offset.ToMilliseconds(), 0)
        if pieces:
            last = pieces[-1]
            last.text = text[begin:at]
            begin = at
            start = max(start, last.start)
            last.end = min(last.end, start)
        pieces.append(Piece("", start, max(word.end_offset.ToMilliseconds(), start), word.speaker))
    pieces[-1].text = text[begin:]
    return pieces


def _find_words(text: str, words: Iterable[Word]) -> list[tuple[int, Word]]:
    """Returns the words that are in the text in this order, with their positions."""
    found = []
    position = 0
    for word in words:
        if token := word.text.strip():
            at = text.find(token, position, position + len(token) + _LOOKAHEAD)
            if at >= 0:
                found.append((at, word))
                position = at + len(token)
    return found
