"""A client of HTTP for many tests of providers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.providers.http.client import Http, Timeouts


@pytest.fixture(name="http")
async def _http() -> AsyncIterator[Http]:
    async with Http(Timeouts(connect=5, silence=5, whole=5)) as opened:
        yield opened
