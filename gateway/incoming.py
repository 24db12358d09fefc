"""A request's body as it comes in: bounded in size, and in the time between two pieces.

Read by `body` (JSON) and `multipart`. aiohttp itself waits for a body for ever.
"""

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pomelo.call import Call
from pomelo.errors import PomeloError


def too_large(what: str, limit: int) -> PomeloError:
    """The refusal of something above `limit` bytes."""
    return PomeloError("payload_too_large", f"{what} is larger than {limit:,} bytes. Send less")


class Incoming:
    """A body, read piece by piece.

    `limit` is the most bytes that may come in all; `wait` the most seconds between two pieces; `length` is
    what the head says, None where it doesn't. Has the methods of aiohttp's stream that its multipart
    reader uses.
    """

    __slots__ = ("_call", "_content", "_limit", "_request", "_waits", "length", "wait")

    def __init__(self, request: web.Request, call: Call, limit: int, wait: float) -> None:
        length = request.content_length
        if length is not None and length > limit:
            raise too_large("The body", limit)
        self._request = request
        self._content = request.content
        self._call = call
        self._limit = limit
        self._waits = "Expect" in request.headers
        self.length = length
        self.wait = wait

    def here(self) -> bytes | None:
        """The whole body when it has come in already, else None."""
        if self._content.is_eof():
            try:
                return self._content.read_nowait()
            except (web.RequestPayloadError, HttpProcessingError) as error:
                raise _malformed() from error
        return None

    async def readany(self) -> bytes:
        """The next bytes, as many as have come; none at the end."""
        return await self._next(self._content.readany)

    async def read(self, size: int = -1) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        return await self._next(self._content.read, size)

    async def readline(self, *, max_line_length: int | None = None) -> bytes:
        """The next line with its end."""
        return await self._next(self._content.readline, max_line_length=max_line_length)

    def at_eof(self) -> bool:
        """Whether all has been read."""
        return self._content.at_eof()

    def unread_data(self, data: bytes) -> None:
        """Puts `data` back."""
        self._content.unread_data(data)

    async def _next(self, read: Any, *args: Any, **kwargs: Any) -> bytes:
        if self._waits:
            await self._go_on()
        left = self._call.deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(min(self.wait, max(left, 0.0))):
                data: bytes = await read(*args, **kwargs)
        except TimeoutError:
            if left <= self.wait:
                raise PomeloError("deadline_exceeded") from None
            raise PomeloError(
                "invalid_body", f"The body stopped coming for {self.wait:g} seconds. Send it whole"
            ) from None
        except (web.RequestPayloadError, HttpProcessingError) as error:
            raise _malformed() from error
        if self._content.total_bytes > self._limit:
            raise too_large("The body", self._limit)
        return data

    async def _go_on(self) -> None:
        # Said only once the body is wanted, so that a refusal comes before the upload and not after it.
        self._waits = False
        if self._request.headers["Expect"].lower() == "100-continue":
            writer = self._request.writer
            await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.output_size = 0


def _malformed() -> PomeloError:
    return PomeloError("invalid_body", "The body's framing is malformed. Check Content-Length or chunks")
