"""Reads request bodies as they arrive, with limits on size and rate, and queues the parsing of large ones."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from typing import TypeVar
from weakref import WeakValueDictionary

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.options import GatewayOptions
from gateway.request import Request
from pomelo.call import Call, before_deadline
from pomelo.errors import PomeloError
from pomelo.service import Visit

T = TypeVar("T")

UTF_8 = frozenset({"", "utf-8", "utf8"})
"""Names of UTF-8 in lower case; JSON and forms without a charset are UTF-8 (RFC 8259, RFC 7578)."""

_CHARSET = re.compile(r""";\s*charset\s*=\s*["']?([^\s;"']*)""", re.IGNORECASE)

_MAX_DIGITS = 20
"""Digits of a Content-Length, which the parser takes up to 2^64 - 1. There may be thousands of zeros before
them, and Python refuses to convert so many."""

_MAX_CHUNKS = 4096
"""Chunks (of chunked encoding) that a body may have, whatever their size."""

_MIN_CHUNK = 64
"""The minimum average size, in bytes, of further chunks."""


def charset_of(content_type: str) -> str:
    """Returns the charset of a Content-Type in lower case, empty if it names none; several ones are joined by
    commas, which no charset has."""
    return ",".join(dict.fromkeys(_CHARSET.findall(content_type.lower())))


def too_large(subject: str, limit: int) -> PomeloError:
    return PomeloError("payload_too_large", f"{subject} is larger than {limit:,} bytes. Send less")


def arrived_body(request: Request, limit: int) -> bytes | None:
    """Returns the body if it has arrived completely, has a Content-Length and at most `limit` bytes; None:
    it must be read as it arrives."""
    content = request.content
    if not content.is_eof() or content.total_bytes > limit or "Content-Length" not in request.headers:
        return None
    return content.read_nowait()


class RequestBody:
    """The body of an admitted call, read as it arrives. aiohttp alone would wait for it without limit.

    A client may take `read_grace` seconds in total, and one second more for every `read_rate` bytes sent. No
    single wait is longer than `read_timeout` seconds, whatever was sent before.

    `limit` is the maximum size in bytes. `reserve_memory` counts bytes as buffered in memory until the call
    ends, or raises `overloaded`.

    Raises:
        PomeloError: payload_too_large: the Content-Length exceeds `limit`; unsupported_media_type: the body
            has another Transfer-Encoding than chunked.
    """

    __slots__ = (
        "_call", "_chunks", "_content", "_is_sized", "_limit", "_options", "_request", "_seconds_left",
        "reserve_memory",
    )  # fmt: skip

    def __init__(
        self, request: Request, call: Call, visit: Visit, limit: int, options: GatewayOptions
    ) -> None:
        length = request.headers.get("Content-Length")
        if length is None:
            # The parser passes on the body in an encoding other than chunked as it came.
            encoding = request.headers.get("Transfer-Encoding", "")
            if encoding.strip().lower() not in ("", "chunked"):
                raise PomeloError(
                    "unsupported_media_type", "Send the body with no other Transfer-Encoding than chunked"
                )
        elif int(length[-_MAX_DIGITS:]) > limit:
            raise too_large("The body", limit)
        self._request = request
        self._content = request.content
        self._call = call
        self._limit = limit
        self._chunks = 0
        self._options = options
        self._is_sized = length is not None
        self._seconds_left = min(options.read_grace, options.read_timeout)
        self.reserve_memory = visit.reserve

    async def read_available(self) -> bytes:
        """Returns the next bytes, as many as have arrived; empty at the end.

        Raises:
            PomeloError: invalid_body (malformed framing, too slow), payload_too_large, deadline_exceeded.
        """
        content = self._content
        try:
            self._count_chunks()
            data = content.read_nowait()
            if not data and not content.at_eof():
                data = await self._wait()
            earned = len(data) / self._options.read_rate
            self._seconds_left = min(self._seconds_left + earned, self._options.read_timeout)
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise PomeloError(
                "invalid_body", "The body's framing is malformed. Check Content-Length or chunks"
            ) from error
        if content.total_bytes > self._limit:
            raise too_large("The body", self._limit)
        return data

    def _count_chunks(self) -> None:
        """Refuses a body in tiny chunks: aiohttp takes longer for one chunk than for a hundred bytes."""
        splits = getattr(self._content, "_http_chunk_splits", None)
        if splits:
            self._chunks += len(splits)
            if self._chunks > _MAX_CHUNKS + self._content.total_bytes // _MIN_CHUNK:
                raise PomeloError(
                    "invalid_body",
                    f"The body comes in too small chunks. Send {_MIN_CHUNK} bytes or more in each",
                )

    async def _wait(self) -> bytes:
        if self._request.expects_continue:
            self._send_continue()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        left = self._call.deadline - begin
        try:
            async with asyncio.timeout(max(min(self._seconds_left, left), 0.0)):
                if self._is_sized:
                    data = await self._content.readany()
                else:  # only one byte, because aiohttp discards the chunk boundaries of what is read
                    data = await self._content.read(1)
                    self._count_chunks()
                    data += self._content.read_nowait()
        except TimeoutError:
            if left <= self._seconds_left:
                raise PomeloError("deadline_exceeded") from None
            raise PomeloError(
                "invalid_body",
                "The body came too slowly. "
                f"Send it whole, at {self._options.read_rate:,} bytes a second or more",
            ) from None
        self._seconds_left -= loop.time() - begin
        return data

    def _send_continue(self) -> None:
        # Sent only when the body is read, so that a refusal comes before the upload and not after it.
        self._request.expects_continue = False
        if self._request.headers["Expect"].lower() == "100-continue":
            self._request.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")


class ParseQueue:
    """Queues the parsing of large bodies: one body at a time per account.

    While other accounts have calls in flight, an account waits after each body before the next one, so that
    most of the event loop's time is left to them. The wait is three times as long as the steps took, and at
    least as long as the bytes take at `RATE`, to allow for the other work that is done with them.
    """

    RATE = 32 * 1024 * 1024
    """Bytes a second."""

    def __init__(self) -> None:
        self._accounts: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def body(
        self, account: Hashable, size: int, is_alone: Callable[[], bool], call: Call
    ) -> AsyncIterator[ParseSteps]:
        """Waits for the account's turn and holds it for one body of `size` bytes; yields the runner of its
        steps. `is_alone` returns whether no other account has a call in flight.

        Raises:
            PomeloError: deadline_exceeded: the turn did not come before the deadline of `call`.
        """
        lock = self._accounts.get(account)
        if lock is None:
            lock = self._accounts[account] = asyncio.Lock()
        async with before_deadline(call):
            await lock.acquire()
        steps = ParseSteps()
        try:
            yield steps
        finally:
            loop = asyncio.get_running_loop()
            if is_alone():
                loop.call_soon(lock.release)  # not now: an iteration of the loop parses one body
            else:
                loop.call_later(max(3 * steps.seconds, size / self.RATE), lock.release)


class ParseSteps:
    """Runs the steps of one body. `seconds` is their total time."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0

    def run(self, step: Callable[[], T]) -> T:
        begin = time.monotonic()
        try:
            return step()
        finally:
            self.seconds += time.monotonic() - begin
