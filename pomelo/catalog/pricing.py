"""Computes the cost of a task: its usage times the prices of its model, in whole microcredits.

The cost depends only on usage and prices, so that it can be computed again from a usage record.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from pomelo import money
from pomelo.catalog.task_types import TASK_TYPE_ROWS
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.protobuf.enums import enum_names, enum_prefix
from pomelo.values import value_type

UnitPrices = Mapping["PriceUnit.ValueType", int]
"""Unit -> microcredits for one of it."""

_INPUT = PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS
_CACHED_INPUT = PriceUnit.PRICE_UNIT_MILLION_CACHED_INPUT_TOKENS
_CACHE_WRITE = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_INPUT_TOKENS
_CACHE_WRITE_1H = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_1H_INPUT_TOKENS
_OUTPUT = PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS
_PROVIDER_DOLLAR = PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR

_SCALE: Mapping[PriceUnit.ValueType, tuple[str, int]] = {
    _INPUT: ("input_tokens", 1_000_000),
    _CACHED_INPUT: ("cached_input_tokens", 1_000_000),
    _CACHE_WRITE: ("cache_write_input_tokens", 1_000_000),
    _CACHE_WRITE_1H: ("cache_write_1h_input_tokens", 1_000_000),
    _OUTPUT: ("output_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_IMAGE: ("images", 1),
    PriceUnit.PRICE_UNIT_MEGAPIXEL: ("pixels", 1_000_000),
    PriceUnit.PRICE_UNIT_THOUSAND_CHARACTERS: ("characters", 1_000),
    PriceUnit.PRICE_UNIT_AUDIO_MINUTE: ("audio_ms", 60_000),
    PriceUnit.PRICE_UNIT_AUDIO_HOUR: ("audio_ms", 3_600_000),
    _PROVIDER_DOLLAR: ("provider_micros", 1_000_000),
}
"""Unit -> the field of `Usage` that it prices, and how many of them make one unit."""

_COMMON_SCALE = 18_000_000
"""A multiple of every scale, so that sums are exact."""

_FACTORS = {unit: (name, _COMMON_SCALE // scale) for unit, (name, scale) in _SCALE.items()}
"""Unit -> the field of `Usage`, and how many parts of the common scale one of it makes."""

MAX_TOKENS = 2**31 - 1

_REPORTED_COST = "provider_dollar"
"""The unit of a cost that the provider reports, for tasks of every type."""


@value_type(frozen=True, slots=True)
class Usage:
    """The usage of a task, in counts from 0. The names are those of UsageRecord.

    `input_tokens` are all tokens of the input. `cached_input_tokens` of them were read from the vendor's
    cache, and `cache_write_input_tokens` written to it, `cache_write_1h_input_tokens` of those for an hour.
    `reasoning_tokens` are part of `output_tokens`. `provider_micros` is the cost that the provider reports,
    in microdollars; 0 if it reports none.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    characters: int = 0
    images: int = 0
    pixels: int = 0
    audio_ms: int = 0
    cached_input_tokens: int = 0
    cache_write_input_tokens: int = 0
    cache_write_1h_input_tokens: int = 0
    reasoning_tokens: int = 0
    provider_micros: int = 0


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of a model. `tiers` are (input tokens, prices), ascending. A task with at least so many
    tokens of input pays the prices of the tier for all its usage; other tasks pay those in `units`.

    If there is a price of PROVIDER_DOLLAR, a task whose provider reports its cost pays only that. `encoded`
    are the prices in the format of usage records.
    """

    units: UnitPrices = field(default_factory=dict)
    tiers: tuple[tuple[int, UnitPrices], ...] = ()
    encoded: str = field(init=False, repr=False, compare=False)
    _max_prices: tuple[UnitPrices, ...] = field(init=False, repr=False, compare=False)
    """The maximum price of each unit below the first tier, and up to each tier."""

    def __post_init__(self) -> None:
        tables = [self.units, *(units for _, units in self.tiers)]
        max_prices = accumulate(map(_without_cache_prices, tables), _max_of)
        object.__setattr__(self, "_max_prices", tuple(max_prices))
        object.__setattr__(self, "encoded", _encode(self.units, self.tiers))

    def __bool__(self) -> bool:
        return bool(self.units)

    def at(self, input_tokens: int) -> UnitPrices:
        """The prices of a task with `input_tokens` tokens of input."""
        units = self.units
        for from_tokens, tier in self.tiers:
            if input_tokens >= from_tokens:
                units = tier
        return units

    def bills_reported_cost(self, input_tokens: int = 0) -> bool:
        """Whether a task with `input_tokens` tokens of input is billed by a cost that is reported."""
        return _PROVIDER_DOLLAR in self.at(input_tokens)

    def max_prices(self, input_tokens: int) -> UnitPrices:
        """The maximum price of each unit for a task with at most `input_tokens` tokens of input. All input
        has the highest price of input, cached or not. The cost that a provider reports is not included: it
        can't be known in advance."""
        number = 0
        for from_tokens, _ in self.tiers:
            number += input_tokens >= from_tokens
        return self._max_prices[number]


def _without_cache_prices(units: UnitPrices) -> UnitPrices:
    """The prices of counts, with one price for all input: the highest one."""
    input_units = (_INPUT, _CACHED_INPUT, _CACHE_WRITE, _CACHE_WRITE_1H)
    others = {unit: micros for unit, micros in units.items() if unit not in (*input_units, _PROVIDER_DOLLAR)}
    max_input = max(units.get(unit, 0) for unit in input_units)
    return {_INPUT: max_input, **others} if max_input else others


def _max_of(one: UnitPrices, other: UnitPrices) -> UnitPrices:
    return {unit: max(one.get(unit, 0), other.get(unit, 0)) for unit in {**one, **other}}


def cost(usage: Usage, prices: Prices) -> int:
    """Microcredits, rounded up once, so that no usage is free unless its price is 0."""
    units = prices.at(usage.input_tokens)
    if usage.provider_micros and _PROVIDER_DOLLAR in units:
        usage = Usage(provider_micros=usage.provider_micros)
    elif usage.cached_input_tokens or usage.cache_write_input_tokens:
        usage = _split_input(usage, units)
    return cost_at(usage, units)


def cost_at(usage: Usage, units: UnitPrices) -> int:
    """The microcredits of the counts of a usage, each at its price, rounded up once."""
    parts = 0
    for unit, micros in units.items():
        name, factor = _FACTORS[unit]
        parts += getattr(usage, name) * micros * factor
    return -(-parts // _COMMON_SCALE)


def _split_input(usage: Usage, units: UnitPrices) -> Usage:
    """The usage with each token of the input in one count only: that of its price. Cached tokens without a
    price of their own have that of other input."""
    cached = usage.cached_input_tokens if _CACHED_INPUT in units else 0
    written_1h = usage.cache_write_1h_input_tokens if _CACHE_WRITE_1H in units else 0
    written = usage.cache_write_input_tokens - written_1h if _CACHE_WRITE in units else 0
    return replace(
        usage,
        input_tokens=max(usage.input_tokens - cached - written - written_1h, 0),
        cached_input_tokens=cached,
        cache_write_input_tokens=written,
        cache_write_1h_input_tokens=written_1h,
    )


def affordable_output_tokens(micros: int, input_tokens: int, prices: Prices) -> int:
    """The maximum output tokens of a text task that costs at most `micros`, given its input tokens.

    Below 0 if the input alone may cost more. MAX_TOKENS without a price for output.
    """
    units = prices.max_prices(input_tokens)
    price = units.get(_OUTPUT, 0)
    remaining = micros * 1_000_000 - input_tokens * units.get(_INPUT, 0)
    if remaining < 0:
        return -1
    return remaining // price if price else MAX_TOKENS


def _encode(units: UnitPrices, tiers: Iterable[tuple[int, UnitPrices]]) -> str:
    """`unit=micros` separated by commas, then for each tier `;`, `tokens:` and its prices."""
    encoded = [f";{from_tokens}:{_encode_units(tier)}" for from_tokens, tier in tiers]
    return _encode_units(units) + "".join(encoded)


def _encode_units(units: UnitPrices) -> str:
    return ",".join(f"{unit_name(unit)}={micros}" for unit, micros in sorted(units.items()))


def decode_prices(text: str) -> Prices:
    """Decodes `Prices.encoded`.

    Raises:
        ValueError: `text` is invalid.
    """
    units, *tiers = text.split(";")
    split = [tier.split(":") for tier in tiers]
    return Prices(
        _decode_units(units), tuple((int(from_tokens), _decode_units(units)) for from_tokens, units in split)
    )


def _decode_units(text: str) -> UnitPrices:
    pairs = [pair.split("=") for pair in text.split(",")] if text else []
    return {parse_unit(name): int(micros) for name, micros in pairs}


def unit_name(unit: PriceUnit.ValueType) -> str:
    """The name of a unit in the catalogue, such as million_input_tokens."""
    return enum_names(PriceUnit.DESCRIPTOR)[unit]


def parse_unit(name: str) -> PriceUnit.ValueType:
    """The unit with the given name in the catalogue.

    Raises:
        ValueError: it is unknown.
    """
    return PriceUnit.Value(enum_prefix(PriceUnit.DESCRIPTOR) + name.upper())


def parse_prices(row: Mapping[str, Any], tiers: Iterable[Mapping[str, Any]], task_type: str) -> Prices:
    """The prices of a table `price` of a catalogue and of its tables `price_tiers`. A tier without a price of
    a unit has that of the tier before it.

    Raises:
        ValueError: a unit or an amount is wrong.
    """
    units = _unit_prices(row, task_type)
    tiered = "million_input_tokens" in TASK_TYPE_ROWS[task_type].price_units
    parsed: list[tuple[int, UnitPrices]] = []
    previous, latest = 0, dict(row)
    for tier in tiers:
        latest.update(tier)
        from_tokens = latest.pop("from_input_tokens", None)
        if not tiered or type(from_tokens) is not int or from_tokens <= previous:
            raise ValueError("from_input_tokens must be whole numbers, each above the previous one")
        previous = from_tokens
        parsed.append((from_tokens, _unit_prices(latest, task_type)))
    return Prices(units, tuple(parsed))


def _unit_prices(row: Mapping[str, Any], task_type: str) -> UnitPrices:
    known = (*TASK_TYPE_ROWS[task_type].price_units, _REPORTED_COST)
    for unit in row:
        if unit not in known:
            raise ValueError(
                f"tasks of type {task_type} are not counted by {unit}, but by {', '.join(known)}"
            )
    units = {parse_unit(unit): _micros(unit, amount) for unit, amount in row.items()}
    if units.get(_PROVIDER_DOLLAR) == 0:
        raise ValueError(f"{_REPORTED_COST} must be above 0: no task is free. Remove it to bill by counts")
    if not any(units[parse_unit(unit)] for unit in row if unit != _REPORTED_COST and "cache" not in unit):
        if _REPORTED_COST in row:
            raise ValueError(
                f"{_REPORTED_COST} needs another price beside it, by counts, which limits the cost of a task"
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
