"""Text tasks in the forms of OpenAI's API: what chat completions and responses share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from pydantic_core import to_json

from gateway import sse
from gateway.parsing.task import Translation, read_task
from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from pomelo.call import ADJUSTED_HEADER, Call
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.service import Visit

_DEFAULTS: Mapping[str, Collection[Any]] = {"service_tier": ("auto", "default")}
"""Fields of both forms that are accepted with these values, which change nothing."""

_IGNORED = ("store", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention")
"""Fields of both forms that do not change the output."""


class TextRequest(ABC):
    """One request for text in a form of OpenAI's API.

    `ignored` are the fields that were given and have no effect. They are reported as adjustments are, and
    refused if the handling is strict.
    """

    def __init__(self, call: Call) -> None:
        self.ignored: list[str] = []
        self._call = call
        self._user_name = "user"
        self._is_translated = False

    def translate(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """Returns the fields of `POST /api/v1/task`; `body` may be changed. Raises as `to_fields`."""
        fields = self.to_fields(body)
        if self.ignored and self._call.strict:
            raise invalid(self.ignored[0], "left out: it has no effect here")
        self._is_translated = True
        return fields

    @abstractmethod
    def to_fields(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """Translates the body, and notes what is `ignored`.

        Raises:
            PomeloError: invalid_parameter, missing_parameter.
        """

    @abstractmethod
    def caller_name(self, field: str) -> str:
        """Returns the caller's name of a field of the task, which errors have."""

    @abstractmethod
    def render(self, result: TaskResult) -> bytes:
        """Returns a result as JSON."""

    @abstractmethod
    def stream_format(self) -> sse.StreamFormat:
        """Returns how a stream is sent."""

    def take_shared(self, body: dict[str, Any]) -> None:
        """Removes the fields of both forms that a task does not have. Raises as `to_fields`."""
        self.take_defaults(body, _DEFAULTS)
        for name in _IGNORED:
            value = body.pop(name, None)
            if value is not None and value is not False:
                self.ignored.append(name)
        identifier = body.pop("safety_identifier", None)
        if identifier is not None and (identifier != "" or body.get("user") is None):
            body["user"] = identifier
            self._user_name = "safety_identifier"

    def take_defaults(self, body: dict[str, Any], defaults: Mapping[str, Collection[Any]]) -> None:
        """Removes fields whose value changes nothing; refuses other values."""
        for name, accepted in defaults.items():
            value = body.pop(name, None)
            if value is not None and not any(type(value) is type(one) and value == one for one in accepted):
                raise invalid(name, " or ".join([to_json(one).decode() for one in accepted]))

    def report_adjusted(self) -> None:
        """Makes the header of adjustments one of the caller's fields: it gets their names, and the ignored
        ones."""
        headers = self._call.response_headers
        header = headers.get(ADJUSTED_HEADER)
        adjusted = [] if header is None else map(self._rename_adjustment, header.split("; "))
        if header is not None or self.ignored:
            headers[ADJUSTED_HEADER] = "; ".join([*adjusted, *self.ignored])

    def renamed(self, error: PomeloError) -> PomeloError:
        """Returns an error of the task with the caller's name of its field."""
        field = error.field
        if field is None or not self._is_translated or (name := self._name(field)) == field:
            return error
        message = error.message.replace(field, name, 1)
        return PomeloError(
            error.code, message, field=name, retry_after=error.retry_after, values=error.values
        )

    def _rename_adjustment(self, adjustment: str) -> str:
        """Returns an adjustment of the header, such as max_tokens=10, with the caller's name of the field."""
        field, separator, used = adjustment.partition("=")
        return self._name(field) + separator + used

    def _name(self, field: str) -> str:
        return self._user_name if field == "user" else self.caller_name(field)


async def run_text(
    gateway: Gateway, request: Request, call: Call, visit: Visit, form: TextRequest
) -> Response | None:
    """Runs a text task and sends its result: JSON or server-sent events.

    Raises:
        PomeloError: any error of the table.
    """
    try:
        translation = Translation(TaskType.TASK_TYPE_TEXT, form.translate)
        parsed = await read_task(gateway, request, call, visit, translation)
        tasks = gateway.services.tasks
        try:
            if parsed.stream:
                await sse.stream_task(
                    request,
                    call,
                    tasks,
                    parsed.spec,
                    parsed.options,
                    form.stream_format(),
                    keep_alive=gateway.options.keep_alive,
                )
                return None
            result = await tasks.run_task(parsed.spec, parsed.options, call)
        except PomeloError as error:
            raise await visit.refuse_task(error) from None
    except PomeloError as error:
        raise form.renamed(error) from None
    form.report_adjusted()
    return json_response(call, form.render(result))
