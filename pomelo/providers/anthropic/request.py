"""Requests of the Messages API, from text tasks."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from pydantic_core import to_json

from pomelo.gen.v1.text_pb2 import ReasoningEffort, TextInput
from pomelo.providers.anthropic.messages import Conversation
from pomelo.providers.anthropic.schemas import output_schema
from pomelo.providers.anthropic.tools import tool_choice, tools_json, undeclared_tools
from pomelo.providers.base import Job
from pomelo.providers.errors import UpstreamError
from pomelo.providers.text.raw_json import with_member

_DEFAULT_MAX_TOKENS = 4096
"""max_tokens, which the API requires, if neither the caller nor the catalogue sets it."""

_EFFORTS = {
    ReasoningEffort.REASONING_EFFORT_LOW: "low",
    ReasoningEffort.REASONING_EFFORT_MEDIUM: "medium",
    ReasoningEffort.REASONING_EFFORT_HIGH: "high",
    ReasoningEffort.REASONING_EFFORT_XHIGH: "xhigh",
    ReasoningEffort.REASONING_EFFORT_MAX: "max",
}


def encode_request(job: Job[TextInput], *, stream: bool) -> bytes:
    """Return the request body for a text job. System messages are moved before the conversation.

    Raises:
        UpstreamError: invalid_parameter; no message is left.
    """
    text, route = job.input, job.route
    conversation = Conversation(text.messages)
    if not conversation.turns:
        raise UpstreamError(
            "invalid_parameter",
            "Invalid messages: this model needs a message of the user's that is not blank",
            field="messages",
        )
    body = _body(job, conversation, stream)
    if "extra" in route.options:
        body.update(route.options["extra"])
    # An infinite number in the arguments of a call becomes null, which is valid.
    encoded = to_json(body, inf_nan_mode="null")
    if text.tools:
        encoded = with_member(encoded, "tools", tools_json(text.tools))
    if text.HasField("format"):
        schema = output_schema(text.format.json_schema) or "{}"
        output_format = with_member({"type": "json_schema"}, "schema", schema)
        encoded = with_member(encoded, "output_config", with_member(_effort(text), "format", output_format))
    return encoded


def _body(job: Job[TextInput], conversation: Conversation, stream: bool) -> dict[str, Any]:
    """The request without what the caller wrote in JSON, and without what the operator adds."""
    text, route = job.input, job.route
    body: dict[str, Any] = {
        "model": route.model,
        "max_tokens": max_tokens(job),
        "messages": conversation.turns,
    }
    if conversation.system:
        body["system"] = "\n\n".join(conversation.system)
    for name in ("temperature", "top_p"):
        if text.HasField(name):
            body[name] = getattr(text, name)
    if text.stop:
        body["stop_sequences"] = list(text.stop)
    if job.user:
        # The vendor requires an opaque id, and refuses e-mail addresses and phone numbers.
        body["metadata"] = {"user_id": sha256(job.user.encode()).hexdigest()}
    if stream:
        body["stream"] = True
    if text.tools:
        if choice := tool_choice(text):
            body["tool_choice"] = choice
    elif conversation.called:
        body["tools"] = undeclared_tools(conversation.called)
        body["tool_choice"] = {"type": "none"}
    if not text.HasField("format") and (config := _effort(text)):
        body["output_config"] = config
    if text.reasoning_effort and "thinking" in route.options:
        body["thinking"] = {"type": "adaptive" if thinks(text, route.options) else "disabled"}
    return body


def _effort(text: TextInput) -> dict[str, str]:
    """The part of `output_config` besides the format."""
    effort = _EFFORTS.get(text.reasoning_effort)
    return {} if effort is None else {"effort": effort}


def thinks(text: TextInput, options: Mapping[str, Any]) -> bool:
    """Whether the model is to think, also if it must call a tool, and after calls of tools whose thoughts the
    caller does not have: adaptive thinking allows both."""
    return text.reasoning_effort in _EFFORTS and "thinking" in options


def max_tokens(job: Job[TextInput]) -> int:
    """Return the caller's max_tokens, else the model's own maximum."""
    if job.input.HasField("max_tokens"):
        return job.input.max_tokens
    limit = job.model.limits.max_output_tokens or _DEFAULT_MAX_TOKENS
    return job.route.fit("max_tokens", limit) or limit
