"""The HTTP client that all providers share.

`Http.request_json` returns parsed JSON, `Http.fetch` a whole file; `Http.stream_events` opens a stream of
server-sent events, `Http.stream_bytes` one of raw bytes. Failures are mapped to an `UpstreamError` by
`pomelo.providers.http.errors`. The client follows no redirect, keeps no cookie, ignores proxy variables and
asks for no compression. A request is sent a second time only if a kept connection turns out to be closed, and
never if each request may be charged (`pomelo.providers.http.sessions`). The number of connections is limited
before anything is sent, by `pomelo.providers.http.connections` and not by aiohttp.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from pomelo.providers.base import CALLER
from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.errors import ErrorMapping, from_connect_error, malformed_response, refused
from pomelo.providers.http.parsing import parse
from pomelo.providers.http.responses import CHUNK_BYTES, CLIENT_ERRORS, ByteStream, ResponseBody, SseStream
from pomelo.providers.http.sessions import Body, Sessions
from pomelo.turns import Turns

MAX_BODY_BYTES = 8 * 1024 * 1024
"""The largest response that is read whole."""

_MAX_ERROR_BODY_BYTES = 64 * 1024
_ERROR_BODY_TIMEOUT = 5.0
"""Seconds to read an error body."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Timeouts in seconds: to connect, of silence on a stream (before the first byte and between two), and of
    silence on a whole response, which begins only when the model has finished."""

    connect: float = 5.0
    silence: float = 60.0
    whole: float = 600.0


class Http:
    """The shared HTTP client: an async context manager, to be entered in the running loop.

    `origins`, such as "http://10.0.0.5:9000", are trusted to deliver files from private addresses.
    `connections` may be shared with other clients. `turns` are those of the event loop, for providers that
    read a stream to its end before they yield.
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
        self._stream_timeout = _timeout(timeouts.connect, timeouts.silence)
        self._whole_timeout = _timeout(timeouts.connect, timeouts.whole)
        self._sessions: Sessions | None = None

    async def __aenter__(self) -> Self:
        self._sessions = Sessions(self._connections.limit, self._resolver, read_bufsize=CHUNK_BYTES)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._sessions is not None:
            await self._sessions.close()
            self._sessions = None
            if self._resolver is not None:
                await self._resolver.close()  # the sessions close only resolvers of their own

    def with_resolver(self, resolver: AbstractResolver) -> Http:
        """Return a client with the same limits that looks names up by `resolver`; it must be entered. It is
        for files, which need no time to be made: silence ends a whole response as early as a stream."""
        timeouts = replace(self._timeouts, whole=min(self._timeouts.whole, self._timeouts.silence))
        return Http(timeouts, connections=self._connections, now=self._now, resolver=resolver)

    @property
    def turns(self) -> Turns:
        """The turns of the event loop."""
        if self._turns is None:
            self._turns = Turns()
        return self._turns

    async def request_json(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        *,
        max_bytes: int = MAX_BODY_BYTES,
        surrogates: bool = False,
    ) -> Any:
        """POST `body`, or GET if it is None, and return the parsed JSON of the response. With `surrogates`,
        half a surrogate pair is kept. Cancelling closes the connection immediately.

        Raises:
            UpstreamError: by the error map; overloaded if no connection became free.
        """
        response, _ = await self.fetch(url, headers, body, error_mapping, max_bytes=max_bytes)
        try:
            return parse(response, surrogates=surrogates)
        except ValueError:
            pass
        raise malformed_response("not JSON")

    async def fetch(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        *,
        max_bytes: int,
    ) -> tuple[bytes, str]:
        """POST `body`, or GET if it is None, and return the bytes of the response and its content type, empty
        if it has none. Cancelling closes the connection immediately.

        Raises:
            UpstreamError: by the error map; overloaded if no connection became free.
        """
        async with self._request(url, headers, body, error_mapping, self._whole_timeout) as response:
            data, complete = await ResponseBody(response, self._whole_timeout).read_all(max_bytes)
            content_type = response.headers.get("Content-Type", "")
        if not complete:
            raise malformed_response("a response above the limit")
        return data, content_type

    @asynccontextmanager
    async def stream_bytes(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        *,
        patient: bool = False,
    ) -> AsyncGenerator[ByteStream, None]:
        """POST `body`, or GET if it is None, and open the response as a stream of bytes. Leaving closes the
        connection immediately, unless the response was read to its end. With `patient` the stream may be
        silent as long as a whole response, because the vendor sends nothing before it has finished.

        Raises:
            UpstreamError: by the error map; overloaded if no connection became free.
        """
        timeout = self._whole_timeout if patient else self._stream_timeout
        async with self._request(url, headers, body, error_mapping, timeout) as response:
            yield ByteStream(ResponseBody(response, timeout), response.headers)

    @asynccontextmanager
    async def stream_events(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        *,
        patient: bool = False,
    ) -> AsyncGenerator[SseStream, None]:
        """POST `body` and open the response as a stream of server-sent events. Leaving closes the connection
        immediately, unless the response was read to its end. With `patient` the response may begin as late as
        a whole response.

        Raises:
            UpstreamError: by the error map; overloaded if no connection became free.
        """
        timeout = self._whole_timeout if patient else self._stream_timeout
        async with self._request(url, headers, body, error_mapping, timeout) as response:
            # The content type is not checked: proxies change it, and a page has no end marker.
            yield SseStream(ResponseBody(response, self._stream_timeout))

    @asynccontextmanager
    async def _request(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - of sockets, applied by aiohttp
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        sessions = self._sessions
        if sessions is None:
            raise RuntimeError("Http must be entered before use")
        host, account = f"{url.raw_host}:{url.port}", CALLER.get()
        await self._connections.acquire(host, account)
        try:
            try:
                response = await sessions.request(url, headers, body, timeout, replays=error_mapping.replays)
            except CLIENT_ERRORS as error:
                failure = from_connect_error(error, error_mapping)
            else:
                try:
                    if response.status >= 300:
                        raise await self._refusal(response, error_mapping, timeout)
                    yield response
                finally:
                    # Not release(), which waits for the rest; no effect on a fully read response.
                    response.close()
                return
        finally:
            self._connections.release(host, account)
        # Outside of the except block, because aiohttp's errors contain the request's headers.
        raise failure

    async def _refusal(
        self,
        response: aiohttp.ClientResponse,
        error_mapping: ErrorMapping,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - of sockets, applied by aiohttp
    ) -> Exception:
        body = b""
        if response.status >= 400:
            with contextlib.suppress(TimeoutError, UpstreamError):
                async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
                    body, _ = await ResponseBody(response, timeout).read_all(_MAX_ERROR_BODY_BYTES)
        return refused(response.status, response.headers, body, error_mapping, self._now())


def _timeout(connect: float, silence: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=silence)
