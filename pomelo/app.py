"""Builds Pomelo from its settings and runs it: the whole application, or only the REST gateway.

Nothing is global: several applications can run in one process. Keyword arguments replace parts in tests.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pomelo
from gateway.options import INLINE_LIMIT
from pomelo.accounts.access import Access
from pomelo.accounts.accounts import LocalAccounts
from pomelo.accounts.failed_keys import FailedKeys
from pomelo.accounts.keys import Keyring
from pomelo.accounts.operator import LocalOperator
from pomelo.accounts.plans import Plan
from pomelo.accounts.usage import UsageReader
from pomelo.catalog import retirement
from pomelo.catalog.catalog import Catalog
from pomelo.configuration import (
    Configuration,
    open_media,
    read_configuration,
    rest_url,
    store_of,
)
from pomelo.configuration.fleet import describe_process, join, mark_media
from pomelo.configuration.front_ends import drain, gateway_proof, in_flight, open_rest_of, server_options
from pomelo.configuration.reload import GatewayReloader, Reload, Reloader
from pomelo.engine.acceptance import Acceptance
from pomelo.engine.engine import Engine
from pomelo.engine.ledger import RECONCILE_INTERVAL, Ledger
from pomelo.engine.models import LocalModels
from pomelo.engine.routing import Router
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1.admin_service_pb2 import GetServerResponse
from pomelo.media.duration import Measurer
from pomelo.media.local import LocalMedia
from pomelo.media.sweep import sweep
from pomelo.network.addresses import is_here
from pomelo.network.tls import ReplaceableContext
from pomelo.protobuf import times
from pomelo.providers import SANDBOX, open_providers
from pomelo.providers.base import Provider
from pomelo.providers.http.client import Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.runtime.draining import Draining
from pomelo.runtime.in_flight import InFlight
from pomelo.runtime.process import in_background
from pomelo.runtime.turns import Turns
from pomelo.server.remote import Tls, open_remote
from pomelo.server.server import open_operator_socket, open_server
from pomelo.service import Services
from pomelo.settings import Settings
from pomelo.stores.base import Store
from pomelo.stores.fleet import Fleet, Process
from pomelo.telemetry.events import Observer
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.process import measure_process
from pomelo.telemetry.readiness import Readiness
from pomelo.telemetry.store import OpenReservations, TimedLedgerStore

log = logging.getLogger("pomelo.app")

ALERTS_INTERVAL = 5.0
"""Seconds between two searches for what is reported to the operator."""


@dataclass(frozen=True, slots=True)
class App:
    """A running application. An address is None if its server is off; `configured` are the names of the
    providers that live keys can use; `connections` are those to vendors; `reload` is as in `Reloader`."""

    settings: Settings
    configured: frozenset[str]
    store: Store
    keyring: Keyring
    draining: Draining
    connections: ConnectionLimiter
    services: Services
    operator: LocalOperator
    rest: tuple[str, int] | None
    grpc: str | None
    reload: Reload


@asynccontextmanager
async def open_app(
    settings: Settings,
    *,
    catalog: Catalog | None = None,
    providers: Mapping[str, Provider] | None = None,
    timeouts: Timeouts | None = None,
    plans: Mapping[str, Plan] | None = None,
    wrap_store: Callable[[Store], Store] = lambda store: store,
    make_router: Callable[[Mapping[str, Provider]], Router] = Router,
    failed_keys: FailedKeys | None = None,
    now: Callable[[], float] = time.time,
    reconcile_every: float = RECONCILE_INTERVAL,
    alerts_every: float = ALERTS_INTERVAL,
    worker: int | None = None,
    observers: Sequence[Observer] = (),
    metrics: Metrics | None = None,
    readiness: Readiness | None = None,
) -> AsyncIterator[App]:
    """Builds the application and serves it. Leaving drains: running tasks have the grace period to finish.

    `now` returns Unix time for media, results and reported limits; the store has its own clock. Every
    `reconcile_every` seconds, reservations without a running task are settled; every `alerts_every` seconds,
    what is found is sent to the operator. `worker` is the number of this process among several that share the
    addresses, None if it is alone; the first serves the operator. `observers` get reports of tasks, calls and
    failed attempts; `metrics` get what is counted. `readiness` follows the store, and is what health checks
    report.

    Raises:
        OSError: an address is in use.
        pomelo.settings.SettingsError, pomelo.errors.PomeloError: the data folder can't be used.
        pomelo.stores.base.StoreError: the store can't be opened.
    """
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        secret, previous = settings.root_secret(), settings.previous_secrets()
        opened = await enter(store_of(settings))
        store = wrap_store(opened)
        keyring = Keyring(store, secret, failed_keys=failed_keys, previous=previous)
        stack.push_async_callback(keyring.finish)
        configuration = read_configuration(settings, catalog)
        if plans:
            configuration = replace(configuration, plans=plans)
        catalog, plans = configuration.registry.catalog, configuration.plans
        connections = ConnectionLimiter(settings.upstream_connections)
        turns = Turns()
        draining = Draining()
        opener = partial(open_providers, timeouts=timeouts, connections=connections, turns=turns)
        reloader = Reloader(settings, configuration, opener, lambda: draining.scopes, is_first=not worker)
        providers = await enter(reloader.open(providers))
        if not worker:
            ended = retirement.log_ended(lambda: reloader.configuration.registry.catalog, now)
            await enter(in_background(ended))

        started = now()

        async def describe(fleet: Fleet) -> Process:
            clock = await fleet.clock_ahead()
            mark_media(reloader.settings)
            return describe_process(reloader.settings, reloader.configuration, secret, started, clock)

        metrics, readiness = metrics or Metrics(), readiness or Readiness()
        if isinstance(opened, Fleet):
            await join(opened, await describe(opened), warn=not worker)
            opened.drain_usage(metrics.archive_failed)
        metrics.know_models(catalog.models)
        metrics.know_providers(_configured(providers))
        observers = (metrics, *observers)
        router = make_router(providers)
        if settings.alert_url:
            from pomelo.alerts.alert import signing_keys
            from pomelo.alerts.watch import open_watch

            watching = open_watch(
                settings.alert_url,
                signing_keys(settings.alert_secret, (secret, *previous)),
                alerts_every,
                store,
                low_share=settings.alert_balance,
                blocked_routes=router.blocked_routes,
                note_state=opened.note_state if isinstance(opened, Fleet) else None,
                now=now,
            )
            observers = (*observers, await enter(watching))
        timed_store: Any = TimedLedgerStore(store, metrics)
        ledger = Ledger(timed_store, now=now, reconcile_every=reconcile_every, observers=observers)
        await enter(in_background(keyring.keep_use()))
        await enter(_maintain(ledger))
        access = Access(keyring, plans, catalog, ledger, in_flight(settings))
        media = await enter(open_media(settings, secret, previous, now))
        await enter(in_background(sweep(media)))
        measurer = Measurer()
        stack.push_async_callback(measurer.aclose)
        acceptance = Acceptance(
            access=access,
            router=router,
            media=media,
            measurer=measurer,
            inline_limit=settings.inline_limit,
            now=now,
        )
        usage = UsageReader(store, secret, previous)
        models = LocalModels(catalog, router, access)
        await enter(readiness.follow(partial(metrics.check_store, store.check), "store_unavailable"))
        services = draining.guard(
            Services(
                tasks=Engine(access, acceptance, ledger, router, media, turns, observers),
                models=models,
                media=LocalMedia(media, access, settings.upload_limit, turns=turns),
                accounts=LocalAccounts(store, usage, access),
                access=access,
            )
        )
        metrics.tasks_in_flight.read_one(lambda: len(ledger.running))
        metrics.watch_calls(access.in_flight)
        metrics.circuits.read(router.circuit_states)
        metrics.upstream_connections.read_one(lambda: connections.in_use)
        metrics.upstream_waiting.read_one(lambda: connections.waiting)
        if not worker:  # what all workers share, only one reports
            OpenReservations(store, now).register(metrics)
            metrics.media_bytes.read_one(lambda: media.quota.total)
            metrics.media_limit.read_one(lambda: settings.media_limit)
        await enter(measure_process(metrics, readiness))
        operator = LocalOperator(
            store,
            keyring,
            plans,
            usage,
            catalog.models,
            now,
            runs=ledger.runs,
            server=partial(_describe, reloader, started),
        )
        if not worker:
            await enter(open_operator_socket(operator, settings.admin_socket))
        shared = worker is not None
        server = None
        if settings.grpc:
            server = await enter(
                open_server(
                    services,
                    server_options(settings, shared, configuration.certificate, observers),
                    proof=gateway_proof(secret, previous),
                    readiness=readiness,
                    report_connections=partial(metrics.watch_connections, "grpc"),
                )
            )
        rest = None
        certificate = configuration.certificate
        tls = ReplaceableContext(certificate) if certificate is not None else None
        metrics.watch_certificate(lambda: None if tls is None else tls.certificate.ends)
        if settings.rest:
            rest = await enter(
                open_rest_of(
                    services,
                    settings,
                    tls,
                    metrics,
                    readiness,
                    shared,
                    observers=observers,
                    catalog=lambda: reloader.configuration.registry.catalog,
                )
            )
            media.public_url = media.public_url or rest_url(settings, rest)

        def apply(new: Configuration, providers: Mapping[str, Provider]) -> None:
            access.configure(new.plans, new.registry.catalog)
            models.configure(new.registry.catalog)
            metrics.know_models(new.registry.catalog.models)
            metrics.know_providers(_configured(providers))
            operator.configure(new.plans, new.registry.catalog.models)
            router.configure(providers, new.registry.catalog.models.values())
            if tls is not None and new.certificate is not None:
                tls.replace(new.certificate)
                if server is not None:
                    server.replace_certificate(new.certificate)

        reloader.apply = apply

        async def reload(load: Callable[[], Settings]) -> None:
            await reloader.reload(load)
            if isinstance(opened, Fleet):
                with contextlib.suppress(PomeloError):  # the next comparison is that of an earlier state
                    await opened.register(await describe(opened))

        try:
            yield App(
                settings=settings,
                configured=_configured(providers),
                store=store,
                keyring=keyring,
                draining=draining,
                connections=connections,
                services=services,
                operator=operator,
                rest=rest,
                grpc=server.address if server else None,
                reload=reload,
            )
        finally:
            readiness.drain()
            if server is not None:
                server.drain()
            await drain(draining, settings.grace)


@asynccontextmanager
async def open_gateway(
    settings: Settings,
    target: str,
    *,
    tls: bool | None = None,
    ca: Path | None = None,
    reloader: GatewayReloader | None = None,
    observers: Sequence[Observer] = (),
    metrics: Metrics | None = None,
    readiness: Readiness | None = None,
) -> AsyncIterator[tuple[str, int]]:
    """Serves only REST, for the gRPC server at `target`; yields the bound address. Leaving drains.

    `tls` None: uses TLS unless the server is on this machine. `ca` is the trusted authority (None: the
    well-known ones); a server that asks for a certificate gets that of the settings. `reloader` has the
    certificate for callers and the catalogue (None: those of the settings). With the server's root secret,
    the server recognises this gateway. `observers` get reports of calls, `metrics` what is counted.
    `readiness` follows the server, and is what health checks report.

    Raises:
        OSError: the address is in use, or a TLS file can't be read.
        pomelo.settings.SettingsError: the root secret in the data folder or the catalogue can't be used.
    """
    if tls is None:
        tls = not is_here(target)
    client_tls = Tls(ca=ca, cert=settings.tls_cert, key=settings.tls_key)
    secret = settings.shared_secret()
    reloader = reloader or GatewayReloader(settings)
    if secret is None:
        log.warning(
            "POMELO_SECRET is not set: the server can't recognise this gateway, and usage records will say "
            "grpc instead of rest. Set it to the server's root secret"
        )
    metrics, readiness = metrics or Metrics(), readiness or Readiness()
    draining = Draining()
    calls = InFlight(in_flight(settings))
    metrics.watch_calls(calls)
    callers_tls = reloader.tls
    metrics.watch_certificate(lambda: None if callers_tls is None else callers_tls.certificate.ends)
    async with (
        measure_process(metrics, readiness),
        open_remote(
            target,
            tls=client_tls if tls else None,
            in_flight=calls,
            proof=gateway_proof(secret),  # a gateway only makes proofs, with its current secret
            readiness=readiness,
        ) as services,
        # A server that does not recognise the gateway applies an inline limit that is unknown here.
        open_rest_of(
            draining.guard(services),
            settings,
            callers_tls,
            metrics,
            readiness,
            inline_limit=INLINE_LIMIT if secret else 0,
            observers=(metrics, *observers),
            catalog=lambda: reloader.catalog,
        ) as rest,
    ):
        try:
            yield rest
        finally:
            readiness.drain()
            await drain(draining, settings.grace)


def _describe(reloader: Reloader, started: float) -> GetServerResponse:
    start_time = times.to_timestamp(started)
    providers = sorted(_configured(reloader.providers))
    settings = reloader.settings
    return GetServerResponse(
        version=pomelo.__version__,
        start_time=start_time,
        providers=providers,
        addresses=filter(None, (settings.rest, settings.grpc, settings.admin)),
    )


def _configured(providers: Mapping[str, Provider]) -> frozenset[str]:
    """The names of the providers that live keys can use."""
    return frozenset(name for name in providers if providers[name].configured) - {SANDBOX}


@asynccontextmanager
async def _maintain(ledger: Ledger) -> AsyncIterator[None]:
    """Saves the progress of running tasks and reconciles reservations. On leaving, waits for unfinished store
    operations."""
    try:
        async with in_background(ledger.keep_progress()), in_background(ledger.keep_reconciled()):
            yield
    finally:
        await ledger.operations.close()
