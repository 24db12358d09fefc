"""Floods of frames and of connections on the gRPC port are cut off without delaying other callers.

The server is `pomelo serve`. Attackers connect from 127.0.0.2, except in the test of callers that share their
address.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, suppress

import grpc
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.runtime import process
from tests.calls import bearer
from tests.faults import frames
from tests.faults.other_callers import other_callers
from tests.integration.commands import pomelo
from tests.load.process_usage import MIB, cpu_seconds, silent_connections, wait_closed
from tests.processor import slowness
from tests.serving import Served, serve_interpreter
from tests.tasks import text_task

MODELS = "/pomelo.v1.ModelService/ListModels"

CUT_WITHIN = 10.0
"""Seconds; at most 2 were measured."""

CPU_OF_A_FLOOD = 1.0
"""Seconds of the server's CPU for one connection on a machine of usual speed; at most 0.4 were measured."""


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server with an unlimited account."""
    folder = tmp_path_factory.mktemp("flooded")
    async with serve_interpreter(folder) as running:
        for arguments in (("plan", "default", "unlimited"), ("grant", "default", "100000", "--test")):
            ended = await pomelo(folder, "accounts", *arguments)
            assert ended.status == 0, ended.error
        yield running


# --- normal traffic


async def test_many_connections_and_calls_of_a_caller_are_no_flood(served: Served) -> None:
    """200 connections with a key each, an upload of 50 MiB, 100 concurrent calls with bodies, 20 cancelled
    streams a second: none of these counts as a flood."""
    metadata = bearer(served.key)
    authorization = ("authorization", f"Bearer {served.key}")
    with ExitStack() as stack:
        idle = []
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.grpc_port)))
            connection.sendall(
                frames.hello() + frames.headers(1, MODELS, authorization) + frames.message(1, b"")
            )
            idle.append(connection)
            await asyncio.sleep(0)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
            media, tasks = MediaServiceStub(channel), TaskServiceStub(channel)

            async def upload(size: int) -> None:
                async def messages() -> AsyncIterator[UploadMediaRequest]:
                    yield UploadMediaRequest(header=UploadMediaHeader(content_type="audio/wav"))
                    for _ in range(max(size // MIB, 1)):
                        yield UploadMediaRequest(chunk=bytes(min(size, MIB)))

                await media.UploadMedia(messages(), metadata=metadata)

            async def cancel_streams() -> None:
                task = text_task("x" * 2_000)
                for _ in range(40):
                    call = tasks.StreamTask(StreamTaskRequest(spec=task), metadata=metadata)
                    assert await call.read() is not grpc.aio.EOF
                    call.cancel()
                    await asyncio.sleep(0.05)

            async with asyncio.TaskGroup() as group:
                group.create_task(cancel_streams())
                group.create_task(upload(50 * MIB))
                for _ in range(40):
                    group.create_task(upload(100 * 1024))
        for connection in idle:
            connection.setblocking(False)
            assert connection.recv(65536)
            with pytest.raises(BlockingIOError):
                connection.recv(65536)  # a closed connection would give b"" or a different error
    assert "connections were closed" not in served.log()


# --- floods of frames


REPEATED = {
    "PING": frames.frame(frames.PING, 0, 0, b"12345678"),
    "PING answers": frames.frame(frames.PING, frames.ACK, 0, b"12345678"),
    "SETTINGS": frames.frame(frames.SETTINGS),
    "PRIORITY": frames.frame(frames.PRIORITY, 0, 1, b"\0\0\0\0\x10"),
    "WINDOW_UPDATE": frames.frame(frames.WINDOW_UPDATE, 0, 0, b"\0\0\0\1"),
    "unknown": frames.frame(0x20),
    "CONTINUATION": frames.frame(frames.CONTINUATION, 0, 3, frames.block([("x-a", "b" * 100)] * 10)),
    "empty DATA": frames.frame(frames.DATA, 0, 3),
}
"""The frame that a flood repeats."""

# A window increment of zero is an error, so the server resets the call itself.
ENDS = {"RST_STREAM": (frames.RST_STREAM, 8), "reset by the server": (frames.WINDOW_UPDATE, 0)}
"""The frame that ends each of endless calls."""

FLOODS = (*REPEATED, *ENDS)


def flood(name: str, authorization: list[tuple[str, str]]) -> Iterator[bytes]:
    """Yields the bytes of a flood, without end; they follow a first call."""
    if name in ENDS:
        frame_type, value = ENDS[name]

        def call(stream: int) -> bytes:
            end = frames.frame(frame_type, 0, stream, value.to_bytes(4, "big"))
            return frames.headers(stream, MODELS, *authorization) + end

        for first in itertools.count(3, 400):
            yield b"".join(map(call, range(first, first + 400, 2)))
    if name in ("CONTINUATION", "empty DATA"):
        flags = 0 if name == "CONTINUATION" else frames.END_HEADERS
        yield frames.headers(3, MODELS, *authorization, flags=flags)
    yield from itertools.repeat(REPEATED[name] * (32 * 1024 // len(REPEATED[name])))


def attack(served: Served, name: str, *, with_key: bool) -> None:
    """Floods the server until it cuts the connection; fails if that takes too long."""
    authorization = bearer(served.key) if with_key else []
    source = ("127.0.0.2", 0)
    with socket.create_connection(("127.0.0.1", served.grpc_port), 10, source) as connection:
        connection.sendall(
            frames.hello() + frames.headers(1, MODELS, *authorization) + frames.message(1, b"")
        )
        while len(connection.recv(65536)) < 60:  # SETTINGS come first, then an answer
            pass
        connection.setblocking(False)
        began = time.perf_counter()
        with suppress(ConnectionError):
            for part in flood(name, authorization):
                unsent = memoryview(part)
                while unsent:
                    assert time.perf_counter() - began < CUT_WITHIN, name
                    with suppress(BlockingIOError):
                        unsent = unsent[connection.send(unsent) :]
                    with suppress(BlockingIOError):
                        if not connection.recv(65536):
                            return


async def test_each_flood_is_cut_off_with_a_key_and_without(served: Served) -> None:
    async with other_callers(served, "rest", "grpc", "new_grpc") as callers:
        for name in FLOODS:
            used: list[float] = []
            limit = 2 * CPU_OF_A_FLOOD * slowness()
            # A busy machine can only delay the end of a flood: the lower of two measurements is nearer to the truth.
            while len(used) < 2 and not (used and used[0] < limit):
                before = cpu_seconds(served.pid)
                await asyncio.to_thread(attack, served, name, with_key=False)
                await asyncio.to_thread(attack, served, name, with_key=True)
                used.append(cpu_seconds(served.pid) - before)
            assert min(used) < limit, name
    callers.check()


# --- floods of calls


async def test_calls_without_a_message_do_not_delay_health_checks_from_other_addresses(
    served: Served,
) -> None:
    def start_checks() -> None:
        with socket.create_connection(("127.0.0.1", served.grpc_port), 10, ("127.0.0.2", 0)) as connection:
            connection.sendall(frames.hello())
            for number in range(300):
                connection.sendall(frames.headers(2 * number + 1, "/grpc.health.v1.Health/Check"))
                time.sleep(0.01)

    async with other_callers(served, "grpc_health") as callers:
        await asyncio.to_thread(start_checks)
    callers.check()


# --- floods of connections


async def test_of_1500_silent_connections_64_stay_and_callers_from_their_address_are_not_delayed(
    served: Served,
) -> None:
    assert process.raise_descriptor_limit() > 2_000
    async with AsyncExitStack() as stack:
        async with other_callers(served, "rest", "grpc", "new_grpc") as callers:
            silent = silent_connections(served.grpc_port, 1_500, frames.hello(), b"", b"")
            await stack.enter_async_context(silent)
            # The other callers have up to three; 3.5 seconds were measured.
            await wait_closed(served.pid, served.grpc_port, 64 + 3, 12)
        callers.check()


async def test_a_flood_of_new_connections_leaves_room_for_new_connections_with_a_key(served: Served) -> None:
    def open_connections() -> None:
        with ExitStack() as stack:
            for number in range(4_000):
                with suppress(ConnectionError):
                    opened = socket.create_connection(("127.0.0.1", served.grpc_port), 10, ("127.0.0.2", 0))
                    stack.enter_context(opened) if number % 2 else opened.close()
                time.sleep(0.0002)  # leaves CPU time to the other callers, on a machine with few cores

    assert process.raise_descriptor_limit() > 4_000
    async with other_callers(served, "rest", "grpc", "new_grpc") as callers:
        await asyncio.to_thread(open_connections)
    callers.check()
