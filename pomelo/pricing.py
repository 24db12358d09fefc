"""What a task costs: counts of what it used, times the prices of its model, in whole microcredits.

Admission asks for the worst case with it, the engine for the real cost, the audit for both again. The same
counts and prices always cost the same, and more of anything never costs less.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pomelo.catalog import Prices
from pomelo.gen.v1.model_service_pb2 import PriceUnit

_SCALE: "Mapping[PriceUnit.ValueType, tuple[str, int]]" = {
    PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS: ("input_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: ("output_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_IMAGE: ("images", 1),
    PriceUnit.PRICE_UNIT_MEGAPIXEL: ("pixels", 1_000_000),
    PriceUnit.PRICE_UNIT_THOUSAND_CHARACTERS: ("characters", 1_000),
    PriceUnit.PRICE_UNIT_AUDIO_MINUTE: ("audio_ms", 60_000),
}
"""What each unit counts, and how many of it make one unit."""

_PREFIX = "PRICE_UNIT_"
_COMMON = 3_000_000
"""A multiple of every scale: sums are exact in fractions of it."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a task used, from 0. Names as in UsageRecord."""

    input_tokens: int = 0
    output_tokens: int = 0
    characters: int = 0
    images: int = 0
    pixels: int = 0
    audio_ms: int = 0


def cost(used: Used, prices: Prices) -> int:
    """Microcredits, rounded up once: what was used is never free, unless its price is 0."""
    parts = 0
    for unit, micros in prices.items():
        name, scale = _SCALE[unit]
        parts += getattr(used, name) * micros * (_COMMON // scale)
    return -(-parts // _COMMON)


def affordable(micros: int, input_tokens: int, prices: Prices) -> int:
    """The most output tokens such that a text task of so many input tokens costs at most `micros`.

    Below 0 where the input alone costs more. Without a price for output: any number.
    """
    rate = prices.get(PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS, 0)
    spare = micros * 1_000_000 - input_tokens * prices.get(PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS, 0)
    if spare < 0:
        return -1
    return spare // rate if rate else 2**31 - 1


def written(prices: Prices) -> str:
    """Prices as a usage record keeps them: `unit=micros` with commas between."""
    pairs = sorted(prices.items())
    return ",".join(f"{PriceUnit.Name(unit).removeprefix(_PREFIX).lower()}={n}" for unit, n in pairs)


def read(text: str) -> Prices:
    """The prices that `written` wrote.

    Raises:
        ValueError: it is none of its texts.
    """
    pairs = [pair.split("=") for pair in text.split(",")] if text else []
    return {PriceUnit.Value(_PREFIX + name.upper()): int(micros) for name, micros in pairs}
