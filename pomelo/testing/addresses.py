"""Addresses at which no vendor is: for `pomelo.testing.faults`, whose faults they are.

Each gives a URL for the vendor's URL, which is what it says while the context is open.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_NAMELESS = "nobody.invalid"


@contextmanager
def nobody(url: str) -> Iterator[str]:
    """The URL with a port at which nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        yield _at(url, f"127.0.0.1:{taken.getsockname()[1]}")


@contextmanager
def nowhere(url: str) -> Iterator[str]:
    """The URL with a name that nobody has."""
    yield _at(url, f"{_NAMELESS}:80")


@contextmanager
def unanswered(url: str) -> Iterator[str]:
    """The URL with a port at which connections are neither taken nor refused."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:  # a full backlog drops what comes after it
                filler.setblocking(False)
                filler.connect_ex(full.getsockname())
            yield _at(url, "{}:{}".format(*full.getsockname()))
        finally:
            for filler in fillers:
                filler.close()


@contextmanager
def without_tls(url: str) -> Iterator[str]:
    """The URL with https, where there is plain HTTP."""
    yield url.replace("http:", "https:", 1)


def _at(url: str, place: str) -> str:
    scheme, _, rest = url.partition("://")
    _, slash, path = rest.partition("/")
    return f"{scheme}://{place}{slash}{path}"


class Unresolving(AbstractResolver):
    """Looks names up, but for the one of `nowhere`: of that it is known without a network."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        """The addresses of a name.

        Raises:
            OSError: it has none.
        """
        if host == _NAMELESS:
            raise OSError(None, "DNS lookup failed")
        return await self._inner.resolve(host, port, family)

    async def close(self) -> None:
        """Nothing to free."""
        await self._inner.close()
