"""Uploads of what can be read only once, and downloads that are left before their end."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from pomelo.app import App
from pomelo.call import Call
from pomelo.client import AsyncClient, ClientClosed, DeadlineExceeded, Overloaded
from pomelo.client.blocking import _GRACE, _result
from pomelo.client.stubs import Stubs
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import UploadMediaRequest
from pomelo.server.connection_limits import ConnectionObserver
from pomelo.server.server import ServerOptions, open_server
from tests.client.clients import KINDS, Pipe, make_client
from tests.client.conftest import ClientFactory
from tests.conftest import Keys
from tests.ports import free_port
from tests.waiting import cancel
from tests.wav import PCM, wav_file

CHUNK = bytes(64 * 1024)


class EndlessMedia:
    """Media whose uploads are refused after their last byte, and whose downloads never end. `opens`: a download
    begins when it is set; `opening` and `left` are set when one is asked for and when it has ended."""

    def __init__(self) -> None:
        self.uploaded: list[bytes] = []
        self.opens, self.opening, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        self.uploaded.append(b"".join([chunk async for chunk in chunks]))
        raise PomeloError("overloaded", retry_after=1)

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, AsyncIterator[bytes]]]:
        self.opening.set()
        try:
            await self.opens.wait()
            yield Media(id=media_id, size_bytes=2**40), self._chunks()
        finally:
            self.left.set()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            yield CHUNK
            await asyncio.sleep(0)


class FullDisk(io.BytesIO):
    """A file that can't be written."""

    def write(self, data: Any, /) -> int:
        raise OSError("full")


@pytest.fixture(name="endless")
async def _endless(app: App) -> AsyncIterator[tuple[str, EndlessMedia]]:
    """The address of a server, and its media."""
    media: Any = EndlessMedia()
    services = replace(app.services, media=media)
    async with open_server(
        services, ServerOptions("127.0.0.1:0"), connections=ConnectionObserver()
    ) as opened:
        yield opened.address, media


@pytest.mark.parametrize("task", [False, True], ids=["upload", "task"])
async def test_a_pipe_is_uploaded_once_and_the_servers_error_raised(
    connect: ClientFactory, endless: tuple[str, EndlessMedia], keys: Keys, task: bool
) -> None:
    address, media = endless
    client = connect(keys.test, address)
    call = client.transcribe("eleven-labs-stt", Pipe(b"OggS")) if task else client.upload(Pipe(b"OggS"))
    with pytest.raises(Overloaded):
        await call
    assert media.uploaded == [b"OggS"]


async def test_the_path_of_a_pipe_is_uploaded_once(
    connect: ClientFactory, endless: tuple[str, EndlessMedia], keys: Keys, tmp_path: Path
) -> None:
    address, media = endless
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writing = asyncio.get_running_loop().run_in_executor(None, pipe.write_bytes, b"OggS")
    async with asyncio.timeout(20):
        with pytest.raises(Overloaded):
            await connect(keys.test, address).upload(pipe)
        await writing
    assert media.uploaded == [b"OggS"]


async def test_audio_from_the_path_of_a_pipe_may_be_large(client: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    audio = wav_file(PCM, 8000, 2, bytes(8000 * 2 * 280))
    assert len(audio) > 4 * 1024 * 1024
    writing = asyncio.get_running_loop().run_in_executor(None, pipe.write_bytes, audio)
    async with asyncio.timeout(20):
        transcript = await client.transcribe("eleven-labs-stt", str(pipe))
        await writing
    assert transcript.raw.transcription.audio_seconds == 280


@pytest.mark.parametrize("named", [False, True], ids=["open", "path"])
async def test_an_upload_from_a_pipe_without_data_ends_when_the_server_answers(
    connect: ClientFactory, keys: Keys, tmp_path: Path, named: bool
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)  # so that opening the pipe does not wait
    with pipe.open("rb") as file:
        try:
            async with asyncio.timeout(20):
                with pytest.raises(DeadlineExceeded):
                    await connect(keys.test, timeout=0.5).upload(pipe if named else file)
        finally:
            os.close(writer)  # ends the read that a thread was left with


async def test_an_upload_waits_for_the_writer_of_a_pipe_before_its_call_until_the_timeout(
    connect: ClientFactory, keys: Keys, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    nowhere = connect(keys.test, f"127.0.0.1:{free_port()}", timeout=0.5, retries=0)
    try:
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded, match="other end"):
                await nowhere.upload(pipe)
    finally:
        os.close(os.open(pipe, os.O_RDWR))  # ends the opening that a thread was left with


async def test_a_download_waits_for_the_reader_of_a_pipe_until_the_timeout(
    client: Any, connect: ClientFactory, keys: Keys, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    media = await client.upload(b"RIFF")
    try:
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded):
                await connect(keys.test, timeout=0.5).download(media, pipe)
    finally:
        os.close(os.open(pipe, os.O_RDWR))
    assert pipe.is_fifo()


async def test_an_upload_from_a_pipe_in_another_event_loop_is_refused(keys: Keys, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    client = AsyncClient(f"127.0.0.1:{free_port()}", key=keys.test)

    def upload(timeout: float) -> None:
        asyncio.run(asyncio.wait_for(client.upload(pipe), timeout))

    try:
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(upload, 0.1)
        with pytest.raises(RuntimeError, match="belongs to the event loop of its first call"):
            await asyncio.to_thread(upload, 20.0)
    finally:
        os.close(os.open(pipe, os.O_RDWR))


async def test_closing_a_client_ends_its_wait_for_a_pipe(client: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    upload = asyncio.ensure_future(client.upload(pipe))
    try:
        await asyncio.sleep(0)
        await client.close()
        async with asyncio.timeout(20):
            with pytest.raises(ClientClosed):
                await upload
    finally:
        os.close(os.open(pipe, os.O_RDWR))


async def test_closing_a_client_ends_an_upload_that_is_about_to_begin(app: App, keys: Keys) -> None:
    client = AsyncClient(str(app.grpc), key=keys.test)
    upload = asyncio.ensure_future(client.upload(b"RIFF"))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(ClientClosed):
        await upload


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_a_client_ends_an_upload_that_waits_for_its_connection(kind: str, keys: Keys) -> None:
    connected = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await reader.read()
        writer.close()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        client = make_client(kind, "{}:{}".format(*server.sockets[0].getsockname()), keys.test)
        upload = asyncio.ensure_future(client.upload(b"RIFF"))
        await connected.wait()
        await client.close()
        async with asyncio.timeout(20):
            with pytest.raises(ClientClosed):
                await upload


def test_an_upload_that_grpc_does_not_end_at_its_deadline_is_given_up() -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    with silent, grpc.insecure_channel("{}:{}".format(*silent.getsockname())) as channel:
        rpc = Stubs(channel).media.UploadMedia.future(iter([UploadMediaRequest(chunk=b"RIFF")]))
        with pytest.raises(DeadlineExceeded):
            _result(rpc, -_GRACE)
        assert rpc.cancelled()


@pytest.mark.parametrize(
    ("seconds", "calls", "error"),
    [
        (0.5, "await client.upload(pipe)", b"DeadlineExceeded"),
        (
            0.5,
            "with sys.stdin.buffer as file:\n"  # which waits for no read in another thread
            "            await client.upload(file)",
            b"DeadlineExceeded",
        ),
        (600, "Client(target, key=key, timeout=0.5).upload(sys.stdin.buffer)", b"DeadlineExceeded"),
        (
            600,
            "media = await client.upload(b'RIFF')\n"
            "        async with asyncio.timeout(0.5):\n"
            "            await client.download(media, pipe)",
            b"TimeoutError",
        ),
        *(
            (
                600,
                "media = await client.upload(b'RIFF' + bytes(2**20))\n"
                f"        with open(os.pipe()[1], 'wb', {buffer}) as file:\n"
                "            async with asyncio.timeout(0.5):\n"
                "                await client.download(media, file)",
                b"TimeoutError",
            )
            for buffer in (-1, 0)
        ),
    ],
    ids=["upload", "open upload", "blocking open upload", "download", "open download", "unbuffered download"],
)
async def test_a_program_ends_although_its_call_waits_for_a_pipe(
    app: App, keys: Keys, tmp_path: Path, seconds: float, calls: str, error: bytes
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    program = f"""
import asyncio, os, sys
from pomelo.client import AsyncClient, Client
target, key, pipe = {str(app.grpc)!r}, {keys.test!r}, {str(pipe)!r}
async def run():
    async with AsyncClient(target, key=key, timeout={seconds}) as client:
        {calls}
asyncio.run(run())
"""
    silent, writer = map(os.fdopen, os.pipe(), ("r", "w"))
    with silent, writer:
        async with asyncio.timeout(30):
            running = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, stdin=silent, stderr=subprocess.PIPE
            )
            try:
                _, errors = await running.communicate()
            finally:
                if running.returncode is None:
                    running.kill()
    assert error in errors.splitlines()[-1]


async def test_a_file_that_can_be_read_again_is_uploaded_again(
    connect: ClientFactory, endless: tuple[str, EndlessMedia], keys: Keys
) -> None:
    address, media = endless
    with pytest.raises(Overloaded):
        await connect(keys.test, address, retries=1).upload(io.BytesIO(b"OggS"))
    assert media.uploaded == [b"OggS"] * 2


async def test_a_download_whose_file_cannot_be_written_ends_at_the_server(
    connect: ClientFactory, endless: tuple[str, EndlessMedia], keys: Keys
) -> None:
    address, media = endless
    media.opens.set()
    with pytest.raises(OSError, match="full") as failure:
        await connect(keys.test, address).download("media_x", FullDisk())
    async with asyncio.timeout(20):
        await media.left.wait()
    assert failure.value.__traceback__, "the call is not collected as garbage before"


async def test_a_download_that_is_cancelled_before_its_first_byte_ends_at_the_server(
    endless: tuple[str, EndlessMedia], keys: Keys
) -> None:
    address, media = endless
    async with make_client("asyncio", address, keys.test) as client:
        call = asyncio.create_task(client.download("media_x", io.BytesIO()))
        await media.opening.wait()
        await cancel(call)
        async with asyncio.timeout(20):
            await media.left.wait()


async def test_a_download_into_a_pipe_is_written_to_it(client: Any, tmp_path: Path) -> None:
    speech = await client.speech("eleven-labs-tts", "Up and down.", voice="adam", output_format="wav_8000")
    media = await client.upload(speech.data)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    async with asyncio.timeout(20):
        _, received = await asyncio.gather(client.download(media, pipe), asyncio.to_thread(pipe.read_bytes))
    assert received == speech.data
    assert pipe.is_fifo()
