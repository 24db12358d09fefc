"""Downloads of media: their headers, parts and ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from gateway.app import open_rest
from pomelo.call import Call
from pomelo.gen.v1.media_pb2 import Media
from pomelo.in_flight import InFlightLimits
from tests.gateway.door import SOUND, Door

OpenDoor = Callable[..., AbstractAsyncContextManager[Door]]
TTS = {"model": "eleven-labs-tts", "text": "Hi", "voice": "adam", "response_format": "url"}


async def link_of(door: Door) -> str:
    """The signed link to new audio."""
    async with door.ask(TTS) as answer:
        url = (await answer.json())["audio"]["url"]
    assert isinstance(url, str)
    return url


async def test_a_download_may_be_kept_by_its_caller_and_by_no_shared_cache(door: Door) -> None:
    url = await link_of(door)
    name = url.rpartition("/")[2].partition("?")[0]
    async with door.http.get(url) as answer:
        assert answer.headers["Cache-Control"] == "private"
        assert answer.headers["Content-Disposition"] == f'inline; filename="{name}"'
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert answer.headers["X-Request-Id"]


async def test_a_part_is_not_sent_where_it_depends_on_the_version(door: Door) -> None:
    url = await link_of(door)
    async with door.http.get(url, headers={"Range": "bytes=0-9", "If-Range": '"x"'}) as answer:
        assert (answer.status, await answer.read()) == (200, SOUND)
        assert "Content-Range" not in answer.headers


async def test_a_head_request_has_the_headers_of_the_part_and_no_bytes(door: Door) -> None:
    path = (await link_of(door)).removeprefix(door.url)
    got = await door.raw(
        f"HEAD {path} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-9\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206 ")
    assert b"Content-Length: 10" in head.split(b"\r\n")
    assert body == b""


async def test_a_download_by_key_is_in_flight_only_while_it_runs(opened: OpenDoor) -> None:
    async with opened(in_flight=InFlightLimits(account_calls=1)) as door:
        own = (await link_of(door)).partition("?")[0]
        for _ in range(3):
            async with door.http.get(own, headers=door.headers) as answer:
                assert (answer.status, await answer.read()) == (200, SOUND)
        async with door.http.get(own + "x", headers=door.headers) as answer:
            assert answer.status == 404
        assert await link_of(door)


async def test_the_place_of_a_download_by_link_is_free_once_it_has_ended(opened: OpenDoor) -> None:
    async with opened(max_links=1) as door:
        url = await link_of(door)
        for _ in range(3):
            async with door.http.get(url) as answer:
                assert (answer.status, await answer.read()) == (200, SOUND)


class Cut:
    """A media service whose files end before their size."""

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, Any]]:
        """Opens a file of ten bytes that has three."""

        async def pieces() -> AsyncIterator[bytes]:
            yield b"abc"

        yield Media(media_id=media_id, content_type="image/png", size_bytes=10), pieces()


async def test_a_download_that_is_cut_short_can_not_look_complete(door: Door) -> None:
    cut: Any = Cut()
    services = replace(door.services, media=cut)
    async with (
        open_rest(services, None, "127.0.0.1", 0) as (host, port),
        door.http.get(f"http://{host}:{port}/media/media_1.png?sig=x") as answer,
    ):
        assert (answer.status, answer.headers["Content-Length"]) == (200, "10")
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionResetError)):
            await answer.read()
