"""The sandbox under test."""

import pytest

from pomelo.providers.sandbox import Sandbox


@pytest.fixture
def sandbox() -> Sandbox:
    """A sandbox as it ships."""
    return Sandbox()
