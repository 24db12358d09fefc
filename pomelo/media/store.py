"""Images and audio on the local disk: written as they arrive, owned by an account, deleted when they expire.

A file's id contains its owner's tag (`pomelo.media.links`), so no index is needed; a file expires by its age.
`pomelo.media.quota` limits what each owner stores.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.media.content_types import CONTENT_TYPES, EXTENSIONS, sniff
from pomelo.media.links import LinkSigner, MediaIds
from pomelo.media.quota import MediaLimits, Quota, disk_size, no_space

_BUFFER_SIZE = 64 * 1024
"""Bytes that are buffered before they are written; a hundred concurrent uploads are nothing unusual."""

_PREFIX = "media_"
_PARTIAL_PREFIX = ".part_"

_PARTIAL_LIFETIME = 900
"""Seconds without a write after which a partial file has no writer: longer than any call may last."""

_ID = re.compile(r"media_([0-9a-z]{26})([0-9a-z]{16})\.([0-9a-z]{1,8})")


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
        self._temporary = store.folder / f"{_PARTIAL_PREFIX}{self._stem}"
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
        self._buffer.clear()
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
        if len(self._head) < 16:
            self._head += data[:16]
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
        media_id = f"{_PREFIX}{self._stem}.{EXTENSIONS[content_type]}"
        if lifetime is None or lifetime > store.lifetime:
            lifetime = store.lifetime
        self._flush()
        now = store.now()
        try:
            assert self._descriptor is not None
            os.utime(self._descriptor, (now, now + lifetime - store.lifetime))
            store.publish(self._temporary, media_id, self.owner_tag, self.counted)
        except OSError as error:
            raise no_space() from error
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None
        self.counted = 0  # the store counts it now
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
            raise no_space() from error


class _ScanResult:
    """The names of the files in the folder, their bytes by owner, and the number of deleted files."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.stored: dict[bytes, int] = {}
        self.deleted = 0

    def count(self, name: str, owner_tag: bytes, size: int) -> None:
        self.names.add(name)
        self.stored[owner_tag] = self.stored.get(owner_tag, 0) + size


class MediaStore:
    """The folder of media. `lifetime` is in seconds, for the file and for its links.

    `public_url` is the base URL of links, without a slash at its end; it may be set once the server listens.
    An owner is an account and a mode, as in `Principal.owner`. Only the scan may run in another thread.
    """

    def __init__(
        self,
        folder: Path,
        secret: bytes,
        *,
        previous_secrets: Sequence[bytes] = (),
        public_url: str = "",
        lifetime: int = 3600,
        limits: MediaLimits | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.public_url = public_url
        self.lifetime = lifetime
        self.now = now
        self.quota = Quota(folder, limits or MediaLimits())
        self.partial: dict[str, MediaWriter] = {}
        """The files that this process is writing, by name."""
        self._changes: list[tuple[str, bytes, int]] | None = None
        """Files published (bytes above 0) and deleted (below 0) since the running scan began."""
        self.ids = MediaIds(secret, previous_secrets)
        self._links = LinkSigner(secret, previous_secrets)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def writer(self, owner: str, content_type: str, limit: int | None = None) -> MediaWriter:
        """Starts a new file of `owner`, of at most `limit` bytes."""
        return MediaWriter(self, owner, content_type, limit)

    def check_answer(self, owner: str, size: int) -> None:
        """Refuses a task whose answer, about `size` bytes, must be stored, if there is no space for it.

        Raises:
            PomeloError: payload_too_large (the owner's media), store_unavailable (all media, or the disk).
        """
        self.quota.check_answer(self.ids.owner_tag(owner), size)

    def find(self, media_id: str, owner: str | None) -> tuple[Path, Media]:
        """The file with this id, if it exists, has not expired and belongs to `owner` (None: to anyone).

        Raises:
            PomeloError: not_found, store_unavailable.
        """
        match = _ID.fullmatch(media_id)
        if match is None or match[3] not in CONTENT_TYPES:
            raise no_such_media()
        unique, encrypted_tag, extension = match.groups()
        if owner is not None and not self.ids.is_owner(unique, encrypted_tag, owner):
            raise no_such_media()
        path = self.folder / media_id
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise no_such_media() from None
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        expires = stat.st_mtime + self.lifetime
        if expires <= self.now():
            raise no_such_media()
        return path, self.describe(media_id, CONTENT_TYPES[extension], stat.st_size, expires)

    def keep(self, media_id: str, seconds: float) -> None:
        """Extends the lifetime of a file to `seconds` from now; never shortens it.

        Raises:
            PomeloError: store_unavailable.
        """
        path = self.folder / media_id
        until = self.now() + seconds - self.lifetime
        try:
            if until > path.stat().st_mtime:
                os.utime(path, (until, until))
        except OSError as error:
            raise PomeloError("store_unavailable") from error

    def delete(self, media_id: str, owner: str) -> None:
        """Deletes a file of `owner`, if it exists. Raises nothing: a file that can't be deleted expires."""
        with suppress(PomeloError, OSError):
            path, media = self.find(media_id, owner)
            path.unlink()
            owner_tag, size = self.ids.tag_of(media_id), disk_size(media.size_bytes)
            self._note(media_id, owner_tag, -size)
            self.quota.remove(owner_tag, size)

    def check_link(self, media_id: str, query: str) -> None:
        """Checks the query string of a signed link.

        Raises:
            PomeloError: not_found.
        """
        self._links.check(media_id, query, self.now())

    def describe(self, media_id: str, content_type: str, size: int, expires: float) -> Media:
        """The description of a file, with a link that lasts as long as the file."""
        media = Media(
            id=media_id,
            url=self.public_url + self._links.path(media_id, expires),
            content_type=content_type,
            size_bytes=size,
        )
        media.expire_time.seconds = int(expires)
        return media

    def publish(self, partial: Path, media_id: str, owner_tag: bytes, size: int) -> None:
        """Renames a finished file to its id. `size` is the number of bytes that the quota counts for it.

        Raises:
            OSError: it can't be renamed.
        """
        os.replace(partial, self.folder / media_id)  # noqa: PTH105 (one call, no new path)
        self.partial.pop(partial.name, None)
        self._note(media_id, owner_tag, size)

    async def refresh(self) -> int:
        """Deletes expired files and partial files without a writer, recounts the rest, and returns the
        number of deleted files. Scans in a thread; run one scan at a time.

        Raises:
            OSError: the folder can't be read.
        """
        changes = self._changes = []
        try:
            scan = await asyncio.to_thread(self._scan)
        finally:
            self._changes = None
        for name, owner_tag, size in changes:
            if size > 0 and name not in scan.names:
                scan.count(name, owner_tag, size)
            elif size < 0 and name in scan.names:
                scan.names.discard(name)
                scan.stored[owner_tag] += size
        for name, writer in self.partial.items():
            scan.count(name, writer.owner_tag, writer.counted)
        self.quota.load(scan.stored)
        return scan.deleted

    def _scan(self) -> _ScanResult:
        """Scans all files. A file that can't be read or deleted does not stop the scan."""
        now = self.now()
        scan = _ScanResult()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name
                is_partial = name.startswith(_PARTIAL_PREFIX)
                if name in self.partial or not (is_partial or name.startswith(_PREFIX)):
                    continue
                # A partial file published since its name was read is missing, and is in the changes.
                with suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_mtime + (_PARTIAL_LIFETIME if is_partial else self.lifetime) <= now:
                        with suppress(OSError):
                            os.unlink(entry.path)  # noqa: PTH108 (a hundred thousand of them)
                            scan.deleted += 1
                            continue
                    scan.count(name, self.ids.tag_of(name), disk_size(stat.st_size))
        return scan

    def _note(self, media_id: str, owner_tag: bytes, size: int) -> None:
        if self._changes is not None:
            self._changes.append((media_id, owner_tag, size))


def no_such_media() -> PomeloError:
    """The error of a media file that doesn't exist, has expired, or belongs to another owner."""
    return PomeloError("not_found", "No such media file, or it has expired. Check the media_id")
