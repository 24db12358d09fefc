"""Callers over HTTP/1.1: an asyncio protocol that costs the load's core little."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

from bench.vendor import STAMP

_STAMP = re.compile(rb'"content": ?"(\d{%d})"' % STAMP)


@dataclass(slots=True)
class Load:
    """What callers have measured, in seconds. `lateness` is by token, from its sending by the vendor."""

    latencies: list[float] = field(default_factory=list)
    lateness: list[float] = field(default_factory=list)
    failed: int = 0
    failure: str = ""

    def fail(self, failure: str) -> None:
        """Counts a request that failed."""
        self.failed += 1
        self.failure = self.failure or failure


class _Caller(asyncio.Protocol):
    """One connection, which asks again as soon as it has an answer, until the run is over."""

    transport: asyncio.Transport

    def __init__(self, request: bytes, ending: bytes, stamped: bool) -> None:
        self._request = request
        self._ending = ending
        self._stamped = stamped
        self._began = 0.0
        self._last = b""
        self._until = 0.0
        self._load = Load()
        self._idle: asyncio.Future[None] | None = None
        self._parser = httptools.HttpResponseParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if self._idle is not None and not self._idle.done():
            self._load.fail(f"the connection was closed: {error}")
            self._idle.set_result(None)

    def run(self, load: Load, until: float) -> asyncio.Future[None]:
        """Asks until a time of the monotonic clock, at least once."""
        self._load, self._until = load, until
        self._idle = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            self.connection_lost(None)
        else:
            self._ask()
        return self._idle

    def _ask(self) -> None:
        self._last = b""
        self._began = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._last = body if len(body) > 99 else self._last[-99:] + body
        if self._stamped and (found := _STAMP.findall(body)):
            now = time.monotonic_ns()
            self._load.lateness += [(now - int(stamp)) / 1e9 for stamp in found]

    def on_message_complete(self) -> None:
        now = time.monotonic()
        status = self._parser.get_status_code()
        if status == 200 and self._last.endswith(self._ending):
            self._load.latencies.append(now - self._began)
        else:
            self._load.fail(f"{status} {self._last[-200:]!r}")
        if now < self._until:
            self._ask()
        elif self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


class Callers(Protocol):
    """Callers of one system. Each sends its next request as soon as it has an answer."""

    async def run(self, seconds: float) -> Load:
        """Asks for so long, and waits for the last answers."""


class HttpCallers(Callers):
    """Open connections that send one request over and over."""

    def __init__(self, callers: list[_Caller]) -> None:
        self._callers = callers

    async def run(self, seconds: float) -> Load:
        """Asks for so long, and waits for the last answers."""
        load, until = Load(), time.monotonic() + seconds
        await asyncio.gather(*[caller.run(load, until) for caller in self._callers])
        return load

    async def open_streams(self, load: Load, spread: float) -> list[asyncio.Future[None]]:
        """Sends one request on each connection, spread over some seconds; returns their ends."""
        ends = []
        for number, caller in enumerate(self._callers):
            ends.append(caller.run(load, 0.0))
            if number % 10 == 9:
                await asyncio.sleep(10 * spread / len(self._callers))
        return ends


@asynccontextmanager
async def open_http(
    url: str, request: bytes, connections: int, *, ending: bytes = b"", stamped: bool = False
) -> AsyncIterator[HttpCallers]:
    """Connects. A good answer ends with `ending`; those of `stamped` streams have the times of the vendor."""
    loop = asyncio.get_running_loop()
    host, _, port = urlsplit(url).netloc.partition(":")
    callers = []
    try:
        for _ in range(connections):
            _, caller = await loop.create_connection(
                lambda: _Caller(request, ending, stamped), host, int(port)
            )
            callers.append(caller)
        yield HttpCallers(callers)
    finally:
        for caller in callers:
            caller.transport.abort()
