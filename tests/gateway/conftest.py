"""Gateways for the tests of this folder."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from tests.certificates import make_certificate
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


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    """A TLS server context for loopback."""
    made = tmp_path_factory.mktemp("certificate")
    make_certificate(made, "cert", "localhost")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made / "cert.pem", made / "cert.key")
    return context
