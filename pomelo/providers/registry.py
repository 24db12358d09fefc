"""Finds all providers: the built-in ones, those of plug-ins, and the hosts of the catalogue.

A plug-in is a package with an entry point of the group `pomelo.providers`. The name of the entry point is the
provider's, its object is the provider's class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pomelo.catalog.catalog import BUILTIN as BUILTIN_CATALOG
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.check import routes, tables
from pomelo.catalog.rows import RouteRow, row_faults, suggest
from pomelo.catalog.task_types import TASK_TYPE_ROWS
from pomelo.catalog.toml_file import Fault, Keys, TomlFile
from pomelo.providers import BUILTIN, GROUP, SANDBOX, Credentials, Unusable
from pomelo.providers.base import Probe, Provider
from pomelo.providers.chat.compatible import Compatible, HostRow, host
from pomelo.providers.http.client import Http


@dataclass(frozen=True, slots=True)
class Entry:
    """A provider that can be opened.

    `base_url` is the default address of its API; if it is empty, the operator must set one. `account` is the
    provider whose key and base URL it uses, empty for its own. `probe` is a request that costs nothing, or
    None. `options` declares the route keys that it reads, or None. `task_types` are those that it has a
    method for; None for a plug-in, which may create its methods dynamically.
    """

    name: str
    make: Callable[[Credentials, Http], Provider]
    base_url: str = ""
    account: str = ""
    key_needed: bool = True
    probe: Probe | None = None
    options: type[BaseModel] | None = None
    settings: type[BaseModel] | None = None
    task_types: frozenset[str] | None = None
    is_plugin: bool = False

    def located(self, credentials: Mapping[str, Credentials]) -> Credentials:
        """Return its credentials among those of all accounts, with the default base URL if they have none."""
        own = credentials.get(self.account or self.name, Credentials(None))
        return own if own.base_url else replace(own, base_url=self.base_url)


@dataclass(frozen=True, slots=True)
class Registry:
    """The models, and the providers by name, without the sandbox. `broken` has the plug-ins that can't be
    used: name -> why, in one line. They are among the providers, but not configured; a plug-in that has
    only a wrong catalogue has no models."""

    catalog: Catalog
    entries: Mapping[str, Entry]
    broken: Mapping[str, str] = field(default_factory=dict)


def read_registry(
    own: Path | None = None, plugins: Collection[EntryPoint] | None = None, *, tolerant: bool = False
) -> Registry:
    """Read the catalogues and find the providers.

    `own` is the operator's catalogue, whose entries replace all others; those of plug-ins replace none.
    `plugins` are the entry points to load; None: all that are installed. `tolerant`: a plug-in that can't be
    used is reported in `broken`, and all others work.

    Raises:
        ValueError: a plug-in can't be loaded, a name is used twice, or rows are invalid; the message has a
            line for each. OSError: `own` can't be read.
    """
    entries = {}
    for name, reference in BUILTIN.items():
        module, _, class_name = reference.partition(":")
        built_in = getattr(import_module(module), class_name)
        entries[name] = replace(_entry(name, built_in), task_types=_task_types(built_in))
    broken: dict[str, str] = {}
    catalogs: list[tuple[EntryPoint, Any]] = []
    for plugin in entry_points(group=GROUP) if plugins is None else plugins:
        if plugin.name in entries or plugin.name == SANDBOX:
            raise ValueError(
                f"the plug-in {plugin.value}: the name {plugin.name} is used by another provider"
            )
        try:
            provider = _load(plugin)
            entries[plugin.name] = replace(_entry(plugin.name, provider), is_plugin=True)
        except ValueError as error:
            if not tolerant:
                raise
            broken[plugin.name] = str(error)
            entries[plugin.name] = Entry(plugin.name, Unusable, is_plugin=True)
        else:
            if (path := getattr(provider, "catalog", None)) is not None:
                catalogs.append((plugin, path))

    check = partial(_faults, entries=entries)
    files = [BUILTIN_CATALOG]
    for plugin, path in catalogs:
        try:
            file = _check_catalog(plugin, path, files)
            if tolerant:
                Catalog.load(*files, file, check=check)
        except (ValueError, OSError) as error:
            if not tolerant:
                raise
            named = "" if str(error).startswith("the plug-in ") else f"the plug-in {plugin.name}: "
            broken[plugin.name] = named + "; ".join(str(error).splitlines())
        else:
            files.append(file)
    catalog = Catalog.load(*files, *([own] if own is not None else []), check=check)
    hosts = {name: _host(name, dict(row)) for name, row in catalog.hosts.items()}
    return Registry(catalog, entries | hosts, broken)


def _load(plugin: EntryPoint) -> Any:
    try:
        return plugin.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the import of a plug-in may raise anything
        failure = ValueError(f"the plug-in {plugin.name} ({plugin.value}) can't be loaded: {error!r}")
        raise failure from error


def _check_catalog(plugin: EntryPoint, path: Any, files: list[Path]) -> Path:
    """Check that a plug-in's catalogue changes neither the price nor the provider of an existing name.

    Raises:
        ValueError: it does, or it is not a file.
    """
    if not isinstance(path, str | Path) or not Path(path).is_file():
        raise ValueError(f"the plug-in {plugin.name}: its catalog is not the path of a file")
    new, existing = TomlFile.read(Path(path)), [TomlFile.read(file) for file in files]
    for table in ("models", "hosts"):
        names = {name for file in existing for name, _ in tables(file, table)}
        taken = sorted(names & {name for name, _ in tables(new, table)})
        if taken:
            raise ValueError(
                f"the plug-in {plugin.name} defines {', '.join(taken)}, which exists already. Only a "
                "catalogue of your own may replace an entry: set POMELO_CATALOG"
            )
    return Path(path)


def _faults(files: Sequence[TomlFile], entries: Mapping[str, Entry]) -> Iterator[Fault]:
    """What is wrong with hosts, and with the providers and the options of routes."""
    hosts = {name for file in files for name, _ in tables(file, "hosts")}
    known = [*entries, *sorted(hosts - entries.keys())]
    for file in files:
        for name, row in tables(file, "hosts"):
            yield from _host_faults(file, name, row, entries, known)
        for name, row in tables(file, "models"):
            for index, route in routes(row):
                keys: Keys = ("models", name, "routes", index)
                provider = route.get("provider")
                if provider in known:
                    yield from _route_faults(file, keys, row, route, entries.get(provider, _HOST))
                elif isinstance(provider, str) and provider:  # otherwise it is reported as a wrong type
                    message = f"no provider is called {provider[:100]}. {suggest(provider, known)}"
                    yield file.fault((*keys, "provider"), message)


def _host_faults(
    file: TomlFile, name: str, row: Any, entries: Mapping[str, Entry], known: Collection[str]
) -> Iterator[Fault]:
    keys = ("hosts", name)
    if name in entries or name == SANDBOX:
        yield file.fault(keys, "a provider has that name. Choose another name")
    if isinstance(row, dict):
        yield from row_faults(file, keys, HostRow, row)
        account = row.get("credentials")
        if isinstance(account, str) and account and account not in known:
            message = f"no provider is called {account}. {suggest(account, known)}"
            yield file.fault((*keys, "credentials"), message)


def _route_faults(
    file: TomlFile, keys: Keys, row: dict[str, Any], route: dict[str, Any], entry: Entry
) -> Iterator[Fault]:
    """What contradicts the declarations of a route's provider."""
    task_type, task_types = row.get("type"), entry.task_types
    known = isinstance(task_type, str) and task_type in TASK_TYPE_ROWS
    if known and task_types is not None and task_type not in task_types:
        supported = ", ".join(sorted(task_types))
        message = f"{route['provider']} has no tasks of type {task_type}. It has: {supported}"
        yield file.fault((*keys, "provider"), message)
    if entry.options is not None:
        common = RouteRow.model_fields
        options = {key: value for key, value in route.items() if key not in common}
        yield from row_faults(file, keys, entry.options, options, common)


def _entry(name: str, provider: Any) -> Entry:
    """The entry of a provider's class.

    Raises:
        ValueError: an attribute of the class has a wrong type.
    """
    base_url, probe = getattr(provider, "base_url", ""), getattr(provider, "probe", None)
    if not isinstance(base_url, str):
        raise ValueError(f"the provider {name}: base_url must be text")
    if not (probe is None or isinstance(probe, Probe)):
        raise ValueError(f"the provider {name}: probe must be a Probe")
    options, settings = _declared(name, provider, "options"), _declared(name, provider, "settings")
    if settings is not None and any(field.is_required() for field in settings.model_fields.values()):
        raise ValueError(f"the provider {name}: each of its settings must have a default")
    return Entry(name, provider, base_url=base_url, probe=probe, options=options, settings=settings)


def _declared(name: str, provider: Any, attribute: str) -> type[BaseModel] | None:
    found = getattr(provider, attribute, None)
    if not (found is None or (isinstance(found, type) and issubclass(found, BaseModel))):
        raise ValueError(
            f"the provider {name}: {attribute} must be a subclass of pomelo.providers.base.Options"
        )
    return found


def _task_types(provider: type) -> frozenset[str]:
    return frozenset(name for name in TASK_TYPE_ROWS if hasattr(provider, name))


_HOST = Entry(
    "", Unusable, probe=Compatible.probe, options=Compatible.options, task_types=_task_types(Compatible)
)
"""What the entries of all hosts of the catalogue have."""


def _host(name: str, row: dict[str, Any]) -> Entry:
    base_url, account = row.pop("base_url", ""), row.pop("credentials", "")
    profile = host(name, row)
    return replace(
        _HOST,
        name=name,
        make=partial(Compatible, profile=profile),
        base_url=base_url,
        account=account,
        key_needed=profile.key_needed,
    )
