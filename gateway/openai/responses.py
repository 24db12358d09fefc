"""`POST /v1/responses`: runs a text task in the form of OpenAI's responses. Nothing is stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from gateway import sse
from gateway.openai.response_events import RENDERERS, ResponseEvents, encode, render_error, render_last
from gateway.openai.response_input import Conversation
from gateway.openai.text import TextRequest, run_text
from gateway.request import Request
from gateway.responses import Response
from gateway.state import Gateway
from gateway.types.fields import check_names, unknown_field
from pomelo.call import Call
from pomelo.errors import invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted
from pomelo.service import Visit

_DEFAULTS: Mapping[str, Collection[Any]] = {
    "background": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Fields that are accepted with these values, which change nothing."""

_STORED = ("previous_response_id", "conversation", "prompt")
"""Fields that name what OpenAI stores."""

_FIELDS = frozenset(
    {
        *("model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "text"),
        *("reasoning", "tools", "tool_choice", "parallel_tool_calls", "user", "metadata"),
    }
)
"""The other fields."""

_NAMES: Mapping[str, str] = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
"""The caller's names of the fields of a task."""


async def create_response(gateway: Gateway, request: Request, call: Call, visit: Visit) -> Response | None:
    return await run_text(gateway, request, call, visit, ResponseRequest(call))


class ResponseRequest(TextRequest):
    """A request for a response."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._conversation = Conversation()
        self._members: dict[str, Any] = {}

    def to_fields(self, body: dict[str, Any]) -> Mapping[str, Any]:
        self.take_shared(body)
        self.take_defaults(body, _DEFAULTS)
        for name in _STORED:
            if body.pop(name, None) is not None:
                raise invalid(name, "left out: nothing is stored. Send the whole conversation as input")
        self._take_include(body.pop("include", None))
        options = body.pop("stream_options", None)  # only about padding
        if options is not None and type(options) is not dict:
            raise invalid("stream_options", "an object")
        for name, value in body.items():
            if name not in _FIELDS and value is not None:
                raise unknown_field(name)
        self._members = _common_members(body)
        body["max_tokens"] = body.pop("max_output_tokens", None)
        body["response_format"] = self._take_text(body.pop("text", None))
        body["reasoning_effort"] = self._take_reasoning(body.pop("reasoning", None))
        body["tools"] = _to_tools(body.get("tools"))
        body["tool_choice"] = _to_tool_choice(body.get("tool_choice"))
        conversation = self._conversation
        conversation.add_instructions(body.pop("instructions", None))
        conversation.add_input(body.pop("input", None))
        body["messages"] = conversation.messages
        self.ignored += conversation.ignored
        return body

    def _take_include(self, include: Any) -> None:
        if include is None or include == []:
            return
        if include != ["reasoning.encrypted_content"]:
            raise invalid("include", "left out, or reasoning.encrypted_content, which no response has")
        self.ignored.append("include")

    def _take_text(self, text: Any) -> Any:
        """Returns the field `response_format` of a task."""
        if text is None:
            return None
        if type(text) is not dict:
            raise invalid("text", "an object with format")
        check_names(text, ("format", "verbosity"), "text")
        if text.get("verbosity") not in (None, "medium"):
            raise invalid("text.verbosity", '"medium"')
        form = text.get("format")
        if type(form) is not dict or form.get("type") != "json_schema":
            return form
        check_names(form, ("type", "name", "description", "schema", "strict"), "text.format")
        return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}

    def _take_reasoning(self, reasoning: Any) -> Any:
        """Returns the field `reasoning_effort` of a task."""
        if reasoning is None:
            return None
        if type(reasoning) is not dict:
            raise invalid("reasoning", "an object with effort")
        check_names(reasoning, ("effort", "summary", "generate_summary"), "reasoning")
        self.ignored += [
            f"reasoning.{name}" for name in ("summary", "generate_summary") if reasoning.get(name) is not None
        ]
        return reasoning.get("effort")

    def caller_name(self, field: str) -> str:
        if field.startswith("messages["):
            return self._conversation.caller_name(field)
        for name, own in _NAMES.items():
            if field == name or field.startswith((f"{name}.", f"{name}[")):
                return own + field[len(name) :]
        return field.replace(".function.", ".") if field.startswith(("tools[", "tool_choice.")) else field

    def render(self, result: TaskResult) -> bytes:
        started = TaskStarted(id=result.id, create_time=result.create_time, model=result.model)
        return ResponseEvents(started, self._members).render(result)

    def stream_format(self) -> sse.StreamFormat:
        return sse.StreamFormat(self._open_stream, RENDERERS, render_last, render_error, encode)

    def _open_stream(self, started: TaskStarted) -> ResponseEvents:
        self.report_adjusted()
        return ResponseEvents(started, self._members)


def _common_members(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the members of a response that repeat the request."""
    reasoning, text = body.get("reasoning"), body.get("text")
    text_format = text.get("format") if type(text) is dict else None
    return {
        "background": False,
        "error": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {
            "effort": reasoning.get("effort") if type(reasoning) is dict else None,
            "summary": None,
        },
        "store": False,
        "temperature": body.get("temperature"),
        "text": {"format": text_format or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
    } | ({} if body.get("user") is None else {"user": body["user"]})


def _to_tools(tools: Any) -> Any:
    if type(tools) is not list:
        return tools
    return [_to_tool(f"tools[{i}]", tool) for i, tool in enumerate(tools)]


def _to_tool(label: str, tool: Any) -> Any:
    if type(tool) is not dict or tool.get("type") != "function":
        raise invalid(f"{label}.type", "function")
    check_names(tool, ("type", "name", "description", "parameters", "strict"), label)
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}


def _to_tool_choice(choice: Any) -> Any:
    if type(choice) is not dict:
        return choice
    check_names(choice, ("type", "name"), "tool_choice")
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}
