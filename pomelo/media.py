"""Pictures and sounds on the local disk: spooled as they come, owned, expiring, given out by signed links.

The engine and the gRPC and REST doors (through the port `MediaService`) use it. A medium's id binds its
owner by a MAC, so that no index is needed; a file's age is its expiry.
"""

import asyncio
import base64
import hashlib
import hmac
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from pomelo.audio import RATES, Swapper, raw_type
from pomelo.call import Call, Principal
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import Media
from pomelo.ids import new_id
from pomelo.subkeys import derive

PIECE = 256 * 1024
"""Bytes of a download's piece."""

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
} | {f"audio/pcm;rate={r}": f"pcm{r}" for r in RATES}
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
_ID = re.compile(r"media_([0-9a-z]{26})([0-9a-z]{16})\.([0-9a-z]{1,8})")
_QUERY = re.compile(r"exp=([0-9]{1,12})&sig=([A-Za-z0-9_-]{43})")


def sniff(content_type: str, head: bytes) -> str:
    """The type that media are kept under: that of their first 16 bytes, else the named one if it is known.

    A label never outweighs bytes that are plainly something else. Bare samples have no mark, so their type is
    believed; they may begin as a frame of an encoding does, and `pomelo.measure` looks further. What has no
    known type is application/octet-stream: a type that a caller made up never comes back from us.

    Raises:
        PomeloError: invalid_parameter; bare samples that no provider takes.
    """
    named = "".join(content_type.split()).lower()
    named = _ALIASES.get(named, named)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(head[8:12], "application/octet-stream")
    if head.startswith(b"OggS"):
        return "audio/ogg"
    if head.startswith(b"fLaC"):
        return "audio/flac"
    if head[4:8] == b"ftyp":
        return "audio/mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "audio/webm"
    if (samples := raw_type(named)) is not None:
        return samples
    if head.startswith(b"ID3") or (head[:1] == b"\xff" and head[1:2] in _LAYER_3):
        return "audio/mpeg"
    return named if named in _ENDINGS else "application/octet-stream"


class MediaWriter:
    """One medium as it is written; a context manager that leaves nothing behind unless committed."""

    def __init__(
        self, store: "MediaStore", account: str, content_type: str, limit: int | None = None
    ) -> None:
        self._store = store
        self._account = account
        self._content_type = content_type
        self._limit = limit
        self._head = b""
        self._swapper = Swapper(content_type)
        self._temporary = store.folder / new_id(".part_")
        self._file: BinaryIO | None = None
        self.size = 0

    def __enter__(self) -> "MediaWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drops what was written and not committed; idempotent."""
        if self._file is not None:
            self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Appends bytes, through a buffer.

        Raises:
            PomeloError: payload_too_large, store_unavailable.
        """
        self.size += len(data)
        if self._limit is not None and self.size > self._limit:
            raise PomeloError(
                "payload_too_large", f"The file is larger than {self._limit:,} bytes. Send less"
            )
        data = self._swapper.swap(data)
        if len(self._head) < 16:
            self._head += data[:16]
        try:
            if self._file is None:
                self._file = self._create()
            self._file.write(data)
        except OSError as error:
            raise PomeloError("store_unavailable") from error

    def _create(self) -> BinaryIO:
        descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "wb", buffering=_GATHERED)

    def commit(self) -> Media:
        """Closes the file and gives the medium, linked.

        Raises:
            PomeloError: store_unavailable.
        """
        content_type = sniff(self._content_type, self._head)
        media_id = self._store.name(self._account, content_type)
        try:
            if self._file is None:
                self._file = self._create()
            self._file.close()
            os.replace(self._temporary, self._store.folder / media_id)  # noqa: PTH105 (one call, no new path)
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        self._file = None
        return self._store.describe(
            media_id, content_type, self.size, self._store.now() + self._store.lifetime
        )


class MediaStore:
    """The folder of media. `lifetime` is in seconds, for the file and for its links.

    `public_url` is where links point, without a slash at its end; it may be set once the door is open.
    """

    def __init__(
        self,
        folder: Path,
        secret: bytes,
        *,
        public_url: str = "",
        lifetime: int = 3600,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self.public_url = public_url
        self.lifetime = lifetime
        self.now = now
        self._owner_key = derive(secret, "media owner")
        self._link_key = derive(secret, "media link")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def writer(self, account: str, content_type: str, limit: int | None = None) -> MediaWriter:
        """A new medium of `account`; at most `limit` bytes."""
        return MediaWriter(self, account, content_type, limit)

    def name(self, account: str, content_type: str) -> str:
        """A new id for a medium of `account`."""
        unique = new_id("")
        return f"media_{unique}{self._owner(unique, account)}.{_ENDINGS.get(content_type, 'bin')}"

    def find(self, media_id: str, account: str | None) -> tuple[Path, Media]:
        """The file of a medium, if it is there, fresh, and `account` owns it (None: don't ask).

        Raises:
            PomeloError: not_found.
        """
        match = _ID.fullmatch(media_id)
        if match is not None and match[3] in _TYPES:
            unique, owner, ending = match.groups()
            if account is None or hmac.compare_digest(owner, self._owner(unique, account)):
                path = self.folder / media_id
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    expires = stat.st_mtime + self.lifetime
                    if expires > self.now():
                        return path, self.describe(media_id, _TYPES[ending], stat.st_size, expires)
        raise PomeloError("not_found", "No such medium, or it has expired")

    def keep(self, media_id: str, seconds: float) -> None:
        """Keeps a medium for so long from now, where that is longer than it lives anyway.

        Raises:
            PomeloError: store_unavailable.
        """
        until = self.now() + max(0.0, seconds - self.lifetime)
        try:
            os.utime(self.folder / media_id, (until, until))
        except OSError as error:
            raise PomeloError("store_unavailable") from error

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

    def sweep(self) -> int:
        """Deletes what has expired, and parts whose writers are gone; tells how many files."""
        oldest = self.now() - self.lifetime
        count = 0
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                if entry.stat().st_mtime <= oldest:
                    Path(entry.path).unlink()
                    count += 1
        return count

    def _owner(self, unique: str, account: str) -> str:
        tag = hmac.digest(self._owner_key, f"{unique} {account}".encode(), hashlib.sha256)
        return base64.b32encode(tag[:10]).decode().lower()

    def _sign(self, media_id: str, until: str) -> str:
        tag = hmac.digest(self._link_key, f"{media_id} {until}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(tag).decode().rstrip("=")


class MediaDesk:
    """The port `MediaService` over a `MediaStore`.

    `authenticate` tells whose key a call bears; `upload_limit` is in bytes.
    """

    def __init__(
        self,
        store: MediaStore,
        authenticate: Callable[[Call], Awaitable[Principal]],
        upload_limit: int = 50 * 1024 * 1024,
    ) -> None:
        self._store = store
        self._authenticate = authenticate
        self._upload_limit = upload_limit

    async def upload_media(self, content_type: str, chunks: AsyncIterator[bytes], call: Call) -> Media:
        """See the port."""
        principal = await self._authenticate(call)
        with self._store.writer(principal.account, content_type, self._upload_limit) as writer:
            async with _deadline(call):
                async for chunk in chunks:
                    writer.write(chunk)
                    del chunk  # else it is held while the next one is waited for
            if not writer.size:
                raise invalid("audio", "a file of at least one byte")
            return writer.commit()

    @asynccontextmanager
    async def download_media(
        self, media_id: str, signature: str, call: Call
    ) -> AsyncIterator[tuple[Media, AsyncIterator[bytes]]]:
        """See the port."""
        if signature:
            self._store.check(media_id, signature)
            account = None
        else:
            account = (await self._authenticate(call)).account
        path, media = self._store.find(media_id, account)
        try:
            file = path.open("rb")
        except OSError as error:
            raise PomeloError("store_unavailable") from error
        with file:
            async with _deadline(call):
                yield media, _pieces(file)


@asynccontextmanager
async def _deadline(call: Call) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(call.deadline):
            yield
    except TimeoutError as error:
        raise PomeloError("deadline_exceeded") from error


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while piece := file.read(PIECE):
            yield piece
    except OSError as error:
        raise PomeloError("store_unavailable") from error
