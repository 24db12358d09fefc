"""Which links of a vendor are followed: names, addresses and connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp.abc import ResolveResult
from yarl import URL

from pomelo.errors import PomeloError
from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter, NoConnectionError
from pomelo.providers.http.downloads import Downloader, PublicResolver, is_public
from pomelo.providers.http.errors import PrivateAddressError
from pomelo.testing import FaultUpstream, Gate, Reply
from tests.providers.image_rig import listener, was_connected
from tests.unit.providers.names import Names
from tests.unit.providers.raw_server import CHAT, OK, raw_server, sends
from tests.unit.refusals import refused
from tests.unit.sleeps import Sleeps

PUBLIC = "8.8.4.4"


@asynccontextmanager
async def opened(
    names: Names | None = None, *, base: str = "https://api.acme.example/v1", origins: tuple[str, ...] = ()
) -> AsyncIterator[Downloader]:
    """Links of the vendor acme.example, with a DNS of our own."""
    names = names or Names()
    async with Http(origins=origins) as http:
        links = Downloader(http, base, "acme.example", waits=(0, 0), resolver=lambda: names)
        try:
            yield links
        finally:
            await links.aclose()


@pytest.mark.parametrize(
    "address", [PUBLIC, "1.1.1.1", "2606:4700:4700::1111", "64:ff9b::808:404", "2002:808:404::1"]
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.255.0.9",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "224.0.1.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "2001:db8::1",
        "4000::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a00:1",
        "2002:7f00:1::1",
        "2002:a00:1::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "name.example",
        "",
    ],
)
def test_any_other_address_is_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "link",
    [
        "https://api.acme.example/v1/x?id=1",
        "https://API.EU.Acme.Example/v1",
        "https://api.acme.example:443/",
        "http://127.0.0.1:8080/other/path",
    ],
)
async def test_the_vendors_hosts_and_the_operators_base_url_may_get_the_key(link: str) -> None:
    async with opened(base="http://127.0.0.1:8080/prefix/v1") as links:
        assert links.api_url(link) == URL(link, encoded=True)


NO_LINKS: list[Any] = [
    None,
    7,
    b"https://api.acme.example/",
    {"url": "https://api.acme.example/"},
    "",
    "/v1/x",
    "//api.acme.example/x",
    "api.acme.example",
    "https://",
    "https:///x",
    "https://api.acme.example:99999/",
    "https://api.acme.example:0/",
    "https://[::1/",
    "ftp://api.acme.example/",
    "file:///etc/passwd",
    "data:image/png,AAAA",
    "data:image/png;base64,A@AA",
    "https://api.acme.example/a b",
    "https://api.acme.example/\r\nX-Evil: 1",
    "https://api.acme.example\\@evil.example/",
    "https://api.acme.exämple/",
    "https://user@api.acme.example/",
    "https://user:word@api.acme.example/",
    "https://api.acme.example/" + "x" * 5000,
]


async def test_a_data_uri_is_a_file_and_never_gets_the_vendors_key() -> None:
    names = Names((PUBLIC,))
    async with opened(names) as links:
        assert await links.fetch("data:image/png;base64,AAAA", CHAT) == bytes(3)
        with pytest.raises(PomeloError):
            links.api_url("data:image/png;base64,AAAA")
    assert names.asked == []


@pytest.mark.parametrize("link", NO_LINKS)
async def test_an_invalid_link_is_refused_everywhere(link: Any) -> None:
    names = Names((PUBLIC,))
    async with opened(names) as links:
        with refused("provider_failed"):
            links.api_url(link)
        with refused("provider_failed"):
            await links.fetch(link, CHAT)
    assert names.asked == []


@pytest.mark.parametrize(
    "link",
    [
        "http://api.acme.example/",
        "https://api.acme.example:8443/",
        "https://acme.example/",
        "https://evilacme.example/",
        "https://api.acme.example.evil.example/",
        "https://api.acme.example./",
        "https://evil.example/api.acme.example",
        "https://evil.example/?x=.acme.example",
        "https://evil.example/#.acme.example",
        "https://evil.example%2F.acme.example/",
        "https://files.other.example/",
    ],
)
async def test_no_other_host_gets_the_key(link: str) -> None:
    async with opened(origins=("https://files.other.example",)) as links:
        with refused("provider_failed"):
            links.api_url(link)


@pytest.mark.parametrize(
    "link",
    [
        "http://files.example/x.png",
        "https://files.example:8443/x.png",
        "https://127.0.0.1/x.png",
        "https://8.8.4.4/x.png",
        "https://127.1/x.png",
        "https://2130706433/x.png",
        "https://0x7f000001/x.png",
        "https://0x7f.0.0.1/x.png",
        "https://0177.0.0.1/x.png",
        "https://[::1]/x.png",
        "https://[::ffff:127.0.0.1]/x.png",
        "https://localhost/x.png",
        "https://127.0.0.1./x.png",
        "https://127%2E0.0.1/x.png",
        "https://metadata/x.png",
    ],
)
async def test_a_file_is_not_fetched_from_an_ip_address_or_without_https(link: str) -> None:
    names = Names((PUBLIC,))
    async with opened(names) as links:
        with refused("provider_failed"):
            await links.fetch(link, CHAT)
    assert names.asked == [], "the name was looked up"


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",),
        ("169.254.169.254",),
        ("::1",),
        ("::ffff:127.0.0.1",),
        (PUBLIC, "127.0.0.1"),
        ("127.0.0.1", PUBLIC),
    ],
)
async def test_a_name_with_an_address_that_is_not_public_is_not_connected_to(
    addresses: tuple[str, ...],
) -> None:
    with listener() as inside:
        names = Names(addresses, port=inside.getsockname()[1])
        async with opened(names) as links:
            with pytest.raises(PomeloError) as raised:
                await links.fetch("https://files.example/x.png?sig=canary", CHAT)
            assert isinstance(raised.value, UpstreamError)
            assert raised.value.code == "provider_failed"
            assert raised.value.reason == "the vendor's response has a link to an address that is not public"
            assert "canary" not in str(raised.value)
        assert names.asked == ["files.example"]
        assert not was_connected(inside)


async def test_the_resolved_addresses_are_connected_to() -> None:
    # Without this the test above would show nothing: the same names, looked up without the check.
    with listener() as inside:
        names = Names(port=inside.getsockname()[1])
        async with Http(Timeouts(connect=0.05)).with_resolver(names) as http:
            with pytest.raises(PomeloError):
                await http.fetch(URL("https://files.example/"), {}, None, CHAT, max_bytes=9)
        assert was_connected(inside)


async def test_a_name_is_resolved_and_checked_for_each_connection() -> None:
    resolver = PublicResolver(Names((PUBLIC,), ("10.0.0.1",)))
    assert [found["host"] for found in await resolver.resolve("files.example", 443)] == [PUBLIC]
    with pytest.raises(PrivateAddressError):
        await resolver.resolve("files.example", 443)


async def test_an_unknown_host_name_is_reported_as_provider_unavailable() -> None:
    class UnknownNames(Names):
        async def resolve(self, *args: Any, **named: Any) -> list[ResolveResult]:
            self.asked.append("?")
            raise OSError("unknown host")

    names = UnknownNames()
    async with opened(names) as links:
        with refused("provider_unavailable"):
            await links.fetch("https://files.example/", CHAT)
    assert len(names.asked) == 3


async def test_closing_closes_the_resolver_and_may_be_repeated() -> None:
    names = Names(("10.0.0.1",))
    async with opened(names) as links:
        with pytest.raises(PomeloError):
            await links.fetch("https://files.example/", CHAT)
        assert not names.closed
        await links.aclose()
        assert names.closed
        await links.aclose()


async def test_an_origin_is_trusted_by_scheme_host_and_port() -> None:
    async with FaultUpstream() as store:
        store.default = Reply(steps=(b"file",))
        for origin, good in (
            (store.url, True),
            (store.url + "/", True),
            (store.url.replace("http:", "https:"), False),
            ("http://127.0.0.1", False),
            ("http://localhost:" + store.url.rpartition(":")[2], False),
            ("nonsense", False),
            ("http://[::1", False),
            ("", False),
        ):
            async with opened(origins=(origin,)) as links:
                if good:
                    assert await links.fetch(store.url + "/bfl/delivery/a", CHAT) == b"file"
                    continue
                with refused("provider_failed"):
                    await links.fetch(store.url + "/bfl/delivery/a", CHAT)


async def test_downloads_share_the_connections_of_their_client() -> None:
    limiter = ConnectionLimiter(1, max_wait=0.001)
    names = Names((PUBLIC,))
    async with Http(connections=limiter) as http:
        links = Downloader(http, "", "acme.example", waits=(), resolver=lambda: names)
        await limiter.acquire("files.example:443", "other")
        with pytest.raises(NoConnectionError):
            await links.fetch("https://files.example/x.png", CHAT)
        await links.aclose()
    assert (names.asked, limiter.refused) == ([], 1)


async def test_silence_of_a_download_times_out_as_on_a_stream() -> None:
    async with FaultUpstream() as store:
        store.default = Reply(steps=(b"fi", Gate()))
        names = Names(port=int(store.url.rpartition(":")[2]))
        async with Http(Timeouts(silence=0.05)).with_resolver(names) as http:
            with refused("deadline_exceeded"):
                await http.fetch(URL("http://files.example/bfl/delivery/a"), {}, None, CHAT, max_bytes=9)


async def test_a_download_is_repeated_after_the_wait_that_its_host_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = b"HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"
    waits = Sleeps(monkeypatch)
    async with raw_server(sends(busy, OK)) as server, opened(base=str(server.url)) as links:
        waits.begin()
        assert await links.fetch(str(server.url), CHAT) == b"{}"
    assert waits == [5]
