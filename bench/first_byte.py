"""Measures how much later the first byte of audio leaves Pomelo than the vendor, beside a bare relay.

    python -m bench.first_byte [--calls 500] [--at-once 1]

The vendor writes the time at which it sends into the first packet, so what is measured is its way to the
listener: straight from the vendor, through the bare aiohttp proxy, and through `pomelo serve` in three
ways. The ways take turns, call by call, in one run, so that what else the machine does hits all of them
alike. "added" is the median less the straight one. Everything listens on loopback and ends with the run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import grpc

from bench.results import percentile
from bench.scenarios import VOICE
from bench.systems import AIOHTTP, SQLITE, Systems
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub

WARM = 50
GOAL = 20.0
"""Milliseconds that Pomelo may add."""

BODY = {
    "model": "eleven-labs-tts",
    "text": "[[1@100]] Hello, world!",  # the first packet comes 10 ms after the head
    "voice": VOICE,
}

Ask = Callable[[], Awaitable[float]]
"""One call: the milliseconds from the vendor's sending to the listener's having it."""


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
    warm, measured = -(-WARM // at_once), -(-calls // at_once)
    for turn in range(warm + measured):
        for name, ask in ways.items():
            found = await asyncio.gather(*[ask() for _ in range(at_once)])
            if turn >= warm:
                late[name] += found
    return late


def show(late: dict[str, list[float]]) -> str:
    straight = percentile(late["straight"], 0.5)
    lines = [f"{'way':<14}{'p50 ms':>9}{'p99 ms':>9}{'added ms':>10}"]
    for name, values in late.items():
        median, last = percentile(values, 0.5), percentile(values, 0.99)
        lines.append(f"{name:<14}{median:>9.2f}{last:>9.2f}{median - straight:>10.2f}")
    worst = max(percentile(values, 0.99) for name, values in late.items() if name.startswith("pomelo"))
    lines.append(f"p99 of Pomelo's worst way: {worst:.2f} ms; the goal is {GOAL:g}")
    return "\n".join(lines) + "\n"


async def run(calls: int, at_once: int) -> None:
    async with AsyncExitStack() as stack:
        systems = Systems(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())), (None, None))
        vendor, bare, pomelo = await systems.vendor(), await systems.get(AIOHTTP), await systems.get(SQLITE)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(pomelo.grpc))
        path = f"/v1/text-to-speech/{VOICE}/stream"
        ours, headers = f"{pomelo.url}/api/v1/task", {"Authorization": f"Bearer {pomelo.key}"}
        ways = {
            "straight": by_http(session, vendor + path),
            "relay": by_http(session, bare.url + path),
            "pomelo raw": by_http(session, ours, **headers, Accept="audio/*"),
            "pomelo events": by_events(session, ours, **headers),
            "pomelo gRPC": by_grpc(channel, pomelo.key),
        }
        sys.stdout.write(show(await measure(ways, calls, at_once)))


def main() -> None:
    parser = argparse.ArgumentParser(description="When the first byte of a sound leaves.")
    parser.add_argument("--calls", type=int, default=500, help="calls of each way")
    parser.add_argument("--at-once", type=int, default=1, help="how many of them concurrently")
    given = parser.parse_args()
    asyncio.run(run(given.calls, given.at_once))


if __name__ == "__main__":
    main()
