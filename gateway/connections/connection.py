"""One client's HTTP connection: aiohttp's protocol with the timeouts and limits that aiohttp lacks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http import HttpRequestParser
from aiohttp.streams import StreamReader

from gateway.connections.limits import MIN_READ_RATE, Connections, Slot, StartQueues
from gateway.cors import Cors, is_preflight
from gateway.errors import error_body, raw_error_response, unrouted_headers
from gateway.options import GatewayOptions
from pomelo.errors import PomeloError, invalid
from pomelo.logs import format_trace
from pomelo.origin import is_within

log = logging.getLogger("pomelo.gateway")

HEALTH_PATH = "/healthz"

READ_AHEAD = 32 * 1024
"""aiohttp buffers at most twice as many bytes of a body before a handler reads them."""

MAX_HEAD = 32 * 1024
"""Bytes of a request's head that may arrive before it is complete."""

MAX_FRAMING = 512 * 1024
"""A body of n bytes may arrive with n + MAX_FRAMING bytes of overhead: chunk framing, and pipelined
requests after it."""

MAX_DISCARDED = 64 * 1024 * 1024
"""Bytes of a refused body that are discarded so that its sender can read the error. No upload is larger."""

MAX_UNAUTHENTICATED = 4
"""Consecutive requests without a valid key after which a connection is closed."""

_MAX_LINE = 8190
_MAX_HEADERS = 128
_MAX_PIPELINED = 2
"""Pipelined requests that are parsed while the current one is being handled."""

_LINGER_SECONDS = 1.0
"""Seconds that a client has to read the last response before its connection is closed."""

_MAX_LINGERING_SHARE = 1 / 8
"""The share of all connections that may linger at the same time; others are closed immediately."""

_DUPLICATE_CONTENT_TYPE = "Duplicate 'Content-Type' header"
"""The error text of aiohttp, which refuses such a request before a route sees it."""

_UNREADABLE = "The HTTP request can't be read. Check its request line, headers and framing"


class Connection(web.RequestHandler):
    """An HTTP connection with timeouts, which occupies `slot` of the server's `connections`.

    If `cors` is None, responses have no CORS headers.
    """

    __slots__ = (
        "_authenticated", "_connections", "_cors", "_counts_as_lingering", "_discard_body", "_discarded",
        "_discarding", "_finished", "_framing_bytes", "_head_size", "_head_timer", "_linger_timer",
        "_options", "_raw_transport", "_stall_timer", "_start_queues", "_unauthenticated_count", "slot",
    )  # fmt: skip

    def __init__(
        self,
        server: web.Server,
        connections: Connections,
        start_queues: StartQueues,
        options: GatewayOptions,
        cors: Cors | None,
        slot: Slot,
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=options.idle_timeout + options.idle_slack,
            lingering_time=options.linger_timeout,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            read_bufsize=READ_AHEAD,
        )
        # aiohttp's default parser parses 32 requests ahead.
        self._max_msg_queue_size = _MAX_PIPELINED
        self._msg_queue_resume_size = _MAX_PIPELINED // 2
        self._parser = HttpRequestParser(
            self,
            loop,
            READ_AHEAD,
            max_line_size=_MAX_LINE,
            max_field_size=_MAX_LINE,
            max_headers=_MAX_HEADERS,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=_MAX_PIPELINED,
        )
        self.slot = slot
        self._connections = connections
        self._cors = cors
        self._start_queues = start_queues
        self._options = options
        self._authenticated = False
        self._finished = 0
        self._framing_bytes = 0
        self._discarded = 0
        self._unauthenticated_count = 0
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._discarding = False
        self._discard_body = False
        self._counts_as_lingering = False
        self._raw_transport: asyncio.Transport | None = None

    # --- slot

    def trust(self, owner: Hashable) -> None:
        """Records that the current request carried a valid key of `owner`."""
        self._authenticated = True
        self.slot.waiting = False
        if self.slot.owner != owner:
            self._connections.trust(self.slot, owner)

    def end(self, send_refusal: bool) -> None:
        """Ends the connection. With `send_refusal`, an untrusted client that waits for a response gets
        `overloaded` first."""
        raw = self._raw_transport
        if raw is None:
            return
        if self.slot.owner is not None:
            self.force_close()  # closes after the buffered data has been sent
            return
        request = self._current_request
        waits = self._head_timer is not None or self._request_count > self._finished
        if send_refusal and waits and (request is None or not request.writer.output_size):
            self._send_last_response(PomeloError("overloaded"), request)
        else:
            raw.abort()

    def _send_last_response(self, error: PomeloError, request: web.BaseRequest | None) -> None:
        """Sends a last response, bypassing aiohttp; closes once the client had time to read it."""
        raw = self._raw_transport
        assert raw is not None
        connections = self._connections
        connections.close(self.slot)
        raw.write(raw_error_response(error, self._cors_headers(request)))
        if self._task_handler is not None:
            self._task_handler.cancel()
        lingers = connections.lingering < _MAX_LINGERING_SHARE * connections.limits.max_connections
        if lingers:
            connections.lingering += 1
        self._counts_as_lingering = lingers
        self._discard(_LINGER_SECONDS if lingers else 0.0)

    def _discard(self, seconds: float) -> None:
        """Stops reading requests; discards what still arrives, unparsed, for `seconds` or until the client
        closes.

        An immediate close while the client still sends would reset the connection, and the client would
        lose the last response. After a half-close, some clients end their request before they have read it.
        """
        raw = self._raw_transport
        if raw is None:
            return
        self._discarding = True
        self._force_close = True
        self.transport = None  # so that aiohttp neither writes nor closes any more
        self._stop_timers()
        if seconds:
            self._linger_timer = self._loop.call_later(seconds, raw.abort)
            raw.resume_reading()  # aiohttp may have paused it
        else:
            raw.close()
        if size := raw.get_write_buffer_size():
            self._watch_stall(size)

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - aiohttp's parameter
        """Closes the connection; waits up to `timeout` seconds for the current request."""
        if self._discarding and self._raw_transport is not None:
            self._raw_transport.abort()
        await super().shutdown(timeout)

    # --- bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the head timeout, or aborts a connection that has been ended already."""
        raw = cast(asyncio.Transport, transport)
        if self._manager is None or not self.slot.open:
            raw.abort()
            return
        peer = raw.get_extra_info("peername") if self._options.trusted_proxies else None
        if peer and is_within(peer[0], self._options.trusted_proxies):
            self._keepalive_timeout = self._options.proxy_idle_timeout + self._options.idle_slack
        super().connection_made(transport)
        # Any byte that the client has not read pauses the writer, so that every stall is noticed, even
        # after the connection was asked to close.
        raw.set_write_buffer_limits(high=1, low=0)
        self._raw_transport = raw
        self.slot.end = self.end
        self._head_timer = self._loop.call_later(self._options.head_timeout, self._on_head_timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stops the timers and frees the slot; aiohttp cancels the current request."""
        self._stop_timers()
        if self._counts_as_lingering:
            self._counts_as_lingering = False
            self._connections.lingering -= 1
        self._raw_transport = None
        self._connections.close(self.slot)
        super().connection_lost(exc)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = self._linger_timer = None

    def data_received(self, data: bytes) -> None:
        """Parses or discards bytes, and limits the size and the time of an incomplete request head."""
        if self._discarding:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED and self._raw_transport is not None:
                self._raw_transport.abort()
            return
        request = self._current_request
        pipelined = request is not None and request.content.is_eof()  # the next request, sent early
        before = 0 if request is None else request.content.total_bytes
        super().data_received(data)
        if request is not None and not pipelined:
            self._count_framing_bytes(request.content, len(data), before)
        if self._awaits_request() or (pipelined and not self._messages):
            if data:
                self._head_size += len(data)
                if self._head_size > MAX_HEAD:
                    self._refuse_head()
                    return
                self.slot.waiting &= pipelined  # the client has yet to send the rest of its request
                self._connections.mark_request_started(self.slot)
                if self._head_timer is None:
                    self._head_timer = self._loop.call_later(
                        self._options.head_timeout, self._on_head_timeout
                    )
        elif self._head_timer is not None and self._request_count:
            self._head_timer.cancel()
            self._head_timer = None
            self._head_size = 0
            self.slot.request_started = None

    def _count_framing_bytes(self, content: StreamReader, size: int, before: int) -> None:
        """Fails a body with too much overhead: aiohttp does not limit chunk extensions."""
        self._framing_bytes += size - (content.total_bytes - before)
        if self._framing_bytes > MAX_FRAMING + content.total_bytes and content.exception() is None:
            content.set_exception(web.RequestPayloadError("too much framing"))

    def _refuse_head(self) -> None:
        if self._request_count > self._finished:
            assert self._raw_transport is not None
            self._raw_transport.abort()  # a second response would corrupt the one in progress
        else:
            self._send_last_response(PomeloError("invalid_body", _UNREADABLE), None)

    def _awaits_request(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _on_head_timeout(self) -> None:
        if self._request_count and not self._awaits_request():
            # It arrived while the last request was being handled; that delay is not the client's.
            self._head_timer = self._loop.call_later(self._options.head_timeout, self._on_head_timeout)
            return
        self._head_timer = None
        self.force_close()

    def pause_writing(self) -> None:
        """Starts the stall timer: the client does not read what was written."""
        super().pause_writing()
        if self._raw_transport is not None:
            self._watch_stall(self._raw_transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Stops the stall timer: the client has read everything."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch_stall(self, size: int) -> None:
        self._stall_timer = self._loop.call_later(self._options.write_timeout, self._check_stall, size)

    def _check_stall(self, before: int) -> None:
        self._stall_timer = None
        if self._raw_transport is None:
            return
        left = self._raw_transport.get_write_buffer_size()
        if before - left >= min(before, self._options.write_timeout * MIN_READ_RATE):
            self._watch_stall(left)
        else:
            self._raw_transport.abort()

    # --- requests

    async def _handle_request(
        self,
        request: web.BaseRequest,
        start_time: float | None,
        request_handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> tuple[web.StreamResponse, bool]:
        slot = self.slot
        slot.busy = slot.waiting = True
        health = request.path == HEALTH_PATH
        queues = self._start_queues
        queue = queues.health if health else queues.untrusted if slot.owner is None else queues.trusted
        turn = queue.enter()
        self._authenticated = self._discard_body = False
        self._framing_bytes = 0
        try:
            if turn is not None:
                self._current_request = request
                await turn
            if slot.surplus and not health:
                request_handler = self._refuse_surplus
            return await super()._handle_request(request, start_time, request_handler)
        finally:
            self._current_request = None
            if self._discard_body and not request.content.is_eof():
                self._discard(self._options.linger_timeout)
            slot.busy = slot.waiting = False
            self._finished += 1
            slot.idle_since = self._loop.time()
            # Health checks and preflights have no key, but arrive between requests that have one.
            keyless = health or (self._cors is not None and is_preflight(request))
            if not self._authenticated and slot.owner is not None and not keyless:
                self._connections.distrust(slot)

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Sends a response; closes after `MAX_UNAUTHENTICATED` requests in a row without a valid key."""
        self._current_request = request  # aiohttp forgets it before the response is sent
        self.slot.waiting = False
        self._unauthenticated_count = 0 if self._authenticated else self._unauthenticated_count + 1
        surplus = self.slot.surplus and not self._authenticated
        if surplus or self._unauthenticated_count >= MAX_UNAUTHENTICATED:
            resp.force_close()
        # aiohttp would parse the rest of a body to discard it; that is expensive with chunks.
        self._discard_body = not request.content.is_eof() and (
            not self._authenticated or request.content_length is None
        )
        if self._discard_body:
            resp.force_close()
        return super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """Logs one line without the request's content: the traceback of a malformed request is useless."""
        log.warning("a connection failed: %s", type(kwargs.get("exc_info")).__name__)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Returns the error response to a request that never reached a route, such as malformed HTTP.

        Raises:
            ConnectionError: a response has begun already.
        """
        if request.writer.output_size > 0:
            raise ConnectionError("a response has begun already")
        if status == 400:
            log.warning("a malformed request was refused: %s", type(exc).__name__)
            error = PomeloError("invalid_body", _UNREADABLE)
            if _DUPLICATE_CONTENT_TYPE in str(exc):
                error = invalid("Content-Type", "given once")
        else:
            log.error("a request failed outside its route\n%s", format_trace(exc) if exc else "")
            error = PomeloError("internal_error")
        return self._error_response(error, request)

    async def _refuse_surplus(self, request: web.BaseRequest) -> web.StreamResponse:
        return self._error_response(PomeloError("overloaded"), request)

    def _error_response(self, error: PomeloError, request: web.BaseRequest) -> web.Response:
        headers = unrouted_headers(error, self._cors_headers(request))
        response = web.Response(body=error_body(error), status=error.row.http, headers=headers)
        response.force_close()
        return response

    def _cors_headers(self, request: web.BaseRequest | None) -> Mapping[str, str]:
        """Returns the CORS headers of a response that does not come from the application."""
        origin = request.headers.get(hdrs.ORIGIN) if request is not None else None
        return self._cors.headers(origin) if self._cors is not None else {}
