"""Escapes untrusted text, such as names, ids and output of models, for a terminal, JSON and CSV.

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
"""Where a formula can begin: at the start of a cell, after white space and quotes, or after a character that
some spreadsheets take for the separator of cells."""


def visible(text: str) -> str:
    """Returns text on one line, with escapes such as \\x1b for control and invisible characters."""
    return _FORMATS.sub(_escape, _CONTROLS.sub(_escape, text))


def visible_lines(text: str) -> str:
    """Returns text with its lines and tabs, and with escapes for other control characters."""
    return _LINE_CONTROLS.sub(_escape, text)


def visible_json(text: str) -> str:
    """Returns equivalent JSON, with JSON escapes for characters that a terminal would obey."""
    return _JSON_CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def csv_cell(value: Any) -> Any:
    """Returns a value for a cell of CSV: numbers stay numbers, and no text is a formula."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return _FORMULA.sub(r"\1'", visible(value))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
