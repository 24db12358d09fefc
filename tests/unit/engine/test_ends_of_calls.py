"""What a task holds is freed when it ends, however it ends."""

from __future__ import annotations

from contextlib import suppress

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.testing import Speech, Stop, error_reply
from tests.calls import call_of
from tests.tasks import small_task, text_task
from tests.unit.engine.apps import PROTOCOL, STREAM, EngineApp


@pytest.mark.parametrize(
    "spec",
    [text_task(), text_task(model="no-such-model"), text_task("to be refused")],
    ids=["completed", "refused", "failed"],
)
@PROTOCOL
@STREAM
async def test_a_call_ends_with_its_task(
    engine: EngineApp, spec: TaskSpec, protocol: str, stream: bool
) -> None:
    engine.upstream.when("to be refused", error_reply(400, code="content_policy_violation"))
    call = call_of((await engine.account()).key)
    call.protocol = protocol
    ended: list[str] = []
    call.at_end += [lambda: ended.append("first"), lambda: ended.append("second")]
    with suppress(PomeloError):
        if stream:
            async with engine.app.services.tasks.stream_task(spec, TaskOptions(), call) as events:
                assert ended == []
                async for _ in events:
                    pass
        else:
            await engine.app.services.tasks.run_task(spec, TaskOptions(), call)
    assert sorted(ended) == ["first", "second"]


async def test_the_incomplete_file_of_a_stream_that_is_left_is_deleted(engine: EngineApp) -> None:
    account = await engine.account()
    engine.upstream.script(Speech(size=300_000))
    options = TaskOptions(delivery=MediaDelivery.MEDIA_DELIVERY_BOTH)
    task = small_task("text_to_speech")
    async with engine.app.services.tasks.stream_task(task, options, call_of(account.key)) as events:
        async for _ in events:
            if engine.media():
                break
    assert engine.media() == []
    await engine.settled(account)


@STREAM
async def test_the_incomplete_file_of_a_task_that_fails_is_deleted(engine: EngineApp, stream: bool) -> None:
    account = await engine.account()
    engine.upstream.script(Speech(size=300_000, at={40: Stop.RESET}))
    options = TaskOptions(delivery=MediaDelivery.MEDIA_DELIVERY_BOTH)
    answer = await engine.ask(account, small_task("text_to_speech"), stream=stream, options=options)
    assert answer.error is not None
    assert engine.media() == []
    await engine.settled(account)
