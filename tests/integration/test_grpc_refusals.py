"""The methods of gRPC, how calls are refused, and what refused messages leave behind."""

from __future__ import annotations

import asyncio
import gc
import gzip
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from grpc_health.v1 import health_pb2

from pomelo.app import App
from pomelo.gen.v1 import account_service_pb2, media_service_pb2, model_service_pb2, task_service_pb2
from pomelo.gen.v1.account_service_pb2 import GetAccountRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.status import from_rpc_error
from tests.calls import as_dict, bearer, end, failure, reason_of
from tests.conftest import Keys
from tests.faults import frames, http2
from tests.integration.server_under_test import (
    CHECK,
    DOWNLOAD,
    LIST_MODELS,
    MIB,
    RUN_TASK,
    STREAM_TASK,
    UPLOAD,
    ServerUnderTest,
    exchange,
    flood,
    open_server_under_test,
    refusal,
    run_message,
)
from tests.tasks import text_task

COMPRESSION = pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
TRAILERS_ONLY = (frames.HEADERS, frames.END_STREAM | frames.END_HEADERS)
"""The frame of a response that is a single HEADERS frame, which ends the stream."""

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


@pytest.fixture(scope="module")
async def plain(app: App) -> AsyncIterator[ServerUnderTest]:
    """A server with the default limits."""
    async with open_server_under_test(app) as opened:
        yield opened


# --- the methods


@pytest.mark.parametrize(
    "method", [method for service in SERVICES for method in service.methods], ids=lambda m: m.full_name
)
async def test_every_method_of_the_contract_is_served_as_its_clients_call_it(
    method: Any, plain: ServerUnderTest, keys: Keys
) -> None:
    sides = (method.client_streaming, method.server_streaming)
    call_type = "_".join("stream" if streaming else "unary" for streaming in sides)
    path = f"/{method.containing_service.full_name}/{method.name}"
    request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    callable_ = getattr(plain.channel, call_type)(
        path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString
    )
    requests = iter([request()]) if method.client_streaming else request()
    call = callable_(requests, metadata=bearer(keys.test), timeout=20)
    if method.name == "Watch":
        assert (await call.read()).status
        call.cancel()
        return
    # The requests are empty; an error about a missing field proves that the method has read it.
    reason = None
    try:
        await end(call)
    except grpc.aio.AioRpcError as error:
        reason = reason_of(error)
    assert reason in (None, "missing_parameter", "invalid_parameter", "not_found")


async def test_a_model_is_looked_up_by_its_id(plain: ServerUnderTest, keys: Keys) -> None:
    path = "/pomelo.v1.ModelService/GetModel"
    error = await refusal(plain.call(path, b"", keys.test), StatusCode.INVALID_ARGUMENT, "missing_parameter")
    assert error.details() == "Missing required field: id"
    await refusal(plain.call(path, b"", None), StatusCode.UNAUTHENTICATED, "invalid_api_key")


async def test_an_unknown_method_gets_the_documented_error(plain: ServerUnderTest, keys: Keys) -> None:
    for path in ("/pomelo.v1.TaskService/Nope", "/nope.Nope/Nope"):
        await refusal(plain.call(path, b"", keys.test), StatusCode.UNIMPLEMENTED, "method_not_allowed")
        await refusal(plain.call(path, b"", None), StatusCode.UNIMPLEMENTED, "method_not_allowed")
        await refusal(plain.call(path, b"", "junk"), StatusCode.UNAUTHENTICATED, "invalid_api_key")


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
        call = await exchange(connection, path, metadata)
    if path != UPLOAD:  # an upload gets a moment to end
        assert call.lasted < 5
    assert call.frames[0] == TRAILERS_ONLY
    assert (frames.DATA, 0) not in call.frames
    assert plain.reports.names() == []


@pytest.mark.parametrize("task", [text_task(model="nope"), text_task("[[error:insufficient_credits]]")])
async def test_a_refusal_of_a_known_caller_is_a_trailers_only_response(
    task: TaskSpec, plain: ServerUnderTest, keys: Keys
) -> None:
    run = http2.prefixed(RunTaskRequest(spec=task).SerializeToString())
    stream = http2.prefixed(StreamTaskRequest(spec=task).SerializeToString())
    for path, data in ((RUN_TASK, run), (STREAM_TASK, stream), (UPLOAD, b"")):
        async with plain.raw() as connection:
            call = await exchange(connection, path, bearer(keys.test), data, end=True)
        assert call.frames == [TRAILERS_ONLY]


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
    one = run_message()
    for messages, reason in (([], "No message was sent"), ([one, one], "More than one message was sent")):
        call = plain.channel.stream_unary(RUN_TASK)(iter(messages), metadata=bearer(keys.test))
        error = await refusal(call, StatusCode.INVALID_ARGUMENT, "invalid_body")
        assert error.details() == f"{reason}. Send one"
        assert as_dict(error.trailing_metadata())["x-credits-remaining"]
    assert await plain.channel.stream_unary(RUN_TASK)(iter([one]), metadata=bearer(keys.test))


@pytest.mark.parametrize("path", [RUN_TASK, LIST_MODELS, CHECK, DOWNLOAD])
@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05gpt", b"\x0a\x02\x0a\xff"])
async def test_a_message_that_can_t_be_decoded_gets_the_documented_error(
    path: str, data: bytes, plain: ServerUnderTest, keys: Keys
) -> None:
    if (path, data) == (LIST_MODELS, b"\x0a\x02\x0a\xff"):
        return  # it is an unknown field in that message
    await refusal(plain.call(path, data, keys.test), StatusCode.INVALID_ARGUMENT, "invalid_body")


@COMPRESSION
async def test_a_message_of_millions_of_fields_is_refused_before_it_is_parsed(
    compression: grpc.Compression, plain: ServerUnderTest, keys: Keys
) -> None:
    call = plain.call(RUN_TASK, flood(9_400_000), keys.test, compression=compression)
    error = await refusal(call, StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    assert "Too many messages" in (error.details() or "")


@COMPRESSION
async def test_a_message_above_the_limit_is_refused_with_the_limit(
    compression: grpc.Compression, plain: ServerUnderTest, keys: Keys
) -> None:
    for size in (9 * MIB + 1, 12 * MIB, 17 * MIB):
        call = plain.call(RUN_TASK, run_message("x" * size), keys.test, compression=compression)
        error = await refusal(call, StatusCode.RESOURCE_EXHAUSTED, "payload_too_large")
        metadata = as_dict(error.trailing_metadata())
        assert metadata["grpc-retry-pushback-ms"] == "-1"
        assert metadata["x-credits-remaining"]


@COMPRESSION
async def test_a_message_above_the_limit_of_grpc_has_the_status_of_one_that_is_too_large(
    compression: grpc.Compression, plain: ServerUnderTest, keys: Keys
) -> None:
    for path, data in ((RUN_TASK, run_message("x" * 19 * MIB)), (UPLOAD, b"x" * 19 * MIB)):
        error = await failure(plain.call(path, data, keys.test, compression=compression))
        assert error.code() == StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in (error.details() or "")
        assert from_rpc_error(error).code == "payload_too_large"


@pytest.mark.parametrize("path", [RUN_TASK, STREAM_TASK, LIST_MODELS, UPLOAD])
async def test_metadata_above_the_limit_are_always_refused_with_the_limit(
    path: str, plain: ServerUnderTest, keys: Keys
) -> None:
    call = plain.channel.stream_unary(path)
    for size in [9_000, 12_000, 15_000] * 8:
        metadata = (*bearer(keys.test), ("baggage", "x" * (size // 2)), ("baggage", "y" * (size // 2)))
        error = await refusal(
            call(iter([b""]), metadata=metadata), StatusCode.RESOURCE_EXHAUSTED, "payload_too_large"
        )
        assert as_dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"
    metadata = (*bearer("wrong"), ("baggage", "x" * 9_000))
    await refusal(call(iter([b""]), metadata=metadata), StatusCode.UNAUTHENTICATED, "invalid_api_key")


async def test_metadata_below_the_limit_are_accepted(plain: ServerUnderTest, keys: Keys) -> None:
    for _ in range(20):
        await plain.channel.unary_unary(LIST_MODELS)(
            b"", metadata=(*bearer(keys.test), ("baggage", "x" * 7_900))
        )


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
            await exchange(connection, RUN_TASK, [*bearer(keys.test), *metadata], data, end=True)
    await plain.server.running.idle()
    assert not [record.getMessage() for record in caplog.records]
    assert (await plain.list_models(keys.test)).models


# Of two traceparents grpc itself keeps only one.
@pytest.mark.parametrize("name", ["idempotency-key", "x-request-id", "x-request-timeout", "prefer", "accept"])
async def test_repeated_metadata_is_refused_and_named(name: str, plain: ServerUnderTest, keys: Keys) -> None:
    metadata = [*bearer(keys.test), (name, "5"), (name, "6")]
    chunks = iter([UploadMediaRequest(chunk=b"x")])
    for call in (
        plain.tasks.RunTask(RunTaskRequest(spec=text_task()), metadata=metadata),
        plain.tasks.StreamTask(StreamTaskRequest(spec=text_task()), metadata=metadata),
        plain.media.UploadMedia(chunks, metadata=metadata),
        AccountServiceStub(plain.channel).GetAccount(GetAccountRequest(), metadata=metadata),
    ):
        error = await refusal(call, StatusCode.INVALID_ARGUMENT, "invalid_parameter")
        assert name in (error.details() or "").lower()


async def test_a_repeated_key_is_refused_whichever_is_valid(plain: ServerUnderTest, keys: Keys) -> None:
    good, bad = bearer(keys.test), bearer(keys.revoked)
    for metadata in (good + bad, bad + good, good + good):
        call = plain.tasks.RunTask(RunTaskRequest(spec=text_task()), metadata=metadata)
        error = await refusal(call, StatusCode.UNAUTHENTICATED, "invalid_api_key")
        assert "twice" in (error.details() or "")


async def test_a_large_message_without_a_key_is_refused(plain: ServerUnderTest) -> None:
    for path in (CHECK, DOWNLOAD):
        error = await failure(plain.call(path, b"\x0a\x80\x80\x08" + b"x" * (128 * 1024), None))
        assert reason_of(error) == "payload_too_large"


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
                        await exchange(connection, path, bearer(keys.test), http2.prefixed(data), end=True)
            await plain.server.running.idle()
            del data
            await asyncio.sleep(0.05)
            retained, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()
    assert peak > size, "they were received"
    assert retained < size, f"{retained:,} bytes of 36 MiB are retained"
