"""A task's body, from JSON or from a form's fields, as a protobuf `Task`.

Called by `gateway.task`. Checks types and names, as `fields` says them; what a value may be is for the
engine to say.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from typing import Any

from jiter import from_json

from gateway.fields import EVERY_TASK, FIELDS, INPUTS, Field, check_flag, check_text, unknown
from gateway.incoming import Incoming
from gateway.json_faults import unreadable
from gateway.json_scan import JsonScan
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import Task, TaskType

HEARS = frozenset({TaskType.TASK_TYPE_SPEECH_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT})
"""The kinds that take audio."""

TAKES_FILE = HEARS | {TaskType.TASK_TYPE_TEXT_TO_SPEECH}
"""The kinds beside which a form may have a file `audio`. Text-to-speech ignores it, as documented."""

MAKES_MEDIA = frozenset(
    {
        TaskType.TASK_TYPE_IMAGE,
        TaskType.TASK_TYPE_TEXT_TO_SPEECH,
        TaskType.TASK_TYPE_SPEECH_TO_SPEECH,
    }
)
"""The kinds with a response_format."""

LARGE = 64 * 1024
"""Bytes up to which a body is parsed without a `JsonScan` and without waiting in the
`ParseQueue`."""


async def read_json(incoming: Incoming) -> bytes:
    """Reads the complete body, and refuses one that would take `parse` too long.

    Raises:
        PomeloError: invalid_body, payload_too_large, overloaded, deadline_exceeded.
    """
    piece = await incoming.piece()
    incoming.hold(len(piece))
    if len(piece) == incoming.length and len(piece) <= LARGE:
        return piece
    data = bytearray()  # not a list of pieces, because a piece may be a single byte
    scan: JsonScan | None = None
    while piece:
        data += piece
        if scan is not None:
            scan.feed(piece)
        elif len(data) > LARGE:  # a smaller body can't take long to parse
            scan = JsonScan()
            scan.feed(bytes(data))
        piece = await incoming.piece()
        incoming.hold(len(piece))
    return bytes(data)


def parse(data: bytes) -> dict[str, Any]:
    """The object that JSON text in UTF-8 holds, with or without a byte-order mark. Deeper than 200 levels is
    refused, and so is an object with a name twice, at any level: a proxy may read another value than we.

    Raises:
        PomeloError: invalid_body; invalid_parameter: a text has half a surrogate pair, a name is given twice.
    """
    if data.startswith(BOM_UTF8):
        data = data[len(BOM_UTF8) :]
    try:
        value = from_json(data, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise unreadable(data, str(error)) from None
    if type(value) is not dict:
        raise PomeloError("invalid_body", "The body must be a JSON object with model and the task's fields")
    return value


def model_of(values: Mapping[str, Any]) -> str:
    """The model that the body names.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    name = values.get("model")
    if name is None or name == "":
        raise missing("model")
    return check_text("model", name)


def make_task(
    name: str, kind: int, values: Mapping[str, Any], *, form: bool = False
) -> tuple[Task, Any, bool]:
    """The task, its input within it (without audio), and whether the caller wants a stream.

    `form` tells that the values are a form's texts.

    Raises:
        PomeloError: invalid_parameter, missing_parameter (parts of messages); unsupported_model when the
            model's kind is younger than this gateway.
    """
    task = Task(model=name)
    fields = FIELDS.get(kind)
    if fields is None:
        raise PomeloError("unsupported_model", f"Unsupported task type: {name}", field="model")
    target = getattr(task, INPUTS[kind])
    target.SetInParent()
    for key, value in values.items():
        field = fields.get(key)
        if value is None or key in EVERY_TASK or (key == "audio" and kind in HEARS):
            continue
        if field is None:
            raise unknown(key, kind)
        field.put(target, _read(key, field, value) if form else value)
    stream = values.get("stream")
    if form and stream is not None:
        stream = {"true": True, "false": False}.get(stream.lower(), stream)
    stream = stream is not None and check_flag("stream", stream)
    if kind in MAKES_MEDIA and not stream and not target.response_format:
        # A stream keeps the default of the API, which makes its lines short enough for every client.
        target.response_format = ResponseFormat.RESPONSE_FORMAT_BOTH
    return task, target, stream


def _read(name: str, field: Field, text: str) -> Any:
    """The value that the text of a form's field means."""
    try:
        return field.read(text)
    except ValueError as error:
        raise invalid(name, f"JSON text ({error})") from None
