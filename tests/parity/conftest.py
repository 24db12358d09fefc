"""A client of each front end."""

from __future__ import annotations

from collections.abc import Mapping

import aiohttp
import grpc
import pytest

from pomelo.server.remote import channel as remote_channel
from tests.grpc_driver import GrpcDriver
from tests.parity.comparison import Driver
from tests.rest_driver import RestDriver


@pytest.fixture(autouse=True)
def _patient_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine may be busy: a gateway waits for the costs of a failed task, which the tests compare.
    monkeypatch.setattr(remote_channel, "_GRACE", 20.0)


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
