"""A proxy between the store and its server that resets connections: at any moment, before a command is
executed, or after it was executed and before its reply is delivered."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from contextlib import suppress
from enum import Enum
from types import TracebackType

_CHUNK = 1 << 16


class Cut(Enum):
    """When a connection is reset."""

    NOW = "now"
    """Immediately, whatever is in transit."""
    BEFORE_COMMAND = "before a command"
    """When the next commands arrive, which are lost."""
    BEFORE_REPLY = "before a reply"
    """When the next replies arrive, which are lost; their commands were executed."""


class TcpProxy:
    """Forwards bytes to a port of loopback. `every`: resets the connection in place of every `every`th reply;
    0: never. `cuts` counts the connections that were reset."""

    def __init__(self, port: int) -> None:
        self.every = 0
        self.cuts = 0
        self._server_port = port
        self._replies = 0
        self._armed: dict[Cut, int] = dict.fromkeys(Cut, 0)
        self._open: set[asyncio.Task[None]] = set()
        self._clients: deque[asyncio.StreamWriter] = deque()

    def cut(self, when: Cut) -> None:
        """Resets one connection, once: the oldest, as soon as there is one, or the next one with traffic."""
        if when is Cut.NOW and self._clients:
            self._reset(self._clients[0])
        else:
            self._armed[when] += 1

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections, and refuses others. Idempotent."""
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        self._clients.append(writer)
        if self._is_due(Cut.NOW):
            self._reset(writer)
            return
        with suppress(OSError, asyncio.CancelledError):  # asyncio would log that `close` cancels it
            there, back = await asyncio.open_connection("127.0.0.1", self._server_port)
            forwarding = asyncio.create_task(self._forward_commands(reader, back, writer))
            try:
                await self._forward_replies(there, writer)
            finally:
                forwarding.cancel()
                back.close()
                self._remove(writer)
                writer.close()

    async def _forward_commands(
        self, reader: asyncio.StreamReader, back: asyncio.StreamWriter, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                if self._is_due(Cut.BEFORE_COMMAND):
                    self._reset(writer)
                    break
                back.write(chunk)
                await back.drain()
        back.close()

    async def _forward_replies(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await there.read(_CHUNK):
            self._replies += 1
            if (self.every and self._replies % self.every == 0) or self._is_due(Cut.BEFORE_REPLY):
                self._reset(writer)
                return
            writer.write(chunk)
            await writer.drain()

    def _is_due(self, when: Cut) -> bool:
        """Whether a requested reset is due; uses it up."""
        if not self._armed[when]:
            return False
        self._armed[when] -= 1
        return True

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self.cuts += 1
        self._remove(writer)
        raw = writer.get_extra_info("socket")
        # With a linger time of zero, closing a socket sends RST.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    def _remove(self, writer: asyncio.StreamWriter) -> None:
        with suppress(ValueError):
            self._clients.remove(writer)
