"""Accepting connections: what their slots and the listening sockets go through."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import ssl
import weakref
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.connections.connection import Connection
from gateway.connections.limits import ConnectionLimits, Connections, Slot
from gateway.connections.listener import Listener
from pomelo.network.listening import bind
from tests.gateway.flow import open_clients
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import ACCOUNT, read_status
from tests.waiting import until


@pytest.mark.parametrize("over_tls", [False, True], ids=["says nothing", "no handshake"])
async def test_a_client_that_leaves_before_its_connection_is_made_frees_its_slot(
    gateway: GatewayApp, certificate: ssl.SSLContext, over_tls: bool
) -> None:
    async with open_clients(gateway.services, untrusted_timeout=60.0) as clients:
        (listening,) = await bind("127.0.0.1", 0, reuse_port=False)
        tls = certificate if over_tls else None
        connections = clients.connections
        listener = Listener([listening], clients.connection, connections, tls=tls, handshake_timeout=60.0)
        listener.start()
        try:
            with socket.create_connection(listening.getsockname()) as client:
                await until(lambda: len(connections) == 1)
                if over_tls:
                    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await until(lambda: len(connections) == 0)
        finally:
            await listener.close()


async def test_connections_that_are_evicted_while_they_start_are_overloaded_and_not_reset(
    gateway: GatewayApp,
) -> None:
    async with open_clients(gateway.services) as clients, AsyncExitStack() as stack:
        (listening,) = await bind("127.0.0.1", 0, reuse_port=False)
        connections = clients.connections

        def connect(slot: Slot) -> Connection:
            while (
                connections.make_room()
            ):  # evicts this connection, and one whose start has only been scheduled
                pass
            return clients.connection(slot)

        listener = Listener([listening], connect, connections, tls=None, handshake_timeout=60.0)
        stack.push_async_callback(listener.close)
        readers = []
        for _ in range(2):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            stack.callback(writer.close)
            writer.write(ACCOUNT)
            readers.append(reader)
        listener.start()
        for reader in readers:
            assert await read_status(reader) == 503
            assert await reader.read() == b""


async def test_a_listener_that_closes_frees_the_slots_of_silent_connections(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services) as clients:
        (listening,) = await bind("127.0.0.1", 0, reuse_port=False)
        connections = clients.connections
        listener = Listener([listening], clients.connection, connections, tls=None, handshake_timeout=60.0)
        listener.start()
        with socket.create_connection(listening.getsockname()) as client:
            await until(lambda: len(connections) == 1)
            await listener.close()
            assert len(connections) == 0
            assert connections._timer is None
            client.settimeout(20)
            assert client.recv(1) == b""
        assert listening.fileno() == -1


async def test_a_listener_keeps_nothing_of_a_connection_that_has_ended(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services) as clients:
        (listening,) = await bind("127.0.0.1", 0, reuse_port=False)
        connections = clients.connections
        starts: list[weakref.ref[Any]] = []

        def connect(slot: Slot) -> Connection:
            starts.append(weakref.ref(asyncio.current_task()))
            return clients.connection(slot)

        listener = Listener([listening], connect, connections, tls=None, handshake_timeout=60.0)
        listener.start()
        try:
            with socket.create_connection(listening.getsockname()) as client:
                client.sendall(ACCOUNT)
                await until(lambda: starts)
            await until(lambda: len(connections) == 0)
            gc.collect()
            assert [start() for start in starts] == [None]
        finally:
            await listener.close()


async def test_without_descriptors_accepting_is_retried_ten_times_a_second_and_logged_once(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0

    class ExhaustedSocket(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal attempts
            attempts += 1
            raise OSError(errno.EMFILE, "Too many open files")

    async with open_clients(gateway.services) as clients:
        listening = ExhaustedSocket()
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        connections = Connections(ConnectionLimits())
        listener = Listener([listening], clients.connection, connections, tls=None, handshake_timeout=1.0)
        listener.start()
        try:
            with socket.create_connection(listening.getsockname()):
                begin = asyncio.get_running_loop().time()
                await until(lambda: attempts >= 3)
                assert attempts <= 2 + (asyncio.get_running_loop().time() - begin) / 0.1
        finally:
            await listener.close()
        await asyncio.sleep(0.12)  # longer than the pause that has begun
    assert len(caplog.records) == 1
