"""Counts the words of a long text, in little memory and in steps that let other threads run."""

from __future__ import annotations

SLICE = 16 * 1024
"""Characters of a text that are processed in one step, during which no other thread can run."""

_MARKS = bytes([ord(" ") if chr(code).isspace() else ord("x") for code in range(256)])
"""By the code of a character: a space for white space, an x for all else."""


def count_words(text: str) -> int:
    """The same as len(text.split()), which would need 100 MB for the words of 8 MB of text."""
    count = 0
    for start in range(0, len(text), SLICE):
        part = text[start : start + SLICE]
        count += _count_in_slice(part)
        if start and not text[start - 1].isspace() and not part[0].isspace():
            count -= 1  # the boundary is inside a word
    return count


def _count_in_slice(text: str) -> int:
    try:
        data = text.encode("latin-1")
    except UnicodeEncodeError:
        return len(text.split())
    # Takes a third of the time, because it creates no words.
    marks = data.translate(_MARKS)
    return marks.count(b" x") + marks.startswith(b"x")
