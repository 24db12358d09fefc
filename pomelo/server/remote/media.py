"""The media service over a channel: uploads that end early when the server responds, and downloads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import grpc

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.media_service_pb2 import (
    DownloadMediaRequest,
    DownloadMediaResponse,
    UploadMediaHeader,
    UploadMediaRequest,
)
from pomelo.gen.v1.task_pb2 import TaskSpec
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.runtime.turns import Turns
from pomelo.server.remote.channel import Messages, unary
from pomelo.server.remote.pool import ConnectionPool
from pomelo.status import DISCARD_KEY, error_of

_MESSAGE_BYTES = 512 * 1024
"""Maximum bytes of an upload in one message."""

_DELETE_TIMEOUT = 5.0
"""Seconds that the deletion of a refused upload may take."""


class RemoteMedia:
    """Implements `MediaService` over a channel."""

    def __init__(self, pool: ConnectionPool, turns: Turns) -> None:
        self._pool = pool
        self._deletions: set[asyncio.Task[None]] = set()
        self._turns = turns

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        await self._pool.check_headers(call)
        await self._pool.check_key(call)  # before the first chunk is read
        with self._pool.pick() as connection:
            rpc = connection.media.UploadMedia(**connection.arguments(call))
            try:
                with connection.until_deadline(call):
                    errors = await _send(rpc, content_type, chunks)
                    response = await unary(rpc, call, errors)
            finally:
                if rpc.cancel():
                    # A cancelled upload that is not awaited is a reference cycle, which occupies one of the
                    # connection's streams until the garbage collector runs.
                    with suppress(asyncio.CancelledError):
                        await rpc
        media: Media = response.media
        call.at_end.append(partial(self._delete, media.id, call))
        return media

    def _delete(self, media_id: str, call: Call) -> None:
        """Makes the server delete the upload of a request that this process refused."""
        task = asyncio.create_task(self._request_deletion(media_id, call))
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)

    async def _request_deletion(self, media_id: str, call: Call) -> None:
        # The server refuses a task without a model, and deletes the upload of a refused REST task. If that
        # fails, the upload expires with the request's deadline.
        spec = TaskSpec()
        spec.speech_to_text.audio.media_id = media_id
        request = replace(
            call,
            deadline=time.monotonic() + _DELETE_TIMEOUT,
            response_headers={},
            response_trailers={},
            at_end=[],
        )
        with suppress(PomeloError), self._pool.pick() as connection:
            arguments = connection.arguments(request)
            arguments["metadata"].append((DISCARD_KEY, "1"))
            await unary(connection.tasks.RunTask(RunTaskRequest(spec=spec), **arguments), request)

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, AsyncIterator[bytes]]]:
        sent = call
        if signature:  # the server would count a key that comes with it
            sent = replace(call, api_key=None, key_error="")
        else:
            await self._pool.check_headers(call)
        request = DownloadMediaRequest(id=media_id, signature=signature, offset=offset)
        with self._pool.pick() as connection:
            rpc = connection.media.DownloadMedia(request, **connection.arguments(sent))
            messages: Messages[DownloadMediaResponse] = Messages(rpc, call, self._turns.stream())
            try:
                with connection.until_deadline(call):
                    await messages.accepted()
                    first = await anext(messages)
                    yield first.media, _Chunks(messages)
            finally:
                rpc.cancel()


class _Chunks(AsyncIterator[bytes]):
    """The bytes of a file, as the messages of a download have them."""

    def __init__(self, messages: Messages[DownloadMediaResponse]) -> None:
        self._messages = messages

    async def __anext__(self) -> bytes:
        return (await anext(self._messages)).chunk


async def _send(rpc: Any, content_type: str, chunks: AsyncIterator[bytes]) -> list[Any]:
    """Sends an upload until it is complete or the server has responded, also while the next chunk is awaited.

    Returns the errors of the call (AioRpcErrors) in the order in which they occurred: when a write fails
    after the server has responded, grpc.aio replaces the server's error with its own.
    """
    errors: list[Any] = []
    sending = asyncio.timeout(None)
    active = True

    def call_done(_: Any) -> None:
        errors.append(error_of(rpc))
        if active and len(errors) == 1:
            sending.reschedule(0)  # stops waiting for the next chunk

    try:
        async with sending:
            rpc.add_done_callback(call_done)
            await rpc.write(UploadMediaRequest(header=UploadMediaHeader(content_type=content_type)))
            async for chunk in chunks:
                for start in range(0, len(chunk), _MESSAGE_BYTES):
                    await rpc.write(UploadMediaRequest(chunk=chunk[start : start + _MESSAGE_BYTES]))
            await rpc.done_writing()
    except TimeoutError:
        if not sending.expired():
            raise
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        if not errors:
            raise
    except grpc.aio.InternalError:
        pass  # the call ended while the end of the upload was being sent; awaiting it raises its error
    finally:
        active = False
    return errors
