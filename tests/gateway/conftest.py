"""Gateways for the tests of this folder; see `door`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests.gateway.door import Door, open_door

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]


@pytest.fixture
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenDoor:
    """Opens a gateway with options of a test's own."""

    def opening(**options: Any) -> AbstractAsyncContextManager[Door]:
        return open_door(tmp_path_factory.mktemp("media"), **options)

    return opening


@pytest.fixture(scope="session")
async def _door(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Door]:
    async with open_door(tmp_path_factory.mktemp("media")) as door:
        yield door


@pytest.fixture
def door(_door: Door) -> Door:
    """A gateway with the default options, its provider playing the default answers."""
    _door.player.script = None
    _door.player.jobs.clear()
    return _door
