"""Images and audio in a bucket, for servers on several machines.

Files are written to the disk as they arrive, and sent to the bucket when they are complete. The disk has only
what is in work: files being written, copies that running tasks read, and uploads that belong to one request
of this process. Links are Pomelo's own, and any of the servers answers them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from pomelo.call import DEFAULT_TIMEOUT, Call, before_deadline
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.ids import new_id
from pomelo.media.bucket import Bucket, MissingFileError
from pomelo.media.quota import disk_size
from pomelo.media.reader import Reader
from pomelo.media.store import MediaStore, ScanResult, no_such_media
from pomelo.media.writer import COPY_PREFIX
from pomelo.runtime.process import shielded

_PIECE = 512 * 1024
"""Bytes of a file that one request reads."""

_CLOSE_TIMEOUT = 5.0

_SHORT, _LONG = "hour", "day"
"""The folders of files with the usual lifetime, and of those that an Idempotency-Key keeps."""

_LONGEST = 25 * 3600.0
"""Seconds that the longest-lived files last."""


class BucketStore(MediaStore):
    """A `MediaStore` whose shared files are in `bucket`.

    A process counts what it stores itself exactly; it learns what others stored every `refresh_interval`.
    """

    shared = True
    refresh_interval = 60.0

    def __init__(self, bucket: Bucket, folder: Path, secret: bytes, **options: Any) -> None:
        super().__init__(folder, secret, **options)
        self._bucket = bucket
        self._copies: dict[str, _Copy] = {}
        self._deletions: set[asyncio.Task[None]] = set()
        self._deleting: set[str] = set()
        """The files that are being deleted from the bucket."""

    async def aclose(self) -> None:
        """Waits for deletions, for a few seconds: what is left expires."""
        if self._deletions:
            await asyncio.wait(self._deletions, timeout=_CLOSE_TIMEOUT)

    def check_answer(self, owner: str, size: int) -> None:
        super().check_answer(owner, size)
        if not self._bucket.available:
            raise PomeloError("store_unavailable")

    def find(self, media_id: str, owner: str | None) -> tuple[Path, Media]:
        """Finds a file that is on the disk: not shared, or fetched."""
        copy = self._copies.get(media_id)
        if copy is None or copy.media is None:
            return super().find(media_id, owner)
        self.content_type(media_id, owner)
        return copy.path, copy.media

    async def open(self, media_id: str, owner: str | None) -> tuple[Media, Reader]:
        try:
            return await super().open(media_id, owner)
        except PomeloError as error:
            if error.code != "not_found":
                raise
        content_type = self.content_type(media_id, owner)
        for key in self._keys(media_id):
            try:
                stored, first = await self._bucket.begin(key, _PIECE)
            except MissingFileError:
                continue
            if stored.expires <= self.now():
                break
            media = self.describe(media_id, content_type, stored.size, stored.expires)
            return media, _ObjectReader(self._bucket, key, stored.size, first)
        raise no_such_media()

    async def fetch(self, media_id: str, owner: str, call: Call) -> None:
        try:
            self.content_type(media_id, owner)
        except PomeloError:
            return
        if (self.folder / media_id).exists():
            return
        copy = self._copies.get(media_id)
        if copy is None:
            copy = self._copies[media_id] = _Copy(self.folder / new_id(COPY_PREFIX))
        copy.users += 1
        call.at_end.append(partial(self._release, media_id, copy))
        async with before_deadline(call), copy.lock:
            if copy.media is not None and self._touch(copy.path):
                return
            copy.media = None
            copy.media = await self._download(media_id, owner, copy.path)

    def _touch(self, path: Path) -> bool:
        """Keeps a copy from being taken for a leftover, by any process. Returns whether it still exists."""
        try:
            os.utime(path, (self.now(), self.now()))
        except OSError:
            return False
        return True

    async def share(self, media_id: str, owner: str, lifetime: float | None = None) -> None:
        path, media = super().find(media_id, owner)
        expires = path.stat().st_mtime + self.lifetime
        key = f"{_SHORT if lifetime is None else _LONG}/{media_id}"
        if lifetime is not None:
            expires = self.now() + lifetime

        async def send() -> bool:
            """Returns whether the file still counts: a caller who has left may have discarded it."""
            await self._bucket.send(key, path, media.content_type, expires)
            counts = path.exists()
            path.unlink(missing_ok=True)
            return counts

        sending = asyncio.ensure_future(send())
        try:
            await shielded(sending)
        except asyncio.CancelledError:
            # An interrupted upload would leave its parts in the bucket.
            self._in_background(self._discard(sending, media_id, owner))
            raise

    def keep(self, media_id: str, seconds: float) -> None:
        """Does nothing: `share` has set the lifetime."""

    def delete(self, media_id: str, owner: str) -> None:
        """Deletes a file of `owner`, in the background if it was shared."""
        with suppress(PomeloError):
            self.content_type(media_id, owner)
            if (self.folder / media_id).exists():
                self.discard(media_id, owner)
                return
            copy = self._copies.get(media_id)
            if copy is None or copy.media is None:
                self._in_background(self._delete(media_id, counts=True))
                return
            self._in_background(self._delete(media_id, counts=False))
            if not copy.deleted:
                copy.deleted = True
                self.uncount(media_id, copy.media.size_bytes)

    async def _scan(self) -> ScanResult:
        scan = await super()._scan()
        now = self.now()
        for folder, lifetime in ((_SHORT, float(self.lifetime)), (_LONG, _LONGEST)):
            async for page in self._bucket.names(folder):
                expired = []
                for name, size in page:
                    created = self.ids.created(name)
                    if created + lifetime + DEFAULT_TIMEOUT <= now:
                        expired.append(f"{folder}/{name}")
                    elif name not in scan.names:
                        scan.count(name, self.ids.tag_of(name), disk_size(size))
                if expired:
                    with suppress(MissingFileError):  # another process has deleted it
                        await self._bucket.delete(expired)
                    scan.deleted += len(expired)
        return scan

    def _keys(self, media_id: str) -> Iterator[str]:
        """The keys that a file can have."""
        if self.ids.created(media_id) + self.lifetime + DEFAULT_TIMEOUT > self.now():
            yield f"{_SHORT}/{media_id}"
        yield f"{_LONG}/{media_id}"

    async def _download(self, media_id: str, owner: str, path: Path) -> Media | None:
        """Copies a file to `path`; returns its description, None if it does not exist."""
        try:
            media, reader = await self.open(media_id, owner)
        except PomeloError as error:
            if error.code == "not_found":
                return None
            raise
        self.quota.check_disk(media.size_bytes)
        try:
            with path.open("wb") as file:
                while piece := await reader.read(_PIECE):
                    file.write(piece)
        except OSError as error:
            raise self.quota.failed(error) from error
        return media

    def _release(self, media_id: str, copy: _Copy) -> None:
        copy.users -= 1
        if not copy.users:
            del self._copies[media_id]
            with suppress(OSError):
                copy.path.unlink(missing_ok=True)

    async def _discard(self, sending: asyncio.Future[bool], media_id: str, owner: str) -> None:
        """Deletes a file whose sending was cancelled, once it is complete or has failed."""
        await asyncio.wait({sending})
        if sending.exception() is None:
            await self._delete(media_id, counts=sending.result())
        else:
            self.discard(media_id, owner)

    async def _delete(self, media_id: str, *, counts: bool) -> None:
        """Deletes a file from the bucket; with `counts`, also from what its owner stores."""
        if media_id in self._deleting:
            return  # a server and its gateway both delete the upload of a refused task: it counts once
        self._deleting.add(media_id)
        try:
            for key in self._keys(media_id):
                with suppress(PomeloError, MissingFileError):
                    size = (await self._bucket.begin(key, 1))[0].size if counts else 0
                    await self._bucket.delete([key])
                    self.uncount(media_id, size)
        finally:
            self._deleting.discard(media_id)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._deletions.add(task)
        task.add_done_callback(self._deletions.discard)


@dataclass(slots=True, eq=False)
class _Copy:
    """A copy of a file in the bucket, for as long as calls use it."""

    path: Path
    users: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    media: Media | None = None
    """None until the copy is complete."""
    deleted: bool = False
    """Whether the file in the bucket was deleted."""


class _ObjectReader:
    """Reads a file of the bucket piece by piece, each with one request: a slow reader holds no connection."""

    def __init__(self, bucket: Bucket, key: str, size: int, first: bytes) -> None:
        self._bucket = bucket
        self._key = key
        self._size = size
        self._piece = first
        self._piece_start = 0
        self._position = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._piece = b""

    def skip(self, size: int) -> None:
        self._position += size

    async def read(self, size: int) -> bytes:
        start = self._position
        if start >= self._size:
            return b""
        if start >= self._piece_start + len(self._piece):
            try:
                self._piece = await self._bucket.read(self._key, start, min(start + _PIECE, self._size))
            except MissingFileError:
                raise PomeloError("store_unavailable") from None
            self._piece_start = start
        offset = start - self._piece_start
        data = self._piece[offset : offset + size]
        self._position += len(data)
        return data
