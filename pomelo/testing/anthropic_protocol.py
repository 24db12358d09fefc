"""A fake of Anthropic's Messages API, from the vendor's own client and documentation: most tests script an
`Answer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomelo.testing.anthropic_checks import VERSIONS, check
from pomelo.testing.broken import BODY
from pomelo.testing.checks import Problem, access_refusal
from pomelo.testing.reply import Received, Reply, VendorProtocol, json_reply
from pomelo.testing.text_answer import Call, TextAnswer, pieces, text_faults

PATH = "/v1/messages"

PING = b'event: ping\ndata: {"type": "ping"}\n\n'

_ID = "msg_test0001"
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error"}
"""The vendor's error types by status; for others it is invalid_request_error."""


@dataclass(frozen=True, slots=True)
class Answer(TextAnswer):
    """A script that answers a conversation.

    A stream begins with message_start, the block of `thinking` (if it is set), the start of the text block
    and a ping; it ends with the end of the last block, message_delta and message_stop. `usage` has the
    vendor's own counts: input_tokens, output_tokens and those of the cache.
    """

    finish_reason: str | None = "end_turn"
    thinking: str | None = None

    def body(self, received: Received) -> dict[str, Any]:
        calls = [
            {"type": "tool_use", "id": call_id, "name": call.name, "input": json.loads(call.arguments)}
            for call_id, call in self._calls
        ]
        blocks: list[dict[str, Any]] = [*self._text_blocks(), *calls]
        if self.thinking is not None:
            blocks.insert(0, {"type": "thinking", "thinking": self.thinking, "signature": "c2lnbmVk"})
        message = _message(received, blocks) | {"stop_reason": self.finish_reason}
        return message | self.usage_field(received)

    def beginning(self, received: Received) -> list[bytes]:
        message = _message(received, []) | self.usage_field(received)
        if isinstance(usage := message.get("usage"), dict):
            message["usage"] = usage | {"output_tokens": 1, "output_tokens_details": None}
        index = 0
        events = [event("message_start", message=message)]
        if self.thinking is not None:
            block = {"type": "thinking", "thinking": "", "signature": ""}
            thinking = {"type": "thinking_delta", "thinking": self.thinking}
            signature = {"type": "signature_delta", "signature": "c2lnbmVk"}
            events.append(event("content_block_start", index=0, content_block=block))
            events += [event("content_block_delta", index=0, delta=delta) for delta in (thinking, signature)]
            events.append(event("content_block_stop", index=0))
            index = 1
        block = {"type": "text", "text": ""}
        if self._text_blocks():
            events.append(event("content_block_start", index=index, content_block=block))
        return [*events, PING]

    def event(self, received: Received, number: int, word: str) -> bytes:
        return words(word, index=self._text_index)

    def call_events(self, received: Received) -> list[bytes]:
        events = []
        index = self._text_index if self._text_blocks() else self._text_index - 1
        if self._calls and self._text_blocks():
            events.append(event("content_block_stop", index=index))
        for number, (call_id, call) in enumerate(self._calls):
            if number:
                events.append(event("content_block_stop", index=index))
            index += 1
            block = {"type": "tool_use", "id": call_id, "name": call.name, "input": {}}
            events.append(event("content_block_start", index=index, content_block=block))
            for piece in ("", *pieces(call.arguments)):
                delta = {"type": "input_json_delta", "partial_json": piece}
                events.append(event("content_block_delta", index=index, delta=delta))
        return events

    def ending(self, received: Received) -> list[bytes]:
        counts = self.usage_field(received)
        if isinstance(usage := counts.get("usage"), dict) and "output_tokens" in usage:
            counts["usage"] = {name: usage[name] for name in usage if name.startswith("output_tokens")}
        delta = {"stop_reason": self.finish_reason, "stop_sequence": None}
        events = [
            event("content_block_stop", index=self._last_index),
            event("message_delta", delta=delta, **counts),
        ]
        return [*events, event("message_stop")] if self.done else events

    def tool_to_call(self, received: Received) -> tuple[str, Any] | None:
        body = received.body
        choice = body.get("tool_choice") or {}
        content = body["messages"][-1]["content"]
        answered = isinstance(content, list) and content[0]["type"] == "tool_result"
        if not body.get("tools") or choice.get("type") == "none" or answered:
            return None
        tools = {tool["name"]: tool["input_schema"] for tool in body["tools"]}
        name = choice.get("name") or next(iter(tools))
        return name, tools.get(name, {})

    def output_schema(self, received: Received) -> Any:
        return ((received.body.get("output_config") or {}).get("format") or {}).get("schema")

    def _text_blocks(self) -> list[dict[str, Any]]:
        return [{"type": "text", "text": self.text}] if self.text or not self.tool_calls else []

    @property
    def _calls(self) -> list[tuple[str, Call]]:
        """The tool calls with their ids."""
        numbered = enumerate(self.tool_calls or (), 1)
        return [(f"toolu_test{n:04}" if call.id is None else call.id, call) for n, call in numbered]

    @property
    def _text_index(self) -> int:
        return 0 if self.thinking is None else 1

    @property
    def _last_index(self) -> int:
        return self._text_index + len(self._text_blocks()) + len(self._calls) - 1

    def true_usage(self, received: Received, prompt: int, completion: int) -> dict[str, Any]:
        return {
            "input_tokens": prompt + len(str(received.body.get("system") or "").split()),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": completion,
            "output_tokens_details": {"thinking_tokens": self.reasoning_tokens},
            "service_tier": "standard",
        }


def event(name: str, **fields: Any) -> bytes:
    """Return an event of a stream; its `type` is its name."""
    data = json.dumps({"type": name, **fields}, ensure_ascii=False)
    return f"event: {name}\ndata: {data}\n\n".encode()


def words(text: str, index: int = 0) -> bytes:
    """Return the event that adds text to a block."""
    return event("content_block_delta", index=index, delta={"type": "text_delta", "text": text})


def error_event(
    error_type: str = "overloaded_error", code: str | None = None, message: str = "It broke"
) -> bytes:
    """Return an error event for `at` of an Answer; only Stop.END should follow."""
    return event("error", error=_error(error_type, code, message))


def huge_line(size: int) -> bytes:
    """Return an event with a text of `size` bytes in one line."""
    return words("x" * size)


def error_reply(
    status: int,
    error_type: str = "invalid_request_error",
    code: str | None = None,
    message: str = "It can't be done",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    """Return a refusal with the vendor's error body: its `type`, and its detailed error_code."""
    body = {"type": "error", "error": _error(error_type, code, message), "request_id": "req_test0001"}
    return json_reply(body, status, {"request-id": "req_test0001", **(headers or {})})


def refused(received: Received, api_key: str | None) -> Reply | None:
    """Return the vendor's refusal of an invalid request; None for a valid one. Without `api_key`, any key is
    valid."""
    refusal = access_refusal(received, PATH, api_key, header="x-api-key")
    if refusal is not None:
        error_type = _ERROR_TYPES.get(refusal.status, "invalid_request_error")
        return error_reply(refusal.status, error_type, message=refusal.message)
    version = received.headers.get("anthropic-version", "")
    if version not in VERSIONS:
        return error_reply(400, message="anthropic-version: there is no such version")
    problem = check(received.body, version)
    return None if problem is None else error_reply(400, message=_vendor_message(problem))


def _message(received: Received, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": _ID,
        "type": "message",
        "role": "assistant",
        "model": received.body["model"],
        "content": blocks,
        "stop_reason": None,
        "stop_sequence": None,
    }


def _error(error_type: str, code: str | None, message: str) -> dict[str, Any]:
    error: dict[str, Any] = {"type": error_type, "message": message}
    return error if code is None else error | {"details": {"error_code": code}}


def _vendor_message(problem: Problem) -> str:
    """The vendor's message for a problem: the field with dots, and what is wrong with it."""
    if problem.param is None:
        return problem.message
    return f"{problem.param.replace('[', '.').replace(']', '')}: {problem.message}"


_TEXT = text_faults(
    Answer(),
    lambda prompt, completion: {"input_tokens": prompt, "output_tokens": completion},
    error_event("overloaded_error", message=BODY),
    error_event("strange", message=BODY),
    {
        "out of money": error_reply(
            429, "rate_limit_error", "enforced_spend_limit_reached", message=f"No more this month. {BODY}"
        ),
        "too many concurrent tasks": error_reply(429, "rate_limit_error", message=BODY),
        "unknown key": error_reply(401, "authentication_error", message=BODY),
        "unknown model": error_reply(404, "not_found_error", message=BODY),
        "against the policy": error_reply(400, message=f"Output blocked by content filtering policy. {BODY}"),
        "too long": error_reply(400, message=f"prompt is too long: 250000 tokens > 200000 maximum. {BODY}"),
        "an invalid value": error_reply(400, message=f"temperature: must be at most 1. {BODY}"),
    },
)

PROTOCOL = VendorProtocol(
    "anthropic",
    lambda received: received.path == PATH,
    refused,
    Answer(),
    lambda status, message: error_reply(status, message=message),
    {"text": _TEXT},
)
