"""How calls end before services that the test plays: late, refused, left by their callers, or by errors."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.runtime.process import CancelScope
from pomelo.server import rpc
from pomelo.status import DISCARD_KEY, OPEN_KEY
from tests.calls import as_dict, bearer, end, failure, reason_of
from tests.integration.scripted_services import (
    GATEWAY,
    KEY,
    PROOF,
    ScriptedServices,
    raises,
    serve_scripted,
)
from tests.unit.server.test_calls import METHODS, Recorder
from tests.unit.telemetry.reports import Reports
from tests.waiting import until

CHUNK = UploadMediaRequest(chunk=b"x")
KEYLESS_GATEWAY = PROOF.metadata("rest", "192.0.2.7", "")


async def forever(call: Call) -> None:
    """Waits until it is cancelled."""
    await asyncio.Event().wait()


async def cancel_once(begun: asyncio.Event, call: Any, connections: Recorder) -> None:
    """Cancels a call that has begun, and waits until the server has ended it."""
    await begun.wait()
    call.cancel()
    await until(lambda: "ended" in connections.reports)


@METHODS
async def test_a_late_service_ends_its_call_itself(method: str) -> None:
    async def late(call: Call) -> None:
        call.response_headers["X-Credits-Charged"] = "7"
        await asyncio.sleep(call.deadline + 0.1 - time.monotonic())
        raise PomeloError("deadline_exceeded", "Reported by the service")

    async with serve_scripted(ScriptedServices(before=late)) as opened:
        metadata = [*GATEWAY, *bearer(KEY, x_request_timeout="0.2")]
        error = await failure(opened.task(method, metadata=metadata))
    assert (reason_of(error), error.details()) == ("deadline_exceeded", "Reported by the service")
    assert as_dict(error.trailing_metadata())["x-credits-charged"] == "7"


@pytest.mark.parametrize("key", [KEY, "no"])
async def test_the_rest_of_a_refused_upload_is_received(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_DISCARD_TIME", 9.0)
    connections = Recorder()
    services = ScriptedServices(upload=raises(PomeloError("overloaded")))
    async with serve_scripted(services, connections) as opened:
        call = opened.media.UploadMedia(metadata=bearer(key))
        for _ in range(3):
            await call.write(CHUNK)
        await call.done_writing()
        error = await failure(call)
    assert reason_of(error) == ("overloaded" if key == KEY else "invalid_api_key")
    assert connections.sizes == [CHUNK.ByteSize()] * 3


async def test_an_upload_of_a_gateway_is_refused_while_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_DISCARD_TIME", 60.0)
    async with serve_scripted(ScriptedServices(upload=raises(PomeloError("overloaded")))) as opened:
        call = opened.media.UploadMedia(metadata=[*bearer(KEY), *GATEWAY])
        await call.write(CHUNK)
        assert reason_of(await failure(call)) == "overloaded"


async def test_a_download_with_a_key_may_last_longer_than_a_call_without_one() -> None:
    async def wait() -> None:
        await asyncio.sleep(0.3)

    async with serve_scripted(ScriptedServices(download=wait), unauthenticated_time=0.1) as opened:
        call = opened.media.DownloadMedia(DownloadMediaRequest(id="media_1"), metadata=bearer(KEY))
        assert [message.chunk async for message in call][1:] == [b"abc"]


@pytest.mark.parametrize("gateway", [False, True])
async def test_an_upload_whose_next_chunk_does_not_come_ends(gateway: bool) -> None:
    async with serve_scripted(chunk_time=0.1) as opened:
        call = opened.media.UploadMedia(metadata=[*bearer(KEY), *(GATEWAY if gateway else ())])
        await call.write(CHUNK)
        error = await failure(call)
    assert reason_of(error) == "deadline_exceeded"
    assert error.details() == "No message arrived for 0.1 seconds. Send without such pauses"


@pytest.mark.parametrize(
    ("metadata", "limit", "code"),
    [
        ([], "unauthenticated", "overloaded"),
        (KEYLESS_GATEWAY, "forwarded", "overloaded"),
        (bearer(KEY), "unauthenticated", "ok"),
        (KEYLESS_GATEWAY, "unauthenticated", "ok"),
    ],
)
async def test_downloads_without_a_key_are_limited_and_those_of_gateways_apart(
    metadata: list[tuple[str, str]], limit: str, code: str
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    limits: dict[str, Any] = {limit: 1}

    async def wait() -> None:
        begun.set()
        await gate.wait()

    async with serve_scripted(ScriptedServices(download=wait), **limits) as opened:
        request = DownloadMediaRequest(id="media_1", signature="valid")
        first = opened.media.DownloadMedia(request, metadata=metadata)
        reading = asyncio.ensure_future(end(first))
        await begun.wait()
        second = opened.media.DownloadMedia(request, metadata=metadata)
        if code != "ok":
            assert reason_of(await failure(second)) == code
        gate.set()
        await reading
        await end(second if code == "ok" else opened.media.DownloadMedia(request, metadata=metadata))


async def test_a_key_that_is_not_checked_in_time_is_reported_as_one_that_is_not_sent() -> None:
    async with serve_scripted(ScriptedServices(admission=forever), unauthenticated_time=0.1) as opened:
        error = await failure(opened.task("RunTask"))
    assert reason_of(error) == "deadline_exceeded"
    assert error.details() == "A call without a key ends after 0.1 seconds. Send a key"


@pytest.mark.parametrize("gateway", [False, True])
async def test_a_stream_whose_deadline_passes_while_it_is_accepted_ends(gateway: bool) -> None:
    class Late(ScriptedServices):
        @asynccontextmanager
        async def stream_task(self, *_: Any) -> AsyncIterator[AsyncIterator[TaskEvent]]:
            deadline = CancelScope().start()

            async def produce() -> AsyncIterator[TaskEvent]:
                yield TaskEvent()

            deadline.expire()
            try:
                yield produce()
            except BaseException as error:
                deadline.ended_by(error)
                raise PomeloError("deadline_exceeded") from error

    async with asyncio.timeout(20), serve_scripted(Late()) as opened:
        call = opened.task("StreamTask", metadata=[*bearer(KEY), *(GATEWAY if gateway else ())])
        assert reason_of(await failure(call)) == "deadline_exceeded"
        assert "x-request-id" in as_dict(await call.initial_metadata())


@METHODS
async def test_a_time_limit_within_a_service_is_an_internal_error(method: str) -> None:
    async with serve_scripted(ScriptedServices(before=raises(TimeoutError()))) as opened:
        error = await failure(opened.task(method))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "internal_error")


@METHODS
async def test_an_unexpected_error_is_logged_and_not_sent(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_scripted(ScriptedServices(before=raises(ValueError("secret")))) as opened:
        error = await failure(opened.task(method, metadata=bearer(KEY, x_request_id="mine-7")))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "internal_error")
    assert "secret" not in (error.details() or "")
    (record,) = [record for record in caplog.records if record.name == "pomelo.server"]
    assert record.getMessage().startswith("request mine-7 failed unexpectedly\n")
    assert "ValueError" in record.getMessage()


async def test_a_method_that_does_not_exist_is_refused() -> None:
    async with serve_scripted() as opened:
        error = await failure(opened.channel.unary_unary("/pomelo.v1.TaskService/Nothing")(b""))
        other = opened.channel.unary_unary("/pomelo.v1.TaskService/Nothing")(b"", metadata=bearer("no"))
        assert reason_of(await failure(other)) == "invalid_api_key"
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNIMPLEMENTED, "method_not_allowed")
    assert error.details() == "This method does not exist. Check its name"


@METHODS
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("gateway", [False, True])
async def test_a_service_that_something_cancels_is_an_internal_error(
    method: str, itself: bool, gateway: bool
) -> None:
    async def cancelled(call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not itself:
            raise asyncio.CancelledError
        task.cancel()
        await forever(call)

    services = ScriptedServices(during=cancelled) if gateway else ScriptedServices(before=cancelled)
    async with serve_scripted(services) as opened:
        call = opened.task(method, metadata=[*bearer(KEY), *(GATEWAY if gateway else ())])
        assert reason_of(await failure(call)) == "internal_error"
        if gateway and method == "StreamTask":
            assert OPEN_KEY in as_dict(await call.initial_metadata())


@METHODS
@pytest.mark.parametrize("gateway", [False, True])
async def test_the_end_of_a_call_is_reported_unless_a_gateway_made_it(method: str, gateway: bool) -> None:
    reports, services = Reports(), ScriptedServices()
    metadata = [*bearer(KEY), *(GATEWAY if gateway else ())]
    async with serve_scripted(services, observers=[reports]) as opened:
        await end(opened.task(method, metadata=metadata))
        services.before = raises(PomeloError("overloaded"))
        await failure(opened.task(method, metadata=metadata))
    found = [(report.method, report.code, report.http_status) for report in reports.calls]
    name = f"TaskService/{method}"
    assert found == ([] if gateway else [(name, "", 200), (name, "overloaded", 503)])


async def test_only_a_gateway_may_leave_a_call_unreported() -> None:
    reports = Reports()
    async with serve_scripted(observers=[reports]) as opened:
        await end(opened.task("RunTask", metadata=[*bearer(KEY), (DISCARD_KEY, "1")]))
    assert [report.method for report in reports.calls] == ["TaskService/RunTask"]


@METHODS
@pytest.mark.parametrize(("late", "reset_time"), [(False, 60.0), (True, 60.0), (False, 0.0)])
async def test_a_call_that_its_caller_cancels_early_counts_as_a_reset(
    method: str, late: bool, reset_time: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_RESET_TIME", reset_time)
    begun = asyncio.Event()

    async def wait(call: Call) -> None:
        if late:
            call.deadline = time.monotonic() - 1
        begun.set()
        await forever(call)

    connections, reports = Recorder(), Reports()
    async with serve_scripted(ScriptedServices(before=wait), connections, [reports]) as opened:
        await cancel_once(begun, opened.task(method), connections)
    assert ("reset" in connections.reports) == (reset_time > 0 and not late)
    assert [(report.code, report.http_status) for report in reports.calls] == [("", 0)]


@METHODS
@pytest.mark.parametrize(
    ("skew", "elapsed", "reset"), [(60.0, 0.3, False), (60.0, 0.0, True), (0.0, 0.3, True)]
)
async def test_a_caller_whose_deadline_passes_slightly_earlier_has_not_reset_its_call(
    method: str, skew: float, elapsed: float, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_RESET_TIME", 60.0)
    monkeypatch.setattr(rpc, "_SKEW", skew)
    begun = asyncio.Event()

    async def wait(call: Call) -> None:
        await asyncio.sleep(elapsed)
        call.deadline = time.monotonic() + (20.0 if reset else elapsed / 2)
        begun.set()
        await forever(call)

    connections = Recorder()
    async with serve_scripted(ScriptedServices(before=wait), connections) as opened:
        await cancel_once(begun, opened.task(method), connections)
    assert ("reset" in connections.reports) == reset


@pytest.mark.parametrize(
    ("method", "refuses"), [("RunTask", True), ("StreamTask", True), ("StreamTask", False)]
)
async def test_a_reset_is_counted_if_the_server_notices_it_only_when_it_sends_something(
    method: str, refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "_RESET_TIME", 60.0)
    begun = asyncio.Event()

    async def continue_after_the_reset(call: Call) -> None:
        task = asyncio.current_task()
        assert task is not None
        begun.set()
        try:
            await forever(call)
        except asyncio.CancelledError:
            task.uncancel()
        if refuses:
            raise PomeloError("overloaded")

    connections = Recorder()
    async with serve_scripted(ScriptedServices(before=continue_after_the_reset), connections) as opened:
        await cancel_once(begun, opened.task(method), connections)
        await opened.server.running.idle()
    assert connections.reports.count("reset") == 1


async def test_an_upload_ends_when_its_caller_has_completed_it_and_not_when_the_caller_leaves() -> None:
    seen: list[object] = []

    async def read(chunks: AsyncIterator[bytes]) -> None:
        try:
            async for chunk in chunks:
                seen.append(chunk)
            seen.append("complete")
        except asyncio.CancelledError:
            seen.append("left")
            raise

    async with serve_scripted(ScriptedServices(upload=read)) as opened:
        await opened.media.UploadMedia(iter([CHUNK]), metadata=bearer(KEY))
        assert seen == [b"x", "complete"]
        for _ in range(10):
            seen.clear()
            call = opened.media.UploadMedia(metadata=bearer(KEY))
            await call.write(CHUNK)
            await until(lambda: len(seen) == 1)
            call.cancel()
            await opened.server.running.idle()
            assert seen == [b"x", "left"]


async def test_an_upload_that_was_received_completely_ends_at_its_deadline() -> None:
    async def store(chunks: AsyncIterator[bytes]) -> None:
        async for _ in chunks:
            pass
        await asyncio.Event().wait()

    async with serve_scripted(ScriptedServices(upload=store)) as opened:
        call = opened.media.UploadMedia(iter([CHUNK]), metadata=bearer(KEY, x_request_timeout="0.5"))
        assert reason_of(await asyncio.wait_for(failure(call), 20)) == "deadline_exceeded"


def calls_in_memory() -> int:
    """The calls of all servers in this process that are still in memory."""
    gc.collect()
    return sum(isinstance(each, rpc.Rpc) for each in gc.get_objects())


@pytest.mark.parametrize("ends", ["completed", "refused", "left"])
@METHODS
async def test_a_call_that_has_ended_is_not_kept(method: str, ends: str) -> None:
    begun = asyncio.Event()

    async def during(call: Call) -> None:
        begun.set()
        if ends == "refused":
            raise PomeloError("overloaded")
        if ends == "left":
            await forever(call)

    before = calls_in_memory()
    async with serve_scripted(ScriptedServices(during=during)) as opened:
        call = opened.task(method)
        if ends == "left":
            await begun.wait()
            call.cancel()
        elif ends == "completed":
            await end(call)
        else:
            assert reason_of(await failure(call)) == "overloaded"
        await opened.server.running.idle()
        await until(lambda: calls_in_memory() <= before, 20)
