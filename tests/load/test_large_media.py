"""Large sounds, many at once: they go through the server, and are never held in it.

The server is `pomelo serve`; the vendor is a process of its own, so that what is measured is the server
alone. The vendor holds every call until all of them are there: so many uploads have come in whole, or so many
sounds have begun, at one moment.

`make load` runs a hundred at once, as the goal is worded: less than 150 MiB more than the warm server has.
`make test` runs a fifth of that, and gives it a fifth of the room. Uploads are spooled to the data folder: at
the full size 2.6 GB, which a form's task deletes when it ends, and which stay for an hour when they were
uploaded by gRPC. Sounds that may be linked to are kept there, too, twice 1 GB. The folder is deleted at the end.

Pieces of an upload have 256 KiB, the largest that Pomelo's own clients send. gRPC holds a message until it is
whole, so a hundred callers who send the largest that there may be (1 MiB) take some 350 MiB in place of 100.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import aiohttp
import grpc
import psutil
import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing.sound import packets
from tests.integration.commands import live_key
from tests.load.process_usage import MIB, peak_memory, resident
from tests.load.vendor import PACKET, SIZE, vendor
from tests.serving import Served, serve

CALLS = int(os.environ.get("LOAD_CALLS", "20"))
"""How many at once."""

GROWTH_MOST = 150 * MIB * CALLS // 100
UPLOAD = 25 * MIB
PIECE = 256 * 1024
WARM = 4
BOUNDARY = "x" * 32

pytestmark = pytest.mark.timeout(60 + 6 * CALLS)


@dataclass(frozen=True)
class House:
    """The server under load, its callers, and its memory once everything is loaded."""

    served: Served
    key: str
    session: aiohttp.ClientSession
    channels: list[grpc.aio.Channel]

    def channel(self, number: int) -> grpc.aio.Channel:
        """The connection of a caller: 25 share one."""
        return self.channels[number // 25 % len(self.channels)]

    def metadata(self) -> list[tuple[str, str]]:
        """What a gRPC call bears."""
        return [("authorization", f"Bearer {self.key}")]

    def headers(self, **more: str) -> dict[str, str]:
        """What a REST call bears."""
        return {"Authorization": f"Bearer {self.key}", **{k.replace("_", "-"): v for k, v in more.items()}}


Run = Callable[[House, str, int], Awaitable[None]]
"""One call of a load: of which run, and its number."""


# --- sounds


@functools.cache
def _noise() -> bytes:
    return hashlib.shake_256(b"noise").digest(4 * MIB)


def sound(run: str, number: int) -> Iterator[bytes]:
    """An upload in pieces, each unlike every other one of any upload."""
    noise = memoryview(_noise())
    yield f"{run} number={number} ".encode().ljust(PIECE, b".")
    for at in range(1, UPLOAD // PIECE):
        start = (number * 7919 + at * 104_729) % (len(noise) - PIECE)
        yield number.to_bytes(4) + at.to_bytes(4) + noise[start : start + PIECE - 8]


async def hashed(run: str, number: int, digest: Any) -> AsyncIterator[bytes]:
    """The pieces of an upload; `digest` is fed as they go out."""
    for piece in sound(run, number):
        digest.update(piece)
        yield piece


def heard(text: str, digest: Any) -> None:
    """What the vendor tells of an upload is what was sent."""
    assert re.sub(r"\s*\(.*", "", text) == f"{UPLOAD} bytes with SHA-256 {digest.hexdigest()}"


@functools.cache
def spoken(text: str) -> tuple[int, str]:
    """The size and the digest of the sound that the vendor makes of a text."""
    digest, size = hashlib.sha256(), 0
    for packet in packets("mp3_44100_128", SIZE, text, PACKET):
        digest.update(packet)
        size += len(packet)
    return size, digest.hexdigest()


class Listener:
    """Takes a sound in and keeps its size and its digest alone."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = hashlib.sha256()

    def take(self, data: bytes) -> None:
        """The next bytes."""
        self.size += len(data)
        self._digest.update(data)

    def found(self) -> tuple[int, str]:
        """As `spoken` tells it."""
        return self.size, self._digest.hexdigest()


# --- one call of each load


async def upload_over_rest(house: House, run: str, number: int) -> None:
    """A form, sent as it is made, and the transcript."""
    digest = hashlib.sha256()

    async def body() -> AsyncIterator[bytes]:
        yield (
            f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=model\r\n\r\neleven-labs-stt\r\n"
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="audio"; filename="a.bin"\r\n\r\n'
        ).encode()
        async for piece in hashed(run, number, digest):
            yield piece
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    headers = house.headers(Content_Type=f"multipart/form-data; boundary={BOUNDARY}")
    async with house.session.post(f"{house.served.url}/api/v1/task", data=body(), headers=headers) as answer:
        found = await answer.json()
        assert answer.status == 200, found
        heard(found["text"], digest)


async def upload_over_grpc(house: House, run: str, number: int) -> None:
    """UploadMedia, then RunTask of what was uploaded."""
    digest = hashlib.sha256()
    channel = house.channel(number)

    async def requests() -> AsyncIterator[UploadMediaRequest]:
        yield UploadMediaRequest(content_type="application/octet-stream")
        async for piece in hashed(run, number, digest):
            yield UploadMediaRequest(chunk=piece)

    uploaded = await MediaServiceStub(channel).UploadMedia(requests(), metadata=house.metadata())
    assert uploaded.media.size_bytes == UPLOAD
    task = Task(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = uploaded.media.media_id
    response = await TaskServiceStub(channel).RunTask(RunTaskRequest(task=task), metadata=house.metadata())
    heard(response.result.transcription.text, digest)


def _speak(run: str, number: int, **more: Any) -> dict[str, Any]:
    return {"model": "eleven-labs-tts", "text": f"{run} number={number}", "voice": "adam", **more}


async def stream_over_rest(house: House, run: str, number: int) -> None:
    """Server-sent events."""
    listener, last = Listener(), ""
    body = _speak(run, number, stream=True)
    async with house.session.post(
        f"{house.served.url}/api/v1/task", json=body, headers=house.headers()
    ) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: "):
                last = line[6:].decode().strip()
                if '"b64_json"' in last:
                    listener.take(base64.b64decode(json.loads(last)["audio"]["b64_json"]))
    assert last == "[DONE]"
    assert listener.found() == spoken(body["text"])


async def raw_over_rest(house: House, run: str, number: int) -> None:
    """The bytes themselves."""
    listener = Listener()
    body = _speak(run, number)
    async with house.session.post(
        f"{house.served.url}/api/v1/task", json=body, headers=house.headers(Accept="audio/*")
    ) as answer:
        assert answer.status == 200, await answer.text()
        async for piece in answer.content.iter_any():
            listener.take(piece)
    assert listener.found() == spoken(body["text"])


async def stream_over_grpc(house: House, run: str, number: int) -> None:
    """StreamTask."""
    listener = Listener()
    task = Task(model="eleven-labs-tts")
    task.text_to_speech.text = f"{run} number={number}"
    task.text_to_speech.voice = "adam"
    stub = TaskServiceStub(house.channel(number))
    async for event in stub.StreamTask(StreamTaskRequest(task=task), metadata=house.metadata()):
        listener.take(event.audio_chunk.data)
    assert listener.found() == spoken(task.text_to_speech.text)


LOADS: dict[str, Run] = {
    "uploads over REST": upload_over_rest,
    "uploads over gRPC": upload_over_grpc,
    "streams over REST": stream_over_rest,
    "raw sound over REST": raw_over_rest,
    "streams over gRPC": stream_over_grpc,
}


# --- the house


async def load(house: House, one: Run, name: str, calls: int) -> None:
    """So many calls at once."""
    run = f"together={calls} run={name}"
    await asyncio.gather(*[one(house, run, number) for number in range(calls)])


def uploads(house: House) -> int:
    """How many uploads are on the disk."""
    return sum(path.stat().st_size == UPLOAD for path in (house.served.data / "media").iterdir())


@pytest.fixture(scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """The server, warm: it has done a few calls of every load."""
    folder = tmp_path_factory.mktemp("load")
    needed = 2 * (UPLOAD + SIZE) * (CALLS + WARM)
    assert shutil.disk_usage(folder).free > needed, f"it needs {needed / MIB:,.0f} MiB of disk"
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        base = await stack.enter_async_context(vendor(folder))
        served = await stack.enter_async_context(
            serve(folder, ELEVENLABS_API_KEY="elevenlabs-upstream", ELEVENLABS_BASE_URL=base)
        )
        key = await live_key(folder)
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(
                connector=connector, read_bufsize=256 * 1024, timeout=aiohttp.ClientTimeout(total=None)
            )
        )
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    f"127.0.0.1:{served.grpc_port}", options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
            for _ in range(4)
        ]
        warm = House(served, key, session, channels)
        for number, one in enumerate(LOADS.values()):
            await load(warm, one, f"warm{number}", WARM)
        yield warm


@pytest.fixture(scope="module")
def before(house: House) -> int:
    """The memory of the warm server, in bytes."""
    return resident(house.served.pid)


@pytest.mark.parametrize("name", LOADS)
async def test_the_server_does_not_grow_with_what_goes_through_it(
    name: str, house: House, before: int
) -> None:
    pid, kept = house.served.pid, uploads(house)
    began = time.monotonic()
    cpu = sum(psutil.Process(pid).cpu_times()[:2])
    with peak_memory(pid) as peak:
        await load(house, LOADS[name], f"full{list(LOADS).index(name)}", CALLS)
    took = time.monotonic() - began
    cpu = sum(psutil.Process(pid).cpu_times()[:2]) - cpu
    grown = peak.bytes - before
    sys.stdout.write(
        f"\n{CALLS} {name}: {before / MIB:.1f} + {grown / MIB:.1f} MiB, {took:.1f} s, of CPU {cpu:.1f} s\n"
    )
    assert peak.samples > 10
    assert grown < GROWTH_MOST
    assert uploads(house) - kept == (CALLS if name == "uploads over gRPC" else 0)
    assert not list((house.served.data / "media").glob(".part_*"))
