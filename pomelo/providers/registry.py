"""Which providers there are: the built-in ones, those of plug-ins, and the hosts of the catalogue.

The composition root and `pomelo doctor` call `read`; `open_providers` opens what it found. A plug-in is a
package with an entry point of the group `pomelo.providers`, whose name is the provider's and whose object is
its class. No vendor is known here.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pomelo.catalog import BUILTIN as BUILTIN_CATALOG
from pomelo.catalog import Catalog
from pomelo.providers import BUILTIN, GROUP, SANDBOX, Credentials
from pomelo.providers.base import Probe, Provider
from pomelo.providers.compatible import Compatible, host
from pomelo.providers.http import Http

_HOST_PROBE = Probe("/models")


@dataclass(frozen=True, slots=True)
class Entry:
    """A provider that can be opened.

    `base_url` is where its API begins unless the operator says otherwise (empty: the operator must).
    `account` names the provider whose key and base URL it uses, empty: its own. `probe` None: there is
    nothing to ask that costs nothing.
    """

    name: str
    make: Callable[[Credentials, Http], Provider]
    base_url: str = ""
    account: str = ""
    key_needed: bool = True
    probe: Probe | None = None

    def located(self, credentials: Mapping[str, Credentials]) -> Credentials:
        """Its credentials among those of all accounts, with the base URL that holds."""
        given = credentials.get(self.account or self.name, Credentials(None))
        return given if given.base_url else Credentials(given.api_key, self.base_url)


@dataclass(frozen=True, slots=True)
class Registry:
    """The models, and the providers that there are for them; the sandbox is not among these."""

    catalog: Catalog
    entries: Mapping[str, Entry]


def read(own: Path | None = None, plugged: Collection[EntryPoint] | None = None) -> Registry:
    """Reads the catalogues and finds the providers.

    `own` is the operator's catalogue, whose entries replace all others; those of plug-ins replace none.
    `plugged` are the plug-ins, those that are installed where it is None.

    Raises:
        ValueError: a plug-in can't be loaded, two things have one name, or a row is wrong; the message is
            one line that says which. OSError: `own` can't be read.
    """
    entries = {name: _entry(name, _load(reference)) for name, reference in BUILTIN.items()}
    files = [BUILTIN_CATALOG]
    for point in entry_points(group=GROUP) if plugged is None else plugged:
        if point.name in entries or point.name == SANDBOX:
            raise ValueError(f"the plug-in {point.value} calls itself {point.name}, and another one does")
        provider = _plugged(point)
        entries[point.name] = _entry(point.name, provider)
        if (brought := getattr(provider, "catalog", None)) is not None:
            _check_new(point, Path(brought), files)
            files.append(Path(brought))
    catalog = Catalog.load(*files, *([own] if own is not None else []))
    for name, row in catalog.hosts.items():
        if name in entries or name == SANDBOX:
            raise ValueError(f"host {name}: a provider has that name")
        entries[name] = _host(name, dict(row))
    _check_names(catalog, entries)
    return Registry(catalog, entries)


def _plugged(point: EntryPoint) -> Any:
    try:
        return point.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a stranger's module does when it is imported
        failure = ValueError(f"the plug-in {point.name} ({point.value}) can't be loaded: {error!r}")
        raise failure from error


def _check_new(point: EntryPoint, brought: Path, files: list[Path]) -> None:
    """A package must not change what a name costs or who answers it.

    Raises:
        ValueError: it would.
    """
    before, new = Catalog.load(*files), Catalog.load(brought)
    taken = (before.models.keys() & new.models.keys()) | (before.hosts.keys() & new.hosts.keys())
    if taken:
        raise ValueError(
            f"the plug-in {point.name} brings {', '.join(sorted(taken))}, which is there already. Only a "
            "catalogue of your own may replace an entry: set POMELO_CATALOG"
        )


def _check_names(catalog: Catalog, entries: Mapping[str, Entry]) -> None:
    for model in catalog.models.values():
        for route in model.routes:
            if route.provider not in entries:
                raise ValueError(
                    f"catalogue entry {model.name}: no provider is called {route.provider}; there are "
                    + ", ".join(entries)
                )
    for entry in entries.values():
        if entry.account and entry.account not in entries:
            raise ValueError(f"host {entry.name}: no provider is called {entry.account}")


def _entry(name: str, provider: Any) -> Entry:
    return Entry(
        name,
        provider,
        base_url=getattr(provider, "base_url", ""),
        probe=getattr(provider, "probe", None),
    )


def _host(name: str, row: dict[str, Any]) -> Entry:
    base_url, account = row.pop("base_url", ""), row.pop("credentials", "")
    for knob, value in (("base_url", base_url), ("credentials", account)):
        if not isinstance(value, str):
            raise ValueError(f"host {name}: {knob} must be of type str")
    profile = host(name, row)
    return Entry(
        name,
        partial(Compatible, profile=profile),
        base_url=base_url,
        account=account,
        key_needed=profile.key_needed,
        probe=_HOST_PROBE,
    )


def _load(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)
