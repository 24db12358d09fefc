"""The REST gateway: an aiohttp application before the ports of `pomelo.service`.

Opened by the composition root with the engine behind it, or with a remote server: it can't tell which.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web

from gateway import render, routes
from gateway.connection import Connection
from gateway.problems import CALL, guard
from gateway.state import Gateway, GatewayOptions
from pomelo.service import Services

GATEWAY = web.AppKey("gateway", Gateway)

READ_AHEAD = 64 * 1024
"""About the bytes of a body that are taken in before anybody asks for them."""


def make_app(services: Services, options: GatewayOptions | None = None) -> web.Application:
    """The application with every route of the table, before `services`."""
    options = options or GatewayOptions()
    gateway = Gateway(
        services, options, render.link_to(options.public_url), routes.describe(options.public_url)
    )
    app = web.Application(middlewares=[guard])
    app[GATEWAY] = gateway
    for route in routes.ROUTES:
        handler = _bind(gateway, route.handler)
        app.router.add_route(route.method, route.path, handler, expect_handler=_expect)
        if route.method == "GET":
            app.router.add_route("HEAD", route.path, handler, expect_handler=_expect)
    return app


def _bind(
    gateway: Gateway, handler: routes.Handler
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
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
) -> AsyncIterator[tuple[str, int]]:
    """Serves REST while the body runs; yields the host and the port that it listens on (port 0: a free one).
    With `reuse_port` other processes may listen there, too.

    On leaving it stops listening, lets running requests end for `drain_timeout`, then cancels them.

    Raises:
        OSError: the address can't be used.
    """
    options = options or GatewayOptions()
    app = make_app(services, options)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=options.drain_timeout)
    await runner.setup()
    try:
        server = runner.server
        assert server is not None

        def connect() -> Connection:
            return Connection(
                server,
                head=options.head_timeout,
                stall=options.write_timeout,
                most=options.max_connections,
                keepalive_timeout=options.idle_timeout,
                lingering_time=options.linger_timeout,
                access_log=None,
                auto_decompress=False,
                read_bufsize=READ_AHEAD,
                max_line_size=8190,
                max_field_size=8190,
                max_headers=128,
            )

        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            connect,
            host,
            port,
            ssl=ssl_context,
            backlog=1024,
            start_serving=False,
            reuse_port=reuse_port or None,
        )
        try:
            bound: tuple[str, int] = listener.sockets[0].getsockname()[:2]
            if not options.public_url:
                scheme = "http" if ssl_context is None else "https"
                name = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
                app[GATEWAY].link = render.link_to(f"{scheme}://{name}:{bound[1]}")
            await listener.start_serving()
            yield bound
        finally:
            listener.close()
    finally:
        await runner.cleanup()
