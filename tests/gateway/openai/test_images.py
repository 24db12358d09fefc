"""`POST /v1/images/generations`: its parameters, its responses and its stream."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1.image_pb2 import ImageFormat
from tests.gateway.gateway_app import PNG, GatewayApp, OpenApp
from tests.gateway.openai.media_requests import STRICT, error_of, post
from tests.gateway.requests import FORM, events_of
from tests.gateway.scripts import play, progress

KITE = {"model": "flux-1-pro", "prompt": "a kite"}
PATH = "images/generations"


async def test_parameters_become_the_fields_of_an_image_task(gateway: GatewayApp) -> None:
    given = {
        **{"n": 1, "size": "512x768", "output_format": "webp", "user": "u-7", "response_format": None},
        **{"model": "flux-1-dev", "seed": 5, "num_inference_steps": 20, "guidance_scale": 2.5},
    }
    async with post(gateway, PATH, KITE | given) as response:
        assert response.status == 200
        assert "X-Pomelo-Adjusted" not in response.headers
    job = gateway.provider.jobs[-1]
    drawn = job.input
    assert (drawn.prompt, drawn.width, drawn.height, drawn.seed) == ("a kite", 512, 768, 5)
    assert (drawn.output_format, drawn.num_inference_steps) == (ImageFormat.IMAGE_FORMAT_WEBP, 20)
    assert (drawn.guidance_scale, job.user) == (2.5, "u-7")


@pytest.mark.parametrize("size", [None, "auto"])
async def test_an_automatic_size_is_left_to_the_model(gateway: GatewayApp, size: str | None) -> None:
    async with post(gateway, PATH, KITE | {"size": size}) as response:
        assert response.status == 200
    drawn = gateway.provider.jobs[-1].input
    assert not drawn.HasField("width")
    assert not drawn.HasField("height")


@pytest.mark.parametrize(
    ("response_format", "members"),
    [(None, {"url", "b64_json"}), ("url", {"url"}), ("b64_json", {"b64_json"})],
)
async def test_an_image_is_a_link_or_bytes_or_both(
    gateway: GatewayApp, response_format: str | None, members: set[str]
) -> None:
    async with post(gateway, PATH, KITE | {"response_format": response_format}) as response:
        value = await response.json()
    assert set(value) == {"created", "data"}
    (image,) = value["data"]
    assert set(image) == members
    if "b64_json" in image:
        assert base64.b64decode(image["b64_json"]) == PNG
    if "url" in image:
        async with gateway.http.get(image["url"]) as response:
            assert await response.read() == PNG


@pytest.mark.parametrize(
    ("given", "parameter"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"size": "1024"}, "size"),
        ({"size": 1024}, "size"),
        ({"size": "32x1024"}, "size"),
        ({"size": "1024x99999"}, "size"),
        ({"output_format": "gif"}, "output_format"),
        ({"response_format": "svg"}, "response_format"),
        ({"user": "u" * 257}, "user"),
        ({"safety_identifier": 7}, "safety_identifier"),
        ({"user": "u", "safety_identifier": "u" * 257}, "safety_identifier"),
        ({"width": 512}, "size"),
        ({"frame_count": 3}, "frame_count"),
        ({"stream": "yes"}, "stream"),
        ({"model": "gpt-4"}, "model"),
        ({"model": None}, "model"),
    ],
)
async def test_a_wrong_parameter_is_named(gateway: GatewayApp, given: dict[str, Any], parameter: str) -> None:
    status, code, param = await error_of(post(gateway, PATH, KITE | given))
    assert (status, param) == (400, parameter)
    assert code == ("missing_parameter" if None in given.values() else "invalid_parameter")
    assert not gateway.provider.jobs


@pytest.mark.parametrize(
    ("size", "strict", "problem"),
    [
        ("32x1024", {}, "width must be a whole number from 64 to 2,048"),
        ("1024x99999", {}, "height must be a whole number from 64 to 2,048"),
        ("1024x100", STRICT, "height must be a multiple of 32 from 256 to 1,440"),
    ],
)
async def test_a_refused_size_says_which_of_its_sides_is_wrong(
    gateway: GatewayApp, size: str, strict: dict[str, str], problem: str
) -> None:
    async with post(gateway, PATH, KITE | {"size": size}, headers=strict) as response:
        error = (await response.json())["error"]
    assert error["message"] == f"Invalid size: must be WIDTHxHEIGHT; the {problem}"
    assert error["param"] == "size"


async def test_a_form_is_refused(gateway: GatewayApp) -> None:
    sending = post(gateway, PATH, data=b"--B--\r\n", headers={"Content-Type": FORM})
    assert await error_of(sending) == (415, "unsupported_media_type", None)


async def test_parameters_without_effect_are_reported_unless_they_say_what_happens_anyway(
    gateway: GatewayApp,
) -> None:
    usual = {
        **{"quality": "auto", "style": "vivid", "background": "opaque", "moderation": "auto"},
        **{"output_compression": 100, "partial_images": 0},
    }
    async with post(gateway, PATH, KITE | usual, headers=STRICT) as response:
        assert response.status == 200
        assert "X-Pomelo-Adjusted" not in response.headers
    other = {
        **{"quality": "hd", "style": "natural", "background": "transparent", "moderation": "low"},
        **{"output_compression": 50, "partial_images": 2},
    }
    async with post(gateway, PATH, KITE | other) as response:
        assert response.headers["X-Pomelo-Adjusted"] == "; ".join(other)
    for name, value in other.items():
        refusal = await error_of(post(gateway, PATH, KITE | {name: value}, headers=STRICT))
        assert refusal == (400, "invalid_parameter", name)


@pytest.mark.parametrize(
    ("size", "used"), [("2000x64", "1440x256"), ("2000x512", "1440x512"), ("512x64", "512x256")]
)
async def test_an_adjusted_size_is_reported_as_a_size(gateway: GatewayApp, size: str, used: str) -> None:
    given = KITE | {"size": size, "seed": 3, "guidance_scale": 7, "quality": "hd"}
    async with post(gateway, PATH, given) as response:
        assert response.headers["X-Pomelo-Adjusted"] == f"guidance_scale; size={used}; quality"
    (event, _) = await events_of(post(gateway, PATH, given | {"stream": True}))
    assert event[1]["size"] == used
    assert await error_of(post(gateway, PATH, KITE | {"size": size}, headers=STRICT)) == (
        400,
        "invalid_parameter",
        "size",
    )


async def test_a_stream_is_one_event_with_the_image(gateway: GatewayApp) -> None:
    before = set(gateway.media.folder.iterdir())
    (name, event), done = await events_of(post(gateway, PATH, KITE | {"stream": True}))
    assert (name, done) == ("message", ("message", "[DONE]"))
    assert base64.b64decode(event.pop("b64_json")) == PNG
    assert event.pop("created_at") > 1_700_000_000
    event.pop("usage")
    assert event == {
        **{"type": "image_generation.completed", "output_format": "png", "size": "auto"},
        **{"quality": "auto", "background": "auto"},
    }
    assert set(gateway.media.folder.iterdir()) == before


async def test_what_a_stream_left_out_is_reported_also_by_headers_before_the_image(
    open_gateway: OpenApp,
) -> None:
    async with open_gateway(keep_alive=0.01) as gateway:
        waiting = asyncio.Event()
        gateway.provider.script = play(waiting.wait, PomeloError("provider_failed"))
        body = KITE | {"size": "64x64", "quality": "hd", "stream": True}
        async with post(gateway, PATH, body) as response:  # the headers come with the first comment
            assert response.headers["X-Pomelo-Adjusted"] == "size=256x256; quality"
            waiting.set()
            comment, *_, failure = (await response.read()).split(b"\n\n")[:-1]
        assert comment == b": keep-alive"
        error = json.loads(failure.removeprefix(b"data: "))["error"]
        assert (error["code"], error["param"]) == ("provider_failed", None)


async def test_an_image_that_fails_is_an_error_with_the_name_of_the_parameter(gateway: GatewayApp) -> None:
    for stream in (False, True):
        gateway.provider.script = play(
            progress(0.5), PomeloError("invalid_parameter", "width", field="width")
        )
        refusal = await error_of(post(gateway, PATH, KITE | {"stream": stream}))
        assert refusal == (400, "invalid_parameter", "size")


async def test_a_stream_has_the_size_that_was_asked_for(gateway: GatewayApp) -> None:
    (_, event), _ = await events_of(post(gateway, PATH, KITE | {"size": "512x768", "stream": True}))
    assert event["size"] == "512x768"
