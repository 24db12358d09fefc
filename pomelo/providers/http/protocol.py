"""One connection to a vendor: sends a request, and parses the response as it arrives.

httptools does the parsing. Limits, timeouts, flow control, and bodies that only the end of the connection
ends are added here. Unrequested bytes close the connection: they would be taken for the
response to the next request, which may be another caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import httptools
from aiohttp import MultipartWriter
from aiohttp.abc import AbstractStreamWriter
from multidict import CIMultiDict

from pomelo.providers.http.errors import BrokenHeadError, DisconnectedError, ProtocolError

Body = bytes | MultipartWriter | None
"""A request's body: bytes, or a form whose parts are read as they are sent. A request without one is a
GET."""

READ_AHEAD = 64 * 1024
"""Bytes of a stream that may wait for their reader. Above it nothing more is received, nor after a packet
that arrived while an earlier one waited."""

MAX_HEAD_BYTES = 64 * 1024
"""The largest head of a response, and the most bytes in a row that are not of its body."""

MAX_FIELDS, MAX_FIELD_BYTES = 128, 8190
"""The most fields of a head, and the largest value of one."""

_MAX_WRITE_BYTES, _WRITE_BYTES = 1024 * 1024, 64 * 1024
"""A body above the first is written in chunks of the second, so that other calls run in between."""

NO_LIMIT = -1


class Origin(NamedTuple):
    """Where a connection leads: a host name or address, a port, and whether with TLS."""

    host: str
    port: int
    tls: bool


class Connection(asyncio.Protocol):
    """An open connection, for one request at a time. `status` is 0 until the head of the response has
    arrived, `complete` is true once all of it has; `error` says why it never will."""

    __slots__ = (
        "_chunked", "_chunks", "_deadline", "_fields", "_head_bytes", "_keep", "_limit", "_loop", "_on_lost",
        "_parser", "_paused", "_reusable", "_sender", "_timer", "_timer_at", "_transport", "_unparsed",
        "_waiter", "_writable", "complete", "content_length", "error", "idle_since", "lease", "origin",
        "silence", "status", "too_large", "unread",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        origin: Origin,
        on_lost: Callable[[Connection], None],
        *,
        keep: bool,
    ) -> None:
        self.origin = origin
        self.status = 0
        self.complete = True
        self.error: Exception | None = None
        self.content_length: int | None = None
        self.unread = 0
        """Bytes of the body that have arrived and were not taken."""
        self.too_large = False
        """Whether the body is larger than the limit of the request."""
        self.idle_since = 0.0
        self.silence = 0.0
        """The longest time without progress, in seconds."""
        self.lease = ("", "")
        """The host and the account whose connection this is while it serves a request."""
        self._loop = loop
        self._on_lost = on_lost
        self._keep = keep
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        # Servers that end lines of heads with LF alone, or pad the sizes of chunks, were always understood.
        self._parser.set_dangerous_leniencies(
            lenient_optional_cr_before_lf=True, lenient_spaces_after_chunk_size=True
        )
        self._fields: list[tuple[bytes, bytes]] = []
        self._chunks: list[bytes] = []
        self._limit = NO_LIMIT
        self._head_bytes = 0
        self._unparsed = 0  # bytes received since the last ones of the body
        self._chunked = False
        self._reusable = False
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._sender: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None  # while the transport's buffer is full

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @property
    def fields(self) -> Sequence[tuple[bytes, bytes]]:
        """The names and values of the fields of the response, as they were sent."""
        return self._fields

    @property
    def headers(self) -> Mapping[str, str]:
        """The fields of the response; look-ups ignore case."""
        decoded = ((_decode(name), _decode(value)) for name, value in self._fields)
        return CIMultiDict(decoded)

    async def request(self, head: bytes, body: Body, silence: float, limit: int = NO_LIMIT) -> None:
        """Send a request, and wait for the head of its response; with `limit` for all of it, unless its
        status is 300 or above, its body is larger than `limit` bytes, or it breaks off. An exception closes
        the connection.

        Raises:
            DisconnectedError, BrokenHeadError, ProtocolError, TimeoutError: there was no response.
        """
        self.status = self.unread = self._head_bytes = self._unparsed = 0
        self.complete = self.too_large = self._chunked = self._reusable = False
        self.error = self.content_length = None
        self._fields = []
        self._limit = limit
        self.silence = silence
        if self._transport is None:
            raise DisconnectedError
        if body is None:
            self._transport.write(head)
        elif isinstance(body, bytes) and len(body) <= _MAX_WRITE_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.write(head)
            self._sender = self._loop.create_task(self._send(body))
        try:
            await self.wait()
            if self.error is not None and not self.status:
                if self._unparsed and isinstance(self.error, DisconnectedError):
                    raise BrokenHeadError
                raise self.error
        except BaseException:
            self.abort()  # also if it is complete: no caller will take the response, and keep the connection
            raise

    async def wait(self) -> None:
        """Wait until `take` has more, or the response is complete or has failed."""
        self._waiter = waiter = self._loop.create_future()
        self._deadline = deadline = self._loop.time() + self.silence
        # A timer that is early enough is kept, across requests as well: it checks the time, and starts again.
        if self._timer is None or deadline < self._timer_at:
            self._start_timer()
        try:
            await waiter
        finally:
            self._waiter = None

    def take(self, max_bytes: int = NO_LIMIT) -> bytes:
        """Return what has arrived of the body, or at most `max_bytes` of it; empty if that is nothing."""
        chunks = self._chunks
        if not chunks:
            return b""
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        if 0 <= max_bytes < len(data):
            chunks.append(data[max_bytes:])
            data = data[:max_bytes]
        self.unread -= len(data)
        if self._paused and self.unread <= READ_AHEAD:
            self._resume()
        return data

    def finish(self) -> bool:
        """End the request. Returns whether the connection can serve the next request; otherwise it
        is closed."""
        transport = self._transport
        sent = transport is not None and not transport.get_write_buffer_size()
        if self._sender is not None:
            sent &= self._sender.done()
        if self.complete and self._reusable and sent and not self.closed:
            self._chunks.clear()
            self._sender = None
            return True
        self.abort()
        return False

    def abort(self) -> None:
        """Close the connection immediately; idempotent."""
        if self._transport is not None:
            self._transport.abort()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.complete:
            self.abort()
            return
        self._deadline = self._loop.time() + self.silence
        self._unparsed += len(data)
        if self.unread and self._limit == NO_LIMIT:
            self._pause()  # many small packets would take the time of their readers (receive livelock)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(ProtocolError())
        else:
            if self._unparsed > 2 * MAX_HEAD_BYTES:
                self._fail(ProtocolError())

    def eof_received(self) -> None:
        if self.status and not self._chunked and self.content_length is None:
            self._complete()  # the only end that this body has

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(DisconnectedError())
        self._transport = None
        self._parser = None  # it refers to this object
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sender is not None:
            self._sender.cancel()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        writable, self._writable = self._writable, None
        if writable is not None and not writable.done():
            writable.set_result(None)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self.complete:
            raise ProtocolError

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > MAX_HEAD_BYTES or len(value) > MAX_FIELD_BYTES:
            raise ProtocolError
        if self.status:
            return  # a trailer
        if len(self._fields) == MAX_FIELDS:
            raise ProtocolError
        self._fields.append((name, value))
        size = len(name)
        if size == 14 and name.lower() == b"content-length":
            self.content_length = int(value)
        elif size == 17 and name.lower() == b"transfer-encoding":
            self._chunked = value.rstrip().lower().endswith(b"chunked")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise ProtocolError
            self._fields.clear()  # an interim response
            self.content_length, self._chunked = None, False
            return
        self.status = status
        if status >= 300:
            self._limit = NO_LIMIT
        if self._limit == NO_LIMIT:
            self._wake()
        elif self.content_length is not None and self.content_length > self._limit:
            self.too_large = True
            self._wake()

    def on_body(self, data: bytes) -> None:
        self._unparsed = 0
        self._chunks.append(data)
        self.unread += len(data)
        if self._limit == NO_LIMIT:
            self._wake()
            if self.unread > READ_AHEAD:
                self._pause()
        elif self.unread > self._limit:
            self.too_large = True
            self._wake()

    def on_message_complete(self) -> None:
        if self.status:
            self._reusable = self._keep and self._parser.should_keep_alive()
            self._complete()

    def _complete(self) -> None:
        self.complete = True
        self._wake()
        if self._paused:
            self._resume()  # whatever arrives now closes the connection

    def _fail(self, error: Exception) -> None:
        """Close the connection. A response that is not complete has failed."""
        if not self.complete and self.error is None:
            self.error = error
        self.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _pause(self) -> None:
        if not self._paused and not self.closed:
            self._paused = True
            cast(asyncio.Transport, self._transport).pause_reading()

    def _resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _start_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = self._deadline
        self._timer = self._loop.call_later(self._deadline - self._loop.time(), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if self._loop.time() < self._deadline:
            self._start_timer()
        else:
            self._fail(TimeoutError())

    async def _send(self, body: bytes | MultipartWriter) -> None:
        try:
            if isinstance(body, bytes):
                view = memoryview(body)
                for start in range(0, len(body), _WRITE_BYTES):
                    await self.write(view[start : start + _WRITE_BYTES])
            else:
                await body.write(cast(AbstractStreamWriter, self))
        except Exception:  # whatever reading a part of the form raises
            self._fail(DisconnectedError())

    async def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Send a part of the request's body, and wait until there is room for the next one.

        Raises:
            DisconnectedError: the connection is closed.
        """
        if self._transport is None or self._transport.is_closing():
            raise DisconnectedError
        self._transport.write(chunk)
        if self._writable is None:
            await asyncio.sleep(0)
        else:
            await self._writable
        self._deadline = self._loop.time() + self.silence


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")
