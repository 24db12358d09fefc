"""A client of each front end."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
import grpc
import pytest

from tests.grpc_driver import GrpcDriver
from tests.parity.comparison import Driver
from tests.rest_driver import RestDriver


@pytest.fixture(scope="session")
def clients(
    http: aiohttp.ClientSession, channel: grpc.aio.Channel, rest_url: str, gateway_url: str
) -> Mapping[str, Driver]:
    """A client of each front end, by its name."""
    return {
        "grpc": GrpcDriver(channel),
        "rest": RestDriver(http, rest_url),
        "remote": RestDriver(http, gateway_url),
    }
