"""Listening: who is served first, whose port it is, and what closing the gateway ends."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import time
from pathlib import Path

import aiohttp
import pytest

from gateway.app import open_rest
from gateway.options import GatewayOptions
from pomelo.call import Call, Principal
from pomelo.network.listening import _bind, bind, bind_blocking, reserve
from tests.gateway.gateway_app import GatewayApp, OpenApp, authenticate
from tests.gateway.requests import (
    ACCOUNT,
    HEALTH,
    HI,
    KEY,
    TTS,
    raw_get,
    raw_task,
    read_status,
    read_until_closed,
)
from tests.gateway.scripts import play, word


async def crowd_ahead_of_health(gateway: GatewayApp, begin: bytes) -> int:
    """Returns how many of 200 requests are answered before a health check that was sent after all of them.
    The server has read `begin` of each before the rest is sent."""
    sockets = [socket.create_connection((gateway.host, gateway.port)) for _ in range(201)]
    *crowd, health = sockets
    if begin:
        for each in sockets:
            each.sendall(begin)
        assert await gateway.status_of(ACCOUNT) == 200  # it waits behind all of them
    for each in crowd:
        each.sendall(raw_get("/nowhere").removeprefix(begin))
    health.sendall(HEALTH.removeprefix(begin))
    health.setblocking(False)
    received = await asyncio.get_running_loop().sock_recv(health, 1000)
    answered, _, _ = select.select(crowd, [], [], 0)
    for each in sockets:
        each.close()
    assert received.startswith(b"HTTP/1.1 200 ")
    return len(answered)


@pytest.mark.parametrize(
    ("begin", "most"), [(b"", 100), (b"GET /", 150)], ids=["new connections", "started requests"]
)
async def test_health_checks_are_answered_before_the_requests_of_a_crowd(
    gateway: GatewayApp, begin: bytes, most: int
) -> None:
    for _ in range(10):
        assert await gateway.is_healthy()
    assert await crowd_ahead_of_health(gateway, begin) < most


@pytest.mark.parametrize("most", [4096, 100], ids=["few connections", "nearly full"])
async def test_a_delay_of_the_server_does_not_count_against_clients_that_wait(
    open_gateway: OpenApp, most: int
) -> None:
    delays = [0.6]  # longer than the grace and the time between two checks

    async def block(call: Call) -> Principal:
        if delays:
            time.sleep(delays.pop())  # noqa: ASYNC251 - the event loop is blocked on purpose
        return await authenticate(call)

    options = {"max_connections": most, "max_untrusted": 5, "untrusted_grace": 0.1}
    async with open_gateway(authenticate=block, **options) as gateway:
        sockets = [socket.create_connection((gateway.host, gateway.port)) for _ in range(100)]
        for each in sockets:
            each.sendall(ACCOUNT)
        for each in sockets:
            reader, writer = await asyncio.open_connection(sock=each)
            assert await read_status(reader) == 200
            writer.close()


@pytest.mark.parametrize(("host", "warnings"), [("127.1", 0), ("0.0.0.0", 1)])
async def test_links_to_media_begin_with_the_address_that_was_configured(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture, host: str, warnings: int
) -> None:
    async with open_rest(gateway.services, GatewayOptions(), host, 0) as (named, port):
        assert named == host
        base = f"http://{host}:{port}"
        url, headers = f"http://127.0.0.1:{port}/api/v1/task", {"Authorization": f"Bearer {KEY}"}
        async with gateway.http.post(url, json=TTS, headers=headers) as response:
            assert (await response.json())["audio"]["url"].startswith(f"{base}/media/")
    reported = [each for each in caplog.messages if each.startswith(f"Links to media begin with {base}, ")]
    assert len(reported) == warnings


def open_files() -> int:
    """The number of open files of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_an_address_that_can_not_be_used_leaves_no_socket_open(gateway: GatewayApp) -> None:
    before = open_files()
    with pytest.raises(OSError, match="in use") as caught:
        await bind(gateway.host, gateway.port, reuse_port=False)
    assert open_files() == before
    assert caught.value.errno == errno.EADDRINUSE  # its traceback keeps the sockets alive until here


@pytest.mark.parametrize(("host", "families"), [("::", 2), ("::1", 1), ("127.0.0.1", 1)])
async def test_every_address_of_ipv6_is_every_address_of_ipv4_too(host: str, families: int) -> None:
    (listening,) = await bind(host, 0, reuse_port=False)
    port, connected = listening.getsockname()[1], 0
    with listening:
        for address in ("127.0.0.1", "::1"):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection((address, port)):
                connected += 1
    assert connected == families


def test_an_address_of_a_name_that_the_machine_does_not_have_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as ::1 of localhost, while IPv6 is disabled. gRPC leaves it out, too."""
    absent, present = [
        (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, 0))
        for host in ("192.0.2.1", "127.0.0.1")
    ]
    (listening,) = _bind("pomelo.example", 0, [absent, present], reuse_port=False)
    with listening:
        assert listening.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError, match=r"^\[Errno \d+\] pomelo.example is not an address of this machine$"):
        _bind("pomelo.example", 0, [absent], reuse_port=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **options: [absent, present])
    (reserved,) = reserve("pomelo.example", 0)
    with reserved, pytest.raises(ConnectionRefusedError), socket.socket() as client:
        client.connect(reserved.getsockname())


def addresses(*hosts: str) -> list[tuple[object, ...]]:
    """The addresses of a name. A resolver may return the same one several times."""
    return [
        (socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0))
        for host in hosts
    ]


@pytest.mark.parametrize(
    ("hosts", "bound"),
    [(("127.0.0.1", "127.0.0.1"), 1), (("127.0.0.1", "127.0.0.2"), 2), (("::", "0.0.0.0"), 2)],
)
def test_all_addresses_of_a_name_are_served_on_one_port(
    monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...], bound: int
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **options: addresses(*hosts))
    sockets = bind_blocking("pomelo.example", 0)
    with contextlib.ExitStack() as stack:
        ports = {stack.enter_context(each).getsockname()[1] for each in sockets}
    assert (len(sockets), len(ports)) == (bound, 1)


def test_sockets_that_can_not_listen_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(listening: socket.socket, backlog: int) -> None:
        raise OSError(errno.EADDRINUSE, "in use")

    monkeypatch.setattr(socket.socket, "listen", fail)
    before = open_files()
    with pytest.raises(OSError, match="in use") as caught:
        bind_blocking("127.0.0.1", 0)
    assert open_files() == before
    del caught  # its traceback keeps the sockets alive until here


async def test_closing_the_gateway_ends_running_requests_and_frees_the_port(open_gateway: OpenApp) -> None:
    started = asyncio.Event()
    async with aiohttp.ClientSession() as client:
        async with open_gateway(drain_timeout=0.1) as gateway:
            gateway.provider.script = play(word(), started.set, asyncio.Event().wait)
            url = f"{gateway.url}/api/v1/task"
            response = await client.post(url, json={**HI, "stream": True}, headers=gateway.headers)
            await asyncio.wait_for(started.wait(), 20)
            begin = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begin < 5
        assert gateway.provider.closed.is_set()
        response.close()
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get(gateway.url)


async def test_requests_that_have_arrived_when_the_gateway_closes_are_answered(open_gateway: OpenApp) -> None:
    sockets: list[socket.socket] = []
    async with open_gateway() as gateway:
        assert await gateway.is_healthy()
        for _ in range(50):  # the kernel connects them; the event loop does not run
            sockets.append(socket.create_connection((gateway.host, gateway.port)))
            sockets[-1].sendall(raw_get("/nowhere"))
    for each in sockets:
        with each:
            each.settimeout(20)
            assert each.recv(1000).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    "data", [b"", raw_task(b"", key="bad", framing="Content-Length: 9")], ids=["silent", "refused"]
)
async def test_closing_the_gateway_closes_connections_without_a_request(
    open_gateway: OpenApp, data: bytes
) -> None:
    times = {"linger_timeout": 60.0, "untrusted_timeout": 60.0, "head_timeout": 60.0}
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(open_gateway(**times))
        async with gateway.connect(data) as (reader, _):
            assert not data or await read_status(reader) == 401
            assert await gateway.is_healthy()
            await stack.aclose()
            async with asyncio.timeout(20):
                assert await read_until_closed(reader) == b""


async def test_a_port_is_not_shared_unless_asked_for(gateway: GatewayApp) -> None:
    with pytest.raises(OSError, match="in use"):
        async with open_rest(gateway.services, GatewayOptions(), gateway.host, gateway.port):
            pass
