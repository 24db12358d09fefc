"""A proxy between the store and its server that loses answers: what was asked is done, and nobody hears of it."""

import asyncio
import socket
import struct
from contextlib import suppress
from types import TracebackType

_CHUNK = 1 << 16


class TcpProxy:
    """Passes bytes on, to a port of loopback. `every`: each so many answers, in place of one the connection is
    reset; 0: none. `cuts` counts those."""

    def __init__(self, port: int) -> None:
        self.every = 0
        self.cuts = 0
        self._to = port
        self._answers = 0
        self._open: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "TcpProxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._to)
            asking = asyncio.create_task(self._ask(reader, back))
            try:
                await self._answer(there, writer)
            finally:
                asking.cancel()
                back.close()
                writer.close()

    async def _ask(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(_CHUNK):
                back.write(chunk)
                await back.drain()
        back.close()

    async def _answer(self, there: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await there.read(_CHUNK):
            self._answers += 1
            if self.every and self._answers % self.every == 0:
                self.cuts += 1
                _reset(writer)
                return
            writer.write(chunk)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    # Closed with nothing lingering, a socket says RST.
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
