"""`POST /v1/responses`: runs a text task in the form of OpenAI's responses. Nothing is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gateway import sse
from gateway.openai.parameters import Values
from gateway.openai.response_events import RENDERERS, ResponseEvents, encode, render_error, render_last
from gateway.openai.response_input import Conversation
from gateway.openai.text import TextParameters
from gateway.types.base import Link
from gateway.types.fields import check_names, unknown_field
from pomelo.call import Call
from pomelo.errors import invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted

DEFAULTS: Values = {
    "background": (False,),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
"""Parameters that are accepted with these values, which change nothing."""

REASONING_NO_EFFECT: Values = {"context": ("auto",), "summary": (), "generate_summary": ()}
"""Members of `reasoning` without effect: no thoughts are returned, and no model takes them."""

_STORED = ("previous_response_id", "conversation", "prompt")
"""Parameters that name what OpenAI stores."""

NOT_INCLUDED = (
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
)
"""Parts of items that no response has, so that including them changes nothing."""

_FIELDS = frozenset(
    {
        *("model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "stream", "text"),
        *("reasoning", "tools", "tool_choice", "parallel_tool_calls", "metadata"),
    }
)
"""The other fields."""


class ResponseParameters(TextParameters):
    """The parameters of one request for a response."""

    names: ClassVar[Mapping[str, str]] = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "response_format.json_schema": "text.format",
        "response_format": "text.format",
    }

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._conversation = Conversation()
        self._members: dict[str, Any] = {}

    def to_fields(self, body: dict[str, Any]) -> Mapping[str, Any]:
        self.take_shared(body)
        self.take_only(body, DEFAULTS)
        for name in _STORED:
            if body.pop(name, None) is not None:
                raise invalid(name, "left out: nothing is stored. Send the whole conversation as input")
        self._take_include(body.pop("include", None))
        self.take_stream_options(body)
        for name, value in body.items():
            if name not in _FIELDS and value is not None:
                raise unknown_field(name)
        self._members = _common_members(body, self.user)
        body["max_tokens"] = body.pop("max_output_tokens", None)
        body["response_format"] = self._take_text(body.pop("text", None))
        body["reasoning_effort"] = self._take_reasoning(body.pop("reasoning", None))
        body["tools"] = _to_tools(body.get("tools"))
        body["tool_choice"] = _to_tool_choice(body.get("tool_choice"))
        conversation = self._conversation
        conversation.add_instructions(body.pop("instructions", None))
        conversation.add_input(body.pop("input", None))
        body["messages"] = conversation.messages
        if conversation.ignored:
            self.ignore(conversation.ignored)
        return body

    def _take_include(self, include: Any) -> None:
        if include is None or include == []:
            return
        if type(include) is not list or any(each not in NOT_INCLUDED for each in include):
            raise invalid("include", f"left out, or of {', '.join(NOT_INCLUDED)}, which no response has")
        self.ignore("include")

    def _take_text(self, text: Any) -> Any:
        """Returns the field `response_format` of a task."""
        if text is None:
            return None
        if type(text) is not dict:
            raise invalid("text", "an object with format")
        check_names(text, ("format", "verbosity"), "text")
        if text.get("verbosity") not in (None, "medium"):
            self.ignore("text.verbosity", ("medium",))
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
        check_names(reasoning, ("effort", *REASONING_NO_EFFECT), "reasoning")
        for name, usual in REASONING_NO_EFFECT.items():
            if reasoning.get(name) not in (None, *usual):
                self.ignore(f"reasoning.{name}", usual)
        return reasoning.get("effort")

    def caller_name(self, field: str) -> str:
        if field.startswith("messages["):
            return self._conversation.caller_name(field)
        if field.startswith(("tools[", "tool_choice.")):
            return field.replace(".function.", ".", 1)
        return super().caller_name(field)

    def render(self, result: TaskResult) -> bytes:
        started = TaskStarted(id=result.id, create_time=result.create_time, model=result.model)
        return ResponseEvents(started, self._members).render(result)

    def stream_format(self, link: Link) -> sse.StreamFormat:
        return sse.StreamFormat(
            lambda started: ResponseEvents(started, self._members),
            RENDERERS,
            render_last,
            lambda events, error, request: render_error(events, self.renamed(error), request),
            encode,
        )


def _common_members(body: Mapping[str, Any], user: str) -> dict[str, Any]:
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
        **({"user": user} if user else {}),
    }


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
    if choice.get("type") not in (None, "function"):  # an object of another type has other members
        raise invalid("tool_choice.type", "function")
    check_names(choice, ("type", "name"), "tool_choice")
    return {"type": choice.get("type"), "function": {"name": choice.get("name")}}
