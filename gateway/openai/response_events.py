"""The events of OpenAI's responses: a response as it grows, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pydantic_core import to_json

from gateway.errors import error_members
from gateway.request import Request
from gateway.sse import encode_event
from gateway.types.text.results import cached_counts
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult, TaskStarted
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, ToolCallDelta
from pomelo.gen.v1.usage_pb2 import Usage

INCOMPLETE: Mapping[int, str] = {
    FinishReason.FINISH_REASON_LENGTH: "max_output_tokens",
    FinishReason.FINISH_REASON_CONTENT_FILTER: "content_filter",
}
"""Why a response is incomplete."""


class ResponseEvents:
    """A response and its events. `members` are those that repeat the request."""

    def __init__(self, started: TaskStarted, members: Mapping[str, Any]) -> None:
        self._id = started.id
        common = {
            "id": started.id,
            "object": "response",
            "created_at": started.create_time.seconds,
            "model": started.model,
            **members,
        }
        self._opening = to_json(common)[:-1]
        """The beginning of each response: the request that it repeats may be large."""
        self._sequence_number = 0
        self._output: list[dict[str, Any]] = []
        self._pieces: list[list[str]] = []
        """The text or the arguments of each item."""
        self._text: int | None = None
        """The index of the item to which text is added."""
        self._calls: dict[int, int] = {}
        """The indexes of the items of calls, by the index of the call."""

    # --- as it grows

    def add_text(self, delta: TextDelta) -> Iterator[bytes]:
        """Returns the events of a piece of text."""
        if self._text is None:
            yield from self._begin()
            self._text = len(self._output)
            yield from self._add_item(_message_item(self._id, self._text, "in_progress", []))
            yield self._part_event("response.content_part.added", self._text, part=_text_part(""))
        self._pieces[self._text].append(delta.text)
        yield self._part_event("response.output_text.delta", self._text, delta=delta.text, logprobs=[])

    def add_call(self, delta: ToolCallDelta) -> Iterator[bytes]:
        """Returns the events of a piece of a call of a tool."""
        yield from self._end_text("completed")
        index = self._calls.get(delta.index)
        if index is None:
            yield from self._begin()
            index = self._calls[delta.index] = len(self._output)
            yield from self._add_item(_call_item(self._id, index, "in_progress", delta.id, delta.name, ""))
        if delta.arguments_json:
            self._pieces[index].append(delta.arguments_json)
            yield self._item_event(
                "response.function_call_arguments.delta", index, delta=delta.arguments_json
            )

    def _begin(self) -> Iterator[bytes]:
        """Returns the first events. They come with the first output, because an error before it still has a
        status of its own."""
        if not self._sequence_number:
            response = self._response("in_progress")
            yield self._response_event("response.created", response)
            yield self._response_event("response.in_progress", response)

    def _add_item(self, item: dict[str, Any]) -> Iterator[bytes]:
        index = len(self._output)
        self._output.append(item)
        self._pieces.append([])
        yield self._event("response.output_item.added", output_index=index, item=item)

    def _end_text(self, status: str) -> Iterator[bytes]:
        if self._text is None:
            return
        index, self._text = self._text, None
        text = "".join(self._pieces[index])
        part = _text_part(text)
        yield self._part_event("response.output_text.done", index, text=text, logprobs=[])
        yield self._part_event("response.content_part.done", index, part=part)
        item = self._output[index]
        item.update(status=status, content=[part])
        yield self._event("response.output_item.done", output_index=index, item=item)

    # --- at its end

    def end(self, result: TaskResult) -> Iterator[bytes]:
        """Returns the last events of a stream."""
        yield from self._begin()
        status = _status(result)
        yield from self._end_text(status)
        for index in self._calls.values():
            arguments = "".join(self._pieces[index])
            item = self._output[index]
            item.update(status=status, arguments=arguments)
            yield self._item_event(
                "response.function_call_arguments.done", index, name=item["name"], arguments=arguments
            )
            yield self._event("response.output_item.done", output_index=index, item=item)
        yield self._response_event(f"response.{status}", self._finished(result))

    def render(self, result: TaskResult) -> bytes:
        """Returns the response of a result that was not streamed."""
        status = _status(result)
        parts = result.text.message.content
        text = "".join([part.text for part in parts])
        if text:
            self._output.append(_message_item(self._id, 0, status, [_text_part(text)]))
        for part in parts:
            if part.HasField("tool_call"):
                index, call = len(self._output), part.tool_call
                item = _call_item(self._id, index, status, call.id, call.name, call.arguments_json)
                self._output.append(item)
        return self._finished(result)

    def fail(self, error: dict[str, str | None]) -> bytes:
        """Returns the last event of a stream that failed. SDKs raise its member `error`; the others are those
        that OpenAI documents."""
        documented = {name: error[name] for name in ("code", "message", "param")}
        return self._event("error", **documented, error=error)

    def _finished(self, result: TaskResult) -> bytes:
        reason = INCOMPLETE.get(result.text.finish_reason)
        details = None if reason is None else {"reason": reason}
        return self._response(_status(result), incomplete_details=details, usage=_usage(result.usage))

    def _response(self, status: str, **members: Any) -> bytes:
        varying = {"status": status, "incomplete_details": None, "output": self._output, **members}
        return b"%b,%b" % (self._opening, to_json(varying)[1:])

    # --- events

    def _event(self, event_type: str, **members: Any) -> bytes:
        event = {"type": event_type, "sequence_number": self._sequence_number, **members}
        self._sequence_number += 1
        return to_json(event)

    def _response_event(self, event_type: str, response: bytes) -> bytes:
        return b'%b,"response":%b}' % (self._event(event_type)[:-1], response)

    def _item_event(self, event_type: str, index: int, **members: Any) -> bytes:
        return self._event(event_type, item_id=self._output[index]["id"], output_index=index, **members)

    def _part_event(self, event_type: str, index: int, **members: Any) -> bytes:
        return self._item_event(event_type, index, content_index=0, **members)


def _status(result: TaskResult) -> str:
    return "incomplete" if result.text.finish_reason in INCOMPLETE else "completed"


def _message_item(task_id: str, index: int, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    item_id = f"msg_{task_id}_{index}"
    return {"type": "message", "id": item_id, "status": status, "role": "assistant", "content": content}


def _call_item(
    task_id: str, index: int, status: str, call_id: str, name: str, arguments: str
) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{task_id}_{index}",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": cached_counts(usage),
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


# --- of a stream


def encode(event: bytes) -> bytes:
    """Returns an event as it is sent, with its type as its name."""
    start = len(b'{"type":"')
    return b"event: %b\n%b" % (event[start : event.index(b'"', start)], encode_event(event))


def render_last(events: ResponseEvents, result: TaskResult) -> bytes:
    return b"".join(map(encode, events.end(result)))


def render_error(events: ResponseEvents, error: PomeloError, request: Request) -> bytes:
    return encode(events.fail(error_members(error, request)))


RENDERERS: Mapping[str, Callable[[ResponseEvents, Any], Iterable[bytes]]] = {
    "text_delta": ResponseEvents.add_text,
    "tool_call_delta": ResponseEvents.add_call,
}
"""Render the events of a task, by type of event."""
