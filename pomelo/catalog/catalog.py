"""The catalogue: every model by its public name, with its kind, routes, limits and price; and the hosts.

`catalog.toml` beside this file is the built-in one; plug-ins and the operator add files of the same form.
Adding a model, a price or a host that speaks a known wire is a row there and no code. What the knobs of a
host mean is for `pomelo.providers.chat.compatible` to say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any, TypeVar

from pomelo import money
from pomelo.catalog import check as rules
from pomelo.catalog import voice_names
from pomelo.catalog.pricing import Prices, UnitPrices, unit_named
from pomelo.catalog.rows import day
from pomelo.catalog.toml_file import Fault, TomlFile
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskType

BUILTIN = Path(__file__).with_name("catalog.toml")

DEFAULT_IMAGE_SIDE = 1024
"""Pixels of a picture's side that the caller leaves open: what is drawn, and what is billed."""

DEFAULT_AUDIO_FORMAT = "mp3_44100_128"
"""The output_format of a sound where the caller leaves it open."""


_UNITS: Mapping[str, Collection[str]] = {
    "text": (
        "million_input_tokens",
        "million_output_tokens",
        "million_cached_input_tokens",
        "million_cache_write_input_tokens",
        "million_cache_write_1h_input_tokens",
    ),
    "image": ("image", "megapixel"),
    "text_to_speech": ("thousand_characters",),
    "speech_to_speech": ("audio_minute",),
    "speech_to_text": ("audio_minute",),
}
"""Task type -> the units that its tasks are counted in. A price in another one would never be charged."""

_REPORTED = "provider_dollar"
"""The unit of a cost that the provider reports, which tasks of every type may have beside those."""

NOTICE = timedelta(days=60)
"""How long before its end a model is deprecated where its entry doesn't say since when; from then on the
operator is warned."""

_SPEAKING = (TaskType.TASK_TYPE_TEXT_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_SPEECH)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Route:
    """One way to serve a model: a provider, its own name of the model, and what that model takes.

    `drop` names the parameters that it can't take. `clamp` gives the range of those that it takes in a
    narrower range than the contract: name -> (least, most, multiple of; 0 for none). `prices` and
    `price_version` are set where this way costs something else than the model's entry says. `options` is
    the rest of the row, for the provider alone. `retires` is the day on which the vendor ends it, None if no
    day is known.
    """

    provider: str
    model: str
    drop: frozenset[str] = frozenset()
    clamp: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prices: Prices = Prices()  # noqa: RUF009 - it is immutable.
    price_version: str = ""
    price_note: str = ""
    retires: date | None = None

    def fit(self, name: str, value: Number) -> Number | None:
        """`value` as the model takes it: in its range and on its grid; None where it takes no `name`.

        A whole number stays one.
        """
        if name in self.drop:
            return None
        clamp = self.clamp.get(name)
        if clamp is None:
            return value
        least, most, step = clamp
        kind = type(value)
        if step:
            value = kind(round(value / step) * step)
        return kind(min(max(value, least), most))


ENCODER_PADDING_MS = 500
"""Milliseconds by which audio may exceed `max_audio_seconds`: encoders add silence at both ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model takes; 0 where a limit doesn't apply to its kind."""

    max_input_tokens: int = 0
    max_output_tokens: int = 0
    max_characters: int = 0
    max_audio_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """One entry. `prices` are never empty; `price_note` says why they differ from a published list.

    `retires` is the day on which the model ends: the entry's own, or that of its last route where every route
    has one. `deprecated` is the day since which its end is announced. None where there is none.
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

    def priced(self, route: Route) -> tuple[Prices, str]:
        """What a task costs that is asked of `route` first, and the version of that price."""
        return (route.prices, route.price_version) if route.prices else (self.prices, self.price_version)


class CatalogError(ValueError):
    """Rows of a catalogue are wrong. The message has a line for each: file, line, key, what is wrong, and
    what to write instead."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = faults
        super().__init__("\n".join(dict.fromkeys(map(str, faults))))


class Catalog:
    """The models by name, sorted, and the rows of the hosts; immutable."""

    def __init__(self, models: Iterable[Model], hosts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.models: Mapping[str, Model] = {m.name: m for m in sorted(models, key=lambda m: m.name)}
        self.hosts: Mapping[str, Mapping[str, Any]] = hosts or {}

    @classmethod
    def load(
        cls, *paths: Path, check: Callable[[Sequence[TomlFile]], Iterable[Fault]] = lambda files: ()
    ) -> Catalog:
        """Reads catalogue files; without any, the built-in one. An entry replaces one of an earlier file.

        `check` finds what is wrong in the files beyond what they say of themselves.

        Raises:
            CatalogError: rows are wrong; it names them all. OSError: a file can't be read.
        """
        files = [TomlFile.read(path) for path in paths or (BUILTIN,)]
        faults = [fault for file in files for fault in rules.check(file, _prices)]
        faults += check(files)
        wrong = {(fault.file.path, fault.keys[:2]) for fault in faults}
        models: dict[str, Model] = {}
        hosts: dict[str, Mapping[str, Any]] = {}
        voices: dict[str, str] = {}
        for file in files:
            for name, row in rules.tables(file, "models"):
                keys = ("models", name)
                if (file.path, keys) not in wrong:
                    try:
                        models[name] = _model(name, row)
                    except ValueError as error:
                        faults.append(file.fault(keys, str(error)))
            hosts |= rules.tables(file, "hosts")
            if not faults:
                named = file.table.get("voices", {})
                voices |= {voice_names.plain(name): voice_id for name, voice_id in named.items()}
        if faults:
            raise CatalogError(sorted(faults, key=lambda fault: (files.index(fault.file), fault.line)))
        return cls([_voiced(model, voices) for model in models.values()], hosts)

    def resolve(self, name: str) -> Model:
        """The model of that name.

        Raises:
            PomeloError: unsupported_model.
        """
        model = self.models.get(name)
        if model is None:
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise PomeloError("unsupported_model", f"Unsupported task type: {shown}", field="model")
        return model


def _voiced(model: Model, voices: Mapping[str, str]) -> Model:
    """The model with the operator's voices in its routes, where it speaks."""
    if not voices or model.task_type not in _SPEAKING:
        return model
    routes = tuple(replace(route, options={**route.options, "voices": voices}) for route in model.routes)
    return replace(model, routes=routes)


def _model(name: str, row: dict[str, Any]) -> Model:
    try:
        kind = row["type"]
        routes = tuple(_route(dict(route), kind) for route in row["routes"])
        return Model(
            name=name,
            task_type=TaskType.Value(f"TASK_TYPE_{kind.upper()}"),
            routes=routes,
            limits=Limits(**row.get("limits", {})),
            prices=_prices(row["price"], row.get("price_tiers", []), kind),
            price_version=row["price_version"],
            price_note=row.get("price_note", ""),
            **_dates(row, routes),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{error} is missing" if isinstance(error, KeyError) else str(error)) from error


def _route(row: dict[str, Any], kind: str) -> Route:
    provider, model = row.pop("provider"), row.pop("model")
    drop, clamp = frozenset(row.pop("drop", ())), row.pop("clamp", {})
    retires = row.pop("retires", None)
    prices, version, note = Prices(), "", ""
    if "price" in row:
        prices = _prices(row.pop("price"), row.pop("price_tiers", []), kind)
        version, note = row.pop("price_version"), row.pop("price_note", "")
    return Route(
        provider=provider,
        model=model,
        drop=drop,
        clamp={k: (*v, 0)[:3] for k, v in clamp.items()},
        options=row,
        prices=prices,
        price_version=version,
        price_note=note,
        retires=None if retires is None else day(retires),
    )


def _dates(row: Mapping[str, Any], routes: Sequence[Route]) -> dict[str, date | None]:
    """When a model ends, and since when that is announced."""
    dates = {key: day(row[key]) for key in ("retires", "deprecated") if key in row}
    ends = [route.retires for route in routes if route.retires is not None]
    retires = dates.get("retires") or (max(ends) if len(ends) == len(routes) else None)
    return {
        "retires": retires,
        "deprecated": dates.get("deprecated") or (None if retires is None else retires - NOTICE),
    }


def _prices(row: Mapping[str, Any], tiers: Iterable[Mapping[str, Any]], kind: str) -> Prices:
    """The prices of a table `price` and of the tables `price_tiers`, for a type of task. Prices that a tier
    does not name are those of the one before it."""
    units = _unit_prices(row, kind)
    found: list[tuple[int, UnitPrices]] = []
    last, latest = 0, dict(row)
    for tier in tiers:
        latest.update(tier)
        least = latest.pop("from_input_tokens", None)
        if kind != "text" or type(least) is not int or least <= last:
            raise ValueError("from_input_tokens must be whole numbers, each above the last")
        last = least
        found.append((least, _unit_prices(latest, kind)))
    return Prices(units, tuple(found))


def _unit_prices(row: Mapping[str, Any], kind: str) -> UnitPrices:
    known = (*_UNITS[kind], _REPORTED)
    for unit in row:
        if unit not in known:
            raise ValueError(f"tasks of type {kind} are not counted by {unit}, but by {', '.join(known)}")
    units = {unit_named(unit): _micros(unit, amount) for unit, amount in row.items()}
    if units.get(unit_named(_REPORTED)) == 0:
        raise ValueError(f"{_REPORTED} must be above 0: no task is free. Leave it out to bill by counts")
    if not any(units[unit_named(unit)] for unit in row if unit != _REPORTED and "cache" not in unit):
        if _REPORTED in row:
            raise ValueError(
                f"{_REPORTED} needs a price of what is counted beside it, which bounds what a task can cost"
            )
        raise ValueError("it has no price")
    return units


def _micros(unit: str, amount: Any) -> int:
    if type(amount) is not str:
        raise ValueError(f'{unit} must be text in quotes, such as "0.04"')
    try:
        return money.parse_credits(amount)
    except ValueError as error:
        raise ValueError(f"{unit}: {error}") from None
