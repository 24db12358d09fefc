"""What a task costs: counts of what it used, times the prices of its model, in whole microcredits.

Admission computes the worst case with it, the engine the real cost, the audit the cost of every record again.
The same counts and prices always cost the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from pomelo.gen.v1.model_service_pb2 import PriceUnit

UnitPrices = Mapping["PriceUnit.ValueType", int]
"""Microcredits for one of each unit."""

_INPUT = PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS
_CACHED = PriceUnit.PRICE_UNIT_MILLION_CACHED_INPUT_TOKENS
_WRITTEN = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_INPUT_TOKENS
_WRITTEN_1H = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_1H_INPUT_TOKENS
_OUTPUT = PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS
_PROVIDER_DOLLAR = PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR

_SCALE: Mapping[PriceUnit.ValueType, tuple[str, int]] = {
    _INPUT: ("input_tokens", 1_000_000),
    _CACHED: ("cached_input_tokens", 1_000_000),
    _WRITTEN: ("cache_write_input_tokens", 1_000_000),
    _WRITTEN_1H: ("cache_write_1h_input_tokens", 1_000_000),
    _OUTPUT: ("output_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_IMAGE: ("images", 1),
    PriceUnit.PRICE_UNIT_MEGAPIXEL: ("pixels", 1_000_000),
    PriceUnit.PRICE_UNIT_THOUSAND_CHARACTERS: ("characters", 1_000),
    PriceUnit.PRICE_UNIT_AUDIO_MINUTE: ("audio_ms", 60_000),
    _PROVIDER_DOLLAR: ("provider_micros", 1_000_000),
}
"""The count in `Used` that each unit prices, and how many of it make one unit."""

_PREFIX = "PRICE_UNIT_"
_COMMON = 3_000_000
"""A multiple of every scale: sums are exact in fractions of it."""

MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What a task used, from 0. Names as in UsageRecord.

    `input_tokens` are all tokens of the input. Of these, `cached_input_tokens` were read from the vendor's
    cache and `cache_write_input_tokens` written to it; of those, `cache_write_1h_input_tokens` for an hour.
    `provider_micros` is what the provider reports that the task cost, in microdollars; 0: it reports nothing.
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
    provider_micros: int = 0


@dataclass(frozen=True, slots=True)
class Prices:
    """The prices of a model. `units` apply to every task; a task whose input has at least the tokens of one
    of `tiers` (tokens -> prices, ascending) pays that tier's prices for all that it used.

    A price of PROVIDER_DOLLAR applies in place of all others to a task whose provider reports its cost.
    """

    units: UnitPrices = field(default_factory=dict)
    tiers: tuple[tuple[int, UnitPrices], ...] = ()
    _dearest: tuple[UnitPrices, ...] = field(init=False, repr=False, compare=False)
    """The dearest price of each unit below the first tier, and from each tier on."""

    def __post_init__(self) -> None:
        tables = [self.units, *(units for _, units in self.tiers)]
        dearest = accumulate(map(_flat, tables), _dearer)
        object.__setattr__(self, "_dearest", tuple(dearest))

    def __bool__(self) -> bool:
        return bool(self.units)

    def at(self, input_tokens: int) -> UnitPrices:
        """The prices of a task whose input has so many tokens."""
        units = self.units
        for least, tier in self.tiers:
            if input_tokens >= least:
                units = tier
        return units

    def by_report(self, input_tokens: int = 0) -> bool:
        """Whether a task with so many tokens of input costs what its provider reports, if it reports it."""
        return _PROVIDER_DOLLAR in self.at(input_tokens)

    def dearest(self, input_tokens: int) -> UnitPrices:
        """The dearest price of each unit that a task can reach whose input has at most so many tokens.
        Every token of the input may turn out to be the dearest kind of it. What a provider may report is not
        among them: it can't be known before."""
        return self._dearest[sum(input_tokens >= least for least, _ in self.tiers)]


def _flat(units: UnitPrices) -> UnitPrices:
    """Prices of what is counted, without those of the cache: all input at the dearest of them."""
    kinds = (_INPUT, _CACHED, _WRITTEN, _WRITTEN_1H)
    flat = {unit: micros for unit, micros in units.items() if unit not in (*kinds, _PROVIDER_DOLLAR)}
    dearest = max((units.get(unit, 0) for unit in kinds), default=0)
    return {_INPUT: dearest, **flat} if dearest else flat


def _dearer(one: UnitPrices, other: UnitPrices) -> UnitPrices:
    return {unit: max(one.get(unit, 0), other.get(unit, 0)) for unit in {**one, **other}}


def cost(used: Usage, prices: Prices) -> int:
    """Microcredits, rounded up once: what was used is never free, unless its price is 0."""
    units = prices.at(used.input_tokens)
    if used.provider_micros and _PROVIDER_DOLLAR in units:
        used = Usage(provider_micros=used.provider_micros)
    elif used.cached_input_tokens or used.cache_write_input_tokens:
        used = _by_price(used, units)
    return _sum(used, units)


def max_cost(used: Usage, prices: Prices) -> int:
    """The most microcredits that a task can cost that uses at most `used`, by what is counted."""
    return _sum(used, prices.dearest(used.input_tokens))


def _sum(used: Usage, units: UnitPrices) -> int:
    parts = 0
    for unit, micros in units.items():
        name, scale = _SCALE[unit]
        parts += getattr(used, name) * micros * (_COMMON // scale)
    return -(-parts // _COMMON)


def _by_price(used: Usage, units: UnitPrices) -> Usage:
    """The counts with each token of the input in just one of them: that of the price it has. Tokens of the
    cache that have no price of their own cost what other input does."""
    cached = used.cached_input_tokens if _CACHED in units else 0
    written_1h = used.cache_write_1h_input_tokens if _WRITTEN_1H in units else 0
    written = used.cache_write_input_tokens - written_1h if _WRITTEN in units else 0
    return replace(
        used,
        input_tokens=max(used.input_tokens - cached - written - written_1h, 0),
        cached_input_tokens=cached,
        cache_write_input_tokens=written,
        cache_write_1h_input_tokens=written_1h,
    )


def affordable_output_tokens(micros: int, input_tokens: int, prices: Prices) -> int:
    """The most output tokens such that a text task of at most so many input tokens costs at most `micros`.

    Below 0 where the input alone may cost more. Without a price for output: any number.
    """
    units = prices.dearest(input_tokens)
    rate = units.get(_OUTPUT, 0)
    spare = micros * 1_000_000 - input_tokens * units.get(_INPUT, 0)
    if spare < 0:
        return -1
    return spare // rate if rate else MAX_TOKENS


def encode_prices(prices: Prices) -> str:
    """Prices as a usage record keeps them: `unit=micros` with commas between; for each tier `;` and
    `tokens:` go before its prices."""
    tiers = [f";{least}:{_written(units)}" for least, units in prices.tiers]
    return _written(prices.units) + "".join(tiers)


def _written(units: UnitPrices) -> str:
    return ",".join(f"{unit_name(unit)}={micros}" for unit, micros in sorted(units.items()))


def decode_prices(text: str) -> Prices:
    """The prices that `written` wrote.

    Raises:
        ValueError: it is no table of prices.
    """
    units, *tiers = text.split(";")
    split = [tier.split(":") for tier in tiers]
    return Prices(_read(units), tuple((int(least), _read(units)) for least, units in split))


def _read(text: str) -> UnitPrices:
    pairs = [pair.split("=") for pair in text.split(",")] if text else []
    return {PriceUnit.Value(_PREFIX + name.upper()): int(micros) for name, micros in pairs}


def unit_name(unit: PriceUnit.ValueType) -> str:
    """The name of a unit in the catalogue, such as million_input_tokens."""
    return PriceUnit.Name(unit).removeprefix(_PREFIX).lower()


def unit_named(name: str) -> PriceUnit.ValueType:
    """The unit of that name.

    Raises:
        ValueError: there is none.
    """
    return PriceUnit.Value(_PREFIX + name.upper())
