"""Addresses without a vendor: each context manager replaces the host of a URL, and is valid while it is
open."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_UNKNOWN_HOST = "nobody.invalid"


@contextmanager
def refused_connection(url: str) -> Iterator[str]:
    """The URL with a port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        yield _at(url, f"127.0.0.1:{taken.getsockname()[1]}")


@contextmanager
def unknown_host(url: str) -> Iterator[str]:
    """The URL with a host name that does not exist."""
    yield _at(url, f"{_UNKNOWN_HOST}:80")


@contextmanager
def unanswered_connection(url: str) -> Iterator[str]:
    """The URL with a port at which connections are neither accepted nor refused."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:  # a full backlog drops further connections
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            yield _at(url, "{}:{}".format(*full.getsockname()))
        finally:
            for filler in fillers:
                filler.close()


@contextmanager
def without_tls(url: str) -> Iterator[str]:
    """The URL with https, at a port that speaks plain HTTP."""
    yield url.replace("http:", "https:", 1)


def _at(url: str, address: str) -> str:
    scheme, _, rest = url.partition("://")
    _, slash, path = rest.partition("/")
    return f"{scheme}://{address}{slash}{path}"


class UnknownHostResolver(AbstractResolver):
    """Resolves names, except the one of `unknown_host`, which fails without a network."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        if host == _UNKNOWN_HOST:
            raise OSError(None, "DNS lookup failed")
        return await self._inner.resolve(host, port, family)

    async def close(self) -> None:
        await self._inner.close()
