"""Connections to vendors: which are opened, kept, closed and refused."""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from yarl import URL

from pomelo.errors import PomeloError
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http import dns, pool
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.pool import tls_context
from pomelo.providers.http.protocol import Connection
from pomelo.testing.addresses import unanswered_connection
from tests.certificates import make_certificate
from tests.unit.providers.names import Names
from tests.unit.providers.raw_server import CHAT, OK, PAID, Peer, RawServer, outcome, raw_server, sends
from tests.waiting import cancel, until


async def ask(http: Http, server: RawServer, body: bytes | None = b"{}") -> None:
    """Sends a request that may be repeated."""
    assert await http.request_json(server.url, {}, body, CHAT) == {}


async def test_the_kernel_probes_a_vendor_that_is_silent(http: Http) -> None:
    async with raw_server(sends(OK)) as server:
        await ask(http, server)
        (connection,) = http._pool._open  # type: ignore[union-attr]
        connected = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


# --- kept connections


@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
        OK + b"HTTP/1.1 200 OK\r\n",
        OK + OK,
        OK + b"\0",
    ],
)
async def test_a_connection_is_not_kept_if_the_server_closes_it_or_sends_more(
    http: Http, response: bytes
) -> None:
    async with raw_server(sends(response, close=False)) as server:
        await ask(http, server)
        assert await server.peers[0].left()
        await ask(http, server)
        assert len(server.peers) == 2


async def test_a_connection_for_one_request_is_closed_even_if_the_server_keeps_it(http: Http) -> None:
    async with raw_server(sends(OK, close=False)) as server:
        assert await outcome(http, server.url) == b"{}"
        assert await server.peers[0].left()


async def test_an_http_1_0_connection_is_kept_if_the_server_says_so(http: Http) -> None:
    response = b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n{}"
    async with raw_server(sends(response, response)) as server:
        await ask(http, server)
        await ask(http, server)
        assert len(server.peers) == 1


@pytest.mark.parametrize(
    "unrequested", [b"", OK, b"x", b"\r\n"], ids=["its end", "a response", "a byte", "a line"]
)
async def test_what_arrives_on_an_idle_connection_closes_it_immediately(
    http: Http, unrequested: bytes
) -> None:
    more = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.request()
        peer.writer.write(OK)
        await more.wait()
        if unrequested:
            peer.writer.write(unrequested)
            await peer.reader.read()

    async with raw_server(answer) as server:
        await ask(http, server)
        more.set()
        assert await server.peers[0].left()
        await asyncio.sleep(0.01)
        # A request that reached the server on the closed connection would be sent twice.
        await ask(http, server)
        assert [peer.head.count(b"close") for peer in server.peers] == [0, 0]


async def test_what_follows_a_response_that_is_read_later_is_no_response(http: Http) -> None:
    async def answer(peer: Peer) -> None:
        await peer.request()
        if peer is not server.peers[0]:
            peer.writer.write(OK)
            return
        peer.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70_000)
        await asyncio.sleep(0.05)
        peer.writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]")
        await peer.reader.read()

    async with raw_server(answer) as server:
        async with http.stream_bytes(server.url, {}, b"{}", CHAT) as body:
            await asyncio.sleep(0.1)
            while await body.read():
                pass
        await ask(http, server)


async def test_no_more_connections_are_kept_than_the_limiter_allows() -> None:
    limiter = ConnectionLimiter(2)
    async with raw_server(sends(OK, OK, close=False)) as server, Http(connections=limiter) as http:
        limiter.limit = 100  # as if others used connections to the same host
        await asyncio.gather(*(ask(http, server) for _ in range(8)))
        await until(lambda: sum(not peer.ended.is_set() for peer in server.peers) <= 2)
        await asyncio.sleep(0.05)
        assert sum(not peer.ended.is_set() for peer in server.peers) == 2


async def test_an_idle_connection_is_closed_in_time_and_never_used_later(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "KEEPALIVE", 0.1)
    async with raw_server(sends(OK, OK, close=False)) as server:
        await ask(http, server)
        assert await server.peers[0].left()
        await ask(http, server)
        time.sleep(0.2)  # noqa: ASYNC251 - the event loop is late
        await ask(http, server)
        assert len(server.peers) == 3


async def test_connections_are_kept_for_each_scheme_host_and_port() -> None:
    async with (
        Http(Timeouts(connect=2, silence=5, whole=5)) as http,
        raw_server(sends(OK, OK)) as one,
        raw_server(sends(OK, OK)) as two,
    ):
        for server in (one, two, one, two):
            await ask(http, server)
        assert (len(one.peers), len(two.peers)) == (1, 1)
        with pytest.raises(PomeloError):
            await http.request_json(one.url.with_scheme("https"), {}, b"{}", CHAT)


async def test_a_stream_that_is_left_closes_its_connection_immediately(http: Http) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
    async with raw_server(sends(head + b"{}", close=False)) as server:
        async with http.stream_bytes(server.url, {}, b"{}", CHAT) as body:
            assert await body.read() == b"{}"
        assert await server.peers[0].left()


@pytest.mark.parametrize("response", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"])
@pytest.mark.parametrize("size", [2, 30_000_000])
async def test_cancelling_closes_the_connection_immediately(http: Http, response: bytes, size: int) -> None:
    reached = asyncio.Event()

    async def answer(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write(response)
        reached.set()
        await peer.reader.read()

    async with raw_server(answer) as server:
        call = asyncio.create_task(http.request_json(server.url, {}, b"x" * size, CHAT))
        await reached.wait()
        await asyncio.sleep(0.01)
        await cancel(call)
        assert await server.peers[0].left()
    assert not any("Connection._send" in repr(task) for task in asyncio.all_tasks())


async def test_cancelling_at_the_end_of_a_response_closes_the_connection(
    http: Http, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = Connection.on_message_complete

    def on_message_complete(connection: Connection) -> None:
        complete(connection)
        call.cancel()  # before it has taken the response

    monkeypatch.setattr(Connection, "on_message_complete", on_message_complete)
    async with raw_server(sends(OK, close=False)) as server:
        call = asyncio.create_task(http.request_json(server.url, {}, b"{}", CHAT))
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await server.peers[0].left()


async def test_closing_the_client_ends_its_calls_and_all_connections() -> None:
    reached = asyncio.Event()

    async def answer(peer: Peer) -> None:
        while True:
            await peer.request()
            if peer.body == b"{}":
                peer.writer.write(OK)
            else:
                reached.set()

    async with raw_server(answer) as server:
        async with Http() as http:
            await asyncio.gather(ask(http, server), ask(http, server))
            call = asyncio.create_task(outcome(http, server.url, body=b"[]"))
            await reached.wait()
            reached.clear()
            # It would be sent again, if its connection had not been closed by the client itself.
            repeatable = asyncio.create_task(http.request_json(server.url, {}, b"[]", CHAT))
            await reached.wait()
        assert await call == "provider_unavailable"
        with pytest.raises(PomeloError):
            await repeatable
        for peer in server.peers:
            assert await peer.left()


# --- new connections


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 on this machine")
async def test_an_ipv6_address_is_connected_to_and_named_in_brackets(http: Http) -> None:
    async with raw_server(sends(OK, close=False), host="::1") as server:
        await ask(http, server)
        assert f"Host: [::1]:{server.url.port}\r\n".encode() in server.peers[0].head


async def test_every_address_of_a_name_is_tried() -> None:
    names = Names(("127.0.0.9", "127.0.0.8", "127.0.0.1", "127.0.0.7"))
    async with raw_server(sends(OK, close=False)) as server, Http(resolver=names) as http:
        for _ in range(4):
            await http.request_json(server.url.with_host("acme.example"), {}, b"{}", PAID)
        assert len(server.peers) == 4


async def test_the_addresses_of_a_name_take_turns() -> None:
    names = Names(("127.0.0.1", "127.0.0.2"))
    async with raw_server(sends(OK), host="0.0.0.0") as server, Http(resolver=names) as http:
        for _ in range(4):
            await http.request_json(server.url.with_host("acme.example"), {}, b"{}", PAID)
        connected = [peer.writer.get_extra_info("sockname")[0] for peer in server.peers]
    assert connected == ["127.0.0.1", "127.0.0.2"] * 2


async def test_a_name_without_an_address_is_not_reachable_and_asked_again() -> None:
    names = Names(())
    async with Http(resolver=names) as http:
        for _ in range(2):
            with pytest.raises(UpstreamError) as failure:
                await http.request_json(URL("http://acme.example/"), {}, b"{}", PAID)
            assert (failure.value.code, failure.value.retry) == (
                "provider_unavailable",
                RetryPolicy.SAME_ROUTE,
            )
    assert len(names.asked) == 2


async def test_concurrent_requests_look_a_name_up_once_and_its_addresses_are_remembered_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = Names(wait=0.01)
    async with raw_server(sends(OK, close=False)) as server, Http(resolver=names) as http:
        url = server.url.with_host("acme.example")
        monkeypatch.setattr(dns, "TTL", 0.1)
        cancelled = asyncio.create_task(http.request_json(url, {}, b"{}", PAID))
        calls = [asyncio.create_task(http.request_json(url, {}, b"{}", PAID)) for _ in range(5)]
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(*calls)
        await http.request_json(url, {}, b"{}", PAID)
        assert len(names.asked) == 1
        await asyncio.sleep(0.15)
        await http.request_json(url, {}, b"{}", PAID)
        assert len(names.asked) == 2


async def test_connecting_has_one_timeout_for_the_name_tcp_and_tls(tmp_path: Path) -> None:
    async def silent(peer: Peer) -> None:
        await peer.reader.read()

    limits = Timeouts(connect=0.2, silence=60, whole=60)
    async with raw_server(silent) as server, Http(limits, resolver=Names(wait=60)) as http:
        with unanswered_connection("http://x/") as unanswered:
            for url in (URL("http://acme.example"), URL(unanswered), server.url.with_scheme("https")):
                async with asyncio.timeout(20):
                    with pytest.raises(UpstreamError) as failure:
                        await http.request_json(url, {}, b"{}", PAID)
                assert failure.value.code == "provider_unavailable", url
                assert failure.value.retry is RetryPolicy.SAME_ROUTE
                assert failure.value.reason == "there was no connection to the vendor in time"
        assert await server.peers[0].left()


# --- TLS


@pytest.fixture(name="certificate")
def _certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """A server's context for acme.example and 127.0.0.1, which the client trusts."""
    make_certificate(
        tmp_path, "acme", "acme.example", "-addext", "subjectAltName=DNS:acme.example,IP:127.0.0.1"
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "acme.pem", tmp_path / "acme.key")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "acme.pem"))
    tls_context.cache_clear()
    yield context
    tls_context.cache_clear()


async def test_a_server_is_reached_by_tls_if_its_certificate_has_its_name(
    certificate: ssl.SSLContext,
) -> None:
    names: list[str | None] = []
    certificate.sni_callback = lambda _, name, __: names.append(name)
    body = b"HTTP/1.1 200 OK\r\n\r\n{}"
    async with raw_server(sends(OK, OK, body), tls=certificate) as server:
        async with Http(resolver=Names()) as http:
            for _ in range(3):
                await http.request_json(server.url.with_host("acme.example"), {}, b"{}", CHAT)
            await ask(http, server)
            with pytest.raises(UpstreamError) as failure:
                await http.request_json(server.url.with_host("evil.example"), {}, b"{}", CHAT)
        assert (failure.value.code, failure.value.retry) == ("provider_failed", RetryPolicy.NEXT_ROUTE)
    assert names == ["acme.example", None, "evil.example"]


async def test_certificates_that_could_not_be_loaded_are_loaded_for_the_next_call(
    certificate: ssl.SSLContext,
) -> None:
    async with raw_server(sends(OK), tls=certificate) as server, Http() as http:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(UpstreamError) as failure:
                await ask(http, server)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert (failure.value.code, failure.value.retry) == ("provider_unavailable", RetryPolicy.SAME_ROUTE)
        await ask(http, server)


async def test_a_server_with_several_protocols_chooses_http_1(certificate: ssl.SSLContext) -> None:
    certificate.set_alpn_protocols(["h2", "http/1.1"])
    async with raw_server(sends(OK), tls=certificate) as server, Http() as http:
        await ask(http, server)
        session = server.peers[0].writer.get_extra_info("ssl_object")
        assert session.selected_alpn_protocol() == "http/1.1"


async def test_a_name_with_its_last_dot_is_the_certificates(certificate: ssl.SSLContext) -> None:
    names: list[str | None] = []
    certificate.sni_callback = lambda _, name, __: names.append(name)
    async with (
        raw_server(sends(OK), tls=certificate) as server,
        Http(resolver=Names()) as http,
    ):
        await http.request_json(server.url.with_host("acme.example."), {}, b"{}", CHAT)
    assert names == ["acme.example"]


async def test_a_certificate_that_nobody_vouches_for_is_refused(
    certificate: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    async with raw_server(sends(OK), tls=certificate) as server, Http() as http:
        assert await outcome(http, server.url) == "provider_failed"
        assert server.peers == []
