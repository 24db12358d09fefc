"""The parameters of OpenAI's API: how they become the fields of a task, and how the task runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar

from pydantic_core import to_json

from gateway import sse
from gateway.errors import error_body, rename_field
from gateway.parsing.task import TaskRequest, Translation, read_task
from gateway.request import Request
from gateway.responses import Response
from gateway.state import Gateway
from gateway.types.base import Link
from gateway.types.fields import check_text, renamed_field
from pomelo.call import Call, report_adjustments
from pomelo.errors import PomeloError, invalid
from pomelo.service import Visit

Values = Mapping[str, Collection[Any]]
"""Parameters with some of their values."""


class Parameters(Translation):
    """The parameters of one request of `call`, while they become the fields of a task.

    Errors and adjustments have the caller's names of parameters. `ignored` are those that were given and have
    no effect: they are reported as adjustments are, and refused if the handling is strict. `user` is the
    caller's identifier of the end user.
    """

    names: ClassVar[Mapping[str, str]] = {}
    """Parameters that are fields of a task by another name: field -> parameter."""

    def __init__(self, call: Call) -> None:
        self.ignored: list[str] = []
        self.user = ""
        self._user_name = "user"
        self._strict = call.strict
        call.translate_adjusted = self._translate_adjusted

    @abstractmethod
    def to_fields(self, body: dict[str, Any]) -> Mapping[str, Any]:
        """Returns the fields of `POST /api/v1/task`; `body` may be changed.

        Raises:
            PomeloError: invalid_parameter, missing_parameter.
        """

    def complete(self, task: TaskRequest) -> None:
        """Sets what the task has beside its fields."""
        if self.user:
            task.spec.user = self.user

    @abstractmethod
    async def run(self, gateway: Gateway, request: Request, call: Call, task: TaskRequest) -> Response | None:
        """Runs the task without events. Returns the response; None: it was sent.

        Raises:
            PomeloError: any error of the table.
        """

    @abstractmethod
    def stream_format(self, link: Link) -> sse.StreamFormat:
        """Returns how the events of the task are sent."""

    # --- parameters

    def translate(self, body: dict[str, Any], call: Call) -> Mapping[str, Any]:
        for field, name in self.names.items():
            if body.get(field) is not None:
                raise renamed_field(field, name)
        fields = self.to_fields(body)
        if self.ignored:
            report_adjustments(call, ())
        return fields

    def take_only(self, body: dict[str, Any], parameters: Values) -> None:
        """Removes parameters from a body. Those whose value is not among these, which change nothing, are
        refused. Raises as `to_fields`."""
        for name, accepted in parameters.items():
            value = body.pop(name, None)
            if value is not None and not is_among(value, accepted):
                raise invalid(name, _join(accepted))

    def leave_out(self, body: dict[str, Any], parameters: Values) -> None:
        """Removes parameters that have no effect from a body. Those whose value is not among these, which
        describe what happens anyway, are ignored. Raises as `ignore`."""
        for name, usual in parameters.items():
            value = body.pop(name, None)
            if value is not None and value != "" and not is_among(value, usual):
                self.ignore(name, usual)

    def ignore(self, name: str, usual: Collection[Any] = ()) -> None:
        """Notes a parameter without effect. The values `usual` describe what happens anyway.

        Raises:
            PomeloError: invalid_parameter: the caller prefers strict handling.
        """
        if self._strict:
            others = f"{_join(usual)} or " if usual else ""
            raise invalid(name, f"{others}left out: it has no effect here")
        self.ignored.append(name)

    def take_user(self, body: dict[str, Any]) -> None:
        """Removes the identifier of the end user from a body. Raises as `to_fields`."""
        for name in ("user", "safety_identifier"):
            value = body.pop(name, None)
            if value is not None and check_text(name, value):
                self.user, self._user_name = value, name

    # --- their names

    def caller_name(self, field: str) -> str:
        """Returns the caller's name of a field of the task."""
        for name, own in self.names.items():
            if field == name or field.startswith((f"{name}.", f"{name}[")):
                return own + field[len(name) :]
        return self._user_name if field == "user" else field

    def rename_adjusted(self, adjusted: Mapping[str, str]) -> dict[str, str]:
        """Returns what was adjusted, by parameter, from what was adjusted by field; empty values were left
        out."""
        return {self.caller_name(field): value for field, value in adjusted.items()}

    def renamed(self, error: PomeloError) -> PomeloError:
        """Returns an error with the caller's name of its field."""
        return rename_field(error, self.caller_name)

    def render_error(self, _: Any, error: PomeloError, request: Request) -> bytes:
        """Returns the event that ends a failed stream."""
        return sse.encode_event(error_body(self.renamed(error), request))

    def _translate_adjusted(self, header: str) -> str:
        if not header and not self.ignored:
            return ""
        pairs = [item.partition("=") for item in header.split("; ") if item]
        adjusted = self.rename_adjusted({field: value for field, _, value in pairs})
        adjusted.update(dict.fromkeys(self.ignored, ""))
        return "; ".join([f"{name}={value}" if value else name for name, value in adjusted.items()])


async def run_task(
    make: Callable[[Call], Parameters], gateway: Gateway, request: Request, call: Call, visit: Visit
) -> Response | None:
    """Runs the task of a request in the form of OpenAI's API, whose parameters `make` returns, and sends its
    result.

    Raises:
        PomeloError: any error of the table, of speech also after the first byte.
    """
    parameters = make(call)
    try:
        task = await read_task(gateway, request, call, visit, parameters)
        parameters.complete(task)
        try:
            if not task.stream:
                return await parameters.run(gateway, request, call, task)
            await sse.stream_task(gateway, request, call, visit, task, parameters.stream_format(gateway.link))
            return None
        except PomeloError as error:
            raise await visit.refuse_task(error) from None
    except PomeloError as error:
        raise parameters.renamed(error) from None


def is_among(value: Any, accepted: Collection[Any]) -> bool:
    """Whether a JSON value is one of these: true is not 1."""
    return any(value == one and (type(value) is bool) is (type(one) is bool) for one in accepted)


def _join(values: Collection[Any]) -> str:
    return " or ".join([to_json(one).decode() for one in values])
