"""Sockets that listen on an address of the settings."""

from __future__ import annotations

import asyncio
import errno
import socket
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pomelo.network.addresses import check_socket_path

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
    return _listen(_bind(host, port, found, reuse_port))


def bind_blocking(host: str, port: int) -> list[socket.socket]:
    """As `bind`; blocks while the host is looked up."""
    return _listen(_bind(host, port, _look_up(host, port), reuse_port=False))


def reserve(host: str, port: int) -> list[socket.socket]:
    """As `bind_blocking`, but the sockets only keep other users' programs from the addresses, on which other
    processes listen."""
    return _bind(host, port, _look_up(host, port), reuse_port=True)


def make_free(path: Path) -> None:
    """Makes `path` usable for a Unix socket: removes a socket there that no process listens on. asyncio and
    grpc would also remove one that a process listens on.

    Raises:
        OSError: the path is too long, a process listens there, or another file has this path.
    """
    path = path.absolute()
    check_socket_path(path)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, f"{path} exists and is no socket. Remove it")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(errno.EADDRINUSE, f"Another process listens on {path}. Is Pomelo running already?")


def _look_up(host: str, port: int) -> Sequence[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


def _bind(host: str, port: int, found: Sequence[Any], reuse_port: bool) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    with _closed_after_error(sockets):
        for family, socket_type, protocol, _, address in dict.fromkeys(found):
            try:
                bound = socket.socket(family, socket_type, protocol)
            except OSError:
                continue  # a family that this system does not have
            sockets.append(bound)
            bound.setblocking(False)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # `[::]` alone is every address, of IPv4 too, as for gRPC. A name may have both.
                only = address[0] != "::" or len(found) > 1
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            try:
                bound.bind((address[0], port, *address[2:]))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:
                    raise
                sockets.pop().close()  # such as ::1 of `localhost`, while IPv6 is disabled
                continue
            port = bound.getsockname()[1]
    if not sockets:
        raise OSError(errno.EADDRNOTAVAIL, f"{host} is not an address of this machine")
    return sockets


def _listen(sockets: list[socket.socket]) -> list[socket.socket]:
    with _closed_after_error(sockets):
        for bound in sockets:
            bound.listen(BACKLOG)
    return sockets


@contextmanager
def _closed_after_error(sockets: list[socket.socket]) -> Iterator[None]:
    try:
        yield
    except OSError:
        for each in sockets:
            each.close()
        raise
