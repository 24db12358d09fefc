"""The operator's plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from pomelo.accounts.plans import BUILTIN, Plan
from pomelo.catalog.catalog import Catalog
from pomelo.configuration import find_plans
from pomelo.settings import Settings, SettingsError, load


def load_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "pomelo.toml"
    path.write_text(text)
    return load(path, {})


def test_a_plan_of_a_file_has_only_the_limits_that_it_sets(tmp_path: Path) -> None:
    settings = load_text(
        tmp_path,
        """
        [plans.team]
        requests_per_minute = 600
        concurrent_requests = 40
        tokens_per_minute = 1_000_000
        models = ["gpt-4", "flux-1-pro"]

        [plans.pro]
        requests_per_minute = 5
        """,
    )
    plans = find_plans(settings, Catalog.load())
    assert plans["team"] == Plan("team", 600, 40, 1_000_000, frozenset({"gpt-4", "flux-1-pro"}))
    assert plans["pro"] == Plan("pro", requests=5)
    assert plans["free"] == BUILTIN["free"]
    assert plans.keys() == BUILTIN.keys() | {"team"}


def test_a_plan_with_an_unknown_model_is_refused(tmp_path: Path) -> None:
    settings = load_text(tmp_path, "[plans.team]\nmodels = ['gpt-4', 'gpt-5']")
    with pytest.raises(SettingsError, match=r"plans\.team\.models: there is no model gpt-5"):
        find_plans(settings, Catalog.load())
