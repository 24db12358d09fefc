"""What many tests of providers take."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.testing import FaultUpstream
from tests.providers.rig import KEY, Rig, open_rig
from tests.providers.text_rig import VENDORS, Vendor


@pytest.fixture(params=[False, True], ids=["whole", "stream"])
def stream(request: pytest.FixtureRequest) -> bool:
    """Whether a job is streamed; a test that takes it runs for both."""
    return bool(request.param)


@pytest.fixture
async def upstream() -> AsyncIterator[FaultUpstream]:
    """A server that plays all vendors and takes only KEY."""
    async with FaultUpstream(api_key=KEY) as server:
        yield server


@pytest.fixture(params=VENDORS, ids=lambda vendor: vendor.name)
def vendor(request: pytest.FixtureRequest) -> Vendor:
    """A vendor of text; a test that takes it runs for all."""
    each: Vendor = request.param
    return each


@pytest.fixture
async def rig(vendor: Vendor) -> AsyncIterator[Rig]:
    """A rig of the vendor's provider."""
    async with open_rig(vendor.make, vendor.server) as opened:
        yield opened
