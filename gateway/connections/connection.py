"""One client's HTTP connection: its timeouts, its limits, and the responses that no route sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import cast

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import BadHttpMessage, HttpProcessingError
from aiohttp.streams import StreamReader

from gateway.connections.http import HttpConnection, ParsedRequest, head_size, unread_bytes
from gateway.connections.limits import MIN_READ_RATE, PROXY_WRITE_TIMEOUT, Connections, Slot, StartQueues
from gateway.connections.unreadable import UNREADABLE, unreadable_error
from gateway.cors import Cors, is_preflight
from gateway.errors import error_body, raw_error_response, unrouted_headers
from gateway.options import GatewayOptions
from gateway.request import NO_REQUEST, Request
from gateway.responses import HSTS, Response, reset, reset_connection
from pomelo.errors import PomeloError
from pomelo.network.origin import is_within
from pomelo.telemetry.readiness import Readiness

log = logging.getLogger("pomelo.gateway")

Respond = Callable[[Request], Awaitable[Response | None]]
"""Returns the response to a request; None: it was sent already."""

_VERSIONS = (HttpVersion11, HttpVersion10)

HEALTH_PATH = "/healthz"

MAX_HEAD = 32 * 1024
"""Bytes of a request's head, whether it arrives in one piece or in many."""

MAX_FRAMING = 512 * 1024
"""A body of n bytes may arrive with n + MAX_FRAMING bytes of overhead: chunk framing, and pipelined
requests after it."""

MAX_DISCARDED = 64 * 1024 * 1024
"""The most bytes of a refused body that are discarded so that its sender can read the error."""

MAX_UNAUTHENTICATED = 4
"""Consecutive requests without a valid key after which a connection is closed."""

_LINGER_SECONDS = 1.0
"""Seconds that a client has to read the last response before its connection is closed."""

_MAX_LINGERING_SHARE = 1 / 8
"""The share of all connections that may linger at the same time; others are closed immediately."""


class Connection(HttpConnection):
    """An HTTP connection with timeouts, which occupies `slot` of the server's `connections`.

    `respond` returns the responses to its requests. If `cors` is None, they have no CORS headers. `address`
    is the IP address of its other end, `proxies` are those of the operator if it is one of them. While
    `readiness` is draining, it ends after its next response.
    """

    __slots__ = (
        "_authenticated", "_connections", "_counts_as_lingering", "_discard_body", "_discarded",
        "_discarding", "_finished", "_framing_bytes", "_head_size", "_head_timer", "_large_read",
        "_linger_timer", "_options", "_raw_transport", "_request", "_respond", "_stall_timer",
        "_start_queues", "_unauthenticated_count", "_write_timeout", "address", "cors", "proxies",
        "readiness", "slot",
    )  # fmt: skip

    def __init__(
        self,
        respond: Respond,
        live: set[HttpConnection],
        connections: Connections,
        start_queues: StartQueues,
        options: GatewayOptions,
        readiness: Readiness,
        cors: Cors | None,
        slot: Slot,
    ) -> None:
        super().__init__(live, options.idle_timeout + options.idle_slack, options.linger_timeout)
        self.slot = slot
        self.cors = cors
        self.readiness = readiness
        self.address = ""
        self.proxies: tuple[IPv4Network | IPv6Network, ...] = ()
        self._respond = respond
        self._connections = connections
        self._start_queues = start_queues
        self._options = options
        self._write_timeout = options.write_timeout
        self._request: Request | None = None
        self._authenticated = False
        self._finished = self._framing_bytes = self._discarded = 0
        self._unauthenticated_count = self._head_size = 0
        self._large_read = False  # whether a head that is too large may have arrived in one piece
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._discarding = self._discard_body = self._counts_as_lingering = False
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
        request = self._request
        waits = self._head_timer is not None or self._request_count > self._finished
        if send_refusal and waits and (request is None or not request.answered):
            self._send_last_response(PomeloError("overloaded"), request)
        else:
            raw.abort()

    def _send_last_response(self, error: PomeloError, request: Request | None) -> None:
        """Sends a last response in place of the current one; closes once the client had time to read it."""
        raw = self._raw_transport
        assert raw is not None
        extra = self._cors_headers(request)
        raw.write(raw_error_response(error, {**extra, **HSTS} if self.has_tls else extra, request))
        if self._task is not None:
            self._task.cancel()
        self._linger()

    def _linger(self) -> None:
        """Gives up the slot, and closes once the client had time to read its last response."""
        connections = self._connections
        connections.close(self.slot)
        lingers = connections.lingering < _MAX_LINGERING_SHARE * connections.limits.max_connections
        self._counts_as_lingering = lingers
        connections.lingering += lingers
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
        self._closing = True
        self.transport = None  # so that nothing else is written, and nothing closes it
        self._stop_timers()
        if seconds:
            self._linger_timer = self._loop.call_later(seconds, raw.abort)
            raw.resume_reading()  # it may be paused
        else:
            raw.close()
        if raw.get_write_buffer_size() or self._paused:
            self._watch_stall(raw)

    async def shutdown(self, seconds: float) -> None:
        """Closes; refuses or cancels a request that is still running after `seconds`."""
        if self._discarding and self._raw_transport is not None:
            self._raw_transport.abort()
        await super().shutdown(seconds)
        if self._linger_timer is not None:  # the end of the process would reset the connection
            await asyncio.sleep(_LINGER_SECONDS)

    def interrupt(self) -> None:
        request = self._request
        if request is None or request.answered or self._discarding:
            super().interrupt()
            if request is not None and request.open_ended:
                reset_connection(request)
        else:
            self._send_last_response(PomeloError("shutting_down"), request)

    # --- bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the head timeout, or aborts a connection that has been ended already."""
        raw = cast(asyncio.Transport, transport)
        if not self.slot.open:
            raw.abort()
            return
        if peer := raw.get_extra_info("peername"):
            self.address = peer[0]
            if is_within(self.address, self._options.trusted_proxies):
                self.proxies = self._options.trusted_proxies
                self.idle_timeout = self._options.proxy_idle_timeout + self._options.idle_slack
                self._write_timeout = PROXY_WRITE_TIMEOUT
        super().connection_made(transport)
        # Any byte that the client has not read pauses the writer, so that every stall is noticed, even
        # after the connection was asked to close.
        raw.set_write_buffer_limits(high=1, low=0)
        self._raw_transport = raw
        self.slot.end = self.end
        self._head_timer = self._loop.call_later(self._options.head_timeout, self._on_head_timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stops the timers, frees the slot, and cancels the current request."""
        self._stop_timers()
        self._connections.lingering -= self._counts_as_lingering
        self._counts_as_lingering = False
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
        request = self._request
        pipelined = request is not None and request.content.is_eof()  # the next request, sent early
        before = 0 if request is None else request.content.total_bytes
        self._large_read |= self._head_size + len(data) > MAX_HEAD
        super().data_received(data)
        if request is not None and not pipelined:
            self._count_framing_bytes(request.content, len(data), before)
        if self._task is None or (pipelined and not self._pipelined):
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
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
            self._head_size = 0
            self.slot.request_started = None

    def _count_framing_bytes(self, content: StreamReader, size: int, before: int) -> None:
        """Fails a body with too much overhead: aiohttp's parser does not limit chunk extensions."""
        self._framing_bytes += size - (content.total_bytes - before)
        if self._framing_bytes > MAX_FRAMING + content.total_bytes and content.exception() is None:
            content.set_exception(web.RequestPayloadError("too much framing"))

    def _refuse_head(self) -> None:
        if self._request_count > self._finished:
            assert self._raw_transport is not None
            self._raw_transport.abort()  # a second response would corrupt the one in progress
        else:
            self._send_last_response(PomeloError("invalid_body", UNREADABLE), None)

    def _on_head_timeout(self) -> None:
        if self._task is not None:
            # It arrived while the last request was being handled; that delay is not the client's.
            self._head_timer = self._loop.call_later(self._options.head_timeout, self._on_head_timeout)
            return
        self._head_timer = None
        self.force_close()

    def pause_writing(self) -> None:
        """Starts the stall timer: the client does not read what was written."""
        super().pause_writing()
        if self._raw_transport is not None:
            self._watch_stall(self._raw_transport)

    def resume_writing(self) -> None:
        """Stops the stall timer: the client has read everything."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def _watch_stall(self, raw: asyncio.Transport) -> None:
        unread = unread_bytes(raw, self.tcp)
        self._stall_timer = self._loop.call_later(
            self._write_timeout, self._check_stall, unread, self._written - unread
        )

    def _check_stall(self, unread: int, read: int) -> None:
        """Resets the connection if its client, which had `read` so many bytes and left so many `unread`, has
        hardly read on."""
        self._stall_timer = None
        raw = self._raw_transport
        if raw is None:
            return
        read_since = self._written - unread_bytes(raw, self.tcp) - read
        if read_since >= min(unread, self._write_timeout * MIN_READ_RATE):
            self._watch_stall(raw)
        else:
            reset(raw)

    # --- requests

    async def handle(self, parsed: ParsedRequest, content: StreamReader) -> bool:
        error = None
        if isinstance(parsed, HttpProcessingError):
            error, parsed = parsed, NO_REQUEST
        elif parsed.version not in _VERSIONS:  # aiohttp's parser accepts HTTP/0.9 and HTTP/2.0, too
            error, parsed = BadHttpMessage("HTTP version"), NO_REQUEST
        elif self._large_read and head_size(parsed) > MAX_HEAD:
            error = BadHttpMessage("large head")
        request = self._request = Request(self, parsed, content)
        slot = self.slot
        slot.busy = slot.waiting = True
        health = HEALTH_PATH in request.target and request.url.path == HEALTH_PATH
        queues = self._start_queues
        queue = queues.health if health else queues.untrusted if slot.owner is None else queues.trusted
        turn = queue.enter()
        self._authenticated = self._discard_body = False
        self._framing_bytes = 0
        response: Response | None = None
        try:
            if turn is not None:
                await turn
            if slot.surplus and not health:
                response = self._refuse(request, PomeloError("overloaded"))
            elif error is not None:
                log.warning("a malformed request was refused: %s", type(error).__name__)
                response = self._refuse(request, unreadable_error(error, self._unparsed))
            else:
                response = await self._respond(request)
            slot.waiting = False
            self._decide_end(request)
            if response is not None:
                for data in self._encode(response, request):
                    request.answered = True
                    if self.tcp is None:
                        self.write(data)
                    else:
                        await self.write_slices(data)
                if self._paused:
                    await self.drain()
            return request.keep_alive
        finally:
            self._request = None
            if response is not None and response.on_end is not None:
                response.on_end()
            if self._discard_body and not content.is_eof():
                self._discard(self._options.linger_timeout)
            slot.busy = slot.waiting = False
            self._finished += 1
            slot.idle_since = self._loop.time()
            # Health checks and preflights have no key, but arrive between requests that have one.
            keyless = health or (self.cors is not None and is_preflight(request))
            if not self._authenticated and slot.owner is not None and not keyless:
                self._connections.distrust(slot)
            if error is not None and self._raw_transport is not None and not self._discarding:
                self._linger()  # the client may still send the rest of its request

    def _decide_end(self, request: Request) -> None:
        """Ends the connection with this response after `MAX_UNAUTHENTICATED` requests in a row without a
        valid key, or if the rest of the body would cost too much."""
        authenticated = self._authenticated
        self._unauthenticated_count = 0 if authenticated else self._unauthenticated_count + 1
        # The parser would take the rest of a body apart; that is expensive with chunks.
        self._discard_body = not request.content.is_eof() and (
            not authenticated or request.expects_continue or "Content-Length" not in request.headers
        )
        if self.slot.surplus or self._discard_body or self._unauthenticated_count >= MAX_UNAUTHENTICATED:
            request.keep_alive = False

    def _encode(self, response: Response, request: Request) -> tuple[bytes, ...]:
        try:
            return response.encode(request)
        except ValueError as error:  # such as a provider's content type with a control character
            log.error("a response can't be sent: %s", error)
            return self._refuse(request, PomeloError("internal_error")).encode(request)

    def _refuse(self, request: Request, error: PomeloError) -> Response:
        request.keep_alive = False
        headers = unrouted_headers(error, self._cors_headers(request))
        return Response(headers, error_body(error, request), error.row.http)

    def _cors_headers(self, request: Request | None) -> Mapping[str, str]:
        """Returns the CORS headers of a response that no route sends."""
        if self.cors is None:
            return {}
        if request is None or not request.headers:
            unparsed, self._unparsed = self._unparsed, b""
            return self.cors.unparsed_headers(unparsed)
        return self.cors.headers(request.headers.get("Origin"))
