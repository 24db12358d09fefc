"""Clients that read slowly or not at all, to the byte."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
import time
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import ip_network
from typing import Any

import pytest

from gateway.connections.connection import MAX_HEAD, Respond
from gateway.request import Request
from gateway.responses import ResponseStream
from pomelo.call import Call, Principal
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.service import Services
from tests.gateway.flow import ClientTransport, open_clients
from tests.gateway.gateway_app import PNG, GatewayApp, OpenApp
from tests.gateway.requests import ACCOUNT, FLUX, HI, raw_get, raw_task
from tests.gateway.scripts import STARTED, ScriptedTasks, Step, play, text_events, word
from tests.waiting import until

IMAGE_STREAM = {**FLUX, "stream": True, "response_format": "b64_json"}
STREAM = raw_task({**HI, "stream": True}, close=False)
LONG_HEAD = b"GET / HTTP/1.1\r\n" + (b"A: " + b"x" * 1000 + b"\r\n") * (MAX_HEAD // 1000 + 1)


class ProxiedTransport(ClientTransport):
    """The connection of a proxy."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 50_000) if name == "peername" else default


def playing(gateway: GatewayApp, *steps: Step) -> Services:
    """The services of a gateway, whose streams play `steps`."""
    tasks: Any = ScriptedTasks(STARTED, *steps)
    return replace(gateway.services, tasks=tasks)


async def receive(gateway: GatewayApp, respond: Respond) -> bytes:
    """Returns the whole chunked response that `respond` sends to a client."""
    async with open_clients(gateway.services) as clients:
        client = clients.accept()
        client.connection._respond = respond
        client.connection.connection_made(client)
        client.connection.data_received(ACCOUNT)
        client.read_everything()
        await until(lambda: client.received.endswith(b"0\r\n\r\n"))
        return client.received


async def test_a_stream_may_be_ahead_of_its_client_again_once_all_was_read(gateway: GatewayApp) -> None:
    pushed: list[bool] = []

    async def respond(request: Request) -> None:
        stream = ResponseStream(request, {"Content-Type": "audio/mpeg"})
        for size in (1_000, 64 * 1024, 1_000):
            if stream.push(b"x" * size):
                pushed.append(True)
                await stream.drain()
            else:
                pushed.append(False)
        await stream.finish()

    await receive(gateway, respond)
    assert pushed == [False, True, False]


async def test_an_empty_part_does_not_end_a_chunked_response(gateway: GatewayApp) -> None:
    async def respond(request: Request) -> None:
        stream = ResponseStream(request, {"Content-Type": "audio/mpeg"})
        for part in (b"", b"one", b"", b"two"):
            stream.push(part)
        await stream.finish()

    received = await receive(gateway, respond)
    assert received.partition(b"\r\n\r\n")[2] == b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"


@pytest.mark.parametrize("left", [1, 100])
async def test_a_client_that_leaves_bytes_unread_is_disconnected(gateway: GatewayApp, left: int) -> None:
    async with open_clients(gateway.services, write_timeout=0.1) as clients:
        client = await clients.connect(ACCOUNT)
        await until(lambda: client.unread)
        client.read(len(client.unread) - left)
        await asyncio.wait_for(client.closed.wait(), 20)
        assert client.is_aborted


@pytest.mark.parametrize(("step", "survives"), [(99, False), (103, True)], ids=["too slow", "in time"])
async def test_a_client_must_read_at_the_minimum_rate(gateway: GatewayApp, step: int, survives: bool) -> None:
    class SteadyTransport(ClientTransport):
        """A client that has read `step` more bytes at each check, however late the check is."""

        def get_write_buffer_size(self) -> int:
            if not self.is_closing():
                self.read(step)
            return len(self.unread)

    async with open_clients(gateway.services, write_timeout=0.1) as clients:  # 1,024 bytes a second
        client = await clients.connect(ACCOUNT, SteadyTransport)
        await until(lambda: client.closed.is_set() or client.received.endswith(b"}}"))
        assert client.is_aborted is not survives


@pytest.mark.parametrize(("step", "survives"), [(99, False), (103, True)], ids=["too slow", "in time"])
async def test_what_is_written_meanwhile_does_not_hide_what_a_client_reads(
    gateway: GatewayApp, step: int, survives: bool
) -> None:
    checks = 0

    class SteadyTransport(ClientTransport):
        """A client that has read `step` more bytes at each of three checks, and then everything."""

        def get_write_buffer_size(self) -> int:
            nonlocal checks
            checks += 1
            if not self.is_closing():
                self.read(step if checks <= 3 else len(self.unread))
            return len(self.unread)

    async def respond(request: Request) -> None:
        stream = ResponseStream(request, {"Content-Type": "audio/mpeg"})
        stream.push(b"x" * 1_000)
        stream.push(b"x" * 60_000)
        await stream.finish()

    async with open_clients(gateway.services, write_timeout=0.1) as clients:
        client = clients.accept(SteadyTransport)
        client.connection._respond = respond
        client.connection.connection_made(client)
        client.connection.data_received(ACCOUNT)
        await until(lambda: client.closed.is_set() or client.received.endswith(b"0\r\n\r\n"))
        assert client.is_aborted is not survives


def full_sockets(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """Returns the two ends of a connection; the first has sent until the kernel buffers no more."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        near = stack.enter_context(socket.create_connection(listening.getsockname()))
        far = stack.enter_context(listening.accept()[0])
    near.setblocking(False)
    far.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            near.send(bytes(64 * 1024))
    return near, far


class KernelTransport(ClientTransport):
    """A transport whose client reads some of what the kernel buffers in `near`, at least `step` bytes, whenever the
    connection asks for the size of the transport's own buffer, which does not change."""

    near: socket.socket
    far: socket.socket
    step = 0
    checks = 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self.near if name == "socket" else default

    def get_write_buffer_size(self) -> int:
        type(self).checks += 1
        most = unread_kernel_bytes(self.near) - self.step
        until_time = time.monotonic() + 5
        while unread_kernel_bytes(self.near) > most and time.monotonic() < until_time:
            with suppress(BlockingIOError):
                self.far.recv(64 * 1024)
        return super().get_write_buffer_size()


def unread_kernel_bytes(connected: socket.socket) -> int:
    """Returns the bytes that the kernel has for the other end of a connection."""
    return int.from_bytes(fcntl.ioctl(connected, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports what it buffers")
@pytest.mark.parametrize(("step", "survives"), [(0, False), (1_000, True)], ids=["nothing", "slowly"])
async def test_a_client_that_reads_what_the_kernel_buffers_is_not_disconnected(
    gateway: GatewayApp, step: int, survives: bool
) -> None:
    class Transport(KernelTransport):
        """The transport of this test."""

    with ExitStack() as stack:
        Transport.near, Transport.far = full_sockets(stack)
        Transport.step = step
        async with open_clients(gateway.services, write_timeout=0.05) as clients:
            client = await clients.connect(ACCOUNT, Transport)
            await until(lambda: client.closed.is_set() or Transport.checks > 10)
            assert client.is_aborted is not survives
            client.read_everything()


async def test_the_clients_of_a_proxy_may_read_more_slowly(gateway: GatewayApp) -> None:
    async with open_clients(
        gateway.services, write_timeout=0.05, trusted_proxies=(ip_network("192.0.2.1"),)
    ) as clients:
        client = clients.accept(ProxiedTransport)
        client.connection.connection_made(client)
        client.connection.data_received(ACCOUNT)
        await until(lambda: client.unread)
        direct = await clients.connect(ACCOUNT)
        await asyncio.wait_for(direct.closed.wait(), 20)
        assert direct.is_aborted
        assert not client.is_closing()
        client.read_everything()


async def test_each_stall_is_timed_from_its_beginning(gateway: GatewayApp) -> None:
    loop = asyncio.get_running_loop()
    async with open_clients(gateway.services, write_timeout=0.5) as clients:
        client = await clients.connect(ACCOUNT)
        await until(lambda: client.unread)
        client.read(len(client.unread))
        await asyncio.sleep(0.3)
        client.connection.data_received(ACCOUNT)
        await until(lambda: client.unread)
        begin = loop.time()
        await asyncio.wait_for(client.closed.wait(), 20)
        assert loop.time() - begin > 0.4


async def test_a_stall_that_has_ended_is_not_timed_on(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services, write_timeout=0.05) as clients:
        client = await clients.connect(ACCOUNT)
        await until(lambda: client.unread)
        client.read(len(client.unread))
        await asyncio.sleep(0.1)
        assert client.connection._stall_timer is None
        assert not client.closed.is_set()


@pytest.mark.parametrize("data", [b"GET /", raw_get("/healthz"), ACCOUNT], ids=["head", "health", "account"])
async def test_a_lost_connection_frees_its_slot(gateway: GatewayApp, data: bytes) -> None:
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(data)
        await until(lambda: client.unread or data == b"GET /")
        assert len(clients.connections) == 1
        client.abort()
        await until(lambda: not len(clients.connections))


async def test_a_connection_that_is_evicted_while_it_starts_is_aborted(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services) as clients:
        client = clients.accept()
        clients.connections.close(client.connection.slot)
        client.connection.connection_made(client)
        assert client.is_aborted


async def test_an_evicted_caller_may_read_its_response_to_the_end(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(ACCOUNT)
        await until(lambda: client.unread)
        client.connection.end(send_refusal=False)
        assert not client.closed.is_set()
        client.read_everything()
        assert client.received.endswith(b"}}")
        assert client.closed.is_set()
        assert not client.is_aborted


async def test_a_refusal_is_not_written_into_a_response_that_has_begun(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(raw_get("/openapi.json"))
        await until(lambda: client.unread)
        client.connection.end(send_refusal=True)
        assert client.is_aborted
        assert client.unread.count(b"HTTP/1.1 ") == 1


async def test_a_refused_client_that_reads_nothing_is_disconnected(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services, write_timeout=0.1) as clients:
        clients.connections.lingering = clients.connections.limits.max_connections
        client = await clients.connect(LONG_HEAD)
        assert client.unread.startswith(b"HTTP/1.1 400 ")
        await asyncio.wait_for(client.closed.wait(), 20)
        assert client.is_aborted


async def test_an_eighth_of_the_connections_may_linger(gateway: GatewayApp) -> None:
    async with open_clients(gateway.services, max_connections=16) as clients:
        refused = [await clients.connect(LONG_HEAD) for _ in range(3)]
        assert [client.is_closing() for client in refused] == [False, False, True]
        assert len(clients.connections) == 0
        refused[0].abort()
        await asyncio.sleep(0)
        assert not (await clients.connect(LONG_HEAD)).is_closing()


async def test_a_refused_request_is_cancelled_before_its_connection_ends(open_gateway: OpenApp) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def wait(call: Call) -> Principal:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async with open_gateway(authenticate=wait) as gateway, open_clients(gateway.services) as clients:
        client = await clients.connect(ACCOUNT)
        await asyncio.wait_for(started.wait(), 20)
        client.connection.end(send_refusal=True)
        assert client.unread.startswith(b"HTTP/1.1 503 ")
        await asyncio.wait_for(ended.wait(), 20)
        assert not client.closed.is_set()


async def test_a_deadline_while_the_client_reads_slowly_ends_the_stream_with_an_error_event(
    gateway: GatewayApp, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.provider.script = play(word("x" * 200_000), asyncio.Event().wait)
    asked = raw_task({**HI, "stream": True}, "X-Request-Timeout: 0.6", close=False)
    async with open_clients(gateway.services) as clients:
        client = await clients.connect(asked)
        await asyncio.wait_for(gateway.provider.closed.wait(), 20)
        await until(lambda: client.unread.endswith(b"0\r\n\r\n"))
        client.read_everything()
        assert b'"code":"deadline_exceeded"' in client.received
        client.connection.data_received(ACCOUNT)
        await until(lambda: client.received.endswith(b"}}"))
    assert not caplog.records


@pytest.mark.parametrize(("ahead", "reads"), [(1, True), (5, False)])
async def test_few_requests_are_read_ahead_while_one_is_handled(
    gateway: GatewayApp, ahead: int, reads: bool
) -> None:
    async with open_clients(playing(gateway, word(), asyncio.Event().wait)) as clients:
        client = await clients.connect(STREAM + ACCOUNT * ahead)
        await until(lambda: client.unread)
        assert client.is_reading() is reads


@pytest.mark.parametrize(
    "after",
    [asyncio.Event().wait, word("x" * 20_000)],
    ids=["nothing", "an event that is too long to buffer"],
)
async def test_the_events_of_a_client_that_leaves_are_dropped_silently(
    gateway: GatewayApp, after: Step, caplog: pytest.LogCaptureFixture
) -> None:
    def leave() -> None:
        client.abort()

    async with open_clients(playing(gateway, word("one"), word("two"), leave, after)) as clients:
        client = await clients.connect(STREAM)
        client.read_everything()
        await asyncio.wait_for(client.closed.wait(), 20)
        await asyncio.sleep(0.05)
    assert b'"one"' in client.received
    assert b'"two"' not in client.received
    assert not caplog.records


@pytest.mark.parametrize("reads", [True, False], ids=["reads at last", "leaves"])
@pytest.mark.parametrize("asked", [HI, IMAGE_STREAM], ids=["whole", "stream"])
async def test_a_caller_who_does_not_read_large_responses_can_start_no_call(
    open_gateway: OpenApp, reads: bool, asked: dict[str, Any]
) -> None:
    limit = 150_000
    async with open_gateway(in_flight=InFlightLimits(account_unread=limit)) as gateway:
        result = TaskResult()
        result.image.images.add(data=PNG + bytes(75_000), content_type="image/png")
        events = text_events("x" * 100_000) if asked is HI else [Event(completed=result)]
        gateway.provider.script = play(*events)
        async with open_clients(gateway.services) as clients:
            large = [await clients.connect(raw_task(asked, close=False)) for _ in range(2)]
            await until(lambda: all(len(client.unread) > 100_000 for client in large))
            refused = await clients.connect(ACCOUNT)
            await until(lambda: b"overloaded" in refused.unread)
            if reads:
                large[0].read_everything()
            else:
                large[0].abort()
            await until(lambda: gateway_unread(gateway) < limit)
            allowed = await clients.connect(ACCOUNT)
            await until(lambda: allowed.unread.startswith(b"HTTP/1.1 200 "))
            large[1].abort()
            await until(lambda: not gateway_unread(gateway))


def gateway_unread(gateway: GatewayApp) -> int:
    """Returns the bytes of responses that callers have yet to read."""
    in_flight = gateway.services.access.in_flight  # type: ignore[attr-defined]
    return sum(used.unread for used in in_flight._owners.values())
