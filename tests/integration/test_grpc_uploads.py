"""Uploads and downloads over gRPC, before services that the test plays: places, times and ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaRequest
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from tests.calls import bearer, end, failure, reason_of
from tests.driver import METHOD
from tests.faults import http2
from tests.integration.scripted_services import GATEWAY, KEY, ScriptedServices, raises, serve_scripted
from tests.tasks import text_task
from tests.waiting import soon


async def test_a_refused_upload_is_received_for_a_moment_so_that_its_caller_gets_the_error() -> None:
    # grpc.aio's client forgets the refusal if a message that it sends fails.
    async with serve_scripted(ScriptedServices(upload=raises(PomeloError("payload_too_large")))) as opened:
        assert await opened.upload_seconds() > 0.9
        await soon(lambda _: opened.upload_seconds(*GATEWAY), 0.9)  # a gateway needs no such time


async def test_slots_of_uploads_and_messages_are_released() -> None:
    one = RunTaskRequest(spec=text_task()).SerializeToString()
    async with serve_scripted(reads=1, uploads=1, message=1000) as opened:
        for _ in range(3):
            pieces = [UploadMediaRequest(chunk=b"x")] * 3
            made = await opened.media.UploadMedia(iter(pieces), metadata=bearer(KEY))
            assert made.media.size_bytes == 3
            assert reason_of(await failure(opened.task("RunTask", "x" * 1500))) == "payload_too_large"
            path = "/pomelo.v1.TaskService/RunTask"
            call = opened.channel.stream_unary(path)(iter([one, one]), metadata=bearer(KEY))
            assert reason_of(await failure(call)) == "invalid_body"
            await end(opened.task("RunTask"))


async def test_an_upload_without_chunks_ends() -> None:
    async with serve_scripted() as opened:
        made = await opened.media.UploadMedia(iter([]), metadata=bearer(KEY))
        assert (made.media.size_bytes, made.media.content_type) == (0, "")


@METHOD
async def test_the_time_to_read_a_message_does_not_bound_its_task(method: str) -> None:
    async def work(call: Call) -> None:
        await asyncio.sleep(0.4)  # longer than a message may take

    async with serve_scripted(ScriptedServices(during=work), read_time=0.2) as opened:
        await end(opened.task(method))


async def test_the_time_between_two_chunks_does_not_include_their_processing() -> None:
    async def store(chunks: AsyncIterator[bytes]) -> None:
        assert await anext(chunks) == b"x"
        await asyncio.sleep(0.4)  # longer than a piece may take

    async with serve_scripted(ScriptedServices(upload=store), chunk_time=0.2) as opened:
        pieces = [UploadMediaRequest(chunk=b"x"), UploadMediaRequest(chunk=b"yz")]
        assert (await opened.media.UploadMedia(iter(pieces), metadata=bearer(KEY))).media.size_bytes == 2


async def test_a_message_that_waits_too_long_for_its_slot_is_refused_as_overloaded() -> None:
    admitted = asyncio.Event()

    async def admission(call: Call) -> None:
        if call.request_id == "early":
            await admitted.wait()

    async with serve_scripted(ScriptedServices(admission=admission), reads=1, read_time=0.6) as opened:
        metadata = bearer(KEY, x_request_id="early")
        early = asyncio.ensure_future(failure(opened.task("RunTask", metadata=metadata)))
        await asyncio.sleep(0.3)  # so that the other call may take longer
        host, _, port = opened.server.address.rpartition(":")
        async with http2.connect(host, int(port)) as connection:
            call = connection.begin("/pomelo.v1.TaskService/RunTask", bearer(KEY))
            await connection.send(call, b"")
            while not opened.services.visits:  # noqa: ASYNC110
                await asyncio.sleep(0)
            admitted.set()
            failed = await early
        assert reason_of(failed) == "overloaded"
        assert "more messages at a time" in (failed.details() or "")


# --- downloads


async def test_a_download_by_a_signed_link_may_take_longer_than_an_unauthenticated_call() -> None:
    async def slow() -> None:
        await asyncio.sleep(0.5)

    async with serve_scripted(ScriptedServices(download=slow), unauthenticated_time=0.2) as opened:
        request = DownloadMediaRequest(id="media_1", signature="s")
        messages = [message async for message in opened.media.DownloadMedia(request)]
    assert [message.chunk for message in messages] == [b"", b"abc"]
