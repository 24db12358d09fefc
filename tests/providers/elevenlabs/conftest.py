"""The ElevenLabs provider under test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.providers.elevenlabs.rig import MAKE
from tests.providers.rig import Rig, open_rig


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """The provider, in front of a server that plays its vendor."""
    async with open_rig(MAKE, "elevenlabs") as opened:
        yield opened
