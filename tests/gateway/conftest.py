"""Gateways for the tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests.gateway.gateway_app import GatewayApp, OpenApp, run_gateway


@pytest.fixture
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> OpenApp:
    """Returns a function that runs a gateway with the given options."""

    def run(**options: Any) -> AbstractAsyncContextManager[GatewayApp]:
        return run_gateway(tmp_path_factory.mktemp("media"), **options)

    return run


@pytest.fixture(scope="session")
async def _gateway(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[GatewayApp]:
    async with run_gateway(tmp_path_factory.mktemp("media")) as gateway:
        yield gateway


@pytest.fixture
def gateway(_gateway: GatewayApp) -> GatewayApp:
    """A gateway with the default options, whose provider sends default responses."""
    _gateway.provider.script = None
    _gateway.provider.jobs.clear()
    return _gateway
