"""Connections over TLS: unfinished handshakes time out, count, and can be evicted."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any, cast

from gateway.connections.tls import _Between
from tests.certificates import trusting
from tests.gateway.gateway_app import GatewayApp, OpenApp
from tests.gateway.requests import HI, TTS, headers_of, raw_get, raw_task, read_until_closed
from tests.gateway.scripts import play, text_events
from tests.unit.loop import iterations


class Tls(asyncio.BufferedProtocol):
    """TLS's protocol with a small buffer. `on_resume` is called when the writer may go on."""

    def __init__(self) -> None:
        self.received = b""
        self.on_resume: Callable[[], None] = lambda: None
        self._buffer = bytearray(3)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.received += self._buffer[:nbytes]

    def eof_received(self) -> bool:
        return True

    def pause_writing(self) -> None: ...

    def resume_writing(self) -> None:
        self.on_resume()


def between(tls: Tls) -> tuple[_Between, Any]:
    """Returns the protocol of a TCP transport below `tls`, and the transport."""
    transport = SimpleNamespace(
        get_protocol=lambda: tls, set_protocol=lambda protocol: None, is_closing=lambda: False
    )
    return _Between(), transport


async def test_what_arrives_before_tls_starts_is_passed_on_in_order() -> None:
    tls = Tls()
    protocol, transport = between(tls)
    for data in (b"a hand", b"shake"):
        protocol.get_buffer(-1)[: len(data)] = data
        protocol.buffer_updated(len(data))
    assert protocol.eof_received() is None
    protocol.attach(transport)
    await iterations()
    assert tls.received == b"a handshake"
    protocol.get_buffer(-1)[:3] = b"end"
    protocol.buffer_updated(3)
    assert tls.received == b"a handshakeend"
    assert protocol.eof_received() is True


async def test_a_writer_waits_on_if_tls_fills_the_transport_with_what_it_kept_back() -> None:
    tls = Tls()
    protocol, transport = between(tls)
    protocol.attach(transport)
    states: list[str] = []
    protocol.connection = cast(
        Any,
        SimpleNamespace(
            pause_writing=lambda: states.append("paused"), resume_writing=lambda: states.append("resumed")
        ),
    )
    protocol.pause_writing()
    tls.on_resume = protocol.pause_writing
    protocol.resume_writing()
    assert states == ["paused"]
    tls.on_resume = lambda: None
    protocol.resume_writing()
    assert states == ["paused", "resumed"]


async def is_served(gateway: GatewayApp) -> bool:
    """Returns whether a request over TLS is answered."""
    url = f"https://{gateway.host}:{gateway.port}/api/v1/account"
    async with gateway.http.get(url, headers=gateway.headers, ssl=trusting()) as response:
        return response.status == 200


async def test_an_unfinished_tls_handshake_times_out(
    open_gateway: OpenApp, certificate: ssl.SSLContext
) -> None:
    async with open_gateway(tls=certificate, untrusted_timeout=0.5) as gateway:
        loop = asyncio.get_running_loop()
        for data in (b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n\r\n"):
            async with gateway.connect(data) as (reader, _):
                begin = loop.time()
                await read_until_closed(reader)
                assert loop.time() - begin < 9
        assert await is_served(gateway)
        async with gateway.connect(ssl=trusting()) as (reader, _):
            assert await read_until_closed(reader) == b""


async def test_connections_in_a_tls_handshake_count_and_can_be_evicted(
    open_gateway: OpenApp, certificate: ssl.SSLContext
) -> None:
    async with open_gateway(tls=certificate, max_connections=3) as gateway, AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(gateway.connect()) for _ in range(4)]
        assert await read_until_closed(silent[0][0]) == b""
        assert await is_served(gateway)
        assert await read_until_closed(silent[1][0]) == b""


async def test_a_media_link_over_tls_is_https(open_gateway: OpenApp, certificate: ssl.SSLContext) -> None:
    async with open_gateway(tls=certificate) as gateway:
        url = f"https://{gateway.host}:{gateway.port}"
        task = gateway.http.post(f"{url}/api/v1/task", json=TTS, headers=gateway.headers, ssl=trusting())
        async with task as response:
            assert (await response.json())["audio"]["url"].startswith(f"{url}/media/")


async def test_only_responses_over_tls_ask_browsers_to_use_tls(
    open_gateway: OpenApp, certificate: ssl.SSLContext, gateway: GatewayApp
) -> None:
    asked = {
        200: raw_task(HI | {"stream": True}),
        401: raw_get("/api/v1/account"),
        404: raw_get("/nowhere"),
        405: raw_get("/api/v1/task"),
        413: raw_task(HI | {"user": "x" * 2000}),
        400: b"no request\r\n\r\n",
    }
    async with open_gateway(tls=certificate, json_limit=1000) as secure:
        for status, data in asked.items():
            async with secure.connect(data, ssl=trusting()) as (reader, _):
                head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d " % status) or status == 400
            assert headers_of(head)["strict-transport-security"] == "max-age=31536000"
        for fields in (b"X: " + b"x" * 40_000, b"".join([b"X%d: %400d\r\n" % (n, n) for n in range(100)])):
            async with secure.connect(b"GET / HTTP/1.1\r\n" + fields, ssl=trusting()) as (reader, _):
                head = await reader.readuntil(b"\r\n\r\n")  # no request was parsed
                assert headers_of(head)["strict-transport-security"] == "max-age=31536000"
    async with gateway.get("/api/v1/account") as response:
        assert "Strict-Transport-Security" not in response.headers


async def test_an_unfinished_handshake_of_a_crowded_address_has_three_times_the_grace(
    open_gateway: OpenApp, certificate: ssl.SSLContext
) -> None:
    options = {"tls": certificate, "max_untrusted": 1, "untrusted_grace": 0.5, "untrusted_timeout": 60}
    async with (
        open_gateway(**options) as gateway,
        gateway.connect(b"\x16\x03\x01\x02\x00\x01") as (older, _),
        gateway.connect(),
    ):
        begin = asyncio.get_running_loop().time()
        assert await read_until_closed(older) == b""
        assert asyncio.get_running_loop().time() - begin > 1.2


async def test_a_stream_whose_first_event_is_its_last_begins_with_its_head(
    open_gateway: OpenApp, certificate: ssl.SSLContext
) -> None:
    async with open_gateway(tls=certificate) as gateway:
        gateway.provider.script = play(text_events("one")[-1])
        asked = raw_task({**HI, "stream": True})
        async with gateway.connect(asked, ssl=trusting()) as (reader, _):
            received = await reader.read()
    assert received.startswith(b"HTTP/1.1 200 ")
    assert b"data: [DONE]\n\n" in received
