"""The HTTP sessions with vendors, and on which connection a request goes out.

A vendor may close a kept connection at any time, also just when the next request arrives on it. Whether it
has processed that request can't be known (RFC 9110, section 9.2.2). So a request that is paid for each time
it is sent gets a connection of its own. All others use kept connections; where one of them fails before the
answer, the request is sent once more, on a new connection
(docs/decisions/0024-upstream-connections-and-streams.md).

`pomelo.providers.http.client` uses it. It knows no vendor.
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
"""What is sent: bytes, or a form whose parts are read as they are sent; None makes a GET of the call."""

KEEP = 4.0
"""Seconds that an idle connection is kept. Common servers close theirs after five."""

_AT_ONCE = 1024 * 1024  # bytes of a request that are written in one go


class Sessions:
    """Two sessions: one that keeps its connections, at most `kept` for a host, and one that makes a new one
    for each request. To be made in the running loop, and closed."""

    def __init__(self, kept: int, resolver: AbstractResolver | None, *, read_bufsize: int) -> None:
        options: dict[str, Any] = {"limit": 0, "limit_per_host": 0, "resolver": resolver}
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_reused)
        tracing.on_connection_create_end.append(_created)
        self._keeping = _session(_Connector(kept, keepalive_timeout=KEEP, **options), read_bufsize, [tracing])
        self._single = _session(aiohttp.TCPConnector(force_close=True, **options), read_bufsize, [])

    async def close(self) -> None:
        """Closes all connections."""
        await self._keeping.close()
        await self._single.close()

    async def request(
        self,
        url: URL,
        headers: Mapping[str, str],
        body: Body,
        limits: aiohttp.ClientTimeout,
        *,
        replays: bool,
    ) -> aiohttp.ClientResponse:
        """Posts `body` (None: gets) and gives the answer, as far as its head. `replays`: the request may be
        sent again though the vendor may have processed it.

        Raises:
            aiohttp.ClientError, OSError, ValueError: there is none.
        """
        if body is not None and not (replays and isinstance(body, bytes)):
            return await _send(self._single, url, headers, body, limits)
        use = _Use()
        try:
            return await _send(self._keeping, url, headers, body, limits, use)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if not use.reused:
                raise
        # Outside of the except block: what aiohttp raises holds the request's headers.
        return await _send(self._single, url, headers, body, limits)


class _Use:
    """What became of a request: whether it went out on a connection that had served another one."""

    __slots__ = ("reused",)

    def __init__(self) -> None:
        self.reused = False


async def _send(
    session: aiohttp.ClientSession,
    url: URL,
    headers: Mapping[str, str],
    body: Body,
    limits: aiohttp.ClientTimeout,
    use: _Use | None = None,
) -> aiohttp.ClientResponse:
    data: Any = body
    if isinstance(body, bytes) and len(body) > _AT_ONCE:
        # A large body is written in pieces, so that other calls have their turn in between.
        data = io.BytesIO(body)
    return await session.request(
        "GET" if body is None else "POST",
        url,
        data=data,
        headers=headers,
        timeout=limits,
        allow_redirects=False,
        trace_request_ctx=use,
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


async def _reused(session: aiohttp.ClientSession, context: SimpleNamespace, event: object) -> None:
    context.trace_request_ctx.reused = True


async def _created(session: aiohttp.ClientSession, context: SimpleNamespace, event: object) -> None:
    context.trace_request_ctx.reused = False


class _Connector(aiohttp.TCPConnector):
    """Keeps connections for later, but for those on which something came that nobody had asked for: it would
    be taken for the answer to the next request, which may be another caller's. At most `kept` are kept for a
    host."""

    def __init__(self, kept: int, **options: Any) -> None:
        super().__init__(**options)
        self._kept = kept

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - it is aiohttp's own name
    ) -> Connection:
        """A connection on which nothing has come yet.

        Raises:
            aiohttp.ClientConnectionError: there is none.
        """
        for _ in range(self._kept + 1):
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        raise aiohttp.ClientConnectionError("answers come without a request")
