"""JSON from vendors, whose texts may contain half a surrogate pair.

A vendor that cuts a text into chunks by UTF-16 code units sends a character beyond U+FFFF as two escapes,
`\\ud83d` at the end of a chunk and `\\ude00` at the start of the next one. Python strings can hold such
halves; protobuf messages and UTF-8 can't.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from typing import Any

from pydantic_core import from_json


def parse(data: bytes, *, surrogates: bool = False) -> Any:
    """The value of a JSON text in UTF-8. Half a surrogate pair becomes U+FFFD.

    With `surrogates` it stays as it is, for texts that are yet to be joined: see `well_formed`.

    Raises:
        ValueError: it isn't JSON, or nested too deeply.
    """
    data = data.removeprefix(BOM_UTF8)
    try:
        return from_json(data)
    except ValueError:
        if b"\\u" not in data:
            raise
    # pydantic's parser refuses half a pair. The standard library's takes it, but is slower.
    try:
        value = json.loads(data.decode())
        return value if surrogates else from_json(well_formed(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def well_formed(text: str) -> str:
    """The text with its surrogate pairs joined, and U+FFFD in place of each half that is alone."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_half(text: str) -> tuple[str, str]:
    """A text without the first half of a pair at its end, and that half; empty where there is none."""
    return (text[:-1], text[-1]) if "\ud800" <= text[-1:] <= "\udbff" else (text, "")
