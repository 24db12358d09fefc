"""A gateway whose server drains behind a load balancer of connections goes on with another server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest

from pomelo.app import App
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.network.origin import GatewayProof
from pomelo.runtime.draining import Draining
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.remote import channel, open_remote, pool
from pomelo.server.remote.pool import ConnectionPool
from pomelo.server.remote.services import RemoteModels
from pomelo.server.server import Server, ServerOptions, open_server
from pomelo.service import Services, list_all_models
from pomelo.telemetry.readiness import Readiness
from tests.calls import call_of, refusal
from tests.conftest import Keys
from tests.integration.server_under_test import PROOF
from tests.tasks import text_task
from tests.waiting import cancel, until


class Balancer:
    """Forwards each new connection to the port `to`, and keeps those that it has. Without those that it `froze`,
    which pass nothing on."""

    def __init__(self, server: Server) -> None:
        self.lead_to(server)
        self.connections = 0
        self.froze = 0

    def freeze(self) -> None:
        """Lets all connections of now pass nothing on any more, as if their server had no power."""
        self.froze = self.connections

    def lead_to(self, server: Server) -> None:
        self._to = int(server.address.rpartition(":")[2])

    @asynccontextmanager
    async def listen(self) -> AsyncIterator[str]:
        """Listens, and yields its address."""
        listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        finally:
            listener.close()  # does not wait for connections, as the end of `async with` does since Python 3.12

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to)
        await asyncio.gather(
            self._forward(number, reader, to_writer), self._forward(number, to_reader, writer)
        )

    async def _forward(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65_536):
                if number > self.froze:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@asynccontextmanager
async def serve(services: Services, readiness: Readiness | None = None) -> AsyncIterator[Server]:
    async with open_server(
        services,
        ServerOptions("127.0.0.1:0", grace=0.1),
        connections=ConnectionObserver(),
        readiness=readiness,
    ) as server:
        yield server


@pytest.fixture(autouse=True)
def _leaves_immediately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "_LEAVE_AFTER", 0.0)
    monkeypatch.setattr(pool, "_HEALTH_TIMEOUT", 20.0)


async def test_calls_go_on_with_another_server_while_streams_of_the_draining_one_continue(
    app: App, keys: Keys
) -> None:
    draining = Draining()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serve(draining.guard(app.services)))
        second = await stack.enter_async_context(serve(app.services))
        balancer = Balancer(first)
        address = await stack.enter_async_context(balancer.listen())
        tasks = (await stack.enter_async_context(open_remote(address))).tasks
        async with tasks.stream_task(
            text_task("[[delay:1]] Hi"), TaskOptions(), call_of(keys.test)
        ) as events:
            balancer.lead_to(second)
            draining.drain()
            assert (
                await refusal(tasks.run_task(text_task(), TaskOptions(), call_of(keys.test)))
            ).code == "shutting_down"
            for _ in range(3):
                assert (await tasks.run_task(text_task(), TaskOptions(), call_of(keys.test))).HasField("text")
            assert [event async for event in events][-1].HasField("completed")
        assert balancer.connections == 2


async def test_a_gateway_stays_ready_if_another_server_is(app: App) -> None:
    readiness = Readiness()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serve(app.services, readiness))
        second = await stack.enter_async_context(serve(app.services))
        balancer = Balancer(first)
        address = await stack.enter_async_context(balancer.listen())
        connections = ConnectionPool(address, None, stack, PROOF, {})
        await connections.check_health()
        readiness.drain()
        balancer.lead_to(second)
        assert (await refusal(connections.check_health())).code == "server_unavailable"
        for _ in range(3):
            await connections.check_health()
        assert balancer.connections == 2


@pytest.mark.parametrize("proof", [PROOF, GatewayProof()], ids=["proven", "not"])
async def test_calls_go_on_with_another_server_if_one_does_not_respond(
    app: App, keys: Keys, monkeypatch: pytest.MonkeyPatch, proof: GatewayProof
) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serve(app.services))
        second = await stack.enter_async_context(serve(app.services))
        balancer = Balancer(first)
        address = await stack.enter_async_context(balancer.listen())
        connections = ConnectionPool(address, None, stack, proof, {})
        models = RemoteModels(connections)
        assert await list_all_models(models, call_of(keys.test))
        balancer.freeze()
        balancer.lead_to(second)
        hanging = asyncio.ensure_future(list_all_models(models, call_of(keys.test)))
        await until(lambda: connections.pick().calls == 1)
        monkeypatch.setattr(pool, "_HEALTH_TIMEOUT", 0.5)
        assert (await refusal(connections.check_health())).code == "deadline_exceeded"
        assert await list_all_models(models, call_of(keys.test))
        assert balancer.connections == 2
        await cancel(hanging)


async def test_a_new_connection_to_a_draining_server_is_kept_for_a_while(
    app: App, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "_LEAVE_AFTER", 600.0)
    draining = Draining()
    draining.drain()
    async with AsyncExitStack() as stack:
        balancer = Balancer(await stack.enter_async_context(serve(draining.guard(app.services))))
        address = await stack.enter_async_context(balancer.listen())
        tasks = (await stack.enter_async_context(open_remote(address))).tasks
        for _ in range(3):
            refused = tasks.run_task(text_task(), TaskOptions(), call_of(keys.test))
            assert (await refusal(refused)).code == "shutting_down"
        assert balancer.connections == 1
