"""Reads the request of a task, JSON or a form, into a protobuf `TaskSpec` and `TaskOptions`.

Checks the names and types of fields; values and required fields are checked by the services.
"""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from gateway.options import GatewayOptions
from gateway.parsing.body import UTF_8, RequestBody, arrived_body, charset_of
from gateway.parsing.json import LARGE_BODY, parse_json, read_json
from gateway.parsing.multipart import Form, FormFields, read_form
from gateway.request import Request
from gateway.state import Gateway, account_of
from gateway.types import COMMON_FIELDS, TASK_FORMATS, check_task_type
from gateway.types.base import TaskFormat
from gateway.types.fields import Field, check_flag, parse_flag_text, unknown_field
from pomelo.call import Call
from pomelo.errors import PomeloError, invalid, missing
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskSpec, TaskType
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.media import data_uris
from pomelo.service import Visit

_URL = re.compile(r"\s*(?:https?|ftp|file|blob):", re.IGNORECASE)


@dataclass(slots=True)
class TaskRequest:
    """A task as requested; `input` is the input message within `spec`, `stream` whether events are sent."""

    spec: TaskSpec
    input: Any
    options: TaskOptions
    task_format: TaskFormat
    stream: bool = False


class Translation(ABC):
    """A request for tasks of one type in the form of another API."""

    task_type: ClassVar[TaskType.ValueType]
    form_fields: ClassVar[FormFields | None] = None
    """The fields of the form; None: the body is JSON."""

    @abstractmethod
    def translate(self, body: dict[str, Any], call: Call) -> Mapping[str, Any]:
        """Returns the fields of `POST /api/v1/task` for those of a body, which may be changed.

        Raises:
            PomeloError: invalid_parameter, missing_parameter.
        """


async def read_task(
    gateway: Gateway, request: Request, call: Call, visit: Visit, translation: Translation | None = None
) -> TaskRequest:
    """Reads the request, storing its audio if it is large. With a `translation` it is in the form of another
    API.

    Raises:
        PomeloError: what the request is refused with; its headers come first, then body, model and fields.
    """
    if call.header_error is not None:
        raise await visit.refuse(call.header_error)
    values: Mapping[str, Any] = {}
    form = Form()
    renamed = translation is not None
    try:
        is_form = _is_form(request)
        if translation is not None:
            if is_form != (translation.form_fields is not None):
                expected = "application/json" if is_form else "multipart/form-data"
                raise PomeloError("unsupported_media_type", f"Send {expected}")
            if translation.form_fields is not None:
                form = Form(translation.form_fields, translation.task_type)
        data = b""
        if is_form:
            await read_form(gateway, request, call, visit, form)
            values = form.texts
            size = sum(map(len, values.values()))
        else:
            data = await _read_json(gateway.options, request, call, visit)
            size = len(data)
        if size <= LARGE_BODY:
            if not is_form:
                values = parse_json(data)
            task_type = await gateway.task_type(model_of(values), call)
            if translation is not None:
                check_task_type(task_type, translation.task_type)
                values = translation.translate(dict(values), call)
            parsed = build_task(values["model"], task_type, values, form=is_form, renamed=renamed)
        else:
            async with gateway.parse_queue.body(account_of(call), size, visit.is_alone, call) as steps:
                if not is_form:
                    values = steps.run(partial(parse_json, data))
                task_type = await gateway.task_type(model_of(values), call)
                if translation is not None:
                    check_task_type(task_type, translation.task_type)
                    values = steps.run(partial(translation.translate, dict(values), call))
                model = values["model"]
                parsed = steps.run(
                    partial(build_task, model, task_type, values, form=is_form, renamed=renamed)
                )
            await asyncio.sleep(0)  # yields to other requests, because the next steps take time too
        del data
        if form.audio is not None or values.get("audio") is not None:
            await _add_audio(gateway, parsed, form, values.get("audio"), call, visit)
    except PomeloError as error:
        model = (values or form.texts).get("model")
        # `refuse` returns the error to report: one of the model precedes one of a field.
        raise await visit.refuse(error, model if type(model) is str else "") from None
    return parsed


async def _read_json(options: GatewayOptions, request: Request, call: Call, visit: Visit) -> bytes:
    limit = options.json_limit
    data = arrived_body(request, min(LARGE_BODY, limit))
    if data is None:
        return await read_json(RequestBody(request, call, visit, limit, options))
    visit.reserve(len(data))
    return data


def model_of(values: Mapping[str, Any]) -> str:
    """Returns the model that a body names.

    Raises:
        PomeloError: missing_parameter, invalid_parameter.
    """
    name = values.get("model")
    if name is None or name == "":
        raise missing("model")
    if type(name) is not str:
        raise invalid("model", "text")
    return name


def build_task(
    model: str, task_type: int, values: Mapping[str, Any], *, form: bool = False, renamed: bool = False
) -> TaskRequest:
    """Builds the task from the values of a body, without its audio. With `form`, the values are the texts
    of a form. `renamed`: the caller knows the fields by other names, which errors then do not propose.

    Raises:
        PomeloError: invalid_parameter, missing_parameter (parts of messages); unsupported_model if the
            task type is newer than this gateway.
    """
    task_format = TASK_FORMATS.get(task_type)
    if task_format is None:
        raise PomeloError("unsupported_model", f"Unsupported task type: {model}", field="model")
    fields = task_format.fields
    spec = TaskSpec(model=model)
    task_input = getattr(spec, task_format.input)
    task_input.SetInParent()
    parsed = TaskRequest(spec, task_input, TaskOptions(), task_format)
    for name, value in values.items():
        field = fields.get(name)
        if value is None or name in COMMON_FIELDS or (name == "audio" and task_format.takes_audio):
            continue
        if field is None:
            raise unknown_field(name, task_format.name) if renamed else task_format.unknown_field(name)
        if form:
            value = _parse_form_text(field, value)
            if value is None:  # the text null, of a field that is not a text
                continue
        field.assign(getattr(parsed, field.target), value)
    stream = values.get("stream")
    if form and stream is not None:
        stream = parse_flag_text(stream)
    parsed.stream = stream is not None and check_flag("stream", stream)
    if task_format.media_range and not parsed.stream and not parsed.options.delivery:
        # A stream keeps the default of the API, which makes its lines short enough for every client.
        parsed.options.delivery = MediaDelivery.MEDIA_DELIVERY_BOTH
    return parsed


def _parse_form_text(field: Field, text: str) -> Any:
    try:
        return field.parse_form(text)
    except ValueError as error:
        raise invalid(field.name, f"JSON text ({error})") from None


def _is_form(request: Request) -> bool:
    headers = request.headers
    if "Content-Encoding" in headers:
        encodings = headers.getall("Content-Encoding")
        if any(encoding.strip().lower() not in ("", "identity") for encoding in encodings):
            raise PomeloError("unsupported_media_type", "Send the body without Content-Encoding")
    content_type = headers.get("Content-Type", "")
    if content_type == "application/json":
        return False
    name = content_type.split(";", 1)[0].strip().lower()
    if name not in ("application/json", "multipart/form-data"):
        raise PomeloError("unsupported_media_type")
    if charset_of(content_type) not in UTF_8:
        raise PomeloError("unsupported_media_type", "Send the body in UTF-8, and with no other charset")
    return name == "multipart/form-data"


async def _add_audio(
    gateway: Gateway, parsed: TaskRequest, form: Form, value: Any, call: Call, visit: Visit
) -> None:
    task_format, file = parsed.task_format, form.audio
    if file is not None and not task_format.accepts_audio_file:
        raise task_format.unknown_field("audio")
    if not task_format.takes_audio:
        return
    audio = parsed.input.audio
    if file is not None:
        if not file.id:
            raise invalid("audio", "a file of at least one byte")
        audio.media_id, audio.content_type = file.id, file.content_type
    elif value is not None:
        try:
            await _add_base64_audio(gateway, audio, value, call, visit)
        except PomeloError as error:
            if "audio" not in form.texts or error.code != "invalid_parameter":
                raise
            # Usually a part without a file name, such as curl's audio=FILE without the @.
            message = f"{error.message}. In a form, send a file, with a file name"
            raise PomeloError(error.code, message, field=error.field, values=error.values) from None


async def _add_base64_audio(gateway: Gateway, audio: Any, value: Any, call: Call, visit: Visit) -> None:
    """Adds audio in base64: inline if it is small, else as an upload."""
    if type(value) is not str:
        raise invalid("audio", "base64 or a data: URI, as text")
    if _URL.match(value, 0, data_uris.MAX_HEAD):
        raise invalid("audio", "base64 or a data: URI; other URLs are not fetched")
    content_type, start = data_uris.head(value, "audio")
    pieces = data_uris.decode(value, start, "audio")
    size = (len(value) - start) * 3 // 4
    if size <= gateway.options.inline_limit:
        visit.reserve(size)
        audio.data = b"".join(pieces)
    else:
        first = next(pieces, b"")
        if first:
            upload = _yield_between(first, pieces)
            stored = await gateway.services.media.upload_media(content_type, upload, call)
            audio.media_id, content_type = stored.id, stored.content_type
    if not audio.data and not audio.media_id:
        raise invalid("audio", "base64 of at least one byte")
    audio.content_type = content_type


async def _yield_between(first: bytes, rest: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Decodes piece by piece, yielding to other requests in between."""
    yield first
    for piece in rest:
        yield piece
        await asyncio.sleep(0)
