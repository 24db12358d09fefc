"""Values that an option of the command line can't have."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pomelo.cli.commands import program


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("usage", "--by", "month"),
            "'--by': 'month' is not one of 'model', 'key', 'day', 'account', 'provider', 'user', 'code'.",
        ),
        (("usage", "--format", "xml"), "'--format': 'xml' is not one of 'table', 'json', 'csv'."),
        (("serve", "--workers", "two"), "'--workers': must be a whole number"),
        (
            ("usage", "--from", "0001-01-01T00:00+14:00"),
            "--from: '0001-01-01T00:00+14:00' is not a date or time such as 2026-11-24 or 2026-11-24T12:00Z",
        ),
        (
            ("keys", "create", "--expires", "9999-12-31T23:59-05:00"),
            "--expires: '9999-12-31T23:59-05:00' is neither a time span such as 30d nor a time such as "
            "2027-01-31T12:00Z, up to the year 9999",
        ),
        (
            ("keys", "create", "--expires", "999999w"),
            "--expires: '999999w' is neither a time span such as 30d nor a time such as 2027-01-31T12:00Z, "
            "up to the year 9999",
        ),
        (("gateway", "--target", ""), "--target: must be host:port, such as 127.0.0.1:8080"),
        (
            ("gateway", "--target", "http://127.0.0.1:1"),
            "--target: must be host:port, such as 127.0.0.1:8080",
        ),
        (("gateway", "--target", "127.0.0.1:0"), "--target: must have the port of the server, not 0"),
        (("gateway", "--target", "127.0.0.1:99999"), "--target: must be host:port, such as 127.0.0.1:8080"),
        (("models", "--ca", "/nowhere"), "'--ca': file '/nowhere' does not exist."),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_expected(command: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(program(), command)
    assert result.exit_code == 2
    assert f"Error: Invalid value for {message}\n" in result.output
