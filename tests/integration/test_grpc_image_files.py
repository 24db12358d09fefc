"""Images of a task that are files, over gRPC: they count as if the message contained them."""

from __future__ import annotations

import asyncio

from pomelo.call import Call
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import Answer, Gate
from tests.app import RunningApp, app_fixture
from tests.calls import as_dict, bearer, failure, reason_of, upload_messages
from tests.tasks import text_task

KIB, MIB = 1024, 1024 * 1024

app = app_fixture()


async def picture_task(app: RunningApp, key: str, size: int, prompt: str = "What is it?") -> TaskSpec:
    """Uploads an image of that size; returns a task that names it."""
    image = b"\x89PNG\r\n\x1a\n".ljust(size, b"\0")
    upload = MediaServiceStub(app.channel).UploadMedia(
        iter(upload_messages(image, "image/png")), metadata=bearer(key)
    )
    spec = text_task(prompt)
    spec.text.messages[0].content.add().image.source.media_id = (await upload).media.id
    return spec


async def test_files_count_toward_the_bytes_in_flight_of_the_account_until_their_task_ends(
    app: RunningApp,
) -> None:
    caller, other = await app.account(), await app.account()
    tasks = TaskServiceStub(app.channel)
    gate = Gate()
    app.upstream.when("counted files", Answer("one two", at={1: gate}))
    waiting = await picture_task(app, caller.live, MIB, "counted files")
    small = await picture_task(app, caller.test, MIB)
    call = Call.from_headers(dict(bearer(caller.test)).get, protocol="grpc")
    visit = await app.server.services.access.admit(call)
    visit.reserve(126 * MIB + MIB // 2)  # of 128
    async with asyncio.timeout(20):
        running = tasks.RunTask(RunTaskRequest(spec=waiting), metadata=bearer(caller.live))
        await gate.reached.wait()
        refused = await failure(tasks.RunTask(RunTaskRequest(spec=small), metadata=bearer(caller.test)))
        assert reason_of(refused) == "overloaded"
        await tasks.RunTask(RunTaskRequest(spec=text_task()), metadata=bearer(caller.test))
        others = await picture_task(app, other.test, MIB)
        await tasks.RunTask(RunTaskRequest(spec=others), metadata=bearer(other.test))
        gate.open()
        await running
        await tasks.RunTask(RunTaskRequest(spec=small), metadata=bearer(caller.test))
    visit.close()


async def test_a_refused_task_with_large_files_counts_as_a_request(app: RunningApp) -> None:
    tasks = TaskServiceStub(app.channel)
    for size, remaining in ((64 * KIB, ["4", "3", "2"]), (32 * KIB, ["5", "5", "5"])):
        caller = await app.account("five")
        spec = await picture_task(app, caller.test, size)
        spec.text.stop.extend("abcde")
        for expected in remaining:
            error = await failure(tasks.RunTask(RunTaskRequest(spec=spec), metadata=bearer(caller.test)))
            assert reason_of(error) == "invalid_parameter"
            assert as_dict(error.trailing_metadata())["x-ratelimit-remaining"] == expected
