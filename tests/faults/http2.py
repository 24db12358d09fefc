"""An HTTP/2 client that can do what a gRPC client can't: send part of a message, or no message, and wait.

It implements literal headers, flow control, and a log of received frames.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.faults import frames
from tests.faults.frames import frame

_WINDOW = 65_535
_FRAME_SIZE = 16_384


def prefixed(message: bytes, *, compressed: bool = False, size: int | None = None) -> bytes:
    """A message with gRPC's length prefix; `size` overrides the length in the prefix."""
    return struct.pack(">BI", compressed, len(message) if size is None else size) + message


@dataclass
class Stream:
    """One call: its window, its received frames, and when it ended."""

    number: int
    window: int
    frames: list[tuple[int, int]] = field(default_factory=list)
    """Type and flags of each frame, in the order of receipt."""
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def lasted(self) -> float:
        """Seconds from the start to the end of the call."""
        assert self.ended is not None
        return self.ended - self.began


class Connection:
    """One connection and its calls."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._window = self._initial = _WINDOW
        self._changed = asyncio.Condition()
        self._next = 1
        self.streams: dict[int, Stream] = {}
        self.settings: dict[int, int] = {}
        """The settings of the server, by their number."""
        self.pongs = 0
        """Answers to pings."""
        self.closed = False

    def begin(self, path: str, metadata: Iterable[tuple[str, str]] = (), *, end: bool = False) -> Stream:
        """Starts a call: sends its headers. With `end`, the call has no message."""
        stream = Stream(self._next, self._initial)
        self._next += 2
        self.streams[stream.number] = stream
        flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
        self._writer.write(
            frame(frames.HEADERS, flags, stream.number, frames.block(frames.request(path, *metadata)))
        )
        return stream

    async def send(self, stream: Stream, data: bytes, *, end: bool = False) -> int:
        """Sends data of a call as the windows allow, until the call ends; returns the number of bytes
        sent."""
        at = 0
        while at < len(data):
            async with self._changed:
                await self._changed.wait_for(
                    lambda: self.closed or stream.ended is not None or min(self._window, stream.window) > 0
                )
            if self.closed or stream.ended is not None:
                return at
            size = min(_FRAME_SIZE, self._window, stream.window, len(data) - at)
            self._window -= size
            stream.window -= size
            flags = frames.END_STREAM if end and at + size == len(data) else 0
            self._writer.write(frame(frames.DATA, flags, stream.number, data[at : at + size]))
            at += size
            await self._writer.drain()
        return at

    def reset(self, stream: Stream) -> None:
        self._writer.write(frame(frames.RST_STREAM, 0, stream.number, struct.pack(">I", 8)))

    def read_on(self, stream: Stream) -> None:
        """Lets the server send the rest of a response, whatever its size."""
        for number in (0, stream.number):
            self._writer.write(frame(frames.WINDOW_UPDATE, 0, number, struct.pack(">I", 2**30)))

    def ping(self, count: int = 1) -> None:
        self._writer.write(frame(frames.PING, 0, 0, bytes(8)) * count)

    async def over(self, stream: Stream) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.closed or stream.ended is not None)

    async def has_settings(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.settings)

    async def read(self) -> None:
        """Reads frames until the connection is closed."""
        try:
            while True:
                head = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                number = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
                async with self._changed:
                    self._receive(head[3], head[4], number, payload)
                    self._changed.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            async with self._changed:
                self._end(list(self.streams.values()))
                self.closed = True
                self._changed.notify_all()

    def _receive(self, frame_type: int, flags: int, number: int, payload: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and frame_type != frames.WINDOW_UPDATE:
            stream.frames.append((frame_type, flags))
            if frame_type == frames.RST_STREAM or flags & frames.END_STREAM:
                self._end([stream])
        if frame_type == frames.WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream is not None:
                stream.window += more
            elif number == 0:
                self._window += more
        elif frame_type == frames.SETTINGS and not flags & frames.ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                self.settings[name] = value
                if name == 4:
                    for open_stream in self.streams.values():
                        open_stream.window += value - self._initial
                    self._initial = value
            self._writer.write(frame(frames.SETTINGS, frames.ACK, 0))
        elif frame_type == frames.PING and flags & frames.ACK:
            self.pongs += 1
        elif frame_type == frames.PING:
            self._writer.write(frame(frames.PING, frames.ACK, 0, payload))

    @staticmethod
    def _end(streams: list[Stream]) -> None:
        for stream in streams:
            stream.ended = stream.ended or time.monotonic()


@asynccontextmanager
async def connect(
    host: str, port: int, *, wide: bool = True, window: int = _WINDOW
) -> AsyncIterator[Connection]:
    """Opens a connection with the largest receive windows; if not `wide`, with one of 64 KiB, and of `window`
    for each call, that are never enlarged."""
    reader, writer = await asyncio.open_connection(host, port)
    settings = frame(frames.SETTINGS, 0, 0, struct.pack(">HI", 4, window))
    writer.write(frames.wide_hello() if wide else frames.PREFACE + settings)
    connection = Connection(reader, writer)
    reading = asyncio.ensure_future(connection.read())
    try:
        yield connection
    finally:
        reading.cancel()
        writer.close()
