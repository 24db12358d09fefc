"""Images and audio on the local disk: written as they arrive, owned by an account, deleted when they expire.

A file's id contains its owner's tag (`pomelo.media.links`), so no index is needed; a file expires by its age.
`pomelo.media.quota` limits what each owner stores. `pomelo.media.bucket` stores them for several machines.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import Media
from pomelo.media.content_types import CONTENT_TYPES
from pomelo.media.links import LinkSigner, MediaIds
from pomelo.media.quota import MediaLimits, Quota, disk_size
from pomelo.media.reader import FileReader, Reader
from pomelo.media.writer import COPY_PREFIX, PARTIAL_PREFIX, PREFIX, MediaWriter

_PARTIAL_LIFETIME = 900
"""Seconds after which a partial file has no writer, and a copy no reader: longer than any call may last. Each
call that uses a copy touches it."""

_ID = re.compile(r"media_([0-9a-z]{26})([0-9a-z]{16})\.([0-9a-z]{1,8})")


class ScanResult:
    """The names of the stored files, their bytes by owner, and the number of deleted files."""

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

    shared = False
    """Whether several machines use it: files must be fetched before `find`, and shared after `commit`."""

    refresh_interval = 10.0
    """Seconds between refreshes: they delete expired files and count those of other processes."""

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
        content_type = self.content_type(media_id, owner)
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
        return path, self.describe(media_id, content_type, stat.st_size, expires)

    def content_type(self, media_id: str, owner: str | None) -> str:
        """The media type in an id that belongs to `owner` (None: to anyone).

        Raises:
            PomeloError: not_found.
        """
        match = _ID.fullmatch(media_id)
        if match is None or match[3] not in CONTENT_TYPES:
            raise no_such_media()
        unique, encrypted_tag, extension = match.groups()
        if owner is not None and not self.ids.is_owner(unique, encrypted_tag, owner):
            raise no_such_media()
        return CONTENT_TYPES[extension]

    async def open(self, media_id: str, owner: str | None) -> tuple[Media, Reader]:
        """The file with this id, as `find` finds it, and its open reader.

        Raises:
            PomeloError: not_found, store_unavailable.
        """
        path, media = self.find(media_id, owner)
        try:
            return media, FileReader(path)
        except FileNotFoundError as error:  # it expired just now
            raise no_such_media() from error
        except OSError as error:
            raise PomeloError("store_unavailable") from error

    async def fetch(self, media_id: str, owner: str, call: Call) -> None:
        """Lets `find` find a file of `owner` until the call ends, if any machine has stored it.

        Raises:
            PomeloError: store_unavailable.
        """

    async def share(self, media_id: str, owner: str, lifetime: float | None = None) -> None:
        """Lets every machine read a committed file of `owner`, for `lifetime` seconds if given. If it fails,
        the file is as it was.

        Raises:
            PomeloError: store_unavailable.
        """

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
        self.discard(media_id, owner)

    def discard(self, media_id: str, owner: str) -> None:
        """Deletes a file of `owner` from the disk, as `delete`."""
        with suppress(PomeloError, OSError):
            path, media = MediaStore.find(self, media_id, owner)
            path.unlink()
            self.uncount(media_id, media.size_bytes)

    def uncount(self, media_id: str, size: int) -> None:
        """Subtracts a deleted file of `size` bytes from what its owner stores."""
        tag, counted = self.ids.tag_of(media_id), disk_size(size)
        self._note(media_id, tag, -counted)
        self.quota.remove(tag, counted)

    async def aclose(self) -> None:
        """Waits for what is done in the background."""

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
        self.quota.file_written()

    async def refresh(self) -> int:
        """Deletes expired files and partial files without a writer, recounts the rest, and returns the
        number of deleted files. Scans in a thread; run one scan at a time.

        Raises:
            OSError: the folder can't be read.
        """
        changes = self._changes = []
        try:
            scan = await self._scan()
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

    async def _scan(self) -> ScanResult:
        return await asyncio.to_thread(self._scan_folder)

    def _scan_folder(self) -> ScanResult:
        """Scans all files. A file that can't be read or deleted does not stop the scan."""
        now = self.now()
        scan = ScanResult()
        self.folder.mkdir(mode=0o700, exist_ok=True)  # if it was deleted
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name
                is_partial = name.startswith(PARTIAL_PREFIX)
                if name in self.partial or not (is_partial or name.startswith(PREFIX)):
                    continue
                # A partial file published since its name was read is missing, and is in the changes.
                with suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_mtime + (_PARTIAL_LIFETIME if is_partial else self.lifetime) <= now:
                        with suppress(OSError):
                            os.unlink(entry.path)  # noqa: PTH108 (a hundred thousand of them)
                            scan.deleted += 1
                            continue
                    if not name.startswith(COPY_PREFIX):
                        scan.count(name, self.ids.tag_of(name), disk_size(stat.st_size))
        return scan

    def _note(self, media_id: str, owner_tag: bytes, size: int) -> None:
        if self._changes is not None:
            self._changes.append((media_id, owner_tag, size))


def no_such_media() -> PomeloError:
    """The error of a media file that doesn't exist, has expired, or belongs to another owner."""
    return PomeloError("not_found", "No such media file, or it has expired. Check the media_id")
