"""Sends requests to vendors on kept or on new connections.

A vendor may close a kept connection at any time, even while the next request is on its way. Then it is
unknown whether the vendor has processed that request (RFC 9110, section 9.2.2). So a request that may be
charged each time gets a new connection. All others use kept connections; if one fails before the response,
the request is sent once more, on a new connection (docs/decisions/0024-upstream-connections-and-streams.md).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from yarl import URL

import pomelo

Body = bytes | aiohttp.MultipartWriter | None
"""A request's body: bytes, or a form whose parts are read as they are sent. A request without one is a
GET."""

KEEPALIVE = 4.0
"""Seconds that an idle connection is kept. Common servers close theirs after five."""

_MAX_WRITE_BYTES = 1024 * 1024  # a larger body is written in chunks


class Sessions:
    """Two sessions: one that keeps its connections, at most `max_kept` for a host, and one that opens a new
    connection for each request. Create it in the running loop, and close it."""

    def __init__(self, max_kept: int, resolver: AbstractResolver | None, *, read_bufsize: int) -> None:
        options: dict[str, Any] = {"limit": 0, "limit_per_host": 0, "resolver": resolver}
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_on_reuse)
        tracing.on_connection_create_end.append(_on_create)
        connector = _Connector(max_kept, keepalive_timeout=KEEPALIVE, **options)
        self._keepalive = _session(connector, read_bufsize, [tracing])
        self._single_use = _session(aiohttp.TCPConnector(force_close=True, **options), read_bufsize, [])

    async def close(self) -> None:
        await self._keepalive.close()
        await self._single_use.close()

    async def request(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - of sockets, applied by aiohttp
        *,
        replays: bool,
    ) -> aiohttp.ClientResponse:
        """POST `body`, or GET if it is None, and return the response after its head has arrived. `replays`:
        the request may be sent again even if the vendor may have processed it.

        Raises:
            aiohttp.ClientError, OSError, ValueError: there was no response.
        """
        if body is not None and not (replays and isinstance(body, bytes)):
            return await _send(self._single_use, url, headers, body, timeout)
        trace = SimpleNamespace(reused=False)  # whether the connection had served another request
        try:
            return await _send(self._keepalive, url, headers, body, timeout, trace)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not trace.reused:
                raise
        # Outside of the except block, because aiohttp's errors contain the request's headers.
        return await _send(self._single_use, url, headers, body, timeout)


async def _send(
    session: aiohttp.ClientSession,
    url: URL,
    headers: Mapping[str, str],
    body: Body,
    timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - of sockets, applied by aiohttp
    trace: SimpleNamespace | None = None,
) -> aiohttp.ClientResponse:
    data: Any = body
    if isinstance(body, bytes) and len(body) > _MAX_WRITE_BYTES:
        # A large body is written in chunks, so that other calls run in between.
        data = io.BytesIO(body)
    return await session.request(
        "GET" if body is None else "POST",
        url,
        data=data,
        headers=headers,
        timeout=timeout,
        allow_redirects=False,
        trace_request_ctx=trace,
    )


def _session(
    connector: aiohttp.BaseConnector, read_bufsize: int, tracing: list[aiohttp.TraceConfig]
) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"Accept-Encoding": "identity", "User-Agent": f"pomelo/{pomelo.__version__}"},
        auto_decompress=False,
        trust_env=False,
        read_bufsize=read_bufsize,
        trace_configs=tracing,
    )


async def _on_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, event: object) -> None:
    context.trace_request_ctx.reused = True


async def _on_create(session: aiohttp.ClientSession, context: SimpleNamespace, event: object) -> None:
    context.trace_request_ctx.reused = False


class _Connector(aiohttp.TCPConnector):
    """Keeps connections for reuse, except those on which unrequested data arrived: that would be taken for
    the response to the next request, which may be another caller's. It keeps at most `max_kept` for a
    host."""

    def __init__(self, max_kept: int, **options: Any) -> None:
        super().__init__(**options)
        self._max_kept = max_kept

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's own name
    ) -> Connection:
        for _ in range(self._max_kept + 1):
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        raise aiohttp.ClientConnectionError("the server sends data without a request")
