"""The gRPC server: addresses, limits, health, TLS, and shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pomelo.app import App
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.network.tls import read_certificate
from pomelo.server.call_limits import CallLimits
from pomelo.server.remote import Tls, open_remote
from pomelo.server.server import ServerOptions, open_server
from pomelo.service import list_all_models
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.calls import bearer, call_of, failure, reason_of, refusal
from tests.conftest import Keys
from tests.integration.both_ends import both_ends
from tests.tasks import text_task

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def models(channel: grpc.aio.Channel, key: str) -> Any:
    """Lists the models, which is free of charge."""
    return await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(key))


# --- health


async def test_a_watcher_receives_not_serving_and_does_not_delay_the_drain(app: App, keys: Keys) -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(25):
        async with (
            open_server(app.services, ServerOptions("127.0.0.1:0", grace=30)) as server,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            server.readiness.drain()
            assert (await watch.read()).status == NOT_SERVING
            assert await watch.read() is grpc.aio.EOF
            assert (await models(channel, keys.test)).models, "calls are still taken"
            late = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await late.read()).status == NOT_SERVING
            unknown = health_pb2.HealthCheckRequest(service="nope")
            open_watch = health_pb2_grpc.HealthStub(channel).Watch(unknown)
            await open_watch.read()
            began = loop.time()
        assert loop.time() - began < 10, "it does not wait for the grace period"


# --- addresses and limits


async def test_an_address_in_use_is_an_error_and_not_shared(app: App) -> None:
    assert app.grpc is not None
    with pytest.raises(OSError, match="can't listen"):
        async with open_server(app.services, ServerOptions(app.grpc)):
            pass


@pytest.mark.parametrize("address", ["127.0.0.1:0", "[::1]:0", "unix:FOLDER/s"])
async def test_an_address_of_each_type_is_served(app: App, keys: Keys, folder: Path, address: str) -> None:
    options = ServerOptions(address.replace("FOLDER", str(folder)))
    async with (
        open_server(app.services, options) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        assert server.address.rpartition(":")[2] != "0"
        assert (await models(channel, keys.test)).models


async def test_a_message_above_the_limit_is_refused(app: App, keys: Keys) -> None:
    async with both_ends(app.services, limits=CallLimits(message=10_000)) as (server, services):
        for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip):
            async with grpc.aio.insecure_channel(server.address, compression=compression) as channel:
                request = RunTaskRequest(spec=text_task("x" * 11_000))
                error = await failure(TaskServiceStub(channel).RunTask(request, metadata=bearer(keys.test)))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert reason_of(error) == "payload_too_large"
            assert "10,000 bytes" in (error.details() or "")
        refused = await refusal(
            services.tasks.run_task(text_task("x" * 11_000), TaskOptions(), call_of(keys.test))
        )
        assert refused.code == "payload_too_large"
        assert "larger than 10,000 bytes" in refused.message


# --- shutdown


async def test_a_running_call_may_end_within_the_grace(app: App, keys: Keys, upstream: FaultUpstream) -> None:
    gate = Gate()
    upstream.when("ends within the grace", Answer("one two", at={1: gate}))
    async with asyncio.timeout(20):
        opened = open_server(app.services, ServerOptions("127.0.0.1:0", grace=10))
        server = await opened.__aenter__()
        async with grpc.aio.insecure_channel(server.address) as channel:
            request = RunTaskRequest(spec=text_task("ends within the grace"))
            call = TaskServiceStub(channel).RunTask(request, metadata=bearer(keys.live))
            await gate.reached.wait()
            leaving = asyncio.ensure_future(opened.__aexit__(None, None, None))
            await refused_now(server.address, keys)
            gate.open()
            assert (await call).result.text.message.content[0].text == "one two"
            await leaving


async def refused_now(address: str, keys: Keys) -> None:
    """Returns when new callers are refused."""
    while True:
        async with grpc.aio.insecure_channel(address) as late:
            call = ModelServiceStub(late).ListModels(ListModelsRequest(), metadata=bearer(keys.test))
            status = await call.code()
            # grpc.aio itself cancels calls that arrive in the moment of the shutdown.
            if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                return
            assert status == grpc.StatusCode.OK


async def test_calls_are_cancelled_after_the_grace_and_their_handlers_end_before_the_server(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    upstream.when("longer than the grace", Answer("one two", at={1: gate}))
    count = 20
    async with asyncio.timeout(20):
        async with open_server(app.services, ServerOptions("127.0.0.1:0", grace=0)) as server:
            channel = grpc.aio.insecure_channel(server.address)
            request = StreamTaskRequest(spec=text_task("longer than the grace"))
            calls = [
                TaskServiceStub(channel).StreamTask(request, metadata=bearer(keys.live)) for _ in range(count)
            ]
            for call in calls:
                assert (await anext(aiter(call))).event.WhichOneof("event") == "started"
            assert server.running.count == count
        assert server.running.count == 0
        for call in calls:
            assert (await failure(call)).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        for received in upstream.requests:
            if received.prompt == "longer than the grace":
                await received.left.wait()
        await channel.close()


# --- TLS


@asynccontextmanager
async def served_with_tls(app: App, certificates: Path, *, clients: bool) -> AsyncIterator[str]:
    """Opens a server with a certificate, and yields its address by name."""
    options = ServerOptions(
        "127.0.0.1:0",
        certificate=read_certificate(
            certificates / "server.pem",
            certificates / "server.key",
            certificates / "ca.pem" if clients else None,
        ),
    )
    async with open_server(app.services, options) as server:
        yield f"localhost:{server.address.rpartition(':')[2]}"


async def test_a_gateway_reaches_a_server_with_tls(app: App, keys: Keys, certificates: Path) -> None:
    async with (
        served_with_tls(app, certificates, clients=False) as address,
        open_remote(address, tls=Tls(ca=certificates / "ca.pem")) as services,
        open_remote(address) as plain,
    ):
        assert await list_all_models(services.models, call_of(keys.test))
        with pytest.raises(Exception, match="can't reach the server"):
            await list_all_models(plain.models, call_of(keys.test))


async def test_a_server_with_a_client_authority_accepts_only_its_clients(
    app: App, keys: Keys, certificates: Path
) -> None:
    ca = certificates / "ca.pem"
    known = Tls(ca=ca, cert=certificates / "client.pem", key=certificates / "client.key")
    async with (
        served_with_tls(app, certificates, clients=True) as address,
        open_remote(address, tls=known) as services,
        open_remote(address, tls=Tls(ca=ca)) as unauthenticated,
    ):
        assert await list_all_models(services.models, call_of(keys.test))
        with pytest.raises(Exception, match="can't reach the server"):
            await list_all_models(unauthenticated.models, call_of(keys.test))
