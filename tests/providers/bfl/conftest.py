"""A rig of the BFL provider."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.providers.bfl import BFL
from tests.providers.bfl.test_answers import NOW
from tests.providers.rig import Rig, open_rig


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(BFL, "bfl", **NOW) as rig:
        yield rig
