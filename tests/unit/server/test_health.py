"""Health checks on both ends: what load balancers and gateways are answered, and what keeps a connection open."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthServicer, HealthStub, add_HealthServicer_to_server

from pomelo.server.remote.health import open_health
from pomelo.server.server import ServerOptions, open_server
from pomelo.telemetry.readiness import Readiness
from tests.calls import failure, reason_of
from tests.integration.scripted_services import PROOF, ScriptedServices, serve_scripted
from tests.unit.refusals import refused
from tests.unit.server.test_calls import Recorder

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
NAMES = [f"pomelo.v1.{name}Service" for name in ("Task", "Model", "Media", "Account")]


async def test_every_service_is_as_healthy_as_the_server() -> None:
    async with serve_scripted() as opened:
        stub = HealthStub(opened.channel)
        for status in (SERVING, NOT_SERVING):
            listed = (await stub.List(health_pb2.HealthListRequest())).statuses
            assert {name: each.status for name, each in listed.items()} == dict.fromkeys(["", *NAMES], status)
            for name in listed:
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == status
            opened.server.readiness.drain()
        error = await failure(stub.Check(health_pb2.HealthCheckRequest(service="other")))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "not_found")


@pytest.mark.parametrize(("name", "reported"), [("", [SERVING, NOT_SERVING]), ("other", [UNKNOWN])])
async def test_a_watch_reports_each_change_once_and_ends_when_the_server_drains(
    name: str, reported: list[int]
) -> None:
    async with serve_scripted() as opened:
        found = []
        async for answer in HealthStub(opened.channel).Watch(health_pb2.HealthCheckRequest(service=name)):
            found.append(answer.status)
            opened.server.readiness.drain()
    assert found == reported


async def test_a_watch_reports_a_change_that_comes_while_it_reports_another() -> None:
    class Ending(Readiness):
        """Drains as soon as somebody has read the code and waits for something."""

        @property
        def code(self) -> str:
            asyncio.get_running_loop().call_soon(self.drain)
            return super().code

    async with serve_scripted(readiness=Ending()) as opened:
        watch = HealthStub(opened.channel).Watch(health_pb2.HealthCheckRequest())
        assert [answer.status async for answer in watch] == [SERVING, NOT_SERVING]


async def test_watches_without_a_key_are_limited() -> None:
    async with serve_scripted(unauthenticated=1) as opened:
        health = HealthStub(opened.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        refused = await failure(health.Watch(health_pb2.HealthCheckRequest()))
        assert reason_of(refused) == "overloaded"
        watch.cancel()


async def test_a_server_that_is_being_stopped_is_not_serving() -> None:
    options = ServerOptions("127.0.0.1:0", grace=5)
    async with asyncio.timeout(20), AsyncExitStack() as stack:
        async with open_server(ScriptedServices().services(), options) as opened:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(opened.address))
            watch = HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


@pytest.mark.parametrize("gateway", [False, True])
async def test_the_health_checks_of_a_gateway_keep_its_connection_open(gateway: bool) -> None:
    connections = Recorder()
    metadata = PROOF.metadata("grpc", "", "") if gateway else []
    async with serve_scripted(connections=connections) as opened:
        await HealthStub(opened.channel).Check(health_pb2.HealthCheckRequest(), metadata=metadata)
    reports = [
        each for each in connections.reports if each not in ("sending", "sent")
    ]  # as of every response
    assert reports == ["authenticated", "trust", "ended"] * gateway


async def test_a_client_asks_whether_a_server_serves() -> None:
    async with serve_scripted() as opened, open_health(opened.server.address) as check:
        assert await check(5.0) is True
        opened.server.readiness.drain()
        assert await check(5.0) is False


class Other(HealthServicer):  # type: ignore[misc]
    """The health of a server that is not Pomelo's."""

    async def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse()


async def test_a_server_that_does_not_say_that_it_serves_does_not_serve() -> None:
    server = grpc.aio.server()
    add_HealthServicer_to_server(Other(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with open_health(f"127.0.0.1:{port}") as check:
            assert await check(20.0) is False
    finally:
        await server.stop(None)


async def test_a_client_waits_only_so_long_and_reports_a_server_that_does_not_respond() -> None:
    async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    silent = await asyncio.start_server(ignore, "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    async with asyncio.timeout(20), silent:
        async with open_health(f"{host}:{port}") as check:
            with refused("deadline_exceeded"):
                await check(0.1)
        with pytest.raises(grpc.aio.UsageError):
            await check(5.0)
