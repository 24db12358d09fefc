"""Names of voices, as callers, operators and vendors write them."""

import unicodedata

LONGEST = 64
"""Characters of a name."""


def is_name(text: str) -> bool:
    """Whether `text` may be a voice's name: 1 to 64 printable characters of any script, not only spaces."""
    return 0 < len(text) <= LONGEST and text.isprintable() and not text.isspace()


def plain(name: str) -> str:
    """The name as it is looked up: capitals, spaces and the composition of letters make no difference."""
    return " ".join(unicodedata.normalize("NFC", name).split()).casefold()
