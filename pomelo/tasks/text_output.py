"""The output of text tasks: joins the deltas, counts what they have, and replays a stored answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.text_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_TOOL_CALLS,
    ROLE_ASSISTANT,
    Message,
    TextInput,
    ToolCall,
    ToolCallDelta,
)
from pomelo.gen.v1.usage_pb2 import Usage as UsageCounts
from pomelo.providers.base import log_fields
from pomelo.providers.chunks import output_calls, output_text, split_text, split_tool_call, text_delta
from pomelo.providers.text.words import count_words
from pomelo.tasks.base import LARGE, Collector, CollectorContext

log = logging.getLogger("pomelo.tasks")

BYTES_PER_TOKEN = 8
"""More than the average of any language, so that Pomelo's own counts are never too high."""

_NO_ARGUMENTS = "{}"

_NO_USAGE = Usage()


def _size(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _call_size(call: ToolCall | ToolCallDelta) -> int:
    """The bytes of a tool call, or a piece of one, that the model generated: not its id."""
    return _size(call.name) + _size(call.arguments_json)


def _deltas(text: str, calls: Iterable[ToolCall], index: int = 0) -> Iterator[TaskEvent]:
    """A text and the tool calls from `index` on, as small events."""
    if text:
        yield from split_text(text_delta(text))
    for number, call in enumerate(calls, index):
        yield from split_tool_call(call, number)


class TextCollector(Collector):
    """Joins deltas if the whole text is needed; otherwise only counts them."""

    __slots__ = (
        "_calls", "_context", "_counted", "_empty_calls", "_joins", "_last", "_pieces", "_rest",
        "_rest_calls", "_stream", "_text", "_uncounted", "_usage",
    )  # fmt: skip

    def __init__(self, context: CollectorContext) -> None:
        super().__init__()
        self._context = context
        self._stream = context.stream
        self._joins = not context.stream or context.keep
        self._text = bytearray()  # a list would need sixty more bytes per delta
        self._calls: list[tuple[ToolCall, bytearray]] = []
        """The tool calls whose deltas have arrived, and their arguments if they are joined."""
        self._empty_calls: set[int] = set()
        """Those without arguments so far. Clients parse arguments as JSON, so they become {}."""
        self._pieces = 0
        self._last: TaskResult | None = None
        self._rest = ""
        """The text that came with the end, in no delta."""
        self._rest_calls: list[ToolCall] = []
        """The tool calls that came with the end."""
        self._usage = _NO_USAGE
        self._counted = True
        self._uncounted = _NO_USAGE, False, False, 0
        """The arguments of `_estimate` if `must_count`."""

    def add(self, event: TaskEvent) -> TaskEvent | None:
        text = event.text_delta.text
        if not text:
            if event.HasField("completed"):
                self._last = event.completed
            elif event.HasField("tool_call_delta"):
                return self._add_call(event)
            return None
        self.output_bytes += len(text) if text.isascii() else len(text.encode())
        self._pieces += 1
        if self._joins:
            self._text += text.encode()
        return event

    def _add_call(self, event: TaskEvent) -> TaskEvent | None:
        piece = event.tool_call_delta
        if piece.index == len(self._calls):
            self._calls.append((ToolCall(id=piece.id, name=piece.name), bytearray()))
            self._empty_calls.add(piece.index)
        elif not piece.arguments_json:
            return None
        if piece.arguments_json:
            self._empty_calls.discard(piece.index)
        self.output_bytes += _call_size(piece)
        self._pieces += 1
        if self._joins:
            self._calls[piece.index][1].extend(piece.arguments_json.encode())
        return event

    def finish(self, result: TaskResult) -> None:
        last = self._last
        if last is None:
            raise PomeloError("provider_failed")
        output = last.text
        self._rest = output_text(output)
        if len(output.message.content) > bool(self._rest):  # it has more than a text
            self._rest_calls = output_calls(output)
            for call in self._rest_calls:
                call.arguments_json = call.arguments_json or _NO_ARGUMENTS
        self.output_bytes += _size(self._rest) + sum(map(_call_size, self._rest_calls))
        self._usage = self._complete_usage(last)
        self.output_bytes += len(_NO_ARGUMENTS) * len(self._empty_calls)  # which no model has generated
        reason = output.finish_reason
        # Some vendors call it a stop if a tool was called, or the reverse.
        if reason in (FINISH_REASON_STOP, FINISH_REASON_TOOL_CALLS):
            called = self._calls or self._rest_calls
            reason = FINISH_REASON_TOOL_CALLS if called else FINISH_REASON_STOP
        result.text.finish_reason = reason
        if self._joins:
            self._write_message(result.text.message)

    def _write_message(self, message: Message) -> None:
        message.role = ROLE_ASSISTANT
        text = self._text.decode() + self._rest
        if text or not (self._calls or self._rest_calls):
            message.content.add().text = text
        for call, arguments in self._calls:
            call.arguments_json = arguments.decode() or _NO_ARGUMENTS
            message.content.add().tool_call.CopyFrom(call)
        for call in self._rest_calls:
            message.content.add().tool_call.CopyFrom(call)

    def end_stream(self, result: TaskResult) -> Iterable[TaskEvent]:
        result.text.ClearField("message")
        if not (self._rest or self._rest_calls or self._empty_calls):
            return ()
        ends = [
            TaskEvent(tool_call_delta=ToolCallDelta(index=index, arguments_json=_NO_ARGUMENTS))
            for index in sorted(self._empty_calls)
        ]
        return [*ends, *_deltas(self._rest, self._rest_calls, len(self._calls))]

    def _complete_usage(self, last: TaskResult) -> Usage:
        """The provider's counts; the impossible or missing ones are estimated."""
        usage = _from_counts(last.usage)
        valid_input, valid_output = self._validate_usage(usage) if last.HasField("usage") else (False, False)
        if valid_input and valid_output:
            return usage
        self._counted = False
        counts = usage, valid_input, valid_output, self.output_bytes
        if (self.output_bytes > LARGE and not self._stream) or self._context.estimate.count_input.is_slow:
            self._uncounted = counts
            self.must_count = True
            return _NO_USAGE
        return self._estimate(*counts)

    def count(self) -> None:
        self.must_count = False
        self._usage = self._estimate(*self._uncounted)

    def _estimate(self, usage: Usage, valid_input: bool, valid_output: bool, size: int) -> Usage:
        """The provider's counts, and estimates of those that are not valid; `size` is the bytes of output."""
        # The whole answer may be one event.
        pieces = self._pieces + (0 if self._stream else count_words(self._rest) + len(self._rest_calls))
        estimated = self._estimated_usage(pieces, size)
        if valid_input:
            return replace(usage, output_tokens=estimated.output_tokens, reasoning_tokens=0)
        if valid_output:
            return replace(
                estimated, output_tokens=usage.output_tokens, reasoning_tokens=usage.reasoning_tokens
            )
        return estimated

    def _validate_usage(self, usage: Usage) -> tuple[bool, bool]:
        """Whether a provider's counts of input and of output are possible; impossible ones are logged."""
        min_output = 1 if self.output_bytes else 0
        max_output = self._context.model.limits.max_output_tokens
        valid_input = self._is_valid_input(usage)
        valid_output = min_output <= usage.output_tokens <= max_output
        if not (valid_input and valid_output):
            log.warning(
                "a provider of %s reported impossible counts, so they are estimated: %d tokens of input "
                "(%d read from a cache, %d written to it), %d of output",
                self._context.model.name,
                usage.input_tokens,
                usage.cached_input_tokens,
                usage.cache_write_input_tokens,
                usage.output_tokens,
                extra=log_fields(),
            )
        return valid_input, valid_output

    def _is_valid_input(self, usage: Usage) -> bool:
        cached, written = usage.cached_input_tokens, usage.cache_write_input_tokens
        # The vendor's model may take more than the catalogue's.
        context = self._context
        maximum = max(context.model.limits.max_input_tokens, context.estimate.possible_input_tokens)
        return (
            1 <= usage.input_tokens <= maximum
            and min(cached, written) >= 0
            and cached + written <= usage.input_tokens
            and 0 <= usage.cache_write_1h_input_tokens <= written
        )

    def partial_usage(self, task_input: TextInput) -> Usage:
        return self._estimated_usage(self._pieces, self.output_bytes)

    def _estimated_usage(self, pieces: int, size: int) -> Usage:
        """The provider's count of the input if it has reported one, else Pomelo's: for text lower than that
        of any tokenizer, for images a typical one. Each piece of output has at least one token. The model's
        thinking counts as output."""
        estimate, report = self._context.estimate, self._context.report
        size += report.thinking_bytes
        tokens = min(max(pieces, size // BYTES_PER_TOKEN), estimate.maximum.output_tokens)
        counts = report.usage
        if counts is not None and self._is_valid_input(reported := _from_counts(counts)):
            return replace(reported, output_tokens=tokens, reasoning_tokens=0)
        return Usage(
            input_tokens=min(estimate.count_input(), estimate.maximum.input_tokens), output_tokens=tokens
        )

    def usage(self, task_input: Any) -> tuple[Usage, bool]:
        if self.must_count:
            self.count()
        return self._usage, self._counted


def _from_counts(counts: UsageCounts) -> Usage:
    reasoning = counts.reasoning_tokens
    return Usage(
        input_tokens=counts.input_tokens,
        output_tokens=counts.output_tokens,
        cached_input_tokens=counts.cached_input_tokens,
        cache_write_input_tokens=counts.cache_write_input_tokens,
        cache_write_1h_input_tokens=counts.cache_write_1h_input_tokens,
        # It is part of a count that is charged, and is not charged itself.
        reasoning_tokens=reasoning if 0 <= reasoning <= counts.output_tokens else 0,
    )


def output_size(result: TaskResult) -> int:
    return _size(output_text(result.text)) + sum(map(_call_size, output_calls(result.text)))


def replay(result: TaskResult, audio: Path | None) -> Iterator[TaskEvent]:
    """The deltas of a stored text and its tool calls, and the result without them."""
    yield from _deltas(output_text(result.text), output_calls(result.text))
    last = TaskEvent(completed=result)
    last.completed.text.ClearField("message")
    yield last
