"""Fixtures for the tests of settings."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The path of a configuration file that does not exist yet."""
    return tmp_path / "config.toml"
