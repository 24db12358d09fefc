"""The schema of the rows of a catalogue file, and the messages about wrong rows.

pydantic checks the types; `row_faults` turns its errors into messages that say what to write instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from datetime import date, datetime
from math import isfinite
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pomelo.catalog.task_types import TASK_TYPE_ROWS
from pomelo.catalog.toml_file import Fault, Keys, TomlFile
from pomelo.gen.v1.text_pb2 import ReasoningEffort
from pomelo.protobuf.enums import enum_names

MAX_LIMIT = 2**31 - 1
_MAX_NAME_LENGTH = 200
INT64 = 2**63
_YEARS = range(2000, 3000)

EFFORTS = {name: effort for effort, name in enum_names(ReasoningEffort.DESCRIPTOR).items()}

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
    "aliases": 'aliases = ["gpt-5.6-sol"]',
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
    "context_tokens": "context_tokens = 32_768",
    "max_tokens_field": 'max_tokens_field = "max_completion_tokens"',
    "efforts": 'efforts = ["none", "low", "medium", "high"]',
    "reasoning_effort": 'reasoning_effort = "none"',
    "extra": "extra = { top_k = 40 }",
    "headers": 'headers = { X-Title = "Pomelo" }',
    "meanings": 'meanings = { busy = "provider_unavailable" }',
    "voices": 'adam = "pNInz6obpgDQGcFmaJgB"',
}
"""Key of a row -> an example of it."""

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


def suggest(name: str, known: Collection[str]) -> str:
    """A message with the valid names for an unknown one."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = f"Valid: {', '.join(known)}" if known else "None is valid"
    return f"Did you mean {close[0]}? {listed}" if close else listed


def check_name(text: str) -> str:
    """Returns `text` if it is a name that can be shown in logs, tables and URLs.

    Raises:
        ValueError: it is not.
    """
    if not 1 <= len(text) <= _MAX_NAME_LENGTH or not text.isprintable() or text != text.strip():
        raise ValueError(
            f"must be a name of 1 to {_MAX_NAME_LENGTH} printable characters, without control characters and "
            "without spaces at its ends"
        )
    return text


def parse_date(value: Any) -> date:
    """The date of a TOML date or of a string such as 2026-12-31.

    Raises:
        ValueError: it is not a date, or out of range.
    """
    if isinstance(value, str) and _DATE.fullmatch(value):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            raise ValueError(f"is not a valid date: {value}") from None
    if type(value) is not date or value.year not in _YEARS:
        raise ValueError(f"must be a date from 2000 to 2999, such as 2026-12-31, not {describe(value)}")
    return value


def one_of(known: Collection[str], expected: str) -> AfterValidator:
    """A check that a text is one of `known`; the message says that it must be `expected`."""

    def check(text: str) -> str:
        if text not in known:
            raise ValueError(f"must be {expected}. {suggest(text, known)}")
        return text

    return AfterValidator(check)


def _clamp(values: list[Any]) -> list[Any]:
    numbers = [value for value in values if type(value) in (int, float) and isfinite(value)]
    if len(numbers) != len(values) or len(values) not in (2, 3):
        raise ValueError(
            "must be two numbers, the minimum and the maximum, and optionally a third that values must be a "
            f"multiple of; not {describe(values)}"
        )
    if numbers[0] > numbers[1]:
        raise ValueError(f"must have the minimum first: {numbers[0]} is more than {numbers[1]}")
    if numbers[2:] and numbers[2] <= 0:
        raise ValueError("must have a third number above 0, or no third number")
    return values


Name = Annotated[str, AfterValidator(check_name)]
Date = Annotated[date, BeforeValidator(parse_date)]
Limit = Annotated[int, Field(ge=1, le=MAX_LIMIT)]


class Row(BaseModel):
    """A table of a catalogue file. Values are not converted, and unknown keys are refused."""

    model_config = ConfigDict(strict=True, extra="forbid")


class RouteRow(Row):
    """A route. Other keys are options of its provider."""

    model_config = ConfigDict(extra="allow")

    provider: Name
    model: Name
    drop: list[str] = []
    clamp: dict[str, Annotated[list[Any], AfterValidator(_clamp)]] = {}
    efforts: (
        Annotated[list[Annotated[str, one_of(EFFORTS, "reasoning efforts")]], Field(min_length=1)] | None
    ) = None
    price: dict[str, Any] | None = None
    price_tiers: list[dict[str, Any]] | None = None
    price_version: Name | None = None
    price_note: Name | None = None
    retires: Date | None = None


class ModelRow(Row):
    type: Annotated[str, one_of(TASK_TYPE_ROWS, "a task type")]
    limits: dict[str, Limit] = {}
    price: dict[str, Any]
    price_tiers: list[dict[str, Any]] = []
    price_version: Name
    price_note: Name | None = None
    aliases: list[Name] = []
    routes: Annotated[list[RouteRow], Field(min_length=1)]
    retires: Date | None = None
    deprecated: Date | None = None


def row_faults(
    file: TomlFile, keys: Keys, schema: type[BaseModel], row: Any, known: Collection[str] = ()
) -> list[Fault]:
    """The errors of the row at `keys`, by its schema. `known` are further valid keys, for suggestions."""
    return [file.fault((*keys, *path), message) for path, message in wrong_values(schema, row, known)]


def wrong_values(schema: type[BaseModel], row: Any, known: Collection[str] = ()) -> list[tuple[Keys, str]]:
    """The paths of the values that do not match the schema, each with a message."""
    try:
        schema.model_validate(row)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        return [(_path(one), _message(one, {*schema.model_fields, *known})) for one in errors]
    return []


def _path(error: Any) -> Keys:
    return tuple(key for key in error["loc"] if key != "[key]")


def _message(error: Any, known: Collection[str]) -> str:
    """The message for an error of pydantic."""
    names = [key for key in reversed(_path(error)) if isinstance(key, str)]
    key = names[0] if names else ""
    example = next((EXAMPLES[name] for name in names if name in EXAMPLES), None)
    error_type, value, context = error["type"], error["input"], error.get("ctx", {})
    match error_type:
        case "missing":
            if key == "price" and (row := TASK_TYPE_ROWS.get(str(value.get("type")))):
                example = row.price_example
            return f"is missing. Add {example or key}"
        case "extra_forbidden":
            if isinstance(value, dict):
                return (
                    f"is an unknown key. A name with dots is written in quotes. {suggest(key, sorted(known))}"
                )
            return f"is an unknown key. {suggest(key, sorted(known))}"
        case "value_error":
            message = str(context["error"])
        case "literal_error":
            message = f"must be {context['expected']}, not {describe(value)}"
        case "greater_than_equal":
            message = f"must be at least {context['ge']}, not {describe(value)}"
        case "less_than_equal":
            message = f"must be at most {context['le']:,}, not {describe(value)}"
        case _:
            message = f"must be {_EXPECTED.get(error_type, error['msg'])}, not {describe(value)}"
    return f"{message}. Write, for example: {example}" if example else message


def describe(value: Any) -> str:
    """The type of a value for messages, without the contents of strings, which may be API keys."""
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
    return "another type"
