"""Errors with the names by which callers know their fields."""

from __future__ import annotations

from gateway.errors import rename_field
from pomelo.errors import PomeloError


def test_a_renamed_error_keeps_all_but_the_name_of_its_field() -> None:
    error = PomeloError(
        "rate_limit_exceeded",
        "Invalid text: text must be text",
        field="text",
        retry_after=7,
        values={"limit": 3},
        repeatable=False,
    )
    renamed = rename_field(error, {"text": "input"}.get)  # type: ignore[arg-type]
    assert (renamed.code, renamed.field) == ("rate_limit_exceeded", "input")
    assert renamed.message == "Invalid input: text must be text"
    assert (renamed.retry_after, renamed.values, renamed.repeatable) == (7, error.values, False)
    assert rename_field(error, lambda field: field) is error
