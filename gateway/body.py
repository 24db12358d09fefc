"""A task's body, from JSON or from a form's fields, as a protobuf `Task`.

Called by `gateway.task`. Checks types and names, as `fields` says them; what a value may be is for the
engine to say.
"""

import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from gateway.fields import FIELDS, KNOWN, check_flag, check_text, unknown
from gateway.incoming import Incoming
from gateway.json_scan import JsonScan
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.task_pb2 import Task, TaskType

INPUTS: Mapping[int, str] = {
    TaskType.TASK_TYPE_TEXT: "text",
    TaskType.TASK_TYPE_IMAGE: "image",
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: "text_to_speech",
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: "speech_to_speech",
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: "speech_to_text",
}
"""The input of each kind in `Task`."""

HEARS = frozenset({TaskType.TASK_TYPE_SPEECH_TO_SPEECH, TaskType.TASK_TYPE_SPEECH_TO_TEXT})
"""The kinds that take audio."""

MAKES_MEDIA = frozenset(
    {
        TaskType.TASK_TYPE_IMAGE,
        TaskType.TASK_TYPE_TEXT_TO_SPEECH,
        TaskType.TASK_TYPE_SPEECH_TO_SPEECH,
    }
)
"""The kinds with a response_format."""

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*)?;base64,", re.ASCII | re.IGNORECASE)
_STEP = 1024 * 1024
"""Characters of base64 that are decoded at a time."""

LARGE = 64 * 1024
"""Bytes up to which a body is parsed without a `JsonScan` and without waiting in the
`ParseQueue`."""


async def read_json(incoming: Incoming) -> bytes | bytearray:
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
    return data


def parse(data: bytes | bytearray) -> dict[str, Any]:
    """The object that JSON text holds. Deeper than 200 levels is refused.

    Raises:
        PomeloError: invalid_body.
    """
    try:
        value = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise PomeloError("invalid_body", f"The body is not JSON: {error}") from None
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
        if field is None:
            if key not in KNOWN:
                raise unknown(key)
        elif value is not None:
            field.put(target, field.read(value) if form else value)
    stream = values.get("stream")
    if form and stream is not None:
        stream = {"true": True, "false": False}.get(stream.lower(), stream)
    stream = stream is not None and check_flag("stream", stream)
    if kind in MAKES_MEDIA and not stream and not target.response_format:
        # A stream keeps the default of the API, which makes its lines short enough for every client.
        target.response_format = ResponseFormat.RESPONSE_FORMAT_BOTH
    return task, target, stream


def read_audio(value: Any) -> tuple[str, str]:
    """The media type (empty if absent) and the base64 text of audio given as base64 or a data: URI.

    Raises:
        PomeloError: invalid_parameter.
    """
    text = check_text("audio", value)
    if text[:5].lower() != "data:":
        return "", text
    start = _DATA_URI.match(text[:200])
    if start is None:
        raise _no_audio()
    return (start[1] or "").lower(), text[start.end() :]


def decode_base64(text: str) -> Iterator[bytes]:
    """Decodes base64 text, which may have line breaks (as base64(1) makes them), in pieces that
    take a few milliseconds each.

    Raises:
        PomeloError: invalid_parameter.
    """
    rest = b""
    padded = False
    try:
        for at in range(0, len(text), _STEP):
            data = rest + text[at : at + _STEP].encode("ascii").translate(None, b" \t\r\n")
            whole = len(data) - len(data) % 4
            data, rest = data[:whole], data[whole:]
            if padded and data:
                raise _no_audio()
            padded = data.endswith(b"=")
            yield binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        raise _no_audio() from None
    if rest:
        raise _no_audio()


def check_audio(data: bytes) -> bytes:
    """Returns `data`; refuses it if it is empty.

    Raises:
        PomeloError: invalid_parameter.
    """
    if not data:
        raise invalid("audio", "base64 of at least one byte")
    return data


def _no_audio() -> PomeloError:
    return invalid("audio", "base64, or a data: URI with ;base64")
