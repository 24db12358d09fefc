"""The REST gateway: the responses to HTTP requests, over the interfaces of `pomelo.service`."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial

from gateway.connections.connection import Connection
from gateway.connections.http import HttpConnection
from gateway.connections.limits import ConnectionLimits, Connections, StartQueues
from gateway.connections.listener import Listener
from gateway.cors import Cors, is_preflight
from gateway.errors import error_response, log_unexpected
from gateway.media import public_links
from gateway.openapi.document import Description
from gateway.options import GatewayOptions
from gateway.parsing.body import ParseQueue
from gateway.request import Request
from gateway.responses import Response, reset_connection
from gateway.routes import find_route
from gateway.state import Gateway
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.network.addresses import is_every_address, join_address
from pomelo.network.listening import bind
from pomelo.runtime import process
from pomelo.runtime.in_flight import LARGE_RESPONSE, InFlight, InFlightLimits
from pomelo.runtime.process import is_cancelled, uncancel
from pomelo.service import Services, Visit
from pomelo.telemetry.events import report_call
from pomelo.telemetry.readiness import Readiness

log = logging.getLogger("pomelo.gateway")


def make_gateway(
    services: Services, options: GatewayOptions, readiness: Readiness, cors: Cors | None = None
) -> Gateway:
    """Returns what the request handlers share, backed by `services`. Requires a running event loop."""
    return Gateway(
        services=services,
        options=options,
        link=public_links(options.public_url),
        openapi=Description(options.public_url, options.models).to_json,
        parse_queue=ParseQueue(),
        downloads=InFlight(
            InFlightLimits(calls=options.max_downloads, account_calls=max(1, options.max_downloads // 2))
        ),
        readiness=readiness,
        cors=cors,
    )


async def respond(gateway: Gateway, request: Request) -> Response | None:
    """Returns the response to a request, also for every exception of its handler; None: it was sent.

    Once a response has begun, its status can't change: the connection is reset instead.

    Raises:
        ConnectionError: the response was truncated, or the client has left.
        asyncio.CancelledError: the request was cancelled because the client has left.
    """
    if gateway.cors is not None and is_preflight(request):
        return gateway.cors.preflight(request)
    headers = request.headers
    names = [name for name, _ in headers.items()] if len(set(headers)) < len(headers) else ()
    call = Call.from_headers(headers.get, protocol="rest", address=request.address, names=names)
    visit: Visit | None = None
    name, code, status = "", "", 0
    try:
        try:
            handler, requires_key, name = find_route(request, call)
        except PomeloError as error:
            if call.api_key is not None:
                visit = await gateway.admit(request, call)
                error = await visit.refuse(error)
            raise error from None
        if requires_key:
            visit = await gateway.admit(request, call)
            sent = await handler(gateway, request, call, visit)
        else:
            sent = await handler(gateway, request, call)
        status = 200 if sent is None else sent.status
        if sent is not None and visit is not None and len(sent.body) > LARGE_RESPONSE:
            sent.on_end = visit.hold(len(sent.body))
        return sent
    except PomeloError as error:
        code, status = error.code, error.row.http
        # Not later: the error would be kept with its traceback.
        response = error_response(error, call, request)
    except (Exception, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and is_cancelled():
            if request.is_closing:
                raise
            uncancel()  # something within the request cancelled it, and the client still waits
        if isinstance(error, ConnectionError) and request.is_closing:
            raise
        unexpected = log_unexpected(call)
        code, status = unexpected.code, unexpected.row.http
        response = error_response(unexpected, call, request)
    finally:
        if visit is not None:
            visit.close()
        call.end()
        report_call(gateway.options.observers, call, name, code, status)
    if request.answered:
        raise reset_connection(request)
    return response


@asynccontextmanager
async def open_rest(
    services: Services,
    options: GatewayOptions,
    host: str,
    port: int,
    ssl_context: ssl.SSLContext | None = None,
    *,
    reuse_port: bool = False,
    readiness: Readiness | None = None,
    report_connections: Callable[[Callable[[], int], int], None] = lambda count, limit: None,
) -> AsyncIterator[tuple[str, int]]:
    """Serves REST within the context; yields `host` and the port that it listens on (port 0: a free one).
    With `reuse_port`, other processes may listen on it too. `readiness` is what health checks report;
    while it is draining, each response is the last one on its connection. `report_connections` is called
    once, with a function that returns the number of connections, and with their limit.

    On exit, stops listening, lets running requests continue for `drain_timeout`, then cancels them.

    Raises:
        OSError: the address can't be used.
    """
    cors = Cors(options.cors_origins) if options.cors_origins else None
    readiness = readiness or Readiness()
    gateway = make_gateway(services, options, readiness, cors)
    live: set[HttpConnection] = set()
    connections = Connections(
        ConnectionLimits(
            max_connections=fit_connections(options.max_connections),
            per_address=options.max_untrusted,
            grace=options.untrusted_grace * (1 if ssl_context is None else 3),
            lifetime=options.untrusted_timeout,
        )
    )
    report_connections(lambda: len(connections), connections.limits.max_connections)
    sockets = await bind(host, port, reuse_port=reuse_port)
    listener = Listener(
        sockets,
        partial(
            Connection, partial(respond, gateway), live, connections, StartQueues(), options, readiness, cors
        ),
        connections,
        tls=ssl_context,
        handshake_timeout=options.untrusted_timeout,
        cors=cors,
    )
    try:
        address, port = sockets[0].getsockname()[:2]
        if not options.public_url:
            scheme = "http" if ssl_context is None else "https"
            url = f"{scheme}://{join_address(host, port)}"
            gateway.link = public_links(url)
            if is_every_address(address):
                log.warning(
                    "Links to media begin with %s, which only this machine can reach. Set POMELO_PUBLIC_URL",
                    url,
                )
        listener.start()
        yield host, port
    finally:
        await listener.close()
        await close_connections(live, options.drain_timeout)


async def close_connections(live: Collection[HttpConnection], seconds: float) -> None:
    """Closes connections, those with a request once it is answered. After `seconds` it is cancelled."""
    await asyncio.sleep(0)  # what has arrived may start
    await asyncio.gather(*[connection.shutdown(seconds) for connection in live])


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
