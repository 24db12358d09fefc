"""Text tasks in the forms of OpenAI's API: what chat completions and responses share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from gateway.openai.parameters import Parameters, Values
from gateway.parsing.task import TaskRequest
from gateway.request import Request
from gateway.responses import Response, json_response
from gateway.state import Gateway
from gateway.types.fields import check_flag, check_names
from pomelo.call import Call
from pomelo.errors import invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType

DEFAULTS: Values = {"service_tier": ("auto", "default")}
"""Parameters of both forms that are accepted with these values, which change nothing."""

NO_EFFECT: Values = {
    "store": (False,),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}
"""Parameters of both forms that do not change the output."""


class TextParameters(Parameters):
    """The parameters of one request for text."""

    task_type = TaskType.TASK_TYPE_TEXT

    @abstractmethod
    def render(self, result: TaskResult) -> bytes:
        """Returns a result as JSON."""

    def take_shared(self, body: dict[str, Any]) -> None:
        """Removes the parameters of both forms that are no fields of a task. Raises as `to_fields`."""
        self.take_only(body, DEFAULTS)
        self.leave_out(body, NO_EFFECT)
        self.take_user(body)

    def take_stream_options(self, body: dict[str, Any]) -> bool:
        """Removes the options of a stream from a body: no event is ever padded. Returns whether it is to have
        the usage. Raises as `to_fields`."""
        options = body.pop("stream_options", None)
        if options is None:
            return False
        if type(options) is not dict:
            raise invalid("stream_options", "an object")
        names = ("include_usage", "include_obfuscation")
        check_names(options, names, "stream_options")
        for name in names:
            if options.get(name) is not None:
                check_flag(f"stream_options.{name}", options[name])
        return options.get("include_usage") is True

    async def run(self, gateway: Gateway, request: Request, call: Call, task: TaskRequest) -> Response | None:
        result = await gateway.services.tasks.run_task(task.spec, task.options, call)
        return json_response(call, self.render(result))
