"""The rows of a catalogue file: their keys and types, and what is said of a wrong one.

pydantic checks the types; `row_faults` says in our words what is wrong, and what to write instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from datetime import date, datetime
from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pomelo.catalog.toml_file import Fault, Keys, TomlFile

LIMITS: Mapping[str, tuple[str, ...]] = {
    "text": ("max_input_tokens", "max_output_tokens"),
    "image": ("max_characters",),
    "text_to_speech": ("max_characters",),
    "speech_to_speech": ("max_audio_seconds",),
    "speech_to_text": ("max_audio_seconds",),
}
"""Task type -> the limits that a model of that type has, all of them."""

LIMIT_MOST = 2**31 - 1
"""The largest limit."""

_NAME_MOST = 200
INT64 = 2**63
_YEARS = range(2000, 3000)

_DATE = re.compile(r"\d{4}-\d\d-\d\d")

EXAMPLES: Mapping[str, str] = {
    "type": 'type = "text"',
    "limits": "limits = { max_input_tokens = 128_000, max_output_tokens = 16_000 }",
    "max_input_tokens": "max_input_tokens = 128_000",
    "max_output_tokens": "max_output_tokens = 16_000",
    "max_characters": "max_characters = 10_000",
    "max_audio_seconds": "max_audio_seconds = 300",
    "price": 'price = { image = "0.04" }',
    "price_tiers": 'price_tiers = [{ from_input_tokens = 272_001, million_input_tokens = "8" }]',
    "price_note": 'price_note = "the price of our own contract"',
    "price_version": 'price_version = "2026-11-22"',
    "retires": "retires = 2026-12-31",
    "deprecated": "deprecated = 2026-11-01",
    "routes": '[[models.NAME.routes]] with provider = "…" and model = "…"',
    "provider": 'provider = "openai"',
    "model": 'model = "gpt-5.6-sol"',
    "drop": 'drop = ["seed"]',
    "allow": 'allow = ["max_tokens", "temperature"]',
    "clamp": "clamp = { temperature = [0, 1] }",
    "base_url": 'base_url = "https://llm.example.com/v1"',
    "credentials": 'credentials = "together"',
    "stream_usage": 'stream_usage = "always"',
    "max_tokens_field": 'max_tokens_field = "max_completion_tokens"',
    "reasoning_effort": 'reasoning_effort = "none"',
    "extra": "extra = { top_k = 40 }",
    "headers": 'headers = { X-Title = "Pomelo" }',
    "meanings": 'meanings = { busy = "provider_unavailable" }',
    "voices": 'adam = "pNInz6obpgDQGcFmaJgB"',
}
"""A row's key -> what a good one looks like."""

_EXPECTED: Mapping[str, str] = {
    "string_type": "text in quotes",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "float_type": "a number",
    "list_type": "a list in [ ]",
    "too_short": "a list of at least one",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def meant(name: str, known: Collection[str]) -> str:
    """A hint at the known names for one that is unknown."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = f"There are: {', '.join(known)}" if known else "There are none"
    return f"Did you mean {close[0]}? {listed}" if close else listed


def plain_name(text: str) -> str:
    """A name that can be shown in logs, tables and URLs.

    Raises:
        ValueError: it is none.
    """
    if not 1 <= len(text) <= _NAME_MOST or not text.isprintable() or text != text.strip():
        raise ValueError(
            f"must be a name of 1 to {_NAME_MOST} printable characters, without spaces around it and without "
            "control characters"
        )
    return text


def day(value: Any) -> date:
    """A date of TOML, or one in quotes.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and _DATE.fullmatch(value):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"is not a valid date: {value}") from None
    if type(value) is not date or value.year not in _YEARS:
        raise ValueError(f"must be a date from 2000 to 2999, such as 2026-12-31, not {described(value)}")
    return value


def _task_type(text: str) -> str:
    if text not in LIMITS:
        raise ValueError(f"must be a task type. {meant(text, LIMITS)}")
    return text


def _clamp(values: list[Any]) -> list[Any]:
    numbers = [value for value in values if type(value) in (int, float) and isfinite(value)]
    if len(numbers) != len(values) or len(values) not in (2, 3):
        raise ValueError(
            "must be two numbers, the least and the most, and optionally a third one that values must be a "
            f"multiple of; not {described(values)}"
        )
    if numbers[0] > numbers[1]:
        raise ValueError(f"must have the least first: {numbers[0]} is more than {numbers[1]}")
    if numbers[2:] and numbers[2] <= 0:
        raise ValueError("must have a third number above 0, or none")
    return values


Name = Annotated[str, AfterValidator(plain_name)]
Day = Annotated[date, BeforeValidator(day)]
Limit = Annotated[int, Field(ge=1, le=LIMIT_MOST)]


class Row(BaseModel):
    """A table of a catalogue: no value is converted, no key is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid")


class RouteRow(Row):
    """A route. What it has beside these keys is for its provider."""

    model_config = ConfigDict(extra="allow")

    provider: Name
    model: Name
    drop: list[str] = []
    clamp: dict[str, Annotated[list[Any], AfterValidator(_clamp)]] = {}
    price: dict[str, Any] | None = None
    price_tiers: list[dict[str, Any]] | None = None
    price_version: Name | None = None
    price_note: Name | None = None
    retires: Day | None = None


class ModelRow(Row):
    """A model."""

    type: Annotated[str, AfterValidator(_task_type)]
    limits: dict[str, Limit] = {}
    price: dict[str, Any]
    price_tiers: list[dict[str, Any]] = []
    price_version: Name
    price_note: Name | None = None
    routes: Annotated[list[RouteRow], Field(min_length=1)]
    retires: Day | None = None
    deprecated: Day | None = None


def row_faults(
    file: TomlFile, keys: Keys, kind: type[BaseModel], row: Any, known: Collection[str] = ()
) -> list[Fault]:
    """What is wrong in a row, by the types that `kind` declares. `known` are further keys of such rows."""
    return [file.fault((*keys, *place), said) for place, said in wrong_values(kind, row, known)]


def wrong_values(kind: type[BaseModel], row: Any, known: Collection[str] = ()) -> list[tuple[Keys, str]]:
    """Where a row is not of the types that `kind` declares, and what is wrong there."""
    try:
        kind.model_validate(row)
    except ValidationError as error:
        found = error.errors(include_url=False)
        return [(_place(one), _said(one, {*kind.model_fields, *known})) for one in found]
    return []


def _place(error: Any) -> Keys:
    return tuple(key for key in error["loc"] if key != "[key]")


def _said(error: Any, known: Collection[str]) -> str:
    """What is wrong by an error of pydantic's, in our words."""
    names = [key for key in reversed(_place(error)) if isinstance(key, str)]
    key = names[0] if names else ""
    example = next((EXAMPLES[name] for name in names if name in EXAMPLES), None)
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    match kind:
        case "missing":
            return f"is missing. Add {example or key}"
        case "extra_forbidden":
            if isinstance(value, dict):
                return (
                    f"is an unknown key. A name with dots is written in quotes. {meant(key, sorted(known))}"
                )
            return f"is an unknown key. {meant(key, sorted(known))}"
        case "value_error":
            said = str(context["error"])
        case "literal_error":
            said = f"must be {context['expected']}, not {described(value)}"
        case "greater_than_equal":
            said = f"must be at least {context['ge']}, not {described(value)}"
        case "less_than_equal":
            said = f"must be at most {context['le']:,}, not {described(value)}"
        case _:
            said = f"must be {_EXPECTED.get(kind, error['msg'])}, not {described(value)}"
    return f"{said}. Write, for example: {example}" if example else said


def described(value: Any) -> str:
    """What kind of value it is; never its text, which may be a key."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:,}" if abs(value) < INT64 else "a number beyond 64 bits"
        case float():
            return f"the number {value}"
        case str():
            return "text" if value else "empty text"
        case datetime():
            return "a date with a time"
        case date():
            return f"the unquoted date {value}"
        case dict():
            return "a table"
        case list():
            return f"a list of {len(value)}"
    return "that"
