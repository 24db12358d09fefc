"""Log lines as JSON and text: no value can forge a line, and nothing of another library's content is shown."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest

from pomelo.telemetry.lines import RENDERERS, RecordFormatter, Style, printable

STYLES = pytest.mark.parametrize("style", ["json", "text"])
HOSTILE = 'a\nb\r\x1b[31m\x9b\x00\u2028\u202e"c=d'


def record(message: str, *values: object, name: str = "pomelo.engine", **more: Any) -> logging.LogRecord:
    """A record of a logger."""
    made = logging.LogRecord(name, logging.WARNING, "", 0, message, values, None)
    made.created = 1795717991.5
    made.__dict__.update(more)
    return made


def lines(style: Style, made: logging.LogRecord) -> str:
    """The text of a record."""
    return RecordFormatter(RENDERERS[style], {"worker": 0}).format(made).decode()


def test_a_record_is_a_json_object_with_its_fields() -> None:
    made = record("circuit %s", "open", fields={"provider": "openai", "ms": 1.5})
    assert json.loads(lines("json", made)) == {
        "time": "2026-11-26T18:33:11.500+00:00",
        "level": "warning",
        "event": "circuit open",
        "logger": "pomelo.engine",
        "provider": "openai",
        "ms": 1.5,
        "worker": 0,
    }


def test_a_record_is_a_line_of_text_with_its_fields() -> None:
    made = record(
        "circuit %s", "open", fields={"reason": "it failed", "code": "a=b", "stream": True, "empty": ""}
    )
    head, _, fields = lines("text", made).partition("logger=")
    assert head.split() == ["2026-11-26T18:33:11.500+00:00", "WARNING", "circuit", "open"]
    assert fields == 'pomelo.engine reason="it failed" code="a=b" stream=true empty="" worker=0\n'


@STYLES
def test_no_value_can_make_a_line_of_its_own_or_change_a_terminal(style: Style) -> None:
    text = lines(style, record("said %s", HOSTILE, fields={"model": HOSTILE}))
    assert text.replace("\n", "").isprintable()
    first, *more = text.splitlines()
    assert all(line.startswith("    ") for line in more)
    if style == "json":
        assert not more
        assert json.loads(first)["event"].startswith("said a")


@STYLES
def test_a_traceback_keeps_its_lines(style: Style) -> None:
    text = lines(style, record("request %s failed\n%s", "r1", "File one\nValueError"))
    if style == "json":
        assert json.loads(text)["event"] == "request r1 failed\nFile one\nValueError"
    else:
        assert text.splitlines()[1:] == ["    File one", "    ValueError"]


@STYLES
def test_the_content_of_an_exception_and_of_another_librarys_message_is_not_shown(style: Style) -> None:
    secret = "canary"
    try:
        raise ValueError(secret)
    except ValueError:
        caught = sys.exc_info()
    made = record("Task failed\nfuture: %r", secret, name="asyncio", exc_info=caught)
    text = lines(style, made)
    assert "Task failed" in text
    assert "ValueError" in text
    assert "test_lines.py" in text
    assert secret not in text


@STYLES
def test_a_message_whose_values_do_not_fit_is_shown_without_them(style: Style) -> None:
    assert "%d of %d" in lines(style, record("%d of %d", "x", name="other"))


@STYLES
def test_a_long_message_is_cut(style: Style) -> None:
    assert len(lines(style, record("x" * 1_000_000))) < 20_000


def test_half_a_surrogate_pair_is_escaped() -> None:
    assert printable("a\ud800b c\n") == "a\\ud800b c\n"
    assert lines("json", record("%s", "\udfff"))
