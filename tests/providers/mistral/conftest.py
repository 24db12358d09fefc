"""A rig of the Mistral provider."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.providers.rig import Rig, open_rig
from tests.providers.text_rig import MISTRAL


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(MISTRAL.make, MISTRAL.server) as rig:
        yield rig
