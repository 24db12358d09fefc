"""Raw images, in one process and through a gateway: of every size, and with the adjustments of their route."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.errors import PomeloError
from pomelo.testing import FaultUpstream, Received, Reply
from pomelo.testing.bfl_protocol import Drawing, delivered
from pomelo.testing.images import make_image
from pomelo.testing.together_protocol import error_reply
from tests.app import RunningApp, app_fixture, run_app
from tests.driver import REST_PROTOCOL

MIB = 1024 * 1024
FLUX = {"model": "flux-1-pro", "prompt": "A kite", "output_format": "png"}
RAW = {"Accept": "image/png"}

app = app_fixture()


def png(size: int) -> bytes:
    """Returns a PNG of at least `size` bytes, nearly all in a chunk that readers ignore."""
    small = make_image("png")
    content = b"teSt" + bytes(size)
    filler = struct.pack(">I", size) + content + struct.pack(">I", zlib.crc32(content))
    return small[:-12] + filler + small[-12:]


LARGE = png(24 * MIB)
"""Too large to be in a result."""


@REST_PROTOCOL
@pytest.mark.parametrize("image", [png(1000), LARGE], ids=["small", "large"])
@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "raw"}], ids=["", "kept"])
async def test_a_raw_image_is_complete_whatever_its_size(
    app: RunningApp, protocol: str, image: bytes, headers: dict[str, str]
) -> None:
    app.upstream.default = Drawing(delivery=(delivered(image),))
    caller = await app.account()
    cost = ""
    for _ in range(2 if headers else 1):  # the second response is a replay
        answer = await app.post(protocol, caller.live, headers=RAW | headers, json=FLUX)
        assert (answer.status, answer.content_type) == (200, "image/png")
        assert answer.headers["Content-Length"] == str(len(image))
        assert "X-Request-Id" in answer.headers
        cost = cost or answer.headers["X-Credits-Charged"]
        assert await answer.read() == image
    assert len(await app.records(caller)) == 1
    assert float(cost) > 0


@REST_PROTOCOL
async def test_a_large_image_has_a_link_in_every_other_response(app: RunningApp, protocol: str) -> None:
    app.upstream.default = Drawing(delivery=(delivered(LARGE),))
    caller = await app.account()
    inline = FLUX | {"response_format": "b64_json"}
    for path, body, key in (
        ("/api/v1/task", inline, {}),
        ("/api/v1/task", inline, {"Idempotency-Key": "whole"}),
        ("/api/v1/task", inline | {"stream": True}, {}),
        ("/api/v1/task", inline | {"stream": True}, {"Idempotency-Key": "streamed"}),
        ("/v1/images/generations", inline, {}),
        ("/v1/images/generations", inline | {"stream": True}, {"Idempotency-Key": "events"}),
    ):
        for _ in range(2 if key else 1):
            headers = {"Authorization": f"Bearer {caller.live}", **key}
            async with app.session.post(app.urls[protocol] + path, json=body, headers=headers) as answer:
                text = await answer.text()
            assert answer.status == 200, text
            assert "b64_json" not in text
            url = text.partition('"url":"')[2].partition('"')[0]
            async with app.session.get(url) as file:
                assert await file.read() == LARGE


@REST_PROTOCOL
async def test_a_large_raw_image_that_is_cut_can_not_look_complete(app: RunningApp, protocol: str) -> None:
    app.upstream.default = Drawing(delivery=(delivered(LARGE),))
    caller = await app.account()
    before = app.media()
    headers = {"Authorization": f"Bearer {caller.live}", **RAW}
    url = f"{app.urls[protocol]}/api/v1/task"
    async with asyncio.timeout(20), app.session.post(url, json=FLUX, headers=headers) as answer:
        assert answer.status == 200
        (path,) = app.media() - before
        with path.open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


@REST_PROTOCOL
async def test_a_large_raw_image_that_can_not_be_read_is_answered_with_its_link(
    app: RunningApp, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.upstream.default = Drawing(delivery=(delivered(LARGE),))
    caller = await app.account()

    async def busy(*_: Any) -> None:
        raise PomeloError("overloaded")

    with monkeypatch.context() as patch:
        patch.setattr("pomelo.media.store.MediaStore.open", busy)
        answer = await app.post(protocol, caller.live, headers=RAW, json=FLUX)
        assert (answer.status, answer.content_type) == (200, "application/json")
        url = (await answer.json())["data"][0]["url"]
    assert len(await app.records(caller)) == 1
    async with app.session.get(url) as file:
        assert await file.read() == LARGE


# --- adjustments


@pytest.fixture
async def two_routes(tmp_path: Path) -> AsyncIterator[RunningApp]:
    """An app in which the first route of flux-1-schnell fails."""

    def fail(received: Received) -> Reply:
        return error_reply(429, "rate_limit")

    async with FaultUpstream() as other:
        settings = {"replicate_api_key": "r-x", "replicate_base_url": other.replicate_base_url}
        async with run_app(tmp_path, settings=settings) as opened:
            opened.upstream.default = fail
            yield opened


@REST_PROTOCOL
async def test_raw_media_report_the_adjustments_of_the_route_that_answers(
    two_routes: RunningApp, protocol: str
) -> None:
    caller = await two_routes.account()
    body = {"model": "flux-1-schnell", "prompt": "A kite", "width": 1000, "height": 1000}
    answer = await two_routes.post(protocol, caller.live, headers=RAW, json=body)
    assert (answer.status, answer.content_type) == (200, "image/png")
    assert answer.headers["X-Pomelo-Adjusted"] == "width=1024; height=1024"
