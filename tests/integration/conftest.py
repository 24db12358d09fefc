"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.redis_server import RedisServer


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def store_settings(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The settings of an app with each store."""
    if request.param == "sqlite":
        yield {}
    else:
        with RedisServer() as server:
            yield {"store": server.url}
