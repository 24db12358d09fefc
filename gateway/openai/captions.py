"""Captions of a transcript, in SubRip (SRT) and WebVTT: cues of at most two lines of 42 characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from gateway.openai.segments import Piece, divide, join, sentences
from pomelo.gen.v1.speech_pb2 import Transcription

MAX_LINE = 42
"""Characters of a line."""

MAX_LINES = 2

_ARROW = re.compile(r"--+>")


@dataclass(frozen=True, slots=True)
class Cue:
    """The lines that are shown from `start` to `end`, in milliseconds."""

    start: int
    end: int
    lines: tuple[str, ...]


def make_cues(transcription: Transcription) -> Iterator[Cue]:
    """Yields the cues of a transcript, in order. No cue is empty, and no cue begins before the previous one
    ends. Each sentence begins a new cue."""
    end = 0
    for sentence in sentences(transcription):
        lines = list(_lines(word for piece in sentence for word in divide(piece, MAX_LINE)))
        for at in range(0, len(lines), MAX_LINES):
            shown = lines[at : at + MAX_LINES]
            start = max(shown[0][0].start, end)
            end = max(shown[-1][-1].end, start + 1)
            yield Cue(start, end, tuple(join(line) for line in shown))


def to_srt(transcription: Transcription) -> str:
    """Returns a transcript as SubRip captions."""
    blocks = []
    for number, cue in enumerate(make_cues(transcription), 1):
        # The format has no escapes, and a player may take a text with its arrow for the times of a cue.
        text = _ARROW.sub("->", "\n".join(cue.lines))
        blocks.append(f"{number}\n{_time(cue.start, ',')} --> {_time(cue.end, ',')}\n{text}\n\n")
    return "".join(blocks)


def to_vtt(transcription: Transcription) -> str:
    """Returns a transcript as WebVTT captions."""
    blocks = ["WEBVTT\n\n"]
    for cue in make_cues(transcription):
        text = escape("\n".join(cue.lines), quote=False)
        blocks.append(f"{_time(cue.start, '.')} --> {_time(cue.end, '.')}\n{text}\n\n")
    return "".join(blocks)


def _lines(words: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yields the words of each line."""
    line: list[Piece] = []
    length = 0
    for word in words:
        if line and length + len(word.text.rstrip()) > MAX_LINE:
            yield line
            line, length = [], 0
        line.append(word)
        length += len(word.text)
    if line:
        yield line


def _time(ms: int, point: str) -> str:
    """Returns a time as hours of at least two digits, minutes, seconds and milliseconds."""
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"
