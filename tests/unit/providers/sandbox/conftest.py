"""The sandbox under test."""

from __future__ import annotations

import pytest

from pomelo.providers.sandbox import Sandbox


@pytest.fixture
def sandbox() -> Sandbox:
    """A sandbox as it ships."""
    return Sandbox()
