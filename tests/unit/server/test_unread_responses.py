"""Responses that their callers do not read: what counts until they are read or dropped, and what is logged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.task_pb2 import TaskEvent
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.runtime.in_flight import LARGE_RESPONSE
from pomelo.server import rpc
from pomelo.server.server import ServerOptions, open_server
from tests.calls import bearer, end, failure, reason_of
from tests.faults import frames, http2
from tests.integration.scripted_services import KEY, ScriptedServer, ScriptedServices, serve_scripted
from tests.tasks import text_task
from tests.unit.server.test_calls import Recorder
from tests.waiting import until

LARGE = 4 * LARGE_RESPONSE
REQUESTS = {
    "TaskService/RunTask": RunTaskRequest(spec=text_task()),
    "TaskService/StreamTask": StreamTaskRequest(spec=text_task()),
    "MediaService/DownloadMedia": DownloadMediaRequest(id="media_1"),
}

SHORT = [("x-request-timeout", "0.3")]


def services(**fields: object) -> ScriptedServices:
    """Returns services whose responses are larger than a narrow window."""
    return ScriptedServices(text="x" * LARGE, chunks=(b"x" * LARGE,) * 4, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def unread(
    opened: ScriptedServer,
    method: str,
    *,
    key: str = KEY,
    request: object = None,
    metadata: Sequence[tuple[str, str]] = (),
) -> AsyncIterator[tuple[http2.Connection, http2.Stream]]:
    """Makes a call and reads only the first 64 KiB of its response."""
    host, _, port = opened.server.address.rpartition(":")
    message = request or REQUESTS[method]
    async with http2.connect(host, int(port), wide=False) as connection:
        call = connection.begin(f"/pomelo.v1.{method}", [*(bearer(key) if key else ()), *metadata])
        data = message.SerializeToString()  # type: ignore[attr-defined]
        await connection.send(call, http2.prefixed(data), end=True)
        await until(lambda: sum(kind == frames.DATA for kind, _ in call.frames) >= 3)
        yield connection, call


@pytest.mark.parametrize("method", REQUESTS)
async def test_a_server_that_stops_delivers_the_rest_of_a_response_that_is_read_late(method: str) -> None:
    given = services()
    options = ServerOptions("127.0.0.1:0", grace=10.0)
    async with asyncio.timeout(20), AsyncExitStack() as running:
        server = await running.enter_async_context(open_server(given.services(), options))
        channel = await running.enter_async_context(grpc.aio.insecure_channel(server.address))
        async with unread(ScriptedServer(given, server, channel), method) as (connection, call):
            stopping = asyncio.create_task(running.aclose())
            await until(lambda: server.readiness.draining)
            await asyncio.sleep(0.1)  # an answer that is cut is cut by now
            connection.read_on(call)
            await connection.over(call)
            assert call.frames[-1] == (frames.HEADERS, frames.END_HEADERS | frames.END_STREAM)
        await stopping


@pytest.mark.parametrize("method", REQUESTS)
async def test_a_caller_who_leaves_in_the_middle_of_a_response_is_not_logged(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_scripted(services()) as opened:
        for _ in range(5):
            async with unread(opened, method) as (connection, call):
                connection.reset(call)
                await opened.server.running.idle()
        async with unread(opened, method):
            pass
        await opened.server.running.idle()
        await until(lambda: all(visit.closed and not visit.unread for visit in opened.services.visits))
    assert not caplog.records


async def test_a_large_response_is_unread_until_its_caller_leaves() -> None:
    connections = Recorder()
    async with (
        serve_scripted(services(), connections) as opened,
        unread(opened, "TaskService/RunTask") as (connection, call),
    ):
        (visit,) = opened.services.visits
        assert visit.unread > LARGE
        assert visit.closed == 1
        assert connections.reports[-2:] == ["ended", "sending"]
        connection.reset(call)
        await until(lambda: connections.reports[-1] == "sent")
        assert not visit.unread


async def test_a_call_counts_as_one_in_flight_until_its_small_response_is_sent() -> None:
    given, connections = ScriptedServices(text="x" * 60_000), Recorder()
    data = http2.prefixed(REQUESTS["TaskService/RunTask"].SerializeToString())
    async with serve_scripted(given, connections) as opened:
        host, _, port = opened.server.address.rpartition(":")
        async with http2.connect(host, int(port), wide=False) as connection:
            for ends in (True, False):  # the window is as large as one response
                call = connection.begin("/pomelo.v1.TaskService/RunTask", bearer(KEY))
                await connection.send(call, data, end=True)
                if ends:
                    await connection.over(call)
            await until(lambda: len(given.visits) == 2 and given.visits[0].closed)
            await opened.server.running.idle()
            assert [(visit.closed, visit.unread) for visit in given.visits] == [(1, 0), (0, 0)]
            assert connections.reports[-2:] == ["ended", "sending"], "else its connection could stay for ever"
            connection.reset(call)
            await until(lambda: [visit.closed for visit in given.visits] == [1, 1])
            assert connections.reports[-1] == "sent"


async def test_an_unread_response_to_a_health_check_is_reported() -> None:
    connections = Recorder()
    async with serve_scripted(services(), connections) as opened:
        host, _, port = opened.server.address.rpartition(":")
        async with http2.connect(host, int(port), wide=False, window=0) as connection:
            call = connection.begin("/grpc.health.v1.Health/Check")
            await connection.send(call, http2.prefixed(b""), end=True)
            await opened.server.running.idle()
            await until(lambda: connections.reports[-1:] == ["sending"])
            connection.read_on(call)
            await connection.over(call)
            await until(lambda: connections.reports[-1] == "sent")


async def test_a_large_message_of_a_stream_is_unread_until_it_is_read() -> None:
    async with serve_scripted(services()) as opened:
        async with unread(opened, "TaskService/StreamTask") as (connection, call):
            assert opened.services.visits[-1].unread > LARGE
            connection.reset(call)
            await until(lambda: not opened.services.visits[-1].unread)
        await end(opened.task("StreamTask"))
        assert not opened.services.visits[-1].unread


async def test_a_large_message_that_was_read_counts_no_more_while_its_stream_goes_on() -> None:
    class Longer(ScriptedServices):
        """Waits after its large event."""

        @asynccontextmanager
        async def stream_task(self, *task: Any) -> AsyncIterator[AsyncIterator[TaskEvent]]:
            async def produce() -> AsyncIterator[TaskEvent]:
                async with ScriptedServices.stream_task(self, *task) as events:
                    async for event in events:
                        yield event
                await gate.wait()

            yield produce()

    gate = asyncio.Event()
    async with serve_scripted(Longer(text="x" * LARGE)) as opened:
        call = opened.task("StreamTask")
        for _ in range(2):
            await call.read()
        await until(lambda: not opened.services.visits[0].unread)
        gate.set()
        assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize("method", ["TaskService/StreamTask", "MediaService/DownloadMedia"])
async def test_a_late_stream_that_is_not_read_is_in_flight_until_its_caller_leaves(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rpc, "_GRACE", 0.0)
    connections = Recorder()
    async with (
        serve_scripted(services(), connections) as opened,
        unread(opened, method, metadata=SHORT) as (connection, call),
    ):
        (visit,) = opened.services.visits
        await until(lambda: "sending" in connections.reports)
        assert connections.reports[-2:] == ["ended", "sending"]
        assert visit.closed == 0
        assert bool(visit.unread) == (method == "TaskService/StreamTask")
        connection.reset(call)
        await until(lambda: connections.reports[-1] == "sent")
        assert (visit.closed, visit.unread) == (1, 0)
        assert connections.reports.count("ended") == 1
    assert not caplog.records


async def test_a_late_download_without_a_key_keeps_its_slot_until_its_caller_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rpc, "_GRACE", 0.0)
    connections = Recorder()
    link = DownloadMediaRequest(id="media_1", signature="valid")
    async with serve_scripted(services(), connections, unauthenticated=1) as opened:
        async with unread(opened, "MediaService/DownloadMedia", key="", request=link, metadata=SHORT) as (
            connection,
            call,
        ):
            await until(lambda: "sending" in connections.reports)
            assert reason_of(await failure(opened.media.DownloadMedia(link))) == "overloaded"
            connection.reset(call)
            await until(lambda: "sent" in connections.reports)
        await end(opened.media.DownloadMedia(link))
