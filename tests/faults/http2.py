"""An HTTP/2 client that does what no gRPC client does: it sends half a message, or no message, and waits.

It implements only what that needs: literal headers, flow-control windows, and a log of received frames.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.faults.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    frame,
    request,
)

_WINDOW = 65_535
_MOST = 2**31 - 1
_FRAME = 16_384


def prefixed(message: bytes, *, compressed: bool = False, size: int | None = None) -> bytes:
    """A message with gRPC's length prefix; `size` overrides the length in the prefix."""
    return struct.pack(">BI", compressed, len(message) if size is None else size) + message


@dataclass
class Stream:
    """One call: its window, the frames that came for it, and when it was over."""

    number: int
    window: int
    frames: list[tuple[int, int]] = field(default_factory=list)
    """Kind and flags, in the order in which they came."""
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def lasted(self) -> float:
        """Seconds from its beginning to its end."""
        assert self.ended is not None
        return self.ended - self.began


class Connection:
    """One connection, on which calls are started and not always finished."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._window = self._initial = _WINDOW
        self._changed = asyncio.Condition()
        self._next = 1
        self.streams: dict[int, Stream] = {}
        self.closed = False

    def begin(self, path: str, metadata: Iterable[tuple[str, str]] = (), *, end: bool = False) -> Stream:
        """Begins a call by its headers alone; `end`: nothing more will come."""
        stream = Stream(self._next, self._initial)
        self._next += 2
        self.streams[stream.number] = stream
        flags = END_HEADERS | (END_STREAM if end else 0)
        self._writer.write(frame(HEADERS, flags, stream.number, block(request(path, *metadata))))
        return stream

    async def send(self, stream: Stream, data: bytes, *, end: bool = False) -> int:
        """Sends bytes of a call as the windows allow, until the call is over; returns how many were sent."""
        at = 0
        while at < len(data):
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self.closed or stream.ended is not None or min(self._window, stream.window) > 0
                )
            if self.closed or stream.ended is not None:
                return at
            size = min(_FRAME, self._window, stream.window, len(data) - at)
            self._window -= size
            stream.window -= size
            flags = END_STREAM if end and at + size == len(data) else 0
            self._writer.write(frame(DATA, flags, stream.number, data[at : at + size]))
            at += size
            await self._writer.drain()
        return at

    def reset(self, stream: Stream) -> None:
        """Cancels a call."""
        self._writer.write(frame(RST_STREAM, 0, stream.number, struct.pack(">I", 8)))

    def ping(self) -> None:
        """Pings."""
        self._writer.write(frame(PING, 0, 0, bytes(8)))

    async def over(self, stream: Stream) -> None:
        """Returns when a call is over."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.closed or stream.ended is not None)

    async def read(self) -> None:
        """Takes in frames until the connection is closed."""
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                number = int.from_bytes(head[5:], "big") & _MOST
                async with self._changed:
                    self._take(head[3], head[4], number, payload)
                    self._changed.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            async with self._changed:
                self._end(list(self.streams.values()))
                self.closed = True
                self._changed.notify_all()

    def _take(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and kind != WINDOW_UPDATE:
            stream.frames.append((kind, flags))
            if kind == RST_STREAM or flags & END_STREAM:
                self._end([stream])
        if kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream is not None:
                stream.window += more
            elif number == 0:
                self._window += more
        elif kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    for open_stream in self.streams.values():
                        open_stream.window += value - self._initial
                    self._initial = value
            self._writer.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))

    @staticmethod
    def _end(streams: list[Stream]) -> None:
        for stream in streams:
            stream.ended = stream.ended or time.monotonic()


@asynccontextmanager
async def connect(host: str, port: int) -> AsyncIterator[Connection]:
    """A connection that takes whatever the server sends."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, _MOST)))
    writer.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", _MOST - _WINDOW)))
    connection = Connection(reader, writer)
    reading = asyncio.ensure_future(connection.read())
    try:
        yield connection
    finally:
        reading.cancel()
        writer.close()
