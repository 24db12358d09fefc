"""Response bodies, read as they arrive: whole, as a stream of bytes, or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.errors import truncated
from pomelo.providers.http.protocol import NO_LIMIT, READ_AHEAD, Connection
from pomelo.providers.http.sse import LineParser, SseEvent, SseParser

CHUNK_BYTES = READ_AHEAD
"""About the most bytes of a stream that are read ahead; it bounds the memory that a slow caller takes."""

_DRAIN_TIMEOUT = 0.05
"""Seconds to wait for the end of a complete stream, so that its connection can be kept."""


class ResponseBody:
    """The body of a response, read as it arrives."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def ended(self) -> bool:
        return self._connection.complete and not self._connection.unread

    @property
    def headers(self) -> Mapping[str, str]:
        return self._connection.headers

    def set_silence(self, seconds: float) -> None:
        """Replace how long the response may be silent from now on."""
        self._connection.silence = seconds

    async def read(self, max_bytes: int = NO_LIMIT) -> bytes:
        """Return the next bytes: all that have arrived, or at most `max_bytes`; empty only at the end.

        Raises:
            UpstreamError: by the error map: the body is truncated, or nothing arrived in time. Earlier bytes
                stay valid.
        """
        connection = self._connection
        while not (packet := connection.take(max_bytes)) and not connection.complete:
            if connection.error is not None:
                raise truncated(connection.error)
            await connection.wait()
        return packet

    async def read_all(self, max_bytes: int) -> bytes:
        """Return the body, or about the first `max_bytes` of a larger one; nothing of one that says that it
        is larger.

        Raises:
            UpstreamError: by the error map: the body is truncated, or nothing arrived in time.
        """
        size = self._connection.content_length
        if size is not None and size > max_bytes:
            return b""
        body = bytearray()
        while len(body) <= max_bytes and (chunk := await self.read()):
            body += chunk
        return bytes(body)


class SseStream:
    """A response that is a stream of server-sent events, or of lines."""

    __slots__ = ("_began", "_body", "_is_patient", "_parser", "_silence")

    def __init__(self, body: ResponseBody, parser: SseParser | LineParser, silence: float) -> None:
        """Events may be `silence` seconds apart; before the first one, the connection's silence counts."""
        self._body = body
        self._parser = parser
        self._silence = silence
        self._began = False
        self._is_patient = True

    async def read(self, *, patient: bool = False) -> list[SseEvent]:
        """Return the next events, all that have arrived; empty only at the end of the response. With
        `patient` the stream may be silent as long as before its first event.

        Raises:
            UpstreamError: by the error map; events that were returned before stay valid.
        """
        if self._is_patient and self._began and not patient:
            self._is_patient = False
            self._body.set_silence(self._silence)
        while packet := await self._body.read():
            events = self._parser.feed(packet)
            if events:
                self._began = True
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
