"""The REST gateway: an aiohttp application over the interfaces of `pomelo.service`."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web
from pydantic_core import to_json

from gateway import routes
from gateway.connections.connection import Connection
from gateway.connections.limits import ConnectionLimits, Connections, StartQueues
from gateway.connections.listener import Listener, bind
from gateway.cors import Cors
from gateway.errors import CALL, error_middleware
from gateway.media import public_links
from gateway.openapi.document import document
from gateway.options import GatewayOptions
from gateway.parsing.body import ParseQueue
from gateway.state import Gateway
from pomelo import process
from pomelo.addresses import join_address
from pomelo.in_flight import InFlight, InFlightLimits
from pomelo.service import Services

GATEWAY = web.AppKey("gateway", Gateway)

log = logging.getLogger("pomelo.gateway")


def make_app(
    services: Services, options: GatewayOptions, healthy: Callable[[], bool], cors: Cors | None = None
) -> web.Application:
    """Returns the application with all routes, backed by `services`. Requires a running event loop."""
    gateway = Gateway(
        services=services,
        options=options,
        link=public_links(options.public_url),
        openapi=to_json(document(options.public_url)),
        parse_queue=ParseQueue(),
        downloads=InFlight(
            InFlightLimits(calls=options.max_downloads, account_calls=max(1, options.max_downloads // 2))
        ),
        healthy=healthy,
    )
    app = web.Application(
        middlewares=[error_middleware] if cors is None else [cors.preflight, error_middleware]
    )
    if cors is not None:
        app.on_response_prepare.append(cors.add_headers)
    app[GATEWAY] = gateway
    for (method, path), handler in routes.ROUTES.items():
        _add_route(app, method, path, _with_key(gateway, handler))
    for path, open_handler in routes.OPEN_ROUTES.items():
        _add_route(app, "GET", path, _without_key(gateway, open_handler))
    return app


_RequestHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _add_route(app: web.Application, method: str, path: str, handler: _RequestHandler) -> None:
    app.router.add_route(method, path, handler, expect_handler=_ignore_expect)
    if method == "GET":
        app.router.add_route("HEAD", path, handler, expect_handler=_ignore_expect)


def _with_key(gateway: Gateway, handler: routes.Handler) -> _RequestHandler:
    async def handle(request: web.Request) -> web.StreamResponse:
        call = request[CALL]
        visit = await gateway.admit(request, call)
        try:
            return await handler(gateway, request, call, visit)
        finally:
            visit.close()

    return handle


def _without_key(gateway: Gateway, handler: routes.OpenHandler) -> _RequestHandler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(gateway, request, request[CALL])

    return handle


async def _ignore_expect(request: web.Request) -> None:
    """Leaves `Expect: 100-continue` to the reader of the body; other expectations are ignored."""


@asynccontextmanager
async def open_rest(
    services: Services,
    options: GatewayOptions | None,
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None = None,
    *,
    reuse_port: bool = False,
    healthy: Callable[[], bool] = lambda: True,
) -> AsyncIterator[tuple[str, int]]:
    """Serves REST within the context; yields the host and the port that it listens on (port 0: a free one).
    With `reuse_port`, other processes may listen on it too. `healthy` decides the result of health checks.

    On exit, stops listening, lets running requests continue for `drain_timeout`, then cancels them.

    Raises:
        OSError: the address can't be used.
    """
    options = options or GatewayOptions()
    cors = Cors(options.cors_origins) if options.cors_origins else None
    app = make_app(services, options, healthy, cors)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=options.drain_timeout)
    await runner.setup()
    try:
        server = runner.server
        assert server is not None
        connections = Connections(
            ConnectionLimits(
                max_connections=fit_connections(options.max_connections),
                per_address=options.max_untrusted,
                grace=options.untrusted_grace * (1 if ssl_context is None else 3),
                lifetime=options.untrusted_timeout,
            )
        )
        sockets = await bind(host, port, reuse_port=reuse_port)
        listener = Listener(
            sockets,
            partial(Connection, server, connections, StartQueues(), options, cors),
            connections,
            tls=ssl_context,
            handshake_timeout=options.untrusted_timeout,
            cors=cors,
        )
        try:
            bound: tuple[str, int] = sockets[0].getsockname()[:2]
            if not options.public_url:
                scheme = "http" if ssl_context is None else "https"
                app[GATEWAY].link = public_links(f"{scheme}://{join_address(*bound)}")
            listener.start()
            yield bound
        finally:
            listener.close()
    finally:
        await runner.cleanup()


def fit_connections(count: int) -> int:
    """Returns `count`, lowered to half of the files that this process may open. The other half is left to
    gRPC, the providers, the store and media."""
    max_files = process.descriptor_limit()
    if count <= max_files // 2:
        return count
    log.warning(
        "POMELO_MAX_CONNECTIONS is %d, but this process may open %d files: the limit is lowered to %d "
        "connections. Raise the limit of open files (ulimit -n, LimitNOFILE)",
        *(count, max_files, max_files // 2),
    )
    return max_files // 2
