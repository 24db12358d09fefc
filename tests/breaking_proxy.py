"""A TCP proxy in front of a vendor that breaks each connection when a second request arrives on it.

For the client it is a vendor that offers keep-alive, but closes connections when they are reused.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class BreakingProxy:
    """An open proxy. `url` is where it listens, without a slash at the end."""

    url: str
    connections: int = 0
    """Connections that clients have opened."""
    broken: int = 0
    """Connections that the proxy has broken because of a second request."""
    resets: bool = True
    """Whether the proxy breaks a connection with RST; otherwise with FIN."""
    forwards: bool = False
    """Whether the vendor gets the second request, although the client gets no answer."""


@asynccontextmanager
async def breaking_proxy(vendor_url: str) -> AsyncIterator[BreakingProxy]:
    """Runs a proxy in front of the vendor at `vendor_url`."""
    vendor = urlsplit(vendor_url)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        proxy.connections += 1
        vendor_reader, vendor_writer = await asyncio.open_connection(vendor.hostname, vendor.port)
        answering = asyncio.create_task(pass_answer(vendor_reader, writer, answered := asyncio.Event()))
        try:
            while data := await reader.read(64 * 1024):
                if answered.is_set():
                    proxy.broken += 1
                    if proxy.forwards:
                        answering.cancel()
                        await asyncio.wait([answering])
                        vendor_writer.write(data)
                        await vendor_reader.read(1)  # the vendor has processed it
                    break
                vendor_writer.write(data)
        except ConnectionError:
            pass
        finally:
            answering.cancel()
            await asyncio.wait([answering])
            vendor_writer.transport.abort()
            if proxy.resets:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            writer.close()

    async def pass_answer(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answered: asyncio.Event
    ) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(64 * 1024):
                answered.set()
                writer.write(data)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        proxy = BreakingProxy(f"http://{host}:{port}")
        yield proxy
