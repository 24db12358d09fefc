"""What comes in a request body: images and audio in any spelling, fields of other task types, audio of any size."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.app import open_app, open_gateway
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream
from pomelo.testing.pictures import picture
from tests.app import Account, RunningApp, endow, run_app
from tests.calls import bearer, failure, reason_of
from tests.driver import PROTOCOLS
from tests.tasks import TASK_BODIES, text_body

REST_WAYS = ("rest", "remote")
PNG = picture("png")
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9"
MP3 = (bytes.fromhex("fffb9064") + bytes(413)) * 60


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def lines(data: bytes, end: str = "\r\n") -> str:
    return base64.encodebytes(data).decode().replace("\n", end)


IMAGES: dict[str, tuple[str, str]] = {
    "as it should be": ("data:image/png;base64," + b64(PNG), "image/png"),
    "lines": ("data:image/png;base64," + lines(PNG), "image/png"),
    "blanks before": (" \n data: image/png ; base64, " + b64(PNG), "image/png"),
    "capitals": ("DATA:Image/PNG;BASE64," + b64(PNG), "image/png"),
    "parameters": ("data:image/png;name=a,b.png;charset=utf-8;base64," + b64(PNG), "image/png"),
    "a parameter after base64": ("data:image/png;base64;charset=utf-8," + b64(PNG), "image/png"),
    "no padding": ("data:image/png;base64," + b64(PNG + b"x" * (1 - len(PNG) % 3)).rstrip("="), "image/png"),
    "url-safe": ("data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode(), "image/png"),
    "percent-encoded": (
        "data:image/png;base64," + b64(PNG).replace("+", "%2B").replace("/", "%2F").replace("=", "%3d"),
        "image/png",
    ),
    "no media type": ("data:;base64," + b64(PNG), "image/png"),
    "a png labelled jpeg": ("data:image/jpeg;base64," + b64(PNG), "image/png"),
    "image/jpg": ("data:image/jpg;base64," + b64(JPEG), "image/jpeg"),
    "a gif labelled text": ("data:text/plain;base64," + b64(b"GIF89a" + bytes(20)), "image/gif"),
    "webp": ("data:image/webp;base64," + b64(b"RIFF\x0c\0\0\0WEBPVP8 \0\0\0\0"), "image/webp"),
}
NO_IMAGES: dict[str, tuple[str, str]] = {
    "an svg labelled png": ("data:image/png;base64," + b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "PNG"),
    "html labelled png": ("data:image/png;base64," + b64(b"<!doctype html>"), "PNG"),
    "audio": ("data:image/png;base64," + b64(MP3), "PNG"),
    "nothing": ("data:image/png;base64,", "PNG"),
    "not base64": ("data:image/png;base64," + b64(PNG) + "!", "'!'"),
    "not whole": ("data:image/png;base64," + "A" * 5, "missing"),
    "a png that breaks off": ("data:image/png;base64," + b64(PNG)[:-3].rstrip("="), "missing"),
    "not marked as base64": ("data:image/svg+xml,%3Csvg/%3E", "';base64,'"),
    "a remote one": ("https://example.com/a.png", "remote URLs are off"),
}  # fmt: skip


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("bodies"), settings={"inline_limit": 1000}) as opened:
        yield opened


@pytest.fixture
async def caller(house: RunningApp) -> Account:
    house.upstream.reset()
    return await house.account()


def look(url: str, **more: Any) -> dict[str, Any]:
    """A text task with an image."""
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
    return {"model": "gpt-4", "messages": [message], **more}


def shown(upstream: FaultUpstream) -> str:
    """The URL of the image in the last request to the vendor."""
    url = upstream.requests[-1].body["messages"][0]["content"][1]["image_url"]["url"]
    assert isinstance(url, str)
    return url


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("name", IMAGES)
async def test_an_image_in_any_spelling_reaches_the_vendor_in_one(
    name: str, way: str, house: RunningApp, caller: Account
) -> None:
    url, media_type = IMAGES[name]
    told = await house.ask(way, caller.live, look(url))
    assert (told.code, told.message) == ("ok", "")
    head, _, data = shown(house.upstream).partition(",")
    assert head == f"data:{media_type};base64"
    assert base64.b64decode(data, validate=True)
    if media_type == "image/png":
        assert base64.b64decode(data).startswith(PNG)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("live", [False, True], ids=["test", "live"])
@pytest.mark.parametrize("name", NO_IMAGES)
async def test_what_is_not_an_image_is_refused_with_the_field_and_the_reason(
    name: str, live: bool, stream: bool, house: RunningApp, caller: Account
) -> None:
    url, words = NO_IMAGES[name]
    told = [
        await house.ask(way, caller.live if live else caller.test, look(url), stream=stream)
        for way in PROTOCOLS
    ]
    assert {one.code for one in told} == {"invalid_parameter"}
    assert len({one.message for one in told}) == 1
    assert "messages[0].content[1].image_url" in told[0].message
    assert words in told[0].message
    assert not house.upstream.requests


async def test_a_large_image_with_line_breaks_is_taken(house: RunningApp, caller: Account) -> None:
    image = PNG + bytes(range(256)) * 16_000
    for way in PROTOCOLS:
        told = await house.ask(way, caller.live, look("data:image/jpeg;base64," + lines(image)))
        assert (told.code, told.message) == ("ok", "")
        assert shown(house.upstream) == "data:image/png;base64," + b64(image)


async def test_another_spelling_of_an_image_is_the_same_request(house: RunningApp, caller: Account) -> None:
    headers = {"Idempotency-Key": "once"}
    url = "data:image/png;base64," + b64(PNG)
    first = await house.ask("rest", caller.live, look(url), headers=headers)
    assert first.code == "ok"
    for way in PROTOCOLS:
        told = await house.ask(way, caller.live, look(IMAGES["lines"][0]), headers=headers)
        assert (told.code, told.id) == ("ok", first.id)
    assert len(house.upstream.requests) == 1


async def test_anthropic_gets_the_media_type_of_the_bytes_and_plain_base64(
    tmp_path: Path, upstream: FaultUpstream
) -> None:
    settings = Settings(
        rest="127.0.0.1:0",
        grpc="",
        data=tmp_path,
        anthropic_api_key="anthropic-upstream",
        anthropic_base_url=upstream.anthropic_base_url,
    )
    async with open_app(settings) as app, aiohttp.ClientSession() as session:
        assert app.rest is not None
        await endow(app.store)
        _, key = await app.keyring.create(live=True)
        body = look("data:image/jpg;name=x;base64," + lines(PNG), model="claude-3-haiku")
        async with session.post(
            "http://{}:{}/api/v1/task".format(*app.rest),
            json=body,
            headers={"Authorization": f"Bearer {key}"},
        ) as answer:
            assert answer.status == 200, await answer.text()
    source = upstream.requests[-1].body["messages"][0]["content"][1]["source"]
    assert source == {"type": "base64", "media_type": "image/png", "data": b64(PNG)}


# --- audio in JSON


AUDIO = {
    "plain": b64(MP3),
    "no padding": b64(MP3 + b"\0").rstrip("="),
    "lines": lines(MP3),
    "a commas in a parameter": "data:video/webm;codecs=vp8,opus;base64," + b64(MP3),
    "quotes": 'data:audio/ogg; codecs="vorbis"; base64,' + b64(MP3),
    "capitals": "DATA:AUDIO/MPEG;BASE64," + b64(MP3),
    "percent-encoded": "data:audio/mpeg;base64," + b64(MP3).replace("/", "%2F").replace("+", "%2b"),
    "url-safe": base64.urlsafe_b64encode(MP3).decode(),
    "no media type": "data:;base64," + b64(MP3),
}


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@pytest.mark.parametrize("way", REST_WAYS)
@pytest.mark.parametrize("name", AUDIO)
async def test_audio_in_any_spelling_reaches_the_vendor_as_its_bytes(
    name: str, way: str, form: bool, house: RunningApp, caller: Account
) -> None:
    given: dict[str, Any] = {"model": "eleven-labs-stt", "audio": AUDIO[name]}
    if form:
        made = aiohttp.FormData(default_to_multipart=True)
        for field, value in given.items():
            made.add_field(field, value)
    sent: dict[str, Any] = {"data": made} if form else {"json": given}
    headers = {"Authorization": f"Bearer {caller.live}"}
    async with house.session.post(f"{house.urls[way]}/api/v1/task", headers=headers, **sent) as answer:
        assert answer.status == 200, await answer.text()
    (part,) = [part for part in house.upstream.requests[-1].form or () if part.text is None]
    assert part.sha256 in {hashlib.sha256(data).hexdigest() for data in (MP3, MP3 + b"\0")}


@pytest.mark.parametrize("way", REST_WAYS)
@pytest.mark.parametrize("size", [300, 3_000_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("end", "words"), [("!", "'!'"), ("=A", "padding"), ("A", "missing"), ("\u00e9", "'\\xe9'")]
)
async def test_audio_that_is_not_base64_is_refused_with_the_reason_and_leaves_no_upload(
    end: str, words: str, size: int, way: str, house: RunningApp, caller: Account
) -> None:
    body = {"model": "eleven-labs-stt", "audio": b64(bytes(size)) + end}
    told = await house.ask(way, caller.live, body)
    assert told.code == "invalid_parameter"
    assert "audio" in told.message
    assert words in told.message
    assert not house.upstream.requests
    assert list((house.server.settings.data / "media").iterdir()) == []


# --- audio above the inline limit of gRPC, which is 1,000 bytes here


@pytest.mark.parametrize("copies", [1, 50, 100], ids=["25 kB", "1.2 MB", "2.5 MB"])
async def test_rest_takes_audio_above_the_inline_limit_of_grpc(
    copies: int, tmp_path: Path, house: RunningApp, caller: Account
) -> None:
    sound = MP3 * copies
    body = {"model": "eleven-labs-stt", "audio": b64(sound)}
    assert (await house.ask("grpc", caller.live, body)).code == "payload_too_large"
    assert house.server.grpc is not None
    stranger = Settings(rest="127.0.0.1:0", data=tmp_path, grace=1.0)
    async with open_gateway(stranger, house.server.grpc) as (host, port):
        urls = [*house.urls.values(), f"http://{host}:{port}"]
        for url in urls:
            headers = {"Authorization": f"Bearer {caller.live}"}
            async with house.session.post(f"{url}/api/v1/task", json=body, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
            (part,) = [part for part in house.upstream.requests[-1].form or () if part.text is None]
            assert part.sha256 == hashlib.sha256(sound).hexdigest()


# --- fields of other task types


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@pytest.mark.parametrize("way", REST_WAYS)
@pytest.mark.parametrize("kind", TASK_BODIES)
async def test_a_field_of_another_task_type_is_refused_and_named(
    kind: str, way: str, form: bool, house: RunningApp, caller: Account
) -> None:
    others = {
        "text": ["prompt", "width", "response_format", "output_format", "voice"],
        "image": ["messages", "text", "max_tokens", "timestamps"],
        "tts": ["prompt", "diarize", "messages"],
        "sts": ["text", "language_code", "prompt"],
        "stt": ["voice", "output_format", "response_format"],
    }[kind]
    for name in others:
        told = await house.ask(way, caller.test, TASK_BODIES[kind] | {name: "x"}, form=form)
        assert (told.code, told.status) == ("invalid_parameter", 400)
        assert name in told.message
    if not form:
        told = await house.ask(
            way, caller.test, TASK_BODIES[kind] | dict.fromkeys(others) | {"stream": False}
        )
        assert (told.code, told.message) == ("ok", "")


@pytest.mark.parametrize("first", ["model", "audio"])
@pytest.mark.parametrize("way", REST_WAYS)
async def test_a_file_is_dropped_beside_text_to_speech_and_refused_beside_text_and_images(
    way: str, first: str, house: RunningApp, caller: Account
) -> None:
    for kind, code in (("tts", "ok"), ("text", "invalid_parameter"), ("image", "invalid_parameter")):
        made = aiohttp.FormData()
        fields = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in TASK_BODIES[kind].items()
        }
        for name in ("audio", *fields) if first == "audio" else (*fields, "audio"):
            if name == "audio":
                made.add_field(name, MP3, filename="a.mp3", content_type="audio/mpeg")
            else:
                made.add_field(name, fields[name])
        headers = {"Authorization": f"Bearer {caller.test}"}
        async with house.session.post(f"{house.urls[way]}/api/v1/task", data=made, headers=headers) as answer:
            found = await answer.json()
        assert found.get("error", {}).get("code", "ok") == code
        assert code == "ok" or "audio" in found["error"]["message"]


@pytest.mark.parametrize("method", ["RunTask", "StreamTask"])
async def test_grpc_refuses_the_input_of_another_task_type_and_names_it(
    method: str, house: RunningApp, caller: Account
) -> None:
    tasks = TaskServiceStub(house.channel)
    text = text_pb2.TextInput(messages=[text_pb2.Message(role=text_pb2.ROLE_USER, content="Hi")])
    for task, wrong, right in (
        (Task(model="gpt-4", image=image_pb2.ImageInput(prompt="A kite")), "image", "text"),
        (Task(model="flux-1-pro", text=text), "text", "image"),
        (Task(model="eleven-labs-stt", text_to_speech=speech_pb2.TextToSpeechInput(text="Hi")),
         "text_to_speech", "speech_to_text"),
    ):  # fmt: skip
        request = RunTaskRequest(task=task) if method == "RunTask" else StreamTaskRequest(task=task)
        error = await failure(getattr(tasks, method)(request, metadata=bearer(caller.test)))
        assert reason_of(error) == "invalid_parameter"
        assert f"takes {right}, not {wrong}" in (error.details() or "")


# --- encodings


@pytest.mark.parametrize("way", REST_WAYS)
@pytest.mark.parametrize(
    ("data", "content_type", "status", "words"),
    [
        (b"\xef\xbb\xbf" + json.dumps(text_body("caf\u00e9"), ensure_ascii=False).encode(), "", 200, ""),
        (json.dumps(text_body("caf\u00e9"), ensure_ascii=False).encode(), "; charset=utf-8", 200, ""),
        (json.dumps(text_body()).encode(), ';charset="UTF-8"', 200, ""),
        (json.dumps(text_body()).encode(), "; version=1; Charset=utf8", 200, ""),
        (json.dumps(text_body()).encode("utf-16"), "; charset=utf-16", 415, "UTF-8"),
        (json.dumps(text_body("caf\u00e9"), ensure_ascii=False).encode("latin-1"), "; charset=iso-8859-1", 415, "UTF-8"),
        (json.dumps(text_body("caf\u00e9"), ensure_ascii=False).encode("latin-1"), "", 400, "UTF-8"),
        (json.dumps(text_body()).encode("utf-16"), "", 400, "UTF-16"),
        (json.dumps(text_body("x" * 100_000)).encode("utf-16-le"), "; charset=utf-8", 400, "UTF-16"),
        (json.dumps(text_body("caf\ud83d")).encode(), "", 400, "messages[0].content"),
        (json.dumps(text_body("\ud83d" + "x" * 100_000)).encode(), "", 400, "messages[0].content"),
    ],
)  # fmt: skip
async def test_json_is_utf_8(
    data: bytes, content_type: str, status: int, words: str, way: str, house: RunningApp, caller: Account
) -> None:
    headers = {"Authorization": f"Bearer {caller.live}", "Content-Type": "application/json" + content_type}
    async with house.session.post(f"{house.urls[way]}/api/v1/task", data=data, headers=headers) as answer:
        found = await answer.json()
    assert (answer.status, words in found.get("error", {}).get("message", "")) == (status, True)
    if status == 200:
        assert house.upstream.requests[-1].prompt in ("caf\u00e9", "Hello there")


TWICE: dict[str, tuple[str, str]] = {
    "an option": ('{"model":"gpt-4","messages":HI,"max_tokens":1,"max_tokens":2}', "max_tokens"),
    "the same value": ('{"model":"gpt-4","messages":HI,"max_tokens":1,"max_tokens":1}', "max_tokens"),
    "with an escape": ('{"model":"gpt-4","max_tokens":1,"messages":HI,"\\u006dax_tokens":2}', "max_tokens"),
    "the model": ('{"model":"gpt-4","messages":HI,"model":"flux-1-pro"}', "model"),
    "the messages": ('{"messages":[],"model":"gpt-4","messages":HI}', "messages"),
    "within a message": (
        '{"model":"gpt-4","messages":[{"role":"system","role":"user","content":"Hi"}]}',
        "role",
    ),
    "in a large body": ('{"model":"gpt-4","messages":HI,"user":"u","x":"LARGE","user":"v"}', "user"),
    "an unknown name": ('{"model":"gpt-4","messages":HI,"unicode\\n":1,"unicode\\n":2}', "unicode\\n"),
}


@pytest.mark.parametrize("way", REST_WAYS)
@pytest.mark.parametrize("case", TWICE)
async def test_a_name_that_is_given_twice_is_refused_and_named(
    house: RunningApp, caller: Account, case: str, way: str
) -> None:
    body, name = TWICE[case]
    body = body.replace("HI", '[{"role":"user","content":"Hi"}]').replace("LARGE", "x" * 200_000)
    headers = {"Authorization": f"Bearer {caller.live}", "Content-Type": "application/json"}
    async with house.session.post(house.urls[way] + "/api/v1/task", data=body, headers=headers) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, "invalid_parameter")
    assert error["message"] == f"Invalid {name}: must be given once"


@pytest.mark.parametrize("way", REST_WAYS)
async def test_a_name_that_is_given_twice_in_the_json_of_a_form_is_refused(
    house: RunningApp, caller: Account, way: str
) -> None:
    form = aiohttp.FormData(default_to_multipart=True)
    form.add_field("model", "gpt-4")
    form.add_field("messages", '[{"role":"system","role":"user","content":"Hi"}]')
    headers = {"Authorization": f"Bearer {caller.live}"}
    async with house.session.post(house.urls[way] + "/api/v1/task", data=form, headers=headers) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (400, "invalid_parameter")
    assert "messages" in error["message"]
    assert '"role"' in error["message"]


@pytest.mark.parametrize("way", REST_WAYS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_a_key_that_is_given_twice_is_refused_as_that(
    house: RunningApp, caller: Account, stream: bool, way: str
) -> None:
    pair = [("Authorization", f"Bearer {caller.live}"), ("Authorization", f"Bearer {caller.test}")]
    for headers in (pair, pair[::-1], [pair[0], pair[0]]):
        async with house.session.post(
            house.urls[way] + "/api/v1/task", json=text_body() | {"stream": stream}, headers=headers
        ) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (401, "invalid_api_key")
        assert error["message"].startswith("Authorization was given twice.")
