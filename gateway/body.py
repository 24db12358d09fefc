"""A task's body, from JSON or from a form's fields, as a protobuf `Task`.

Called by `gateway.task`. Checks types and names, as `fields` says them; what a value may be is for the
engine to say.
"""

import binascii
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from gateway.fields import FIELDS, KNOWN, check_flag, check_text, unknown
from gateway.incoming import Incoming, too_large
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
_SPACE = re.compile(r"[ \t\r\n]+")


async def read_json(incoming: Incoming, limit: int) -> dict[str, Any]:
    """The object that the body holds.

    Raises:
        PomeloError: invalid_body, payload_too_large.
    """
    data = incoming.here()
    if data is None:
        pieces = []
        while piece := await incoming.readany():
            pieces.append(piece)
        data = b"".join(pieces)
    if len(data) > limit:
        raise too_large("The body", limit)
    return parse(data)


def parse(data: bytes) -> dict[str, Any]:
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
    if kind in MAKES_MEDIA:
        target.response_format = ResponseFormat.RESPONSE_FORMAT_BOTH
    for key, value in values.items():
        field = fields.get(key)
        if field is None:
            if key not in KNOWN:
                raise unknown(key)
        elif value is not None:
            field.put(target, field.read(value) if form else value)
    stream = values.get("stream")
    if stream is None:
        return task, target, False
    if form:
        stream = {"true": True, "false": False}.get(stream.lower(), stream)
    return task, target, check_flag("stream", stream)


def decode_audio(value: Any) -> tuple[str, bytes]:
    """The media type (empty when it isn't said) and the bytes of audio given as base64 or a data: URI.

    Raises:
        PomeloError: invalid_parameter.
    """
    text = check_text("audio", value)
    content_type = ""
    if text[:5].lower() == "data:":
        start = _DATA_URI.match(text[:200])
        if start is None:
            raise invalid("audio", "base64, or a data: URI with ;base64")
        content_type = (start[1] or "").lower()
        text = text[start.end() :]
    try:
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except ValueError:
            # Line breaks, as base64(1) makes them.
            data = binascii.a2b_base64(_SPACE.sub("", text), strict_mode=True)
    except ValueError:
        raise invalid("audio", "base64, or a data: URI with ;base64") from None
    if not data:
        raise invalid("audio", "base64 of at least one byte")
    return content_type, data
