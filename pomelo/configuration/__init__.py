"""What the settings configure for servers and commands alike: store, providers, plans, and TLS."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pomelo import install_command
from pomelo.accounts.plans import BUILTIN, Plan
from pomelo.catalog.catalog import BUILTIN as BUILTIN_CATALOG
from pomelo.catalog.catalog import Catalog
from pomelo.media.quota import MediaLimits
from pomelo.media.store import MediaStore
from pomelo.network.addresses import join_address
from pomelo.network.tls import Certificate, read_certificate
from pomelo.providers import Credentials
from pomelo.providers.registry import Registry, read_registry
from pomelo.settings import Settings, SettingsError, provider_variable
from pomelo.stores import open_store
from pomelo.stores.base import Store

if TYPE_CHECKING:
    from pomelo.media.bucket import Bucket


@dataclass(frozen=True, slots=True)
class Configuration:
    """What a server can replace while it runs."""

    registry: Registry
    credentials: Mapping[str, Credentials]
    plans: Mapping[str, Plan]
    certificate: Certificate | None


def read_configuration(settings: Settings, catalog: Catalog | None = None) -> Configuration:
    """Reads all files that the settings name. `catalog` is used in place of theirs.

    Raises:
        SettingsError: one of them can't be used.
    """
    registry = find_providers(settings)
    if catalog is not None:
        registry = replace(registry, catalog=catalog)
    return Configuration(
        registry,
        credentials(settings, registry),
        find_plans(settings, registry.catalog),
        find_certificate(settings),
    )


def store_of(settings: Settings) -> AbstractAsyncContextManager[Store]:
    """Returns the store, which entering the context opens.

    Raises:
        pomelo.stores.base.StoreError: on entering: the store can't be used.
    """
    return open_store(settings.store_url(), archive=settings.archive_url())


@asynccontextmanager
async def open_media(
    settings: Settings, secret: bytes, previous: Sequence[bytes], now: Callable[[], float]
) -> AsyncIterator[MediaStore]:
    """Opens the media store: the bucket of the settings, or the disk. `secret` is the root secret, `previous`
    are the earlier ones that are still accepted; `now` returns Unix time.

    Raises:
        SettingsError: the bucket can't be used.
        OSError: the folder can't be read.
    """
    limits = MediaLimits(settings.media_limit, settings.media_account_limit, reserve=settings.disk_reserve)
    folder, url = settings.data / "media", settings.public_url
    make: Callable[..., MediaStore] = MediaStore
    if settings.media:
        bucket = await open_bucket(settings)
        from pomelo.media.bucket_store import BucketStore

        make = partial(BucketStore, bucket)
    media = make(folder, secret, previous_secrets=previous, public_url=url, limits=limits, now=now)
    await media.refresh()
    try:
        yield media
    finally:
        await media.aclose()


async def open_bucket(settings: Settings) -> Bucket:
    """Returns the bucket of media, which can be read and written.

    Raises:
        SettingsError: it can't be used.
    """
    try:
        from pomelo.media.bucket import Bucket
    except ImportError:
        message = f"POMELO_MEDIA: a bucket needs another package: {install_command('s3')}"
        raise SettingsError(message) from None
    try:
        bucket = Bucket(settings.media)
        await bucket.check()
    except ValueError as error:
        raise SettingsError(f"POMELO_MEDIA: {settings.media} can't be used: {error}") from None
    return bucket


def find_providers(settings: Settings) -> Registry:
    """Returns the models and their providers, without what plug-ins break.

    Raises:
        SettingsError: the operator's catalogue or a provider's setting can't be used, or two providers have
            the same name or the same variables.
    """
    with _catalog_errors():
        registry = read_registry(settings.catalog, tolerant=True)
    settings.check_providers(registry.entries)
    owners: dict[str, str] = {}
    for name, entry in registry.entries.items():
        variable = provider_variable(name, "api_key")
        if not entry.account and (other := owners.setdefault(variable, name)) != name:
            raise SettingsError(f"{variable} would be the key of both {other} and {name}. Rename one of them")
    return registry


def find_catalog(settings: Settings) -> Catalog:
    """Returns the built-in models and the operator's, without those of plug-ins.

    Raises:
        SettingsError: the operator's catalogue can't be used.
    """
    with _catalog_errors():
        return Catalog.load(BUILTIN_CATALOG, *([settings.catalog] if settings.catalog is not None else []))


@contextmanager
def _catalog_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(
            f"{error.filename}: can't be read: {error.strerror}. Set POMELO_CATALOG"
        ) from error


def credentials(settings: Settings, registry: Registry) -> dict[str, Credentials]:
    """Returns the operator's credentials for each provider, by its name.

    Raises:
        SettingsError: a variable or a setting has a wrong value.
    """
    found = {}
    for name, entry in registry.entries.items():
        one = settings.provider(name)
        key = one.api_key or ""
        if entry.probe is not None and not (key.isascii() and key.isprintable()):  # it is sent in a header
            raise SettingsError(f"{provider_variable(name, 'api_key')} has characters that no key has")
        further = None if name in registry.broken else one.further(name, entry.settings)
        found[name] = Credentials(one.api_key, one.base_url, further)
    return found


def find_plans(settings: Settings, catalog: Catalog) -> dict[str, Plan]:
    """Returns the built-in plans and the operator's, which replace built-in ones of the same name.

    Raises:
        SettingsError: a plan of the operator names an unknown model.
    """
    plans = dict(BUILTIN)
    for name, plan in settings.plans.items():
        for model in plan.models or ():
            if model not in catalog.models:
                raise SettingsError(f"plans.{name}.models: there is no model {model[:100]}")
        plans[name] = Plan(
            name,
            requests=plan.requests_per_minute,
            concurrent=plan.concurrent_requests,
            tokens=plan.tokens_per_minute,
            models=frozenset(plan.models) if plan.models is not None else None,
        )
    return plans


def find_certificate(settings: Settings) -> Certificate | None:
    """Returns the certificate of the servers; None without TLS.

    Raises:
        SettingsError: its files can't be used.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    try:
        return read_certificate(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        raise SettingsError(f"POMELO_TLS_CERT: {error.filename}: {error.strerror}") from error


def rest_url(settings: Settings, address: tuple[str, int]) -> str:
    """Returns the URL of the REST server that listens on `address`."""
    return f"{'https' if settings.tls_cert else 'http'}://{join_address(*address)}"
