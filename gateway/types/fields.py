"""The fields of a task's body: their types in JSON and in forms, and their OpenAPI schemas.

Ranges and required fields are in `pomelo.fields`; the services check them, the same for both protocols.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import isfinite
from typing import Any, Literal

from jiter import from_json

from gateway.openapi.schema import Schema
from pomelo.errors import PomeloError, invalid, missing
from pomelo.fields import (
    CHARACTERS,
    MAX_METADATA_KEY,
    MAX_METADATA_VALUE,
    FieldRule,
    Rules,
    invalid_number,
)
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.protobuf.enums import enum_names

Target = Literal["input", "spec", "options"]
"""The attribute of a `TaskRequest` with the message in which a field is set."""

_MAX_NUMBER_LENGTH = 400
"""Characters; a float written out in full has some 330."""

_MAX_SIMILAR_LENGTH = 64
"""Characters of an unknown field's name for which similar names are looked up, which takes time."""

_SIMILARITY = 0.85
"""Of two names, from 0 to 1, from which one is taken for a misspelling of the other."""

_LIST = re.compile(r'\s*+\[\s*+["\]]')
"""The beginning of a list of texts, written as JSON."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a task's body.

    `assign` sets a JSON value in the protobuf message `target`; it raises invalid_parameter or
    missing_parameter. `parse_form` converts the text of a form field to the JSON value, None for a field that
    is left out; it raises ValueError.
    `schema` is what OpenAPI says about the field besides its rule; a field without both is not described.
    """

    name: str
    assign: Callable[[Any, Any], None]
    parse_form: Callable[[str], Any]
    schema: Schema
    target: Target = "input"

    @property
    def is_json(self) -> bool:
        """Whether a form has the field as JSON text."""
        return self.parse_form in (parse_json_text, parse_list_text, parse_object_text)


def _parse_number_text(text: str) -> Any:
    # No accepted number is longer than that, and parsing a very long one would be slow.
    if len(text) > _MAX_NUMBER_LENGTH:
        return text
    try:
        return parse_json_text(text)
    except ValueError:
        return text  # `assign` refuses it


def parse_json_text(text: str) -> Any:
    return from_json(text.encode(), allow_inf_nan=False, catch_duplicate_keys=True)


def parse_flag_text(text: str) -> Any:
    # White space around it is ignored, as around numbers.
    return {"true": True, "false": False, "null": None}.get(text.strip().lower(), text)


def parse_list_text(text: str) -> Any:
    # A text such as [END] is not a list.
    return parse_json_text(text) if _LIST.match(text) else text


def parse_object_text(text: str) -> Any:
    return parse_json_text(text) if text.lstrip().startswith("{") or text.strip() == "null" else text


def describe(rule: FieldRule, schema: Schema, max_characters: int = 0) -> Schema:
    """Returns the OpenAPI schema of a field: what its `rule` says, with the members of `schema` added or
    replaced. For an object it is `schema` alone, which refers to the schema of the object. `max_characters`
    is the largest limit of the models; 0: it is not known."""
    if "anyOf" in schema:
        return schema
    min_size = 1 if rule.required else None
    described = {
        "type": rule.type if rule.required else [rule.type, "null"],
        "minimum": rule.minimum,
        "maximum": rule.maximum,
        "minLength": min_size if rule.type == "string" else None,
        "maxLength": max_characters if rule is CHARACTERS and max_characters else rule.max_length,
        "minItems": min_size if rule.type == "array" else None,
        "maxItems" if rule.type == "array" else "maxProperties": rule.max_items,
        "enum": [*rule.choices, *([] if rule.required else [None])] if rule.choices else None,
        "default": rule.default,
    }
    return {key: value for key, value in described.items() if value is not None} | schema


def text(name: str, *, expected: str = "", target: Target = "input", **schema: Any) -> Field:
    """Returns a field of text. With `expected`, which says what it must be, an empty text is refused:
    protobuf has no other value for a field that is left out."""

    def assign(message: Any, value: Any) -> None:
        if expected and value == "":
            raise invalid(name, expected)
        setattr(message, name, check_text(name, value))

    return Field(name, assign, str, schema, target)


def integer(name: str, rules: Rules, *, bits: int = 64, **schema: Any) -> Field:
    """Returns a field that is checked to fit `bits`; errors have the range of its rule."""
    min_value, max_value = -(1 << bits - 1), (1 << bits - 1) - 1
    rule = rules[name]
    bounded = replace(rule, maximum=max_value) if rule.maximum is None else rule

    def assign(message: Any, value: Any) -> None:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise invalid_number(name, rule, is_text=type(value) is str)
        if not min_value <= value <= max_value:
            raise invalid_number(name, bounded)
        setattr(message, name, value)

    return Field(name, assign, _parse_number_text, schema)


def number(name: str, rules: Rules, *, label: str = "", **schema: Any) -> Field:
    """Returns a field that is checked to be finite. Errors name `label`, by default `name`, and have the
    range of its rule."""
    label = label or name
    rule = rules[name]

    def assign(message: Any, value: Any) -> None:
        try:
            if type(value) not in (int, float) or not isfinite(value):
                raise invalid_number(label, rule, is_text=type(value) is str)
        except OverflowError:
            raise invalid_number(label, rule) from None
        setattr(message, name, value)

    return Field(name, assign, _parse_number_text, schema)


def flag(name: str, *, label: str = "", **schema: Any) -> Field:
    label = label or name

    def assign(message: Any, value: Any) -> None:
        setattr(message, name, check_flag(label, value))

    return Field(name, assign, parse_flag_text, schema)


def choice(
    name: str,
    values: Mapping[str, int],
    *,
    aliases: Collection[str] = (),
    target: Target = "input",
    attribute: str = "",
    **schema: Any,
) -> Field:
    """Returns a field with an enum value for each of the texts `values`; errors do not name `aliases`.
    `attribute` is its name in the protobuf message, by default `name`."""
    documented = [each for each in values if each not in aliases]

    def assign(message: Any, value: Any) -> None:
        enum_value = values.get(value) if type(value) is str else None
        if enum_value is None:
            raise invalid(name, f"one of {', '.join(documented)}")
        setattr(message, attribute or name, enum_value)

    return Field(name, assign, str, schema, target)


def unsupported(name: str, expected: str, *, neutral: Any = None) -> Field:
    """Returns a field of other APIs that has no effect, and may only have a value that asks for none: null or
    `neutral`, which is a number, false or {}. `expected` completes the sentence "it must be …"."""

    def assign(message: Any, value: Any) -> None:
        if type(neutral) is int and type(value) is float:
            value = int(value) if value.is_integer() else value
        if type(value) is not type(neutral) or value != neutral:
            raise invalid(name, expected)

    if neutral is None:
        return Field(name, assign, parse_json_text, {})
    only = {"type": "object", "maxProperties": 0} if neutral == {} else {"const": neutral}
    schema = {"anyOf": [only, {"type": "null"}], "description": f"Must be {expected}."}
    return Field(name, assign, parse_flag_text if neutral is False else parse_json_text, schema)


def enum_values(enum: Any, names: Iterable[str]) -> dict[str, Any]:
    """Returns the values of a protobuf enum by these names: its own in lower case, without their prefix."""
    numbers = {name: number for number, name in enum_names(enum.DESCRIPTOR).items()}
    return {name: numbers[name] for name in names}


def by_name(*fields: Field) -> dict[str, Field]:
    return {each.name: each for each in fields}


RESPONSE_FORMAT = choice(
    "response_format",
    {"url": MediaDelivery.MEDIA_DELIVERY_LINK, "b64_json": MediaDelivery.MEDIA_DELIVERY_INLINE},
    target="options",
    attribute="delivery",
    description="A link or the bytes; both when absent, if they fit a stream's line.",
)


def _assign_metadata(spec: Any, value: Any) -> None:
    if type(value) is not dict:
        raise invalid("metadata", "an object of texts")
    for key, text in value.items():
        spec.metadata[key] = check_text(f"metadata.{shorten_name(key)}", text)


METADATA = Field(
    "metadata",
    _assign_metadata,
    parse_json_text,
    {
        "propertyNames": {"minLength": 1, "maxLength": MAX_METADATA_KEY},
        "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE},
        "description": "Your own data for the usage record, by which usage can be summed.",
    },
    "spec",
)


def check_text(label: str, value: Any) -> str:
    """Returns `value` if it is a string.

    Raises:
        PomeloError: invalid_parameter, naming `label`.
    """
    if type(value) is not str:
        raise invalid(label, "text")
    return value


def check_flag(label: str, value: Any) -> bool:
    """Returns `value` if it is a boolean.

    Raises:
        PomeloError: invalid_parameter, naming `label`.
    """
    if type(value) is not bool:
        raise invalid(label, "true or false")
    return value


def required_text(values: Mapping[str, Any], name: str, label: str) -> str:
    """Returns the member `name` of an object, which must be a string; `label` is the object's own name.

    Raises:
        PomeloError: missing_parameter, invalid_parameter, naming the member.
    """
    value = values.get(name)
    if value is None:
        raise missing(f"{label}.{name}")
    return check_text(f"{label}.{name}", value)


def check_names(values: Mapping[str, Any], known: Collection[str], label: str) -> None:
    """Refuses an object with a field that is not `known`, unless its value is null; `label` is the object's
    own name.

    Raises:
        PomeloError: invalid_parameter, naming the field.
    """
    for name, value in values.items():
        if name not in known and value is not None:
            raise unknown_member(label, name, known)


def unknown_field(
    name: str, type_name: str = "", *, known: Collection[str] = (), listed: Collection[str] = ()
) -> PomeloError:
    """Returns the error for a field that the task type `type_name` does not have (empty: that no task type
    has). It proposes the one of the fields `known` that is spelled alike, or those that are `listed`."""
    shown = shorten_name(name)
    where = f" for {type_name} models" if type_name else ""
    advice = "Leave it out"
    if name in known:  # a member of an object, such as voice_settings.speed
        outer, _, member = name.rpartition(".")
        advice = f"Send {outer} as an object with {member}"
    elif meant := _similar_name(name, known):
        advice = f"Use {meant}, or leave it out"
    elif listed:
        advice = f"Leave it out, or use {'one of ' if len(listed) > 1 else ''}{', '.join(listed)}"
    return PomeloError("invalid_parameter", f"Unknown field{where}: {shown}. {advice}", field=shown)


def unknown_member(label: str, name: str, known: Collection[str]) -> PomeloError:
    """Returns the error for a member of the object `label`, which has those that are `known`."""
    return unknown_field(f"{label}.{name}", known=[f"{label}.{each}" for each in known])


def _similar_name(name: str, known: Collection[str]) -> str:
    """Returns the name that `name` probably stands for: max_tokens for maxTokens; else an empty text.
    Only what follows the last dot of a name is compared."""
    if len(name) > _MAX_SIMILAR_LENGTH:
        return ""
    names = {_bare(each): each for each in known}
    close = get_close_matches(_bare(name), names, n=1, cutoff=_SIMILARITY)
    return names[close[0]] if close else ""


def _bare(name: str) -> str:
    return name.rpartition(".")[2].lower().replace("_", "").replace("-", "")


def renamed_field(name: str, parameter: str) -> PomeloError:
    """Returns the error for a field of a task that a path has by the name `parameter`."""
    return invalid(parameter, f"given by this name, not as {name}")


def shorten_name(name: str) -> str:
    """Returns a field's name as error messages show it."""
    return name if len(name) <= 100 else name[:100] + "…"
