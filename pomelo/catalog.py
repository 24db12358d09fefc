"""The catalogue: every model by its public name, with its kind, routes, limits and price; and the hosts.

`catalog.toml` beside this file is the built-in one; plug-ins and the operator add files of the same form.
Adding a model, a price or a host that speaks a known wire is a row there and no code. What the knobs of a
host mean is for `pomelo.providers.compatible` to say.
"""

import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.speech_pb2 import VoiceSettings
from pomelo.gen.v1.task_pb2 import Task, TaskType
from pomelo.money import MICROS
from pomelo.pricing import Prices, UnitPrices, unit_named

BUILTIN = Path(__file__).with_name("catalog.toml")

SIDE = 1024
"""Pixels of a picture's side that the caller leaves open: what is drawn, and what is billed."""

DEFAULT_FORMAT = "mp3_44100_128"
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

_VOICE_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SPEAKING = (TaskType.TASK_TYPE_TEXT_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_SPEECH)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Route:
    """One way to serve a model: a provider, its own name of the model, and what that model takes.

    `drop` names the parameters that it can't take. `clamp` gives the range of those that it takes in a
    narrower range than the contract: name -> (least, most, multiple of; 0 for none). `prices` and
    `price_version` are set where this way costs something else than the model's entry says. `options` is
    the rest of the row, for the provider alone.
    """

    provider: str
    model: str
    drop: frozenset[str] = frozenset()
    clamp: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prices: Prices = Prices()  # noqa: RUF009 - it is immutable.
    price_version: str = ""
    price_note: str = ""

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


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model takes; 0 where a limit doesn't apply to its kind."""

    max_input_tokens: int = 0
    max_output_tokens: int = 0
    max_characters: int = 0
    max_audio_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """One entry. `prices` are never empty; `price_note` says why they differ from a published list."""

    name: str
    task_type: "TaskType.ValueType"
    routes: tuple[Route, ...]
    limits: Limits
    prices: Prices
    price_version: str
    price_note: str = ""

    def priced(self, route: Route) -> tuple[Prices, str]:
        """What a task costs that is asked of `route` first, and the version of that price."""
        return (route.prices, route.price_version) if route.prices else (self.prices, self.price_version)


class Catalog:
    """The models by name, sorted, and the rows of the hosts; immutable."""

    def __init__(self, models: Iterable[Model], hosts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.models: Mapping[str, Model] = {m.name: m for m in sorted(models, key=lambda m: m.name)}
        self.hosts: Mapping[str, Mapping[str, Any]] = hosts or {}

    @classmethod
    def load(cls, *paths: Path) -> "Catalog":
        """Reads catalogue files; without any, the built-in one. An entry replaces one of an earlier file.

        Raises:
            ValueError: a row is wrong; the message names it. OSError: a file can't be read.
        """
        models: dict[str, Model] = {}
        hosts: dict[str, Mapping[str, Any]] = {}
        voices: dict[str, str] = {}
        for path in paths or (BUILTIN,):
            file = _table(tomllib.loads(path.read_text()), {"models", "hosts", "voices"}, str(path))
            models |= {name: _model(name, row) for name, row in file.get("models", {}).items()}
            hosts |= file.get("hosts", {})
            voices |= _voices(file.get("voices", {}))
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


def _voices(table: Any) -> dict[str, str]:
    """The operator's voices: name in lower case -> the vendor's id.

    Raises:
        ValueError: a row is wrong.
    """
    if not isinstance(table, dict):
        raise ValueError("[voices] must be a table of names and ids")
    found = {}
    for name, voice_id in table.items():
        if not isinstance(voice_id, str) or not _VOICE_ID.fullmatch(voice_id):
            raise ValueError(f"[voices]: {name} must be a voice's id, such as pNInz6obpgDQGcFmaJgB")
        found[" ".join(name.split()).casefold()] = voice_id
    return found


def _voiced(model: Model, voices: Mapping[str, str]) -> Model:
    """The model with the operator's voices in its routes, where it speaks."""
    if not voices or model.task_type not in _SPEAKING:
        return model
    routes = tuple(replace(route, options={**route.options, "voices": voices}) for route in model.routes)
    return replace(model, routes=routes)


def _model(name: str, row: dict[str, Any]) -> Model:
    try:
        _table(row, {"type", "routes", "limits", "price", "price_tiers", "price_version", "price_note"}, "it")
        parameters = _parameters(row["type"])
        if not row["routes"]:
            raise ValueError("it has no route")
        return Model(
            name=name,
            task_type=TaskType.Value(f"TASK_TYPE_{row['type'].upper()}"),
            routes=tuple(_route(dict(route), row["type"], parameters) for route in row["routes"]),
            limits=Limits(**row.get("limits", {})),
            prices=_prices(row["price"], row.get("price_tiers", []), row["type"]),
            price_version=row["price_version"],
            price_note=row.get("price_note", ""),
        )
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"catalogue entry {name}: {said}") from error


def _route(row: dict[str, Any], kind: str, parameters: Collection[str]) -> Route:
    provider, model = row.pop("provider"), row.pop("model")
    drop, clamp = frozenset(row.pop("drop", ())), row.pop("clamp", {})
    unknown = sorted((drop | clamp.keys()) - set(parameters))
    if unknown:
        raise ValueError(f"no parameter of its kind is called {', '.join(unknown)}")
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
    )


def _parameters(kind: str) -> set[str]:
    """The names of what a caller may give to a task of a kind, those within voice_settings among them."""
    given = Task.DESCRIPTOR.fields_by_name.get(kind)
    if given is None or given.message_type is None:
        raise ValueError(f"no kind of task is called {kind}")
    names = set(given.message_type.fields_by_name)
    return names | set(VoiceSettings.DESCRIPTOR.fields_by_name) if "voice_settings" in names else names


def _table(row: dict[str, Any], known: Collection[str], named: str) -> dict[str, Any]:
    unknown = sorted(row.keys() - set(known))
    if unknown:
        raise ValueError(f"{named} has an unknown key: {', '.join(unknown)}")
    return row


def _prices(row: Mapping[str, Any], tiers: Iterable[Mapping[str, Any]], kind: str) -> Prices:
    """The prices of a table `price` and of the tables `price_tiers`, for a type of task. Prices that a tier
    does not name are those of the one before it."""
    units = _unit_prices(row, kind)
    if not any(micros for unit, micros in units.items() if "CACHE" not in PriceUnit.Name(unit)):
        raise ValueError("it has no price")
    found: list[tuple[int, UnitPrices]] = []
    last, latest = 0, units
    for tier in tiers:
        named = dict(tier)
        least = named.pop("from_input_tokens")
        if kind != "text" or type(least) is not int or least <= last:
            raise ValueError("price_tiers: from_input_tokens must be whole numbers, each above the last")
        latest = {**latest, **_unit_prices(named, kind)}
        last = least
        found.append((least, latest))
    return Prices(units, tuple(found))


def _unit_prices(row: Mapping[str, Any], kind: str) -> UnitPrices:
    for unit in row:
        if unit not in _UNITS[kind]:
            raise ValueError(
                f"price: tasks of type {kind} are not counted by {unit}. Use {', '.join(_UNITS[kind])}"
            )
    return {unit_named(unit): _micros(amount) for unit, amount in row.items()}


def _micros(amount: str) -> int:
    micros = Decimal(amount) * MICROS
    if micros != int(micros) or micros < 0:
        raise ValueError(f"price {amount} is not a whole number of microcredits")
    return int(micros)
