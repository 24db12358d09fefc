"""The values of errors over gRPC: the metadata of ErrorInfo have all that the message names, a remote gateway
receives the same, and exceeded limits have a QuotaFailure."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import grpc
import pytest

from pomelo.configuration.front_ends import gateway_proof
from pomelo.errors import TABLE, PomeloError
from pomelo.gen.v1.image_pb2 import ImageInput
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.model_service_pb2 import GetModelRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest, TaskOptions
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.providers.sandbox.triggers import ERRORS
from pomelo.server.remote import open_remote
from pomelo.service import Services
from pomelo.testing import Answer, Gate
from tests.app import Account, RunningApp, app_fixture
from tests.calls import bearer, call_of, details_of, failure, refusal, values_of
from tests.driver import METHOD
from tests.tasks import TASK_BODIES, text_body, to_task

RUN_TASK = "/pomelo.v1.TaskService/RunTask"


app = app_fixture()


@pytest.fixture(scope="module")
async def remote(app: RunningApp) -> AsyncIterator[Services]:
    """The app's services, as a remote gateway reaches them."""
    assert app.server.grpc is not None
    async with open_remote(
        app.server.grpc, proof=gateway_proof(app.server.settings.root_secret())
    ) as services:
        yield services


def start(app: RunningApp, method: str, task: TaskSpec, key: str) -> Any:
    request = {"RunTask": RunTaskRequest, "StreamTask": StreamTaskRequest}[method](spec=task)
    return getattr(TaskServiceStub(app.channel), method)(request, metadata=bearer(key))


async def refused_task(
    app: RunningApp, remote: Services, method: str, task: TaskSpec, key: str
) -> tuple[grpc.aio.AioRpcError, PomeloError]:
    """Runs a task over the channel and through a remote gateway; returns both errors."""
    error = await failure(start(app, method, task, key))
    call = call_of(key)
    if method == "RunTask":
        return error, await refusal(remote.tasks.run_task(task, TaskOptions(), call))
    return error, await refusal(first_event(remote, task, key))


async def first_event(services: Services, task: TaskSpec, key: str) -> object:
    async with services.tasks.stream_task(task, TaskOptions(), call_of(key)) as events:
        return await anext(events)


def with_field(values: dict[str, str]) -> tuple[str | None, dict[str, str]]:
    """Returns the field and the values of the error that has these metadata."""
    rest = dict(values)
    return rest.pop("field", None), rest


def image(prompt: str = "A kite", **fields: int) -> TaskSpec:
    return to_task({"model": "flux-1-pro", "prompt": prompt, **fields})


def text_with(text: str = "Hello", **fields: Any) -> TaskSpec:
    return to_task(text_body(text, **fields))


def with_unknown(task: TaskSpec) -> TaskSpec:
    """Adds field 1023 to the first message of a text task."""
    task.text.messages[0].MergeFromString(b"\xf8\x3f\x01")
    return task


def with_metadata(**pairs: str) -> TaskSpec:
    task = text_with()
    task.metadata.update(pairs)
    return task


Prepare = Callable[[RunningApp], Awaitable[Account]]


@dataclass(frozen=True)
class Case:
    """A task that is refused, the metadata of its error, and the account that runs it."""

    code: str
    task: TaskSpec
    values: dict[str, str]
    account: Prepare = lambda app: app.account()


async def without_plan(app: RunningApp) -> Account:
    account = await app.account()
    await app.server.store.set_plan(account.name, "gone")
    return account


def bounds(expected: str, **more: str) -> dict[str, str]:
    return {"expected": expected, **more}


REFUSED_TASKS = {
    "model_not_allowed": Case(
        "model_not_allowed",
        text_with(),
        {"field": "model", "model": "gpt-4"},
        lambda app: app.account(models=("flux-1-pro",)),
    ),
    "plan": Case("model_not_allowed", text_with(), {"plan": "gone"}, without_plan),
    "missing_parameter": Case("missing_parameter", to_task({"model": "gpt-4"}), {"field": "messages"}),
    "range": Case(
        "invalid_parameter",
        text_with(temperature=3),
        {"field": "temperature", **bounds("a number from 0 to 2", minimum="0", maximum="2")},
    ),
    "least": Case(
        "invalid_parameter",
        text_with(max_tokens=0),
        {"field": "max_tokens", **bounds("a whole number from 1", minimum="1")},
    ),
    "large numbers": Case(
        "invalid_parameter",
        image(width=4096),
        {"field": "width", **bounds("a whole number from 64 to 2,048", minimum="64", maximum="2048")},
    ),
    "another input": Case(
        "invalid_parameter",
        TaskSpec(model="gpt-4", image=ImageInput(prompt="A kite")),
        {"field": "image", "model": "gpt-4", "taskType": "text"},
    ),
    "unknown field": Case(
        "invalid_parameter",
        with_unknown(text_with()),
        {"field": "text.messages[0]", "fieldNumber": "1023"},
    ),
    "user": Case(
        "invalid_parameter",
        text_with(user="u" * 257),
        {"field": "user", **bounds("at most 256 characters", maximum="256")},
    ),
    "metadata": Case(
        "invalid_parameter",
        with_metadata(**{str(number): "" for number in range(17)}),
        {"field": "metadata", **bounds("at most 16 pairs", maximum="16")},
    ),
    "key of metadata": Case(
        "invalid_parameter",
        with_metadata(**{"k" * 65: ""}),
        {
            "field": "metadata",
            **bounds("pairs whose keys have 1 to 64 characters, without NUL", minimum="1", maximum="64"),
        },
    ),
    "value of metadata": Case(
        "invalid_parameter",
        with_metadata(project="v" * 513),
        {
            "field": "metadata.project",
            **bounds("text of at most 512 characters, without NUL", maximum="512"),
        },
    ),
    "unsupported_model": Case(
        "unsupported_model", text_with(model="gpt-99"), {"field": "model", "model": "gpt-99"}
    ),
    "context_length_exceeded": Case(
        "context_length_exceeded", image("x" * 10_001), {"field": "prompt", "maxCharacters": "10000"}
    ),
    "insufficient_credits": Case(
        "insufficient_credits",
        image(width=1024, height=1024),
        {"requiredMicros": "40000", "availableMicros": "123"},
        lambda app: app.account(test=123),
    ),
    "too many tokens": Case(
        "token_limit_exceeded",
        text_with(max_tokens=2_000),
        {"quota": "tokens_per_minute", "limit": "1000", "model": "gpt-4", "requested": "2001"},
        lambda app: app.account("wide"),
    ),
}


@METHOD
@pytest.mark.parametrize("name", REFUSED_TASKS)
async def test_the_metadata_of_a_refused_task_name_all_values(
    name: str, method: str, app: RunningApp, remote: Services
) -> None:
    case = REFUSED_TASKS[name]
    account = await case.account(app)
    error, received = await refused_task(app, remote, method, case.task, account.test)
    assert details_of(error)["ErrorInfo"].reason == case.code.upper()
    assert values_of(error) == case.values
    assert (received.code, received.message) == (case.code, error.details())
    assert (received.field, received.values) == with_field(case.values)


@pytest.mark.parametrize("code", sorted(ERRORS))
async def test_the_metadata_of_every_provoked_error_are_those_of_a_remote_gateway(
    code: str, app: RunningApp, remote: Services
) -> None:
    account = await app.account()
    trigger = text_with(f"[[error:{code}]]")
    error, received = await refused_task(app, remote, "RunTask", trigger, account.test)
    assert details_of(error)["ErrorInfo"].reason == code.upper()
    values = dict(details_of(error)["ErrorInfo"].metadata)
    if code != "rate_limit_exceeded":  # it names the time
        assert with_field(values) == (received.field, received.values)
    assert ("QuotaFailure" in details_of(error)) == (TABLE[code].http == 429)


async def test_a_model_that_is_looked_up_is_not_found_and_one_that_a_task_names_is_not_supported(
    app: RunningApp, remote: Services
) -> None:
    key = (await app.account()).test
    models = ModelServiceStub(app.channel)
    for name, shown in (("gpt-99", "gpt-99"), ("x" * 500, "x" * 100 + "…")):
        error = await failure(models.GetModel(GetModelRequest(id=name), metadata=bearer(key)))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.NOT_FOUND,
            f"There is no model '{shown}'. See ListModels",
        )
        assert values_of(error) == {"model": shown}
        assert set(details_of(error)) == {"ErrorInfo"}
        received = await refusal(remote.models.get_model(name, call_of(key)))
        assert (received.code, received.values) == ("model_not_found", {"model": shown})
    for protocol in ("rest", "remote"):
        answer = await app.get(protocol, key, "/api/v1/models/gpt-99")
        assert (answer.status, answer.code, answer.message) == (
            400,
            "unsupported_model",
            "Unsupported task type: gpt-99",
        )


async def test_a_key_may_look_up_only_its_models(app: RunningApp) -> None:
    account = await app.account(models=("flux-1-pro",))
    models = ModelServiceStub(app.channel)
    error = await failure(models.GetModel(GetModelRequest(id="gpt-4"), metadata=bearer(account.test)))
    assert error.code() == grpc.StatusCode.PERMISSION_DENIED
    assert values_of(error) == {"field": "model", "model": "gpt-4"}
    for protocol in ("rest", "remote"):
        answer = await app.get(protocol, account.test, "/api/v1/models/gpt-4")
        assert (answer.status, answer.code) == (403, "model_not_allowed")


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"\xff", {"messageType": "pomelo.v1.RunTaskRequest"}),
        (b"\x0a\x03\x12\x01x" * 15_000, {"messageType": "pomelo.v1.RunTaskRequest"}),
        (b"\x0a\x00" * 60_001, {"maxFields": "60000"}),
        (b"x" * (9 * 2**20 + 1), {"maxBytes": "9437184"}),
    ],
    ids=["one byte", "many bytes", "many fields", "too many bytes"],
)
async def test_the_metadata_of_a_refused_message_name_all_values(
    data: bytes, values: dict[str, str], app: RunningApp
) -> None:
    key = (await app.account()).test
    error = await failure(app.channel.unary_unary(RUN_TASK)(data, metadata=bearer(key)))
    assert values_of(error) == values


async def test_inline_audio_that_is_too_large_has_its_limit(app: RunningApp) -> None:
    audio = base64.b64encode(b"\0" * (2**22 + 1)).decode()
    task = to_task({"model": "eleven-labs-stt", "audio": audio})
    error = await failure(start(app, "RunTask", task, (await app.account()).test))
    assert values_of(error) == {"field": "audio", "maxBytes": "4194304"}


async def test_audio_that_is_too_long_has_the_limit_of_its_model(app: RunningApp) -> None:
    task = to_task({**TASK_BODIES["sts"], "audio": base64.b64encode(bytes(301 * 8_000)).decode()})
    task.speech_to_speech.audio.content_type = "audio/basic"
    error = await failure(start(app, "RunTask", task, (await app.account()).test))
    expected = {"expected": "audio of at most 300 seconds", "maximum": "300"}
    assert values_of(error) == {"field": "audio", **expected}


async def test_a_message_of_too_many_fields_names_the_repeated_one(app: RunningApp) -> None:
    key = (await app.account()).test
    task = text_with()
    task.text.stop.extend([""] * 60_001)
    error = await failure(start(app, "RunTask", task, key))
    assert values_of(error) == {"field": "stop", "maxFields": "60000"}


async def test_the_metadata_of_refused_media_name_all_values(app: RunningApp, remote: Services) -> None:
    key = (await app.account()).test
    media = MediaServiceStub(app.channel)
    empty = iter([UploadMediaRequest(chunk=b"")])
    error = await failure(media.UploadMedia(empty, metadata=bearer(key)))
    expected = {"expected": "1 to 1,048,576 bytes", "minimum": "1", "maximum": "1048576"}
    assert values_of(error) == {"field": "chunk", **expected}
    error = await failure(media.UploadMedia(iter(()), metadata=bearer(key)))
    assert values_of(error) == {"field": "audio", "expected": "a file of at least one byte", "minimum": "1"}
    large = [UploadMediaRequest(chunk=b"x" * 2**20)] * 51
    error = await failure(media.UploadMedia(iter(large), metadata=bearer(key)))
    assert values_of(error) == {"maxBytes": str(50 * 2**20)}
    error = await failure(media.DownloadMedia(DownloadMediaRequest(id="x"), metadata=bearer(key)))
    assert values_of(error) == {}


# --- limits


def quota_of(error: grpc.aio.AioRpcError) -> tuple[str, str, str, dict[str, str], int]:
    """Returns the only violation of an error's QuotaFailure."""
    (violation,) = details_of(error)["QuotaFailure"].violations
    assert violation.description == error.details()
    return (
        violation.subject,
        violation.quota_metric,
        violation.quota_id,
        dict(violation.quota_dimensions),
        violation.quota_value,
    )


def assert_reset(error: grpc.aio.AioRpcError, values: dict[str, str]) -> None:
    """Asserts that `resetTime` is that of the message, and takes it out of `values`."""
    reset = values.pop("resetTime")
    assert (error.details() or "").endswith(f"Reset at {reset}")
    assert 0 < datetime.fromisoformat(reset).timestamp() - time.time() <= 61


@METHOD
async def test_an_exceeded_limit_of_requests_has_a_quota_failure(
    method: str, app: RunningApp, remote: Services
) -> None:
    account = await app.account("five")
    for _ in range(5):
        await TaskServiceStub(app.channel).RunTask(
            RunTaskRequest(spec=text_with()), metadata=bearer(account.test)
        )
    error, received = await refused_task(app, remote, method, text_with(), account.test)
    values = values_of(error)
    assert received.values.keys() == values.keys()
    assert_reset(error, values)
    assert values == {"quota": "requests_per_minute", "limit": "5"}
    assert quota_of(error) == ("account", "requests", "requests_per_minute", {}, 5)


async def test_an_exceeded_limit_of_tokens_has_a_quota_failure_with_the_model(
    app: RunningApp, remote: Services
) -> None:
    account = await app.account("wide")
    app.upstream.when("many tokens", Answer("word " * 900))
    task = text_with("many tokens")
    await TaskServiceStub(app.channel).RunTask(RunTaskRequest(spec=task), metadata=bearer(account.live))
    error, received = await refused_task(app, remote, "RunTask", text_with(max_tokens=100), account.live)
    values = values_of(error)
    assert received.values == values
    assert_reset(error, values)
    assert values == {"quota": "tokens_per_minute", "limit": "1000", "model": "gpt-4"}
    assert quota_of(error) == ("account", "tokens", "tokens_per_minute", {"model": "gpt-4"}, 1000)


async def test_an_exceeded_limit_of_concurrent_tasks_has_a_quota_failure(
    app: RunningApp, remote: Services
) -> None:
    account = await app.account("wide")
    gates, bodies = (Gate(), Gate()), [text_body(f"held {number}", max_tokens=5) for number in range(2)]
    for gate, body in zip(gates, bodies, strict=True):
        app.upstream.when(body["messages"][0]["content"], Answer("one two", at={1: gate}))
    running = [asyncio.create_task(app.ask("grpc", account.live, body, stream=True)) for body in bodies]
    for gate in gates:
        await gate.reached.wait()
    error, received = await refused_task(app, remote, "RunTask", text_with(max_tokens=5), account.live)
    for gate in gates:
        gate.open()
    assert [(await task).code for task in running] == ["ok", "ok"]
    assert values_of(error) == received.values == {"quota": "concurrent_requests", "limit": "2"}
    assert quota_of(error) == ("account", "concurrent_requests", "concurrent_requests", {}, 2)
