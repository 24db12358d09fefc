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
    """Return the value of a JSON text in UTF-8. Half a surrogate pair becomes U+FFFD; with `surrogates` it is
    kept, for texts that will be joined by `well_formed`.

    Raises:
        ValueError: the text is not JSON, or nested too deeply.
    """
    data = data.removeprefix(BOM_UTF8)
    try:
        return from_json(data)
    except ValueError:
        if b"\\u" not in data:
            raise
    # pydantic's parser refuses half a pair. The standard library's accepts it, but is slower.
    try:
        value = json.loads(data.decode())
        return value if surrogates else from_json(well_formed(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def pick(value: Any, *path: str | int) -> Any:
    """Return what is at a path of keys and indexes in parsed JSON; None if nothing is there."""
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and step < len(value) else None
    return value


def pick_text(value: Any, *path: str | int) -> str:
    """Return the text at a path in parsed JSON; empty without one."""
    found = pick(value, *path)
    return found if isinstance(found, str) else ""


def pick_list(value: Any, *path: str | int) -> list[Any]:
    """Return the list at a path in parsed JSON; empty without one."""
    found = pick(value, *path)
    return found if isinstance(found, list) else []


def well_formed(text: str) -> str:
    """Return the text with its surrogate pairs joined, and U+FFFD in place of each half without its other."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_half(text: str) -> tuple[str, str]:
    """Split the first half of a surrogate pair off the end of a text: the text, and the half or ""."""
    return (text[:-1], text[-1]) if "\ud800" <= text[-1:] <= "\udbff" else (text, "")
