"""The gRPC server before services that the test plays: what they receive, and what callers get of them."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest

from pomelo.call import Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.server.field_limit import SMALL_MESSAGE
from tests.calls import bearer, end, failure, reason_of
from tests.driver import METHOD
from tests.integration.scripted_services import (
    KEY,
    PROOF,
    ScriptedServices,
    raises,
    serve_scripted,
)
from tests.tasks import text_task
from tests.waiting import until

LIMITS = {"x-ratelimit-limit": "20", "x-ratelimit-remaining": "19"}
LARGE = "x" * 70_000


# --- what the services receive


async def test_the_address_of_a_caller_that_is_not_a_gateway_is_that_of_its_connection() -> None:
    unproven = PROOF.metadata("rest", "192.0.2.7", "")  # of another key
    async with serve_scripted() as opened:
        await end(opened.task("RunTask", metadata=[*bearer(KEY), *unproven]))
        (call,) = opened.services.calls
    assert (call.protocol, call.address) == ("grpc", "127.0.0.1")


@METHOD
async def test_a_large_task_that_is_refused_is_counted_under_its_model(method: str) -> None:
    async with serve_scripted(ScriptedServices(before=raises(invalid("seed", "a number")))) as opened:
        for prompt in ("Hi", LARGE):
            assert reason_of(await failure(opened.task(method, prompt))) == "invalid_parameter"
        small, large = opened.services.visits
    assert small.refused == []
    assert large.refused == [("invalid_parameter", "gpt-4")]


@pytest.mark.parametrize(("extra", "counted"), [(0, []), (1, [("invalid_parameter", "gpt-4")])])
async def test_a_task_is_large_from_one_byte_above_a_small_message(
    extra: int, counted: list[tuple[str, str]]
) -> None:
    framing = RunTaskRequest(spec=text_task(LARGE)).ByteSize() - len(LARGE)
    prompt = "x" * (SMALL_MESSAGE + extra - framing)
    assert RunTaskRequest(spec=text_task(prompt)).ByteSize() == SMALL_MESSAGE + extra
    async with serve_scripted(ScriptedServices(before=raises(invalid("seed", "a number")))) as opened:
        assert reason_of(await failure(opened.task("RunTask", prompt))) == "invalid_parameter"
        (visit,) = opened.services.visits
    assert visit.refused == counted


@METHOD
@pytest.mark.parametrize("code", ["insufficient_credits", "provider_failed", "rate_limit_exceeded"])
async def test_a_large_task_that_fails_for_another_reason_is_not_counted(method: str, code: str) -> None:
    async with serve_scripted(ScriptedServices(before=raises(PomeloError(code)))) as opened:
        assert reason_of(await failure(opened.task(method, LARGE))) == code
        (visit,) = opened.services.visits
    assert visit.refused == []


@METHOD
async def test_a_task_that_was_reserved_is_not_counted_again(method: str) -> None:
    async def reserve(call: Call) -> None:
        call.reserved = True
        raise invalid("seed", "a number")

    async with serve_scripted(ScriptedServices(before=reserve)) as opened:
        assert reason_of(await failure(opened.task(method, LARGE))) == "invalid_parameter"
        (visit,) = opened.services.visits
    assert visit.refused == []


@METHOD
async def test_the_bytes_of_a_message_are_counted_and_its_visit_is_closed_once(method: str) -> None:
    async with serve_scripted() as opened:
        await end(opened.task(method))
        assert reason_of(await failure(opened.task(method, metadata=bearer("nope")))) == "invalid_api_key"
        await opened.server.running.idle()
        (visit,) = opened.services.visits
        await until(lambda: visit.closed)
    assert visit.reserved == [RunTaskRequest(spec=text_task("Hi")).ByteSize()]
    assert visit.closed == 1


@pytest.mark.parametrize("extra", [0, 1])
async def test_a_message_of_exactly_the_limit_is_accepted(extra: int) -> None:
    size = RunTaskRequest(spec=text_task("Hi")).ByteSize()
    async with serve_scripted(message=size) as opened:
        call = opened.task("RunTask", "Hi" + "x" * extra)
        if extra:
            assert reason_of(await failure(call)) == "payload_too_large"
        else:
            await end(call)


@pytest.mark.parametrize("metadata", [[], bearer(KEY)], ids=["without a key", "with a key"])
@pytest.mark.parametrize("extra", [0, 1])
async def test_a_message_of_reflection_must_be_small(extra: int, metadata: list[tuple[str, str]]) -> None:
    framing = ServerReflectionRequest(host=LARGE).ByteSize() - len(LARGE)
    message = ServerReflectionRequest(host="x" * (SMALL_MESSAGE + extra - framing)).SerializeToString()
    path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    async with serve_scripted() as opened:
        call = opened.channel.stream_stream(path)(iter([message]), metadata=metadata)
        if extra:
            assert reason_of(await failure(call)) == "payload_too_large"
        else:
            await end(call)


# --- what is reported of connections, and health


async def test_health_checks_need_no_slot_of_other_calls_without_a_key() -> None:
    async with serve_scripted(unauthenticated_reads=0, unauthenticated_time=2.0) as opened:
        health = health_pb2_grpc.HealthStub(opened.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        assert (await health.List(health_pb2.HealthListRequest())).statuses


async def test_callers_without_a_key_cannot_delay_small_messages_of_others() -> None:
    async with serve_scripted(unauthenticated_reads=0, health_reads=0) as opened:
        health, gateway = health_pb2_grpc.HealthStub(opened.channel), PROOF.metadata("rest", "192.0.2.7", "")
        link = DownloadMediaRequest(id="media_1", signature="s")
        await end(opened.media.DownloadMedia(link, metadata=bearer(KEY), timeout=20))
        await end(opened.media.DownloadMedia(link, metadata=gateway, timeout=20))
        assert (await health.Check(health_pb2.HealthCheckRequest(), metadata=gateway, timeout=20)).status
        watch = health.Watch(health_pb2.HealthCheckRequest(), metadata=bearer(KEY), timeout=20)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


async def test_a_gateway_whose_calls_stall_delays_no_other_gateway() -> None:
    gateway = PROOF.metadata("rest", "192.0.2.7", "")
    async with (
        serve_scripted(reads=1) as opened,
        grpc.aio.insecure_channel(opened.server.address, [("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        method = "/pomelo.v1.MediaService/DownloadMedia"
        stalled = other.stream_stream(method)(metadata=gateway, timeout=20)
        later = other.stream_stream(method)(metadata=gateway, timeout=20)
        await until(lambda: opened.server.running.count == 2)
        health = health_pb2_grpc.HealthStub(opened.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest(), metadata=gateway, timeout=5)).status
        for call in (stalled, later):
            call.cancel()


async def test_a_watch_of_an_unknown_service_stays_until_the_drain() -> None:
    async with serve_scripted() as opened:
        health = health_pb2_grpc.HealthStub(opened.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service="nope"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        more = asyncio.ensure_future(watch.read())
        for _ in range(3):
            assert (await health.Check(health_pb2.HealthCheckRequest())).status
        assert not more.done()
        opened.server.readiness.drain()
        assert await more is grpc.aio.EOF


async def test_a_watch_that_starts_while_draining_receives_one_message() -> None:
    async with serve_scripted() as opened:
        opened.server.readiness.drain()
        watch = health_pb2_grpc.HealthStub(opened.channel).Watch(health_pb2.HealthCheckRequest())
        statuses = [response.status async for response in watch]
    assert statuses == [health_pb2.HealthCheckResponse.NOT_SERVING]
