"""Connection limits of the gRPC port, on a real server with short limits."""

from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pomelo.app import App
from pomelo.call import Call
from pomelo.gen.v1.media_service_pb2 import DownloadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.network.tls import Certificate, read_certificate
from pomelo.server.connection_guard import ConnectionGuard
from pomelo.server.connection_limits import ConnectionLimits
from pomelo.server.remote import Tls
from pomelo.server.server import ServerOptions, open_server
from pomelo.service import AccessService, Visit
from tests.calls import bearer, failure, upload_messages
from tests.certificates import make_certificate
from tests.conftest import Keys
from tests.faults import frames
from tests.integration.connection_client import MODELS, SOON, connected, many
from tests.waiting import until

QUICK = ConnectionLimits(key_timeout=0.6, grace=0.3)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificate(folder, "cert", "localhost")
    return read_certificate(folder / "cert.pem", folder / "cert.key", None)


@asynccontextmanager
async def serve(
    app: App, limits: ConnectionLimits, address: str = "127.0.0.1:0", **options: Any
) -> AsyncIterator[int]:
    """Opens a server with these limits, and yields its port."""
    services = replace(app.services, access=options.pop("access", app.services.access))
    async with open_server(services, ServerOptions(address, connections=limits, **options)) as server:
        yield int(server.address.rpartition(":")[2])


def client_hello() -> bytes:
    """Returns the first message of a TLS handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


# --- unauthenticated connections


CALL = frames.hello() + frames.headers(1, MODELS, ("authorization", "Bearer no")) + frames.message(1, b"")
WATCH = frames.hello() + frames.headers(1, "/grpc.health.v1.Health/Watch") + frames.message(1, b"")


@pytest.mark.parametrize(
    ("tls", "sent"),
    [
        pytest.param(False, b"", id="silent"),
        pytest.param(False, frames.PREFACE[:10], id="half a preface"),
        pytest.param(False, frames.hello(), id="preface"),
        pytest.param(False, WATCH, id="watch"),
        pytest.param(False, CALL, id="bad key"),
        pytest.param(True, b"", id="TLS silent"),
        pytest.param(True, client_hello()[:60], id="TLS half a hello"),
        pytest.param(True, client_hello(), id="TLS hello"),
    ],
)
async def test_a_connection_without_a_valid_key_is_closed_in_time(
    app: App, certificate: Certificate, tls: bool, sent: bytes
) -> None:
    async with serve(app, QUICK, certificate=certificate if tls else None) as port, connected(port) as client:
        client.send(sent)
        await client.closed()


async def test_by_default_a_connection_without_a_key_has_less_than_ten_seconds() -> None:
    # The tests above use short limits. The defaults behave the same, as scans are at most a second apart.
    assert ConnectionLimits().key_timeout + 1.0 <= 10.0


async def test_the_calls_of_a_closed_connection_are_cancelled(app: App) -> None:
    options = ServerOptions("127.0.0.1:0", connections=QUICK)
    async with open_server(app.services, options) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await anext(aiter(watch))).status == health_pb2.HealthCheckResponse.SERVING
            assert server.running.count == 1
            assert (await failure(watch)).code() == grpc.StatusCode.UNAVAILABLE
        async with asyncio.timeout(SOON):
            await server.running.idle()


async def test_the_oldest_unauthenticated_connections_of_an_address_above_its_share_are_closed(
    app: App,
) -> None:
    limits = ConnectionLimits(per_address=4, grace=0.3)
    async with (
        serve(app, limits) as port,
        many(port, 4, source="127.0.0.9") as others,
        many(port, 3) as first,
    ):
        await asyncio.sleep(1.5)  # longer than the time between two scans
        async with many(port, 4) as second:
            for client in first:
                await client.closed()
            assert all(client.open for client in (*others, *second))


# --- authenticated connections


class SlowAccess:
    """Admits calls like `access`, after a key look-up that takes that many seconds."""

    def __init__(self, access: AccessService, seconds: float) -> None:
        self._access = access
        self._seconds = seconds

    async def admit(self, call: Call) -> Visit:
        await asyncio.sleep(self._seconds)
        return await self._access.admit(call)


BURST = b"".join(
    frames.headers(stream, MODELS, ("authorization", "Bearer wrong"))
    + frames.frame(frames.RST_STREAM, 0, stream, bytes(4))
    for stream in range(101, 401, 2)
)
"""More cancelled calls than an unauthenticated connection may have, each with a key."""


async def test_a_caller_whose_key_is_still_being_looked_up_is_not_closed_as_a_flood(
    app: App, keys: Keys
) -> None:
    slow = SlowAccess(app.services.access, 1.5)
    async with serve(app, ConnectionLimits(), access=slow) as port, connected(port) as client:
        client.send(frames.hello())
        client.call(keys.test)
        client.send(BURST)
        await client.answered()
        assert client.open


async def test_a_flood_is_closed_even_if_keys_are_being_looked_up(app: App) -> None:
    slow = SlowAccess(app.services.access, 30)
    limits = ConnectionLimits(grace=0.5)
    async with serve(app, limits, access=slow) as port, connected(port) as client:
        client.send(frames.hello())
        client.call("wrong")
        client.send(BURST)
        await client.closed(within=7)  # not only when the time for the key has passed


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_connection_with_a_valid_key_stays_open(app: App, keys: Keys, host: str) -> None:
    address = f"[{host}]:0" if ":" in host else f"{host}:0"
    async with (
        serve(app, replace(QUICK, per_address=2), address) as port,
        connected(port, host) as unauthenticated,
        many(port, 5, host=host) as clients,
    ):
        for client in clients:
            await client.ask(keys.test)
        await unauthenticated.closed()
        for client in clients:
            client.call(keys.test, 3)
            await client.answered(3)


async def test_a_connection_with_a_valid_key_stays_open_over_tls(
    app: App, keys: Keys, certificate: Certificate
) -> None:
    tls = Tls(ca=certificate.chain).credentials()
    async with (
        serve(app, QUICK, certificate=certificate) as port,
        connected(port) as unauthenticated,
        grpc.aio.secure_channel(f"localhost:{port}", tls) as channel,
    ):
        ask = channel.unary_unary(MODELS)
        metadata = bearer(keys.test)
        assert await ask(b"", metadata=metadata)
        await unauthenticated.closed()
        assert channel.get_state() == grpc.ChannelConnectivity.READY
        assert await ask(b"", metadata=metadata)


async def test_a_download_by_a_signed_link_keeps_its_connection_open(app: App, keys: Keys) -> None:
    size = 8 * 1024 * 1024
    async with serve(app, QUICK) as port:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            metadata = bearer(keys.test)
            messages = upload_messages(bytes(size), "audio/wav", size // 8)
            media = (await MediaServiceStub(channel).UploadMedia(iter(messages), metadata=metadata)).media
        # A separate connection with small windows.
        slow = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 65536),
        ]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=slow) as channel:
            link = DownloadMediaRequest(id=media.id, signature=media.url.partition("?")[2])
            call = aiter(MediaServiceStub(channel).DownloadMedia(link))
            assert (await anext(call)).media.id == media.id
            async with connected(port) as later:
                await later.closed()
            assert sum([len(part.chunk) async for part in call]) == size


async def test_idle_connections_above_the_limit_are_closed_for_new_ones(app: App, keys: Keys) -> None:
    async with serve(app, ConnectionLimits(connections=8)) as port, many(port, 8) as clients:
        for client in clients:
            await client.ask(keys.test)
        async with many(port, 2) as newcomers:
            for client in newcomers:
                await client.ask(keys.test)
            for client in clients[:2]:
                await client.closed()
            for client in (*clients[2:], *newcomers):
                client.call(keys.test, 3)
                await client.answered(3)


async def test_grpc_refuses_connections_above_the_hard_limit_and_continues(app: App, keys: Keys) -> None:
    limits = ConnectionLimits(connections=4, hard_connections=4)
    async with serve(app, limits) as port, many(port, 4) as clients:
        for client in clients:
            await client.ask(keys.test)
        async with connected(port) as one_more:
            await one_more.closed()
        clients[0].close()
        async with asyncio.timeout(SOON):
            while True:
                try:
                    async with connected(port) as next_one:
                        await next_one.ask(keys.test)
                        break
                except (asyncio.IncompleteReadError, ConnectionError):
                    await asyncio.sleep(0.05)


async def test_connections_from_a_trusted_proxy_are_not_limited(app: App) -> None:
    limits = replace(QUICK, per_address=2, trusted=(ip_network("127.0.0.9/32"), ip_network("::1")))
    async with (
        serve(app, limits) as port,
        many(port, 5, source="127.0.0.9") as proxy,
        connected(port) as unauthenticated,
    ):
        await unauthenticated.closed()
        assert all(client.open for client in proxy)


# --- the guard


async def test_no_state_is_kept_of_ended_connections_and_calls() -> None:
    guard = ConnectionGuard(ConnectionLimits(), 1000)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(take, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with guard.watch(port):
            async with many(port, 20):
                await until(lambda: guard.count == 20)
                for number in range(1000):
                    # Calls of connections that were never scanned.
                    guard.authenticated(f"ipv4:127.0.0.1:{number}")
            await until(lambda: guard.count == 0)
            await until(lambda: not guard._calls and not guard._connections)
        guard.authenticated("ipv4:127.0.0.1:1")
        guard.reset("ipv4:127.0.0.1:1")
        assert not guard._calls


async def test_closed_connections_are_logged_in_one_line(app: App, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pomelo.server"):
        async with serve(app, QUICK) as port, many(port, 6) as clients:
            for client in clients:
                await client.closed()
    lines = [record.getMessage() for record in caplog.records if "gRPC connections" in record.getMessage()]
    assert len(lines) <= 2  # the first immediately, the rest at the end
    assert "without a key in time" in lines[0]
    assert "from 127.0.0.1" in lines[0]


async def test_calls_are_served_and_one_line_is_logged_if_the_system_lists_no_connections(
    app: App, keys: Keys, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "other")
        guard = ConnectionGuard(ConnectionLimits(), 1000)
        async with guard.watch(1):
            guard.authenticated("ipv4:127.0.0.1:1")
            guard.received("ipv4:127.0.0.1:1", 5)
            guard.reset("ipv4:127.0.0.1:1")
            guard.ended("ipv4:127.0.0.1:1")
            assert not guard._calls
    assert sum("not guarded" in record.getMessage() for record in caplog.records) == 1


def test_the_descriptor_limit_is_raised_as_far_as_the_system_allows() -> None:
    code = """
import resource
hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], 4000)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
from pomelo.runtime import process
assert process.descriptor_limit() == 256
assert process.raise_descriptor_limit() == hard == process.descriptor_limit()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
assert process.raise_descriptor_limit() == hard
"""
    subprocess.run([sys.executable, "-c", code], check=True)
