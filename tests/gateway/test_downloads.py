"""Downloads of media: signed links, headers, ranges, truncated files, and how many may run."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from ipaddress import ip_network
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from gateway.connections.connection import Connection
from gateway.media import byte_range, public_links, requested_range
from pomelo.call import Call
from pomelo.gen.v1.media_pb2 import Media
from pomelo.runtime.in_flight import InFlightLimits
from tests.gateway.flow import open_clients
from tests.gateway.gateway_app import AUDIO, GatewayApp, OpenApp
from tests.gateway.requests import ACCOUNT, HEALTH, code_of, raw_get, read_response, read_status
from tests.unit.telemetry.reports import Reports
from tests.waiting import until


def test_other_links_and_links_without_a_public_url_stay_unchanged() -> None:
    link = public_links("https://pomelo.example")
    assert link("https://cdn.example/x.png") == "https://cdn.example/x.png"
    assert link("") == ""
    assert public_links("")("http://a/media/m") == "http://a/media/m"


@pytest.mark.parametrize("base", ["https://cdn.example/media", "https://media", "https://media/media/media"])
def test_a_public_url_may_contain_media(base: str) -> None:
    for before in ("http://10.0.0.1:8080", base, "http://media"):
        url = f"{before}/media/media_1.png?exp=1&sig=Ab-_"
        assert public_links(f"{base}/")(url) == f"{base}/media/media_1.png?exp=1&sig=Ab-_"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("Bytes=0-0", (0, 1)),
        ("bytes=10-", (10, 100)),
        ("bytes=90-200", (90, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-200", (0, 100)),
        ("bytes=100-", (100, 100)),
        ("bytes=200-300", (100, 100)),
        ("bytes=-0", (100, 100)),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("bytes=0-1,5-6", None),
        ("lines=0-1", None),
        (None, None),
    ],
)
def test_a_range_selects_bytes_or_none_and_an_invalid_one_selects_the_complete_file(
    header: str | None, expected: tuple[int, int] | None
) -> None:
    requested = requested_range(header)
    assert (requested and byte_range(requested, 100)) == expected


async def test_a_signed_link_supports_ranges_and_head_and_requires_its_signature(gateway: GatewayApp) -> None:
    url = await gateway.link()
    async with gateway.http.get(url, headers={"Range": "bytes=10-19"}) as part:
        assert (part.status, await part.read()) == (206, AUDIO[10:20])
        assert part.headers["Content-Range"] == f"bytes 10-19/{len(AUDIO)}"
        assert part.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    async with gateway.http.head(url) as head:
        assert head.headers["Content-Length"] == str(len(AUDIO))
        assert head.headers["Content-Type"] == "audio/mpeg"
    bare, _, query = url.partition("?")
    assert await code_of(gateway.http.get(f"{bare}?{query[:-1]}")) == (404, "not_found")
    assert await code_of(gateway.http.get(bare)) == (401, "invalid_api_key")
    async with gateway.http.get(bare, headers=gateway.headers) as own:
        assert await own.read() == AUDIO
    assert await code_of(gateway.http.get(f"{gateway.url}/media/..%2f..%2fetc?{query}")) == (404, "not_found")


async def test_a_download_may_be_cached_only_by_its_caller(gateway: GatewayApp) -> None:
    url = await gateway.link()
    name = url.rpartition("/")[2].partition("?")[0]
    async with gateway.http.get(url) as response:
        private, _, seconds = response.headers["Cache-Control"].partition(", max-age=")
        assert private == "private"
        assert 3500 <= int(seconds) <= 3600
        assert response.headers["Content-Disposition"] == f'inline; filename="{name}"'
        assert response.headers["Accept-Ranges"] == "bytes"
        assert response.headers["X-Request-Id"]


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"If-Range": '"x"'}, 200),
        ({"If-Range": "Thu, 26 Nov 2026 12:00:00 GMT"}, 200),
        ({"If-Range": "TAG"}, 206),
        ({"If-Range": "W/TAG"}, 200),
        ({"If-None-Match": '"x"'}, 206),
    ],
)
async def test_a_range_of_a_file_that_may_have_changed_gets_the_complete_file(
    gateway: GatewayApp, asked: dict[str, str], status: int
) -> None:
    url = await gateway.link()
    async with gateway.http.head(url) as response:
        tag = response.headers["ETag"]
    headers = {name: value.replace("TAG", tag) for name, value in asked.items()} | {"Range": "bytes=0-9"}
    async with gateway.http.get(url, headers=headers) as response:
        assert (response.status, await response.read()) == (status, AUDIO[:10] if status == 206 else AUDIO)
        assert ("Content-Range" in response.headers) == (status == 206)
        assert response.headers["ETag"] == tag


@pytest.mark.parametrize("known", ["TAG", 'W/TAG, "x"', '"x",TAG', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_file_that_the_caller_has_is_not_sent_again(
    gateway: GatewayApp, known: str, method: str
) -> None:
    url = await gateway.link()
    async with gateway.http.get(url) as response:
        sent = response.headers
    path = url.removeprefix(gateway.url)
    asked = raw_get(path, f"If-None-Match: {known.replace('TAG', sent['ETag'])}", "Range: bytes=0-9")
    async with gateway.connect(asked.replace(b"GET", method.encode()) + HEALTH) as (reader, _):
        status, headers, body = await read_response(reader)
        assert await read_status(reader) == 200  # nothing but the head was sent
    assert (status, body) == (304, b"")
    assert headers["etag"] == sent["ETag"]
    # A browser replaces what it has stored. The link's remaining lifetime shrinks from second to second.
    assert headers["content-security-policy"] == sent["Content-Security-Policy"]
    assert "default-src 'none'" in sent["Content-Security-Policy"]  # a page of a caller runs no script
    assert 3500 <= int(headers["cache-control"].removeprefix("private, max-age=")) <= 3600
    assert "content-length" not in headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_range_outside_the_file_is_refused_with_its_size(gateway: GatewayApp, method: str) -> None:
    url = await gateway.link()
    headers = {"Range": f"bytes={len(AUDIO)}-"}
    async with gateway.http.request(method, url, headers=headers) as response:
        assert response.status == 416
        assert response.headers["Content-Range"] == f"bytes */{len(AUDIO)}"
        assert response.headers["Cache-Control"] == "no-store"
        if method == "GET":
            error = (await response.json())["error"]
            assert (error["code"], "Range" in error["message"]) == ("invalid_parameter", True)
    async with gateway.http.get(url) as response:
        assert await response.read() == AUDIO


async def test_a_file_that_is_requested_with_a_key_may_be_cached_until_it_expires(
    gateway: GatewayApp,
) -> None:
    own = (await gateway.link()).partition("?")[0]
    async with gateway.http.get(own, headers=gateway.headers) as response:
        assert 3500 <= int(response.headers["Cache-Control"].removeprefix("private, max-age=")) <= 3600


async def test_a_head_request_gets_the_headers_of_the_range_without_bytes(gateway: GatewayApp) -> None:
    path = (await gateway.link()).removeprefix(gateway.url)
    sent = raw_get(path, "Range: bytes=0-9", "Connection: close").replace(b"GET", b"HEAD")
    head, _, body = (await gateway.exchange(sent)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 206 ")
    assert b"Content-Length: 10" in head.split(b"\r\n")
    assert body == b""


# --- truncated files


class OneFile:
    """A media service with one file, which claims to have `size` bytes and expires at `expires`, in Unix seconds.
    `offsets` are those from which it was read."""

    def __init__(self, data: bytes = b"abc", size: int = 3, expires: float = 0) -> None:
        self.data = data
        self.size = size
        self.expires = Timestamp(seconds=int(expires))
        self.offsets: list[int] = []

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, Any]]:
        async def pieces() -> AsyncIterator[bytes]:
            yield self.data[offset:]

        self.offsets.append(offset)
        media = Media(id=media_id, content_type="image/png", size_bytes=self.size, expire_time=self.expires)
        yield media, pieces()


async def test_a_truncated_download_can_not_look_complete(gateway: GatewayApp) -> None:
    async with (
        gateway.over(media=OneFile(size=10)) as scripted,
        gateway.http.get(f"{scripted.url}/media/media_1.png?sig=x") as response,
    ):
        assert (response.status, response.headers["Content-Length"]) == (200, "10")
        with pytest.raises((aiohttp.ClientPayloadError, ConnectionResetError)):
            await response.read()


@pytest.mark.parametrize(
    ("query", "left"), [("", 100), ("", -5), ("?exp={}&sig=x", 100), ("?exp=7&sig=x", 0)]
)
async def test_a_file_may_be_cached_until_its_link_or_it_expires(
    gateway: GatewayApp, query: str, left: int
) -> None:
    until = time.time() + left
    async with gateway.over(media=OneFile(expires=0 if query else until)) as scripted:
        url = f"{scripted.url}/media/media_1.png{query.format(int(until))}"
        async with gateway.http.get(url, headers={} if query else gateway.headers) as response:
            seconds = int(response.headers["Cache-Control"].removeprefix("private, max-age="))
            assert await response.read() == b"abc"
    assert max(0, left - 20) <= seconds <= max(0, left)


async def test_the_bytes_before_a_range_are_not_read(gateway: GatewayApp) -> None:
    media = OneFile(bytes(range(100)), 100)
    async with gateway.over(media=media) as scripted:
        for headers, expected in (
            ({"Range": "bytes=97-"}, [97, 98, 99]),
            ({"Range": "bytes=97-98"}, [97, 98]),
            ({"Range": "bytes=-2"}, [98, 99]),
            ({"Range": "bytes=97-", "If-Range": '"x"'}, list(range(100))),
            ({"Range": "bytes=97-96"}, list(range(100))),
        ):
            url = f"{scripted.url}/media/media_1.png?sig=x"
            async with gateway.http.get(url, headers=headers) as response:
                assert list(await response.read()) == expected
    assert media.offsets == [97, 97, -2, 0, 0]


class EndlessMedia:
    """A media service with one large file; `sent` are the bytes of it that were taken."""

    sent = 0

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, Any]]:
        async def pieces() -> AsyncIterator[bytes]:
            while True:
                self.sent += 65_536
                yield bytes(65_536)

        yield Media(id=media_id, content_type="image/png", size_bytes=10**9), pieces()


async def test_little_is_buffered_for_a_client_that_does_not_read_its_download(gateway: GatewayApp) -> None:
    media = EndlessMedia()
    async with gateway.over(media=media) as scripted:
        with socket.socket() as quiet:
            quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            quiet.connect((scripted.host, scripted.port))
            quiet.sendall(raw_get("/media/media_1.png?sig=x"))
            before = -1
            while before < media.sent or not media.sent:
                before = media.sent
                await asyncio.sleep(0.3)
        assert media.sent < 1_200_000


# --- how many may run


async def test_a_download_by_key_counts_as_in_flight_only_while_it_runs(open_gateway: OpenApp) -> None:
    async with open_gateway(in_flight=InFlightLimits(account_calls=1)) as gateway:
        own = (await gateway.link()).partition("?")[0]
        for _ in range(3):
            async with gateway.http.get(own, headers=gateway.headers) as response:
                assert (response.status, await response.read()) == (200, AUDIO)
        assert (await code_of(gateway.http.get(own + "x", headers=gateway.headers)))[0] == 404
        assert await gateway.link()


async def test_a_finished_download_by_link_frees_its_slot(open_gateway: OpenApp) -> None:
    async with open_gateway(max_downloads=1) as gateway:
        url = await gateway.link()
        for _ in range(3):
            async with gateway.http.get(url) as response:
                assert (response.status, await response.read()) == (200, AUDIO)


async def test_concurrent_downloads_by_links_are_limited(open_gateway: OpenApp) -> None:
    async with open_gateway(max_downloads=2) as gateway:
        url = await gateway.link()
        name = url.rpartition("/")[2].partition("?")[0]
        (file,) = gateway.media.folder.glob(f"*{name.partition('.')[0]}*")
        file.write_bytes(bytes(20_000_000))
        async with gateway.connect(raw_get(url.removeprefix(gateway.url)), limit=4096) as (reader, _):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            assert await code_of(gateway.http.get(url)) == (503, "overloaded")
            async with gateway.http.get(url.partition("?")[0], headers=gateway.headers) as own:
                assert own.status == 200
                own.close()
        async with asyncio.timeout(20):
            while (await gateway.http.head(url)).status != 200:
                pass


async def test_downloads_by_links_are_limited_in_all_and_half_of_them_for_one_address(
    gateway: GatewayApp,
) -> None:
    async with AsyncExitStack() as stack:
        endless = await stack.enter_async_context(gateway.over(max_downloads=4, media=EndlessMedia()))
        for host, status in ((2, 200), (2, 200), (2, 503), (3, 200), (4, 200), (5, 503)):
            asked = endless.connect(
                raw_get("/media/media_1.png?sig=x"), limit=4096, local_addr=(f"127.0.0.{host}", 0)
            )
            reader, _ = await stack.enter_async_context(asked)
            assert (await reader.readline()).split()[1] == b"%d" % status


async def test_a_connection_stays_open_while_a_signed_link_is_downloaded(open_gateway: OpenApp) -> None:
    async with open_gateway(untrusted_timeout=1.0) as gateway:
        asked = raw_get((await gateway.link()).removeprefix(gateway.url))
        async with gateway.connect() as (reader, writer):
            loop = asyncio.get_running_loop()
            begin = loop.time()
            while loop.time() - begin < 1.6:
                writer.write(asked)
                assert (await read_response(reader))[2] == AUDIO
                await asyncio.sleep(0.2)  # an idle downloader


async def test_the_addresses_of_one_network_share_their_downloads(gateway: GatewayApp) -> None:
    proxies = (ip_network("127.0.0.1/32"),)
    async with AsyncExitStack() as stack:
        endless = await stack.enter_async_context(
            gateway.over(max_downloads=4, media=EndlessMedia(), trusted_proxies=proxies)
        )
        for address, status in (("1::1", 200), ("1::2", 200), ("1::3", 503), ("2::1", 200)):
            asked = raw_get("/media/media_1.png?sig=x", f"X-Forwarded-For: 2001:db8:{address}")
            reader, _ = await stack.enter_async_context(endless.connect(asked, limit=4096))
            assert (await reader.readline()).split()[1] == b"%d" % status


async def test_a_connection_belongs_to_the_owner_of_the_key_or_to_those_who_have_the_link(
    gateway: GatewayApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: list[object] = []
    monkeypatch.setattr(Connection, "trust", lambda connection, owner: owners.append(owner))
    url = await gateway.link()
    for target, headers in ((url, {}), (url.partition("?")[0], gateway.headers)):
        async with gateway.http.get(target, headers=headers) as response:
            assert response.status == 200
    assert owners[-2:] == [("link", "127.0.0.1"), "default"]


async def test_a_connection_of_an_account_belongs_to_a_link_once_it_downloads_by_it(
    gateway: GatewayApp,
) -> None:
    link = urlsplit(await gateway.link())
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(b"")
        client.read_everything()
        download = raw_get(f"{link.path}?{link.query}")

        def answered(count: int) -> bool:
            return client.received.count(b"HTTP/1.1 200 ") == count

        for count, asked, owner in ((1, ACCOUNT, "default"), (2, download, ("link", ""))):
            client.connection.data_received(asked)
            await until(partial(answered, count))
            assert client.connection.slot.owner == owner


async def test_a_download_is_reported_with_its_status(gateway: GatewayApp) -> None:
    reports, link = Reports(), urlsplit(await gateway.link())
    async with open_clients(gateway.services, observers=[reports]) as clients:
        client = await clients.connect(raw_get(f"{link.path}?{link.query}"))
        client.read_everything()
        await until(lambda: reports.calls)
    assert [(report.code, report.http_status) for report in reports.calls] == [("", 200)]
