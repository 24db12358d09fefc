"""The media service of this process: uploads and downloads over a `MediaStore`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Protocol

from pomelo.call import Call, Principal, before_deadline
from pomelo.errors import invalid, missing
from pomelo.gen.v1.media_pb2 import Media
from pomelo.media.reader import Reader
from pomelo.media.store import MediaStore
from pomelo.runtime.turns import Turn, Turns

CHUNK_SIZE = 256 * 1024
"""Bytes of a chunk of a download."""

_UPLOAD_GRACE_SECONDS = 30.0
"""How long a request's upload is kept after the request's deadline."""


class Identifies(Protocol):
    """Identifies callers. A protocol, because media may not import `pomelo.accounts.access`."""

    async def identify(self, call: Call) -> Principal:
        """The caller's principal.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter (a header), store_unavailable.
        """

    async def authenticate(self, call: Call) -> Principal:
        """The principal of the call's key, which is checked again some time after the call has begun.

        Raises:
            PomeloError: invalid_api_key, store_unavailable.
        """


class LocalMedia:
    """Implements `pomelo.service.MediaService` over a `MediaStore`.

    `access` identifies callers; `upload_limit` is in bytes; `turns` are those of the event loop.
    """

    def __init__(
        self,
        store: MediaStore,
        access: Identifies,
        upload_limit: int = 50 * 1024 * 1024,
        *,
        turns: Turns,
    ) -> None:
        self._store = store
        self._turns = turns
        self._identify = access.identify
        self._authenticate = access.authenticate
        self._upload_limit = upload_limit

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        owner = (await self._identify(call)).owner
        turn = self._turns.stream()
        with self._store.writer(owner, content_type, self._upload_limit) as writer:
            async with before_deadline(call):
                async for chunk in chunks:
                    if turn.over():
                        await turn.next()
                    writer.write(chunk)
                    del chunk  # else it stays in memory until the next one arrives
            if not writer.size:
                raise invalid("audio", "a file of at least one byte", minimum=1)
            if call.protocol != "rest":
                await self._authenticate(call)  # a REST request's task does it
                media = writer.commit()
            else:
                # It belongs to one request: no other can refer to it, and none can after its deadline.
                media = writer.commit(max(0.0, call.deadline - time.monotonic()) + _UPLOAD_GRACE_SECONDS)
                call.at_end.append(partial(self._store.discard, media.id, owner))
                if not call.relayed:
                    return media
        try:
            async with before_deadline(call):
                await self._store.share(media.id, owner)
        except BaseException:
            self._store.discard(media.id, owner)
            raise
        return media

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call, offset: int = 0
    ) -> AsyncIterator[tuple[Media, _Chunks]]:
        if signature:
            self._store.check_link(media_id, signature)
            owner = None
        else:
            owner = (await self._identify(call)).owner
        if not media_id:
            raise missing("id")
        async with before_deadline(call):
            media, reader = await self._store.open(media_id, owner)
            size = media.size_bytes
            with reader:
                if offset:
                    reader.skip(max(size + offset, 0) if offset < 0 else min(offset, size))
                yield media, _Chunks(reader, self._turns.stream())


class _Chunks(AsyncIterator[bytes]):
    """The bytes of a file."""

    def __init__(self, reader: Reader, turn: Turn) -> None:
        self._read = reader.read
        self._turn = turn

    async def __anext__(self) -> bytes:
        chunk = await self._read(CHUNK_SIZE)
        if not chunk:
            raise StopAsyncIteration
        if self._turn.over():
            await self._turn.next()
        return chunk
