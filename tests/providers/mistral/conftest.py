"""The vendor of these tests."""

from __future__ import annotations

import pytest

from tests.providers.text_rig import MISTRAL, Vendor


@pytest.fixture
def vendor() -> Vendor:
    return MISTRAL
