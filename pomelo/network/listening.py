"""Sockets that listen on an address of the settings."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import Any

BACKLOG = 4096
"""Connections that the kernel queues while the event loop is busy."""


async def bind(host: str, port: int, *, reuse_port: bool) -> list[socket.socket]:
    """Returns sockets that listen on each address of `host` that this machine has, all on one port (0: a free
    one). With `reuse_port`, other processes may listen on it too.

    Raises:
        OSError: an address can't be used, or the machine has none of them.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return _listen(host, port, found, reuse_port)


def bind_blocking(host: str, port: int) -> list[socket.socket]:
    """As `bind`; blocks while the host is looked up."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return _listen(host, port, found, reuse_port=False)


def reserve(host: str, port: int) -> list[socket.socket]:
    """As `bind_blocking`, but the sockets only keep other users' programs from the addresses, on which other
    processes listen."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return _listen(host, port, found, reuse_port=True, reserve_only=True)


def _listen(
    host: str, port: int, found: Sequence[Any], reuse_port: bool, *, reserve_only: bool = False
) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for family, socket_type, protocol, _, address in dict.fromkeys(found):
            try:
                listening = socket.socket(family, socket_type, protocol)
            except OSError:
                continue  # a family that this system does not have
            sockets.append(listening)
            listening.setblocking(False)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # `[::]` alone is every address, of IPv4 too, as for gRPC. A name may have both.
                only = address[0] != "::" or len(found) > 1
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            try:
                listening.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                sockets.pop().close()  # such as ::1 of `localhost`, while IPv6 is disabled
                continue
            port = listening.getsockname()[1]
            if not reserve_only:
                listening.listen(BACKLOG)
    except OSError:
        for listening in sockets:
            listening.close()
        raise
    if not sockets:
        raise OSError(errno.EADDRNOTAVAIL, f"{host} is not an address of this machine")
    return sockets
