"""The REST gateway: an aiohttp application before the ports of `pomelo.service`.

Opened by the composition root with the engine behind it, or with a remote server: it can't tell which.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from gateway import render, routes
from gateway.access import admit
from gateway.connection import Connection, Patience, StartQueues
from gateway.connections import ConnectionLimits, Connections, Slot
from gateway.cors import Cors
from gateway.incoming import Pace
from gateway.listener import Listener, bind
from gateway.problems import CALL, guard
from gateway.state import Gateway, GatewayOptions
from gateway.turns import ParseQueue
from pomelo import process
from pomelo.in_flight import InFlight, InFlightLimits
from pomelo.service import Services

GATEWAY = web.AppKey("gateway", Gateway)

log = logging.getLogger("pomelo.gateway")


def _always() -> bool:
    return True


def make_app(
    services: Services, options: GatewayOptions, healthy: Callable[[], bool], cors: Cors | None = None
) -> web.Application:
    """The application with every route, backed by `services`. Requires a running event loop."""
    gateway = Gateway(
        services=services,
        options=options,
        link=render.link_to(options.public_url),
        description=routes.describe(options.public_url),
        pace=Pace(options.read_rate, options.read_grace, options.read_timeout),
        parsing=ParseQueue(),
        links=InFlight(InFlightLimits(calls=options.max_links, account_calls=max(1, options.max_links // 2))),
        healthy=healthy,
    )
    app = web.Application(middlewares=[guard] if cors is None else [cors.preflight, guard])
    if cors is not None:
        app.on_response_prepare.append(cors.add_headers)
    app[GATEWAY] = gateway
    for route in routes.ROUTES:
        _add(app, route.method, route.path, _with_key(gateway, route.handler))
    for open_route in routes.OPEN_ROUTES:
        _add(app, open_route.method, open_route.path, _without_key(gateway, open_route.handler))
    return app


_Handle = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _add(app: web.Application, method: str, path: str, handler: _Handle) -> None:
    app.router.add_route(method, path, handler, expect_handler=_expect)
    if method == "GET":
        app.router.add_route("HEAD", path, handler, expect_handler=_expect)


def _with_key(gateway: Gateway, handler: routes.Handler) -> _Handle:
    async def handle(request: web.Request) -> web.StreamResponse:
        call = request[CALL]
        visit = await admit(gateway, request, call)
        try:
            return await handler(gateway, request, call, visit)
        finally:
            visit.close()

    return handle


def _without_key(gateway: Gateway, handler: routes.OpenHandler) -> _Handle:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(gateway, request, request[CALL])

    return handle


async def _expect(request: web.Request) -> None:
    """Leaves `Expect: 100-continue` to whoever reads the body; anything else expected is ignored."""


@asynccontextmanager
async def open_rest(
    services: Services,
    options: GatewayOptions | None,
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None = None,
    *,
    reuse_port: bool = False,
    healthy: Callable[[], bool] = _always,
) -> AsyncIterator[tuple[str, int]]:
    """Serves REST while the body runs; yields the host and the port that it listens on (port 0: a
    free one). With `reuse_port` other processes may listen there, too. `healthy` decides what a
    health check returns.

    On leaving it stops listening, lets running requests end for `drain_timeout`, then cancels them.

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
                most=fit(options.max_connections),
                address=options.max_untrusted,
                grace=options.untrusted_grace * (1 if ssl_context is None else 3),
                life=options.untrusted_timeout,
            )
        )
        turns = StartQueues()
        patience = Patience(
            head=options.head_timeout,
            stall=options.write_timeout,
            idle=options.idle_timeout + options.idle_slack,
            proxy_idle=options.proxy_idle_timeout + options.idle_slack,
            proxies=options.trusted_proxies,
            linger=options.linger_timeout,
        )

        def connect(slot: Slot) -> Connection:
            return Connection(server, slot, connections, turns, patience, cors)

        sockets = await bind(host, port, reuse_port=reuse_port)
        listener = Listener(
            sockets, connect, connections, tls=ssl_context, handshake=options.untrusted_timeout, cors=cors
        )
        try:
            bound: tuple[str, int] = sockets[0].getsockname()[:2]
            if not options.public_url:
                scheme = "http" if ssl_context is None else "https"
                name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
                app[GATEWAY].link = render.link_to(f"{scheme}://{name}:{bound[1]}")
            listener.start()
            yield bound
        finally:
            listener.close()
    finally:
        await runner.cleanup()


def fit(most: int) -> int:
    """Returns `most`, lowered to half of the files that this process may have open. The other half
    is left to gRPC, the providers, the store and media."""
    files = process.descriptor_limit()
    if most <= files // 2:
        return most
    log.warning(
        "POMELO_MAX_CONNECTIONS is %d, but this process may have %d files open: it takes %d connections. "
        "Raise the limit (ulimit -n, LimitNOFILE)",
        *(most, files, files // 2),
    )
    return files // 2
