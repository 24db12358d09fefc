"""An unexpected error is logged with its frames and type, once a minute for each line of code."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from pomelo.errors import PomeloError
from pomelo.logs import UnexpectedErrors, format_trace

log = logging.getLogger("tests.unexpected")


def raised(error: Exception) -> Exception:
    """The error with the traceback of this line."""
    try:
        raise error
    except Exception as caught:
        return caught


def raised_elsewhere(error: Exception) -> Exception:
    """The same with that of another line."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_error_is_logged_again_after_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    errors = UnexpectedErrors(log, clock=lambda: now)
    for now, count in ((100.0, 1), (159.9, 1), (160.0, 2), (219.9, 2), (220.0, 3)):
        errors.log("It failed", raised(ValueError("secret")))
        assert len(caplog.records) == count, now
    assert "secret" not in caplog.text


def test_other_types_and_lines_are_other_errors(caplog: pytest.LogCaptureFixture) -> None:
    errors = UnexpectedErrors(log)
    for error in (raised(ValueError()), raised(KeyError()), raised_elsewhere(ValueError()), ValueError()):
        errors.log("It failed", error)
        errors.log("It failed", error)
    assert len(caplog.records) == 4


def test_the_innermost_line_identifies_an_error(caplog: pytest.LogCaptureFixture) -> None:
    def outer(inner: Callable[[Exception], Exception]) -> Exception:
        try:
            raise inner(ValueError())
        except ValueError as error:
            return error

    errors = UnexpectedErrors(log)
    for inner in (raised, raised_elsewhere, raised):
        errors.log("It failed", outer(inner))
    assert len(caplog.records) == 2


def test_a_limited_number_of_errors_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    errors = UnexpectedErrors(log)
    types = [type(f"Error{number}", (Exception,), {}) for number in range(1_001)]
    for one in types[:1_000]:
        errors.log("It failed", one())
    errors.log("It failed", types[0]())
    assert len(caplog.records) == 1_000
    errors.log("It failed", types[1_000]())  # nothing else is remembered then
    errors.log("It failed", types[0]())
    assert len(caplog.records) == 1_002


def last_lines(error: Exception) -> list[str]:
    """The lines of a trace that are no frames."""
    return [line for line in format_trace(error).splitlines() if not line.startswith(" ")]


def test_a_trace_has_the_code_of_an_error_and_no_message() -> None:
    assert last_lines(raised(PomeloError("store_unavailable"))) == [
        "pomelo.errors.PomeloError: store_unavailable"
    ]
    assert last_lines(raised(ValueError("secret"))) == ["builtins.ValueError"]


def test_a_trace_begins_with_the_causes_unless_they_are_suppressed() -> None:
    cause, error = raised(KeyError("secret")), ValueError("secret")
    error.__cause__ = cause
    assert last_lines(error) == ["builtins.KeyError", "which led to", "builtins.ValueError"]
    error = ValueError()
    error.__context__ = cause
    assert last_lines(error) == ["builtins.KeyError", "which led to", "builtins.ValueError"]
    error.__suppress_context__ = True
    assert last_lines(error) == ["builtins.ValueError"]


def test_a_trace_has_all_errors_of_a_group() -> None:
    group = ExceptionGroup("secret", [raised(ValueError()), raised(KeyError())])
    assert last_lines(group) == [
        "builtins.ValueError",
        "which led to",
        "builtins.KeyError",
        "which led to",
        "builtins.ExceptionGroup",
    ]


def test_a_trace_of_errors_that_cause_each_other_ends() -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert last_lines(one) == ["builtins.KeyError", "which led to", "builtins.ValueError"]
