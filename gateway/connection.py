"""One client's connection: what aiohttp leaves open for ever, closed in time, and its noise kept quiet.

Made by `gateway.listener` for every connection. Handles bytes and timers, not tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Network
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http import HttpRequestParser
from aiohttp.streams import StreamReader
from multidict import CIMultiDict

from gateway import problems, reply
from gateway.connections import Connections, Slot
from gateway.cors import Cors, is_preflight
from gateway.turns import Turnstile
from pomelo.errors import PomeloError, invalid
from pomelo.ids import new_id
from pomelo.logs import format_trace
from pomelo.origin import is_within

log = logging.getLogger("pomelo.gateway")

HEALTH = "/healthz"

READ_AHEAD = 32 * 1024
"""aiohttp buffers at most twice as many bytes of a body before a handler reads them."""

MAX_HEAD = 32 * 1024
"""Bytes of a request's head that may arrive before it is complete."""

MAX_FRAMING = 512 * 1024
"""A body of n bytes may arrive with n + MAX_FRAMING bytes of overhead: chunk framing, and pipelined
requests after it."""

MAX_DISCARDED = 64 * 1024 * 1024
"""Bytes of a refused body that are discarded so that its sender can read the error response. Every
upload within the limits is smaller."""

MAX_STRANGE = 4
"""Consecutive requests without a valid key after which a connection is closed."""

LEAST_RATE = 1024
"""The minimum rate, in bytes a second, at which a client must read an answer; measured over
`Patience.stall`."""

_LINE = 8190
_HEADERS = 128
_AHEAD = 2
"""Pipelined requests that are parsed while the current one is still being answered."""

_LINGER = 1.0
"""Seconds that a client has to read the last answer before its connection is closed."""

_LINGERING = 1 / 8
"""The share of all connections that may linger at the same time; others are closed immediately."""

_TYPE_TWICE = "Duplicate 'Content-Type' header"
"""The error text of aiohttp, which refuses such a request before a route sees it."""

_UNREADABLE = "The HTTP request can't be read. Check its request line, headers and framing"


@dataclass(frozen=True, slots=True)
class Patience:
    """The timeouts of a client's connection, in seconds.

    `head` is the time for a complete request head, from its first byte (or from connecting).
    `stall` is the period over which a client must read an answer at `LEAST_RATE` or faster. `idle`
    is the time between two requests, `proxy_idle` the same on connections from the networks
    `proxies`. `linger` is how long the rest of a refused body is discarded.
    """

    head: float
    stall: float
    idle: float
    linger: float
    proxy_idle: float
    proxies: tuple[IPv4Network | IPv6Network, ...]


class StartQueues:
    """Limits how many requests start in one iteration of the event loop. Health checks, trusted and
    untrusted connections have one queue each, so that none of them waits behind a crowd of the
    others."""

    def __init__(self) -> None:
        self.health = Turnstile(8)
        self.trusted = Turnstile(16)
        self.untrusted = Turnstile(16)


class Connection(web.RequestHandler):
    """aiohttp's protocol with deadlines, and with a `slot` among the server's `connections`. `cors` None: no
    answer has CORS headers."""

    __slots__ = (
        "_connections",
        "_cors",
        "_discarded",
        "_discards",
        "_drops",
        "_finished",
        "_framing",
        "_head_size",
        "_head_timer",
        "_known",
        "_linger_timer",
        "_lingers",
        "_patience",
        "_stall_timer",
        "_strange",
        "_turns",
        "_wire",
        "slot",
    )

    def __init__(
        self,
        server: web.Server,
        slot: Slot,
        connections: Connections,
        turns: StartQueues,
        patience: Patience,
        cors: Cors | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=patience.idle,
            lingering_time=patience.linger,
            access_log=None,  # type: ignore[arg-type]
            auto_decompress=False,
            read_bufsize=READ_AHEAD,
        )
        # aiohttp's default parser parses 32 requests ahead.
        self._max_msg_queue_size = _AHEAD
        self._msg_queue_resume_size = _AHEAD // 2
        self._parser = HttpRequestParser(
            self,
            loop,
            READ_AHEAD,
            max_line_size=_LINE,
            max_field_size=_LINE,
            max_headers=_HEADERS,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=_AHEAD,
        )
        self.slot = slot
        self._connections = connections
        self._cors = cors
        self._turns = turns
        self._patience = patience
        self._known = False
        self._finished = 0
        self._framing = 0
        self._discarded = 0
        self._strange = 0
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._discards = False
        self._drops = False
        self._lingers = False
        self._wire: asyncio.Transport | None = None

    # --- its slot

    def trust(self, owner: Hashable) -> None:
        """Records that the current request carried a valid key of `owner`."""
        self._known = True
        self.slot.waiting = False
        slot = self.slot
        if slot.owner != owner:
            self._connections.trust(slot, owner)

    def end(self, told: bool) -> None:
        """Ends the connection. With `told`, an untrusted client that waits for an answer gets
        `overloaded` first."""
        wire = self._wire
        if wire is None:
            return
        if self.slot.owner is not None:
            self.force_close()  # closes after the buffered data has been sent
            return
        request = self._current_request
        due = self._head_timer is not None or self._request_count > self._finished
        if told and due and (request is None or not request.writer.output_size):
            self._dismiss(overloaded(self._cors_headers(request)))
        else:
            wire.abort()

    def _dismiss(self, answer: bytes) -> None:
        """Sends a last answer, bypassing aiohttp; closes once the client had time to read it."""
        wire = self._wire
        assert wire is not None
        connections = self._connections
        connections.close(self.slot)
        wire.write(answer)
        if self._task_handler is not None:
            self._task_handler.cancel()
        if connections.lingering < _LINGERING * connections.limits.most:
            connections.lingering += 1
            self._lingers = True
            self._discard(_LINGER)
        else:
            self._discard(0.0)

    def _discard(self, seconds: float) -> None:
        """Stops reading requests; discards what still arrives, unparsed, for `seconds` or until the
        client closes.

        An immediate close while the client still sends would reset the connection, and the client
        would lose the last answer. After a half-close, some clients end their request before they
        have read it.
        """
        wire = self._wire
        if wire is None:
            return
        self._discards = True
        self._force_close = True
        self.transport = None  # so that aiohttp neither writes nor closes any more
        self._stop_timers()
        if seconds:
            self._linger_timer = self._loop.call_later(seconds, wire.abort)
            wire.resume_reading()  # aiohttp may have paused it
        else:
            wire.close()
        if wire.get_write_buffer_size():
            self._watch(wire.get_write_buffer_size())

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109 - it is aiohttp's
        """Ends the connection in good order; see aiohttp."""
        if self._discards and self._wire is not None:
            self._wire.abort()
        await super().shutdown(timeout)

    # --- bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the head timeout, or aborts a connection that has been ended already."""
        wire = cast(asyncio.Transport, transport)
        if self._manager is None or not self.slot.open:
            wire.abort()
            return
        peer = wire.get_extra_info("peername") if self._patience.proxies else None
        if peer and is_within(peer[0], self._patience.proxies):
            self._keepalive_timeout = self._patience.proxy_idle
        super().connection_made(transport)
        # Any byte that the client has not taken pauses the writer, so that every stall is seen, also
        # one after the connection was told to close.
        wire.set_write_buffer_limits(high=1, low=0)
        self._wire = wire
        self.slot.end = self.end
        self._head_timer = self._loop.call_later(self._patience.head, self._head_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Ends the timers; aiohttp cancels the request that was being handled."""
        self._stop_timers()
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        if self._lingers:
            self._lingers = False
            self._connections.lingering -= 1
        self._wire = None
        self._connections.close(self.slot)
        super().connection_lost(exc)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = None

    def data_received(self, data: bytes) -> None:
        """Takes in bytes, and watches that a head which has begun comes to its end."""
        if self._discards:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED and self._wire is not None:
                self._wire.abort()
            return
        request = self._current_request
        ahead = request is not None and request.content.is_eof()  # of the answer to the last request
        before = 0 if request is None else request.content.total_bytes
        super().data_received(data)
        if request is not None and not ahead:
            self._count_framing(request.content, len(data), before)
        if self._waits() or (ahead and not self._messages):
            if data:
                self._head_size += len(data)
                if self._head_size > MAX_HEAD:
                    self._refuse_head()
                    return
                self._connections.hears(self.slot)
                if self._head_timer is None:
                    self._head_timer = self._loop.call_later(self._patience.head, self._head_late)
        elif self._head_timer is not None and self._request_count:
            self._head_timer.cancel()
            self._head_timer = None
            self._head_size = 0
            self.slot.heard = None

    def _count_framing(self, content: StreamReader, size: int, before: int) -> None:
        """Fails a body with too much overhead: aiohttp does not limit chunk extensions."""
        self._framing += size - (content.total_bytes - before)
        if self._framing > MAX_FRAMING + content.total_bytes and content.exception() is None:
            content.set_exception(web.RequestPayloadError("too much besides the body"))

    def _refuse_head(self) -> None:
        if self._request_count > self._finished:
            assert self._wire is not None
            self._wire.abort()  # a second answer would corrupt the one in progress
        else:
            self._dismiss(_raw_answer(PomeloError("invalid_body", _UNREADABLE), self._cors_headers(None)))

    def _waits(self) -> bool:
        """Whether the client's next request is waited for."""
        return self._waiter is not None and not self._waiter.done()

    def _head_late(self) -> None:
        if self._request_count and not self._waits():
            # It came while the last request was still being answered; that is not the client's delay.
            self._head_timer = self._loop.call_later(self._patience.head, self._head_late)
            return
        self._head_timer = None
        self.force_close()

    def pause_writing(self) -> None:
        """The client has stopped taking what we write."""
        super().pause_writing()
        if self._wire is not None:
            self._watch(self._wire.get_write_buffer_size())

    def resume_writing(self) -> None:
        """The client has taken it all."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch(self, size: int) -> None:
        self._stall_timer = self._loop.call_later(self._patience.stall, self._check, size)

    def _check(self, before: int) -> None:
        self._stall_timer = None
        if self._wire is None:
            return
        left = self._wire.get_write_buffer_size()
        if before - left >= min(before, self._patience.stall * LEAST_RATE):
            self._watch(left)
        else:
            self._wire.abort()

    # --- requests

    async def _handle_request(
        self,
        request: web.BaseRequest,
        start_time: float | None,
        request_handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> tuple[web.StreamResponse, bool]:
        slot = self.slot
        slot.busy = slot.waiting = True
        health = request.path == HEALTH
        turns = self._turns
        turn = (turns.health if health else turns.untrusted if slot.owner is None else turns.trusted).enter()
        self._known = self._drops = False
        self._framing = 0
        try:
            if turn is not None:
                self._current_request = request
                await turn
            if slot.surplus and not health:
                request_handler = self._refuse
            return await super()._handle_request(request, start_time, request_handler)
        finally:
            self._current_request = None
            if self._drops and not request.content.is_eof():
                self._discard(self._patience.linger)
            slot.busy = slot.waiting = False
            self._finished += 1
            slot.idle_since = self._loop.time()
            # Health checks and preflights have no key, but arrive between requests that have one.
            keyless = health or (self._cors is not None and is_preflight(request))
            if not self._known and slot.owner is not None and not keyless:
                self._connections.distrust(slot)

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        """Sends an answer, and closes the connection after `MAX_STRANGE` without a valid key."""
        self.slot.waiting = False
        if self._known:
            self._strange = 0
        else:
            self._strange += 1
            if self._strange >= MAX_STRANGE or self.slot.surplus:
                resp.force_close()
        # aiohttp would parse the rest of a body to discard it; that is expensive with chunks.
        self._drops = not request.content.is_eof() and (not self._known or request.content_length is None)
        if self._drops:
            resp.force_close()
        return super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """One line without the request's content; a trace of a malformed request helps nobody."""
        log.warning("a connection failed: %s", type(kwargs.get("exc_info")).__name__)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Our error body for what never came to a route: malformed HTTP."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has begun already")
        if status == 400:
            log.warning("a malformed request was refused: %s", type(exc).__name__)
            error = (
                invalid("Content-Type", "given once")
                if _TYPE_TWICE in str(exc)
                else PomeloError("invalid_body", _UNREADABLE)
            )
        else:
            log.error("a request failed outside its route\n%s", format_trace(exc) if exc else "")
            error = PomeloError("internal_error")
        return self._last_answer(error, request)

    async def _refuse(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers every request on a surplus connection with `overloaded`."""
        return self._last_answer(PomeloError("overloaded"), request)

    def _last_answer(self, error: PomeloError, request: web.BaseRequest) -> web.Response:
        headers = _headers(error)
        headers.update(self._cors_headers(request))
        response = web.Response(body=problems.body(error), status=error.row.http, headers=headers)
        response.force_close()
        return response

    def _cors_headers(self, request: web.BaseRequest | None) -> Mapping[str, str]:
        """The CORS headers of an answer that does not come from the application."""
        if self._cors is None:
            return {}
        return self._cors.headers(request.headers.get(hdrs.ORIGIN) if request is not None else None)


def _headers(error: PomeloError) -> CIMultiDict[str]:
    made = CIMultiDict(reply.SAFE)
    made["Content-Type"] = "application/json"
    made["X-Request-Id"] = new_id("req_")
    if error.retry_after is not None:
        made["Retry-After"] = str(error.retry_after)
    return made


def overloaded(cors: Mapping[str, str]) -> bytes:
    """The complete HTTP response to a client that exceeds the connection limit; `cors` are its CORS
    headers."""
    return _raw_answer(PomeloError("overloaded"), cors)


def _raw_answer(error: PomeloError, cors: Mapping[str, str]) -> bytes:
    body = problems.body(error)
    status = HTTPStatus(error.row.http)
    headers = _headers(error)
    headers.update(cors)
    headers["Content-Length"] = str(len(body))
    headers["Connection"] = "close"
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n{lines}\r\n".encode() + body
