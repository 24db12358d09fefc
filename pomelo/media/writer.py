"""Writes a media file to the disk as its bytes arrive."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.media.content_types import EXTENSIONS, HEAD_BYTES, sniff
from pomelo.media.quota import disk_size

if TYPE_CHECKING:
    from pomelo.media.store import MediaStore

PREFIX = "media_"
"""The beginning of the name of a complete file, and of its id."""

PARTIAL_PREFIX = ".part_"
"""The beginning of the name of a file that is not complete."""

COPY_PREFIX = f"{PARTIAL_PREFIX}copy_"
"""The beginning of the name of a copy of a file in a bucket. Only the file counts toward the limits."""

_BUFFER_SIZE = 64 * 1024
"""Bytes that are buffered before they are written; a hundred concurrent uploads are nothing unusual."""


class MediaWriter:
    """A media file being written; a context manager that deletes the file unless it is committed.

    `owner` is an account and a mode, as in `Principal.owner`; `limit` is the maximum size in bytes.
    """

    def __init__(self, store: MediaStore, owner: str, content_type: str, limit: int | None = None) -> None:
        self._store = store
        self._content_type = content_type
        self._limit = limit
        self._head = b""
        self.owner_tag = store.ids.owner_tag(owner)
        self._stem = store.ids.new_stem(self.owner_tag)
        self._temporary = store.folder / f"{PARTIAL_PREFIX}{self._stem}"
        self._descriptor: int | None = None
        self._buffer = bytearray()
        self._flushed = 0
        self.counted = 0
        """Bytes that the quota counts for this file until it is committed or closed."""
        self.size = 0

    def __enter__(self) -> MediaWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Discards the file unless it was committed. Idempotent; raises nothing."""
        if self._descriptor is not None:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
        self._store.partial.pop(self._temporary.name, None)
        self._store.quota.remove(self.owner_tag, self.counted)
        self.counted = 0

    def write(self, data: bytes) -> None:
        """Appends bytes, through a buffer, after counting them toward the owner's quota.

        Raises:
            PomeloError: payload_too_large (the file, or all media of the owner), store_unavailable. The file
                can't be completed then.
        """
        size = self.size + len(data)
        if self._limit is not None and size > self._limit:
            raise PomeloError(
                "payload_too_large",
                f"The file is larger than {self._limit:,} bytes. Send less",
                values={"maxBytes": self._limit},
            )
        more = disk_size(size) - self.counted
        self._store.quota.add(self.owner_tag, more)
        self.counted += more
        self._store.partial[self._temporary.name] = self
        if len(self._head) < HEAD_BYTES:
            self._head += data[:HEAD_BYTES]
        if len(data) >= _BUFFER_SIZE:
            self._flush(data)
        else:
            self._buffer += data
            if len(self._buffer) >= _BUFFER_SIZE:
                self._flush()
        self.size = size

    def contents(self) -> bytes:
        """The bytes written so far: all that `write` accepted before it failed.

        Raises:
            PomeloError: store_unavailable.
        """
        chunks = []
        position = 0
        try:
            while position < self._flushed and self._descriptor is not None:
                chunk = os.pread(self._descriptor, self._flushed - position, position)
                if not chunk:
                    raise PomeloError("store_unavailable")
                chunks.append(chunk)
                position += len(chunk)
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        return b"".join((*chunks, self._buffer))[: self.size]

    def commit(self, lifetime: float | None = None) -> Media:
        """Closes and publishes the file, and returns its description with a link. It expires after `lifetime`
        seconds, if that is less than the store's lifetime.

        Raises:
            PomeloError: store_unavailable.
        """
        store = self._store
        content_type = sniff(self._content_type, self._head)
        media_id = f"{PREFIX}{self._stem}.{EXTENSIONS[content_type]}"
        if lifetime is None or lifetime > store.lifetime:
            lifetime = store.lifetime
        self._flush()
        now = store.now()
        try:
            assert self._descriptor is not None
            store.publish(self._temporary, media_id, self.owner_tag, self.counted)
            self.counted = 0  # the store counts it now
            # Not before: another process would take a partial file of that age for a leftover.
            os.utime(self._descriptor, (now, now + lifetime - store.lifetime))
        except OSError as error:
            raise store.quota.failed(error) from error
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None
        return store.describe(media_id, content_type, self.size, now + lifetime)

    def _flush(self, more: bytes = b"") -> None:
        """Writes the buffer and `more`; creates the file if it does not exist yet."""
        self._store.quota.check_disk(len(self._buffer) + len(more))
        try:
            if self._descriptor is None:
                self._store.partial[self._temporary.name] = self
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptor = os.open(self._temporary, flags, 0o600)
            while self._buffer:
                written = os.write(self._descriptor, self._buffer)
                self._flushed += written
                del self._buffer[:written]
            rest = memoryview(more)
            while rest:
                written = os.write(self._descriptor, rest)
                self._flushed += written
                rest = rest[written:]
        except OSError as error:
            raise self._store.quota.failed(error) from error
