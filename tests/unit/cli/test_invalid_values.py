"""Values that an option of the command line can't have."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pomelo.cli import program


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("usage", "--by", "month"),
            "'--by': 'month' is not one of 'model', 'key', 'day', 'account', 'provider', 'user', 'code'.",
        ),
        (("usage", "--format", "xml"), "'--format': 'xml' is not one of 'table', 'json', 'csv'."),
        (("serve", "--workers", "two"), "'--workers': must be a whole number"),
        (("models", "--ca", "/nowhere"), "'--ca': file '/nowhere' does not exist."),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_expected(command: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(program(), command)
    assert result.exit_code == 2
    assert f"Error: Invalid value for {message}\n" in result.output
