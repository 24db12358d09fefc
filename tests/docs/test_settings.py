"""The page of settings has their defaults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pomelo.settings import Settings, load

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


DEFAULTS = re.findall(r"^\| `(POMELO_\w+)` \| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)


def test_most_defaults_are_written_as_values() -> None:
    assert len(DEFAULTS) >= 20


@pytest.mark.parametrize(("variable", "value"), DEFAULTS)
def test_the_documented_default_is_what_applies_without_it(variable: str, value: str) -> None:
    name = variable.removeprefix("POMELO_").lower()
    assert getattr(load(None, {variable: value}), name) == getattr(Settings(), name)
