"""Request bodies: images and audio in every encoding, fields of other task types, duplicate names, audio of any size."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.app import open_gateway
from pomelo.gen.v1 import image_pb2, speech_pb2
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream
from pomelo.testing.images import make_image
from tests.app import Account, RunningApp, app_fixture, run_app
from tests.calls import bearer, failure, reason_of
from tests.driver import METHOD, PROTOCOL, PROTOCOLS, REST_PROTOCOL, STREAM
from tests.tasks import TASK_BODIES, text_body, text_task

PNG = make_image("png")
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9"
MP3 = (bytes.fromhex("fffb9064") + bytes(413)) * 60


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def lines(data: bytes, end: str = "\r\n") -> str:
    """Returns the data in base64 with line breaks."""
    return base64.encodebytes(data).decode().replace("\n", end)


IMAGES: dict[str, tuple[str, str]] = {
    "regular": ("data:image/png;base64," + b64(PNG), "image/png"),
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
INVALID_IMAGES: dict[str, tuple[str, str]] = {
    "an svg labelled png": ("data:image/png;base64," + b64(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "PNG"),
    "html labelled png": ("data:image/png;base64," + b64(b"<!doctype html>"), "PNG"),
    "audio": ("data:image/png;base64," + b64(MP3), "PNG"),
    "nothing": ("data:image/png;base64,", "PNG"),
    "not base64": ("data:image/png;base64," + b64(PNG).rstrip("=") + "!", "'!'"),
    "incomplete base64": ("data:image/png;base64," + "A" * 5, "missing"),
    "a truncated png": ("data:image/png;base64," + b64(PNG)[:-3].rstrip("="), "missing"),
    "not marked as base64": ("data:image/svg+xml,%3Csvg/%3E", "';base64,'"),
    "a remote image": ("https://example.com/a.png", "remote URLs are off"),
}  # fmt: skip

app = app_fixture(settings={"inline_limit": 1000})


@pytest.fixture
async def account(app: RunningApp) -> Account:
    app.upstream.reset()
    return await app.account()


def image_question(url: str, **fields: Any) -> dict[str, Any]:
    """Returns the body of a text task with an image."""
    part = {"type": "image_url", "image_url": {"url": url}}
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
    return {"model": "gpt-4", "messages": [message], **fields}


def image_sent(upstream: FaultUpstream) -> str:
    """Returns the URL of the image in the last request to the vendor."""
    url = upstream.requests[-1].body["messages"][0]["content"][1]["image_url"]["url"]
    assert isinstance(url, str)
    return url


def form_of(fields: dict[str, str]) -> aiohttp.FormData:
    """Returns a multipart form with these fields."""
    form = aiohttp.FormData(default_to_multipart=True)
    for name, value in fields.items():
        form.add_field(name, value)
    return form


def audio_sent(upstream: FaultUpstream) -> str:
    """Returns the SHA-256 of the file in the last request to the vendor."""
    (part,) = [part for part in upstream.requests[-1].form or () if part.text is None]
    return part.sha256


@PROTOCOL
@pytest.mark.parametrize("name", IMAGES)
async def test_an_image_in_every_encoding_reaches_the_vendor_in_one(
    name: str, protocol: str, app: RunningApp, account: Account
) -> None:
    url, media_type = IMAGES[name]
    outcome = await app.ask(protocol, account.live, image_question(url))
    assert (outcome.code, outcome.message) == ("ok", "")
    head, _, data = image_sent(app.upstream).partition(",")
    assert head == f"data:{media_type};base64"
    assert base64.b64decode(data, validate=True)
    if media_type == "image/png":
        assert base64.b64decode(data).startswith(PNG)


@STREAM
@pytest.mark.parametrize("live", [False, True], ids=["test", "live"])
@pytest.mark.parametrize("name", INVALID_IMAGES)
async def test_an_invalid_image_is_refused_with_the_field_and_the_reason(
    name: str, live: bool, stream: bool, app: RunningApp, account: Account
) -> None:
    url, words = INVALID_IMAGES[name]
    outcomes = [
        await app.ask(protocol, account.live if live else account.test, image_question(url), stream=stream)
        for protocol in PROTOCOLS
    ]
    assert {one.code for one in outcomes} == {"invalid_parameter"}
    assert len({one.message for one in outcomes}) == 1
    assert "messages[0].content[1].image_url" in outcomes[0].message
    assert words in outcomes[0].message
    assert not app.upstream.requests


async def test_a_large_image_with_line_breaks_is_accepted(app: RunningApp, account: Account) -> None:
    image = PNG + bytes(range(256)) * 16_000
    for protocol in PROTOCOLS:
        body = image_question("data:image/jpeg;base64," + lines(image))
        outcome = await app.ask(protocol, account.live, body)
        assert (outcome.code, outcome.message) == ("ok", "")
        assert image_sent(app.upstream) == "data:image/png;base64," + b64(image)


async def test_an_image_in_a_different_encoding_is_the_same_request(
    app: RunningApp, account: Account
) -> None:
    headers = {"Idempotency-Key": "once"}
    url = "data:image/png;base64," + b64(PNG)
    first = await app.ask("rest", account.live, image_question(url), headers=headers)
    assert first.code == "ok"
    for protocol in PROTOCOLS:
        outcome = await app.ask(protocol, account.live, image_question(IMAGES["lines"][0]), headers=headers)
        assert (outcome.code, outcome.id) == ("ok", first.id)
    assert len(app.upstream.requests) == 1


async def test_anthropic_gets_the_media_type_of_the_bytes_and_plain_base64(tmp_path: Path) -> None:
    async with run_app(tmp_path, settings={"anthropic_api_key": "anthropic-upstream"}) as app:
        body = image_question("data:image/jpg;name=x;base64," + lines(PNG), model="claude-3-haiku")
        outcome = await app.ask("rest", (await app.account()).live, body)
        assert (outcome.code, outcome.status, outcome.message) == ("ok", 200, "")
        source = app.upstream.requests[-1].body["messages"][0]["content"][1]["source"]
        assert source == {"type": "base64", "media_type": "image/png", "data": b64(PNG)}


# --- audio in JSON


AUDIO = {
    "plain": b64(MP3),
    "no padding": b64(MP3 + b"\0").rstrip("="),
    "lines": lines(MP3),
    "a comma in a parameter": "data:video/webm;codecs=vp8,opus;base64," + b64(MP3),
    "quotes": 'data:audio/ogg; codecs="vorbis"; base64,' + b64(MP3),
    "capitals": "DATA:AUDIO/MPEG;BASE64," + b64(MP3),
    "percent-encoded": "data:audio/mpeg;base64," + b64(MP3).replace("/", "%2F").replace("+", "%2b"),
    "url-safe": base64.urlsafe_b64encode(MP3).decode(),
    "no media type": "data:;base64," + b64(MP3),
}


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@REST_PROTOCOL
@pytest.mark.parametrize("name", AUDIO)
async def test_audio_in_every_encoding_is_sent_to_the_vendor_unchanged(
    name: str, protocol: str, form: bool, app: RunningApp, account: Account
) -> None:
    body = {"model": "eleven-labs-stt", "audio": AUDIO[name]}
    answer = await app.post(protocol, account.live, **({"data": form_of(body)} if form else {"json": body}))
    assert answer.status == 200, await answer.text()
    assert audio_sent(app.upstream) in {hashlib.sha256(data).hexdigest() for data in (MP3, MP3 + b"\0")}


@REST_PROTOCOL
@pytest.mark.parametrize("size", [300, 3_000_000], ids=["small", "large"])
@pytest.mark.parametrize(
    ("end", "words"), [("!", "'!'"), ("=A", "padding"), ("A", "missing"), ("\u00e9", "'\\xe9'")]
)
async def test_audio_in_invalid_base64_is_refused_with_the_reason_and_leaves_no_upload(
    end: str, words: str, size: int, protocol: str, app: RunningApp, account: Account
) -> None:
    body = {"model": "eleven-labs-stt", "audio": b64(bytes(size)) + end}
    outcome = await app.ask(protocol, account.live, body)
    assert outcome.code == "invalid_parameter"
    assert "audio" in outcome.message
    assert words in outcome.message
    assert not app.upstream.requests
    assert list((app.server.settings.data / "media").iterdir()) == []


# --- audio above the inline limit of gRPC, which is 1,000 bytes here


@pytest.mark.parametrize("copies", [1, 50, 100], ids=["25 kB", "1.2 MB", "2.5 MB"])
async def test_rest_accepts_audio_above_the_inline_limit_of_grpc(
    copies: int, tmp_path: Path, app: RunningApp, account: Account
) -> None:
    audio = MP3 * copies
    body = {"model": "eleven-labs-stt", "audio": b64(audio)}
    assert (await app.ask("grpc", account.live, body)).code == "payload_too_large"
    assert app.server.grpc is not None
    untrusted = Settings(rest="127.0.0.1:0", data=tmp_path, grace=1.0)
    async with open_gateway(untrusted, app.server.grpc) as (host, port):
        urls = [*app.urls.values(), f"http://{host}:{port}"]
        for url in urls:
            headers = {"Authorization": f"Bearer {account.live}"}
            async with app.session.post(f"{url}/api/v1/task", json=body, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
            assert audio_sent(app.upstream) == hashlib.sha256(audio).hexdigest()


# --- fields of other task types


@pytest.mark.parametrize("form", [False, True], ids=["json", "form"])
@REST_PROTOCOL
@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_a_field_of_another_task_type_is_refused_and_named(
    task_type: str, protocol: str, form: bool, app: RunningApp, account: Account
) -> None:
    others = {
        "text": ["prompt", "width", "response_format", "output_format", "voice"],
        "image": ["messages", "text", "max_tokens", "timestamps"],
        "tts": ["prompt", "diarize", "messages"],
        "sts": ["text", "language_code", "prompt"],
        "stt": ["voice", "output_format", "response_format"],
    }[task_type]
    for name in others:
        outcome = await app.ask(protocol, account.test, TASK_BODIES[task_type] | {name: "x"}, form=form)
        assert (outcome.code, outcome.status) == ("invalid_parameter", 400)
        assert name in outcome.message
    if not form:
        body = TASK_BODIES[task_type] | dict.fromkeys(others) | {"stream": False}
        outcome = await app.ask(protocol, account.test, body)
        assert (outcome.code, outcome.message) == ("ok", "")


@pytest.mark.parametrize("first", ["model", "audio"])
@REST_PROTOCOL
async def test_a_file_is_ignored_by_text_to_speech_and_refused_by_text_and_image_tasks(
    protocol: str, first: str, app: RunningApp, account: Account
) -> None:
    for task_type, code in (("tts", "ok"), ("text", "invalid_parameter"), ("image", "invalid_parameter")):
        form_data = aiohttp.FormData()
        fields = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in TASK_BODIES[task_type].items()
        }
        for name in ("audio", *fields) if first == "audio" else (*fields, "audio"):
            if name == "audio":
                form_data.add_field(name, MP3, filename="a.mp3", content_type="audio/mpeg")
            else:
                form_data.add_field(name, fields[name])
        response = await (await app.post(protocol, account.test, data=form_data)).json()
        assert response.get("error", {}).get("code", "ok") == code
        assert code == "ok" or "audio" in response["error"]["message"]


@METHOD
async def test_grpc_refuses_the_input_of_another_task_type_and_names_it(
    method: str, app: RunningApp, account: Account
) -> None:
    tasks = TaskServiceStub(app.channel)
    text = text_task("Hi").text
    for task, wrong, right in (
        (TaskSpec(model="gpt-4", image=image_pb2.ImageInput(prompt="A kite")), "image", "text"),
        (TaskSpec(model="flux-1-pro", text=text), "text", "image"),
        (TaskSpec(model="eleven-labs-stt", text_to_speech=speech_pb2.TextToSpeechInput(text="Hi")),
         "text_to_speech", "speech_to_text"),
    ):  # fmt: skip
        request = RunTaskRequest(spec=task) if method == "RunTask" else StreamTaskRequest(spec=task)
        error = await failure(getattr(tasks, method)(request, metadata=bearer(account.test)))
        assert reason_of(error) == "invalid_parameter"
        assert f"takes {right}, not {wrong}" in (error.details() or "")


# --- encodings


@REST_PROTOCOL
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
async def test_json_must_be_utf_8(
    data: bytes, content_type: str, status: int, words: str, protocol: str, app: RunningApp, account: Account
) -> None:
    headers = {"Content-Type": "application/json" + content_type}
    answer = await app.post(protocol, account.live, data=data, headers=headers)
    response = await answer.json()
    assert (answer.status, words in response.get("error", {}).get("message", "")) == (status, True)
    if status == 200:
        assert app.upstream.requests[-1].prompt in ("caf\u00e9", "Hello there")


DUPLICATES: dict[str, tuple[str, str]] = {
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


@REST_PROTOCOL
@pytest.mark.parametrize("case", DUPLICATES)
async def test_a_duplicate_name_is_refused_and_named(
    app: RunningApp, account: Account, case: str, protocol: str
) -> None:
    body, name = DUPLICATES[case]
    body = body.replace("HI", '[{"role":"user","content":"Hi"}]').replace("LARGE", "x" * 200_000)
    headers = {"Content-Type": "application/json"}
    answer = await app.post(protocol, account.live, data=body, headers=headers)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "invalid_parameter")
    assert error["message"] == f"Invalid {name}: must be given once"


@REST_PROTOCOL
async def test_a_duplicate_name_in_the_json_of_a_form_is_refused(
    app: RunningApp, account: Account, protocol: str
) -> None:
    messages = '[{"role":"system","role":"user","content":"Hi"}]'
    form = form_of({"model": "gpt-4", "messages": messages})
    answer = await app.post(protocol, account.live, data=form)
    error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "invalid_parameter")
    assert "messages" in error["message"]
    assert '"role"' in error["message"]


@REST_PROTOCOL
@STREAM
async def test_two_authorization_headers_are_refused(
    app: RunningApp, account: Account, stream: bool, protocol: str
) -> None:
    pair = [("Authorization", f"Bearer {account.live}"), ("Authorization", f"Bearer {account.test}")]
    for headers in (pair, pair[::-1], [pair[0], pair[0]]):
        async with app.session.post(
            app.urls[protocol] + "/api/v1/task", json=text_body() | {"stream": stream}, headers=headers
        ) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["code"]) == (401, "invalid_api_key")
        assert error["message"].startswith("Authorization was given twice.")
