"""Validates and normalizes the names and ids of voices."""

from __future__ import annotations

import re
import unicodedata

MAX_LENGTH = 64
"""Characters of a voice's name."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_name(text: str) -> bool:
    """Whether `text` is a valid name of a voice: 1 to 64 printable characters, not only spaces."""
    return 0 < len(text) <= MAX_LENGTH and text.isprintable() and not text.isspace()


def is_id(text: str) -> bool:
    """Whether `text` is a valid vendor's id of a voice, which becomes part of a URL."""
    return _ID.fullmatch(text) is not None


def normalize(name: str) -> str:
    """The form in which names are compared: without differences in case, spaces and Unicode composition."""
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()
