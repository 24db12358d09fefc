"""A bucket of S3, Google Cloud Storage or Azure. Each operation has a deadline, and each failure is reported.

Credentials, region and endpoint are those of the vendor's own variables, such as AWS_ACCESS_KEY_ID.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import obstore
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError
from obstore.store import from_url

from pomelo.errors import PomeloError

TIMEOUT = 10.0
"""Seconds that one operation may take, with its retries."""

_SENDS_LONGER = 6
"""So many times longer may it take to send a file."""

_PART_SIZE = 5 * 1024 * 1024
"""Bytes of a part of a file that is sent, the least that S3 accepts."""

_MAX_SENDS = 8
"""Files that are sent concurrently: each occupies the memory of a few parts."""

_PAGE = 200
"""Names that a listing returns at a time, so that the event loop is not blocked."""

_RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=TIMEOUT)}

_AVOIDED = 5.0
"""Seconds after a failure for which the bucket is considered unavailable."""

_LOG_INTERVAL = 60.0
"""Seconds between two log lines about failures."""

_NEVER = float("-inf")

_EXPIRES = "pomeloexpires"
"""The metadata with the Unix time at which a file expires. Every vendor accepts such a name."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")

T = TypeVar("T")

log = logging.getLogger("pomelo.media")


class StoredFile(NamedTuple):
    """A file in the bucket: its size in bytes and the Unix time at which it expires."""

    size: int
    expires: float


class MissingFileError(Exception):
    """There is no such file in the bucket."""


class Bucket:
    """The files under the prefix of a URL such as s3://bucket/prefix. A key is a path below it.

    Every method raises PomeloError store_unavailable if the bucket fails, or does not answer within `timeout`
    seconds.

    Raises:
        ValueError: the URL or a variable is wrong; the message is one line.
    """

    def __init__(self, url: str, *, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        try:
            self._store = from_url(url, retry_config=_RETRIES)  # type: ignore[call-overload]
        except Exception as error:
            raise ValueError(str(error).partition("\n")[0]) from None
        self._sends = asyncio.Semaphore(_MAX_SENDS)
        self._failed_at = self._logged_at = _NEVER

    @property
    def available(self) -> bool:
        """Whether no operation has failed in the last seconds."""
        return time.monotonic() - self._failed_at > _AVOIDED

    async def check(self) -> None:
        """Checks that files can be listed and written.

        Raises:
            ValueError: they can't; the message is one line that says why.
        """

        def check() -> None:
            obstore.put(self._store, "check", b"pomelo")
            next(iter(obstore.list(self._store, "check")), None)

        try:
            async with asyncio.timeout(self._timeout):
                # A program that ends right after an async call of obstore may be aborted; a thread is safe.
                await asyncio.to_thread(check)
        except Exception as error:
            raise ValueError(_describe(error)) from None

    async def send(self, key: str, path: Path, content_type: str, expires: float) -> None:
        """Stores a file of the disk, in parts if it is large. It is visible once it is complete."""
        attributes = {"Content-Type": content_type, _EXPIRES: f"{expires:.3f}"}

        async def send() -> None:
            async with self._sends:
                await obstore.put_async(
                    self._store, key, path, attributes=attributes, chunk_size=_PART_SIZE, max_concurrency=2
                )

        try:
            await self._within(_SENDS_LONGER * self._timeout, send())
        except MissingFileError:  # someone has deleted the file on the disk
            raise PomeloError("store_unavailable") from None

    async def begin(self, key: str, size: int) -> tuple[StoredFile, bytes]:
        """A file's description and its first `size` bytes.

        Raises:
            MissingFileError: there is no such file.
        """

        async def begin() -> tuple[StoredFile, bytes]:
            result = await obstore.get_async(self._store, key, options={"range": (0, size)})
            expires = float(result.attributes.get(_EXPIRES, 0))
            return StoredFile(result.meta["size"], expires), (await result.bytes_async()).to_bytes()

        return await self._within(self._timeout, begin())

    async def read(self, key: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to `end` (exclusive).

        Raises:
            MissingFileError: there is no such file.
        """
        data = await self._within(
            self._timeout, obstore.get_range_async(self._store, key, start=start, end=end)
        )
        return data.to_bytes()

    async def delete(self, keys: Sequence[str]) -> None:
        """Deletes files. Some vendors raise MissingFileError if one does not exist."""
        await self._within(self._timeout, obstore.delete_async(self._store, keys))

    async def names(self, folder: str) -> AsyncIterator[list[tuple[str, int]]]:
        """The names and sizes of all files in a folder, in pages."""
        pages = obstore.list(self._store, folder, chunk_size=_PAGE)
        while (page := await self._within(self._timeout, anext(pages, None))) is not None:
            yield [(each["path"].rpartition("/")[2], each["size"]) for each in page]

    async def _within(self, seconds: float, work: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(seconds):
                result = await work
        except Exception as error:
            if not isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
                raise self._failure(error) from None  # its message has the vendor's response
            self._answered()
            raise MissingFileError from None
        self._answered()
        return result

    def _answered(self) -> None:
        if self._failed_at > _NEVER:
            self._failed_at = _NEVER
            log.info("The bucket of POMELO_MEDIA can be used again")

    def _failure(self, error: Exception) -> PomeloError:
        """Logs a failure, at most once a minute, and returns its error."""
        self._failed_at = now = time.monotonic()
        if now - self._logged_at >= _LOG_INTERVAL:
            self._logged_at = now
            log.warning("The bucket of POMELO_MEDIA can't be used: %s", _describe(error))
        return PomeloError("store_unavailable")


def _describe(error: Exception) -> str:
    """What failed, without the vendor's response and the file's name."""
    if isinstance(error, TimeoutError):
        return "it does not answer in time"
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    answer = f" (status {status[1]}{f', {code[1]}' if code else ''})" if status else ""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return f"it denies access{answer}. Check the credentials and what they may do"
    if isinstance(error, FileNotFoundError) or (code and code[1] == "NoSuchBucket"):
        return f"there is no such bucket{answer}"
    return f"it refuses a request{answer}" if answer else "it can't be reached"
