"""Addresses of IPv6, and what a gRPC connection may do and carry: pings of its client, concurrent calls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from pomelo.accounts.plans import BUILTIN
from pomelo.app import App, open_app
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.server import ServerOptions, open_server
from pomelo.testing import FaultUpstream
from tests.app import app_settings, run_app
from tests.calls import bearer
from tests.conftest import Keys
from tests.faults import http2
from tests.tasks import TASK_BODIES, text_body, text_task

KEEPALIVE = [
    ("grpc.keepalive_time_ms", 1_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
"""A client that pings as often as gRPC lets it, ten times as often as guides of load balancers recommend."""

MAX_CONCURRENT_STREAMS = 3
"""The number of the setting in HTTP/2."""


async def test_both_protocols_are_served_on_ipv6_and_so_are_links(tmp_path: Path) -> None:
    async with run_app(tmp_path, settings={"rest": "[::1]:0", "grpc": "[::1]:0"}) as app:
        account = await app.account()
        assert app.urls["rest"].startswith("http://[::1]:")
        for protocol in ("rest", "grpc", "remote"):
            assert (await app.ask(protocol, account.test, text_body())).code == "ok"
        (link,) = (await app.ask("rest", account.test, TASK_BODIES["image"])).links
        assert link.startswith(f"{app.urls['rest']}/media/")
        async with app.session.get(link) as response:
            assert response.status == 200


class Peers(ConnectionObserver):
    """The connections on which calls arrived."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def authenticated(self, peer: str) -> None:
        self.names.add(peer)


async def test_a_connection_with_frequent_pings_stays_without_calls_and_through_a_quiet_task(
    app: App, keys: Keys
) -> None:
    peers = Peers()
    options = ServerOptions("127.0.0.1:0")
    async with (
        open_server(app.services, options, connections=peers) as server,
        grpc.aio.insecure_channel(server.address, KEEPALIVE) as channel,
    ):

        async def run(prompt: str) -> None:
            request = RunTaskRequest(spec=text_task(prompt))
            await TaskServiceStub(channel).RunTask(request, metadata=bearer(keys.test))

        await run("Hello")
        closing = asyncio.ensure_future(channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        closed, _ = await asyncio.wait([closing], timeout=4.5)
        assert not closed
        closing.cancel()
        await run("[[delay:2]] Hello")
    assert len(peers.names) == 1


@pytest.mark.parametrize(("max_calls", "streams"), [(100, 1000), (3000, 1500)])
async def test_a_connection_takes_as_many_calls_as_an_account_may_run(
    tmp_path: Path, upstream: FaultUpstream, max_calls: int, streams: int
) -> None:
    async with open_app(app_settings(tmp_path, upstream, max_calls=max_calls)) as app:
        assert app.grpc is not None
        host, _, port = app.grpc.rpartition(":")
        async with http2.connect(host, int(port)) as connection, asyncio.timeout(20):
            await connection.has_settings()
            assert connection.settings[MAX_CONCURRENT_STREAMS] == streams
    assert streams > max(plan.concurrent or 0 for plan in BUILTIN.values())
