"""How much later than from the vendor the first byte of a sound leaves Pomelo, beside a bare relay.

    python -m bench.first_byte [--calls 500] [--at-once 1]

The vendor writes the time at which it sends into the first packet, so what is measured is its way to the
listener: straight from the vendor, through a relay that does nothing but pass pieces on (aiohttp, 20 lines,
below), and through `pomelo serve` in three ways. The ways take turns, call by call, in one run,
so that what else the machine does hits all of them alike. "added" is the median less the straight one; the
ratio is to the relay's. Everything listens on loopback and ends with the run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import grpc
from aiohttp import web

from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.integration.commands import live_key
from tests.serving import serve

WARM = 50
GOAL = 20.0
"""Milliseconds that Pomelo may add."""

THINKS = 0.01
"""Seconds between the vendor's head and its first packet."""

REST = b"\xff" * 4096
VOICE = "pNInz6obpgDQGcFmaJgB"
BODY = {"model": "eleven-labs-tts", "text": "Hello, world!", "voice": VOICE}

SESSION = web.AppKey("session", aiohttp.ClientSession)

Ask = Callable[[], Awaitable[float]]
"""One call: the milliseconds from the vendor's sending to the listener's having it."""


# --- the vendor and the relay, each a process


async def speak(request: web.Request) -> web.StreamResponse:
    """A sound whose first packet has the time of its sending."""
    await request.read()
    response = web.StreamResponse(headers={"Content-Type": "audio/mpeg"})
    await response.prepare(request)
    await asyncio.sleep(THINKS)
    await response.write(b"ID3\4%020d" % time.monotonic_ns())
    for _ in range(4):
        await response.write(REST)
    await response.write_eof()
    return response


def relay(target: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Passes a request on, and the pieces of its answer back, and does nothing else."""

    async def pass_on(request: web.Request) -> web.StreamResponse:
        async with request.app[SESSION].post(target + request.path, data=await request.read()) as answer:
            response = web.StreamResponse(headers={"Content-Type": answer.headers["Content-Type"]})
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    return pass_on


async def one_session(app: web.Application) -> AsyncIterator[None]:
    """The relay's connections, for as long as it runs."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as app[SESSION]:
        yield


async def listen(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> None:
    """Serves a handler, says where, and ends with its stdin."""
    app = web.Application()
    app.cleanup_ctx.append(one_session)
    app.router.add_post("/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sys.stdout.write(f"http://127.0.0.1:{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[str]:
    """This file as a process of its own; gives where it listens."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.first_byte", *arguments, stdin=pipe, stdout=pipe
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


# --- the listener


def since(data: bytes) -> float:
    """Milliseconds since the first packet was sent."""
    return (time.monotonic_ns() - int(data[4:24])) / 1e6


def by_http(session: aiohttp.ClientSession, url: str, **headers: str) -> Ask:
    """Asks for the bytes themselves."""

    async def ask() -> float:
        async with session.post(url, json=BODY, headers=headers) as answer:
            pieces = answer.content.iter_any()
            late = since(await anext(pieces))
            async for _ in pieces:
                pass
        return late

    return ask


def by_events(session: aiohttp.ClientSession, url: str, **headers: str) -> Ask:
    """Asks for server-sent events."""

    async def ask() -> float:
        late = 0.0
        async with session.post(url, json={**BODY, "stream": True}, headers=headers) as answer:
            async for line in answer.content:
                if not late and line.startswith(b"data: {"):
                    late = since(base64.b64decode(json.loads(line[6:])["audio"]["b64_json"]))
        return late

    return ask


def by_grpc(channel: Any, key: str) -> Ask:
    """Asks by StreamTask."""
    task = TaskSpec(model=BODY["model"])
    task.text_to_speech.text, task.text_to_speech.voice = BODY["text"], VOICE
    stub = TaskServiceStub(channel)

    async def ask() -> float:
        late = 0.0
        call = stub.StreamTask(StreamTaskRequest(spec=task), metadata=[("authorization", f"Bearer {key}")])
        async for response in call:
            if not late and response.event.audio_chunk.data:
                late = since(response.event.audio_chunk.data)
        return late

    return ask


async def measure(ways: dict[str, Ask], calls: int, at_once: int) -> dict[str, list[float]]:
    """So many calls of each way, in turns."""
    late: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range((WARM + calls) // at_once):
        for name, ask in ways.items():
            found = await asyncio.gather(*[ask() for _ in range(at_once)])
            if turn * at_once >= WARM:
                late[name] += found
    return late


def show(late: dict[str, list[float]]) -> str:
    """The table."""
    straight = statistics.median(late["straight"])
    bare = statistics.median(late["relay"]) - straight
    lines = [f"{'way':<14}{'p50 ms':>9}{'p99 ms':>9}{'added ms':>10}{'x relay':>9}"]
    for name, values in late.items():
        median, last = statistics.median(values), statistics.quantiles(values, n=100)[98]
        added = median - straight
        lines.append(f"{name:<14}{median:>9.2f}{last:>9.2f}{added:>10.2f}{added / bare:>9.1f}")
    worst = max(statistics.quantiles(values, n=100)[98] for name, values in late.items() if name[0] == "p")
    lines.append(f"p99 of Pomelo's worst way: {worst:.2f} ms; the goal is {GOAL:g}")
    return "\n".join(lines) + "\n"


async def run(calls: int, at_once: int) -> None:
    """Starts everything, measures, prints."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vendor = await stack.enter_async_context(started("--role", "vendor"))
        bare = await stack.enter_async_context(started("--role", "relay", "--target", vendor))
        served = await stack.enter_async_context(
            serve(folder, ELEVENLABS_API_KEY="any", ELEVENLABS_BASE_URL=vendor)
        )
        key = await live_key(folder)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{served.grpc_port}"))
        path = f"/v1/text-to-speech/{VOICE}/stream"
        ours, headers = f"{served.url}/api/v1/task", {"Authorization": f"Bearer {key}"}
        ways = {
            "straight": by_http(session, vendor + path),
            "relay": by_http(session, bare + path),
            "pomelo raw": by_http(session, ours, **headers, Accept="audio/*"),
            "pomelo events": by_events(session, ours, **headers),
            "pomelo gRPC": by_grpc(channel, key),
        }
        sys.stdout.write(show(await measure(ways, calls, at_once)))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="When the first byte of a sound leaves.")
    parser.add_argument("--calls", type=int, default=500, help="calls of each way")
    parser.add_argument("--at-once", type=int, default=1, help="how many of them concurrently")
    parser.add_argument("--role", choices=("vendor", "relay"), help=argparse.SUPPRESS)
    parser.add_argument("--target", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    match given.role:
        case "vendor":
            asyncio.run(listen(speak))
        case "relay":
            asyncio.run(listen(relay(given.target)))
        case _:
            asyncio.run(run(given.calls, given.at_once))


if __name__ == "__main__":
    main()
