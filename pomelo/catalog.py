"""The catalogue: every model by its public name, with its kind, routes, limits and price.

`catalog.toml` beside this file is the built-in one. Adding a model, a price or a host that speaks a
known wire is a row there and no code.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType

BUILTIN = Path(__file__).with_name("catalog.toml")
MICROS = 1_000_000
"""Microcredits in a credit."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to serve a model: a provider, its own name of the model, and what that model takes.

    `drop` names the parameters that it can't take. `clamp` gives the range of those that it takes in a
    narrower range than the contract: name -> (least, most, multiple of; 0 for none). `options` is the rest
    of the row, for the provider alone.
    """

    provider: str
    model: str
    drop: frozenset[str] = frozenset()
    clamp: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a model takes; 0 where a limit doesn't apply to its kind."""

    max_input_tokens: int = 0
    max_output_tokens: int = 0
    max_characters: int = 0
    max_audio_seconds: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """One entry. `prices` gives microcredits for one unit: PriceUnit -> amount; it is never empty."""

    name: str
    task_type: "TaskType.ValueType"
    routes: tuple[Route, ...]
    limits: Limits
    prices: "Mapping[PriceUnit.ValueType, int]"
    price_version: str


class Catalog:
    """The models by name, sorted; immutable."""

    def __init__(self, models: Iterable[Model]) -> None:
        self.models: Mapping[str, Model] = {m.name: m for m in sorted(models, key=lambda m: m.name)}

    @classmethod
    def load(cls, path: Path = BUILTIN) -> "Catalog":
        """Reads a catalogue file.

        Raises:
            ValueError: a row is wrong; the message names the model.
        """
        rows = tomllib.loads(path.read_text())["models"]
        return cls(_model(name, row) for name, row in rows.items())

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


def _model(name: str, row: dict[str, Any]) -> Model:
    try:
        prices = {
            PriceUnit.Value(f"PRICE_UNIT_{unit.upper()}"): _micros(amount)
            for unit, amount in row["price"].items()
        }
        if not any(prices.values()):
            raise ValueError("it has no price")
        return Model(
            name=name,
            task_type=TaskType.Value(f"TASK_TYPE_{row['type'].upper()}"),
            routes=tuple(_route(dict(route)) for route in row["routes"]),
            limits=Limits(**row.get("limits", {})),
            prices=prices,
            price_version=row["price_version"],
        )
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"catalogue entry {name}: {error}") from error


def _route(row: dict[str, Any]) -> Route:
    return Route(
        provider=row.pop("provider"),
        model=row.pop("model"),
        drop=frozenset(row.pop("drop", ())),
        clamp={k: (*v, 0)[:3] for k, v in row.pop("clamp", {}).items()},
        options=row,
    )


def _micros(amount: str) -> int:
    micros = Decimal(amount) * MICROS
    if micros != int(micros) or micros < 0:
        raise ValueError(f"price {amount} is not a whole number of microcredits")
    return int(micros)
