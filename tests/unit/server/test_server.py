"""The options of the gRPC server, and its certificate."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pomelo.call import Call
from pomelo.network.tls import read_certificate
from pomelo.server import server
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionLimits
from pomelo.server.server import ServerOptions, open_server
from tests.calls import failure, reason_of
from tests.certificates import make_certificate
from tests.integration.scripted_services import ScriptedServices, serve_scripted


def test_grpc_itself_limits_the_connections_to_the_hard_limit() -> None:
    options = ServerOptions(connections=ConnectionLimits(connections=5, hard_connections=7))
    assert dict(options.channel_args())["grpc.max_allowed_incoming_connections"] == 7


def test_grpc_itself_counts_the_calls_of_one_connection() -> None:
    options = dict(ServerOptions(connection_streams=7, reuse_port=True).channel_args())
    assert options["grpc.max_concurrent_streams"] == 7
    assert options["grpc.so_reuseport"] == 1
    assert dict(ServerOptions().channel_args())["grpc.so_reuseport"] == 0


def test_grpc_itself_bounds_what_slow_and_noisy_peers_cost() -> None:
    options = dict(ServerOptions().channel_args())
    assert (options["grpc.http2.lookahead_bytes"], options["grpc.http2.bdp_probe"]) == (64 * 1024, 0)
    assert options["grpc.server_handshake_timeout_ms"] == 10_000
    assert options["grpc.http2.max_ping_strikes"] == 0, "strikes take a core while a client sends pings"


@pytest.mark.parametrize(("size", "reason"), [(2_000, "payload_too_large"), (2_001, "")])
async def test_grpc_itself_refuses_a_message_of_more_than_twice_the_limit(size: int, reason: str) -> None:
    async with serve_scripted(message=1_000) as opened:
        empty = opened.channel.unary_unary("/pomelo.v1.TaskService/RunTask")
        error = await failure(empty(bytes(size), metadata=[("authorization", "Bearer pml_test_services")]))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
    assert CallLimits(message=1_000).transport == 2_000


async def test_a_server_stops_although_a_call_ignores_its_cancellation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "_CLEANUP_TIME", 0.05)
    begun, gate, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def ignore(call: Call) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await gate.wait()
            ended.set()

    async with serve_scripted(ScriptedServices(before=ignore)) as opened:
        running = asyncio.ensure_future(opened.task("RunTask"))
        await begun.wait()
    assert "1 calls did not end within 0.05 s of being cancelled" in caplog.messages
    gate.set()
    async with asyncio.timeout(20):
        await asyncio.gather(ended.wait(), running, return_exceptions=True)
    assert ended.is_set()


async def test_new_connections_get_the_certificate_that_replaced_the_first_one(tmp_path: Path) -> None:
    names = ("-addext", "subjectAltName=IP:127.0.0.1")
    for name in ("old", "new"):
        make_certificate(tmp_path, name, name, *names)
    old, new = [(tmp_path / f"{name}.pem", tmp_path / f"{name}.key") for name in ("old", "new")]
    options = ServerOptions("127.0.0.1:0", grace=0, certificate=read_certificate(*old, None))
    trusted = grpc.ssl_channel_credentials(old[0].read_bytes())
    async with asyncio.timeout(20), open_server(ScriptedServices().services(), options) as opened:
        host, _, port = opened.address.rpartition(":")
        async with grpc.aio.secure_channel(opened.address, trusted) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            for cert, key in (old, new, new):
                opened.replace_certificate(read_certificate(cert, key, None))
                shown = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
                assert shown == cert.read_text()
                await check(health_pb2.HealthCheckRequest())  # an open connection stays


async def test_a_socket_of_another_kind_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        operator: Any = None
        other.bind(str(path))
        with pytest.raises(OSError, match="rotocol"):
            async with server.open_operator_socket(operator, path):
                pass
    assert path.is_socket()
