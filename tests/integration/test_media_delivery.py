"""How results contain generated media over gRPC: a link, the bytes or both, as TaskOptions.delivery asks."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.gen.v1.image_pb2 import GeneratedImage
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.speech_pb2 import SpeechOutput
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.app import Account, RunningApp, app_fixture
from tests.calls import bearer
from tests.driver import STREAM
from tests.tasks import small_task

UNSPECIFIED = MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED
LINK = MediaDelivery.MEDIA_DELIVERY_LINK
INLINE = MediaDelivery.MEDIA_DELIVERY_INLINE
BOTH = MediaDelivery.MEDIA_DELIVERY_BOTH
DELIVERY = pytest.mark.parametrize("delivery", [UNSPECIFIED, LINK, INLINE, BOTH])
TASK_TYPE = pytest.mark.parametrize("task_type", ["image", "text_to_speech", "speech_to_speech"])

Output = GeneratedImage | SpeechOutput

app = app_fixture()


@pytest.fixture
async def account(app: RunningApp) -> Account:
    return await app.account()


async def ask(
    app: RunningApp,
    key: str,
    spec: TaskSpec,
    delivery: MediaDelivery.ValueType,
    *,
    stream: bool,
    **headers: str,
) -> tuple[TaskResult, bytes]:
    """Runs a task; returns its result, and the bytes of the audio chunks before it."""
    tasks: Any = TaskServiceStub(app.channel)
    options, metadata = TaskOptions(delivery=delivery), bearer(key, **headers)
    if not stream:
        run = await tasks.RunTask(RunTaskRequest(spec=spec, options=options), metadata=metadata)
        return run.result, b""
    call = tasks.StreamTask(StreamTaskRequest(spec=spec, options=options), metadata=metadata)
    events = [response.event async for response in call]
    return events[-1].completed, b"".join(event.audio_chunk.data for event in events)


def output_of(result: TaskResult) -> Output:
    """Returns the media of a result."""
    return result.image.images[0] if result.HasField("image") else result.speech


async def linked(app: RunningApp, output: Output) -> bytes:
    """Returns the bytes to which an output links; empty without a link."""
    if not output.HasField("media"):
        return b""
    signature = output.media.url.partition("?")[2]
    request = DownloadMediaRequest(id=output.media.id, signature=signature)
    head, *rest = [message async for message in MediaServiceStub(app.channel).DownloadMedia(request)]
    data = b"".join(message.chunk for message in rest)
    assert (head.media.content_type, head.media.size_bytes) == (output.content_type, len(data))
    assert output.media.size_bytes == len(data) > 0
    return data


@STREAM
@DELIVERY
@TASK_TYPE
async def test_a_result_contains_its_media_as_the_options_ask(
    app: RunningApp, account: Account, task_type: str, delivery: MediaDelivery.ValueType, stream: bool
) -> None:
    before = app.media()
    result, chunks = await ask(app, account.test, small_task(task_type), delivery, stream=stream)
    output = output_of(result)
    link = await linked(app, output)
    assert bool(link) == (delivery != INLINE)
    assert len(app.media() - before) == (delivery != INLINE)
    if chunks:
        assert (output.data, stream) == (b"", True)
        assert link in (b"", chunks)
    else:
        assert bool(output.data) == (delivery != LINK)
        assert not link or not output.data or link == output.data


@STREAM
@pytest.mark.parametrize(
    ("delivery", "inline"), [(UNSPECIFIED, False), (LINK, False), (INLINE, True), (BOTH, True)]
)
async def test_a_large_image_is_inline_at_the_end_of_a_stream_only_on_request(
    app: RunningApp,
    account: Account,
    delivery: MediaDelivery.ValueType,
    inline: bool,
    stream: bool,
) -> None:
    spec = small_task("image")
    spec.image.width = spec.image.height = 2048
    result, _ = await ask(app, account.test, spec, delivery, stream=stream)
    output = output_of(result)
    link = await linked(app, output)
    assert max(len(link), len(output.data)) > 45 * 1024
    assert bool(output.data) == (inline or (not stream and delivery == UNSPECIFIED))
    assert bool(link) == (delivery != INLINE)


@DELIVERY
@TASK_TYPE
async def test_a_repeat_with_other_options_gets_the_answer_in_the_other_form(
    app: RunningApp, account: Account, task_type: str, delivery: MediaDelivery.ValueType
) -> None:
    spec, key = small_task(task_type), {"idempotency_key": "one"}
    first, _ = await ask(app, account.test, spec, delivery, stream=False, **key)
    data = output_of(first).data or await linked(app, output_of(first))
    assert output_of(first).HasField("media") == (delivery != INLINE)
    for other in (LINK, INLINE, BOTH, UNSPECIFIED):
        for stream in (False, True):
            again, chunks = await ask(app, account.test, spec, other, stream=stream, **key)
            output = output_of(again)
            assert (again.id, again.usage, again.cost_micros) == (first.id, first.usage, first.cost_micros)
            assert await linked(app, output) == (b"" if other == INLINE else data)
            assert chunks == (data if stream and task_type != "image" else b"")
            assert output.data == (b"" if other == LINK or chunks else data)
    assert len(await app.records(account)) == 1


@STREAM
@pytest.mark.parametrize("task_type", ["text", "speech_to_text"])
async def test_an_answer_without_media_is_the_same_with_every_delivery(
    app: RunningApp, account: Account, task_type: str, stream: bool
) -> None:
    outputs = []
    for delivery in (UNSPECIFIED, LINK, INLINE, BOTH):
        result, _ = await ask(app, account.test, small_task(task_type), delivery, stream=stream)
        outputs.append((result.text, result.transcription, result.usage))
    assert outputs == outputs[:1] * 4
