"""The OpenAI provider under test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.providers.rig import Rig, open_rig
from tests.providers.text_rig import OPENAI


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """The provider, in front of a server that plays its vendor."""
    async with open_rig(OPENAI.make, OPENAI.server) as opened:
        yield opened
