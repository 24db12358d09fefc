"""Floods of frames and of connections on the gRPC port are cut off without delaying other callers.

A server process as `pomelo serve` starts it. Attackers come from 127.0.0.2 where the test is not about callers
who share their address.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, suppress

import grpc
import pytest

from pomelo import process
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer
from tests.faults import frames
from tests.faults.bystanders import connections, cpu, good_callers
from tests.integration.commands import pomelo
from tests.serving import Served, serve
from tests.tasks import text_task

MODELS = "/pomelo.v1.ModelService/ListModels"
MIB = 1024 * 1024

CUT_WITHIN = 10.0
"""Seconds; at most 2 were measured."""
CPU_OF_A_FLOOD = 2.0
"""Seconds of the server's CPU for one connection; at most 0.6 were measured."""


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server of this module's own, whose account is free of limits."""
    folder = tmp_path_factory.mktemp("flooded")
    async with serve(folder) as running:
        for arguments in (("plan", "default", "unlimited"), ("grant", "default", "100000", "--test")):
            ended = await pomelo(folder, "accounts", *arguments)
            assert ended.status == 0, ended.error
        yield running


# --- no floods


async def test_a_caller_with_many_connections_and_calls_is_left_alone(served: Served) -> None:
    """200 connections with a key each, an upload of 50 MiB, 100 concurrent calls with bodies, 20 cancelled
    streams a second: none of these counts as a flood."""
    metadata = bearer(served.key)
    authorization = ("authorization", f"Bearer {served.key}")
    with ExitStack() as stack:
        idle = []
        for _ in range(200):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", served.grpc_port)))
            one.sendall(frames.hello() + frames.headers(1, MODELS, authorization) + frames.message(1, b""))
            idle.append(one)
            await asyncio.sleep(0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
            media, tasks = MediaServiceStub(channel), TaskServiceStub(channel)

            async def upload(size: int) -> None:
                async def pieces() -> AsyncIterator[UploadMediaRequest]:
                    yield UploadMediaRequest(content_type="audio/wav")
                    for _ in range(max(size // MIB, 1)):
                        yield UploadMediaRequest(chunk=bytes(min(size, MIB)))

                await media.UploadMedia(pieces(), metadata=metadata)

            async def leave() -> None:
                task = text_task("x" * 2_000)
                for _ in range(40):
                    call = tasks.StreamTask(StreamTaskRequest(task=task), metadata=metadata)
                    assert await call.read() is not grpc.aio.EOF
                    call.cancel()
                    await asyncio.sleep(0.05)

            async with asyncio.TaskGroup() as group:
                group.create_task(leave())
                group.create_task(upload(50 * MIB))
                for _ in range(40):
                    group.create_task(upload(100 * 1024))
        for one in idle:
            one.setblocking(False)
            assert one.recv(65536)
            with pytest.raises(BlockingIOError):
                one.recv(65536)  # a closed connection would give b"" or a different error
    assert "connections were closed" not in served.log()


# --- floods of frames


def flood(kind: str, authorization: list[tuple[str, str]]) -> Iterator[bytes]:
    """What an attacker sends after the first call; it never ends."""
    stream = 3

    def begin(flags: int = frames.END_HEADERS) -> bytes:
        return frames.headers(stream, MODELS, *authorization, flags=flags)

    one = b""
    match kind:
        case "PING":
            one = frames.frame(frames.PING, 0, 0, b"12345678")
        case "PING answers":
            one = frames.frame(frames.PING, frames.ACK, 0, b"12345678")
        case "SETTINGS":
            one = frames.frame(frames.SETTINGS)
        case "PRIORITY":
            one = frames.frame(frames.PRIORITY, 0, 1, b"\0\0\0\0\x10")
        case "WINDOW_UPDATE":
            one = frames.frame(frames.WINDOW_UPDATE, 0, 0, b"\0\0\0\1")
        case "unknown":
            one = frames.frame(0x20)
        case "CONTINUATION":
            yield begin(flags=0)
            one = frames.frame(frames.CONTINUATION, 0, stream, frames.block([("x-a", "b" * 100)] * 10))
        case "empty DATA":
            yield begin()
            one = frames.frame(frames.DATA, 0, stream)
        case "RST_STREAM" | "reset by the server":
            # A window increment of zero is an error, so the server resets the call itself.
            end = (frames.RST_STREAM, 8) if kind == "RST_STREAM" else (frames.WINDOW_UPDATE, 0)
            while True:
                one = b""
                for _ in range(200):
                    one += begin() + frames.frame(end[0], 0, stream, end[1].to_bytes(4, "big"))
                    stream += 2
                yield one
    while True:
        yield one * (32 * 1024 // len(one))


def attack(served: Served, kind: str, *, keyed: bool) -> None:
    """Floods the server until it cuts the connection; fails if that takes too long."""
    authorization = bearer(served.key) if keyed else []
    source = ("127.0.0.2", 0)
    with socket.create_connection(("127.0.0.1", served.grpc_port), 10, source) as connection:
        connection.sendall(
            frames.hello() + frames.headers(1, MODELS, *authorization) + frames.message(1, b"")
        )
        while len(connection.recv(65536)) < 60:  # its settings come first, then an answer
            pass
        connection.setblocking(False)
        began = time.perf_counter()
        with suppress(ConnectionError):
            for part in flood(kind, authorization):
                waiting = memoryview(part)
                while waiting:
                    assert time.perf_counter() - began < CUT_WITHIN
                    with suppress(BlockingIOError):
                        waiting = waiting[connection.send(waiting) :]
                    with suppress(BlockingIOError):
                        if not connection.recv(65536):
                            return


@pytest.mark.parametrize(
    "kind",
    [
        "PING",
        "PING answers",
        "SETTINGS",
        "PRIORITY",
        "WINDOW_UPDATE",
        "unknown",
        "CONTINUATION",
        "empty DATA",
        "RST_STREAM",
        "reset by the server",
    ],
)
async def test_a_flood_is_cut_with_a_key_and_without(served: Served, kind: str) -> None:
    async with good_callers(served) as callers:
        before = cpu(served)
        await asyncio.to_thread(attack, served, kind, keyed=False)
        await asyncio.to_thread(attack, served, kind, keyed=True)
        used = cpu(served) - before
        while len(callers.newcomers) < 4:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert used < 2 * CPU_OF_A_FLOOD
    callers.check()


# --- floods of connections


async def test_of_1500_silent_connections_64_stay_and_callers_from_their_address_do_not_notice(
    served: Served,
) -> None:
    assert process.raise_descriptor_limit() > 2_000
    with ExitStack() as stack:
        async with good_callers(served) as callers:
            for number in range(1_500):
                with suppress(ConnectionError):
                    silent = socket.create_connection(("127.0.0.1", served.grpc_port))
                    stack.enter_context(silent)
                    if number % 3 == 0:
                        silent.sendall(frames.hello())
                if number % 25 == 0:
                    await asyncio.sleep(0)
            most = 64 + 3  # and the good callers'
            async with asyncio.timeout(12):  # 3.5 were measured
                while await asyncio.to_thread(connections, served.pid, served.grpc_port) > most:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
        callers.check()


async def test_connections_that_come_without_end_leave_room_for_newcomers_with_a_key(served: Served) -> None:
    def come_and_stay() -> None:
        with ExitStack() as stack:
            for number in range(4_000):
                with suppress(ConnectionError):
                    one = socket.create_connection(("127.0.0.1", served.grpc_port), 10, ("127.0.0.2", 0))
                    stack.enter_context(one) if number % 2 else one.close()
                time.sleep(0.0002)  # otherwise this process has no time for the good callers

    assert process.raise_descriptor_limit() > 4_000
    async with good_callers(served) as callers:
        await asyncio.to_thread(come_and_stay)
    callers.check()
