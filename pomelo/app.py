"""The composition root: builds the house from settings, and opens its doors.

`open_app` is the whole program, `open_gateway` the REST door alone before a remote server. Nothing here
is global; two apps can live in one process. Keyword seams let a test put another part in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from gateway.app import open_rest
from gateway.state import IDLE_TIMEOUT, INLINE_LIMIT, PROXY_IDLE_TIMEOUT, GatewayOptions
from pomelo.accounts.access import Access
from pomelo.accounts.accounts import AccountAdmin, LocalAccounts
from pomelo.accounts.failed_keys import FailedKeys
from pomelo.accounts.keys import Keyring
from pomelo.accounts.operator import LocalOperator
from pomelo.accounts.plans import BUILTIN, Plan
from pomelo.accounts.usage import UsageReader
from pomelo.catalog import retirement
from pomelo.catalog.catalog import Catalog
from pomelo.draining import Draining
from pomelo.engine.acceptance import Acceptance
from pomelo.engine.engine import Engine
from pomelo.engine.ledger import RECONCILE_INTERVAL, Ledger
from pomelo.engine.models import LocalModels
from pomelo.engine.routing import Router
from pomelo.in_flight import InFlightLimits
from pomelo.logs import format_trace
from pomelo.media.duration import Measurer
from pomelo.media.local import LocalMedia
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.origin import GatewayProof
from pomelo.providers import SANDBOX, Credentials, open_providers
from pomelo.providers.base import Provider
from pomelo.providers.http.client import Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.providers.registry import Registry, read_registry
from pomelo.secrets import derive_key
from pomelo.server.call_limits import CallLimits
from pomelo.server.connection_limits import ConnectionLimits
from pomelo.server.remote import Tls, open_remote
from pomelo.server.server import ServerOptions, open_admin, open_server
from pomelo.service import Services
from pomelo.settings import Settings, SettingsError, is_loopback
from pomelo.stores import open_store
from pomelo.stores.base import Store
from pomelo.turns import Turns

log = logging.getLogger("pomelo.app")

ANSWERS_OUT = 2.0
"""Seconds that the doors get to send what is left, once the tasks have ended or were ended."""

SWEEP_EVERY = 10.0
"""Seconds between scans of the media, which delete what has expired and find what other processes stored."""

SWEEP_SHARE = 0.05
"""The largest share of the time that scans take: with very many media they are rarer."""


@dataclass(frozen=True, slots=True)
class App:
    """A running Pomelo. An address is None where its door is off; `configured` are the names of the providers
    that can be asked with a live key; `connections` are those to vendors."""

    settings: Settings
    configured: frozenset[str]
    store: Store
    keyring: Keyring
    draining: Draining
    connections: ConnectionLimiter
    services: Services
    rest: tuple[str, int] | None
    grpc: str | None


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
    worker: int | None = None,
) -> AsyncIterator[App]:
    """Builds and serves everything; leaving drains: what runs may end within the grace, nothing new comes in.

    `now` is Unix time, for media, answers and reported limits; a store has its own. Every
    `reconcile_every` seconds, it looks for reservations whose task no process runs. `worker` is the number of
    this process among several that share the addresses, None if it is alone; the first serves the operator.

    Raises:
        OSError: an address is taken.
        pomelo.settings.SettingsError, pomelo.errors.PomeloError: the data folder can't be used.
    """
    async with AsyncExitStack() as stack:
        secret = settings.root_secret()
        store = wrap_store(await stack.enter_async_context(store_of(settings)))
        keyring = Keyring(store, secret, failed_keys=failed_keys)
        registry = find_providers(settings)
        connections = ConnectionLimiter(settings.upstream_connections)
        turns = Turns()
        if providers is None:
            opening = open_providers(
                registry.entries.values(),
                credentials(settings, registry),
                timeouts=timeouts,
                origins=settings.delivery_origins,
                connections=connections,
                turns=turns,
            )
            try:
                providers = await stack.enter_async_context(opening)
            except ValueError as error:
                raise SettingsError(str(error)) from error
        catalog = catalog or registry.catalog
        if not worker:
            for notice in retirement.notices(catalog, datetime.fromtimestamp(now(), UTC).date()):
                if notice.is_past:
                    log.warning("%s. It is still called where no other route is left", notice)
        plans = plans or find_plans(settings, catalog)
        ledger = Ledger(store, plans, now=now, reconcile_every=reconcile_every)
        await stack.enter_async_context(_background(ledger))
        access = Access(keyring, plans, catalog, ledger, _in_flight(settings))
        media = MediaStore(
            settings.data / "media",
            secret,
            public_url=settings.public_url,
            limits=MediaLimits(
                settings.media_limit, settings.media_account_limit, reserve=settings.disk_reserve
            ),
            now=now,
        )
        await media.refresh()
        await stack.enter_async_context(_beside(_sweep(media)))
        measurer = Measurer()
        stack.push_async_callback(measurer.aclose)
        router = make_router(providers)
        acceptance = Acceptance(
            access=access,
            router=router,
            media=media,
            measurer=measurer,
            inline_limit=settings.inline_limit,
            now=now,
        )
        usage = UsageReader(store, secret)
        office = AccountAdmin(store, plans, plan_changed=keyring.forget_account)
        draining = Draining()
        services = draining.guard(
            Services(
                tasks=Engine(access, acceptance, ledger, router, media, turns),
                models=LocalModels(catalog, router, access),
                media=LocalMedia(media, access, settings.upload_limit, turns=turns),
                accounts=LocalAccounts(store, usage, access),
                access=access,
            )
        )
        operator = LocalOperator(store, keyring, office, usage, catalog.models, now, runs=ledger.runs)
        if not worker:
            await stack.enter_async_context(open_admin(operator, settings.admin_socket))
        shared = worker is not None
        server = None
        if settings.grpc:
            server = await stack.enter_async_context(
                open_server(services, _server_options(settings, shared), proof=gateway_proof(secret))
            )
        rest = None
        if settings.rest:
            rest = await stack.enter_async_context(_rest(services, settings, draining, shared))
            media.public_url = media.public_url or _url(settings, rest)
        try:
            yield App(
                settings=settings,
                configured=frozenset(name for name in providers if providers[name].configured) - {SANDBOX},
                store=store,
                keyring=keyring,
                draining=draining,
                connections=connections,
                services=services,
                rest=rest,
                grpc=server.address if server else None,
            )
        finally:
            if server is not None:
                server.drain()
            await _end(draining, settings.grace)


def store_of(settings: Settings) -> AbstractAsyncContextManager[Store]:
    """The store of the settings, opened on entering.

    Raises:
        pomelo.stores.base.StoreError: on entering: it can't be used.
    """
    return open_store(settings.store_url(), archive=settings.archive_url())


def find_providers(settings: Settings) -> Registry:
    """The models, and the providers that there are for them.

    Raises:
        SettingsError: a plug-in, the operator's catalogue or a setting of a provider can't be used.
    """
    try:
        registry = read_registry(settings.catalog)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(
            f"{error.filename}: can't be read: {error.strerror}. Set POMELO_CATALOG"
        ) from error
    settings.check_providers(registry.entries)
    return registry


def find_plans(settings: Settings, catalog: Catalog) -> dict[str, Plan]:
    """The built-in plans, and the operator's, which may replace them.

    Raises:
        SettingsError: one of the operator's names a model that there is not.
    """
    plans = dict(BUILTIN)
    for name, given in settings.plans.items():
        for model in given.models or ():
            if model not in catalog.models:
                raise SettingsError(f"plans.{name}.models: there is no model {model[:100]}")
        plans[name] = Plan(
            name,
            requests=given.requests_per_minute,
            concurrent=given.concurrent_requests,
            tokens=given.tokens_per_minute,
            models=frozenset(given.models) if given.models is not None else None,
        )
    return plans


def credentials(settings: Settings, registry: Registry) -> dict[str, Credentials]:
    """What the operator gives for each provider that there is.

    Raises:
        SettingsError: a variable has a wrong value.
    """
    given = {name: settings.provider(name) for name in registry.entries}
    return {name: Credentials(one.api_key, one.base_url) for name, one in given.items()}


@asynccontextmanager
async def open_gateway(
    settings: Settings, target: str, *, tls: bool | None = None, ca: Path | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Serves REST alone, before the gRPC server at `target`; gives the bound address. Leaving drains.

    `tls` None: connects to a server on another machine with TLS, unless the settings allow plaintext.
    `ca` is the authority to trust (None: the well-known ones); a server that asks for a certificate gets
    the settings' own. With the server's root secret the gateway proves that it is a gateway.

    Raises:
        OSError: the address is taken, or a TLS file can't be read.
        pomelo.settings.SettingsError: the root secret in the data folder can't be used.
    """
    if tls is None:
        near = target.startswith("unix:") or is_loopback(target.rpartition(":")[0].strip("[]"))
        tls = not near and not settings.insecure
    shown = Tls(ca=ca, cert=settings.tls_cert, key=settings.tls_key)
    secret = settings.shared_secret()
    if secret is None:
        log.warning(
            "POMELO_SECRET is not set: the server can't recognise this gateway, and usage records will say "
            "grpc instead of rest. Set it to the server's root secret"
        )
    draining = Draining()
    async with (
        open_remote(
            target,
            tls=shown if tls else None,
            limits=_in_flight(settings),
            proof=gateway_proof(secret),
        ) as services,
        # A server that does not recognise the gateway applies its inline limit, whatever that is.
        _rest(
            draining.guard(services), settings, draining, inline_limit=INLINE_LIMIT if secret else 0
        ) as rest,
    ):
        try:
            yield rest
        finally:
            await _end(draining, settings.grace)


def gateway_proof(secret: bytes | None) -> GatewayProof:
    """Derives the proof by which a server recognises gateways that have the same root secret."""
    return GatewayProof(derive_key(secret, "gateway") if secret is not None else None)


async def _end(draining: Draining, grace: float) -> None:
    """Lets what runs end within the grace, and ends the rest."""
    draining.drain()
    await _within(grace, draining.idle())
    draining.stop()
    await _within(ANSWERS_OUT, draining.idle())


async def _within(seconds: float, done: Awaitable[None]) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await done


@asynccontextmanager
async def _rest(
    services: Services,
    settings: Settings,
    draining: Draining,
    shared: bool = False,
    inline_limit: int = INLINE_LIMIT,
) -> AsyncIterator[tuple[str, int]]:
    host, port = settings.rest_address()
    options = GatewayOptions(
        public_url=settings.public_url,
        json_limit=settings.json_limit,
        upload_limit=settings.upload_limit,
        inline_limit=inline_limit,
        max_connections=settings.max_connections,
        cors_origins=settings.cors_origins,
        idle_timeout=settings.idle_timeout or IDLE_TIMEOUT,
        proxy_idle_timeout=settings.idle_timeout or PROXY_IDLE_TIMEOUT,
        trusted_proxies=_trusted_proxies(settings),
        drain_timeout=ANSWERS_OUT,
    )
    async with open_rest(
        services,
        options,
        host,
        port,
        ssl_context=_tls(settings),
        reuse_port=shared,
        healthy=lambda: not draining.draining,
    ) as address:
        yield address


def _url(settings: Settings, address: tuple[str, int]) -> str:
    host, port = address
    return f"{'https' if settings.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not settings.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_cert, settings.tls_key)
    return context


def _in_flight(settings: Settings) -> InFlightLimits:
    """How many calls may be in flight; one account has at most half of them."""
    return InFlightLimits(calls=settings.max_calls, account_calls=max(1, settings.max_calls // 2))


def _server_options(settings: Settings, shared: bool) -> ServerOptions:
    return ServerOptions(
        address=settings.grpc,
        grace=ANSWERS_OUT,
        # Any body that REST takes, and inline sound, with room for what is around them.
        limits=CallLimits(message=max(settings.json_limit, settings.inline_limit) + 1024 * 1024),
        tls_cert=settings.tls_cert,
        tls_key=settings.tls_key,
        tls_client_ca=settings.tls_client_ca,
        reuse_port=shared,
        connections=ConnectionLimits(trusted=_trusted_proxies(settings)),
    )


def _trusted_proxies(settings: Settings) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(map(ip_network, settings.trusted_proxies))


@asynccontextmanager
async def _background(ledger: Ledger) -> AsyncIterator[None]:
    """Saves the progress of running tasks and reconciles reservations. On leaving, waits for unfinished store
    operations."""
    try:
        async with _beside(ledger.keep_progress()), _beside(ledger.keep_reconciled()):
            yield
    finally:
        await ledger.operations.idle()


async def _sweep(media: MediaStore) -> None:
    """Deletes expired media and counts the others, again and again, until it is cancelled."""
    took = 0.0
    while True:
        await asyncio.sleep(max(SWEEP_EVERY, took / SWEEP_SHARE))
        started = time.monotonic()
        try:
            await media.refresh()
        except Exception as error:  # a disk error may be gone at the next scan
            log.error("expired media were not deleted\n%s", format_trace(error))
        took = time.monotonic() - started


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Does `work` beside the body, and ends it on leaving."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
