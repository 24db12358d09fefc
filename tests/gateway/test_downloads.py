"""Downloads of media: headers, ranges and truncated files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from gateway.app import open_rest
from pomelo.call import Call
from pomelo.gen.v1.media_pb2 import Media
from pomelo.in_flight import InFlightLimits
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp

TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam", "response_format": "url"}


async def link_of(gateway: GatewayApp) -> str:
    """The signed link to new audio."""
    async with gateway.post_task(TTS) as response:
        url = (await response.json())["audio"]["url"]
    assert isinstance(url, str)
    return url


async def test_a_download_may_be_cached_only_by_its_caller(gateway: GatewayApp) -> None:
    url = await link_of(gateway)
    name = url.rpartition("/")[2].partition("?")[0]
    async with gateway.http.get(url) as response:
        assert response.headers["Cache-Control"] == "private"
        assert response.headers["Content-Disposition"] == f'inline; filename="{name}"'
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["X-Request-Id"]


async def test_a_range_with_if_range_gets_the_complete_file(gateway: GatewayApp) -> None:
    url = await link_of(gateway)
    async with gateway.http.get(url, headers={"Range": "bytes=0-9", "If-Range": '"x"'}) as response:
        assert (response.status, await response.read()) == (200, AUDIO)
        assert "Content-Range" not in response.headers


async def test_a_head_request_gets_the_headers_of_the_range_without_bytes(gateway: GatewayApp) -> None:
    path = (await link_of(gateway)).removeprefix(gateway.url)
    received = await gateway.exchange(
        f"HEAD {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206 ")
    assert b"Content-Length: 10" in head.split(b"\r\n")
    assert body == b""


async def test_a_download_by_key_counts_as_in_flight_only_while_it_runs(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_calls=1)) as gateway:
        own = (await link_of(gateway)).partition("?")[0]
        for _ in range(3):
            async with gateway.http.get(own, headers=gateway.headers) as response:
                assert (response.status, await response.read()) == (200, AUDIO)
        async with gateway.http.get(own + "x", headers=gateway.headers) as response:
            assert response.status == 404
        assert await link_of(gateway)


async def test_a_finished_download_by_link_frees_its_slot(open_gateway: OpenApp) -> None:
    async with open_gateway(max_downloads=1) as gateway:
        url = await link_of(gateway)
        for _ in range(3):
            async with gateway.http.get(url) as response:
                assert (response.status, await response.read()) == (200, AUDIO)


class TruncatedMedia:
    """A media service whose files end before their size."""

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, Any]]:
        """Opens a file of ten bytes that has three."""

        async def pieces() -> AsyncIterator[bytes]:
            yield b"abc"

        yield Media(media_id=media_id, content_type="image/png", size_bytes=10), pieces()


async def test_a_truncated_download_can_not_look_complete(gateway: GatewayApp) -> None:
    truncated: Any = TruncatedMedia()
    services = replace(gateway.services, media=truncated)
    async with (
        open_rest(services, None, "127.0.0.1", 0) as (host, port),
        gateway.http.get(f"http://{host}:{port}/media/media_1.png?sig=x") as response,
    ):
        assert (response.status, response.headers["Content-Length"]) == (200, "10")
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionResetError)):
            await response.read()
