"""Health checks of both protocols and of the operator follow the store, also through a gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub

from pomelo.app import open_app, open_gateway
from pomelo.server.remote import open_remote
from pomelo.settings import Settings
from pomelo.telemetry.admin import open_admin
from pomelo.telemetry.exposition import Exposition
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness
from tests.app import run_app
from tests.calls import bearer
from tests.integration.server_under_test import PROOF, open_server_under_test
from tests.ports import free_port
from tests.redis_server import RedisServer
from tests.waiting import until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OK = (200, {"status": "ok"})


async def get(http: aiohttp.ClientSession, url: str) -> tuple[int, Any]:
    """Returns the status and the JSON of an answer."""
    async with http.get(url) as answer:
        return answer.status, await answer.json()


async def error_of(http: aiohttp.ClientSession, url: str) -> tuple[int, str]:
    """Returns the status and the error's code of an answer; an empty code if it has no error."""
    status, body = await get(http, url)
    return status, body.get("error", {}).get("code", "")


async def until_answer(http: aiohttp.ClientSession, url: str, status: int, code: str) -> None:
    """Returns when an answer has this status and error."""
    while await error_of(http, url) != (status, code):  # noqa: ASYNC110 (the server has no event)
        await asyncio.sleep(0.05)


async def statuses(channel: grpc.aio.Channel) -> dict[str, int]:
    """Returns the health of every service."""
    health = HealthStub(channel)
    listed = (await health.List(health_pb2.HealthListRequest())).statuses
    for service in listed:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == listed[service].status
    return {service: answer.status for service, answer in listed.items()}


async def test_an_outage_of_the_store_is_counted_also_without_a_call(tmp_path: Path) -> None:
    metrics = Metrics()
    with RedisServer() as redis:
        settings = Settings(data=tmp_path, store=redis.url, rest="", grpc="127.0.0.1:0", admin="")
        async with open_app(settings, metrics=metrics):
            redis.kill()
            await until(lambda: metrics.store_errors.values["check",] >= 3)
            redis.start()


async def test_health_follows_the_store_over_every_protocol(tmp_path: Path) -> None:
    readiness = Readiness("store_unavailable")
    with RedisServer() as redis:
        async with open_admin("127.0.0.1:0", Exposition(Metrics()), readiness) as admin:
            ready_url = f"http://{admin}/readyz"
            async with run_app(tmp_path, settings={"store": redis.url}, readiness=readiness) as app:
                healthz = {protocol: f"{url}/healthz" for protocol, url in app.urls.items()}
                key = (await app.account()).test
                watches = [
                    HealthStub(app.channel).Watch(
                        health_pb2.HealthCheckRequest(service=service), metadata=bearer(key)
                    )
                    for service in ("", "pomelo.v1.TaskService", "pomelo.v1.MediaService")
                ]
                assert [(await watch.read()).status for watch in watches] == [SERVING] * 3
                assert set((await statuses(app.channel)).values()) == {SERVING}
                assert [await get(app.session, url) for url in (*healthz.values(), ready_url)] == [OK] * 3

                redis.kill()
                async with asyncio.timeout(20):
                    assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * 3
                    assert set((await statuses(app.channel)).values()) == {NOT_SERVING}
                    assert await error_of(app.session, healthz["rest"]) == (503, "store_unavailable")
                    status, body = await get(app.session, ready_url)
                    assert (status, body["reason"]) == (503, "the store can't be reached or written")
                    await until_answer(app.session, healthz["remote"], 503, "server_unavailable")

                redis.start()
                async with asyncio.timeout(20):
                    assert [(await watch.read()).status for watch in watches] == [SERVING] * 3
                    assert set((await statuses(app.channel)).values()) == {SERVING}
                    assert await get(app.session, healthz["rest"]) == OK
                    assert await get(app.session, ready_url) == OK
                    await until_answer(app.session, healthz["remote"], 200, "")
            assert readiness.code == "shutting_down"


@pytest.mark.parametrize("has_secret", [True, False], ids=["recognised", "not recognised"])
async def test_a_gateway_is_as_ready_as_its_server(tmp_path: Path, has_secret: bool) -> None:
    settings = Settings(rest="", grpc="127.0.0.1:0", data=tmp_path / "data", grace=0.1)
    secret = settings.root_secret().decode() if has_secret else ""
    readiness = Readiness("server_unavailable")
    async with open_app(settings) as server:
        assert server.grpc is not None
        remote = Settings(rest="127.0.0.1:0", data=tmp_path / "none", secret=secret, grace=0.1)
        gateway = open_gateway(remote, server.grpc, readiness=readiness)
        await gateway.__aenter__()
        assert readiness.code == ""
    try:
        await until(lambda: readiness.code == "server_unavailable")
        async with open_app(settings.model_copy(update={"grpc": server.grpc})):
            await until(lambda: readiness.code == "")
    finally:
        await gateway.__aexit__(None, None, None)
    assert readiness.code == "shutting_down"


async def test_a_gateway_that_starts_before_its_server_is_not_ready_in_between(tmp_path: Path) -> None:
    settings = Settings(rest="", grpc=f"127.0.0.1:{free_port()}", data=tmp_path / "data", grace=0.1)
    remote = Settings(rest="127.0.0.1:0", data=tmp_path / "none", grace=0.1)
    async with (
        open_gateway(remote, settings.grpc) as address,
        aiohttp.ClientSession() as http,
        asyncio.timeout(20),
    ):
        assert address is not None
        url = "http://{}:{}/healthz".format(*address)
        assert await error_of(http, url) == (503, "server_unavailable")
        async with open_app(settings):
            await until_answer(http, url, 200, "")


async def test_the_health_checks_of_a_gateway_keep_its_connection_open(tmp_path: Path) -> None:
    """A server closes a connection without a good key after 9 seconds."""
    settings = Settings(rest="", grpc="", data=tmp_path / "data", grace=0.1)
    async with open_app(settings) as app, open_server_under_test(app) as opened:
        address, readiness = opened.server.address, Readiness("server_unavailable")
        async with open_remote(address, proof=PROOF, readiness=readiness), asyncio.timeout(20):
            await opened.reports.until("trust", 2)
            await opened.reports.until("ended", 2)
        peers = {peer for name, peer in opened.reports.entries if name == "authenticated"}
        assert len(peers) == 1
