"""Limits of gRPC calls before they are served, and how calls are refused."""

from __future__ import annotations

import asyncio
import gc
import gzip
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from pomelo.accounts.access import Access
from pomelo.app import App
from pomelo.errors import TABLE
from pomelo.gen.v1 import (
    account_service_pb2,
    media_service_pb2,
    model_service_pb2,
    task_service_pb2,
    text_pb2,
)
from pomelo.gen.v1.account_service_pb2 import GetAccountRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.in_flight import InFlight, InFlightLimits
from pomelo.origin import GatewayProof
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.server import Server, ServerOptions, open_server
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.calls import as_dict, bearer, end, failure, reason_of
from tests.conftest import Keys
from tests.faults import frames, http2
from tests.tasks import text_task

MIB = 1024 * 1024
RUN_TASK = "/pomelo.v1.TaskService/RunTask"
UPLOAD = "/pomelo.v1.MediaService/UploadMedia"
LIST_MODELS = "/pomelo.v1.ModelService/ListModels"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
DOWNLOAD = "/pomelo.v1.MediaService/DownloadMedia"
SERVICES = [
    file.DESCRIPTOR.services_by_name[name]
    for file, name in (
        (task_service_pb2, "TaskService"),
        (model_service_pb2, "ModelService"),
        (media_service_pb2, "MediaService"),
        (account_service_pb2, "AccountService"),
        (health_pb2, "Health"),
    )
]


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


PROOF = GatewayProof(b"p" * 32)


@dataclass
class ServerUnderTest:
    """A server with the app's services and its own limits."""

    server: Server
    reports: RecordedReports
    channel: grpc.aio.Channel
    in_flight: InFlight

    @asynccontextmanager
    async def raw(self) -> AsyncIterator[http2.Connection]:
        """Opens a connection that can send what no gRPC client sends."""
        host, _, port = self.server.address.rpartition(":")
        async with http2.connect(host, int(port)) as connection:
            yield connection


@asynccontextmanager
async def open_server_under_test(
    app: App, in_flight: InFlightLimits | None = None, **limits: Any
) -> AsyncIterator[ServerUnderTest]:
    """Opens a test server."""
    inner = app.services.access._access  # type: ignore[attr-defined]
    access = Access(inner._keyring, inner._plans, inner._catalog, inner._limits, in_flight)
    reports = RecordedReports()
    services = replace(app.services, access=access)
    options = ServerOptions("127.0.0.1:0", limits=CallLimits(**limits))
    async with (
        open_server(services, options, proof=PROOF, connections=reports) as server,
        grpc.aio.insecure_channel(
            server.address,
            options=[("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)],
        ) as channel,
    ):
        yield ServerUnderTest(server, reports, channel, access.in_flight)


@pytest.fixture(scope="module")
async def plain(app: App) -> AsyncIterator[ServerUnderTest]:
    """A server with the default limits."""
    async with open_server_under_test(app) as opened:
        yield opened


async def list_models(channel: grpc.aio.Channel, key: str) -> Any:
    """Lists the models, which is free of charge."""
    return await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(key))


def raw_call(channel: grpc.aio.Channel, path: str, data: bytes, key: str | None, **more: Any) -> Any:
    """Makes a unary call with bytes that need not be a message."""
    metadata = bearer(key) if key else []
    return channel.unary_unary(path)(data, metadata=metadata, **more)


# --- the methods


@pytest.mark.parametrize(
    "method", [method for service in SERVICES for method in service.methods], ids=lambda m: m.full_name
)
async def test_every_method_of_the_contract_is_served_as_its_clients_call_it(
    method: Any, plain: ServerUnderTest, keys: Keys
) -> None:
    call_type = {
        (False, False): "unary_unary",
        (False, True): "unary_stream",
        (True, False): "stream_unary",
        (True, True): "stream_stream",
    }[method.client_streaming, method.server_streaming]
    path = f"/{method.containing_service.full_name}/{method.name}"
    request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    callable_ = getattr(plain.channel, call_type)(
        path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString
    )
    requests = iter([request()]) if method.client_streaming else request()
    call = callable_(requests, metadata=bearer(keys.test), timeout=5)
    if method.name == "Watch":
        assert (await call.read()).status
        call.cancel()
        return
    error = None
    try:
        await end(call)
    except grpc.aio.AioRpcError as failed:
        error = failed
    # The requests are empty; an error about a missing field proves that the method has read it.
    codes = ("missing_parameter", "invalid_parameter", "unsupported_model", "not_found")
    assert error is None or reason_of(error) in codes


async def test_an_unknown_method_gets_the_documented_error(plain: ServerUnderTest, keys: Keys) -> None:
    for path in ("/pomelo.v1.TaskService/Nope", "/nope.Nope/Nope"):
        error = await failure(raw_call(plain.channel, path, b"", keys.test))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNIMPLEMENTED, "method_not_allowed")


# --- refusals


@pytest.mark.parametrize(
    ("metadata", "path"),
    [([], RUN_TASK), ([("authorization", "Bearer nope")], RUN_TASK), ([], LIST_MODELS), ([], UPLOAD)],
)
async def test_a_call_without_a_valid_key_ends_before_its_message_is_read(
    metadata: list[tuple[str, str]], path: str, plain: ServerUnderTest
) -> None:
    plain.reports.entries.clear()
    async with plain.raw() as connection:
        call = connection.begin(path, metadata)
        async with asyncio.timeout(5):
            await connection.over(call)
    if path != UPLOAD:  # an upload gets a moment to end
        assert call.lasted < 0.5
    # A single HEADERS frame that ends the stream is a trailers-only response.
    assert call.frames[0] == (frames.HEADERS, frames.END_STREAM | frames.END_HEADERS)
    assert (frames.DATA, 0) not in call.frames
    assert plain.reports.names() == []


@pytest.mark.parametrize(
    ("task", "code"),
    [(text_task(model="nope"), "unsupported_model"), (text_task("[[error:insufficient_credits]]"), "insufficient_credits")],
)  # fmt: skip
async def test_a_refusal_of_a_known_caller_is_a_trailers_only_response(
    task: Task, code: str, plain: ServerUnderTest, keys: Keys
) -> None:
    for path, request in (
        (RUN_TASK, RunTaskRequest(task=task)),
        ("/pomelo.v1.TaskService/StreamTask", StreamTaskRequest(task=task)),
    ):
        async with plain.raw() as connection:
            call = connection.begin(path, bearer(keys.test))
            await connection.send(call, http2.prefixed(request.SerializeToString()), end=True)
            async with asyncio.timeout(5):
                await connection.over(call)
        assert call.frames == [(frames.HEADERS, frames.END_STREAM | frames.END_HEADERS)]


async def test_an_empty_upload_gets_a_trailers_only_response(plain: ServerUnderTest, keys: Keys) -> None:
    async with plain.raw() as connection, asyncio.timeout(5):
        call = connection.begin(UPLOAD, bearer(keys.test), end=True)
        await connection.over(call)
    assert call.frames == [(frames.HEADERS, frames.END_STREAM | frames.END_HEADERS)]


@pytest.mark.parametrize("call_type", ["unary_unary", "unary_stream", "stream_unary"])
async def test_a_client_that_still_sends_megabytes_receives_the_reason_of_its_refusal(
    call_type: str, plain: ServerUnderTest, keys: Keys
) -> None:
    big = UploadMediaRequest(chunk=b"x" * MIB).SerializeToString()
    path = UPLOAD if call_type == "stream_unary" else RUN_TASK

    async def one() -> str:
        requests: Any = iter([big] * 8) if call_type == "stream_unary" else b"x" * (8 * MIB)
        call = getattr(plain.channel, call_type)(path)(requests, metadata=bearer(keys.revoked))
        return reason_of(await failure(call))

    for _ in range(5):
        assert await one() == "invalid_api_key"
    # Only two uploads without a key at a time get the grace period that grpc.aio's client needs.
    count = 2 if call_type == "stream_unary" else 5
    assert set(await asyncio.gather(*[one() for _ in range(count)])) == {"invalid_api_key"}


def blocking(address: str, key: str) -> list[str]:
    """Returns the errors that a client without asyncio receives."""
    reasons = []
    with grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
        for ask in (
            lambda: channel.unary_unary(RUN_TASK)(b"x" * (8 * MIB), metadata=bearer(key)),
            lambda: list(channel.unary_stream(RUN_TASK)(b"x" * (8 * MIB), metadata=bearer(key))),
            lambda: channel.stream_unary(UPLOAD)(iter([b"x" * MIB] * 8), metadata=bearer(key)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                ask()
            reasons.append(reason_of(caught.value))
    return reasons


async def test_a_client_without_asyncio_receives_it_too(plain: ServerUnderTest, keys: Keys) -> None:
    assert await asyncio.to_thread(blocking, plain.server.address, keys.revoked) == ["invalid_api_key"] * 3


async def test_a_request_must_have_exactly_one_message(plain: ServerUnderTest, keys: Keys) -> None:
    one = RunTaskRequest(task=text_task()).SerializeToString()
    for messages in ([], [one, one]):
        call = plain.channel.stream_unary(RUN_TASK)(iter(messages), metadata=bearer(keys.test))
        error = await failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_body")
        assert as_dict(error.trailing_metadata())["x-credits-remaining"]
    call = plain.channel.stream_unary(RUN_TASK)(iter([one]), metadata=bearer(keys.test))
    assert await call


@pytest.mark.parametrize("path", [RUN_TASK, LIST_MODELS, CHECK, DOWNLOAD])
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05gpt", b"\x0a\x02\x0a\xff"])
async def test_a_message_that_can_t_be_decoded_gets_the_documented_error(
    path: str, data: bytes, plain: ServerUnderTest, keys: Keys
) -> None:
    if (path, data) == (LIST_MODELS, b"\x0a\x02\x0a\xff"):
        return  # it is an unknown field in that message
    error = await failure(raw_call(plain.channel, path, data, keys.test))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_body")


def flood(size: int) -> bytes:
    """Returns a RunTask request of that many bytes, which consists of empty messages."""
    text = text_pb2.TextInput.DESCRIPTOR.fields_by_name["messages"]
    messages = bytes((text.number << 3 | 2, 0)) * (size // 2)
    head = RunTaskRequest(task=Task(model="gpt-4", text=text_pb2.TextInput())).SerializeToString()
    assert head.endswith(b"\x12\x00")

    def nested(tag: int, inner: bytes) -> bytes:
        length, count = [], len(inner)
        while count >= 0x80:
            length.append(count & 0x7F | 0x80)
            count >>= 7
        return bytes((tag, *length, count)) + inner

    return nested(0x0A, b"\x0a\x05gpt-4" + nested(0x12, messages))


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_of_millions_of_fields_is_refused_before_it_is_parsed(
    compression: grpc.Compression, plain: ServerUnderTest, keys: Keys
) -> None:
    data = flood(9_400_000)
    error = await failure(raw_call(plain.channel, RUN_TASK, data, keys.test, compression=compression))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    assert "Too many messages" in (error.details() or "")


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_message_above_the_limit_is_refused_with_the_limit(
    compression: grpc.Compression, plain: ServerUnderTest, keys: Keys
) -> None:
    for size in (9 * MIB + 1, 12 * MIB, 17 * MIB):
        data = RunTaskRequest(task=text_task("x" * size)).SerializeToString()
        error = await failure(raw_call(plain.channel, RUN_TASK, data, keys.test, compression=compression))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "payload_too_large")
        metadata = as_dict(error.trailing_metadata())
        assert metadata["grpc-retry-pushback-ms"] == "-1"
        assert metadata["x-credits-remaining"]


async def test_calls_that_grpc_refuses_itself_do_no_harm(
    plain: ServerUnderTest, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    zeros = gzip.compress(b"\0" * (200 * MIB), 1)
    async with plain.raw() as connection:
        for metadata, data in (
            ([], http2.prefixed(b"x" * 70_000, size=2**31)),
            ([("grpc-encoding", "gzip")], http2.prefixed(zeros, compressed=True)),
            ([("grpc-encoding", "gzip")], http2.prefixed(b"junk", compressed=True)),
        ):
            call = connection.begin(RUN_TASK, [*bearer(keys.test), *metadata])
            await connection.send(call, data, end=True)
            async with asyncio.timeout(10):
                await connection.over(call)
    await plain.server.running.idle()
    assert not [record.getMessage() for record in caplog.records]
    assert (await list_models(plain.channel, keys.test)).models


@pytest.mark.parametrize(
    # Of two traceparents grpc itself keeps only one.
    "name",
    ["idempotency-key", "x-request-id", "x-request-timeout", "prefer", "accept"],
)
async def test_repeated_metadata_is_refused_and_named(name: str, plain: ServerUnderTest, keys: Keys) -> None:
    metadata = [*bearer(keys.test), (name, "5"), (name, "6")]
    stub = TaskServiceStub(plain.channel)
    for call in (
        stub.RunTask(RunTaskRequest(task=text_task()), metadata=metadata),
        stub.StreamTask(StreamTaskRequest(task=text_task()), metadata=metadata),
        MediaServiceStub(plain.channel).UploadMedia(
            iter([UploadMediaRequest(chunk=b"x")]), metadata=metadata
        ),
        AccountServiceStub(plain.channel).GetAccount(GetAccountRequest(), metadata=metadata),
    ):
        error = await failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
        assert name in (error.details() or "").lower()


async def test_a_repeated_key_is_refused_whichever_is_valid(plain: ServerUnderTest, keys: Keys) -> None:
    good, bad = bearer(keys.test), bearer(keys.revoked)
    for metadata in (good + bad, bad + good, good + good):
        call = TaskServiceStub(plain.channel).RunTask(RunTaskRequest(task=text_task()), metadata=metadata)
        error = await failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
        assert "twice" in (error.details() or "")


# --- unauthenticated callers


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION, DOWNLOAD])
@pytest.mark.parametrize("message", [False, True])
async def test_a_call_that_needs_no_key_ends_in_time(path: str, message: bool, app: App) -> None:
    async with open_server_under_test(app, unauthenticated_time=0.2) as opened, opened.raw() as connection:
        call = connection.begin(path)
        if message:
            await connection.send(call, http2.prefixed(b""))
        async with asyncio.timeout(5):
            await connection.over(call)
        assert 0.15 < call.lasted < 2
        assert (frames.HEADERS, frames.END_STREAM | frames.END_HEADERS) in call.frames


async def test_a_watch_without_a_key_is_ended_with_a_reason_and_one_with_a_key_continues(
    app: App, keys: Keys
) -> None:
    async with open_server_under_test(app, unauthenticated_time=0.3) as opened:
        health = health_pb2_grpc.HealthStub(opened.channel)
        stays = health.Watch(health_pb2.HealthCheckRequest(), metadata=bearer(keys.test))
        assert (await stays.read()).status
        for metadata in ([], bearer(keys.revoked)):
            error = await failure(health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata))
            assert (error.code(), reason_of(error)) == (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "deadline_exceeded",
            )
            assert "0.3 seconds" in (error.details() or "")
        assert opened.in_flight.calls == 1
        opened.server.drain()
        assert (await stays.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await stays.read() is grpc.aio.EOF
        await opened.server.running.idle()
        assert opened.in_flight.calls == 0


async def test_unauthenticated_calls_have_a_separate_small_limit(app: App, keys: Keys) -> None:
    async with open_server_under_test(app, unauthenticated=3) as opened:
        health = health_pb2_grpc.HealthStub(opened.channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status
        for call in (
            health.Watch(health_pb2.HealthCheckRequest()),
            ServerReflectionStub(opened.channel).ServerReflectionInfo(
                iter([ServerReflectionRequest(list_services="")])
            ),
            MediaServiceStub(opened.channel).DownloadMedia(DownloadMediaRequest(signature="x")),
        ):
            error = await failure(call)
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
            assert as_dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        assert (await list_models(opened.channel, keys.test)).models
        with_key = health.Watch(health_pb2.HealthCheckRequest(), metadata=bearer(keys.test))
        assert (await with_key.read()).status
        for watch in (*watches, with_key):
            watch.cancel()


async def test_an_unauthenticated_call_with_an_incomplete_message_is_replaced_by_the_next(app: App) -> None:
    half = http2.prefixed(b"\x0a" * MIB, size=2 * MIB)
    async with asyncio.timeout(20), open_server_under_test(app) as opened, opened.raw() as connection:
        calls = [connection.begin(path) for path in (CHECK, WATCH, DOWNLOAD, REFLECTION) * 3]
        sending = [asyncio.ensure_future(connection.send(call, half)) for call in calls]
        health = health_pb2_grpc.HealthStub(opened.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        began = time.monotonic()
        checks = [health.Check(health_pb2.HealthCheckRequest()) for _ in range(20)]
        assert all([(await check).status for check in checks])
        assert time.monotonic() - began < 1.0
        for task in sending:
            task.cancel()


async def test_a_large_message_without_a_key_is_refused(plain: ServerUnderTest) -> None:
    for path in (CHECK, DOWNLOAD):
        error = await failure(raw_call(plain.channel, path, b"\x0a\x80\x80\x08" + b"x" * (128 * 1024), None))
        assert reason_of(error) == "payload_too_large"


# --- authenticated callers


async def test_a_message_that_does_not_arrive_in_time_ends_the_call(app: App, keys: Keys) -> None:
    async with (
        open_server_under_test(app, read_time=0.3, chunk_time=0.3) as opened,
        opened.raw() as connection,
    ):
        head = http2.prefixed(b"", size=9 * MIB)
        for path, data in ((RUN_TASK, b""), (RUN_TASK, head), (UPLOAD, b""), (UPLOAD, head)):
            call = connection.begin(path, bearer(keys.test))
            await connection.send(call, data)
            async with asyncio.timeout(5):
                await connection.over(call)
            assert 0.25 < call.lasted < 2.5
        call = opened.channel.stream_unary(RUN_TASK)(metadata=bearer(keys.test))
        error = await failure(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
        assert "0.3 seconds" in (error.details() or "")
        assert as_dict(error.trailing_metadata())["x-credits-remaining"]
        await opened.server.running.idle()
        assert opened.in_flight.calls == 0


async def test_an_upload_may_take_long_while_chunks_arrive(app: App, keys: Keys) -> None:
    async with open_server_under_test(app, chunk_time=0.6, read_time=0.6) as opened:
        call = MediaServiceStub(opened.channel).UploadMedia(metadata=bearer(keys.test))
        for _ in range(6):
            await call.write(UploadMediaRequest(chunk=b"x" * 1000))
            await asyncio.sleep(0.15)
        await call.done_writing()
        assert (await call).media.size_bytes == 6000


async def test_an_account_receives_a_few_messages_at_a_time_without_delaying_others(
    app: App, keys: Keys
) -> None:
    other = f"other-{time.time_ns()}"
    await app.store.add_account(other, "unlimited", time.time())
    _, key = await app.keyring.create(other)
    half = http2.prefixed(b"\x0a" * MIB, size=2 * MIB)
    async with (
        asyncio.timeout(20),
        open_server_under_test(app, reads=2, read_time=1.0) as opened,
        opened.raw() as connection,
    ):
        calls = [connection.begin(RUN_TASK, bearer(keys.test)) for _ in range(6)]
        sending = [asyncio.ensure_future(connection.send(call, half)) for call in calls]
        await opened.reports.until("authenticated", 6)
        began = time.monotonic()
        assert (await list_models(opened.channel, key)).models
        assert time.monotonic() - began < 1.0
        if time.monotonic() - calls[0].began < 0.9:
            assert sum(one.done() for one in sending) <= 2, "a window is opened when the turn has come"
        for call in calls:
            await connection.over(call)
            assert call.lasted < 4, "the time to wait for a turn is part of the time to read"
        assert len(half) in await asyncio.gather(*sending)
        assert (await list_models(opened.channel, keys.test)).models


async def test_bytes_of_messages_are_counted_until_their_calls_end(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    prompt = "counted bytes " + "x" * 200_000
    upstream.when(prompt, Answer("one two", at={1: gate}))
    limits = InFlightLimits(account_bytes=300_000)
    async with asyncio.timeout(20), open_server_under_test(app, limits) as opened:
        stub, request = TaskServiceStub(opened.channel), RunTaskRequest(task=text_task(prompt))
        first = stub.RunTask(request, metadata=bearer(keys.live))
        await gate.reached.wait()
        assert opened.in_flight.bytes == request.ByteSize()
        error = await failure(stub.RunTask(request, metadata=bearer(keys.live)))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
        gate.open()
        assert (await first).result.text.content == "one two"
        await opened.server.running.idle()
        assert (opened.in_flight.calls, opened.in_flight.bytes) == (0, 0)


async def test_a_call_above_the_limit_of_calls_is_refused_and_the_others_continue(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    upstream.when("the only call", Answer("one two", at={1: gate}))
    async with asyncio.timeout(20), open_server_under_test(app, InFlightLimits(calls=1)) as opened:
        request = RunTaskRequest(task=text_task("the only call"))
        first = TaskServiceStub(opened.channel).RunTask(request, metadata=bearer(keys.live))
        await gate.reached.wait()
        for call in (
            TaskServiceStub(opened.channel).StreamTask(
                StreamTaskRequest(task=text_task()), metadata=bearer(keys.test)
            ),
            ModelServiceStub(opened.channel).ListModels(ListModelsRequest(), metadata=bearer(keys.test)),
            MediaServiceStub(opened.channel).UploadMedia(
                iter([UploadMediaRequest(chunk=b"x")]), metadata=bearer(keys.test)
            ),
        ):
            error = await failure(call)
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "overloaded")
            metadata = as_dict(error.trailing_metadata())
            assert (metadata["retry-after"], metadata["grpc-retry-pushback-ms"]) == ("1", "1000")
            assert metadata["x-credits-remaining"]
        health = health_pb2_grpc.HealthStub(opened.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        gate.open()
        assert (await first).result.text.content == "one two"


async def test_the_101st_call_on_a_connection_does_not_wait(app: App, keys: Keys) -> None:
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        opened = await stack.enter_async_context(open_server_under_test(app))
        streams = [
            TaskServiceStub(opened.channel).StreamTask(
                StreamTaskRequest(task=text_task("[[stall]]")), metadata=bearer(keys.test)
            )
            for _ in range(150)
        ]
        for stream in streams:
            stack.callback(stream.cancel)
            assert await stream.initial_metadata()
        assert (await list_models(opened.channel, keys.test)).models


@pytest.mark.parametrize(("interval", "stays"), [(0.1, True), (ServerOptions().ping_interval, False)])
async def test_pings_end_a_connection_only_when_they_are_more_frequent_than_allowed(
    interval: float, stays: bool, app: App, keys: Keys
) -> None:
    options = ServerOptions("127.0.0.1:0", ping_interval=interval)
    async with open_server(app.services, options, connections=ConnectionObserver()) as server:
        host, _, port = server.address.rpartition(":")
        async with http2.connect(host, int(port)) as connection, asyncio.timeout(10):
            call = connection.begin(RUN_TASK, bearer(keys.test))
            task = RunTaskRequest(task=text_task("[[delay:2]] Hello")).SerializeToString()
            await connection.send(call, http2.prefixed(task), end=True)
            while call.ended is None and not connection.closed:
                connection.ping()
                await asyncio.sleep(0.2)
            assert connection.closed == (not stays)
    assert ServerOptions().ping_interval < 10


async def test_refused_messages_count_as_requests(app: App) -> None:
    name = f"refused-{time.time_ns()}"
    await app.store.add_account(name, "free", time.time())
    _, key = await app.keyring.create(name)
    large = text_task("x" * 100_000, model="gpt-4")
    large.text.temperature = 9.0
    small = text_task()
    small.text.temperature = 9.0
    async with open_server_under_test(app, message=200_000) as opened:
        remaining = 20
        for data, code, counts in (
            (b"\xff", "invalid_body", True),
            (RunTaskRequest(task=text_task("x" * 250_000)).SerializeToString(), "payload_too_large", True),
            (flood(150_000), "invalid_parameter", True),
            (RunTaskRequest(task=large).SerializeToString(), "invalid_parameter", True),
            (RunTaskRequest(task=small).SerializeToString(), "invalid_parameter", False),
        ):
            error = await failure(raw_call(opened.channel, RUN_TASK, data, key))
            assert reason_of(error) == code
            remaining -= counts
            assert as_dict(error.trailing_metadata())["x-ratelimit-remaining"] == str(remaining), code
        for _ in range(remaining):
            assert (
                reason_of(await failure(raw_call(opened.channel, RUN_TASK, b"\xff", key))) == "invalid_body"
            )
        error = await failure(raw_call(opened.channel, RUN_TASK, b"\xff", key))
        assert (error.code(), reason_of(error)) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "rate_limit_exceeded",
        )


async def test_the_server_counts_and_reports_a_body_that_a_gateway_refused(app: App) -> None:
    name = f"forwarded-{time.time_ns()}"
    await app.store.add_account(name, "free", time.time())
    _, key = await app.keyring.create(name)
    async with open_server_under_test(app) as opened:
        stub = TaskServiceStub(opened.channel)

        async def ask(refused: str, *more: tuple[str, str], model: str = "") -> tuple[str, str]:
            metadata = [*bearer(key), *more, ("x-pomelo-refused", refused)]
            request = RunTaskRequest(task=Task(model=model))
            error = await failure(stub.RunTask(request, metadata=metadata))
            return reason_of(error), as_dict(error.trailing_metadata())["x-ratelimit-remaining"]

        gateway = PROOF.metadata("rest", "", f"Bearer {key}")
        assert await ask("invalid_body 3", *gateway) == ("invalid_body", "19")
        assert await ask("payload_too_large 9000000", *gateway) == ("payload_too_large", "18")
        assert await ask("invalid_parameter 70000", *gateway, model="gpt-4") == ("invalid_parameter", "17")
        assert await ask("invalid_parameter 7", *gateway, model="gpt-4") == ("invalid_parameter", "17")
        assert await ask("unsupported_media_type 7", *gateway) == ("unsupported_media_type", "17")
        assert await ask("invalid_parameter 7", *gateway, model="nope") == ("unsupported_model", "17")
        assert (await ask("nonsense x", *gateway))[0] == "invalid_body"
        assert (await ask("invalid_body 3"))[0] == "missing_parameter", "only a gateway may say so"


# --- reports about connections


async def test_keys_messages_and_resets_are_reported_per_connection(app: App, keys: Keys) -> None:
    async with asyncio.timeout(20), open_server_under_test(app) as opened:
        reports = opened.reports
        request = ListModelsRequest()
        await list_models(opened.channel, keys.test)
        assert reports.names() == ["authenticated", "received", "ended"]
        assert len({peer for name, peer in reports.entries if name != "received"}) == 1
        assert reports.entries[0][1].startswith("ipv4:127.0.0.1:")
        assert ("received", request.ByteSize()) in reports.entries
        reports.entries.clear()
        async with opened.raw() as connection:
            call = connection.begin(RUN_TASK, bearer(keys.test))
            await reports.until("authenticated")
            connection.reset(call)
            await reports.until("reset")
            await reports.until("ended")
        assert reports.names() == ["authenticated", "reset", "ended"]
        reports.entries.clear()
        late = TaskServiceStub(opened.channel).RunTask(
            RunTaskRequest(task=text_task("[[delay:9]]")), metadata=bearer(keys.test), timeout=0.1
        )
        assert (await failure(late)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await opened.server.running.idle()
        assert "reset" not in reports.names(), "a deadline is not a reset"


# --- memory


async def test_a_refused_message_is_freed(plain: ServerUnderTest, keys: Keys) -> None:
    size = 2 * MIB
    async with plain.raw() as connection:
        gc.collect()
        gc.disable()  # a leak through a reference cycle must be visible
        tracemalloc.start(1)
        try:
            for data in (flood(size), b"\xff" * size, b"\x0a" * size):
                for path in (RUN_TASK, UPLOAD, LIST_MODELS):
                    for _ in range(2):
                        call = connection.begin(path, bearer(keys.test))
                        await connection.send(call, http2.prefixed(data), end=True)
                        async with asyncio.timeout(10):
                            await connection.over(call)
            await plain.server.running.idle()
            del data
            await asyncio.sleep(0.05)
            retained, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert peak > size, "they were received"
    assert retained < size, f"{retained:,} bytes of 36 MiB are retained"


# --- clients that retry


async def test_a_client_with_a_retry_policy_retries_after_the_pushback(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    policy = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 4, "initialBackoff": "30s",
        "maxBackoff": "30s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE",
        "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "UNAUTHENTICATED", "INVALID_ARGUMENT"]}}]}"""
    gate = Gate()
    upstream.when("holds the only slot", Answer("one two", at={1: gate}))
    async with asyncio.timeout(30), open_server_under_test(app, InFlightLimits(calls=1)) as opened:
        request = RunTaskRequest(task=text_task("holds the only slot"))
        first = TaskServiceStub(opened.channel).RunTask(request, metadata=bearer(keys.live))
        await gate.reached.wait()
        async with grpc.aio.insecure_channel(
            opened.server.address, options=[("grpc.service_config", policy)]
        ) as channel:
            stub = TaskServiceStub(channel)
            began = time.monotonic()
            opened.reports.entries.clear()
            retried = asyncio.ensure_future(
                _content(stub.RunTask(RunTaskRequest(task=text_task()), metadata=bearer(keys.test)))
            )
            await asyncio.sleep(0.3)
            gate.open()
            assert (await first).result.text.content == "one two"
            assert await retried
            assert 0.9 < time.monotonic() - began < 10, "after the pushback, not after the policy's own 30 s"
            for task, key, code in (
                (text_task(), keys.revoked, "invalid_api_key"),
                (text_task("[[error:insufficient_credits]]"), keys.test, "insufficient_credits"),
                (text_task(model="nope"), keys.test, "unsupported_model"),
                (text_task("[[error:provider_failed]]"), keys.test, "provider_failed"),
            ):
                began = time.monotonic()
                call = stub.RunTask(RunTaskRequest(task=task), metadata=bearer(key))
                error = await failure(call)
                assert reason_of(error) == code
                assert "grpc-previous-rpc-attempts" not in as_dict(error.trailing_metadata())
                assert time.monotonic() - began < 5, "it was not tried again"
    assert TABLE["provider_failed"].status == "UNAVAILABLE"


async def _content(call: Any) -> str:
    return str((await call).result.text.content)
