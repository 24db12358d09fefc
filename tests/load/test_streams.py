"""Many concurrent streams at full speed: other callers are hardly delayed, and the server stores no stream.

The server is `pomelo serve`, with `pomelo gateway` in front of it for some tests; the vendor and the readers
of the streams are processes of their own (`tests.load.flood`). The tests compare the median time of small
tasks before and during the streams.

`make load` runs a hundred streams; the goal is less than 20 times the idle time. `make test` runs a fifth of
that and allows for a busy machine: without fair scheduling of streams it was a thousand times.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.integration.commands import start_interpreter
from tests.load.child_process import start_child
from tests.load.process_usage import MIB, peak_memory, resident
from tests.load.server import Server, open_server
from tests.ports import free_port
from tests.tasks import text_body, text_task

STREAMS = int(os.environ.get("LOAD_STREAMS", "20"))
"""The number of concurrent streams."""

FULL = STREAMS >= 100
MAX_RATIO = 20 if FULL else 60
CALLS = 60 if FULL else 25
PACE = 0.01
"""Seconds between the events of a paced stream."""

LONG_TEXTS = 5
"""The number of concurrent long texts."""

LONG_SIZE = 7 * MIB
"""The bytes of a long text, below the maximum size of a text."""

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Ways:
    """A small task over every protocol, and paced streams."""

    server: Server
    gateway: str

    async def rest(self, url: str | None = None) -> None:
        async with self.server.post(text_body("Hi"), url=url) as answer:
            assert answer.status == 200, await answer.text()
            await answer.read()

    async def remote(self) -> None:
        await self.rest(self.gateway)

    async def grpc(self) -> None:
        stub = TaskServiceStub(self.server.channels[0])
        await stub.RunTask(RunTaskRequest(spec=text_task("Hi")), metadata=self.server.metadata)

    async def paced(self, url: str, events: int) -> list[float]:
        """Reads a paced stream; returns the seconds from the vendor to here for each event."""
        delays = []
        body = text_body(f"pace={PACE} events={events}", stream=True)
        async with self.server.post(body, url=url) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    content = json.loads(line[6:])["choices"][0]["delta"].get("content")
                    if content:
                        delays.append((time.monotonic_ns() - int(content)) / 1e9)
        return delays


@pytest.fixture(scope="module")
async def ways(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ways]:
    """A vendor, the server, and a gateway in front of it; all have run a few tasks."""
    folder = tmp_path_factory.mktemp("streams")
    gateway_folder, address = folder / "gateway", f"127.0.0.1:{free_port()}"
    gateway_folder.mkdir()
    async with AsyncExitStack() as stack:
        vendor = await stack.enter_async_context(start_child("tests.load.flood", "vendor"))
        keys = {"OPENAI_API_KEY": "any", "OPENAI_BASE_URL": vendor.first_line}
        server = await stack.enter_async_context(open_server(folder, 1, **keys))
        command = ("gateway", "--target", f"127.0.0.1:{server.served.grpc_port}")
        gateway = await stack.enter_async_context(
            start_interpreter(gateway_folder, *command, POMELO_REST=address)
        )
        await gateway.read_until("gRPC  asks")
        opened = Ways(server, f"http://{address}")
        for _ in range(20):
            for call in (opened.rest, opened.remote, opened.grpc):
                await call()
        yield opened


@pytest.fixture
def server(ways: Ways) -> Server:
    return ways.server


async def median(call: Callable[[], Awaitable[None]]) -> float:
    """The median duration of CALLS consecutive calls, in seconds."""
    durations = []
    for _ in range(CALLS):
        began = time.perf_counter()
        await call()
        durations.append(time.perf_counter() - began)
    return statistics.median(durations)


@pytest.mark.parametrize("way", ["rest", "grpc", "remote"])
async def test_streams_at_full_speed_hardly_delay_other_callers(ways: Ways, server: Server, way: str) -> None:
    calls = {"REST": ways.rest, "gRPC": ways.grpc}
    port, protocol = {
        "rest": (str(server.served.port), "rest"),
        "grpc": (str(server.served.grpc_port), "grpc"),
        "remote": (ways.gateway.rpartition(":")[2], "rest"),
    }[way]
    if way == "remote":
        calls["remote"] = ways.remote
    idle = {name: await median(call) for name, call in calls.items()}
    async with start_child(
        "tests.load.flood", "readers", protocol, port, server.key, str(STREAMS)
    ) as readers:
        busy = {name: await median(call) for name, call in calls.items()}
        url = ways.gateway if way == "remote" else server.served.url
        delay = statistics.median(await ways.paced(url, 2 * CALLS))
    received = json.loads(readers.result)
    ratios = {name: busy[name] / idle[name] for name in calls}
    medians = ", ".join(
        f"{name} {idle[name] * 1e3:.1f} -> {busy[name] * 1e3:.1f} ms ({ratios[name]:.1f} x)" for name in calls
    )
    sys.stdout.write(
        f"\n{STREAMS} streams, {way}: {medians}; a paced stream's events {delay * 1e3:.1f} ms late; "
        f"{received['bytes'] / 1e6:.2f} MB/s\n"
    )
    assert max(ratios.values()) < MAX_RATIO
    assert delay < (MAX_RATIO / 2) * PACE
    assert received["min"] > received["max"] / 5  # the streams get similar shares


async def read(server: Server, size: int) -> None:
    received, tail = 0, b""
    async with server.post(text_body(f"size=500 events={size // 500}", stream=True)) as answer:
        assert answer.status == 200, await answer.text()
        async for part in answer.content.iter_any():
            received += len(part)
            tail = part
    assert received > size
    assert tail.endswith(b"data: [DONE]\n\n")


async def test_a_text_without_an_idempotency_key_is_not_kept_in_memory(server: Server) -> None:
    await asyncio.gather(*[read(server, MIB) for _ in range(LONG_TEXTS)])
    before = resident(server.served.pid)
    with peak_memory(server.served.pid) as peak:
        await asyncio.gather(*[read(server, LONG_SIZE) for _ in range(LONG_TEXTS)])
    grown = peak.bytes - before
    sys.stdout.write(
        f"\n{LONG_TEXTS} texts of {LONG_SIZE / MIB:.0f} MiB: {before / MIB:.1f} + {grown / MIB:.1f} MiB\n"
    )
    assert grown < LONG_TEXTS * LONG_SIZE / 3
