"""Clients of both kinds, of the session's app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pomelo.app import App
from tests.client.clients import KINDS, make_client
from tests.conftest import Keys

ClientFactory = Callable[..., Any]
"""Makes a client: its key, and the options of the client."""


@pytest.fixture(params=KINDS)
async def connect(request: pytest.FixtureRequest, app: App) -> AsyncIterator[ClientFactory]:
    """Makes clients of the app, which are closed at the end."""
    assert app.grpc is not None
    made = []

    def make(key: str, target: str | None = None, **options: Any) -> Any:
        made.append(make_client(request.param, target or str(app.grpc), key, **options))
        return made[-1]

    yield make
    for client in made:
        await client.close()


@pytest.fixture
def client(connect: ClientFactory, keys: Keys) -> Any:
    """A client with a test key."""
    return connect(keys.test)


@pytest.fixture
def live(connect: ClientFactory, keys: Keys) -> Any:
    """A client with a live key, whose tasks go to the upstream."""
    return connect(keys.live)
