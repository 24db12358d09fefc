"""Converts language codes and tags of callers and vendors to ISO 639 codes."""

from __future__ import annotations

import re
from itertools import product
from string import ascii_lowercase

from langcodes import Language

_TAG = re.compile(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]{1,8}){0,8}")
"""A BCP 47 tag. Only its language is looked up, because langcodes caches every tag that it parses."""

_NO_LANGUAGE = re.compile(r"und|mis|mul|zxx|q[a-t][a-z]")
"""ISO 639-3 codes for an unknown language, for none or several, and for private use."""

_WITHDRAWN = {
    "bh": "bih", "in": "id", "iw": "he", "ji": "yi", "jw": "jv", "mo": "ro",
}  # fmt: skip
"""Former code of ISO 639-1 that some software still uses -> its replacement."""


def iso_language(tag: str) -> str:
    """The ISO 639-1 code of a language, else its ISO 639-3 code; empty if `tag` is not a language.

    `tag` is a code of ISO 639-1, 639-2 or 639-3, or a BCP 47 tag, in upper or lower case: `en`, `eng`, `EN`
    and `en-US` all become `en`; `haw` is unchanged, because it has no shorter code.
    """
    match = _TAG.fullmatch(tag)
    if match is None:
        return ""
    code = match[1].lower()
    if code in _SHORTEST:
        return _SHORTEST[code]
    known = len(code) == 3 and not _NO_LANGUAGE.fullmatch(code) and Language.make(code).is_valid()
    return code if known else ""


def _shortest() -> dict[str, str]:
    """ISO 639-1 code or three-letter code of the same language -> ISO 639-1 code."""
    codes = _WITHDRAWN | {code: code for code in _WITHDRAWN.values()}
    for code in map("".join, product(ascii_lowercase, repeat=2)):
        if code in _WITHDRAWN:
            continue
        try:
            codes |= {Language.make(code).to_alpha3(variant): code for variant in ("T", "B")}
        except LookupError:
            continue
        codes[code] = code
    return codes


_SHORTEST = _shortest()
