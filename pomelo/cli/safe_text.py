"""Escapes untrusted text, such as a name, an id or an answer, for the place where it is shown.

A terminal obeys control characters, and a spreadsheet runs a cell that begins like a formula.
"""

from __future__ import annotations

import re
from typing import Any

_CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff]")
_LINE_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")
_FORMATS = re.compile("[\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")
"""Invisible characters, which reverse the order of others or hide between them."""

_JSON_CONTROLS = re.compile("[\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")

_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_FORMULA = re.compile("(^|[;,|])(?=[\\s'\"`]*[=+\\-@\uff1d\uff0b\uff0d\uff20])")
"""Where a formula may begin: at the beginning of a cell, also after white space and quotes, or after what
some spreadsheet takes for the border of a cell."""


def visible(text: str) -> str:
    """A name or an id, on one line, with escapes such as \\x1b for invisible characters."""
    return _FORMATS.sub(_escape, _CONTROLS.sub(_escape, text))


def visible_lines(text: str) -> str:
    """A text as a terminal may show it: its lines and tabs stay, and escapes stand for other controls."""
    return _LINE_CONTROLS.sub(_escape, text)


def visible_json(text: str) -> str:
    """JSON that means the same, with JSON's escapes for what a terminal would obey."""
    return _JSON_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def csv_cell(value: Any) -> Any:
    """A value as CSV has it: numbers stay numbers, and no text is a formula."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return _FORMULA.sub(r"\1'", visible(value))


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
