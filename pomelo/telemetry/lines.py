"""Renders what is logged as lines: JSON for programs, text for a terminal.

Both begin with the time (UTC), the level and the event. Control and invisible characters of a value are
escaped, so that no text of a caller or vendor can make a line of its own or change a terminal.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

from pydantic_core import to_json

from pomelo.runtime.logs import format_trace, is_own

Style = Literal["text", "json"]

Render = Callable[[Mapping[str, Any]], bytes]
"""Returns a line of fields, which begin with time, level and event."""

MAX_LINE = 16_384
"""Characters of an event; more are cut off."""

_UNQUOTED = re.compile(r"[!#-<>-~]+")
_INVISIBLE = re.compile(
    r"[^\S \n]|[\0-\x08\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)
"""White space but spaces and line feeds, and what terminals obey or don't show."""


def printable(text: str) -> str:
    """Returns text with escapes such as \\x1b for control and invisible characters other than line feeds."""
    return text if text.isprintable() else _INVISIBLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def timestamp(now: float) -> str:
    """Returns Unix time as text, such as 2026-11-26T18:25:44.123+00:00."""
    second, millisecond = divmod(int(now * 1000), 1000)
    return f"{_second(second)}.{millisecond:03}+00:00"


@lru_cache(maxsize=4)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Returns fields as a JSON object on one line."""
    return to_json(fields) + b"\n"


def text_line(fields: Mapping[str, Any]) -> bytes:
    """Returns fields as a readable line. An event of several lines is followed by them, indented."""
    rest = dict(fields)
    time, level, event = rest.pop("time"), rest.pop("level"), rest.pop("event")
    first, _, more = event.partition("\n")
    line = f"{time} {level.upper():<8} {first}"
    if rest:
        line = f"{line:<53} " + " ".join(f"{name}={_value(value)}" for name, value in rest.items())
    if more:
        line += "\n    " + more.replace("\n", "\n    ")
    return line.encode() + b"\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text if _UNQUOTED.fullmatch(text) else json.dumps(text)


RENDERERS: Mapping[Style, Render] = {"json": json_line, "text": text_line}


class RecordFormatter:
    """Renders the records of the standard library's loggers. The argument `extra={"fields": {…}}` of a call
    adds fields to its line.

    Of other libraries, whose messages may have content in later lines, only the first line is shown, and of
    exceptions only their types and where they were raised.
    """

    def __init__(self, render: Render, constant: Mapping[str, Any]) -> None:
        self._render = render
        self._constant = constant

    def format(self, record: logging.LogRecord) -> bytes:
        try:
            event = record.getMessage()
        except Exception:  # of another library, with values that do not fit its message
            event = str(record.msg)
        if not is_own(record.name):
            event = event.partition("\n")[0]
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            event += "\n" + format_trace(error)
        if len(event) > MAX_LINE:
            event = event[:MAX_LINE] + "…"
        fields: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "event": printable(event),
            "logger": record.name,
        }
        for name, value in getattr(record, "fields", {}).items():
            fields[name] = printable(value) if isinstance(value, str) else value
        fields.update(self._constant)
        return self._render(fields)
