"""A rig of the Anthropic provider."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.providers.rig import Rig, open_rig
from tests.providers.text_rig import ANTHROPIC


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(ANTHROPIC.make, ANTHROPIC.server) as rig:
        yield rig
