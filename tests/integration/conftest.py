"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.commands import create_data
from tests.redis_server import RedisServer
from tests.serving import serve


@pytest.fixture(scope="module", params=["sqlite", "redis"])
def store_settings(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The settings of an app with each store."""
    if request.param == "sqlite":
        yield {}
    else:
        with RedisServer() as server:
            yield {"store": server.url}


@pytest.fixture(params=["with a server", "without one"])
async def command_folder(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Path]:
    """A folder whose data folder a server uses, or no process."""
    if request.param == "with a server":
        async with serve(tmp_path):
            yield tmp_path
    else:
        await create_data(tmp_path)
        yield tmp_path
