"""Many concurrent large audio files pass through the server, which never holds a whole one in memory.

The server is `pomelo serve`; the vendor is a separate process, so that only the server's memory is
measured. The vendor delays all calls until every one has arrived: then all uploads are complete, or all audio
streams have started.

`make load` runs a hundred concurrent calls; the goal is growth by less than 150 MiB. `make test` runs a fifth
of that with a fifth of the limit. Uploads are spooled to the data folder, 2.6 GB at full size: the spool of a
form is deleted when its task ends, uploads over gRPC are kept for an hour. Generated audio with a link is
kept as well, twice 1 GB. The folder is deleted at the end.

The chunks of an upload have 256 KiB, the largest that Pomelo's own clients send. gRPC buffers whole messages,
so a hundred callers with the largest allowed chunks (1 MiB) need about 350 MiB instead of 100.
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
from typing import Any

import pytest

from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.gen.v1.media_service_pb2_grpc import MediaServiceStub
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.testing.audio import packets
from tests.load.child_process import start_child
from tests.load.process_usage import MIB, cpu_seconds, peak_memory, resident
from tests.load.server import Server, open_server
from tests.load.vendor import PACKET, SIZE
from tests.tasks import TASK_BODIES, to_task

CALLS = int(os.environ.get("LOAD_CALLS", "20"))
"""The number of concurrent calls."""

MAX_GROWTH = 150 * MIB * CALLS // 100
UPLOAD = 25 * MIB
CHUNK = 256 * 1024
WARM_UP_CALLS = 4
CHANNELS = 4
BOUNDARY = "x" * 32

pytestmark = pytest.mark.timeout(60 + 6 * CALLS)


Run = Callable[[Server, str, int], Awaitable[None]]
"""Makes one call of a run; takes the run and the number of the call."""


# --- audio


@functools.cache
def _noise() -> bytes:
    return hashlib.shake_256(b"noise").digest(4 * MIB)


def upload_chunks(run: str, number: int) -> Iterator[bytes]:
    """The chunks of an upload; all chunks of all uploads differ."""
    noise = memoryview(_noise())
    yield f"{run} number={number} ".encode().ljust(CHUNK, b".")
    for at in range(1, UPLOAD // CHUNK):
        start = (number * 7919 + at * 104_729) % (len(noise) - CHUNK)
        yield number.to_bytes(4) + at.to_bytes(4) + noise[start : start + CHUNK - 8]


async def hashed_upload(run: str, number: int, digest: Any) -> AsyncIterator[bytes]:
    """The chunks of an upload; updates `digest` with each."""
    for chunk in upload_chunks(run, number):
        digest.update(chunk)
        yield chunk


def check_transcript(text: str, digest: Any) -> None:
    """Checks that the vendor received the whole upload: its transcript has the size and the digest."""
    assert re.sub(r"\s*\(.*", "", text) == f"{UPLOAD} bytes with SHA-256 {digest.hexdigest()}"


@functools.cache
def speech_digest(text: str) -> str:
    """The digest of the audio that the vendor generates from a text."""
    digest = hashlib.sha256()
    for packet in packets("mp3_44100_128", SIZE, text, PACKET):
        digest.update(packet)
    return digest.hexdigest()


# --- one call of each load


async def upload_over_rest(server: Server, run: str, number: int) -> None:
    """Streams a form with audio, and checks the transcript."""
    digest = hashlib.sha256()

    async def body() -> AsyncIterator[bytes]:
        yield (
            f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=model\r\n\r\neleven-labs-stt\r\n"
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="audio"; filename="a.bin"\r\n\r\n'
        ).encode()
        async for chunk in hashed_upload(run, number, digest):
            yield chunk
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    async with server.post(data=body(), Content_Type=f"multipart/form-data; boundary={BOUNDARY}") as answer:
        transcript = await answer.json()
        assert answer.status == 200, transcript
        check_transcript(transcript["text"], digest)


async def upload_over_grpc(server: Server, run: str, number: int) -> None:
    """Calls UploadMedia, then RunTask with the upload, and checks the transcript."""
    digest = hashlib.sha256()
    channel = server.channels[number % CHANNELS]

    async def requests() -> AsyncIterator[UploadMediaRequest]:
        yield UploadMediaRequest(header=UploadMediaHeader(content_type="application/octet-stream"))
        async for chunk in hashed_upload(run, number, digest):
            yield UploadMediaRequest(chunk=chunk)

    uploaded = await MediaServiceStub(channel).UploadMedia(requests(), metadata=server.metadata)
    assert uploaded.media.size_bytes == UPLOAD
    task = TaskSpec(model="eleven-labs-stt")
    task.speech_to_text.audio.media_id = uploaded.media.id
    response = await TaskServiceStub(channel).RunTask(RunTaskRequest(spec=task), metadata=server.metadata)
    check_transcript(response.result.transcription.text, digest)


def speech_body(run: str, number: int) -> dict[str, Any]:
    return TASK_BODIES["tts"] | {"text": f"{run} number={number}"}


async def stream_over_rest(server: Server, run: str, number: int) -> None:
    audio, last = hashlib.sha256(), ""
    body = {**speech_body(run, number), "stream": True}
    async with server.post(body) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: "):
                last = line[6:].decode().strip()
                if '"b64_json"' in last:
                    audio.update(base64.b64decode(json.loads(last)["audio"]["b64_json"]))
    assert last == "[DONE]"
    assert audio.hexdigest() == speech_digest(body["text"])


async def raw_over_rest(server: Server, run: str, number: int) -> None:
    audio = hashlib.sha256()
    body = speech_body(run, number)
    async with server.post(body, Accept="audio/*") as answer:
        assert answer.status == 200, await answer.text()
        async for data in answer.content.iter_any():
            audio.update(data)
    assert audio.hexdigest() == speech_digest(body["text"])


async def stream_over_grpc(server: Server, run: str, number: int) -> None:
    audio = hashlib.sha256()
    body = speech_body(run, number)
    request = StreamTaskRequest(spec=to_task(body))
    stub = TaskServiceStub(server.channels[number % CHANNELS])
    async for response in stub.StreamTask(request, metadata=server.metadata):
        audio.update(response.event.audio_chunk.data)
    assert audio.hexdigest() == speech_digest(body["text"])


LOADS: dict[str, Run] = {
    "uploads over REST": upload_over_rest,
    "uploads over gRPC": upload_over_grpc,
    "streams over REST": stream_over_rest,
    "raw audio over REST": raw_over_rest,
    "streams over gRPC": stream_over_grpc,
}


# --- the server


async def load(server: Server, call: Run, name: str, calls: int) -> None:
    run = f"together={calls} run={name}"
    await asyncio.gather(*[call(server, run, number) for number in range(calls)])


def uploads(server: Server) -> int:
    return sum(path.stat().st_size == UPLOAD for path in (server.served.data / "media").iterdir())


@pytest.fixture(scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    """The server, after a few calls of every load."""
    folder = tmp_path_factory.mktemp("load")
    needed = 2 * (UPLOAD + SIZE) * (CALLS + WARM_UP_CALLS)
    assert shutil.disk_usage(folder).free > needed, f"it needs {needed / MIB:,.0f} MiB of disk"
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        vendor = await stack.enter_async_context(start_child("tests.load.vendor"))
        variables = {"ELEVENLABS_API_KEY": "elevenlabs-upstream", "ELEVENLABS_BASE_URL": vendor.first_line}
        variables |= {"POMELO_MEDIA_LIMIT": "64GiB", "POMELO_MEDIA_ACCOUNT_LIMIT": "64GiB"}
        opened = await stack.enter_async_context(open_server(folder, CHANNELS, **variables))
        for number, call in enumerate(LOADS.values()):
            await load(opened, call, f"warm{number}", WARM_UP_CALLS)
        yield opened


@pytest.fixture(scope="module")
def before(server: Server) -> int:
    return resident(server.served.pid)


@pytest.mark.parametrize("name", LOADS)
async def test_the_servers_memory_does_not_grow_with_the_audio_that_passes_through(
    name: str, server: Server, before: int
) -> None:
    pid, uploads_before = server.served.pid, uploads(server)
    began = time.monotonic()
    cpu = cpu_seconds(pid)
    with peak_memory(pid) as peak:
        await load(server, LOADS[name], f"full{list(LOADS).index(name)}", CALLS)
    took = time.monotonic() - began
    cpu = cpu_seconds(pid) - cpu
    grown = peak.bytes - before
    sys.stdout.write(
        f"\n{CALLS} {name}: {before / MIB:.1f} + {grown / MIB:.1f} MiB, {took:.1f} s, CPU {cpu:.1f} s\n"
    )
    assert peak.samples > 10
    assert grown < MAX_GROWTH
    assert uploads(server) - uploads_before == (CALLS if name == "uploads over gRPC" else 0)
    assert not list((server.served.data / "media").glob(".part_*"))
