"""The HTTP client that all providers share.

`Http.request_json` returns parsed JSON, `Http.fetch` a whole file; `Http.stream_events` opens a stream of
server-sent events or lines, `Http.stream_bytes` one of raw bytes. Failures are mapped to an `UpstreamError`
by `pomelo.providers.http.errors`. The client follows no redirect, keeps no cookie, ignores proxy variables
and asks for no compression. The number of connections is limited before anything is sent
(`pomelo.providers.http.connections`).

A vendor may close a kept connection at any time, even while the next request is on its way. Then it is
unknown whether the vendor has processed that request (RFC 9110, section 9.2.2). So a request that may be
charged each time gets a new connection. All others use kept connections; if one fails before the response,
the request is sent once more, on a new connection (docs/decisions/0024-upstream-connections-and-streams.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Self

from aiohttp import DefaultResolver
from aiohttp.abc import AbstractResolver
from yarl import URL

from pomelo.providers.base import CALLER, VENDOR_CALL
from pomelo.providers.errors import UpstreamError
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.http.errors import (
    DisconnectedError,
    ErrorMapping,
    from_connect_error,
    malformed_response,
    refused,
    truncated,
)
from pomelo.providers.http.head import request_head
from pomelo.providers.http.parsing import parse
from pomelo.providers.http.pool import Pool
from pomelo.providers.http.protocol import NO_LIMIT, Body, Connection, Origin
from pomelo.providers.http.responses import ResponseBody, SseStream
from pomelo.providers.http.sse import MAX_EVENT_BYTES, LineParser, SseParser
from pomelo.runtime.turns import Turns

MAX_BODY_BYTES = MAX_EVENT_BYTES
"""The largest response that is read whole; an error body may repeat the request."""

_ERROR_BODY_TIMEOUT = 5.0
"""Seconds to read an error body."""

_MAX_HEADS = 256
"""Heads of requests that are remembered. Providers use the same few again and again."""


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
        resolver: AbstractResolver | None = None,
        origins: Collection[str] = (),
        turns: Turns | None = None,
    ) -> None:
        timeouts = timeouts or Timeouts()
        self.origins = origins
        self._turns = turns
        self._timeouts = timeouts
        self._resolver = resolver
        self._connections = connections or ConnectionLimiter()
        self._known_head = lru_cache(_MAX_HEADS)(request_head)
        self._pool: Pool | None = None

    async def __aenter__(self) -> Self:
        resolver = self._resolver or DefaultResolver()
        self._pool = Pool(self._connections.limit, resolver, self._timeouts.connect)
        return self

    async def __aexit__(self, *error: object) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()

    def with_resolver(self, resolver: AbstractResolver) -> Http:
        """Return a client with the same limits that looks names up by `resolver`; it must be entered. It is
        for files, which need no time to be made: silence ends a whole response as early as a stream."""
        timeouts = replace(self._timeouts, whole=min(self._timeouts.whole, self._timeouts.silence))
        return Http(timeouts, connections=self._connections, resolver=resolver)

    @property
    def turns(self) -> Turns:
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
        connection = await self._open(url, headers, body, error_mapping, self._timeouts.whole, max_bytes)
        try:
            response = _whole(connection)
        finally:
            self._close(connection)
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
        connection = await self._open(url, headers, body, error_mapping, self._timeouts.whole, max_bytes)
        try:
            return _whole(connection), connection.headers.get("Content-Type", "")
        finally:
            self._close(connection)

    @asynccontextmanager
    async def stream_bytes(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        *,
        patient: bool = False,
    ) -> AsyncGenerator[ResponseBody, None]:
        """POST `body`, or GET if it is None, and open the response as a stream of bytes. Leaving closes the
        connection immediately, unless the response was read to its end. With `patient` the stream may be
        silent as long as a whole response, because the vendor sends nothing before it has finished.

        Raises:
            UpstreamError: by the error map; overloaded if no connection became free.
        """
        silence = self._timeouts.whole if patient else self._timeouts.silence
        connection = await self._open(url, headers, body, error_mapping, silence)
        try:
            yield ResponseBody(connection)
        finally:
            self._close(connection)

    @asynccontextmanager
    async def stream_events(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        *,
        patient: bool = False,
        lines: bool = False,
    ) -> AsyncGenerator[SseStream, None]:
        """POST `body` and open the response as a stream of server-sent events; with `lines`, each line of it
        is an event (NDJSON). Leaving closes the connection immediately, unless the response was read to its
        end. With `patient` the first event may come as late as a whole response.

        Raises:
            UpstreamError: by the error map; overloaded if no connection became free.
        """
        silence = self._timeouts.whole if patient else self._timeouts.silence
        connection = await self._open(url, headers, body, error_mapping, silence)
        parser = LineParser() if lines else SseParser()
        try:
            # The content type is not checked: proxies change it, and a page has no end marker.
            yield SseStream(ResponseBody(connection), parser, self._timeouts.silence)
        finally:
            self._close(connection)

    async def _open(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        error_mapping: ErrorMapping,
        silence: float,
        limit: int = NO_LIMIT,
    ) -> Connection:
        """Send a request, and return its connection, to be closed by `_close`. With `limit` the body is
        complete, unless it is larger or breaks off; otherwise only the head has arrived.

        Raises:
            UpstreamError: by the error map, also for a status of 300 or above; overloaded.
        """
        lease = f"{url.raw_host}:{url.port}", CALLER.get()
        call = VENDOR_CALL.get()
        if call is not None:
            call.status = 0
        if not self._connections.try_acquire(*lease):
            if call is not None:
                call.waits = call.sent is None
            await self._connections.acquire(*lease)
        if call is not None:
            call.sent, call.waits = headers, False
        try:
            connection = await self._send(url, headers, body, error_mapping.replays, silence, limit)
        except (OSError, ValueError) as error:
            failure = from_connect_error(error, error_mapping)
        except BaseException:
            self._connections.release(*lease)
            raise
        else:
            connection.lease = lease
            if call is not None:
                call.status, call.fields = connection.status, connection.fields
            if connection.status < 300:
                return connection
            try:
                raise await self._refusal(connection, error_mapping)
            finally:
                self._close(connection)
        self._connections.release(*lease)
        try:
            raise failure
        finally:
            del failure  # its traceback references this frame

    async def _send(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        replays: bool,
        silence: float,
        limit: int,
    ) -> Connection:
        pool = self._pool
        if pool is None:
            raise RuntimeError("Http must be entered before use")
        keep = body is None or (replays and isinstance(body, bytes))
        origin, head = self._head(url, headers, body, keep)
        if keep and (connection := pool.take(origin)) is not None:
            try:
                await connection.request(head, body, silence, limit)
                return connection
            except DisconnectedError:
                keep = False
                origin, head = self._head(url, headers, body, keep)
        connection = await pool.connect(origin, keep=keep)
        await connection.request(head, body, silence, limit)
        return connection

    def _head(self, url: URL, headers: Mapping[str, str], body: Body, keep: bool) -> tuple[Origin, bytes]:
        """Return where to connect, and the head of the request."""
        fields = tuple(headers.items())
        if body is None:
            origin, head = self._known_head("GET", url, fields, keep)
            return origin, head + b"\r\n"
        if isinstance(body, bytes):
            origin, head = self._known_head("POST", url, fields, keep)
            size: int | None = len(body)
        else:
            origin, head = request_head("POST", url, (*fields, ("Content-Type", body.content_type)), keep)
            size = body.size
        if size is None:
            raise ValueError("a form of unknown size")
        return origin, b"%bContent-Length: %d\r\n\r\n" % (head, size)

    def _close(self, connection: Connection) -> None:
        """End a request: keep its connection or close it, and give its place to another call."""
        if connection.finish() and self._pool is not None:
            self._pool.keep(connection)
        self._connections.release(*connection.lease)

    async def _refusal(self, connection: Connection, error_mapping: ErrorMapping) -> UpstreamError:
        body = b""
        if connection.status >= 400:
            with contextlib.suppress(TimeoutError, UpstreamError):
                async with asyncio.timeout(_ERROR_BODY_TIMEOUT):
                    body = await ResponseBody(connection).read_all(MAX_BODY_BYTES)
        return refused(connection.status, connection.headers, body, error_mapping, time.time())


def _whole(connection: Connection) -> bytes:
    """Return the body of a response that was requested whole."""
    if connection.too_large:
        raise malformed_response("a response above the limit")
    if not connection.complete:
        raise truncated(connection.error or DisconnectedError())
    return connection.take()
