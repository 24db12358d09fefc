"""A request's body as it arrives, with limits on its size, its rate and the time between two
pieces.

Read by `body` (JSON) and `multipart`. aiohttp itself waits for a body for ever.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.service import Visit

_CHUNKS = 4096
"""Chunks (of chunked encoding) that a body may have, whatever their size."""

_CHUNK = 64
"""Bytes that further chunks must have on average."""


def too_large(what: str, limit: int) -> PomeloError:
    """The refusal of something above `limit` bytes."""
    return PomeloError("payload_too_large", f"{what} is larger than {limit:,} bytes. Send less")


@dataclass(frozen=True, slots=True)
class Pace:
    """How slowly a body may arrive. We wait for it `grace` seconds in total, and one second more
    for every `rate` bytes received. No single wait is longer than `silence` seconds, however many
    bytes preceded it."""

    rate: int
    grace: float
    silence: float


class Incoming:
    """The body of an admitted call, read piece by piece.

    `limit` is the maximum size in bytes; `length` is the Content-Length, None if absent.

    Raises:
        PomeloError: payload_too_large: the Content-Length exceeds `limit`.
    """

    __slots__ = (
        "_call",
        "_chunks",
        "_content",
        "_credit",
        "_limit",
        "_pace",
        "_request",
        "_visit",
        "_waits",
        "length",
    )

    def __init__(self, request: web.Request, call: Call, visit: Visit, limit: int, pace: Pace) -> None:
        length = request.content_length
        if length is not None and length > limit:
            raise too_large("The body", limit)
        self._request = request
        self._content = request.content
        self._call = call
        self._visit = visit
        self._limit = limit
        self._chunks = 0
        self._pace = pace
        self._credit = min(pace.grace, pace.silence)
        self._waits = "Expect" in request.headers
        self.length = length

    def hold(self, size: int) -> None:
        """Counts `size` bytes that are held in memory until the call ends.

        Raises:
            PomeloError: overloaded.
        """
        self._visit.reserve(size)

    async def piece(self) -> bytes:
        """Returns the next bytes, as many as have arrived; empty at the end.

        Raises:
            PomeloError: invalid_body (malformed framing, too slow), payload_too_large, deadline_exceeded.
        """
        content = self._content
        try:
            self._count_chunks()
            data = content.read_nowait()
            if not data and not content.at_eof():
                first = await self._wait()
                self._count_chunks()
                data = first + content.read_nowait()
                self._credit = min(self._credit + len(data) / self._pace.rate, self._pace.silence)
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise PomeloError(
                "invalid_body", "The body's framing is malformed. Check Content-Length or chunks"
            ) from error
        if content.total_bytes > self._limit:
            raise too_large("The body", self._limit)
        return data

    def _count_chunks(self) -> None:
        """Refuses a body in tiny chunks: one chunk takes aiohttp longer than a hundred bytes do."""
        splits = getattr(self._content, "_http_chunk_splits", None)
        if splits:
            self._chunks += len(splits)
            if self._chunks > _CHUNKS + self._content.total_bytes // _CHUNK:
                raise PomeloError(
                    "invalid_body", f"The body comes in too small chunks. Send {_CHUNK} bytes or more in each"
                )

    async def _wait(self) -> bytes:
        """Waits for the next byte. Reads only one, because aiohttp discards the chunk boundaries of
        what is read."""
        if self._waits:
            await self._go_on()
        pace = self._pace
        loop = asyncio.get_running_loop()
        begin = loop.time()
        left = self._call.deadline - begin
        try:
            async with asyncio.timeout(max(min(self._credit, left), 0.0)):
                first = await self._content.read(1)
        except TimeoutError:
            if left <= self._credit:
                raise PomeloError("deadline_exceeded") from None
            raise PomeloError(
                "invalid_body",
                f"The body came too slowly. Send it whole, at {pace.rate:,} bytes a second or more",
            ) from None
        self._credit -= loop.time() - begin
        return first

    async def _go_on(self) -> None:
        # Said only once the body is wanted, so that a refusal comes before the upload and not after it.
        self._waits = False
        if self._request.headers["Expect"].lower() == "100-continue":
            writer = self._request.writer
            await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.output_size = 0
