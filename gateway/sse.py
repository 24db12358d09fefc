"""Server-sent events: the response to a task with `stream: true`.

An error before the first event is an ordinary error response; after it, an `error` event without `[DONE]`,
so that a truncated stream can't look complete.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gateway.errors import error_body, log_unexpected
from gateway.parsing.task import TaskRequest
from gateway.request import Request
from gateway.responses import ResponseStream, response_headers
from gateway.state import Gateway
from gateway.types import EVENT_RENDERERS, render_last
from gateway.types.base import Link, StreamObjects
from pomelo.call import Call, report_adjustments
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted
from pomelo.runtime.in_flight import LARGE_RESPONSE
from pomelo.service import Visit

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"

_MAX_BATCH = 16 * 1024
"""Bytes of events that are joined into one write."""

_LINE_BREAKS = re.compile(b"\xe2\x80[\xa8\xa9]|\xc2\x85")
_ESCAPES = {b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029", b"\xc2\x85": b"\\u0085"}
"""U+2028, U+2029 and U+0085 in UTF-8. JSON strings may contain them unescaped, but many clients end a line
at them, as str.splitlines does. Other line breaks are always escaped in JSON."""


def encode_event(data: bytes) -> bytes:
    """Returns the event with the JSON text `data`, which every client reads as one line."""
    if not data.isascii():
        data = _LINE_BREAKS.sub(lambda match: _ESCAPES[match[0]], data)
    return b"data: %b\n\n" % data


class SseResponse:
    """A response of server-sent events.

    Its headers are sent with the first event, or after `keep_alive` seconds without one; after each further
    silence of that length, a comment is sent. An event is sent immediately; events that follow it in the
    same iteration of the event loop are joined into one write. `encode` replaces `encode_event`.
    """

    __slots__ = (
        "_batch", "_call", "_encode", "_flushing", "_keep_alive", "_last_sent", "_loop", "_request", "_size",
        "_stream", "_timer",
    )  # fmt: skip

    def __init__(
        self, request: Request, call: Call, keep_alive: float, encode: Callable[[bytes], bytes] | None
    ) -> None:
        self._encode = encode
        self._stream: ResponseStream | None = None
        self._request = request
        self._call = call
        self._keep_alive = keep_alive
        self._loop = asyncio.get_running_loop()
        self._last_sent = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._batch: list[bytes] = []
        self._size = 0
        self._flushing: asyncio.Handle | None = None

    def start(self) -> None:
        """Starts the keep-alive timer; `call.response_headers` must be complete."""
        self._last_sent = self._loop.time()
        self._timer = self._loop.call_at(self._last_sent + self._keep_alive, self._on_timer)

    def stop(self) -> None:
        """Stops comments and flushing; buffered events are sent by `finish`. Idempotent."""
        for scheduled in (self._timer, self._flushing):
            if scheduled is not None:
                scheduled.cancel()
        self._timer = self._flushing = None

    def _open(self) -> ResponseStream:
        if self._stream is None:
            headers = response_headers(self._call, Content_Type="text/event-stream", X_Accel_Buffering="no")
            self._stream = ResponseStream(self._request, headers)
        return self._stream

    def send(self, data: bytes) -> bool:
        """Sends an event with the JSON text `data`. Returns whether the caller must `drain` before it sends
        the next one.

        Raises:
            ConnectionError: the client has left.
        """
        if self._encode is not None:
            data = self._encode(data)
        else:  # not by `encode_event` if possible: there may be an event for each word
            data = b"data: %b\n\n" % data if data.isascii() else encode_event(data)
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)
            self._last_sent = self._loop.time()
            return (self._stream or self._open()).push(data)
        self._batch.append(data)
        self._size += len(data)
        return self._size >= _MAX_BATCH and self._open().push(self._take_batch())

    async def drain(self) -> None:
        """Waits until the client has read what was sent. Raises as `send`."""
        await self._open().drain()

    def _take_batch(self) -> bytes:
        data = b"".join(self._batch)
        self._batch.clear()
        self._size = 0
        return data

    def _flush(self) -> None:
        """Sends the events that were buffered after the first one of the last iteration."""
        self._flushing = None
        if self._batch:
            # A callback can't wait for the client; whoever sends the next event does.
            try:  # noqa: SIM105 (its three calls would be made for each batch)
                self._open().push(self._take_batch())
            except ConnectionError:  # the client has left, and its handler is being cancelled
                pass

    async def finish(self, data: bytes) -> None:
        """Sends the last events and ends the response.

        The connection stays open, as the headers announced; the client may have reused it already.
        """
        await self._open().finish(self._take_batch() + data)

    def _on_timer(self) -> None:
        now = self._loop.time()
        due = self._last_sent + self._keep_alive
        if now >= due:
            transport = self._request.connection.transport
            # A client that has not read what was sent needs no comment.
            if transport is not None and not transport.get_write_buffer_size():
                with suppress(ConnectionError):  # the client has left, and its handler is being cancelled
                    self._open().push(_KEEP_ALIVE)
            due = now + self._keep_alive
        self._timer = self._loop.call_at(due, self._on_timer)


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """How an API sends the events of a task.

    `open` returns the state of a stream, which the other functions get. `renderers`, by type of event, return
    the JSON texts of the events to send. `render_last` returns the events that end a complete stream,
    `render_error` those that end a failed stream, both encoded. `encode` replaces `encode_event`.
    """

    open: Callable[[TaskStarted], Any]
    renderers: Mapping[str, Callable[[Any, Any], Iterable[bytes]]]
    render_last: Callable[[Any, TaskResult], bytes]
    render_error: Callable[[Any, PomeloError, Request], bytes]
    encode: Callable[[bytes], bytes] | None = None


def task_stream(link: Link) -> StreamFormat:
    """Returns the format of `POST /api/v1/task`."""
    return StreamFormat(
        StreamObjects,
        EVENT_RENDERERS,
        lambda objects, result: encode_event(render_last(objects, result, link)) + DONE,
        lambda objects, error, request: b"event: error\n" + encode_event(error_body(error, request)),
    )


async def stream_task(
    gateway: Gateway,
    request: Request,
    call: Call,
    visit: Visit,
    task: TaskRequest,
    stream_format: StreamFormat,
) -> None:
    """Runs a task and sends its events as they arrive. The last event is sent once the task is settled, so
    that nothing can fail after it. If it is large, it counts as unread.

    Raises:
        Exception: what fails before anything was sent.
        ConnectionError: the client has left.
    """
    sse = SseResponse(request, call, gateway.options.keep_alive, stream_format.encode)
    renderers = stream_format.renderers
    objects = stream_format.open(TaskStarted())
    last = b""
    try:
        async with gateway.services.tasks.stream_task(task.spec, task.options, call) as events:
            sse.start()
            async for event in events:
                event_type: str = event.WhichOneof("event") or ""
                renderer = renderers.get(event_type)
                if renderer is not None:
                    for data in renderer(objects, getattr(event, event_type)):
                        if sse.send(data):
                            await sse.drain()
                elif event_type == "completed":
                    result = event.completed
                    last = await task.task_format.render(result, stream_format.render_last, objects, result)
                elif event_type == "started":
                    report_adjustments(call, event.started.adjustments)
                    objects = stream_format.open(event.started)
        if not last:
            raise ValueError("the stream ended without its last event")
    except PomeloError as error:
        if not request.answered:
            raise
        last = stream_format.render_error(objects, error, request)
    except Exception as error:
        if not request.answered or (isinstance(error, ConnectionError) and request.is_closing):
            raise
        last = stream_format.render_error(objects, log_unexpected(call), request)
    finally:
        sse.stop()
    release = visit.hold(len(last)) if len(last) > LARGE_RESPONSE else None
    try:
        await sse.finish(last)
    finally:
        if release is not None:
            release()
