"""Uploads of a refused request are deleted, whatever refuses it and wherever the gateway runs."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.accounts.plans import Plan
from pomelo.testing.elevenlabs_wire import error_reply
from tests.app import PLANS, RICH, RunningApp, run_app

SOUND = b"OggS" + b"a sound of some length " * 20_000
GATEWAYS = pytest.mark.parametrize("way", ["rest", "remote"])
STT = {"model": "eleven-labs-stt"}
STS = {"model": "eleven-labs-sts", "voice": "adam"}
PLAN = Plan("one at a time", requests=1)


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("refused")
    plans = PLANS | {PLAN.name: PLAN}
    async with run_app(folder, plans=plans) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _fresh(house: RunningApp) -> None:
    house.upstream.reset()
    for name in media_of(house):
        (house.server.settings.data / "media" / name).unlink(missing_ok=True)


def media_of(house: RunningApp) -> list[str]:
    """The names of all files in the media folder."""
    return sorted(path.name for path in (house.server.settings.data / "media").iterdir())


async def emptied(house: RunningApp) -> None:
    """Returns once no file is left."""
    await until(lambda: not media_of(house))


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (a folder has no event)
            await asyncio.sleep(0.01)


def form(*parts: tuple[str, Any]) -> aiohttp.FormData:
    """A form with the audio file first, and then these parts."""
    made = aiohttp.FormData()
    made.add_field("audio", SOUND, filename="a.ogg", content_type="audio/ogg")
    for name, value in parts:
        made.add_field(name, value)
    return made


async def send(
    house: RunningApp, way: str, key: str, data: Any, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """The status and the error's code."""
    given = {"Authorization": f"Bearer {key}", **(headers or {})}
    async with house.session.post(f"{house.urls[way]}/api/v1/task", data=data, headers=given) as answer:
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


@GATEWAYS
@pytest.mark.parametrize("why", BY_THE_SERVER)
async def test_what_the_server_refuses_leaves_no_upload(way: str, why: str, house: RunningApp) -> None:
    parts, how, status, code = BY_THE_SERVER[why]
    caller = await house.account(
        how.get("plan", "unlimited"), live=how.get("live", RICH), models=how.get("models", ())
    )
    if code == "rate_limit_exceeded":
        assert await send(house, way, caller.live, form(*STT.items())) == (200, "ok")
    if code == "provider_failed":
        house.upstream.script(error_reply(400))
    assert await send(house, way, caller.live, form(*parts)) == (status, code)
    await emptied(house)


@GATEWAYS
async def test_what_an_idempotency_key_refuses_leaves_no_upload(way: str, house: RunningApp) -> None:
    caller = await house.account()
    headers = {"Idempotency-Key": "once"}
    for parts, outcome in (
        ([*STT.items()], (200, "ok")),
        ([*STT.items(), ("language_code", "de")], (422, "idempotency_mismatch")),
        ([*STT.items()], (200, "ok")),
    ):
        assert await send(house, way, caller.live, form(*parts), headers) == outcome
        assert media_of(house) == []


@GATEWAYS
@pytest.mark.parametrize("why", BY_THE_GATEWAY)
async def test_what_the_gateway_refuses_leaves_no_upload(way: str, why: str, house: RunningApp) -> None:
    parts, status, code = BY_THE_GATEWAY[why]
    caller = await house.account()
    headers = {"X-Request-Timeout": "20"}
    assert await send(house, way, caller.live, form(*parts), headers) == (status, code)
    await emptied(house)


@GATEWAYS
async def test_a_file_that_a_model_has_no_use_for_does_not_stay(way: str, house: RunningApp) -> None:
    caller = await house.account()
    parts = [
        ("model", "eleven-labs-tts"),
        ("text", "Hello"),
        ("voice", "adam"),
        ("response_format", "b64_json"),
    ]
    headers = {"X-Request-Timeout": "20"}
    assert await send(house, way, caller.live, form(*parts), headers) == (200, "ok")
    await emptied(house)


@GATEWAYS
@pytest.mark.parametrize("live", [0, RICH], ids=["no credits", "credits"])
async def test_base64_that_was_stored_does_not_stay(way: str, live: int, house: RunningApp) -> None:
    caller = await house.account(live=live)
    sound = b"OggS" + bytes(5 * 1024 * 1024)  # more than may be inline
    body = json.dumps({**STT, "audio": base64.b64encode(sound).decode()})
    headers = {"Content-Type": "application/json"}
    expected = (200, "ok") if live else (402, "insufficient_credits")
    assert await send(house, way, caller.live, body, headers) == expected
    assert media_of(house) == []


# --- requests that break off


def raw(key: str, *parts: bytes) -> bytes:
    """A request whose body is longer than what is sent of it."""
    return (
        b"POST /api/v1/task HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + key.encode() + b"\r\n"
        b"Content-Type: multipart/form-data; boundary=XXX\r\nContent-Length: 900000\r\nX-Request-Timeout: 20\r\n\r\n"
        + b"".join(parts)
    )


AUDIO = (
    b'--XXX\r\nContent-Disposition: form-data; name="audio"; filename="a.ogg"\r\n'
    b"Content-Type: audio/ogg\r\n\r\n" + SOUND
)
MODEL = b'\r\n--XXX\r\nContent-Disposition: form-data; name="model"\r\n\r\neleven-labs-stt'


async def connect(house: RunningApp, way: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the gateway."""
    host, port = house.urls[way].removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


@GATEWAYS
@pytest.mark.parametrize("whole", [False, True], ids=["within the file", "behind the file"])
async def test_a_caller_who_leaves_leaves_no_upload(way: str, whole: bool, house: RunningApp) -> None:
    caller = await house.account()
    _, writer = await connect(house, way)
    writer.write(raw(caller.live, AUDIO if not whole else AUDIO + MODEL))
    await writer.drain()

    def arrived() -> bool:
        return any(name.startswith("media_" if whole else ".part_") for name in media_of(house))

    await until(arrived)
    writer.transport.abort()
    await emptied(house)


async def test_a_server_that_shuts_down_during_an_upload_does_not_keep_it(tmp_path: Path) -> None:
    async with run_app(tmp_path) as house:
        caller = await house.account()
        reader, writer = await connect(house, "rest")
        end = MODEL + b"\r\n--XXX--\r\n"
        writer.write(raw(caller.live, AUDIO, end).replace(b"900000", b"%d" % (len(AUDIO) + len(end) + 1)))
        await until(lambda: any(name.startswith("media_") for name in media_of(house)))
        house.server.draining.drain()
        writer.write(b"\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
        assert b" 503 " in head
        assert media_of(house) == []
        writer.close()
