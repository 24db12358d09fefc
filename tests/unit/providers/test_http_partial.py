"""Responses that are read in part: refusals with an endless body, and files that break off."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from yarl import URL

from pomelo.providers.base import CALLER, VENDOR_CALL, VendorCall
from pomelo.providers.errors import UpstreamError
from pomelo.providers.http import client
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.downloads import Downloader
from pomelo.providers.http.errors import ErrorBody, ErrorMapping
from tests.unit.providers.raw_server import CHAT, OK, Peer, raw_server, sends

ENDLESS = b"HTTP/1.1 %b\r\nTransfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b"x" * 1_000 + b"\r\n"
HALF = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nConnection: close\r\n\r\n{}"


async def test_no_more_of_a_body_is_read_than_is_wanted() -> None:
    async with (
        raw_server(sends(ENDLESS % b"200 OK", close=False)) as server,
        Http() as http,
        http.stream_bytes(server.url, {}, b"{}", CHAT) as body,
    ):
        assert await body.read_all(999) == b"x" * 1_000
        assert not body.ended


async def test_the_body_of_a_redirection_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ERROR_BODY_TIMEOUT", 3600.0)
    redirection = ENDLESS % b"302 Found"
    async with raw_server(sends(redirection, close=False)) as server, Http(Timeouts(silence=60)) as http:
        with pytest.raises(UpstreamError) as raised:
            await http.request_json(server.url, {}, b"{}", CHAT)
        assert raised.value.reason.startswith("the vendor redirected")
        assert await server.peers[0].left()


async def test_a_file_that_breaks_off_is_downloaded_again() -> None:
    replies = [HALF, HALF, OK]

    async def answer(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(replies.pop(0))
        await peer.writer.drain()

    async with raw_server(answer) as server, Http() as http:
        base = str(server.url.origin())
        downloader = Downloader(http, base, "acme.example", waits=(0.0, 0.0))
        assert await downloader.fetch(str(URL(base) / "file"), CHAT) == b"{}"
        assert len(server.peers) == 3


async def test_a_call_that_gets_no_response_has_not_the_status_of_the_one_before() -> None:
    call = VendorCall()
    VENDOR_CALL.set(call)
    async with Http() as http:
        async with raw_server(sends(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")) as server:
            with pytest.raises(UpstreamError):
                await http.request_json(server.url, {}, b"{}", CHAT)
        assert call.status == 503
        with pytest.raises(UpstreamError):
            await http.request_json(server.url, {}, b"{}", CHAT)
        assert call.status == 0


@pytest.mark.parametrize("http_status", [b"200 OK", b"503 Busy"])
async def test_a_call_has_the_head_of_its_last_response(http_status: bytes) -> None:
    call = VendorCall()
    VENDOR_CALL.set(call)
    head = b"HTTP/1.1 %b\r\nX-Request-Id: req_%d\r\nContent-Length: 2\r\n\r\n{}"
    async with raw_server(sends(*(head % (http_status, n) for n in (1, 2)))) as server, Http() as http:
        for number in (1, 2):
            with suppress(UpstreamError):
                await http.request_json(server.url, {"X-Key": f"secret-key-{number}"}, b"{}", CHAT)
            assert (call.status, call.request_id) == (int(http_status[:3]), f"req_{number}")
            assert call.token(f"secret-key-{number}") == ""


async def test_an_error_body_above_the_limit_of_a_response_is_not_read() -> None:
    """It may repeat the request, which may have several images."""
    mapping = ErrorMapping("acme", lambda body: ErrorBody((body["code"],)), {"busy": "provider_unavailable"})
    frame = b'{"more":"%b","code":"busy"}'
    for size, code in (
        (client.MAX_BODY_BYTES, "provider_unavailable"),
        (client.MAX_BODY_BYTES + 1, "provider_failed"),
    ):
        body = frame % (b"x" * (size - len(frame % b"")))
        head = b"HTTP/1.1 400 No\r\nContent-Length: %d\r\n\r\n" % len(body)
        async with raw_server(sends(head + body)) as server, Http() as http:
            with pytest.raises(UpstreamError) as failure:
                await http.request_json(server.url, {}, b"{}", mapping)
        assert failure.value.code == code


async def test_a_connection_belongs_to_the_account_that_is_served() -> None:
    limiter = ConnectionLimiter(20)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
    async with raw_server(sends(head, close=False)) as server, Http(connections=limiter) as http:
        CALLER.set("ann")
        async with http.stream_bytes(server.url, {}, b"{}", CHAT):
            (host,) = limiter._hosts.items()
            assert host[0] == f"127.0.0.1:{server.url.port}"
            assert host[1].used == {"ann": 1}
    assert limiter.in_use == 0


async def test_an_error_body_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_ERROR_BODY_TIMEOUT", 0.05)
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 99\r\n\r\n{"
    async with (
        raw_server(sends(busy, close=False)) as server,
        Http(Timeouts(silence=3600, whole=3600)) as http,
        asyncio.timeout(20),
    ):
        with pytest.raises(UpstreamError) as failure:
            await http.request_json(server.url, {}, b"{}", CHAT)
    assert failure.value.code == "provider_unavailable"


async def test_a_refusal_whose_body_breaks_off_is_that_refusal() -> None:
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 99\r\n\r\n{"
    async with raw_server(sends(busy)) as server, Http() as http:
        with pytest.raises(UpstreamError) as failure:
            await http.request_json(server.url, {}, b"{}", CHAT)
    assert failure.value.code == "provider_unavailable"
    assert "503" in failure.value.note


async def test_a_body_of_exactly_the_limit_is_read_to_its_end() -> None:
    async with (
        raw_server(sends(OK, close=False)) as server,
        Http() as http,
        http.stream_bytes(server.url, {}, b"{}", CHAT) as body,
    ):
        assert await body.read_all(2) == b"{}"
        assert body.ended


async def test_an_event_that_lacks_its_last_line_end_is_read_at_the_end() -> None:
    stream = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: 1\n\ndata: 2"
    async with (
        raw_server(sends(stream)) as server,
        Http() as http,
        http.stream_events(server.url, {}, b"{}", CHAT) as events,
    ):
        assert [await events.read() for _ in range(3)] == [[("", b"1")], [("", b"2")], []]


@pytest.mark.parametrize("header", ["Authorization", "x-key"])
async def test_a_vendor_that_repeats_the_key_as_a_code_or_an_id_is_not_reported(header: str) -> None:
    call = VendorCall()
    VENDOR_CALL.set(call)
    body = b'{"error": {"message": "no", "code": "sk-of-the-operator"}}'
    head = b"HTTP/1.1 400 No\r\nx-request-id: Bearer_sk-of-the-operator\r\nContent-Length: %d\r\n\r\n"
    sent = {header: "Bearer sk-of-the-operator", "Accept": "*/*"}
    async with Http() as http, raw_server(sends(head % len(body) + body)) as server:
        with pytest.raises(UpstreamError) as caught:
            await http.request_json(server.url, sent, b"{}", CHAT)
    assert (call.request_id, caught.value.vendor_code) == ("", "")
    assert "sk-of" not in caught.value.note + caught.value.reason
    assert call.token("sk-of-the-operator") == call.token("the-operator") == ""
    assert (call.token("req_0d1f"), call.token("invalid_api_key"), call.token("two words")) == (
        "req_0d1f",
        "invalid_api_key",
        "",
    )
