"""Both clients behind one interface: `AsyncClient` itself, and `Client` whose calls run in threads."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from pomelo.client import AsyncClient, Client

KINDS = ("asyncio", "blocking")

_END = object()


class Pipe(io.BytesIO):
    """Bytes that can be read once."""

    def seekable(self) -> bool:
        return False


class Threaded:
    """A `Client` whose calls can be awaited."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        if name in ("models", "usage", "usage_sums"):
            return lambda *arguments, **options: _iterate(method(*arguments, **options))
        if name.startswith("stream"):
            return lambda *arguments, **options: ThreadedStream(method(*arguments, **options))
        return lambda *arguments, **options: asyncio.to_thread(partial(method, *arguments, **options))


class ThreadedStream:
    """A `Stream` that can be read with `async with` and `async for`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aenter__(self) -> ThreadedStream:
        await asyncio.to_thread(self._stream.__enter__)
        return self

    async def __aexit__(self, *error: Any) -> None:
        await asyncio.to_thread(self._stream.__exit__, *error)

    def __aiter__(self) -> AsyncIterator[Any]:
        return _iterate(self._stream)

    def events(self) -> AsyncIterator[Any]:
        return _iterate(self._stream.events())

    @property
    def result(self) -> Any:
        return self._stream.result


def make_client(kind: str, target: str, key: str, **options: Any) -> Any:
    """Returns a client of one of `KINDS`."""
    if kind == "asyncio":
        return AsyncClient(target, key=key, **options)
    return Threaded(Client(target, key=key, **options))


async def read(stream: Any, pieces: list[Any]) -> Any:
    """Reads a stream to its end into `pieces`; returns its result."""
    async with stream:
        async for piece in stream:
            pieces.append(piece)
    return stream.result


def begin(client: Any, prompt: str, *, stream: bool) -> asyncio.Future[Any]:
    """Starts a text task, whole or as a stream; the future has its result."""
    return asyncio.ensure_future(
        read(client.stream("gpt-4", prompt), []) if stream else client.text("gpt-4", prompt)
    )


async def _iterate(iterator: Any) -> AsyncIterator[Any]:
    while (item := await asyncio.to_thread(next, iterator, _END)) is not _END:
        yield item
