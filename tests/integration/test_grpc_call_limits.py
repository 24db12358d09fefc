"""Limits of gRPC calls: their number, bytes and time, with and without a key, and how they are reported."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from pomelo.app import App
from pomelo.errors import TABLE
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaRequest
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.server import ServerOptions, open_server
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.calls import as_dict, bearer, details_of, failure, reason_of
from tests.conftest import Keys
from tests.faults import frames, http2
from tests.integration.server_under_test import (
    CHECK,
    DOWNLOAD,
    MIB,
    PROOF,
    REFLECTION,
    RUN_TASK,
    UPLOAD,
    WATCH,
    exchange,
    flood,
    new_key,
    open_server_under_test,
    refusal,
    run_message,
)
from tests.tasks import small_task, text_task
from tests.waiting import until

# --- unauthenticated callers


@pytest.mark.parametrize("path", [CHECK, WATCH, REFLECTION, DOWNLOAD])
@pytest.mark.parametrize("message", [False, True])
async def test_a_call_that_needs_no_key_ends_in_time(path: str, message: bool, app: App) -> None:
    async with open_server_under_test(app, unauthenticated_time=0.2) as opened, opened.raw() as connection:
        call = await exchange(connection, path, data=http2.prefixed(b"") if message else b"")
        assert 0.15 < call.lasted < 2
        assert (frames.HEADERS, frames.END_STREAM | frames.END_HEADERS) in call.frames


async def test_a_watch_without_a_key_is_ended_with_a_reason_and_one_with_a_key_continues(
    app: App, keys: Keys
) -> None:
    async with open_server_under_test(app, unauthenticated_time=0.3) as opened:
        health = opened.health
        stays = health.Watch(HealthCheckRequest(), metadata=bearer(keys.test))
        assert (await stays.read()).status
        for metadata in ([], bearer(keys.revoked)):
            watch = health.Watch(HealthCheckRequest(), metadata=metadata)
            error = await refusal(watch, StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
            assert "0.3 seconds" in (error.details() or "")
            assert details_of(error)["ErrorInfo"].metadata == {"timeoutSeconds": "0.3"}
        assert opened.in_flight.calls == 1
        opened.server.readiness.drain()
        assert (await stays.read()).status == HealthCheckResponse.NOT_SERVING
        assert await stays.read() is grpc.aio.EOF
        await opened.server.running.idle()
        assert opened.in_flight.calls == 0


async def test_unauthenticated_calls_have_a_separate_small_limit(app: App, keys: Keys) -> None:
    async with open_server_under_test(app, unauthenticated=6) as opened:
        health, listing = opened.health, ServerReflectionRequest(list_services="")
        watches = [health.Watch(HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            assert (await watch.read()).status
        for call in (
            health.Watch(HealthCheckRequest()),
            ServerReflectionStub(opened.channel).ServerReflectionInfo(iter([listing])),
            opened.media.DownloadMedia(DownloadMediaRequest(signature="x")),
        ):
            error = await refusal(call, StatusCode.UNAVAILABLE, "overloaded")
            assert as_dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert (await health.Check(HealthCheckRequest())).status
        assert (await opened.list_models(keys.test)).models
        with_key = health.Watch(HealthCheckRequest(), metadata=bearer(keys.test))
        assert (await with_key.read()).status
        for watch in (*watches, with_key):
            watch.cancel()


async def test_one_address_has_at_most_half_of_the_unauthenticated_calls(app: App) -> None:
    async with (
        asyncio.timeout(20),
        open_server_under_test(app, proxies=["127.0.0.1"], unauthenticated=4) as opened,
    ):

        def watch(address: str) -> Any:
            return opened.health.Watch(HealthCheckRequest(), metadata=[("x-forwarded-for", address)])

        watches = []
        for network in ("192.0.2.1", "2001:db8::"):
            for address in (network, network.replace("::", "::1")):
                watches.append(watch(address))
                assert (await watches[-1].read()).status
            await refusal(watch(network), StatusCode.UNAVAILABLE, "overloaded")
        await refusal(watch("192.0.2.2"), StatusCode.UNAVAILABLE, "overloaded")
        watches.pop(0).cancel()
        await until(lambda: opened.server.running.count == len(watches))
        watches.append(watch("192.0.2.2"))
        assert (await watches[-1].read()).status
        for each in watches:
            each.cancel()


async def test_an_unauthenticated_call_with_an_incomplete_message_is_replaced_by_the_next(app: App) -> None:
    half = http2.prefixed(b"\x0a" * MIB, size=2 * MIB)
    async with asyncio.timeout(20), open_server_under_test(app) as opened, opened.raw() as connection:
        calls = [connection.begin(path) for path in (CHECK, WATCH, DOWNLOAD, REFLECTION) * 3]
        sending = [asyncio.ensure_future(connection.send(call, half)) for call in calls]
        health = opened.health
        assert (await health.Check(HealthCheckRequest())).status
        began = time.monotonic()
        checks = [health.Check(HealthCheckRequest()) for _ in range(20)]
        assert all([(await check).status for check in checks])
        assert time.monotonic() - began < 15
        for task in sending:
            task.cancel()


# --- authenticated callers


async def test_a_message_that_does_not_arrive_in_time_ends_the_call(app: App, keys: Keys) -> None:
    server = open_server_under_test(app, read_time=0.3, chunk_time=0.3)
    async with server as opened, opened.raw() as connection:
        head = http2.prefixed(b"", size=9 * MIB)
        for path, data in ((RUN_TASK, b""), (RUN_TASK, head), (UPLOAD, b""), (UPLOAD, head)):
            call = await exchange(connection, path, bearer(keys.test), data)
            assert 0.25 < call.lasted < 10
        for path in (RUN_TASK, UPLOAD):
            silent = opened.channel.stream_unary(path)(metadata=bearer(keys.test))
            error = await refusal(silent, StatusCode.DEADLINE_EXCEEDED, "deadline_exceeded")
            assert "0.3 seconds" in (error.details() or "")
            assert details_of(error)["ErrorInfo"].metadata == {"timeoutSeconds": "0.3"}
            assert as_dict(error.trailing_metadata())["x-credits-remaining"]
        await opened.server.running.idle()
        assert opened.in_flight.calls == 0


async def test_an_upload_may_take_long_while_chunks_arrive(app: App, keys: Keys) -> None:
    async with open_server_under_test(app, chunk_time=1.5, read_time=1.5) as opened:
        call = opened.media.UploadMedia(metadata=bearer(keys.test))
        for _ in range(6):
            await call.write(UploadMediaRequest(chunk=b"x" * 1000))
            await asyncio.sleep(0.3)
        await call.done_writing()
        assert (await call).media.size_bytes == 6000


async def test_an_account_receives_a_few_messages_at_a_time_without_delaying_others(
    app: App, keys: Keys
) -> None:
    key = await new_key(app, "unlimited")
    half = http2.prefixed(b"\x0a" * MIB, size=2 * MIB)
    async with (
        asyncio.timeout(20),
        open_server_under_test(app, reads=2, read_time=3.0) as opened,
        opened.raw() as connection,
    ):
        calls = [connection.begin(RUN_TASK, bearer(keys.test)) for _ in range(6)]
        sending = [asyncio.ensure_future(connection.send(call, half)) for call in calls]
        await opened.reports.until("authenticated", 6)
        began = time.monotonic()
        assert (await opened.list_models(key)).models
        assert time.monotonic() - began < 2.5
        if time.monotonic() - calls[0].began < 2.5:
            assert sum(one.done() for one in sending) <= 2, "a window is opened when the turn has come"
        for call in calls:
            await connection.over(call)
            assert call.lasted < 8, "the time to wait for a turn is part of the time to read"
        assert len(half) in await asyncio.gather(*sending)
        assert (await opened.list_models(keys.test)).models


async def test_bytes_of_messages_are_counted_until_their_calls_end(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    prompt = "counted bytes " + "x" * 200_000
    upstream.when(prompt, Answer("one two", at={1: gate}))
    limits = InFlightLimits(account_bytes=300_000)
    async with asyncio.timeout(20), open_server_under_test(app, limits) as opened:
        first = opened.run(keys.live, text_task(prompt))
        await gate.reached.wait()
        assert opened.in_flight.bytes == len(run_message(prompt))
        await refusal(opened.run(keys.live, text_task(prompt)), StatusCode.UNAVAILABLE, "overloaded")
        gate.open()
        assert (await first).result.text.message.content[0].text == "one two"
        await until(lambda: (opened.in_flight.calls, opened.in_flight.bytes) == (0, 0))


async def test_a_call_above_the_limit_of_calls_is_refused_and_the_others_continue(
    app: App, keys: Keys, upstream: FaultUpstream
) -> None:
    gate = Gate()
    upstream.when("the only call", Answer("one two", at={1: gate}))
    async with asyncio.timeout(20), open_server_under_test(app, InFlightLimits(calls=1)) as opened:
        first = opened.run(keys.live, text_task("the only call"))
        await gate.reached.wait()
        chunks = iter([UploadMediaRequest(chunk=b"x")])
        for call in (
            opened.stream(keys.test, text_task()),
            ModelServiceStub(opened.channel).ListModels(ListModelsRequest(), metadata=bearer(keys.test)),
            opened.media.UploadMedia(chunks, metadata=bearer(keys.test)),
        ):
            error = await refusal(call, StatusCode.UNAVAILABLE, "overloaded")
            metadata = as_dict(error.trailing_metadata())
            assert (metadata["retry-after"], metadata["grpc-retry-pushback-ms"]) == ("1", "1000")
            assert metadata["x-credits-remaining"]
        assert (await opened.health.Check(HealthCheckRequest())).status
        gate.open()
        assert (await first).result.text.message.content[0].text == "one two"


async def test_the_101st_call_on_a_connection_does_not_wait(app: App, keys: Keys) -> None:
    async with asyncio.timeout(30), AsyncExitStack() as stack:
        opened = await stack.enter_async_context(open_server_under_test(app))
        streams = [opened.stream(keys.test, text_task("[[stall]]")) for _ in range(150)]
        for stream in streams:
            stack.callback(stream.cancel)
            assert await stream.initial_metadata()
        assert (await opened.list_models(keys.test)).models


async def test_grpc_answers_any_number_of_pings_and_leaves_floods_to_the_guard(app: App, keys: Keys) -> None:
    """gRPC's own limit would not close the connection while pings arrive, and would take a core meanwhile."""
    options = ServerOptions("127.0.0.1:0")
    async with open_server(app.services, options, connections=ConnectionObserver()) as server:
        host, _, port = server.address.rpartition(":")
        async with http2.connect(host, int(port)) as connection, asyncio.timeout(20):
            call = connection.begin(RUN_TASK, bearer(keys.test))
            message = http2.prefixed(run_message("Hello"))
            await connection.send(call, message[:-1])
            connection.ping(20_000)
            await until(lambda: connection.closed or connection.pongs == 20_000)
            await connection.send(call, message[-1:], end=True)
            await connection.over(call)
            assert not connection.closed
            assert (frames.DATA, 0) in call.frames


async def test_refused_messages_count_as_requests(app: App) -> None:
    key = await new_key(app, "free")
    large = text_task("x" * 100_000, model="gpt-4")
    large.text.temperature = 9.0
    small = text_task()
    small.text.temperature = 9.0
    async with open_server_under_test(app, message=200_000) as opened:
        remaining = 20
        for data, code, counts in (
            (b"\xff", "invalid_body", True),
            (run_message("x" * 250_000), "payload_too_large", True),
            (flood(150_000), "invalid_parameter", True),
            (RunTaskRequest(spec=large).SerializeToString(), "invalid_parameter", True),
            (RunTaskRequest(spec=small).SerializeToString(), "invalid_parameter", False),
        ):
            error = await failure(opened.call(RUN_TASK, data, key))
            assert reason_of(error) == code
            remaining -= counts
            assert as_dict(error.trailing_metadata())["x-ratelimit-remaining"] == str(remaining), code
        for _ in range(remaining):
            assert reason_of(await failure(opened.call(RUN_TASK, b"\xff", key))) == "invalid_body"
        limited = opened.call(RUN_TASK, b"\xff", key)
        await refusal(limited, StatusCode.RESOURCE_EXHAUSTED, "rate_limit_exceeded")


async def test_the_server_counts_and_reports_a_body_that_a_gateway_refused(app: App) -> None:
    key = await new_key(app, "free")
    async with open_server_under_test(app) as opened:

        async def ask(refused: str, *more: tuple[str, str], model: str = "") -> tuple[str, str]:
            metadata = [*bearer(key), *more, ("x-pomelo-refused", refused)]
            request = RunTaskRequest(spec=TaskSpec(model=model))
            error = await failure(opened.tasks.RunTask(request, metadata=metadata))
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
        await opened.list_models(keys.test)
        assert reports.names() == ["authenticated", "received", "ended"]
        assert len({peer for name, peer in reports.entries if name != "received"}) == 1
        assert reports.entries[0][1].startswith("ipv4:127.0.0.1:")
        assert ("received", ListModelsRequest().ByteSize()) in reports.entries
        reports.entries.clear()
        async with opened.raw() as connection:
            for _ in range(100):
                call = connection.begin(RUN_TASK, bearer(keys.test))
                await reports.until("authenticated")
                connection.reset(call)
                await reports.until("reset")
                await reports.until("ended")
                # A message that ends first, as grpc may report it, is refused: that call has ended already.
                assert sorted(reports.names()) == ["authenticated", "ended", "reset"]
                reports.entries.clear()
        late = opened.run(keys.test, text_task("[[delay:9]]"), timeout=0.1)
        assert (await failure(late)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await opened.server.running.idle()
        assert "reset" not in reports.names(), "a deadline is not a reset"


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
        first = opened.run(keys.live, text_task("holds the only slot"))
        await gate.reached.wait()
        options = [("grpc.service_config", policy)]
        async with grpc.aio.insecure_channel(opened.server.address, options) as channel:
            stub = TaskServiceStub(channel)
            began = time.monotonic()
            retried = stub.RunTask(RunTaskRequest(spec=text_task()), metadata=bearer(keys.test))
            await asyncio.sleep(0.3)
            gate.open()
            assert (await first).result.text.message.content[0].text == "one two"
            assert (await retried).result.text.message.content[0].text
            assert 0.9 < time.monotonic() - began < 20, "after the pushback, not after the policy's own 30 s"
            for task, key, code in (
                (text_task(), keys.revoked, "invalid_api_key"),
                (text_task("[[error:insufficient_credits]]"), keys.test, "insufficient_credits"),
                (text_task(model="nope"), keys.test, "unsupported_model"),
                (text_task("[[error:provider_failed]]"), keys.test, "provider_failed"),
            ):
                began = time.monotonic()
                call = stub.RunTask(RunTaskRequest(spec=task), metadata=bearer(key))
                error = await failure(call)
                assert reason_of(error) == code
                assert "grpc-previous-rpc-attempts" not in as_dict(error.trailing_metadata())
                assert time.monotonic() - began < 20, "it was not tried again, after 30 s"
    assert TABLE["provider_failed"].status == "UNAVAILABLE"


async def test_a_caller_who_does_not_read_large_responses_can_start_no_call(app: App, keys: Keys) -> None:
    key, spec = keys.test, small_task("text_to_speech")
    spec.text_to_speech.output_format = "wav_48000"
    request = RunTaskRequest(spec=spec, options=TaskOptions(delivery=MediaDelivery.MEDIA_DELIVERY_INLINE))
    async with (
        open_server_under_test(app, InFlightLimits(account_unread=70_000)) as opened,
        opened.raw(wide=False) as connection,
    ):
        await opened.list_models(key)
        call = connection.begin(RUN_TASK, bearer(key))
        await connection.send(call, http2.prefixed(request.SerializeToString()), end=True)
        await until(lambda: any(kind == frames.DATA for kind, _ in call.frames))
        await refusal(opened.run(key, text_task()), StatusCode.UNAVAILABLE, "overloaded")
        connection.reset(call)
        await until(lambda: not opened.in_flight._owners)
        await opened.list_models(key)
