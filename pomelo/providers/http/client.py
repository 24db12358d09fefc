"""The way to the vendors: one shared session for whole answers, streams of events, sounds and files.

Providers call `Http.whole` (JSON), `Http.events` (server-sent events), `Http.pieces` (raw bytes as they come)
and `Http.fetch` (a whole file); what can go wrong comes out as a `PomeloError` by the map in
`pomelo.providers.http.errors`. It knows no vendor. It follows no redirect, keeps no cookie, heeds no proxy
variable and asks for no compression. A request is sent a second time only where a kept connection turns out
to be dead, and never if it is paid for each time: see `pomelo.providers.http.sessions`. Connections are
limited by `pomelo.providers.http.connections`, before anything is sent, and not by aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from pomelo.providers.base import CALLER
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.errors import (
    ErrorMapping,
    from_connect_error,
    malformed_response,
    refused,
    truncated,
)
from pomelo.providers.http.parsing import parse
from pomelo.providers.http.sessions import (
    Body,
    Sessions,
)
from pomelo.providers.http.sse import SseEvent, SseParser
from pomelo.turns import Turns

BODY_MOST = 8 * 1024 * 1024
"""Bytes of a whole answer."""

PIECE = 64 * 1024
"""Bytes of a sound that are read at once, and about what is read ahead of an answer: what a slow caller makes
us hold is small."""

_COMPLAINT_MOST = 64 * 1024  # bytes of an error body that are read, and
_COMPLAINT_WAIT = 5.0  # seconds that are spent on it
_GOODBYE_WAIT = 0.05  # seconds between a stream's last event and its end, for the connection to be kept

_FAULTS = (aiohttp.ClientError, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds: for a connection, for silence on a stream (before the first byte and between any
    two), and for silence on a whole answer, which begins only when the model has finished."""

    connect: float = 5.0
    silence: float = 60.0
    whole: float = 600.0


class Http:
    """The shared client session; an async context manager, to be entered in the running loop.

    `origins`, such as "http://10.0.0.5:9000", may deliver files whatever their addresses: see `links`.
    `connections` may be shared with other sessions.
    `turns` are the event loop's, for providers that read a stream to its end themselves.
    """

    def __init__(
        self,
        timeouts: Timeouts | None = None,
        *,
        connections: ConnectionLimiter | None = None,
        now: Callable[[], float] = time.time,
        resolver: AbstractResolver | None = None,
        origins: Collection[str] = (),
        turns: Turns | None = None,
    ) -> None:
        timeouts = timeouts or Timeouts()
        self.origins = origins
        self._turns = turns
        self._timeouts = timeouts
        self._resolver = resolver
        self._now = now
        self._connections = connections or ConnectionLimiter()
        self._stream_limits = _limits(timeouts.connect, timeouts.silence)
        self._whole_limits = _limits(timeouts.connect, timeouts.whole)
        self._sessions: Sessions | None = None

    async def __aenter__(self) -> Self:
        self._sessions = Sessions(self._connections.limit, self._resolver, read_bufsize=PIECE)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sessions is not None:
            await self._sessions.close()
            self._sessions = None
            if self._resolver is not None:
                await self._resolver.close()  # the sessions close their own alone

    def apart(self, resolver: AbstractResolver) -> Http:
        """Another one with the same limits, whose names are looked up by `resolver`; to be entered. What it
        fetches is not thought about, so silence ends a whole answer as it does a stream."""
        timeouts = replace(self._timeouts, whole=min(self._timeouts.whole, self._timeouts.silence))
        return Http(timeouts, connections=self._connections, now=self._now, resolver=resolver)

    @property
    def turns(self) -> Turns:
        """The turns of the event loop."""
        if self._turns is None:
            self._turns = Turns()
        return self._turns

    async def whole(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        dialect: ErrorMapping,
        *,
        most: int = BODY_MOST,
        surrogates: bool = False,
    ) -> Any:
        """Posts `body` (None: gets) and gives the parsed JSON of the answer, which has at most `most` bytes.
        `surrogates`: see `pomelo.providers.http.parsing`. Cancelling closes the connection at once.

        Raises:
            PomeloError: by the map; overloaded, no connection became free.
        """
        answer, _ = await self.fetch(url, headers, body, dialect, most=most)
        try:
            return parse(answer, surrogates=surrogates)
        except ValueError:
            pass
        raise malformed_response("no JSON")

    async def fetch(
        self, url: URL, headers: Mapping[str, str], body: Body, dialect: ErrorMapping, *, most: int
    ) -> tuple[bytes, str]:
        """Posts `body` (None: gets) and gives the answer's bytes, at most `most`, and its media type as it
        was told (empty: it was not). Cancelling closes the connection at once.

        Raises:
            PomeloError: by the map.
        """
        async with self._ask(url, headers, body, dialect, self._whole_limits) as response:
            answer, complete = await _read(_Body(response, self._whole_limits), most)
            content_type = response.headers.get("Content-Type", "")
        if not complete:
            raise malformed_response("an answer above the limit")
        return answer, content_type

    @asynccontextmanager
    async def pieces(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        dialect: ErrorMapping,
        *,
        patient: bool = False,
    ) -> AsyncGenerator[ByteStream, None]:
        """Posts `body` (None: gets) and opens the answer as bytes that are passed on as they come. Leaving
        closes the connection at once, unless the answer was read to its end. With `patient` it may be silent
        for as long as a whole answer, because the vendor sends nothing before it has finished.

        Raises:
            PomeloError: by the map.
        """
        limits = self._whole_limits if patient else self._stream_limits
        async with self._ask(url, headers, body, dialect, limits) as response:
            yield ByteStream(_Body(response, limits), response.headers)

    @asynccontextmanager
    async def events(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        dialect: ErrorMapping,
        *,
        patient: bool = False,
    ) -> AsyncGenerator[EventStream, None]:
        """Posts `body` and opens the answer as a stream of events. Leaving closes the connection at once,
        unless the answer was read to its end. `patient` as for `pieces`.

        Raises:
            PomeloError: by the map.
        """
        limits = self._whole_limits if patient else self._stream_limits
        async with self._ask(url, headers, body, dialect, limits) as response:
            # Whatever its type is called: proxies rename it, and a page has no events and no end marker.
            yield EventStream(_Body(response, self._stream_limits))

    @asynccontextmanager
    async def _ask(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        dialect: ErrorMapping,
        limits: aiohttp.ClientTimeout,
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        sessions = self._sessions
        if sessions is None:
            raise RuntimeError("Http is used outside of its context")
        host, account = f"{url.raw_host}:{url.port}", CALLER.get()
        await self._connections.acquire(host, account)
        try:
            try:
                response = await sessions.request(url, headers, body, limits, replays=dialect.replays)
            except _FAULTS as error:
                failure = from_connect_error(error, dialect)
            else:
                try:
                    if response.status >= 300:
                        raise await self._refusal(response, dialect, limits)
                    yield response
                finally:
                    # Not release(), which waits for the rest; no effect on a fully read answer.
                    response.close()
                return
        finally:
            self._connections.release(host, account)
        # Outside of the except block: what aiohttp raises holds the request's headers.
        raise failure

    async def _refusal(
        self, response: aiohttp.ClientResponse, dialect: ErrorMapping, limits: aiohttp.ClientTimeout
    ) -> Exception:
        body = b""
        if response.status >= 400:
            with contextlib.suppress(TimeoutError, *_FAULTS):
                async with asyncio.timeout(_COMPLAINT_WAIT):
                    body, _ = await _pieces(_Body(response, limits), _COMPLAINT_MOST)
        return refused(response.status, response.headers, body, dialect, self._now())


class _Body:
    """An answer's body as it comes.

    aiohttp stops its own clock of silence while it holds data back, and loses a fault that it finds in them
    afterwards: nothing would ever come, and nobody would say so. So each wait here has a limit of its own.
    """

    __slots__ = ("_content", "_response", "_silence")

    def __init__(self, response: aiohttp.ClientResponse, limits: aiohttp.ClientTimeout) -> None:
        self._response = response
        self._content = response.content
        self._silence = limits.sock_read

    @property
    def told(self) -> int | None:
        """How many bytes it has, where that was told ahead."""
        return self._response.content_length

    @property
    def ended(self) -> bool:
        """Whether all of it was read."""
        return self._content.at_eof()

    async def read(self, most: int = -1) -> bytes:
        """The next bytes, all that are there or at most so many; empty only at the end.

        Raises:
            aiohttp.ClientError, OSError, ValueError: it is cut. TimeoutError, an OSError too: it is silent.
        """
        content = self._content
        if content.exception() is not None:
            # aiohttp raises it ahead of the bytes that came before it.
            packet = content._read_nowait(most)
            if packet:
                return packet
        packet = content.read_nowait(most)
        if packet or content.at_eof():
            return packet
        try:
            async with asyncio.timeout(_GOODBYE_WAIT if self._gone() else self._silence):
                return await (content.readany() if most < 0 else content.read(most))
        except TimeoutError:
            if not self._gone():
                raise
        except RuntimeError:
            pass  # aiohttp's word for it, where its reader came later than the connection's end
        raise aiohttp.ClientPayloadError("the connection is gone")

    def _gone(self) -> bool:
        connection = self._response.connection
        return connection is not None and connection.closed


class EventStream:
    """An answer that comes as events."""

    __slots__ = ("_body", "_parser")

    def __init__(self, body: _Body) -> None:
        self._body = body
        self._parser = SseParser()

    async def read(self) -> list[SseEvent]:
        """The next events, all that are there; empty only at the end of the answer.

        Raises:
            PomeloError: by the map; what came before stands.
        """
        while True:
            try:
                packet = await self._body.read()
            except _FAULTS as error:
                failure = truncated(error)
            else:
                if not packet:
                    return self._parser.end()
                events = self._parser.feed(packet)
                if events:
                    return events
                continue
            raise failure

    def rest(self) -> list[SseEvent]:
        """The event whose end did not come, when `read` has failed; often none, or only a part of one."""
        return self._parser.end()

    async def goodbye(self) -> None:
        """Waits a moment for the answer's end, so that the connection can serve another call.

        To be called after the vendor's own end marker. Never raises; without the end the connection is
        closed on leaving.
        """
        if self._body.ended:
            return
        with contextlib.suppress(TimeoutError, *_FAULTS):
            async with asyncio.timeout(_GOODBYE_WAIT):
                await self._body.read()


class ByteStream:
    """An answer that comes as bytes: a sound."""

    __slots__ = ("_body", "headers")

    def __init__(self, body: _Body, headers: Mapping[str, str]) -> None:
        self._body = body
        self.headers = headers

    async def read(self) -> bytes:
        """The next bytes, at once when some are there, at most PIECE; empty only at the end of the answer.

        Raises:
            PomeloError: by the map; what came before stands.
        """
        try:
            return await self._body.read(PIECE)
        except _FAULTS as error:
            failure = truncated(error)
        raise failure


def _limits(connect: float, silence: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=silence)


async def _read(body: _Body, most: int) -> tuple[bytes, bool]:
    try:
        return await _pieces(body, most)
    except _FAULTS as error:
        failure = truncated(error)
    raise failure


async def _pieces(body: _Body, most: int) -> tuple[bytes, bool]:
    """The body, at most about `most` bytes of it, and whether that is all."""
    size = body.told
    if size is not None and size > most:
        return b"", False
    pieces: list[bytes] = []
    size = 0
    while piece := await body.read():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            return b"".join(pieces), False
    return b"".join(pieces), True
