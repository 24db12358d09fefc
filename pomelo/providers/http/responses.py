"""Response bodies, read as they arrive: whole, as a stream of bytes, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

import aiohttp

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.errors import truncated
from pomelo.providers.http.sse import SseEvent, SseParser

CHUNK_BYTES = 64 * 1024
"""The most bytes that one read of a stream returns, and about how much is read ahead. It bounds the memory
that a slow caller takes."""

CLIENT_ERRORS = (aiohttp.ClientError, OSError, ValueError)
"""What aiohttp raises if a request or a response fails. TimeoutError is an OSError."""

_DRAIN_TIMEOUT = 0.05
"""Seconds to wait for the end of a complete stream, so that its connection can be kept."""


class ResponseBody:
    """The body of a response, read as it arrives.

    aiohttp stops its own read timeout while it holds data back, and loses an error that it finds in that data
    afterwards: a read would wait forever. So each wait here has a timeout of its own.
    """

    __slots__ = ("_content", "_response", "_silence")

    def __init__(self, response: aiohttp.ClientResponse, timeout: aiohttp.ClientTimeout) -> None:
        self._response = response
        self._content = response.content
        self._silence = timeout.sock_read

    @property
    def ended(self) -> bool:
        return self._content.at_eof()

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read(self, max_bytes: int = -1) -> bytes:
        """Return the next bytes: all that have arrived, or at most `max_bytes`; empty only at the end.

        Raises:
            UpstreamError: by the error map: the body is truncated, or nothing arrived in time. Earlier bytes
                stay valid.
        """
        content = self._content
        try:
            if content.exception() is not None:
                # aiohttp raises the exception before it returns the bytes that arrived earlier.
                packet = content._read_nowait(max_bytes)
                if packet:
                    return packet
            packet = content.read_nowait(max_bytes)
            if packet or content.at_eof():
                return packet
            try:
                async with asyncio.timeout(_DRAIN_TIMEOUT if self._connection_lost() else self._silence):
                    return await (content.readany() if max_bytes < 0 else content.read(max_bytes))
            except TimeoutError:
                if not self._connection_lost():
                    raise
            except RuntimeError:
                pass  # aiohttp raises it if the read began after the connection was lost
            failure = truncated(aiohttp.ClientPayloadError())
        except CLIENT_ERRORS as error:
            failure = truncated(error)
        # Outside of the except block, because aiohttp's errors contain the request's headers.
        raise failure

    async def read_all(self, max_bytes: int) -> tuple[bytes, bool]:
        """Return the body, at most about `max_bytes` of it, and whether it is complete.

        Raises:
            UpstreamError: by the error map: the body is truncated, or nothing arrived in time.
        """
        size = self._response.content_length
        if size is not None and size > max_bytes:
            return b"", False
        chunks: list[bytes] = []
        size = 0
        while chunk := await self.read():
            chunks.append(chunk)
            size += len(chunk)
            if size > max_bytes:
                return b"".join(chunks), False
        return b"".join(chunks), True

    def _connection_lost(self) -> bool:
        connection = self._response.connection
        return connection is not None and connection.closed


class SseStream:
    """A response that is a stream of server-sent events."""

    __slots__ = ("_body", "_parser")

    def __init__(self, body: ResponseBody) -> None:
        self._body = body
        self._parser = SseParser()

    async def read(self) -> list[SseEvent]:
        """Return the next events, all that have arrived; empty only at the end of the response.

        Raises:
            UpstreamError: by the error map; events that were returned before stay valid.
        """
        while packet := await self._body.read():
            events = self._parser.feed(packet)
            if events:
                return events
        return self._parser.end()

    def rest(self) -> list[SseEvent]:
        """Return the event that was incomplete when `read` failed; often empty, or only part of an event."""
        return self._parser.end()

    async def drain(self) -> None:
        """Wait a moment for the end of the response, so that the connection can be kept for another request.

        Call it after the vendor's own end marker. Never raises; if the end does not arrive, the connection is
        closed.
        """
        if self._body.ended:
            return
        with contextlib.suppress(TimeoutError, UpstreamError):
            async with asyncio.timeout(_DRAIN_TIMEOUT):
                await self._body.read()
