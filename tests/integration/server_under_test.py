"""A gRPC server with the services of an app and with limits of its own, and connections to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import Any

import grpc
from grpc_health.v1.health_pb2_grpc import HealthStub

from pomelo.accounts.access import Access
from pomelo.app import App
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import TextInput
from pomelo.network.origin import GatewayProof
from pomelo.runtime.in_flight import InFlight, InFlightLimits
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionLimits, ConnectionObserver
from pomelo.server.server import Server, ServerOptions, open_server
from tests.calls import bearer, failure, reason_of
from tests.faults import http2
from tests.tasks import text_task

MIB = 1024 * 1024
RUN_TASK = "/pomelo.v1.TaskService/RunTask"
STREAM_TASK = "/pomelo.v1.TaskService/StreamTask"
UPLOAD = "/pomelo.v1.MediaService/UploadMedia"
DOWNLOAD = "/pomelo.v1.MediaService/DownloadMedia"
LIST_MODELS = "/pomelo.v1.ModelService/ListModels"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
PROOF = GatewayProof(b"p" * 32)


@dataclass
class RecordedReports(ConnectionObserver):
    """Records the reports about connections."""

    entries: list[tuple[str, Any]] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def _record(self, name: str, argument: Any) -> None:
        self.entries.append((name, argument))
        self._more.set()

    def authenticated(self, peer: str) -> None:
        self._record("authenticated", peer)

    def received(self, peer: str, size: int) -> None:
        self._record("received", size)

    def reset(self, peer: str) -> None:
        self._record("reset", peer)

    def trust(self, peer: str) -> None:
        self._record("trust", peer)

    def ended(self, peer: str) -> None:
        self._record("ended", peer)

    async def until(self, name: str, count: int = 1) -> None:
        """Returns when there are `count` reports of that name."""
        while self.names().count(name) < count:
            self._more.clear()
            await self._more.wait()

    def names(self) -> list[str]:
        """Returns the names of the reports, without their arguments."""
        return [name for name, _ in self.entries]


class ServerUnderTest:
    """A server, a channel to it, its reports about connections, and what it has in flight."""

    def __init__(
        self, server: Server, reports: RecordedReports, channel: grpc.aio.Channel, in_flight: InFlight
    ) -> None:
        self.server, self.reports, self.channel, self.in_flight = server, reports, channel, in_flight
        self.tasks, self.media = TaskServiceStub(channel), MediaServiceStub(channel)
        self.health = HealthStub(channel)

    def run(self, key: str, spec: TaskSpec, **options: Any) -> Any:
        """Starts a call of RunTask."""
        return self.tasks.RunTask(RunTaskRequest(spec=spec), metadata=bearer(key), **options)

    def stream(self, key: str, spec: TaskSpec) -> Any:
        """Starts a call of StreamTask."""
        return self.tasks.StreamTask(StreamTaskRequest(spec=spec), metadata=bearer(key))

    async def list_models(self, key: str) -> Any:
        """Lists the models, which is free of charge."""
        return await ModelServiceStub(self.channel).ListModels(ListModelsRequest(), metadata=bearer(key))

    def call(self, path: str, data: bytes, key: str | None, **options: Any) -> Any:
        """Starts a unary call with bytes that need not be a message."""
        return self.channel.unary_unary(path)(data, metadata=bearer(key) if key else [], **options)

    @asynccontextmanager
    async def raw(self, *, wide: bool = True) -> AsyncIterator[http2.Connection]:
        """Opens a connection that can send what no gRPC client sends; if not `wide`, it receives only 64 KiB."""
        host, _, port = self.server.address.rpartition(":")
        async with http2.connect(host, int(port), wide=wide) as connection:
            yield connection


@asynccontextmanager
async def open_server_under_test(
    app: App, in_flight: InFlightLimits | None = None, *, proxies: Sequence[str] = (), **limits: Any
) -> AsyncIterator[ServerUnderTest]:
    """Opens a server with these limits of calls, which trusts `proxies`."""
    inner = app.services.access._access  # type: ignore[attr-defined]
    access = Access(inner._keyring, inner._plans, inner._catalog, inner._limits, in_flight)
    reports = RecordedReports()
    services = replace(app.services, access=access)
    trusted = tuple(map(ip_network, proxies))
    options = ServerOptions(
        "127.0.0.1:0", limits=CallLimits(**limits), connections=ConnectionLimits(trusted=trusted)
    )
    channel_options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    async with (
        open_server(services, options, proof=PROOF, connections=reports) as server,
        grpc.aio.insecure_channel(server.address, options=channel_options) as channel,
    ):
        yield ServerUnderTest(server, reports, channel, access.in_flight)


async def exchange(
    connection: http2.Connection,
    path: str,
    metadata: Iterable[tuple[str, str]] = (),
    data: bytes = b"",
    *,
    end: bool = False,
) -> http2.Stream:
    """Makes a call with these bytes, and returns it when the server has ended it. With `end`, the caller ends
    its side too."""
    call = connection.begin(path, metadata, end=end and not data)
    await connection.send(call, data, end=end)
    async with asyncio.timeout(20):
        await connection.over(call)
    return call


async def refusal(call: Any, status: grpc.StatusCode, reason: str) -> grpc.aio.AioRpcError:
    """Returns the error that ends a call, which has this status and reason."""
    error = await failure(call)
    assert (error.code(), reason_of(error)) == (status, reason)
    return error


async def new_key(app: App, plan: str) -> str:
    """Returns a test key of a new account."""
    name = f"account-{time.time_ns()}"
    await app.store.add_account(name, plan, time.time())
    return (await app.keyring.create(name))[1]


def run_message(prompt: str = "Hello, world!") -> bytes:
    """Returns the bytes of a RunTask request."""
    return RunTaskRequest(spec=text_task(prompt)).SerializeToString()


def flood(size: int) -> bytes:
    """Returns a RunTask request of that many bytes, which consists of empty messages."""
    text = TextInput.DESCRIPTOR.fields_by_name["messages"]
    messages = bytes((text.number << 3 | 2, 0)) * (size // 2)
    head = RunTaskRequest(spec=TaskSpec(model="gpt-4", text=TextInput())).SerializeToString()
    assert head.endswith(b"\x12\x00")

    def nested(tag: int, inner: bytes) -> bytes:
        length, count = [], len(inner)
        while count >= 0x80:
            length.append(count & 0x7F | 0x80)
            count >>= 7
        return bytes((tag, *length, count)) + inner

    return nested(0x0A, b"\x0a\x05gpt-4" + nested(0x12, messages))
