"""The text of a key's budget on the command line."""

from __future__ import annotations

import pytest
import typer

from pomelo.cli.keys import parse_budget


def test_a_budget_is_an_amount_of_credits_and_a_period() -> None:
    assert parse_budget("0.000001/day", "--budget").limit_micros == 1


@pytest.mark.parametrize("text", ["0/day", "0.0/total", "-1/day", "1/hour", "1", "/day", "0.0000001/day"])
def test_what_is_no_budget_is_refused_with_the_option_and_examples(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no budget: 5/day") as caught:
        parse_budget(text, "--budget")
    assert caught.value.param_hint == "--budget"
