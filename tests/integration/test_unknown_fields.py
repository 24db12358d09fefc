"""Fields that the server does not know: refused at every depth, over all protocols, and free of charge."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message

from pomelo.gen.v1.account_service_pb2 import (
    GetAccountRequest,
    ListUsageRequest,
    SumUsageRequest,
    UsageGrouping,
)
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.model_service_pb2 import GetModelRequest, ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.app import Account, RunningApp, app_fixture
from tests.calls import bearer, failure, reason_of
from tests.driver import METHOD, PROTOCOL, REST_PROTOCOL, STREAM
from tests.tasks import TASK_BODIES, small_task, text_task

M = TypeVar("M", bound=Message)

UNKNOWN = b"\xf8\x3f\x01"
"""Field 1023, with the number 1."""

app = app_fixture()


def conversation() -> TaskSpec:
    """Returns a text task of two messages; the second one has a text and an image."""
    spec = text_task()
    parts = spec.text.messages.add(role="ROLE_USER").content
    parts.add(text="What is it?")
    parts.add(image={"source": {"url": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUg=="}})
    return spec


def with_unknown(whole: M, path: str) -> M:
    """Adds an unknown field to the message at a path, such as text.messages.1."""
    message: Any = whole
    for step in path.split(".") if path else ():
        message = message[int(step)] if step.isdecimal() else getattr(message, step)
    assert isinstance(message, Message)
    message.MergeFromString(UNKNOWN)
    return whole


PLACES = [
    *[("text", path) for path in ("", "text", "text.messages.0", "text.messages.1.content.1")],
    *[("text", f"text.messages.1.content.1.{path}") for path in ("image", "image.source")],
    *[("image", path) for path in ("", "image")],
    *[("text_to_speech", f"text_to_speech{path}") for path in ("", ".voice_settings")],
    *[("speech_to_speech", f"speech_to_speech{path}") for path in ("", ".audio", ".voice_settings")],
    *[("speech_to_text", f"speech_to_text{path}") for path in ("", ".audio")],
]


async def refuse(app: RunningApp, account: Account, method: str, spec: TaskSpec, options: TaskOptions) -> str:
    """Returns the message with which a task is refused as invalid. It costs nothing."""
    request = (RunTaskRequest if method == "RunTask" else StreamTaskRequest)(spec=spec, options=options)
    call = getattr(TaskServiceStub(app.channel), method)
    error = await failure(call(request, metadata=bearer(account.test)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    balance = await app.balance(account)
    assert (balance.spent, balance.held, await app.records(account)) == (0, 0, [])
    return error.details() or ""


@METHOD
@pytest.mark.parametrize(("task_type", "path"), PLACES)
async def test_an_unknown_field_of_a_spec_is_refused(
    app: RunningApp, task_type: str, path: str, method: str
) -> None:
    spec = with_unknown(conversation() if task_type == "text" else small_task(task_type), path)
    message = await refuse(app, await app.account(), method, spec, TaskOptions())
    shown = re.sub(r"\.(\d)", r"[\1]", path) or "the task"
    assert message.startswith(f"Unknown field 1023 of {shown}: ")


@METHOD
async def test_an_unknown_field_of_a_large_spec_is_refused(app: RunningApp, method: str) -> None:
    spec = with_unknown(text_task("x" * 300_000), "text.messages.0.content.0")
    message = await refuse(app, await app.account(), method, spec, TaskOptions())
    assert message.startswith("Unknown field 1023 of text.messages[0].content[0]: ")


@METHOD
async def test_an_unknown_field_or_value_of_the_options_is_refused(app: RunningApp, method: str) -> None:
    account = await app.account()
    options = TaskOptions()
    options.MergeFromString(UNKNOWN)
    assert "Unknown field 1023" in await refuse(app, account, method, text_task(), options)
    options = TaskOptions(delivery=9)  # type: ignore[arg-type]
    assert "delivery" in await refuse(app, account, method, text_task(), options)


@REST_PROTOCOL
@STREAM
@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_an_unknown_field_of_a_json_body_is_a_400_and_costs_nothing(
    app: RunningApp, task_type: str, protocol: str, stream: bool
) -> None:
    account = await app.account()
    body = {**TASK_BODIES[task_type], "max_cost": 1}
    outcome = await app.ask(protocol, account.test, body, stream=stream)
    assert (outcome.status, outcome.code) == (400, "invalid_parameter")
    assert "max_cost" in outcome.message
    assert await app.records(account) == []
    assert (await app.balance(account)).spent == 0


@PROTOCOL
async def test_a_task_with_every_known_field_is_accepted(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    fields = {"max_tokens": 5, "temperature": 1, "top_p": 0.5, "stop": ["x"], "seed": 1, "user": "u"}
    penalties = {"presence_penalty": 0, "frequency_penalty": 0}
    outcome = await app.ask(protocol, account.test, TASK_BODIES["text"] | fields | penalties)
    assert outcome.code == "ok"


@pytest.mark.parametrize(
    ("stub", "method", "request_", "path"),
    [
        (ModelServiceStub, "ListModels", ListModelsRequest(), ""),
        (ModelServiceStub, "GetModel", GetModelRequest(id="gpt-4"), ""),
        (AccountServiceStub, "GetAccount", GetAccountRequest(), ""),
        (AccountServiceStub, "ListUsage", ListUsageRequest(), "filter"),
        (
            AccountServiceStub,
            "SumUsage",
            SumUsageRequest(group_by=[UsageGrouping(metadata_key="team")]),
            "group_by.0",
        ),
        (TaskServiceStub, "RunTask", RunTaskRequest(spec=text_task()), ""),
        (TaskServiceStub, "StreamTask", StreamTaskRequest(spec=text_task()), ""),
    ],
)
async def test_an_unknown_field_of_any_request_is_refused(
    app: RunningApp, stub: Any, method: str, request_: Message, path: str
) -> None:
    with_unknown(request_, path)
    account = await app.account()
    error = await failure(getattr(stub(app.channel), method)(request_, metadata=bearer(account.test)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
    place = {"": "the request", "group_by.0": "group_by[0]"}.get(path, path)
    assert (error.details() or "").startswith(f"Unknown field 1023 of {place}:")
