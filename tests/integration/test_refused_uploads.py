"""Uploads of a refused request are deleted, in a gateway of the same process and in a remote one."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.accounts.plans import Plan
from pomelo.testing.elevenlabs_protocol import error_reply
from tests.app import PLANS, RICH, RunningApp, app_fixture, run_app
from tests.driver import REST_PROTOCOL

AUDIO_DATA = b"OggS" + b"audio of some length " * 20_000
STT = {"model": "eleven-labs-stt"}
STS = {"model": "eleven-labs-sts", "voice": "adam"}
PLAN = Plan("one at a time", requests=1)

app = app_fixture(plans=PLANS | {PLAN.name: PLAN})


@pytest.fixture(autouse=True)
def _fresh(app: RunningApp) -> None:
    app.upstream.reset()
    for name in media_of(app):
        (app.server.settings.data / "media" / name).unlink(missing_ok=True)


def media_of(app: RunningApp) -> list[str]:
    """The names of all files in the media folder."""
    return sorted(path.name for path in (app.server.settings.data / "media").iterdir())


async def wait_until_empty(app: RunningApp) -> None:
    """Waits until no file is left."""
    await wait_until(lambda: not media_of(app))


async def wait_until(condition: Callable[[], bool]) -> None:
    """Waits until the condition holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (a folder has no event)
            await asyncio.sleep(0.01)


def form(*parts: tuple[str, Any]) -> aiohttp.FormData:
    """A form with the audio file first, and then these parts."""
    data = aiohttp.FormData()
    data.add_field("audio", AUDIO_DATA, filename="a.ogg", content_type="audio/ogg")
    for name, value in parts:
        data.add_field(name, value)
    return data


async def send(
    app: RunningApp, protocol: str, key: str, data: Any, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """Sends a request; returns the status and the code of an error, else "ok"."""
    all_headers = {"Authorization": f"Bearer {key}", **(headers or {})}
    async with app.session.post(
        f"{app.urls[protocol]}/api/v1/task", data=data, headers=all_headers
    ) as answer:
        body = await answer.json()
        return answer.status, body.get("error", {}).get("code", "ok")


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
    caller = await app.account(
        options.get("plan", "unlimited"), live=options.get("live", RICH), models=options.get("models", ())
    )
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
        assert media_of(app) == []


@REST_PROTOCOL
@pytest.mark.parametrize("reason", BY_THE_GATEWAY)
async def test_a_request_that_the_gateway_refuses_leaves_no_upload(
    protocol: str, reason: str, app: RunningApp
) -> None:
    parts, status, code = BY_THE_GATEWAY[reason]
    caller = await app.account()
    headers = {"X-Request-Timeout": "20"}
    assert await send(app, protocol, caller.live, form(*parts), headers) == (status, code)
    await wait_until_empty(app)


@REST_PROTOCOL
async def test_a_file_that_a_model_ignores_is_deleted(protocol: str, app: RunningApp) -> None:
    caller = await app.account()
    parts = [
        ("model", "eleven-labs-tts"),
        ("text", "Hello"),
        ("voice", "adam"),
        ("response_format", "b64_json"),
    ]
    headers = {"X-Request-Timeout": "20"}
    assert await send(app, protocol, caller.live, form(*parts), headers) == (200, "ok")
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
    assert media_of(app) == []


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
    b"Content-Type: audio/ogg\r\n\r\n" + AUDIO_DATA
)
MODEL_PART = b'\r\n--XXX\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt'


async def connect(app: RunningApp, protocol: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the gateway."""
    host, port = app.urls[protocol].removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


@REST_PROTOCOL
@pytest.mark.parametrize("after_file", [False, True], ids=["within the file", "after the file"])
async def test_a_disconnected_caller_leaves_no_upload(
    protocol: str, after_file: bool, app: RunningApp
) -> None:
    caller = await app.account()
    _, writer = await connect(app, protocol)
    writer.write(raw(caller.live, AUDIO_PART if not after_file else AUDIO_PART + MODEL_PART))
    await writer.drain()

    def arrived() -> bool:
        return any(name.startswith("media_" if after_file else ".part_") for name in media_of(app))

    await wait_until(arrived)
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
        await wait_until(lambda: any(name.startswith("media_") for name in media_of(app)))
        app.server.draining.drain()
        writer.write(b"\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
        assert b" 503 " in head
        assert media_of(app) == []
        writer.close()
