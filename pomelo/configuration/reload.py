"""Replaces the configuration of a running application: the catalogue, plans, providers and TLS certificate.

A new configuration is read and checked whole before anything changes; if it can't be used, the
previous one stays in use. Running tasks keep the model, route and provider that they began with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from pomelo.catalog.catalog import Catalog
from pomelo.configuration import Configuration, find_catalog, find_certificate, read_configuration
from pomelo.network.tls import ReplaceableContext
from pomelo.providers import Credentials, Unusable
from pomelo.providers.base import Provider
from pomelo.settings import Settings, SettingsError, variable

RELOADED = frozenset(
    {
        *("catalog", "delivery_origins", "plans", "providers", "variables"),
        *("tls_cert", "tls_key", "tls_client_ca"),
    }
)
"""The settings that can change in a running process."""

_CHECK_INTERVAL = 1.0
"""Seconds between two looks whether the tasks that use replaced providers have ended."""

_CERTIFICATE_CHANGED = "TLS certificate changed"

log = logging.getLogger("pomelo.reload")

Providers = Mapping[str, Provider]

Reload = Callable[[Callable[[], Settings]], Awaitable[None]]


def merge(running: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """Returns the settings that a process which runs with `running` can change to, and the variables of all
    other changes, which need a restart."""
    fixed = Settings.model_fields.keys() - RELOADED
    for names in (("tls_cert", "tls_key"), ("tls_client_ca",)):
        if (getattr(running, names[0]) is None) != (getattr(new, names[0]) is None):
            fixed.update(names)  # TLS can't be turned on or off
    changed = [name for name in fixed if not _is_equal(name, getattr(running, name), getattr(new, name))]
    values = {name: getattr(new, name) for name in RELOADED - fixed}
    return running.model_copy(update=values), sorted(map(variable, changed))


def _is_equal(name: str, running: Any, new: Any) -> bool:
    if (
        name in ("rest", "grpc", "admin") and running and new.endswith(":0")
    ):  # any free port, such as the one in use
        return True
    return bool(running == new)


async def read_changes(
    running: Settings, load: Callable[[], Settings]
) -> tuple[Settings, Configuration, list[str]]:
    """Reads, in a thread, what a process that runs with `running` changes to: the settings, their
    configuration, and the variables that need a restart.

    Raises:
        SettingsError: it can't be used.
    """

    def read() -> tuple[Settings, Configuration, list[str]]:
        settings, fixed = merge(running, load())
        return settings, read_configuration(settings), fixed

    return await asyncio.to_thread(read)


def log_refusal(error: SettingsError) -> None:
    lines = "; ".join(str(error).splitlines())
    log.error("The configuration was not reloaded, and the previous one stays in use: %s", lines)


class Reloader:
    """Holds the configuration of a running application and its providers, and replaces them.

    `open_providers` is that of `pomelo.providers`. `running` returns the tasks that run now. `is_first`: this
    process reports what has changed; other workers report only what they refuse. `apply` puts a configuration
    into effect for tasks that begin from then on; it must neither await nor fail.
    """

    def __init__(
        self,
        settings: Settings,
        configuration: Configuration,
        open_providers: Callable[..., AbstractAsyncContextManager[Providers]],
        running: Callable[[], Collection[object]],
        *,
        is_first: bool = True,
    ) -> None:
        self.apply: Callable[[Configuration, Providers], None] = lambda configuration, providers: None
        self.settings = settings
        self.configuration = configuration
        self._open_providers = open_providers
        self._running = running
        self._is_first = is_first
        self.providers: Providers = {}
        self._opened = AsyncExitStack()
        self._closing: dict[asyncio.Task[None], AsyncExitStack] = {}
        """The tasks that close replaced providers."""

    @asynccontextmanager
    async def open(self, providers: Providers | None = None) -> AsyncIterator[Providers]:
        """Opens the providers, unless they are given. Leaving closes them and all that have replaced them.
        A plug-in that can't be used is logged, and affects only its own models.

        Raises:
            SettingsError: a provider can't be opened.
        """
        for name, reason in self.configuration.registry.broken.items():
            self._log_broken(name, reason)
        self.providers = providers or await self._open(
            self._opened, self.settings, self.configuration, self._log_broken
        )
        try:
            yield self.providers
        finally:
            closing = dict(self._closing)
            for task in closing:
                task.cancel()
            await asyncio.gather(*closing, return_exceptions=True)
            for opened in closing.values():
                await opened.aclose()  # a task that was cancelled before its first step has closed nothing
            await self._opened.aclose()

    async def reload(self, load: Callable[[], Settings]) -> None:
        """Replaces the configuration by that of the settings that `load` returns, and logs what has changed.
        One that can't be used is refused as a whole, and logged. Not to be called concurrently."""
        opened, providers = self._opened, self.providers
        try:
            settings, new, fixed = await read_changes(self.settings, load)
            for name in new.registry.broken.keys() - self.configuration.registry.broken.keys():
                raise SettingsError(new.registry.broken[name])
            if self._changes_providers(settings, new):
                opened = AsyncExitStack()
                providers = await self._open(opened, settings, new, self._refuse_broken)
        except SettingsError as error:
            log_refusal(error)
            return
        changes = list(_changes(self.configuration, new))
        if settings.delivery_origins != self.settings.delivery_origins:
            changes.append("delivery origins changed")
        self.apply(new, providers)
        if opened is not self._opened:
            task = asyncio.create_task(self._close(self._opened, set(self._running())))
            self._closing[task] = self._opened
            task.add_done_callback(self._closing.pop)
        self.settings, self.configuration = settings, new
        self._opened, self.providers = opened, providers
        if self._is_first:
            _log_reloaded(changes, fixed)

    def _log_broken(self, name: str, reason: str) -> None:
        if self._is_first:
            log.error("A plug-in can't be used, and its models are not available: %s", reason)

    def _refuse_broken(self, name: str, reason: str) -> None:
        """Raises ValueError if the plug-in worked before: then its models should go on."""
        if not isinstance(self.providers.get(name), Unusable):
            raise ValueError(reason)

    async def _open(
        self,
        stack: AsyncExitStack,
        settings: Settings,
        configuration: Configuration,
        on_broken: Callable[[str, str], None],
    ) -> Providers:
        opening = self._open_providers(
            configuration.registry.entries.values(),
            configuration.credentials,
            origins=settings.delivery_origins,
            on_broken=on_broken,
        )
        try:
            return await stack.enter_async_context(opening)
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def _changes_providers(self, settings: Settings, new: Configuration) -> bool:
        old = self.configuration
        return (
            settings.delivery_origins != self.settings.delivery_origins
            or new.credentials != old.credentials
            or new.registry.catalog.hosts != old.registry.catalog.hosts
        )

    async def _close(self, opened: AsyncExitStack, tasks: set[object]) -> None:
        """Closes replaced providers when the `tasks` that may use them have ended."""
        try:
            while tasks.intersection(self._running()):  # noqa: ASYNC110 (it has no event)
                await asyncio.sleep(_CHECK_INTERVAL)
        finally:
            await opened.aclose()


class GatewayReloader:
    """Holds the settings of a running gateway, its catalogue and the certificate that callers get, and
    replaces them.

    Raises:
        SettingsError: the files of the certificate or the catalogue can't be used.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.catalog = find_catalog(settings)
        self._certificate = find_certificate(settings)
        self.tls = None if self._certificate is None else ReplaceableContext(self._certificate)
        """None: without TLS."""

    async def reload(self, load: Callable[[], Settings]) -> None:
        """As `Reloader.reload`. Of what can change in a running process, a gateway uses only the certificate
        and the models of the catalogue."""
        try:
            settings, fixed = await asyncio.to_thread(lambda: merge(self._settings, load()))
            certificate = await asyncio.to_thread(find_certificate, settings)
            catalog = await asyncio.to_thread(find_catalog, settings)
        except SettingsError as error:
            log_refusal(error)
            return
        changes = list(_model_changes(self.catalog, catalog))
        if certificate != self._certificate:
            changes.append(_CERTIFICATE_CHANGED)
        if self.tls is not None and certificate is not None:
            self.tls.replace(certificate)
        self._settings, self._certificate, self.catalog = settings, certificate, catalog
        _log_reloaded(changes, fixed)


def _log_reloaded(changes: Sequence[str], fixed: Sequence[str]) -> None:
    log.info("The configuration was reloaded: %s", "; ".join(changes) or "nothing has changed")
    if fixed:
        log.warning("Restart to apply %s", ", ".join(fixed))


def _changes(old: Configuration, new: Configuration) -> Iterator[str]:
    """What differs, in words. Of credentials only the providers are named."""
    yield from _difference("plans", old.plans, new.plans)
    yield from _model_changes(old.registry.catalog, new.registry.catalog)
    yield from _difference("hosts", old.registry.catalog.hosts, new.registry.catalog.hosts)
    yield from _difference("credentials", _given(old), _given(new))
    if new.certificate != old.certificate:
        yield _CERTIFICATE_CHANGED


def _model_changes(old: Catalog, new: Catalog) -> Iterator[str]:
    return _difference("models", old.models, new.models)


def _given(configuration: Configuration) -> dict[str, Credentials]:
    given = configuration.credentials.items()
    return {name: one for name, one in given if one.api_key or one.base_url or one.settings is not None}


def _difference(name: str, old: Mapping[str, object], new: Mapping[str, object]) -> Iterator[str]:
    for verb, keys in (
        ("added", new.keys() - old.keys()),
        ("removed", old.keys() - new.keys()),
        ("changed", {key for key in old.keys() & new.keys() if old[key] != new[key]}),
    ):
        if keys:
            first = sorted(keys)[:10]
            more = f" and {len(keys) - len(first)} more" if len(keys) > len(first) else ""
            yield f"{name} {verb}: {', '.join(first)}{more}"
