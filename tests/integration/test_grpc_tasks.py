"""TaskService and ModelService over gRPC."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pomelo.errors import TABLE
from pomelo.gen.v1.model_service_pb2 import GetModelRequest, ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import TextDelta, TextInput
from pomelo.providers.base import Event, Job
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.app import RunningApp, app_fixture
from tests.calls import as_dict, bearer, end, failure, reason_of
from tests.conftest import Keys
from tests.driver import METHOD
from tests.tasks import TASK_TYPES, output_field, small_task, text_task
from tests.waiting import soon


@pytest.fixture(scope="module")
def tasks(channel: grpc.aio.Channel) -> Any:
    return TaskServiceStub(channel)


def start(tasks: Any, method: str, spec: TaskSpec, **more: Any) -> Any:
    """Starts a call of either method."""
    if method == "RunTask":
        return tasks.RunTask(RunTaskRequest(spec=spec), **more)
    return tasks.StreamTask(StreamTaskRequest(spec=spec), **more)


@pytest.mark.parametrize("kind", TASK_TYPES)
async def test_a_task_of_each_type_runs(kind: str, tasks: Any, keys: Keys) -> None:
    response = await tasks.RunTask(RunTaskRequest(spec=small_task(kind)), metadata=bearer(keys.test))
    assert response.result.WhichOneof("output") == output_field(kind)
    assert response.result.model == small_task(kind).model
    assert abs(response.result.create_time.seconds - time.time()) < 30


async def test_a_stream_has_its_headers_in_initial_metadata(tasks: Any, keys: Keys) -> None:
    call = start(tasks, "StreamTask", text_task(), metadata=bearer(keys.test, x_request_id="my-id.7"))
    metadata = as_dict(await call.initial_metadata())
    assert metadata["x-request-id"] == "my-id.7"
    assert metadata["x-pomelo-mode"] == "test"
    assert "x-pomelo-open" not in metadata, "a sign between a gateway and a server alone"
    await end(call)
    assert "x-credits-charged" in as_dict(await call.trailing_metadata())


async def test_a_unary_response_has_its_headers_only_in_trailing_metadata(tasks: Any, keys: Keys) -> None:
    call = start(tasks, "RunTask", text_task(), metadata=bearer(keys.test, x_request_id="my-id.7"))
    await end(call)
    assert not [name for name in as_dict(await call.initial_metadata()) if name.startswith("x-")]
    metadata = as_dict(await call.trailing_metadata())
    assert metadata["x-request-id"] == "my-id.7"
    assert metadata["x-pomelo-mode"] == "test"
    assert metadata["x-credits-charged"]


@METHOD
@pytest.mark.parametrize("request_id", [None, "two words", "x" * 129])
async def test_a_missing_or_invalid_request_id_is_replaced(
    method: str, request_id: str | None, tasks: Any, keys: Keys
) -> None:
    more = {} if request_id is None else {"x_request_id": request_id}
    call = start(tasks, method, text_task(), metadata=bearer(keys.test, **more))
    await end(call)
    metadata = as_dict(await call.initial_metadata()) | as_dict(await call.trailing_metadata())
    assert metadata["x-request-id"].startswith("req_")


@METHOD
async def test_an_error_has_metadata_status_and_details(method: str, tasks: Any, keys: Keys) -> None:
    task = text_task("[[error:provider_unavailable]]")
    error = await failure(start(tasks, method, task, metadata=bearer(keys.test, x_request_id="it")))
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert error.details() == TABLE["provider_unavailable"].message
    assert reason_of(error) == "provider_unavailable"
    metadata = {**as_dict(error.initial_metadata()), **as_dict(error.trailing_metadata())}
    assert metadata["x-request-id"] == "it"
    assert metadata["x-pomelo-mode"] == "test"


async def test_a_retryable_refusal_has_its_wait_in_metadata(tasks: Any, keys: Keys) -> None:
    task = text_task("[[error:rate_limit_exceeded]]")
    error = await failure(start(tasks, "RunTask", task, metadata=bearer(keys.test)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = as_dict(error.trailing_metadata())
    assert (metadata["retry-after"], metadata["grpc-retry-pushback-ms"]) == ("60", "60000")


async def test_a_permanent_refusal_stops_retry_policies(tasks: Any, keys: Keys) -> None:
    for task, key in ((text_task(model="nope"), keys.test), (text_task(), keys.revoked)):
        error = await failure(start(tasks, "RunTask", task, metadata=bearer(key)))
        metadata = as_dict(error.trailing_metadata())
        assert metadata["grpc-retry-pushback-ms"] == "-1"
        assert "retry-after" not in metadata


@METHOD
async def test_a_caller_without_a_key_is_refused_with_a_request_id(method: str, tasks: Any) -> None:
    error = await failure(start(tasks, method, text_task()))
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED
    assert reason_of(error) == "invalid_api_key"
    assert as_dict(error.trailing_metadata())["x-request-id"].startswith("req_")


@METHOD
async def test_a_request_without_a_task_lacks_its_model(method: str, tasks: Any, keys: Keys) -> None:
    request = RunTaskRequest() if method == "RunTask" else StreamTaskRequest()
    error = await failure(getattr(tasks, method)(request, metadata=bearer(keys.test)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert reason_of(error) == "missing_parameter"


@METHOD
async def test_a_deadline_ends_the_call_in_time(method: str, tasks: Any, keys: Keys) -> None:
    began = time.monotonic()
    error = await failure(
        start(tasks, method, text_task("[[delay:30]]"), metadata=bearer(keys.test), timeout=0.3)
    )
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0.25 < time.monotonic() - began < 10


@METHOD
async def test_a_timeout_in_metadata_applies_without_a_deadline(method: str, tasks: Any, keys: Keys) -> None:
    metadata = bearer(keys.test, x_request_timeout="0.2")
    error = await failure(start(tasks, method, text_task("[[delay:30]]"), metadata=metadata))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason_of(error) == "deadline_exceeded"


@METHOD
async def test_a_caller_that_leaves_closes_the_provider_s_connection_within_50_ms(
    method: str, tasks: Any, keys: Keys, upstream: FaultUpstream
) -> None:
    async def leave(number: int) -> float:
        gate = Gate()
        prompt = f"leave {method} over gRPC {number}"
        upstream.when(prompt, Answer("one two three four", at={2: gate}))
        call = start(tasks, method, text_task(prompt), metadata=bearer(keys.live))
        reading = asyncio.ensure_future(call.read()) if method == "StreamTask" else None
        await gate.reached.wait()
        received = next(r for r in upstream.requests if r.prompt == prompt)
        if reading is not None:
            assert (await reading).event.WhichOneof("event") == "started"
        left = asyncio.get_running_loop().time()
        call.cancel()
        await received.left.wait()
        assert received.left_at is not None
        return received.left_at - left

    async with asyncio.timeout(30):
        await soon(leave, 0.05)


@METHOD
async def test_inline_audio_of_exactly_the_limit_is_accepted(method: str, tasks: Any, keys: Keys) -> None:
    task = small_task("speech_to_text")
    task.speech_to_text.audio.data = b"\0" * (4 * 1024 * 1024)
    await end(start(tasks, method, task, metadata=bearer(keys.test)))
    task.speech_to_text.audio.data += b"\0"
    error = await failure(start(tasks, method, task, metadata=bearer(keys.test)))
    assert reason_of(error) == "payload_too_large"


async def test_models_are_listed_and_described(channel: grpc.aio.Channel, keys: Keys) -> None:
    models = ModelServiceStub(channel)
    listed = await models.ListModels(ListModelsRequest(), metadata=bearer(keys.test))
    names = [model.id for model in listed.models]
    assert len(names) == 14
    assert names == sorted(names)
    one = await models.GetModel(GetModelRequest(id="gpt-4"), metadata=bearer(keys.test))
    assert one.model == listed.models[names.index("gpt-4")]
    error = await failure(models.GetModel(GetModelRequest(id="nope"), metadata=bearer(keys.test)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.NOT_FOUND, "model_not_found")
    error = await failure(models.ListModels(ListModelsRequest(), metadata=bearer("junk")))
    assert reason_of(error) == "invalid_api_key"
    assert as_dict(error.trailing_metadata())["x-request-id"].startswith("req_")


# --- broken providers and callers


class Broken:
    """A provider that raises unexpected errors or never ends."""

    configured = True

    def __init__(self) -> None:
        self.moved = asyncio.Event()
        self.closed = asyncio.Event()

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        """Raises an unexpected error, or yields events without end."""
        match job.input.messages[0].content[0].text:
            case "cancel":
                forever: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                forever.cancel()
                await forever
            case "raise":
                raise ZeroDivisionError("secret words")
        try:
            while True:
                yield Event(text_delta=TextDelta(text="x" * 64_000))
                self.moved.set()
        finally:
            self.closed.set()

    async def stalled(self) -> None:
        """Returns when no more events are read because every buffer is full."""
        while True:
            self.moved.clear()
            try:
                await asyncio.wait_for(self.moved.wait(), 0.3)
            except TimeoutError:
                return

    async def aclose(self) -> None:
        pass


BROKEN = Broken()
broken = app_fixture(providers={"sandbox": BROKEN})


@METHOD
@pytest.mark.parametrize("fault", ["raise", "cancel"])
async def test_an_unexpected_error_is_an_internal_error_and_one_log_line(
    method: str, fault: str, broken: RunningApp, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = bearer((await broken.account()).test, x_request_id=f"id-{method}-{fault}")
    tasks = TaskServiceStub(broken.channel)
    with caplog.at_level(logging.INFO):
        error = await failure(start(tasks, method, text_task(fault), metadata=metadata, timeout=20))
    assert error.code() == grpc.StatusCode.INTERNAL
    assert error.details() == TABLE["internal_error"].message
    assert reason_of(error) == "internal_error"
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(lines) == 1, lines
    assert f"id-{method}-{fault}" in lines[0]
    assert "secret" not in str(error.trailing_metadata())


async def test_a_caller_that_stops_reading_and_leaves_closes_the_provider_immediately(
    broken: RunningApp,
) -> None:
    metadata = bearer((await broken.account()).test)
    async with asyncio.timeout(20):
        call = start(TaskServiceStub(broken.channel), "StreamTask", text_task("flood"), metadata=metadata)
        assert (await call.read()).event.WhichOneof("event") == "started"
        await BROKEN.stalled()
        assert not BROKEN.closed.is_set()
        left = time.monotonic()
        call.cancel()
        await BROKEN.closed.wait()
        assert time.monotonic() - left < 5


async def test_metadata_that_is_too_large_is_refused(tasks: Any, keys: Keys) -> None:
    error = await failure(
        start(tasks, "RunTask", text_task(), metadata=bearer(keys.test, traceparent="x" * 20_000))
    )
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
