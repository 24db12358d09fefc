"""Names of voices, as callers, operators and vendors write them."""

from __future__ import annotations

import re
import unicodedata

MAX_LENGTH = 64
"""Characters of a name."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def is_name(text: str) -> bool:
    """Whether `text` may be a voice's name: 1 to 64 printable characters of any script, not only spaces."""
    return 0 < len(text) <= MAX_LENGTH and text.isprintable() and not text.isspace()


def is_id(text: str) -> bool:
    """Whether `text` may be the vendor's id of a voice, which becomes a part of a URL."""
    return _ID.fullmatch(text) is not None


def plain(name: str) -> str:
    """The name as it is looked up: capitals, spaces and the composition of letters make no difference."""
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()
