"""Answers as server-sent events: `stream: true`.

Called by `gateway.task`. An error before the first event is an ordinary error answer; after it, an
`error` event, and no `[DONE]`: a stream that was cut can't look complete.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import Any

from aiohttp import web

from gateway import problems, render
from gateway.reply import headers
from pomelo.call import Call, report_adjustments
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import TaskStarted
from pomelo.service import TaskService

_DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"

_BATCH = 16 * 1024
"""Bytes of events that are joined into one write."""

_AUDIO_MAX = 45 * 1024
"""Bytes of audio in one event: its line stays below 64 KiB, and a multiple of three needs no padding."""

_LINE_BREAKS = re.compile(b"\xe2\x80[\xa8\xa9]|\xc2\x85")
_ESCAPES = {b"\xe2\x80\xa8": b"\\u2028", b"\xe2\x80\xa9": b"\\u2029", b"\xc2\x85": b"\\u0085"}
"""U+2028, U+2029 and U+0085 in UTF-8. JSON may contain them unescaped, within strings alone, but many clients
end a line at them, as str.splitlines does. The other line breaks are always escaped in JSON."""


def message(data: bytes) -> bytes:
    """The event whose data is `data`, a JSON text in UTF-8, on one line for every client."""
    if not data.isascii():
        data = _LINE_BREAKS.sub(lambda found: _ESCAPES[found[0]], data)
    return b"data: " + data + b"\n\n"


class EventStream:
    """The answer's way out: its head when there is something to say, and comments in silence.

    The head goes out with the first event, or after `keep_alive` seconds without one. An event is
    sent immediately; events that follow it in the same iteration of the event loop are joined into
    one write.
    """

    __slots__ = (
        "_batch", "_beat", "_call", "_every", "_flushing", "_last", "_loop", "_request", "_size", "_timer",
        "response",
    )  # fmt: skip

    def __init__(self, request: web.Request, call: Call, keep_alive: float) -> None:
        self.response: web.StreamResponse | None = None
        self._request = request
        self._call = call
        self._every = keep_alive
        self._loop = asyncio.get_running_loop()
        self._last = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._beat: asyncio.Task[None] | None = None
        self._batch: list[bytes] = []
        self._size = 0  # bytes in _batch
        self._flushing: asyncio.Handle | None = None

    def start(self) -> None:
        """From now on silence is filled; `call.reply` must be complete."""
        self._last = self._loop.time()
        self._timer = self._loop.call_at(self._last + self._every, self._tick)

    def stop(self) -> None:
        """Stops comments and flushing; buffered events are sent with the end. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None

    async def _open(self) -> web.StreamResponse:
        response = self.response = web.StreamResponse(
            headers=headers(self._call, Content_Type="text/event-stream", X_Accel_Buffering="no")
        )
        await response.prepare(self._request)
        return response

    async def send(self, data: bytes) -> None:
        """Sends an event, opening the answer before the first; waits while the client does not read."""
        self._last = self._loop.time()
        response = await self._open() if self.response is None else self.response
        if self._flushing is None:
            self._flushing = self._loop.call_soon(self._flush)
            await response.write(data)
            return
        self._batch.append(data)
        self._size += len(data)
        if self._size >= _BATCH:
            await response.write(self._gathered())

    def _gathered(self) -> bytes:
        data = b"".join(self._batch)
        self._batch.clear()
        self._size = 0
        return data

    def _flush(self) -> None:
        """Sends the events that were buffered after the first one of the last iteration."""
        self._flushing = None
        if self._batch:
            writer: Any = self._request.writer
            # A callback can't await the write, and needn't: the next event's write waits for it.
            writing = writer.write(self._gathered(), drain=False)
            with suppress(ConnectionError, StopIteration):  # The client has left, or all is written.
                writing.send(None)

    async def finish(self, data: bytes) -> web.StreamResponse:
        """Sends the last events and ends the answer."""
        response = await self._open() if self.response is None else self.response
        await response.write_eof(self._gathered() + data)
        return response

    async def fail(self, error: PomeloError) -> web.StreamResponse:
        """Ends the answer with an error event.

        The connection stays: its head has promised so, and the client may have taken it up again.
        """
        response = await self._open() if self.response is None else self.response
        await response.write_eof(self._gathered() + b"event: error\n" + message(problems.body(error)))
        return response

    def _tick(self) -> None:
        now = self._loop.time()
        due = self._last + self._every
        if now >= due:
            transport = self._request.transport
            # A client that has not taken what was sent needs no sign of life.
            if transport is not None and not transport.get_write_buffer_size():
                self._beat = self._loop.create_task(self._comment())
            self._last = now
            due = now + self._every
        self._timer = self._loop.call_at(due, self._tick)

    async def _comment(self) -> None:
        try:
            response = await self._open() if self.response is None else self.response
            await response.write(_KEEP_ALIVE)
        except ConnectionError:
            pass  # The client has left; its handler is being cancelled.


async def stream(
    request: web.Request,
    call: Call,
    tasks: TaskService,
    task: Task,
    *,
    link: render.Link,
    keep_alive: float,
) -> web.StreamResponse:
    """Runs `task` and sends its events as they come. The last event waits until the task is closed, so that
    what follows it can't fail.

    Raises:
        PomeloError: what went wrong before anything was sent.
    """
    out = EventStream(request, call, keep_alive)
    pieces = render.Pieces(TaskStarted())
    last = b""
    fault: PomeloError | None = None
    try:
        async with tasks.stream_task(task, call) as events:
            out.start()
            async for event in events:
                which = event.WhichOneof("event")
                if which == "text_delta":
                    delta = event.text_delta
                    if delta.finish_reason:
                        last = pieces.last_text(delta)
                    else:
                        await out.send(message(pieces.text(delta.content)))
                elif which == "audio_chunk":
                    data = event.audio_chunk.data
                    for at in range(0, len(data), _AUDIO_MAX):
                        await out.send(message(pieces.sound(data[at : at + _AUDIO_MAX])))
                elif which == "image_progress":
                    await out.send(message(pieces.progress(event.image_progress.progress)))
                elif which == "result":
                    last = render.result(event.result, link)
                elif which == "started":
                    pieces = render.Pieces(event.started)
                    report_adjustments(call, event.started.adjustments)
        if not last:
            raise ValueError("the stream ended without its last event")
    except PomeloError as error:
        fault = error
    except ConnectionError:
        raise
    except Exception:
        fault = problems.unexpected(call)
    finally:
        out.stop()
    if fault is None:
        return await out.finish(message(last) + _DONE)
    if out.response is None:
        raise fault
    return await out.fail(fault)
