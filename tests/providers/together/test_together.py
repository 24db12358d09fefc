"""Requests, answers and failures of the Together provider."""

from __future__ import annotations

import json
from base64 import b64encode, encodebytes, urlsafe_b64encode
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.image_pb2 import ImageFormat, ImageInput
from pomelo.providers.errors import RetryPolicy
from pomelo.providers.together import Together
from pomelo.testing import FaultUpstream, Reply, Script, Stop
from pomelo.testing.bfl_protocol import delivered
from pomelo.testing.images import make_image
from pomelo.testing.reply import Received
from pomelo.testing.together_protocol import Image, error_reply
from tests.providers.image_rig import NEVER, NEXT, check_refused, draw_image, failure, job, largest_input
from tests.providers.rig import KEY, PROMPT, SECRETS, Rig, open_provider, open_rig, read_all
from tests.unit.sleeps import Sleeps

SIDE = (256.0, 1440.0, 32.0)
SCHNELL = Route(
    "together",
    "black-forest-labs/FLUX.1-schnell",
    drop=frozenset(("guidance_scale",)),
    clamp={"width": SIDE, "height": SIDE, "num_inference_steps": (1, 4, 0)},
)


@pytest.fixture(name="rig")
async def _rig() -> AsyncIterator[Rig]:
    async with open_rig(Together, "together") as rig:
        yield rig


async def test_the_largest_request_is_exactly_this(rig: Rig) -> None:
    route = Route("together", SCHNELL.model, clamp=SCHNELL.clamp)
    await draw_image(rig.provider, job(route, largest_input(ImageFormat.IMAGE_FORMAT_JPEG)))
    (received,) = rig.requests
    assert (received.method, received.target) == ("POST", "/together/v1/images/generations")
    assert received.body == {
        "model": "black-forest-labs/FLUX.1-schnell",
        "prompt": "Ünïcödé 🍊 on a table",
        "width": 992,
        "height": 704,
        "steps": 3,
        "guidance_scale": 2.5,
        "seed": 2**53 - 1,
        "n": 1,
        "response_format": "base64",
        "output_format": "jpeg",
    }
    assert received.headers["Authorization"] == f"Bearer {KEY}"


async def test_the_smallest_request_has_only_size_and_format(rig: Rig) -> None:
    await draw_image(rig.provider, job(SCHNELL))
    assert rig.requests[0].body == {
        "model": "black-forest-labs/FLUX.1-schnell",
        "prompt": PROMPT,
        "width": 1024,
        "height": 1024,
        "n": 1,
        "response_format": "base64",
        "output_format": "png",
    }


async def test_steps_are_clamped_and_guidance_is_dropped(rig: Rig) -> None:
    await draw_image(
        rig.provider, job(SCHNELL, ImageInput(prompt="x", num_inference_steps=50, guidance_scale=3))
    )
    assert rig.requests[0].body["steps"] == 4
    assert "guidance_scale" not in rig.requests[0].body


async def test_an_image_in_a_larger_response_than_other_vendors_send_is_read(rig: Rig) -> None:
    data = make_image() + b"x" * 7_000_000
    rig.script(Image(data))
    assert await draw_image(rig.provider, job(SCHNELL)) == (data, "image/png")


async def test_a_default_size_is_in_the_range_of_the_route(rig: Rig) -> None:
    clamp = {"width": (256.0, 512.0, 32.0), "height": (1152.0, 1440.0, 32.0)}
    await draw_image(rig.provider, job(Route("together", SCHNELL.model, clamp=clamp)))
    assert (rig.requests[0].body["width"], rig.requests[0].body["height"]) == (512, 1152)


async def test_a_stream_reports_only_the_end(rig: Rig) -> None:
    reported, last = await read_all(rig.provider, job(SCHNELL, stream=True))
    assert reported.image_progress.progress == 1
    assert last.completed.image.images[0].data == make_image("png")


def item(**what: Any) -> Reply:
    """An answer with one image."""
    body = str({"data": [what]}).replace("'", '"').encode()
    return Reply(steps=(body,))


FAULTS: list[tuple[Script, str, int | None, RetryPolicy]] = [
    (error_reply(400, param="steps", message=SECRETS), "invalid_parameter", None, NEVER),
    (error_reply(422, param="prompt", message=SECRETS), "invalid_parameter", None, NEVER),
    (error_reply(400, param="n", message=SECRETS), "provider_failed", None, NEXT),
    (error_reply(400, code="content_policy_violation"), "content_policy_violation", None, NEVER),
    (error_reply(401, code="invalid_api_key"), "provider_failed", None, NEXT),
    (error_reply(200, message=SECRETS), "provider_failed", None, NEVER),
    (Reply(steps=(b'{"data":[]}',)), "provider_failed", None, NEVER),
    (Reply(steps=(b'{"data":{"0":1}}',)), "provider_failed", None, NEVER),
    (item(url="https://169.254.169.254/"), "provider_failed", None, NEVER),
    (item(b64_json=7), "provider_failed", None, NEVER),
    (item(b64_json="***"), "provider_failed", None, NEVER),
    (item(b64_json="ünïcödé"), "provider_failed", None, NEVER),
    (item(b64_json=b64encode(b"<html>").decode()), "provider_failed", None, NEVER),
    (item(b64_json=b64encode(b"").decode()), "provider_failed", None, NEVER),
    (Image(b"\x89PNG\r\n\x1a\n" + b"x" * 34_000_000), "provider_failed", None, NEVER),
    (Image(middle=(Stop.CLOSE,)), "provider_failed", None, NEVER),
    (Image(middle=(Stop.RESET,)), "provider_failed", None, NEVER),
    (Image(middle=(Stop.END,)), "provider_failed", None, NEVER),
]


@pytest.mark.parametrize(("script", "code", "wait", "retry"), FAULTS)
async def test_every_failure_is_mapped_to_an_error_and_the_request_is_sent_once(
    rig: Rig, script: Script, code: str, wait: int | None, retry: RetryPolicy, stream: bool
) -> None:
    await check_refused(rig, script, job(SCHNELL, stream=stream), code, wait, retry)


async def test_a_refused_parameter_is_named_as_in_the_contract(rig: Rig) -> None:
    rig.script(error_reply(400, param="steps"))
    error = await failure(rig.provider, job(SCHNELL))
    assert error.field == "num_inference_steps"


async def test_the_base_url_may_end_with_v1(rig: Rig) -> None:
    for end in ("/", "/v1", "/v1/"):
        async with open_provider(Together, rig.together_base_url + end) as provider:
            await draw_image(provider, job(SCHNELL))


@dataclass(frozen=True)
class Item:
    """A script: answers with this in place of the image."""

    item: dict[str, Any]

    def __call__(self, received: Received) -> Reply:
        """The reply to a request."""
        body = json.dumps({"id": "o-T1", "data": [{"index": 0, **self.item}]}).encode()
        return Reply(headers={"Content-Type": "application/json"}, steps=(body,))


ENCODED = b64encode(make_image()).decode()
URL_SAFE = urlsafe_b64encode(make_image()).decode()


@pytest.mark.parametrize(
    "item",
    [
        {"b64_json": encodebytes(make_image()).decode()},
        {"b64_json": encodebytes(make_image()).decode().replace("\n", "\r\n")},
        {"b64_json": f"data:image/png;base64,{ENCODED}"},
        {"b64_json": URL_SAFE.rstrip("=")},
        {"b64_json": None, "url": f"data:image/png;base64,{ENCODED}"},
        {"type": "url", "url": f"data:image/png;base64,{ENCODED}"},
        {"b64_json": ENCODED, "url": "https://127.0.0.1/x.png"},
    ],
)
async def test_base64_of_vendors_is_decoded_as_leniently_as_that_of_callers(
    rig: Rig, item: dict[str, Any], stream: bool
) -> None:
    rig.script(Item(item))
    assert await draw_image(rig.provider, job(SCHNELL, stream=stream)) == (make_image(), "image/png")
    assert len(rig.requests) == 1


async def test_an_image_whose_download_fails_is_not_made_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    waits = Sleeps(monkeypatch)
    async with FaultUpstream() as store:
        store.default = Reply(503)
        rig.script(Item({"url": f"{store.url}/bfl/delivery/T1/sample.png"}))
        async with open_provider(Together, rig.together_base_url, origins=(store.url,)) as provider:
            waits.begin()
            error = await failure(provider, job(SCHNELL, stream=stream))
        assert len(store.requests) == 4
    assert (error.code, error.retry, waits) == ("provider_unavailable", NEVER, [0.5, 1.0, 2.0])
    assert len(rig.requests) == 1


async def test_a_link_instead_of_base64_is_fetched_without_the_key(rig: Rig) -> None:
    async with FaultUpstream() as store:
        store.script(Reply(503), Reply(steps=(make_image()[:40], Stop.CLOSE)))
        store.default = delivered(make_image())
        link = {"type": "url", "url": f"{store.url}/bfl/delivery/T1/sample.png?sig=1"}
        rig.script(Item(link), Item(link))
        error = await failure(rig.provider, job(SCHNELL))
        assert (error.code, error.retry) == ("provider_failed", NEVER)
        assert store.requests == []
        async with open_provider(Together, rig.together_base_url, origins=(store.url,)) as trusting:
            assert await draw_image(trusting, job(SCHNELL)) == (make_image(), "image/png")
        assert len(store.requests) == 3
        assert all(KEY not in str(dict(download.headers)) for download in store.requests)
    assert len(rig.requests) == 2
