"""The front ends of a process as its settings want them: REST, and gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from functools import cache, partial
from ipaddress import IPv4Network, IPv6Network, ip_network

from gateway.app import open_rest
from gateway.openapi.schema import KnownModel
from gateway.options import IDLE_TIMEOUT, INLINE_LIMIT, PROXY_IDLE_TIMEOUT, GatewayOptions
from pomelo.catalog.catalog import Catalog
from pomelo.network.origin import GatewayProof
from pomelo.network.tls import Certificate, ReplaceableContext
from pomelo.runtime.draining import Draining
from pomelo.runtime.in_flight import InFlightLimits
from pomelo.secrets import derive_key, derive_keys
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionLimits
from pomelo.server.server import CONNECTION_STREAMS, ServerOptions
from pomelo.service import Services
from pomelo.settings import Settings
from pomelo.telemetry.events import Observer
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.readiness import Readiness

FLUSH_TIMEOUT = 2.0
"""Seconds that the front ends have to send remaining output after the tasks have ended or were cancelled."""


def open_rest_of(
    services: Services,
    settings: Settings,
    tls: ReplaceableContext | None,
    metrics: Metrics,
    readiness: Readiness,
    shared: bool = False,
    inline_limit: int = INLINE_LIMIT,
    observers: Sequence[Observer] = (),
    *,
    catalog: Callable[[], Catalog],
) -> AbstractAsyncContextManager[tuple[str, int]]:
    """Serves `services` over REST, and yields the bound address. `shared`: other processes listen on it.
    `catalog` returns the catalogue; the OpenAPI description lists its models that are built in."""
    host, port = settings.rest_address()
    return open_rest(
        services,
        gateway_options(settings, inline_limit, observers, catalog=catalog),
        host,
        port,
        ssl_context=tls.context if tls is not None else None,
        reuse_port=shared,
        readiness=readiness,
        report_connections=partial(metrics.watch_connections, "rest"),
    )


def gateway_options(
    settings: Settings,
    inline_limit: int = INLINE_LIMIT,
    observers: Sequence[Observer] = (),
    *,
    catalog: Callable[[], Catalog],
) -> GatewayOptions:
    """Returns the options of the gateway. `catalog` as in `open_rest_of`."""
    return GatewayOptions(
        public_url=settings.public_url,
        page=settings.page,
        json_limit=settings.json_limit,
        upload_limit=settings.upload_limit,
        inline_limit=inline_limit,
        max_connections=settings.max_connections,
        cors_origins=settings.cors_origins,
        idle_timeout=settings.idle_timeout or IDLE_TIMEOUT,
        proxy_idle_timeout=settings.idle_timeout or PROXY_IDLE_TIMEOUT,
        trusted_proxies=_trusted_proxies(settings),
        drain_timeout=FLUSH_TIMEOUT,
        observers=observers,
        models=lambda: _known_models(catalog()),
    )


def _known_models(catalog: Catalog) -> dict[str, KnownModel]:
    """Returns the models that everyone may know, by all of their names. Those that the operator has added are
    not among them."""
    return {
        name: KnownModel(model.task_type, model.limits.max_characters)
        for name, model in catalog.by_any_name.items()
        if name in _builtin_names()
    }


@cache
def _builtin_names() -> frozenset[str]:
    return frozenset(Catalog.load().by_any_name)


def in_flight(settings: Settings) -> InFlightLimits:
    """Returns the limits of concurrent calls."""
    return InFlightLimits(calls=settings.max_calls, account_calls=max(1, settings.max_calls // 2))


def server_options(
    settings: Settings,
    shared: bool,
    certificate: Certificate | None = None,
    observers: Sequence[Observer] = (),
) -> ServerOptions:
    """Returns the options of the gRPC server. `shared` as in `open_rest_of`."""
    return ServerOptions(
        address=settings.grpc,
        grace=FLUSH_TIMEOUT,
        # The largest body of REST or inline audio, and 1 MiB for the rest of the message.
        limits=CallLimits(message=max(settings.json_limit, settings.inline_limit) + 1024 * 1024),
        certificate=certificate,
        connection_streams=max(CONNECTION_STREAMS, in_flight(settings).account_calls),
        reuse_port=shared,
        connections=ConnectionLimits(trusted=_trusted_proxies(settings)),
        observers=observers,
    )


def _trusted_proxies(settings: Settings) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(map(ip_network, settings.trusted_proxies))


def gateway_proof(secret: bytes | None, previous: Sequence[bytes] = ()) -> GatewayProof:
    """Returns the proof by which a server recognises gateways that have the same root secret, or one of its
    `previous` ones."""
    if secret is None:
        return GatewayProof()
    return GatewayProof(derive_key(secret, "gateway"), derive_keys(previous, "gateway"))


async def drain(draining: Draining, grace: float) -> None:
    """Waits for running tasks during the grace period, then cancels the remaining ones."""
    for begin, seconds in ((draining.drain, grace), (draining.stop, FLUSH_TIMEOUT)):
        begin()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await draining.idle()
