"""Pictures and sounds on the local disk: spooled as they come, owned, expiring, given out by signed links.

A file's id contains its owner's tag, encrypted, so that no index is needed; a file expires by its
age. `pomelo.media.quota` limits what each owner stores.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

from pomelo.call import Call, Principal
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import Media
from pomelo.ids import new_id
from pomelo.media.audio import BIG_ENDIAN_TYPES, RATES, raw_type
from pomelo.media.images import image_type
from pomelo.media.media_types import parse
from pomelo.media.quota import MediaLimits, Quota, blocks, no_room
from pomelo.secrets import derive_key
from pomelo.turns import Turn, Turns

PIECE = 256 * 1024
"""Bytes of a download's piece."""

_LATE = 30.0
"""Seconds that a request's upload is kept after the request's deadline."""

_GATHERED = 64 * 1024
"""Bytes that are gathered before they are written; a hundred uploads at once are nothing unusual."""

_ENDINGS = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/webp": "webp",
    "audio/mpeg": "mp3",
    "audio/wav": "wav",
    "audio/ogg": "ogg",
    "audio/flac": "flac",
    "audio/mp4": "m4a",
    "audio/webm": "webm",
    "audio/basic": "ulaw",
    "audio/x-alaw-basic": "alaw",
    "application/octet-stream": "bin",
}
_ENDINGS |= {f"audio/pcm;rate={rate}": f"pcm{rate}" for rate in RATES}
_ENDINGS |= {name: f"be{rate}" for rate, name in BIG_ENDIAN_TYPES.items()}
_LAYER_3 = (b"\xfb", b"\xfa", b"\xf3", b"\xf2", b"\xe3", b"\xe2")
_TYPES = {ending: content_type for content_type, ending in _ENDINGS.items()}
_ALIASES = {
    "audio/mp3": "audio/mpeg",
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/x-flac": "audio/flac",
    "audio/x-m4a": "audio/mp4",
    "audio/opus": "audio/ogg",
    "image/jpg": "image/jpeg",
}
_NAME = "media_"
_PART = ".part_"
_TAG = 10
"""Bytes of an owner's tag."""

_PART_LIFETIME = 900
"""Seconds without a write after which a partial file has no writer: longer than any call may
last."""

_ID = re.compile(r"media_([0-9a-z]{26})([0-9a-z]{16})\.([0-9a-z]{1,8})")
_STEM = re.compile(r"(?:media_|\.part_)([0-9a-z]{26})([0-9a-z]{16})")
_QUERY = re.compile(r"exp=([0-9]{1,12})&sig=([A-Za-z0-9_-]{43})")


def sniff(content_type: str, head: bytes) -> str:
    """The content type to store media with: that of the first 16 bytes, else `content_type` if
    known.

    Recognized bytes override the given type. Raw samples have no signature, so their type is
    trusted here; `pomelo.media.duration` checks whether they are another format. Any
    other type becomes application/octet-stream: an arbitrary type that a caller sent is never
    served back.

    Raises:
        PomeloError: invalid_parameter; raw samples that no provider takes.
    """
    image = image_type(head)
    if image is not None and image in _ENDINGS:
        return image
    if head[:4] == b"RIFF":
        return "audio/wav" if head[8:12] == b"WAVE" else "application/octet-stream"
    if head.startswith(b"OggS"):
        return "audio/ogg"
    if head.startswith(b"fLaC"):
        return "audio/flac"
    if head[4:8] == b"ftyp":
        return "audio/mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "audio/webm"
    named = parse(content_type)
    if (samples := raw_type(named)) is not None:
        return samples
    if head.startswith(b"ID3") or (head[:1] == b"\xff" and head[1:2] in _LAYER_3):
        return "audio/mpeg"
    name = _ALIASES.get(named.name, named.name)
    return name if name in _ENDINGS else "application/octet-stream"


class MediaWriter:
    """A media file being written; a context manager that deletes the file unless it is committed.

    `owner` is an account and a mode, as `Principal.owner` names them; `limit` is the most bytes it may have.
    """

    def __init__(self, store: MediaStore, owner: str, content_type: str, limit: int | None = None) -> None:
        self._store = store
        self._content_type = content_type
        self._limit = limit
        self._head = b""
        self._stem, self.tag = store.new_stem(owner)
        self._temporary = store.folder / f"{_PART}{self._stem}"
        self._descriptor: int | None = None
        self._gathered = bytearray()
        self._flushed = 0
        self.counted = 0
        """Bytes that the quota counts for this file until it is committed or closed."""
        self.size = 0

    def __enter__(self) -> MediaWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Discards the file unless it was committed. Idempotent; raises nothing."""
        self._gathered.clear()
        if self._descriptor is not None:
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
        self._store.parts.pop(self._temporary.name, None)
        self._store.quota.remove(self.tag, self.counted)
        self.counted = 0

    def write(self, data: bytes) -> None:
        """Appends bytes, through a buffer. They are first counted toward the owner's quota.

        Raises:
            PomeloError: payload_too_large (the file, or all that the owner stores), store_unavailable. The
                file can't be completed then.
        """
        size = self.size + len(data)
        if self._limit is not None and size > self._limit:
            raise PomeloError(
                "payload_too_large", f"The file is larger than {self._limit:,} bytes. Send less"
            )
        more = blocks(size) - self.counted
        self._store.quota.add(self.tag, more)
        self.counted += more
        self._store.parts[self._temporary.name] = self
        if len(self._head) < 16:
            self._head += data[:16]
        if len(data) >= _GATHERED:
            self._flush(data)
        else:
            self._gathered += data
            if len(self._gathered) >= _GATHERED:
                self._flush()
        self.size = size

    def contents(self) -> bytes:
        """The bytes written so far: all that `write` accepted before it failed.

        Raises:
            PomeloError: store_unavailable.
        """
        pieces = []
        at = 0
        try:
            while at < self._flushed and self._descriptor is not None:
                piece = os.pread(self._descriptor, self._flushed - at, at)
                if not piece:
                    raise PomeloError("store_unavailable")
                pieces.append(piece)
                at += len(piece)
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        return b"".join((*pieces, self._gathered))[: self.size]

    def commit(self, lifetime: float | None = None) -> Media:
        """Closes and publishes the file; returns it with its link. It expires after `lifetime`
        seconds, if that is less than the store's lifetime.

        Raises:
            PomeloError: store_unavailable.
        """
        store = self._store
        content_type = sniff(self._content_type, self._head)
        media_id = f"{_NAME}{self._stem}.{_ENDINGS.get(content_type, 'bin')}"
        life = store.lifetime if lifetime is None else min(lifetime, store.lifetime)
        self._flush()
        now = store.now()
        try:
            assert self._descriptor is not None
            os.utime(self._descriptor, (now, now + life - store.lifetime))
            store.publish(self._temporary, media_id, self.tag, self.counted)
        except OSError as error:
            raise no_room() from error
        with suppress(OSError):
            os.close(self._descriptor)
        self._descriptor = None
        self.counted = 0  # the store counts it now
        return store.describe(media_id, content_type, self.size, now + life)

    def _flush(self, more: bytes = b"") -> None:
        """Writes the buffer and `more`; creates the file if there is none yet."""
        self._store.quota.check_disk(len(self._gathered) + len(more))
        try:
            if self._descriptor is None:
                self._store.parts[self._temporary.name] = self
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptor = os.open(self._temporary, flags, 0o600)
            while self._gathered:
                written = os.write(self._descriptor, self._gathered)
                self._flushed += written
                del self._gathered[:written]
            rest = memoryview(more)
            while rest:
                written = os.write(self._descriptor, rest)
                self._flushed += written
                rest = rest[written:]
        except OSError as error:
            raise no_room() from error


class _Scan:
    """What a scan of the folder found: names, and bytes by owner."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.stored: dict[bytes, int] = {}
        self.deleted = 0

    def count(self, name: str, owner: bytes, size: int) -> None:
        self.names.add(name)
        self.stored[owner] = self.stored.get(owner, 0) + size


class MediaStore:
    """The folder of media. `lifetime` is in seconds, for the file and for its links.

    `public_url` is where links point, without a slash at its end; it may be set once the server
    listens. An owner is an account and a mode, as in `Principal.owner`. Only the scan may run in
    another thread.
    """

    def __init__(
        self,
        folder: Path,
        secret: bytes,
        *,
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
        self.parts: dict[str, MediaWriter] = {}
        """The files that this process is writing, by name."""
        self._changes: list[tuple[str, bytes, int]] | None = None
        """Files published (bytes above 0) and deleted (below 0) since the running scan began."""
        self._owner_key = derive_key(secret, "media owner")
        self._link_key = derive_key(secret, "media link")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def writer(self, owner: str, content_type: str, limit: int | None = None) -> MediaWriter:
        """Starts a new file of `owner`, of at most `limit` bytes."""
        return MediaWriter(self, owner, content_type, limit)

    def check_answer(self, owner: str, size: int) -> None:
        """Refuses a task whose answer, about `size` bytes, must be stored when there is no room.

        Raises:
            PomeloError: payload_too_large (the owner's media), store_unavailable (all media, or the disk).
        """
        self.quota.check_answer(self._tag(owner), size)

    def find(self, media_id: str, owner: str | None) -> tuple[Path, Media]:
        """The file with this id, if it exists, has not expired, and is `owner`'s (None: anyone's).

        Raises:
            PomeloError: not_found, store_unavailable.
        """
        match = _ID.fullmatch(media_id)
        if match is not None and match[3] in _TYPES:
            unique, sealed, ending = match.groups()
            if owner is None or hmac.compare_digest(sealed, self._seal(unique, self._tag(owner))):
                path = self.folder / media_id
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    pass
                except OSError as error:
                    raise PomeloError("store_unavailable") from error
                else:
                    expires = stat.st_mtime + self.lifetime
                    if expires > self.now():
                        return path, self.describe(media_id, _TYPES[ending], stat.st_size, expires)
        raise PomeloError("not_found", "No such medium, or it has expired")

    def keep(self, media_id: str, seconds: float) -> None:
        """Keeps a medium for so long from now, where that is longer than it lives anyway.

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
        """Deletes a file of `owner`, if it exists. Raises nothing: a file that stays expires."""
        with suppress(PomeloError, OSError):
            path, media = self.find(media_id, owner)
            path.unlink()
            self._note(media_id, self._tag(owner), -blocks(media.size_bytes))
            self.quota.remove(self._tag(owner), blocks(media.size_bytes))

    def check(self, media_id: str, signature: str) -> None:
        """Checks the query string of a link.

        Raises:
            PomeloError: not_found.
        """
        match = _QUERY.fullmatch(signature)
        if (
            match is None
            or int(match[1]) < self.now()
            or not hmac.compare_digest(match[2], self._sign(media_id, match[1]))
        ):
            raise PomeloError("not_found", "The link is wrong or has expired")

    def describe(self, media_id: str, content_type: str, size: int, expires: float) -> Media:
        """The contract's words for a medium, with a link that lasts as long as the file."""
        until = str(int(expires))
        media = Media(
            media_id=media_id,
            url=f"{self.public_url}/media/{media_id}?exp={until}&sig={self._sign(media_id, until)}",
            content_type=content_type,
            size_bytes=size,
        )
        media.expire_time.seconds = int(expires)
        return media

    def new_stem(self, owner: str) -> tuple[str, bytes]:
        """The unique part of a new id, with its owner encrypted; and the owner's tag."""
        unique, tag = new_id(""), self._tag(owner)
        return unique + self._seal(unique, tag), tag

    def publish(self, part: Path, media_id: str, owner: bytes, size: int) -> None:
        """Renames a finished file to its id. `size` is what the quota counts for it.

        Raises:
            OSError: it can't be renamed.
        """
        os.replace(part, self.folder / media_id)  # noqa: PTH105 (one call, no new path)
        self.parts.pop(part.name, None)
        self._note(media_id, owner, size)

    async def refresh(self) -> int:
        """Deletes expired files and partial files without a writer, recounts the rest, and returns
        the number of files deleted. Runs in a thread; one scan at a time.

        Raises:
            OSError: the folder can't be read.
        """
        changes = self._changes = []
        try:
            scan = await asyncio.to_thread(self._scan)
        finally:
            self._changes = None
        for name, owner, size in changes:
            if size > 0 and name not in scan.names:
                scan.count(name, owner, size)
            elif size < 0 and name in scan.names:
                scan.names.discard(name)
                scan.stored[owner] += size
        for writer in self.parts.values():
            scan.stored[writer.tag] = scan.stored.get(writer.tag, 0) + writer.counted
        self.quota.load(scan.stored)
        return scan.deleted

    def _scan(self) -> _Scan:
        """Scans all media files. A file that can't be read or deleted does not stop the scan."""
        now = self.now()
        scan = _Scan()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                name = entry.name
                is_part = name.startswith(_PART)
                if name in self.parts or not (is_part or name.startswith(_NAME)):
                    continue
                # A part published since its name was read is missing, and is in the changes.
                with suppress(OSError):
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_mtime + (_PART_LIFETIME if is_part else self.lifetime) <= now:
                        with suppress(OSError):
                            os.unlink(entry.path)  # noqa: PTH108 (a hundred thousand of them)
                            scan.deleted += 1
                            continue
                    scan.count(name, self._owner_of(name), blocks(stat.st_size))
        return scan

    def _note(self, media_id: str, owner: bytes, size: int) -> None:
        if self._changes is not None:
            self._changes.append((media_id, owner, size))

    def _tag(self, owner: str) -> bytes:
        return hmac.digest(self._owner_key, f"owner {owner}".encode(), hashlib.sha256)[:_TAG]

    def _seal(self, unique: str, tag: bytes) -> str:
        """An owner's tag, encrypted for an id: ids do not reveal that they have the same owner.
        Only Pomelo creates files, so an altered id names no file."""
        return base64.b32encode(self._masked(unique, tag)).decode().lower()

    def _owner_of(self, name: str) -> bytes:
        """The owner's tag of a file, from its name; empty if the name has none."""
        match = _STEM.match(name)
        try:
            return self._masked(match[1], base64.b32decode(match[2].upper())) if match is not None else b""
        except ValueError:
            return b""

    def _masked(self, unique: str, tag: bytes) -> bytes:
        mask = hmac.digest(self._owner_key, f"id {unique}".encode(), hashlib.sha256)
        return bytes(a ^ b for a, b in zip(tag, mask[:_TAG], strict=True))

    def _sign(self, media_id: str, until: str) -> str:
        tag = hmac.digest(self._link_key, f"{media_id} {until}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(tag).decode().rstrip("=")


class Identifies(Protocol):
    """What identifies the caller of a call."""

    async def identify(self, call: Call) -> Principal:
        """The caller's principal.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter (a header), store_unavailable.
        """
        ...


class LocalMedia:
    """The port `MediaService` over a `MediaStore`.

    `authenticate` returns whose key a call carries; `upload_limit` is in bytes; `turns` are those
    of the event loop.
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
        self._upload_limit = upload_limit

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """See the port."""
        owner = (await self._identify(call)).owner
        turn = self._turns.stream()
        with self._store.writer(owner, content_type, self._upload_limit) as writer:
            async with _deadline(call):
                async for chunk in chunks:
                    if turn.over():
                        await turn.next()
                    writer.write(chunk)
                    del chunk  # else it is held while the next one is waited for
            if not writer.size:
                raise invalid("audio", "a file of at least one byte")
            if call.protocol != "rest":
                return writer.commit()
            # It belongs to one request: no other can refer to it, and none can after its deadline.
            media = writer.commit(max(0.0, call.deadline - time.monotonic()) + _LATE)
            call.at_end.append(partial(self._store.delete, media.media_id, owner))
            return media

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, _Pieces]]:
        """See the port."""
        if signature:
            self._store.check(media_id, signature)
            owner = None
        else:
            owner = (await self._identify(call)).owner
        path, media = self._store.find(media_id, owner)
        try:
            file = path.open("rb")
        except FileNotFoundError as error:  # it expired just now
            raise PomeloError("not_found", "No such medium, or it has expired") from error
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        with file:
            async with _deadline(call):
                yield media, _Pieces(file, self._turns.stream())


@asynccontextmanager
async def _deadline(call: Call) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(call.deadline):
            yield
    except TimeoutError as error:
        raise PomeloError("deadline_exceeded") from error


class _Pieces(AsyncIterator[bytes]):
    """The bytes of a file. Implements `pomelo.service.MediaBytes`."""

    def __init__(self, file: BinaryIO, turn: Turn) -> None:
        self._file = file
        self._turn = turn

    def skip(self, size: int) -> None:
        """See the port."""
        try:
            self._file.seek(size, os.SEEK_CUR)
        except OSError as error:
            raise PomeloError("store_unavailable") from error

    async def __anext__(self) -> bytes:
        try:
            piece = self._file.read(PIECE)
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        if not piece:
            raise StopAsyncIteration
        if self._turn.over():
            await self._turn.next()
        return piece
