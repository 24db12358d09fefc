"""Conversations over gRPC: an answer in the next request, images by their bytes or their file, and labels."""

from __future__ import annotations

import base64
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import ROLE_ASSISTANT, ROLE_USER
from pomelo.stores.usage import decode_metadata
from pomelo.testing import Answer
from pomelo.testing.images import make_image
from tests.app import Account, RunningApp, app_fixture
from tests.calls import as_dict, bearer, details_of, end, failure, reason_of, upload_messages
from tests.driver import METHOD
from tests.tasks import TASK_TYPES, small_task, text_task

PNG = make_image("png")
PNG_URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
MIB = 1024 * 1024

app = app_fixture()


@pytest.fixture
async def account(app: RunningApp) -> Account:
    app.upstream.reset()
    return await app.account()


def start(app: RunningApp, method: str, key: str, spec: TaskSpec, **headers: str) -> Any:
    """Starts a call of either method."""
    request = (RunTaskRequest if method == "RunTask" else StreamTaskRequest)(spec=spec)
    return getattr(TaskServiceStub(app.channel), method)(request, metadata=bearer(key, **headers))


async def run(app: RunningApp, key: str, spec: TaskSpec, **headers: str) -> TaskResult:
    """Runs a task to its end."""
    result = (await start(app, "RunTask", key, spec, **headers)).result
    assert isinstance(result, TaskResult)
    return result


async def upload(app: RunningApp, key: str, data: bytes, content_type: str = "") -> str:
    """Uploads a file; returns its id."""
    messages = iter(upload_messages(data, content_type or None))
    uploaded = await MediaServiceStub(app.channel).UploadMedia(messages, metadata=bearer(key))
    return str(uploaded.media.id)


def question(*images: MediaSource) -> TaskSpec:
    """Returns a text task with images."""
    spec = text_task("What is it?")
    for image in images:
        spec.text.messages[0].content.add().image.source.CopyFrom(image)
    return spec


# --- an answer in the next request


async def test_the_message_of_an_answer_can_be_appended_to_the_next_request(
    app: RunningApp, account: Account
) -> None:
    app.upstream.when("Where is it?", Answer("It is in the garden."))
    spec = text_task("Where is it?")
    result = await run(app, account.live, spec)
    assert result.text.message.role == ROLE_ASSISTANT
    spec.text.messages.append(result.text.message)
    spec.text.messages.add(role=ROLE_USER).content.add(text="And now?")
    for method in ("RunTask", "StreamTask"):
        await end(start(app, method, account.live, spec))
        assert app.upstream.requests[-1].body["messages"] == [
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "It is in the garden."},
            {"role": "user", "content": "And now?"},
        ]


async def test_an_answer_of_the_sandbox_can_be_appended(app: RunningApp, account: Account) -> None:
    spec = text_task("Hello")
    spec.text.messages.append((await run(app, account.test, spec)).text.message)
    spec.text.messages.add(role=ROLE_USER).content.add(text="Once more")
    result = await run(app, account.test, spec)
    assert '"Once more"' in result.text.message.content[0].text
    assert result.usage.input_tokens > 3


# --- images


@METHOD
@pytest.mark.parametrize("form", ["bytes", "a wrong type", "file", "a file of no type", "URI"])
async def test_an_image_reaches_the_vendor_in_one_form(
    app: RunningApp, account: Account, form: str, method: str
) -> None:
    match form:
        case "bytes":
            source = MediaSource(data=PNG)
        case "a wrong type":
            source = MediaSource(data=PNG, content_type="image/webp")
        case "file":
            source = MediaSource(media_id=await upload(app, account.live, PNG, "image/png"))
        case "a file of no type":
            source = MediaSource(media_id=await upload(app, account.live, PNG))
        case _:
            source = MediaSource(url=PNG_URI)
    await end(start(app, method, account.live, question(source)))
    assert app.upstream.requests[-1].body["messages"][0]["content"] == [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": PNG_URI}},
    ]


async def test_an_image_is_the_same_request_in_every_form(app: RunningApp, account: Account) -> None:
    media_id = await upload(app, account.test, PNG)
    forms = (
        MediaSource(data=PNG),
        MediaSource(data=PNG, content_type="image/webp"),
        MediaSource(media_id=media_id),
        MediaSource(url=PNG_URI),
    )
    results = [await run(app, account.test, question(form), idempotency_key="an-image") for form in forms]
    assert len({result.id for result in results}) == 1
    assert len(await app.records(account)) == 1


async def test_an_image_counts_the_same_in_every_form(app: RunningApp, account: Account) -> None:
    media_id = await upload(app, account.test, PNG)
    forms = (MediaSource(data=PNG), MediaSource(media_id=media_id), MediaSource(url=PNG_URI))
    usages = [(await run(app, account.test, question(form))).usage for form in forms]
    assert usages[0] == usages[1] == usages[2]


@METHOD
async def test_bytes_that_are_no_image_and_files_of_others_are_refused(
    app: RunningApp, account: Account, method: str
) -> None:
    other = await app.account()
    error = await failure(start(app, method, account.live, question(MediaSource())))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "missing_parameter")
    assert "messages[0].content[1].image_url" in (error.details() or "")
    for source in (
        MediaSource(data=b"%PDF-1.7"),
        MediaSource(data=b""),
        MediaSource(media_id=await upload(app, account.live, b"%PDF-1.7")),
        MediaSource(media_id=await upload(app, other.live, PNG)),
        MediaSource(media_id=await upload(app, account.test, PNG)),
        MediaSource(media_id="media_none"),
        MediaSource(url="https://example.com/a.png"),
    ):
        error = await failure(start(app, method, account.live, question(source)))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid_parameter")
        assert "messages[0].content[1].image_url" in (error.details() or "")
    assert (app.upstream.requests, await app.records(account)) == ([], [])


@METHOD
async def test_the_files_of_a_task_s_images_have_a_maximum_size(
    app: RunningApp, account: Account, method: str
) -> None:
    large = MediaSource(media_id=await upload(app, account.test, PNG + bytes(4 * MIB - len(PNG))))
    small = MediaSource(media_id=await upload(app, account.test, PNG))
    await end(start(app, method, account.test, question(large, large)))
    error = await failure(start(app, method, account.test, question(large, large, small)))
    assert reason_of(error) == "payload_too_large"
    assert "8,388,608 bytes" in (error.details() or "")
    assert details_of(error)["ErrorInfo"].metadata["maxBytes"] == "8388608"


# --- labels


@METHOD
@pytest.mark.parametrize("live", [False, True], ids=["test", "live"])
@pytest.mark.parametrize("task_type", TASK_TYPES)
async def test_user_and_metadata_of_every_task_type_are_in_its_record(
    app: RunningApp, account: Account, task_type: str, live: bool, method: str
) -> None:
    spec = small_task(task_type)
    spec.user = "user é 7"
    spec.metadata.update({"project": "kites", "a": "", "é": "🍊"})
    await end(start(app, method, account.live if live else account.test, spec))
    (record,) = await app.records(account)
    assert (record.user, decode_metadata(record.metadata)) == ("user é 7", dict(spec.metadata))


async def test_a_record_without_labels_has_none(app: RunningApp, account: Account) -> None:
    await run(app, account.test, text_task())
    (record,) = await app.records(account)
    assert (record.user, record.metadata) == ("", "")


async def test_only_text_providers_get_the_user_and_none_gets_the_metadata(
    app: RunningApp, account: Account
) -> None:
    for spec in (text_task(), small_task("image"), small_task("text_to_speech")):
        spec.user, spec.metadata["project"] = "user-7", "kites"
        await end(start(app, "RunTask", account.live, spec))
    text, *others = [str(request.body) for request in app.upstream.requests if request.method == "POST"]
    assert len(others) >= 2
    assert "user" in text
    assert all("user-7" not in other for other in others)
    assert all("kites" not in body for body in (text, *others))


@METHOD
async def test_labels_that_are_too_long_are_refused(app: RunningApp, account: Account, method: str) -> None:
    specs = []
    for key, value in (("k" * 65, ""), ("", "v"), ("k", "v" * 513), ("k\0", "v"), ("k", "v\0")):
        specs.append(small_task("image"))
        specs[-1].metadata[key] = value
    specs.append(small_task("image"))
    specs[-1].metadata.update({str(number): "" for number in range(17)})
    specs.append(small_task("image"))
    specs[-1].user = "u" * 257
    for spec in specs:
        error = await failure(start(app, method, account.test, spec))
        assert reason_of(error) == "invalid_parameter"
        assert ("user" if spec.user else "metadata") in (error.details() or "")
    assert await app.records(account) == []


async def test_the_longest_labels_are_accepted(app: RunningApp, account: Account) -> None:
    spec = small_task("image")
    spec.user = "é" * 256
    spec.metadata.update({f"{number:02}" + "é" * 62: "🍊" * 512 for number in range(16)})
    await run(app, account.test, spec)
    (record,) = await app.records(account)
    assert (record.user, decode_metadata(record.metadata)) == (spec.user, dict(spec.metadata))


@pytest.mark.parametrize("label", ["user", "metadata"])
async def test_a_request_with_other_labels_is_not_the_same(
    app: RunningApp, account: Account, label: str
) -> None:
    first = await run(app, account.test, text_task(), idempotency_key="one")
    spec = text_task()
    if label == "user":
        spec.user = "other"
    else:
        spec.metadata["project"] = "other"
    error = await failure(start(app, "RunTask", account.test, spec, idempotency_key="one"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "idempotency_mismatch")
    call = start(app, "RunTask", account.test, text_task(), idempotency_key="one")
    again = (await call).result
    assert (again.id, again.text, again.usage) == (first.id, first.text, first.usage)
    assert again.cost_micros == first.cost_micros > 0
    assert as_dict(await call.trailing_metadata())["x-credits-charged"] == "0"
