"""The operator's HTTP server: metrics and health, for Prometheus and probes, never for callers.

It has no key and no TLS, so it listens on loopback unless the operator decides otherwise. There it is read
as `localhost` or an IP address alone: a page of another site, in a browser on this machine, can reach it
through a name that the site's DNS server maps to 127.0.0.1 (DNS rebinding), but then the Host is that name.
Each connection has one request and a few seconds, and there are few of them: a client that can reach it can
cost little.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from aiohttp import web

from pomelo.network.addresses import host_of, is_fixed, is_loopback, join_address, split_address
from pomelo.network.listening import bind
from pomelo.runtime.logs import format_trace
from pomelo.runtime.process import shielded
from pomelo.telemetry.exposition import CONTENT_TYPE, Exposition
from pomelo.telemetry.readiness import REASONS, Readiness

MAX_CONNECTIONS = 32
"""Connections that are served; further ones are closed."""

LIFETIME = 10.0
"""Seconds after which a connection is closed, whatever it does; at least half as many."""

SHARED_FOR = 0.5
"""Seconds for which a report is sent again, so that many requests cost as much as a few."""

log = logging.getLogger("pomelo.telemetry")

_QUIET = logging.Logger("aiohttp", logging.CRITICAL)
"""Drops what aiohttp logs about malformed requests, with their text."""

_JSON = "application/json"

_HEALTH = ("/livez", "/readyz")
"""They contain nothing to protect, and some probes send a name."""

_OTHER_NAME = (
    "The Host must be localhost or an IP address, because POMELO_ADMIN is a loopback address. "
    "Use http://127.0.0.1 with its port\n"
)

Page = Callable[[web.BaseRequest], Awaitable[web.Response]]
"""Returns the response to a request with GET or HEAD."""


@asynccontextmanager
async def open_admin(
    address: str,
    exposition: Exposition,
    readiness: Readiness,
    *,
    find_page: Callable[[str], Page | None] = lambda path: None,
    reuse_port: bool = False,
    lifetime: float = LIFETIME,
) -> AsyncIterator[str]:
    """Serves /metrics, /livez, /readyz and what `find_page` returns for other paths, at `host:port` (port 0:
    a free one); yields the bound address. An empty address serves nothing. On a loopback address, only health
    is reported under names other than `localhost`. Every connection ends within `lifetime` seconds.

    Raises:
        OSError: the address can't be used.
    """
    if not address:
        yield ""
        return
    host, port = split_address(address)
    handler = _Pages(exposition, readiness, find_page, any_name=not is_loopback(host))
    server = web.Server(handler.respond, logger=_QUIET, access_log=None, lingering_time=0)
    loop = asyncio.get_running_loop()

    def connect() -> asyncio.Protocol:
        if len(server.connections) >= MAX_CONNECTIONS:
            return _Refusal()
        return server()

    sockets = await bind(host, port, reuse_port=reuse_port)
    listeners = [await loop.create_server(connect, sock=each) for each in sockets]
    closing = asyncio.create_task(_close_old_connections(server, lifetime / 2))
    try:
        yield join_address(host, sockets[0].getsockname()[1])
    finally:
        closing.cancel()
        for listener in listeners:
            listener.close()
        await server.shutdown(0)


class _Pages:
    def __init__(
        self,
        exposition: Exposition,
        readiness: Readiness,
        find_page: Callable[[str], Page | None],
        *,
        any_name: bool,
    ) -> None:
        self._any_name = any_name
        self._exposition = exposition
        self._readiness = readiness
        self._find_page = find_page
        self._pages: Mapping[str, Page] = {
            "/metrics": self._metrics,
            "/livez": self._live,
            "/readyz": self._ready,
        }
        self._report: asyncio.Future[str] | None = None
        self._started = 0.0

    async def respond(self, request: web.BaseRequest) -> web.Response:
        page = self._pages.get(request.path) or self._find_page(request.path)
        if page is None:
            response = web.Response(status=404, text=f"Use {', '.join(self._pages)}\n")
        elif request.method not in ("GET", "HEAD"):
            response = web.Response(status=405, text="Use GET\n", headers={"Allow": "GET, HEAD"})
        elif not self._any_name and request.path not in _HEALTH and not _names_this_machine(request):
            response = web.Response(status=403, text=_OTHER_NAME)
        else:
            try:
                response = await page(request)
            except Exception as error:
                log.error("%s can't be reported\n%s", request.path, format_trace(error))
                response = web.Response(status=500, text="Internal error. The log has its trace\n")
        response.headers.setdefault("Cache-Control", "no-store")
        response.force_close()
        return response

    async def _metrics(self, request: web.BaseRequest) -> web.Response:
        now = time.monotonic()
        if self._report is None or (self._report.done() and now - self._started > SHARED_FOR):
            self._report = asyncio.ensure_future(self._exposition.all())
            self._started = now
        text = await shielded(self._report)
        return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def _live(self, request: web.BaseRequest) -> web.Response:
        return web.Response(text='{"status":"ok"}\n', content_type=_JSON)

    async def _ready(self, request: web.BaseRequest) -> web.Response:
        code = self._readiness.code
        if not code:
            return await self._live(request)
        body = json.dumps({"status": "unavailable", "code": code, "reason": REASONS[code]})
        return web.Response(status=503, text=body + "\n", content_type=_JSON)


def _names_this_machine(request: web.BaseRequest) -> bool:
    """Whether a request has no Host, which browsers always send, or one that no DNS server decides."""
    header = request.headers.get("Host")
    return header is None or is_fixed(host_of(header))


class _Refusal(asyncio.Protocol):
    """A connection that is closed immediately."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


async def _close_old_connections(server: web.Server, interval: float) -> None:
    """Closes each connection that is there at two checks, until it is cancelled. What a client has not read
    is dropped."""
    seen: set[web.RequestHandler] = set()
    while True:
        await asyncio.sleep(interval)
        connections = set(server.connections)
        for connection in connections & seen:
            if connection.transport is not None:
                connection.transport.abort()
        seen = connections
