"""What describes a task type in the REST API: its fields, its results, and its schemas in OpenAPI."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from jiter import from_json
from pydantic_core import to_json

from gateway.openapi.schema import Schema, object_of, one_of
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import TaskStarted

Link = Callable[[str], str]
"""Maps a media link of the engine to the link that callers get."""

_MAX_NUMBER_LENGTH = 400
"""Characters; a float written out in full has some 330."""


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a task's body.

    `assign` sets a JSON value in a protobuf message; it raises invalid_parameter or missing_parameter.
    `parse_form` converts the text of a form field to the JSON value; it raises ValueError. `schema`
    describes the field in OpenAPI.
    """

    name: str
    assign: Callable[[Any, Any], None]
    parse_form: Callable[[str], Any]
    schema: Schema

    @property
    def is_json(self) -> bool:
        """Whether a form has the field as JSON text."""
        return self.parse_form in (json_from_form, list_from_form)


@dataclass(frozen=True, slots=True)
class TaskFormat:
    """How the REST API represents one task type.

    `name` is its public name, `input` its field of `Task`, `output` its field of `TaskResult`. `required` are
    the required fields, with `audio` if the type takes audio. If `ignores_audio_file`, a form may have an
    audio file, which is not used. `render_event` returns the stream's objects for an event of the type
    `event` (empty: the stream has none but its result).

    `schema_name` and `result_schema_name` name its OpenAPI schemas; `schemas` has the latter and those that
    it refers to.

    `media_range` is the prefix of media types that `Accept` may ask for in place of JSON, empty if there
    are none, and `output_formats` are the values of output_format by media type. `raw_media` returns the
    file of a result; None: its bytes come as `audio_chunk` events.
    """

    name: str
    input: str
    output: str
    schema_name: str
    result_schema_name: str
    example_model: str
    required: tuple[str, ...]
    fields: Mapping[str, Field]
    render_result: Callable[[TaskResult, Link], bytes]
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    event: str = ""
    render_event: Callable[[StreamObjects, Any], Iterable[bytes]] = lambda objects, event: ()
    media_range: str = ""
    output_formats: Mapping[str, int] = field(default_factory=dict)
    raw_media: Callable[[TaskResult], Any] | None = None
    ignores_audio_file: bool = False

    @property
    def takes_audio(self) -> bool:
        """Whether audio is part of the input."""
        return "audio" in self.required

    @property
    def accepts_audio_file(self) -> bool:
        """Whether a form may have an audio file."""
        return self.takes_audio or self.ignores_audio_file


# --- rendering


class StreamObjects:
    """The JSON objects of one task's stream; the members that they share are rendered once.

    `last` is the object that ends the stream, empty until it is known. `is_first` is whether no object was
    rendered so far.
    """

    __slots__ = ("_prefixes", "_started", "is_first", "last")

    def __init__(self, started: TaskStarted) -> None:
        self._started = started
        self._prefixes: dict[str, bytes] = {}
        self.is_first = True
        self.last = b""

    def prefix(self, object_type: str, members: bytes) -> bytes:
        """Returns the beginning of an object: the common members, then `members`, which must not vary."""
        self.is_first = False
        prefix = self._prefixes.get(object_type)
        if prefix is None:
            prefix = self._prefixes[object_type] = open_object(self._started, object_type) + members
        return prefix


def open_object(source: TaskResult | TaskStarted, object_type: str) -> bytes:
    """Returns a JSON object without its closing brace, to which more members can be appended."""
    members = {
        "id": source.id,
        "object": object_type,
        "created": source.created.seconds,
        "model": source.model,
    }
    return to_json(members)[:-1]


def render_media(url: str, data: bytes) -> bytes:
    """Returns the JSON object of a media file, with its link, its bytes, or both."""
    # Built by hand: the base64 of an image is megabytes, which need no search for characters to escape.
    members = []
    if url:
        members.append(b'"url":' + to_json(url))
    if data:
        members.append(b'"b64_json":"' + binascii.b2a_base64(data, newline=False) + b'"')
    return b"{" + b",".join(members) + b"}"


MEDIA_SCHEMA = object_of(
    {
        "url": {
            "type": "string",
            "format": "uri",
            "description": "Signed; needs no key until it expires.",
        },
        "b64_json": {"type": "string", "contentEncoding": "base64"},
    }
)


def result_schema(object_type: str, id_prefix: str, **members: Any) -> Schema:
    """Returns the schema of a result with the common members and `members`, all of them required."""
    return object_of(
        {
            "id": {"type": "string", "pattern": f"^{id_prefix}_"},
            "object": {"const": object_type},
            "created": {"type": "integer", "description": "Unix seconds."},
            "model": {"type": "string"},
            **members,
        },
        ("id", "object", "created", "model", *members),
    )


# --- form values


def text_from_form(text: str) -> Any:
    return text


def number_from_form(text: str) -> Any:
    # No accepted number is longer than that, and parsing a very long one would be slow.
    if len(text) > _MAX_NUMBER_LENGTH:
        return text
    try:
        return json_from_form(text)
    except ValueError:
        return text  # `assign` refuses it


def json_from_form(text: str) -> Any:
    return from_json(text.encode(), allow_inf_nan=False, catch_duplicate_keys=True)


def flag_from_form(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


def list_from_form(text: str) -> Any:
    # A text such as [END] is not a list.
    return json_from_form(text) if text.startswith(('["', "[]")) else text


# --- fields


def text_field(name: str, schema: Schema) -> Field:
    def assign(message: Any, value: Any) -> None:
        setattr(message, name, check_text(name, value))

    return Field(name, assign, text_from_form, schema)


def integer_field(name: str, schema: Schema, bits: int = 64) -> Field:
    min_value, max_value = -(1 << bits - 1), (1 << bits - 1) - 1

    def assign(message: Any, value: Any) -> None:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not min_value <= value <= max_value:
            raise invalid(name, "a whole number in its range")
        setattr(message, name, value)

    return Field(name, assign, number_from_form, schema)


def number_field(name: str, schema: Schema, label: str = "") -> Field:
    label = label or name

    def assign(message: Any, value: Any) -> None:
        try:
            if type(value) not in (int, float) or not isfinite(value):
                raise invalid(label, "a number in its range")
        except OverflowError:
            raise invalid(label, "a number in its range") from None
        setattr(message, name, value)

    return Field(name, assign, number_from_form, schema)


def flag_field(name: str, schema: Schema, label: str = "") -> Field:
    label = label or name

    def assign(message: Any, value: Any) -> None:
        setattr(message, name, check_flag(label, value))

    return Field(name, assign, flag_from_form, schema)


def choice_field(name: str, schema: Schema, values: Mapping[str, int], shown: str) -> Field:
    """Returns a field with an enum value for each of the texts `values`; `shown` lists them in messages."""

    def assign(message: Any, value: Any) -> None:
        number = values.get(value) if type(value) is str else None
        if number is None:
            raise invalid(name, f"one of {shown}")
        setattr(message, name, number)

    return Field(name, assign, text_from_form, schema)


def by_name(*fields: Field) -> dict[str, Field]:
    return {each.name: each for each in fields}


RESPONSE_FORMAT = choice_field(
    "response_format",
    one_of(
        "url", "b64_json", description="A link or the bytes; both when absent, if they fit a stream's line."
    ),
    {"url": ResponseFormat.RESPONSE_FORMAT_URL, "b64_json": ResponseFormat.RESPONSE_FORMAT_B64_JSON},
    "url, b64_json",
)


# --- checks


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


def check_names(values: Mapping[str, Any], known: Collection[str], label: str) -> None:
    """Refuses an object with a field that is not `known`, unless its value is null; `label` is the object's
    own name.

    Raises:
        PomeloError: invalid_parameter, naming the field.
    """
    for name, value in values.items():
        if name not in known and value is not None:
            raise unknown_field(f"{label}.{name}")


def unknown_field(name: str, type_name: str = "") -> PomeloError:
    """Returns the error for a field that the task type `type_name` does not have (empty: that no task type
    has)."""
    shown = shorten_name(name)
    where = f" for {type_name} models" if type_name else ""
    return PomeloError("invalid_parameter", f"Unknown field{where}: {shown}. Leave it out", field=shown)


def shorten_name(name: str) -> str:
    """Returns a field's name as error messages show it."""
    return name if len(name) <= 100 else name[:100] + "…"
