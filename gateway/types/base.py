"""What a task type defines for the REST API, and the parts that the objects of all types share."""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from gateway.openapi.schema import Schema, object_of
from gateway.types.fields import Field, unknown_field
from pomelo.errors import PomeloError
from pomelo.fields import Rules
from pomelo.gen.v1.image_pb2 import GeneratedImage
from pomelo.gen.v1.speech_pb2 import SpeechOutput
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted

Link = Callable[[str], str]
"""Maps a media link of the engine to the link that callers get."""

LARGE_FILE = 512 * 1024
"""Bytes above which a file takes some 2 ms and more to render."""

_STEP = 48 * 1024
"""Bytes that are encoded as base64 in one step; a multiple of three needs no padding."""


@dataclass(frozen=True, slots=True)
class TaskFormat:
    """How the REST API represents one task type.

    `name` is its public name, `input` its field of `TaskSpec`, `output` its field of `TaskResult`. `rules`
    has a rule for each of `fields`, and for `audio` if the type takes audio. If `ignores_audio_file`, a form
    may have an audio file, which is not used. `render_events` return the stream's objects for an event, by
    the type of event (empty: the stream has none but its last). `render_last` returns the object that ends a
    stream; None: the result.

    `schema_name` and `result_schema_name` name its OpenAPI schemas, `stream_schema_names` those of the
    objects in its streams (empty: the result); `schemas` has all but the first, and those that they refer to.
    `examples` are request bodies by their titles; `result_example` has the members of a result beside the
    common ones.

    `media_range` is the prefix of media types that `Accept` may ask for in place of JSON, or
    empty, and `output_formats` are the values of output_format by media type, empty for the default.
    `raw_media` returns the file of a result; None: its bytes come as `audio_chunk` events.
    `is_slow`: whether a result takes so long to render that it is rendered in a thread; None: never.
    """

    name: str
    input: str
    output: str
    schema_name: str
    result_schema_name: str
    example_model: str
    rules: Rules
    fields: Mapping[str, Field]
    render_result: Callable[[TaskResult, Link], bytes]
    schemas: Mapping[str, Schema] = field(default_factory=dict)
    stream_schema_names: tuple[str, ...] = ()
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    result_example: Mapping[str, Any] = field(default_factory=dict)
    render_events: Mapping[str, Callable[[StreamObjects, Any], Iterable[bytes]]] = field(default_factory=dict)
    render_last: Callable[[StreamObjects, TaskResult], bytes] | None = None
    media_range: str = ""
    output_formats: Mapping[str, int | str] = field(default_factory=dict)
    raw_media: Callable[[TaskResult], Any] | None = None
    is_slow: Callable[[TaskResult], bool] | None = None
    ignores_audio_file: bool = False

    @property
    def takes_audio(self) -> bool:
        return "audio" in self.rules

    @property
    def accepts_audio_file(self) -> bool:
        """Whether a form may have an audio file."""
        return self.takes_audio or self.ignores_audio_file

    @property
    def parts(self) -> list[str]:
        """The members of its fields that are objects, such as voice_settings.speed."""
        return [f"{name}.{part}" for name, rule in self.rules.items() for part in rule.fields or ()]

    async def render(self, result: TaskResult, render: Callable[..., bytes], *arguments: Any) -> bytes:
        """Returns what `render` makes of its arguments, a result among them. If the result is slow to render,
        a thread does it, and the event loop serves others meanwhile."""
        if self.is_slow is not None and self.is_slow(result):
            return await asyncio.to_thread(render, *arguments)
        return render(*arguments)

    def unknown_field(self, name: str) -> PomeloError:
        """Returns the error for a field that the task type does not have."""
        names = [*self.rules, "stream"]
        return unknown_field(name, self.name, known=names + self.parts, listed=names)


class StreamObjects:
    """The JSON objects of one task's stream; the members that they share are rendered once. `is_first` is
    whether no object was rendered so far, `prefixes` are the beginnings of objects that were."""

    __slots__ = ("_started", "is_first", "prefixes")

    def __init__(self, started: TaskStarted) -> None:
        self._started = started
        self.prefixes: dict[str, bytes] = {}
        self.is_first = True

    def prefix(self, object_type: str, members: bytes) -> bytes:
        """Returns the beginning of an object: the common members, then `members`, which must not vary."""
        self.is_first = False
        prefix = self.prefixes.get(object_type)
        if prefix is None:
            prefix = self.prefixes[object_type] = open_object(self._started, object_type) + members
        return prefix


def open_object(source: TaskResult | TaskStarted, object_type: str, **members: Any) -> bytes:
    """Returns a JSON object with the common members and `members`, without its closing brace, so that more
    can be appended."""
    common = {
        "id": source.id,
        "object": object_type,
        "created": source.create_time.seconds,
        "model": source.model,
        **members,
    }
    return to_json(common)[:-1]


def render_media(file: GeneratedImage | SpeechOutput, link: Link) -> bytes:
    """Returns the JSON object of a media file, with its link, its bytes, or both. In a thread, it leaves the
    interpreter to others between its steps."""
    # Built by hand: the base64 of an image is megabytes, which need no search for characters to escape.
    url, data = link(file.media.url), file.data
    parts = [b'{"url":' + to_json(url) if url else b"{"]
    if data:
        parts.append(b',"b64_json":"' if url else b'"b64_json":"')
        view = memoryview(data)
        steps = range(0, len(data), _STEP)
        parts += [binascii.b2a_base64(view[at : at + _STEP], newline=False) for at in steps]
        parts.append(b'"')
    parts.append(b"}")
    return b"".join(parts)


MEDIA_SCHEMA = object_of(
    {
        "url": {"type": "string", "format": "uri", "description": "Signed; needs no key until it expires."},
        "b64_json": {"type": "string", "contentEncoding": "base64"},
    },
    (),
)


def result_schema(
    object_type: str, id_prefix: str, *, optional: Mapping[str, Schema] | None = None, **members: Any
) -> Schema:
    """Returns the schema of an object with the common members, `members`, which it must have as well, and
    `optional` ones."""
    return object_of(
        {
            "id": {"type": "string", "pattern": f"^{id_prefix}_"},
            "object": {"const": object_type},
            "created": {"type": "integer", "description": "Unix seconds."},
            "model": {"type": "string"},
            **members,
            **(optional or {}),
        },
        ("id", "object", "created", "model", *members),
    )
