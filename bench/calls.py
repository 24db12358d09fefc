"""Counts the Python function calls that a server makes per request: unlike a time, almost the same each time.

    python -m bench.calls [--requests 200] [NAME…]

The server runs under a profile function that counts the calls of all its threads in a mapped file. The
requests come one after another from this process, which is not counted; after each, the count is read once it
stands still. A resumed coroutine or generator counts as a call, a function in C does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import mmap
import runpy
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from http.client import HTTPResponse
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import grpc

from bench.floors import COMPLETIONS
from bench.pomelo import serve
from bench.processes import System, module, start
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer
from tests.tasks import text_body, text_task

WARM_UP = 50
"""Requests that are not counted."""

CHUNKS = 200
"""Events of a stream."""

_STILL = 0.015
"""Seconds without a call after which a request is over."""

_COUNT_BYTES = 8

Ask = Callable[[], None]
"""One request, to the last byte of its answer."""


@asynccontextmanager
async def _aiohttp(folder: Path, vendor: str, profile: Sequence[str]) -> AsyncIterator[System]:
    command = module(*profile, "bench.floors", "aiohttp", "--vendor", vendor)
    async with start(command, folder / "output", ready="http://") as floor:
        yield System([floor], floor.url, has_vendor_paths=True)


def _rest(system: System, *, stream: bool) -> tuple[Ask, Callable[[], None]]:
    address = urlsplit(system.url)
    path = COMPLETIONS if system.has_vendor_paths else "/api/v1/task"
    connection = socket.create_connection((address.hostname, address.port))
    body = json.dumps({**text_body(f"[[{CHUNKS}]]"), "stream": stream})
    # In one piece: a server that gets the body later makes more calls.
    request = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {system.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()

    def ask() -> None:
        connection.sendall(request)
        response = HTTPResponse(connection)
        response.begin()
        content = response.read()
        assert response.status == 200, content
        assert not stream or content.count(b"\n\n") >= CHUNKS

    return ask, connection.close


def _grpc(system: System, *, stream: bool) -> tuple[Ask, Callable[[], None]]:
    channel = grpc.insecure_channel(system.grpc)
    stub, metadata, spec = TaskServiceStub(channel), bearer(system.key), text_task(f"[[{CHUNKS}]]")

    def ask() -> None:
        if stream:
            events = sum(1 for _ in stub.StreamTask(StreamTaskRequest(spec=spec), metadata=metadata))
            assert events >= CHUNKS
        else:
            stub.RunTask(RunTaskRequest(spec=spec), metadata=metadata)

    return ask, channel.close


SCENARIOS = {
    f"{system} {front_end} {'stream' if stream else 'whole'}": (front_end, stream)
    for system, front_end in (("aiohttp", "REST"), ("pomelo", "REST"), ("pomelo", "gRPC"))
    for stream in (False, True)
}
"""What can be counted: a request, or an event of a stream."""


def _calls_of(ask: Ask, count: memoryview) -> int:
    """The calls of one request."""
    before = count[0]
    ask()
    last, since = count[0], time.monotonic()
    while time.monotonic() - since < _STILL:
        time.sleep(0.001)
        if count[0] != last:
            last, since = count[0], time.monotonic()
    return int(last - before)


def _median_calls(ask: Ask, file: Path, requests: int) -> float:
    with (
        file.open("r+b") as opened,
        closing(mmap.mmap(opened.fileno(), _COUNT_BYTES)) as mapped,
        memoryview(mapped) as data,
        data.cast("Q") as count,
    ):
        for _ in range(WARM_UP):
            ask()
        return statistics.median(_calls_of(ask, count) for _ in range(requests))


async def count_calls(name: str, requests: int = 200) -> float:
    """The median of calls per request of a scenario, or per event if it streams."""
    front_end, stream = SCENARIOS[name]
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        file = folder / "count"
        file.write_bytes(bytes(_COUNT_BYTES))
        vendor = await stack.enter_async_context(
            start(module("bench.vendor"), folder / "vendor", ready="http://")
        )
        profile = ("bench.calls", "--profile", str(file))
        if name.startswith("aiohttp"):
            opened = _aiohttp(folder, vendor.url, profile)
        else:
            opened = serve(folder, vendor.url, program=(*profile, "pomelo.cli", "serve"))
        system = await stack.enter_async_context(opened)
        ask, close = (_rest if front_end == "REST" else _grpc)(system, stream=stream)
        stack.callback(close)
        calls = await asyncio.to_thread(_median_calls, ask, file, requests)
    return calls / CHUNKS if stream else calls


def _run_counted(file: Path, name: str, arguments: list[str]) -> None:
    """Runs a module as a program and counts its calls."""
    with file.open("r+b") as opened:
        counts = memoryview(mmap.mmap(opened.fileno(), _COUNT_BYTES)).cast("Q")

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            counts[0] += 1  # no other thread runs between the read and the write

    sys.argv[1:] = arguments
    threading.setprofile(count)
    sys.setprofile(count)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def main() -> None:
    if sys.argv[1:2] == ["--profile"]:
        _run_counted(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description="Python function calls per request.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of: {', '.join(SCENARIOS)}")
    parser.add_argument("--requests", type=int, default=200)
    given = parser.parse_args()
    for name in given.names or SCENARIOS:
        calls = asyncio.run(count_calls(name, given.requests))
        unit = "event" if SCENARIOS[name][1] else "request"
        sys.stdout.write(f"{name:<22}{calls:>9.1f} a {unit}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
