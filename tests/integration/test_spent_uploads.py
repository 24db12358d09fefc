"""Audio of a REST request is deleted with its task, whether it runs, is refused or breaks off; audio uploaded over
gRPC stays for other tasks."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.accounts.plans import Plan
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing import Gate, Speech, Transcript
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.app import PLANS, RICH, RunningApp, app_fixture, run_app
from tests.calls import bearer, upload_messages
from tests.driver import REST_PROTOCOL
from tests.unit.telemetry.reports import Reports
from tests.waiting import until

AUDIO = b"OggS" + b"audio of some length " * 20_000
STT = {"model": "eleven-labs-stt"}
STS = {"model": "eleven-labs-sts", "voice": "adam"}
PLAN = Plan("one at a time", requests=1)

REPORTS = Reports()

app = app_fixture(plans=PLANS | {PLAN.name: PLAN}, observers=[REPORTS])


@pytest.fixture(autouse=True)
def _fresh(app: RunningApp) -> None:
    app.upstream.reset()
    for path in app.media():
        path.unlink(missing_ok=True)


async def wait_until_empty(app: RunningApp) -> None:
    await until(lambda: not app.media())


def form(*parts: tuple[str, str]) -> aiohttp.FormData:
    """A form with the audio file first, and then these parts."""
    data = aiohttp.FormData()
    data.add_field("audio", AUDIO, filename="a.ogg", content_type="audio/ogg")
    for name, value in parts:
        data.add_field(name, value)
    return data


async def send(
    app: RunningApp, protocol: str, key: str, data: Any, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """Sends a request; returns the status and the code of an error, else "ok"."""
    answer = await app.post(protocol, key, data=data, headers=headers)
    return answer.status, (await answer.json()).get("error", {}).get("code", "ok")


# --- tasks that run


@REST_PROTOCOL
@pytest.mark.parametrize("live", [False, True], ids=["test key", "live key"])
@pytest.mark.parametrize("stream", ["true", "false"])
async def test_audio_of_a_form_is_deleted_with_its_task(
    app: RunningApp, protocol: str, live: bool, stream: str
) -> None:
    caller = await app.account()
    for fields in (STT, STS):
        body = form(*fields.items(), ("stream", stream))
        answer = await app.post(protocol, caller.live if live else caller.test, data=body)
        assert answer.status == 200, await answer.text()
    (output,) = app.media()
    assert output.stat().st_size != len(AUDIO)


async def test_audio_of_a_form_is_deleted_when_the_caller_disconnects(app: RunningApp) -> None:
    gate = Gate()
    app.upstream.script(Transcript(before=(gate,)))
    key = (await app.account()).live
    caller = asyncio.create_task(app.post("rest", key, data=form(*STT.items())))
    await gate.reached.wait()
    assert len(app.media()) == 1
    caller.cancel()
    async with asyncio.timeout(20):
        await app.server.draining.idle()
    assert not app.media()


async def test_audio_uploaded_over_grpc_can_be_used_by_the_next_task(app: RunningApp) -> None:
    metadata = bearer((await app.account()).live)
    messages = upload_messages(AUDIO, "audio/ogg")
    uploaded = await MediaServiceStub(app.channel).UploadMedia(iter(messages), metadata=metadata)
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = uploaded.media.id
    for _ in range(2):
        await TaskServiceStub(app.channel).RunTask(RunTaskRequest(spec=task), metadata=metadata)
    assert len(app.media()) == 1


async def test_the_output_of_a_task_is_not_deleted(app: RunningApp) -> None:
    app.upstream.script(Speech(size=100_000))
    answer = await app.post("rest", (await app.account()).live, data=form(*STS.items()))
    async with app.session.get((await answer.json())["audio"]["url"]) as media:
        assert media.status == 200
        assert len(await media.read()) >= 100_000


@REST_PROTOCOL
async def test_a_file_that_a_model_ignores_is_deleted(protocol: str, app: RunningApp) -> None:
    caller = await app.account()
    fields = {"model": "eleven-labs-tts", "text": "Hello", "voice": "adam", "response_format": "b64_json"}
    headers = {"X-Request-Timeout": "20"}
    assert await send(app, protocol, caller.live, form(*fields.items()), headers) == (200, "ok")
    await wait_until_empty(app)


@REST_PROTOCOL
@pytest.mark.parametrize("live", [0, RICH], ids=["no credits", "credits"])
async def test_stored_base64_is_deleted(protocol: str, live: int, app: RunningApp) -> None:
    caller = await app.account(live=live)
    audio = b"OggS" + bytes(5 * 1024 * 1024)  # more than may be inline
    body = json.dumps({**STT, "audio": base64.b64encode(audio).decode()})
    headers = {"Content-Type": "application/json"}
    expected = (200, "ok") if live else (402, "insufficient_credits")
    assert await send(app, protocol, caller.live, body, headers) == expected
    assert not app.media()


# --- refused requests


BY_THE_SERVER: dict[str, tuple[list[tuple[str, str]], dict[str, Any], int, str]] = {
    "a field is missing": ([("model", "eleven-labs-sts")], {}, 400, "missing_parameter"),
    "a field is wrong": ([*STS.items(), ("output_format", "mp3")], {}, 400, "invalid_parameter"),
    "the model is not allowed": ([*STT.items()], {"models": ("gpt-4",)}, 403, "model_not_allowed"),
    "the minute's requests are used up": ([*STT.items()], {"plan": PLAN.name}, 429, "rate_limit_exceeded"),
    "there are no credits": ([*STT.items()], {"live": 0}, 402, "insufficient_credits"),
    "the provider refuses": ([*STT.items()], {}, 502, "provider_failed"),
}
BY_THE_GATEWAY: dict[str, tuple[list[tuple[str, str]], int, str]] = {
    "an unknown field": ([*STT.items(), ("nonsense", "1")], 400, "invalid_parameter"),
    "a wrong value": ([*STT.items(), ("timestamps", "sometimes")], 400, "invalid_parameter"),
    "a field of a wrong type": ([*STT.items(), ("num_speakers", "two")], 400, "invalid_parameter"),
    "a field twice": ([*STT.items(), ("model", "gpt-4")], 400, "invalid_parameter"),
    "no model": ([], 400, "missing_parameter"),
    "an unknown model": ([("model", "gpt-0")], 400, "unsupported_model"),
}


@REST_PROTOCOL
@pytest.mark.parametrize("reason", BY_THE_SERVER)
async def test_a_request_that_the_server_refuses_leaves_no_upload(
    protocol: str, reason: str, app: RunningApp
) -> None:
    parts, options, status, code = BY_THE_SERVER[reason]
    caller = await app.account(**options)
    if code == "rate_limit_exceeded":
        assert await send(app, protocol, caller.live, form(*STT.items())) == (200, "ok")
    if code == "provider_failed":
        app.upstream.script(error_reply(400))
    assert await send(app, protocol, caller.live, form(*parts)) == (status, code)
    await wait_until_empty(app)


@REST_PROTOCOL
async def test_a_request_refused_for_its_idempotency_key_leaves_no_upload(
    protocol: str, app: RunningApp
) -> None:
    caller = await app.account()
    headers = {"Idempotency-Key": "once"}
    for parts, outcome in (
        ([*STT.items()], (200, "ok")),
        ([*STT.items(), ("language_code", "de")], (422, "idempotency_mismatch")),
        ([*STT.items()], (200, "ok")),
    ):
        assert await send(app, protocol, caller.live, form(*parts), headers) == outcome
        assert not app.media()


@REST_PROTOCOL
@pytest.mark.parametrize("reason", BY_THE_GATEWAY)
async def test_a_request_that_the_gateway_refuses_leaves_no_upload(
    protocol: str, reason: str, app: RunningApp
) -> None:
    parts, status, code = BY_THE_GATEWAY[reason]
    caller = await app.account()
    headers = {"X-Request-Timeout": "20"}
    REPORTS.tasks.clear()
    assert await send(app, protocol, caller.live, form(*parts), headers) == (status, code)
    await wait_until_empty(app)
    assert not REPORTS.tasks, "what deletes the upload is no task"


# --- requests that break off


def raw(key: str, *parts: bytes) -> bytes:
    """A request whose body is longer than what is sent of it."""
    return (
        b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + key.encode() + b"\r\n"
        b"Content-Type: multipart/form-data; boundary=XXX\r\nContent-Length: 900000\r\nX-Request-Timeout: 20\r\n\r\n"
        + b"".join(parts)
    )


AUDIO_PART = (
    b'--XXX\r\nContent-Disposition: form-data; name="audio"; filename="a.ogg"\r\n'
    b"Content-Type: audio/ogg\r\n\r\n" + AUDIO
)
MODEL_PART = b'\r\n--XXX\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt'


async def connect(app: RunningApp, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = app.urls[protocol].removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def wait_for_file(app: RunningApp, prefix: str) -> None:
    await until(lambda: any(path.name.startswith(prefix) for path in app.media()))


@REST_PROTOCOL
@pytest.mark.parametrize("after_file", [False, True], ids=["within the file", "after the file"])
async def test_a_disconnected_caller_leaves_no_upload(
    protocol: str, after_file: bool, app: RunningApp
) -> None:
    caller = await app.account()
    _, writer = await connect(app, protocol)
    writer.write(raw(caller.live, AUDIO_PART if not after_file else AUDIO_PART + MODEL_PART))
    await writer.drain()
    await wait_for_file(app, "media_" if after_file else ".part_")
    writer.transport.abort()
    await wait_until_empty(app)


async def test_an_upload_during_shutdown_is_deleted(tmp_path: Path) -> None:
    async with run_app(tmp_path) as app:
        caller = await app.account()
        reader, writer = await connect(app, "rest")
        end = MODEL_PART + b"\r\n--XXX--\r\n"
        writer.write(
            raw(caller.live, AUDIO_PART, end).replace(b"900000", b"%d" % (len(AUDIO_PART) + len(end) + 1))
        )
        await wait_for_file(app, "media_")
        app.server.draining.drain()
        writer.write(b"\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 20)
        assert b" 503 " in head
        assert not app.media()
        writer.close()
