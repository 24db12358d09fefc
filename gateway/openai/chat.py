"""`POST /v1/chat/completions`: runs a text task in the form of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway import sse
from gateway.openai.parameters import Values, is_among
from gateway.openai.text import TextParameters
from gateway.types.base import Link, StreamObjects, open_object
from gateway.types.text import FORMAT
from gateway.types.text.results import FINISH_REASONS, cached_counts, open_last_chunk, render_message
from pomelo.call import Call
from pomelo.errors import invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted
from pomelo.gen.v1.usage_pb2 import Usage

DEFAULTS: Values = {"modalities": (["text"],)}
"""Parameters that are accepted with these values, which change nothing."""

NO_EFFECT: Values = {"verbosity": ("medium",)}
"""Parameters without effect. OpenAI's agents ask for a low verbosity by default."""

_CHUNK = "chat.completion.chunk"


class ChatParameters(TextParameters):
    """The parameters of one request for a chat completion. Most are fields of `POST /api/v1/task`."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self._include_usage = False
        self._limit_name = "max_tokens"

    def to_fields(self, body: dict[str, Any]) -> Mapping[str, Any]:
        self.take_shared(body)
        self.take_only(body, DEFAULTS)
        self.leave_out(body, NO_EFFECT)
        self._include_usage = self.take_stream_options(body)
        limit = body.pop("max_completion_tokens", None)
        if limit is not None:
            given = body.get("max_tokens")
            if given is not None and not is_among(given, (limit,)):
                raise invalid("max_tokens", "left out, or the same as max_completion_tokens")
            self._limit_name = "max_completion_tokens"
            body["max_tokens"] = limit
        return body

    def caller_name(self, field: str) -> str:
        return self._limit_name if field == "max_tokens" else super().caller_name(field)

    def render(self, result: TaskResult) -> bytes:
        text = result.text
        choice = {
            "index": 0,
            "message": {**render_message(text.message), "refusal": None},
            "logprobs": None,
            "finish_reason": FINISH_REASONS.get(text.finish_reason),
        }
        return open_object(result, "chat.completion", choices=[choice], usage=_usage(result.usage)) + b"}"

    def stream_format(self, link: Link) -> sse.StreamFormat:
        return sse.StreamFormat(
            lambda started: ChatChunks(started, include_usage=self._include_usage),
            FORMAT.render_events,
            _render_last,
            self.render_error,
        )


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": cached_counts(usage),
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


# --- streams


class ChatChunks(StreamObjects):
    """The chunks of a stream: those of `POST /api/v1/task` by another name, and with the usage in one of
    their own if the caller asked for it."""

    __slots__ = ("include_usage",)

    def __init__(self, started: TaskStarted, *, include_usage: bool) -> None:
        super().__init__(started)
        self.include_usage = include_usage

    def prefix(self, object_type: str, members: bytes) -> bytes:
        usage = b',"usage":null' if self.include_usage else b""
        prefix = self.prefixes[object_type] = super().prefix(_CHUNK, usage + members)
        return prefix


def _render_last(chunks: ChatChunks, result: TaskResult) -> bytes:
    events = sse.encode_event(open_last_chunk(chunks, result) + b"}")
    if chunks.include_usage:
        usage = open_object(result, _CHUNK, choices=[], usage=_usage(result.usage)) + b"}"
        events += sse.encode_event(usage)
    return events + sse.DONE
