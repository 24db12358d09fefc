"""What many tests of providers take."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.testing import FaultUpstream
from tests.providers.rig import KEY


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    """Whether a job is streamed; a test that takes it runs for both."""
    return bool(request.param)


@pytest.fixture
async def upstream() -> AsyncIterator[FaultUpstream]:
    """A server that plays all vendors and takes only KEY."""
    async with FaultUpstream(api_key=KEY) as server:
        yield server
