"""The plans that the help of the command line names."""

from __future__ import annotations

from pomelo.accounts.plans import BUILTIN
from pomelo.cli.accounts import _PLANS


def test_the_help_names_every_built_in_plan() -> None:
    assert f"{', '.join(BUILTIN)}, or one of pomelo.toml" == _PLANS
