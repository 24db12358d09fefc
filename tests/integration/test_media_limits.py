"""Uploads and answers above the storage limits, per account and in total, on every protocol."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.testing import Speech
from tests.app import Account, RunningApp, app_fixture, run_app
from tests.calls import bearer, reason_of, upload_messages
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM
from tests.tasks import TASK_BODIES

KIB, MIB = 1024, 1024 * 1024
SPEECH = {"model": "eleven-labs-tts", "text": "Hi.", "voice": "adam"}
URL, B64 = {"response_format": "url"}, {"response_format": "b64_json"}
IMAGE = {**TASK_BODIES["image"], "model": "flux-1-schnell"}

app = app_fixture(settings={"media_account_limit": 2 * MIB, "media_limit": 200 * MIB, "disk_reserve": 0})


async def upload(app: RunningApp, key: str, size: int) -> str:
    """Uploads `size` bytes over gRPC; returns the status and reason of an error, else an empty string."""
    messages = upload_messages(b"x" * size, "audio/mpeg")
    try:
        await MediaServiceStub(app.channel).UploadMedia(iter(messages), metadata=bearer(key))
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name} {reason_of(error)}"
    return ""


async def assert_idle(app: RunningApp, caller: Account) -> None:
    """Asserts that the account has no reservation and no running task."""
    for live in (False, True):
        assert (await app.balance(caller, live=live)).held == 0
        assert await app.concurrency(caller, live=live) == 0


async def test_uploads_are_refused_at_the_limit_of_an_account_and_mode(app: RunningApp) -> None:
    caller, other = await app.account(), await app.account()
    for _ in range(4):
        assert await upload(app, caller.live, 512 * KIB) == ""
    before = app.media()
    assert await upload(app, caller.live, 1) == "RESOURCE_EXHAUSTED payload_too_large"
    form = {"model": "eleven-labs-stt", "audio": base64.b64encode(b"x" * 300 * KIB).decode()}
    for protocol in ("rest", "remote"):
        response = await app.ask(protocol, caller.live, form, form=True)
        assert (response.status, response.code) == (413, "payload_too_large")
        assert "2,097,152 bytes" in response.message
    assert app.media() == before
    assert await upload(app, caller.test, 2 * MIB) == ""
    assert await upload(app, other.live, 2 * MIB) == ""


@PROTOCOL
@pytest.mark.parametrize("body", [SPEECH, IMAGE], ids=["speech", "image"])
async def test_a_link_without_space_is_refused_without_a_request_to_the_provider(
    protocol: str, body: dict[str, Any], app: RunningApp
) -> None:
    caller = await app.account("five")
    assert await upload(app, caller.live, 2 * MIB) == ""
    app.upstream.reset()
    before = app.media()
    for stream in (False, True):
        for headers in ({}, {"Idempotency-Key": "once"}):
            body_with_format = {**body, **(B64 if headers else URL)}
            response = await app.ask(protocol, caller.live, body_with_format, stream=stream, headers=headers)
            assert response.code == "payload_too_large"
            assert response.metadata["x-ratelimit-remaining"] == "5"
            assert response.metadata.get("x-credits-charged", "0") == "0"
            if protocol != "grpc":
                assert response.status == 413
    assert app.upstream.requests == []
    assert await app.records(caller) == []
    await assert_idle(app, caller)
    assert app.media() == before


@PROTOCOL
@pytest.mark.parametrize("body", [SPEECH, IMAGE], ids=["speech", "image"])
async def test_an_answer_that_need_not_be_stored_is_returned_inline(
    protocol: str, body: dict[str, Any], app: RunningApp
) -> None:
    caller, rich = await app.account(), await app.account()
    assert await upload(app, caller.live, 2 * MIB) == ""
    before = app.media()
    for body_with_format in (body, {**body, **B64}):
        response = await app.ask(protocol, caller.live, body_with_format)
        assert (response.code, response.links) == ("ok", ())
        assert response.content
    if body is SPEECH:
        response = await app.ask(protocol, caller.live, body, stream=True)
        assert response.done
        assert (response.code, response.links) == ("ok", ())
        assert response.content == (await app.ask(protocol, rich.live, body, stream=True)).content
        assert len(app.media() - before) == 1  # the other account's
    else:
        assert app.media() == before
    assert len(await app.records(caller, live=True)) == (3 if body is SPEECH else 2)
    assert all(record.cost > 0 for record in await app.records(caller))
    await assert_idle(app, caller)


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("body_with_format", [URL, {}], ids=["url", "no format"])
async def test_audio_that_exceeds_the_storage_limit_is_still_delivered(
    protocol: str, stream: bool, body_with_format: dict[str, str], app: RunningApp
) -> None:
    caller = await app.account()
    assert await upload(app, caller.live, 2 * MIB - 600 * KIB) == ""
    before = app.media()
    responses = {}
    for name, response_format in (("link", body_with_format), ("inline", B64)):
        app.upstream.reset()
        app.upstream.script(Speech(size=MIB))
        responses[name] = await app.ask(protocol, caller.live, {**SPEECH, **response_format}, stream=stream)
    assert (responses["link"].code, responses["link"].links) == ("ok", ())
    assert responses["link"].content == responses["inline"].content
    assert responses["link"].content.startswith(str(MIB)[:4])
    assert len(await app.records(caller, live=True)) == 2
    assert app.media() == before
    await assert_idle(app, caller)


@PROTOCOL
async def test_audio_that_can_neither_be_stored_nor_returned_inline_costs_nothing(
    protocol: str, app: RunningApp
) -> None:
    caller = await app.account()
    assert await upload(app, caller.live, MIB) == ""
    before = app.media()
    for body_with_format, code in ((URL, "payload_too_large"), ({}, "payload_too_large"), (B64, "ok")):
        app.upstream.reset()
        app.upstream.script(Speech(size=4 * MIB))
        response = await app.ask(protocol, caller.live, {**SPEECH, **body_with_format})
        assert response.code == code, body_with_format
    assert [record.cost > 0 for record in await app.records(caller)] == [True]
    assert app.media() == before
    await assert_idle(app, caller)


@PROTOCOL
async def test_an_answer_for_an_idempotency_key_that_exceeds_the_storage_limit_costs_nothing(
    protocol: str, app: RunningApp
) -> None:
    caller = await app.account()
    assert await upload(app, caller.live, MIB) == ""
    headers = {"Idempotency-Key": "once"}
    for size, code in ((2 * MIB, "payload_too_large"), (100 * KIB, "ok"), (100 * KIB, "ok")):
        app.upstream.reset()
        app.upstream.script(Speech(size=size))
        response = await app.ask(protocol, caller.live, SPEECH, headers=headers)
        assert response.code == code
    assert len(await app.records(caller)) == 1
    await assert_idle(app, caller)


async def test_answers_count_toward_the_limit_of_their_account_and_mode(app: RunningApp) -> None:
    caller = await app.account()
    assert await upload(app, caller.test, 2 * MIB - 64 * KIB) == ""
    app.upstream.reset()
    before = app.media()
    links = 0
    while (response := await app.ask("grpc", caller.test, {**TASK_BODIES["image"], **URL})).links:
        links += 1
    assert response.code == "payload_too_large"
    stored = [path.stat().st_size for path in app.media() - before]
    assert len(stored) == links > 0
    assert 64 * KIB - 4 * 96 * 64 < sum(-(-size // 4096) * 4096 for size in stored) <= 64 * KIB
    assert (await app.ask("grpc", caller.live, {**IMAGE, **URL})).links


@PROTOCOL
async def test_without_space_for_media_tasks_that_store_nothing_run(protocol: str, tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    full = disk.f_bavail * disk.f_frsize + 2**40
    for limits in ({"media_limit": 1, "disk_reserve": 0}, {"disk_reserve": full}):
        async with run_app(tmp_path / f"{len(limits)}", settings=limits) as app:
            caller = await app.account()
            assert await upload(app, caller.live, 100 * KIB) == "UNAVAILABLE store_unavailable"
            form = {"model": "eleven-labs-stt", "audio": base64.b64encode(b"x" * 100 * KIB).decode()}
            if protocol != "grpc":
                response = await app.ask(protocol, caller.live, form, form=True)
                assert (response.status, response.code) == (503, "store_unavailable")
                assert int(response.headers["retry-after"]) > 0
            for body in (SPEECH, IMAGE):
                response = await app.ask(protocol, caller.live, {**body, **URL})
                assert response.code == "store_unavailable"
                assert response.metadata.get("retry-after") or protocol == "grpc"
            for body in (*TASK_BODIES.values(), {**SPEECH, **B64}):
                response = await app.ask(protocol, caller.live, body)
                assert (response.code, response.links) == ("ok", ())
                assert response.content
            assert len(await app.records(caller, live=True)) == len(TASK_BODIES) + 1
            assert app.media() == set()
            await assert_idle(app, caller)
