"""Streams of text and counts of tokens, for all providers of text."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any

from pomelo.catalog.reported_cost import Report
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP, ROLE_ASSISTANT, FinishReason, ToolCall
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event, log_fields
from pomelo.providers.chunks import text_delta
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import MAX_BODY_BYTES
from pomelo.providers.http.errors import malformed_response
from pomelo.providers.http.parsing import split_half, well_formed
from pomelo.providers.http.responses import SseStream

log = logging.getLogger("pomelo.providers")

_MAX_TOKENS = 10**9
"""More tokens than any model takes: a larger count is wrong."""


class StreamState:
    """The state of a stream of text, without the text. A subclass parses the events of a vendor."""

    __slots__ = ("_halves", "ended", "finish", "report", "tool_calls", "usage")

    def __init__(self, report: Report) -> None:
        self.report = report
        """The job's: a subclass sets its `usage` as soon as the vendor has counted the input."""
        self.ended = False
        """Whether the end marker has arrived."""
        self.finish: FinishReason.ValueType | None = None
        self.usage: Usage | None = None
        """The vendor's count of tokens, once a credible one has arrived."""
        self.tool_calls: list[Event] = []
        """Pieces of tool calls that are to be yielded, after the text of the same event."""
        self._halves: dict[int, str] = {}
        """Of each tool call half a surrogate pair, whose other half has not arrived."""

    def parse_event(self, data: bytes) -> str:
        """Return the text that an event adds, often "". It may begin or end with half a surrogate pair. Tool
        calls are added by `add_tool_call`.

        Raises:
            UpstreamError: provider_failed for an invalid event; the mapped error of an error event.
        """
        raise NotImplementedError

    def add_thinking(self, text: Any) -> None:
        """Count a piece of the model's thinking, which callers do not get, but which is billed as output."""
        if type(text) is str:
            self.report.thinking_bytes += (
                len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            )

    def add_tool_call(self, index: int, arguments: str, call_id: str = "", name: str = "") -> None:
        """Add a piece of the tool call `index`; the first piece has its id and name. The arguments may begin
        or end with half a surrogate pair."""
        event = Event()
        delta = event.tool_call_delta
        delta.index = index
        if call_id or name:
            delta.id, delta.name = well_formed(call_id), well_formed(name)
        if index in self._halves:
            arguments = self._halves.pop(index) + arguments
        try:
            delta.arguments_json = arguments
        except UnicodeEncodeError:
            arguments, half = split_half(arguments)
            if half:
                self._halves[index] = half
            delta.arguments_json = well_formed(arguments)
        self.tool_calls.append(event)

    def end_tool_calls(self) -> None:
        """Add the halves of surrogate pairs without their other half, as U+FFFD."""
        for index, half in list(self._halves.items()):
            del self._halves[index]
            self.add_tool_call(index, well_formed(half))

    def completed(self) -> Event:
        """Return the last event, without usage if the vendor reported no credible count.

        Raises:
            UpstreamError: provider_failed; no finish reason has arrived.
        """
        if self.finish is None:
            raise malformed_response("a stream without its finish reason")
        return completed_text("", self.finish, self.usage)


async def stream_text(
    connect: Callable[[], AbstractAsyncContextManager[SseStream]], state: StreamState
) -> AsyncGenerator[Event, None]:
    """Yield the events of a streamed response: `connect` sends the request, `state` parses the events.

    A complete stream without a credible count of tokens ends without usage, which the engine estimates. A
    stream with more text, arguments of tool calls included, than a whole response may have fails. An error
    event may be retried only if it is the first event.

    Raises:
        UpstreamError: by the error map.
    """
    left = MAX_BODY_BYTES
    half = ""  # of a surrogate pair whose other half has not arrived; at the end, any text not yet yielded
    began = False
    has_content = False
    async with connect() as stream:
        while not state.ended:
            try:
                # Before it writes, a model may think without a sign of life.
                events = await stream.read(patient=not has_content)
            except PomeloError:
                # The connection may have been closed after the last event, before its line end.
                for _, data in stream.rest():
                    with suppress(PomeloError):
                        half += state.parse_event(data.strip())
                if not state.ended:
                    raise
                break
            if not events:
                raise malformed_response("a stream without its end marker")
            for _, data in events:
                data = data.strip()
                if not data:
                    continue  # a keep-alive
                try:
                    text = state.parse_event(data)
                except UpstreamError as error:
                    if began and error.retry is not RetryPolicy.NEVER:  # the vendor may charge what it did
                        raise error.copy(RetryPolicy.NEVER) from error
                    raise
                began = True
                if text:
                    has_content = True
                    left -= len(text)
                    if left < 0:
                        raise malformed_response("a text above the limit")
                    event = Event()
                    try:
                        # Setting it costs a sixth of what the constructors cost.
                        event.text_delta.text = half + text
                        half = ""
                    except UnicodeEncodeError:
                        text, half = split_half(half + text)
                        event.text_delta.text = well_formed(text)
                    if text:
                        yield event
                if state.tool_calls:
                    has_content = True
                    pieces, state.tool_calls = state.tool_calls, []
                    for event in pieces:
                        left -= len(event.tool_call_delta.arguments_json)
                        if left < 0:
                            raise malformed_response("arguments of tool calls above the limit")
                        yield event
        await stream.drain()
    if half:
        yield text_delta(well_formed(half))
    state.end_tool_calls()
    for event in state.tool_calls:
        yield event
    yield state.completed()


def completed_text(
    text: str, finish: FinishReason.ValueType, usage: Usage | None, tool_calls: Iterable[ToolCall] = ()
) -> Event:
    """Return the last event of a text task. `text` and `tool_calls` are what no delta had: of a whole
    response all of it."""
    event = Event()
    output = event.completed.text
    output.finish_reason = finish
    if text:
        message = output.message
        message.role = ROLE_ASSISTANT
        message.content.add().text = text
    for call in tool_calls:
        output.message.role = ROLE_ASSISTANT
        output.message.content.add().tool_call.CopyFrom(call)
    if usage is not None:
        event.completed.usage.CopyFrom(usage)
    return event


def finish_reason(reason: Any, reasons: Mapping[str, FinishReason.ValueType]) -> FinishReason.ValueType:
    """Return a vendor's finish reason as ours. One that is not in `reasons` is a stop, because a new reason
    is not a failure.

    Raises:
        UpstreamError: provider_failed; it is not text.
    """
    if not isinstance(reason, str):
        raise malformed_response("an invalid finish reason")
    return reasons.get(reason, FINISH_REASON_STOP)


def token_usage(
    prompt: Any,
    completion: Any,
    *,
    cached: Any = None,
    written: Any = None,
    written_1h: Any = None,
    reasoning: Any = None,
) -> Usage | None:
    """Return a vendor's counts as usage, or None if neither `prompt` nor `completion` is credible. If only
    one is, the other is 0, which the engine replaces by an estimate.

    `prompt` includes the `cached` and the cache-`written` tokens, and `written` includes `written_1h`; absent
    ones are 0. If they contradict each other, the whole prompt counts as ordinary input. `completion`
    includes the tokens of `reasoning`, which are 0 if they are absent or impossible.
    """
    reported = prompt, completion
    prompt, completion = credible(prompt), credible(completion)
    if prompt is None or completion is None:
        if reported != (None, None):
            log.warning(
                "a provider reported an impossible count of tokens, or only one, so it is estimated",
                extra=log_fields(),
            )
        if not prompt and not completion:
            return None
        prompt, completion = prompt or 0, completion or 0
    usage = Usage(input_tokens=prompt, output_tokens=completion)
    if cached or written or written_1h:
        parts = [credible(part or 0) for part in (cached, written, written_1h)]
        if None not in parts and parts[0] + parts[1] <= prompt and parts[2] <= parts[1]:
            usage.cached_input_tokens = parts[0]
            usage.cache_write_input_tokens = parts[1]
            usage.cache_write_1h_input_tokens = parts[2]
    if reasoning and (reasoning := credible(reasoning)) is not None and reasoning <= completion:
        usage.reasoning_tokens = reasoning
    return usage


def credible(value: Any) -> Any:
    """Return a vendor's count as a whole number; None if it is not one, or impossible."""
    # type() and not isinstance: True and False are ints, too.
    if type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= _MAX_TOKENS else None
