"""One client's connection: what aiohttp leaves open for ever, closed in time, and its noise kept quiet.

Made by `gateway.app` for every connection. Knows bytes and clocks, and nothing of tasks.
"""

import asyncio
import logging
from typing import Any, cast

from aiohttp import web
from multidict import CIMultiDict

from gateway import problems, reply
from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.traces import trace

log = logging.getLogger("pomelo.gateway")

_UNREADABLE = "The HTTP request can't be read. Check its request line, headers and framing"


class Connection(web.RequestHandler):
    """aiohttp's protocol with deadlines.

    `head` is the seconds that a request's head may take from its first byte (or from connecting); `stall`
    the seconds in which a client that we write to must take at least something; `most` the connections
    of the server at once: one more is closed unanswered.
    """

    __slots__ = ("_head", "_head_timer", "_most", "_stall", "_stall_timer", "_wire")

    def __init__(self, server: web.Server, *, head: float, stall: float, most: int, **options: Any) -> None:
        super().__init__(server, loop=asyncio.get_running_loop(), **options)
        self._head = head
        self._stall = stall
        self._most = most
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._wire: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Takes the connection in, or closes it when there are too many."""
        wire = cast(asyncio.Transport, transport)
        if self._manager is None or len(self._manager.connections) >= self._most:
            log.warning("a connection was refused: %d are open", self._most)
            wire.abort()
            return
        super().connection_made(transport)
        # Any byte that the client has not taken pauses the writer, so that every stall is seen, also
        # one after the connection was told to close.
        wire.set_write_buffer_limits(high=1, low=0)
        self._wire = wire
        self._head_timer = self._loop.call_later(self._head, self._head_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Ends the timers; aiohttp cancels the request that was being handled."""
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._stall_timer = self._wire = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Takes in bytes, and watches that a head which has begun comes to its end."""
        request = self._current_request
        ahead = request is not None and request.content.is_eof()  # of the answer to the last request
        super().data_received(data)
        if self._waits() or (ahead and not self._messages):
            if self._head_timer is None and data:
                self._head_timer = self._loop.call_later(self._head, self._head_late)
        elif self._head_timer is not None and self._request_count:
            self._head_timer.cancel()
            self._head_timer = None

    def _waits(self) -> bool:
        """Whether the client's next request is waited for."""
        return self._waiter is not None and not self._waiter.done()

    def _head_late(self) -> None:
        if self._request_count and not self._waits():
            # It came while the last request was still being answered; that is not the client's delay.
            self._head_timer = self._loop.call_later(self._head, self._head_late)
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
        self._stall_timer = self._loop.call_later(self._stall, self._check, size)

    def _check(self, before: int) -> None:
        self._stall_timer = None
        if self._wire is None:
            return
        left = self._wire.get_write_buffer_size()
        if left < before:
            self._watch(left)
        else:
            self._wire.abort()

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
            error = PomeloError("invalid_body", _UNREADABLE)
        else:
            log.error("a request failed outside its route\n%s", trace(exc) if exc else "")
            error = PomeloError("internal_error")
        made = CIMultiDict(reply.SAFE)
        made["Content-Type"] = "application/json"
        made["X-Request-Id"] = new_id("req_")
        response = web.Response(body=problems.body(error), status=error.row.http, headers=made)
        response.force_close()
        return response
