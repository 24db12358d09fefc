"""The catalogue: every model by its public name, with its task type, routes, limits and prices; and hosts.

`catalog.toml` beside this file is the built-in one; plug-ins and the operator add files of the same format. A
model, a price or a host with a supported API is a row there and needs no code. The options of hosts are
documented in `pomelo.providers.chat.compatible`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, TypeVar

from pomelo.catalog import check as rules
from pomelo.catalog import voice_names
from pomelo.catalog.pricing import Prices, parse_prices
from pomelo.catalog.rows import EFFORTS, parse_date
from pomelo.catalog.toml_file import Fault, TomlFile
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import ReasoningEffort
from pomelo.protobuf.enums import enum_names

BUILTIN = Path(__file__).with_name("catalog.toml")

RETIREMENT_NOTICE = timedelta(days=60)
"""The default time between the deprecation of a model and its end, during which the operator is warned."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Route:
    """A provider of a model, the provider's name of the model, and the parameters that it takes.

    `drop` names the parameters that it can't take. `clamp` has the parameters with a narrower range than the
    contract's: name -> (minimum, maximum, multiple of; 0 for none). `prices` and `price_version` are set if
    they differ from the model's. `efforts` are the reasoning efforts that a text model takes, from the lowest
    on; empty: all of them. `options` is the rest of the row, for the provider. `retires` is the day on
    which the vendor ends it, None if unknown.
    """

    provider: str
    model: str
    drop: frozenset[str] = frozenset()
    clamp: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    efforts: tuple[ReasoningEffort.ValueType, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    prices: Prices = Prices()  # noqa: RUF009 - it is immutable.
    price_version: str = ""
    price_note: str = ""
    retires: date | None = None

    def fit(self, name: str, value: Number) -> Number | None:
        """`value` fitted to the range and step of the model's parameter `name`; None if it must be dropped.

        The type of a number does not change.
        """
        if name in self.drop:
            return None
        clamp = self.clamp.get(name)
        if clamp is None:
            return value
        minimum, maximum, step = clamp
        number_type = type(value)
        if step:
            value = number_type(round(value / step) * step)
        return number_type(min(max(value, minimum), maximum))


ENCODER_PADDING_MS = 500
"""Milliseconds by which audio may exceed `max_audio_seconds`: encoders add silence at both ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a model; 0 for those that don't apply to its task type."""

    max_input_tokens: int = 0
    max_output_tokens: int = 0
    max_characters: int = 0
    max_audio_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A model. `prices` are never empty; `price_note` explains a difference from the published price list.

    `aliases` are other names by which callers may ask for it. `alias` is the one that a caller used, empty
    for its name: results have it, everything else goes by `name`.

    `retires` is the day on which the model ends, by default that of its last route if every route has one.
    `deprecated` is the day on which its end was announced. Both are None if no end is known.
    """

    name: str
    task_type: TaskType.ValueType
    routes: tuple[Route, ...]
    limits: Limits
    prices: Prices
    price_version: str
    price_note: str = ""
    retires: date | None = None
    deprecated: date | None = None
    aliases: tuple[str, ...] = ()
    alias: str = ""

    def prices_for(self, route: Route) -> tuple[Prices, str]:
        """The prices of a task whose first route is `route`, and their version."""
        own = route.prices
        return (own, route.price_version) if own.units else (self.prices, self.price_version)


class CatalogError(ValueError):
    """A catalogue has errors. The message has a line for each: file, line, key, the error and its remedy."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = faults
        super().__init__("\n".join(dict.fromkeys(map(str, faults))))


class Catalog:
    """The models by name, sorted, and the rows of the hosts. Immutable.

    `by_any_name` has the models by their aliases, too. Of models with the same alias the last one has it, and
    the name of a model is never the alias of a different model.
    """

    def __init__(self, models: Iterable[Model], hosts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        listed = list(models)
        aliases = {alias: replace(m, alias=alias) for m in listed for alias in m.aliases}
        self.models: Mapping[str, Model] = {m.name: m for m in sorted(listed, key=lambda m: m.name)}
        self.by_any_name: Mapping[str, Model] = {**aliases, **self.models}
        self.hosts: Mapping[str, Mapping[str, Any]] = hosts or {}

    @classmethod
    def load(
        cls, *paths: Path, check: Callable[[Sequence[TomlFile]], Iterable[Fault]] = lambda files: ()
    ) -> Catalog:
        """Loads catalogue files, by default the built-in one. Later files override entries of earlier ones.

        `check` finds further errors, such as those in the options of providers.

        Raises:
            CatalogError: the files have errors; it lists them all.
            OSError: a file can't be read.
        """
        files = [TomlFile.read(path) for path in paths or (BUILTIN,)]
        faults = [fault for file in files for fault in rules.check(file)]
        faults += check(files)
        if faults:
            raise CatalogError(sorted(faults, key=lambda fault: (files.index(fault.file), fault.line)))
        models: dict[str, Model] = {}
        hosts: dict[str, Mapping[str, Any]] = {}
        voices: dict[str, str] = {}
        for file in files:
            models |= {name: _model(name, row) for name, row in rules.tables(file, "models")}
            hosts |= rules.tables(file, "hosts")
            listed = file.table.get("voices", {})
            voices |= {voice_names.normalize(name): voice_id for name, voice_id in listed.items()}
        return cls([_with_voices(model, voices) for model in models.values()], hosts)


def _with_voices(model: Model, voices: Mapping[str, str]) -> Model:
    """The model with the operator's voices in its routes, if its tasks have a voice."""
    if not voices or "voice" not in rules.parameters(enum_names(TaskType.DESCRIPTOR)[model.task_type]):
        return model
    routes = tuple(replace(route, options={**route.options, "voices": voices}) for route in model.routes)
    return replace(model, routes=routes)


def _model(name: str, row: dict[str, Any]) -> Model:
    task_type = row["type"]
    routes = tuple(_route(dict(route), task_type) for route in row["routes"])
    retires, deprecated = _dates(row, routes)
    return Model(
        name=name,
        task_type=TaskType.Value(f"TASK_TYPE_{task_type.upper()}"),
        routes=routes,
        limits=Limits(**row.get("limits", {})),
        prices=parse_prices(row["price"], row.get("price_tiers", []), task_type),
        price_version=row["price_version"],
        price_note=row.get("price_note", ""),
        retires=retires,
        deprecated=deprecated,
        aliases=tuple(row.get("aliases", ())),
    )


def _route(row: dict[str, Any], task_type: str) -> Route:
    provider, model = row.pop("provider"), row.pop("model")
    drop, clamp = frozenset(row.pop("drop", ())), row.pop("clamp", {})
    retires = row.pop("retires", None)
    efforts = sorted(EFFORTS[name] for name in row.pop("efforts", ()))
    prices, version, note = Prices(), "", ""
    if "price" in row:
        prices = parse_prices(row.pop("price"), row.pop("price_tiers", []), task_type)
        version, note = row.pop("price_version"), row.pop("price_note", "")
    return Route(
        provider=provider,
        model=model,
        drop=drop,
        clamp={k: (*v, 0)[:3] for k, v in clamp.items()},
        efforts=tuple(efforts),
        options=row,
        prices=prices,
        price_version=version,
        price_note=note,
        retires=None if retires is None else parse_date(retires),
    )


def _dates(row: Mapping[str, Any], routes: Sequence[Route]) -> tuple[date | None, date | None]:
    """The end of a model, and the day on which it was announced."""
    dates = {key: parse_date(row[key]) for key in ("retires", "deprecated") if key in row}
    ends = [route.retires for route in routes if route.retires is not None]
    retires = dates.get("retires") or (max(ends) if len(ends) == len(routes) else None)
    return retires, dates.get("deprecated") or (None if retires is None else retires - RETIREMENT_NOTICE)
