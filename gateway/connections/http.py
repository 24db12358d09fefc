"""HTTP/1 on one connection: parses the requests with aiohttp's parser, and handles one after the other."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import re
import sys
import termios
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import cast

from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http import HttpRequestParser, RawRequestMessage
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.tcp_helpers import tcp_keepalive

log = logging.getLogger("pomelo.gateway")

READ_AHEAD = 32 * 1024
"""At most twice as many bytes of a body are buffered before a handler reads them."""

_MAX_LINE = 8190
_MAX_HEADERS = 128
_MAX_PIPELINED = 2
"""Pipelined requests that are parsed while the current one is being handled."""

_LAST_CHUNK = b"\r\n0\r\n\r\n"
"""The end of a chunked body without trailers, and the line break before it. Trailers can't end with it: the
parser refuses a line without a colon."""

_KEPT = -len(_LAST_CHUNK)

_TLS_SLICE = 64 * 1024
"""Bytes of a response that TLS encrypts in one step."""

_UPGRADE = re.compile(rb"\r\n[Uu]pgrade(?=:)")

ParsedRequest = RawRequestMessage | HttpProcessingError
"""The head of a request, or the error that says why it can't be parsed."""


class HttpConnection(BaseProtocol):
    """A connection that runs `handle` for each request in a task of its own, while no other one runs.

    It is closed after `idle_timeout` seconds without a request. What a handler leaves of a body is discarded,
    for at most `linger_timeout` seconds. `live` contains the connection until its last task has ended.
    """

    __slots__ = (
        "_closing", "_content", "_idle_deadline", "_idle_timer", "_last_bytes", "_linger_timeout", "_live",
        "_pipelined", "_request_count", "_task", "_unparsed", "_written", "has_tls", "idle_timeout", "tcp",
    )  # fmt: skip

    def __init__(self, live: set[HttpConnection], idle_timeout: float, linger_timeout: float) -> None:
        loop = asyncio.get_running_loop()
        parser = HttpRequestParser(
            self,
            loop,
            READ_AHEAD,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_HEADERS,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=1,
        )
        super().__init__(loop, parser)
        self.idle_timeout = idle_timeout
        self._linger_timeout = linger_timeout
        self._live = live
        self.has_tls = False
        self.tcp: asyncio.Transport | None = None  # the transport below TLS
        self._pipelined: deque[tuple[ParsedRequest, StreamReader]] = deque()
        self._request_count = 0
        self._task: asyncio.Task[None] | None = None
        self._content: StreamReader | None = None
        self._unparsed = b""
        self._last_bytes = b""
        self._written = 0
        self._closing = False
        self._idle_deadline = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    async def handle(self, parsed: ParsedRequest, content: StreamReader) -> bool:
        """Responds to a request with the body `content`. Returns whether the connection may carry
        the next request.

        Raises:
            ConnectionError: the client has left.
        """
        raise NotImplementedError

    # --- opening and closing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        tcp_keepalive(cast(asyncio.Transport, transport))
        self._live.add(self)
        self._await_request()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Cancels the current request."""
        self.force_close()
        super().connection_lost(exc)
        self._parser = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._task is None:
            self._live.discard(self)
            return
        self._task.cancel()
        self._task.add_done_callback(lambda _: self._live.discard(self))

    def close(self) -> None:
        """Reads no further request, and closes once the current one is answered."""
        self._closing = True
        if self._task is None and self.transport is not None:
            self.transport.close()

    def force_close(self) -> None:
        """Closes as soon as the client has read what was sent."""
        self._closing = True
        if self.transport is not None:
            self.transport.close()
            self.transport = None

    async def shutdown(self, seconds: float) -> None:
        """Closes; cancels a request that is still running after `seconds`."""
        self.close()
        task = self._task
        if task is not None:
            await asyncio.wait([task], timeout=seconds)
            if self._task is task:
                self.interrupt()
        self.force_close()

    def interrupt(self) -> None:
        """Cancels the current request."""
        if self._task is not None:
            self._task.cancel()

    # --- reading

    def data_received(self, data: bytes) -> None:
        parser = self._parser
        if self._closing or parser is None:
            return
        self._last_bytes = (self._last_bytes + data[_KEPT:])[_KEPT:]
        if self._task is None:
            end = data.find(b"\r\n\r\n")  # bodies are not searched, which takes time
            if data.find(b"pgrade:", 0, len(data) if end < 0 else end) >= 0:
                data = _ignore_upgrade(data)
        received = data
        content = self._pipelined[-1][1] if self._pipelined else self._content
        reads = content is not None and not content.is_eof()
        while True:
            messages: Sequence[tuple[ParsedRequest, StreamReader]]
            failed = False
            try:
                messages, upgraded, data = parser.feed_data(data)
            except HttpProcessingError as error:
                # Its traceback would keep this connection in memory.
                messages, upgraded, failed = [(error.with_traceback(None), EMPTY_PAYLOAD)], False, True
                self._unparsed = received[:READ_AHEAD]
                self._fail_body()
            if messages:
                content, reads = messages[-1][1], True
                self._request_count += len(messages)
                self._pipelined += messages
                if self._task is None:
                    self._start_next()
                if len(self._pipelined) >= _MAX_PIPELINED and not self._buffer_paused:
                    self._pause_reading_for_buffer()
            # The parser stops behind each request: otherwise a malformed one would take others with it.
            ended = reads and content is not None and content.is_eof()
            reads = False
            if upgraded:
                parser.set_upgraded(False)  # no other protocol is spoken: what follows is HTTP
            elif failed or not ended or self._buffer_paused:
                return

    def ends_with_last_chunk(self) -> bool:
        """Returns whether the current request, whose body is chunked, has arrived without trailers, and that
        nothing has come after it.

        The parser does not report trailers, but the bytes show them. What follows the body is a pipelined
        request or the beginning of its head, which can't end with `_LAST_CHUNK` either.
        """
        content = self._content
        if content is None or not content.is_eof() or self._pipelined:
            return False
        return self._last_bytes == _LAST_CHUNK

    def _fail_body(self) -> None:
        """Fails the body that is arriving: the parser can't read on, and does not say so to its reader."""
        content = self._pipelined[-1][1] if self._pipelined else self._content
        if content is not None and not content.is_eof() and content.exception() is None:
            content.set_exception(web.RequestPayloadError("malformed framing"))

    def resume_reading(self, resume_parser: bool = True) -> None:
        """Continues with what was left when reading was paused."""
        content = self._content
        # Of a body that has arrived, nothing is left. aiohttp would parse no bytes each time.
        if self._reading_paused or (resume_parser and content is not None and not content.is_eof()):
            super().resume_reading(resume_parser)

    # --- requests

    def _start_next(self) -> None:
        parsed, content = self._pipelined.popleft()
        self._content = content
        self._task = self._loop.create_task(self._serve(parsed, content))
        if self._buffer_paused:
            self.data_received(b"")  # parses what was read already
            if len(self._pipelined) < _MAX_PIPELINED:
                self._resume_reading_for_buffer()

    async def _serve(self, parsed: ParsedRequest, content: StreamReader) -> None:
        keep_alive = False
        try:
            keep_alive = await self.handle(parsed, content)
            if not content.is_eof() and not self._closing:
                keep_alive &= await self._discard_rest(content)
        except ConnectionError:
            pass  # the client has left
        except asyncio.CancelledError:
            self.force_close()
            raise
        except Exception as error:
            # One line without the request's content: the traceback of a malformed request is useless.
            log.warning("a connection failed: %s", type(error).__name__)
            self.force_close()
        finally:
            self._task = self._content = None
        if self._closing or not keep_alive:
            self.close()
            return
        assert self._parser is not None
        self._parser.message_consumed()
        if self._pipelined:
            self._start_next()
        else:
            self._await_request()

    async def _discard_rest(self, content: StreamReader) -> bool:
        """Discards the rest of a body; returns whether it came in time."""
        try:
            async with asyncio.timeout(self._linger_timeout):
                while not content.is_eof():
                    await content.readany()
        except TimeoutError:
            return False
        return True

    def _await_request(self) -> None:
        self._idle_deadline = self._loop.time() + self.idle_timeout
        if self._idle_timer is None:
            self._idle_timer = self._loop.call_at(self._idle_deadline, self._check_idle)

    def _check_idle(self) -> None:
        self._idle_timer = None
        if self._task is not None:
            return
        if self._loop.time() >= self._idle_deadline:
            self.force_close()
        else:
            self._idle_timer = self._loop.call_at(self._idle_deadline, self._check_idle)

    # --- writing

    def write(self, data: bytes | memoryview) -> None:
        """Sends bytes, without waiting for the client to read them.

        Raises:
            ConnectionError: the client has left.
        """
        transport = self.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client has left")
        self._written += len(data)
        transport.write(data)

    async def write_slices(self, data: bytes) -> None:
        """Sends bytes over TLS. Only a slice of them is in memory in encrypted form.

        Raises:
            ConnectionError: the client has left.
        """
        view = memoryview(data)
        for start in range(0, len(data), _TLS_SLICE):
            await self.drain()
            self.write(view[start : start + _TLS_SLICE])

    async def drain(self) -> None:
        """Waits until the client has read what was sent.

        Raises:
            ConnectionError: the client has left.
        """
        if self._paused and self.transport is not None:
            try:
                await self._drain_helper()
            except asyncio.CancelledError:
                self._drain_waiter = None  # cancelled as well; after a deadline, an error is still sent
                raise


def unread_bytes(transport: asyncio.WriteTransport, tcp: asyncio.WriteTransport | None) -> int:
    """Returns the bytes that were written and that the other end has not received: also those that wait in
    `tcp`, the transport below TLS, and those that the kernel buffers, where it reports them (Linux). It makes
    room for more only when a third of its buffer is free."""
    size = transport.get_write_buffer_size()
    if tcp is not None:
        size += tcp.get_write_buffer_size()
    connected = transport.get_extra_info("socket")
    if connected is not None:
        with suppress(OSError):
            size += int.from_bytes(fcntl.ioctl(connected.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    return size


def head_size(message: RawRequestMessage) -> int:
    """Returns the bytes of a request's head, without optional white space."""
    size = len(message.method) + len(message.path) + len(" HTTP/1.1\r\n\r\n") + 1
    return size + sum([len(name) + len(value) + 4 for name, value in message.raw_headers])


def _ignore_upgrade(data: bytes) -> bytes:
    """Renames the field `Upgrade` in the head of a request, which `data` begin with or continue: no other
    protocol is spoken. aiohttp's parser would drop what follows a request for one that it does not know."""
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return _UPGRADE.sub(b"\r\nIgnored", head) + data[len(head) :]
