"""Options of the command line with an empty value, as a script has them whose variable is not set."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pomelo.cli.commands import program

ADJUST = ("accounts", "adjust", "nobody", "5", "--note", "because")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (("keys", "create"), "--expires"),
        (("keys", "create"), "--budget"),
        (("keys", "rotate", "abc"), "--grace"),
        (("accounts", "create", "acme"), "--plan"),
        (("accounts", "create", "acme"), "--credits"),
        (("accounts", "grant", "acme", "5"), "--id"),
        (ADJUST, "--id"),
        (("usage",), "--from"),
        (("usage",), "--to"),
        (("usage",), "--account"),
        (("usage",), "--model"),
        (("usage",), "--key"),
        (("log",), "--account"),
        (("log",), "--since"),
        (("prices", "check"), "--at"),
        (("run", "Hi", "--model", "gpt-4"), "--key"),
        (("run", "Hi", "--model", "gpt-4"), "--out"),
        (("run", "Hi"), "--model"),
        (("models",), "--target"),
    ],
)
@pytest.mark.parametrize("value", ["", " "])
def test_an_option_with_an_empty_value_is_refused(command: tuple[str, ...], option: str, value: str) -> None:
    result = CliRunner().invoke(program(), [*command, option, value])
    assert result.exit_code == 2
    assert f"Invalid value for {option}: must not be empty" in result.stderr
    assert result.stdout == ""


def test_an_empty_account_does_not_list_the_keys_of_all_accounts() -> None:
    result = CliRunner().invoke(program(), ["keys", "list", ""])
    assert result.exit_code == 2
    assert "must not be empty" in result.output


@pytest.mark.parametrize("amount", ["0", "-0", "0.000000"])
def test_a_correction_by_nothing_is_refused_as_such(amount: str) -> None:
    result = CliRunner().invoke(program(), [*ADJUST[:3], amount, *ADJUST[4:]])
    assert result.exit_code == 2
    assert "Invalid value for AMOUNT: must not be 0" in result.output
