"""Which providers there are: the built-in ones, those of plug-ins, and the hosts of the catalogue.

The composition root and `pomelo doctor` call `read`; `open_providers` opens what it found. A plug-in is a
package with an entry point of the group `pomelo.providers`, whose name is the provider's and whose object is
its class. No vendor is known here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pomelo.catalog.catalog import BUILTIN as BUILTIN_CATALOG
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.check import routes, tables
from pomelo.catalog.rows import LIMITS, RouteRow, row_faults, suggest
from pomelo.catalog.toml_file import Fault, Keys, TomlFile
from pomelo.providers import BUILTIN, GROUP, SANDBOX, Credentials
from pomelo.providers.base import Probe, Provider
from pomelo.providers.chat.compatible import Compatible, HostRow, host
from pomelo.providers.http.client import Http

_HOST_PROBE = Probe("/models")


@dataclass(frozen=True, slots=True)
class Entry:
    """A provider that can be opened.

    `base_url` is where its API begins unless the operator says otherwise (empty: the operator must).
    `account` names the provider whose key and base URL it uses, empty: its own. `probe` None: there is
    nothing to ask that costs nothing. `options` are the types of what it reads of a route, None: it doesn't
    say. `task_types` are those that it has a method for, None: a plug-in's, which may make methods as it
    likes.
    """

    name: str
    make: Callable[[Credentials, Http], Provider]
    base_url: str = ""
    account: str = ""
    key_needed: bool = True
    probe: Probe | None = None
    options: type[BaseModel] | None = None
    task_types: frozenset[str] | None = None

    def located(self, credentials: Mapping[str, Credentials]) -> Credentials:
        """Its credentials among those of all accounts, with the base URL that holds."""
        given = credentials.get(self.account or self.name, Credentials(None))
        return given if given.base_url else Credentials(given.api_key, self.base_url)


@dataclass(frozen=True, slots=True)
class Registry:
    """The models, and the providers that there are for them; the sandbox is not among these."""

    catalog: Catalog
    entries: Mapping[str, Entry]


def read_registry(own: Path | None = None, plugged: Collection[EntryPoint] | None = None) -> Registry:
    """Reads the catalogues and finds the providers.

    `own` is the operator's catalogue, whose entries replace all others; those of plug-ins replace none.
    `plugged` are the plug-ins, those that are installed where it is None.

    Raises:
        ValueError: a plug-in can't be loaded, two things have one name, or rows are wrong; the message has a
            line for each. OSError: `own` can't be read.
    """
    entries = {}
    for name, reference in BUILTIN.items():
        built_in = _load(reference)
        entries[name] = replace(_entry(name, built_in), task_types=_task_types(built_in))
    files = [BUILTIN_CATALOG]
    for point in entry_points(group=GROUP) if plugged is None else plugged:
        if point.name in entries or point.name == SANDBOX:
            raise ValueError(f"the plug-in {point.value} calls itself {point.name}, and another one does")
        provider = _plugged(point)
        entries[point.name] = _entry(point.name, provider)
        if (brought := getattr(provider, "catalog", None)) is not None:
            _check_new(point, _path(point, brought), files)
            files.append(Path(brought))
    catalog = Catalog.load(
        *files, *([own] if own is not None else []), check=lambda read: list(_faults(read, entries))
    )
    return Registry(catalog, entries | {name: _host(name, dict(row)) for name, row in catalog.hosts.items()})


def _plugged(point: EntryPoint) -> Any:
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a stranger's module does when it is imported
        failure = ValueError(f"the plug-in {point.name} ({point.value}) can't be loaded: {error!r}")
        raise failure from error


def _path(point: EntryPoint, brought: Any) -> Path:
    if not isinstance(brought, str | Path) or not Path(brought).is_file():
        raise ValueError(f"the plug-in {point.name}: its catalog names no file")
    return Path(brought)


def _check_new(point: EntryPoint, brought: Path, files: list[Path]) -> None:
    """A package must not change what a name costs or who answers it.

    Raises:
        ValueError: it would.
    """
    new, before = TomlFile.read(brought), [TomlFile.read(path) for path in files]
    for kind in ("models", "hosts"):
        there = {name for file in before for name, _ in tables(file, kind)}
        taken = sorted(there & {name for name, _ in tables(new, kind)})
        if taken:
            raise ValueError(
                f"the plug-in {point.name} brings {', '.join(taken)}, which is there already. Only a "
                "catalogue of your own may replace an entry: set POMELO_CATALOG"
            )


def _faults(files: Sequence[TomlFile], entries: Mapping[str, Entry]) -> Iterator[Fault]:
    """What is wrong with hosts, and with the providers of routes and what they read."""
    hosts = {name for file in files for name, _ in tables(file, "hosts")}
    known = [*entries, *sorted(hosts - entries.keys())]
    for file in files:
        for name, row in tables(file, "hosts"):
            keys = ("hosts", name)
            if name in entries or name == SANDBOX:
                yield file.fault(keys, "a provider has that name. Choose another one")
            if isinstance(row, dict):
                yield from row_faults(file, keys, HostRow, row)
                account = row.get("credentials")
                if isinstance(account, str) and account and account not in known:
                    yield file.fault(
                        (*keys, "credentials"), f"no provider is called {account}. {suggest(account, known)}"
                    )
        for name, row in tables(file, "models"):
            for index, route in routes(row):
                place: Keys = ("models", name, "routes", index)
                provider = route.get("provider")
                if not isinstance(provider, str) or not provider:
                    continue  # reported as of a wrong type
                if provider in known:
                    entry = entries.get(provider)
                    declared = (
                        (entry.options, entry.task_types)
                        if entry is not None
                        else (Compatible.options, _task_types(Compatible))
                    )
                    yield from _route_faults(file, place, row, route, *declared)
                else:
                    said = f"no provider is called {provider[:100]}. {suggest(provider, known)}"
                    yield file.fault((*place, "provider"), said)


def _route_faults(
    file: TomlFile,
    keys: Keys,
    row: dict[str, Any],
    route: dict[str, Any],
    declared: type[BaseModel] | None,
    task_types: frozenset[str] | None,
) -> Iterator[Fault]:
    """What is wrong with a route by what its provider declares."""
    task_type = row.get("type")
    known = isinstance(task_type, str) and task_type in LIMITS
    if known and task_types is not None and task_type not in task_types:
        said = (
            f"{route['provider']} has no tasks of type {task_type}. It has: {', '.join(sorted(task_types))}"
        )
        yield file.fault((*keys, "provider"), said)
    if declared is not None:
        common = RouteRow.model_fields
        options = {key: value for key, value in route.items() if key not in common}
        yield from row_faults(file, keys, declared, options, common)


def _entry(name: str, provider: Any) -> Entry:
    """The entry of a provider by its class.

    Raises:
        ValueError: what it declares is of a wrong type.
    """
    base_url, probe = getattr(provider, "base_url", ""), getattr(provider, "probe", None)
    options = getattr(provider, "options", None)
    if not isinstance(base_url, str):
        raise ValueError(f"the provider {name}: base_url must be text")
    if not (probe is None or isinstance(probe, Probe)):
        raise ValueError(f"the provider {name}: probe must be a Probe")
    if not (options is None or (isinstance(options, type) and issubclass(options, BaseModel))):
        raise ValueError(f"the provider {name}: options must be a subclass of pomelo.providers.base.Options")
    return Entry(name, provider, base_url=base_url, probe=probe, options=options)


def _task_types(provider: type) -> frozenset[str]:
    return frozenset(name for name in LIMITS if hasattr(provider, name))


def _host(name: str, row: dict[str, Any]) -> Entry:
    base_url, account = row.pop("base_url", ""), row.pop("credentials", "")
    profile = host(name, row)
    return Entry(
        name,
        partial(Compatible, profile=profile),
        base_url=base_url,
        account=account,
        key_needed=profile.key_needed,
        probe=_HOST_PROBE,
        options=Compatible.options,
        task_types=_task_types(Compatible),
    )


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
