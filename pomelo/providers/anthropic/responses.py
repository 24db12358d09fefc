"""Parses the responses of the Messages API, whole or streamed. Thinking is only counted."""

from __future__ import annotations

from typing import Any

from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.text_pb2 import FinishReason
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.anthropic.errors import ERROR_MAPPING
from pomelo.providers.base import Event
from pomelo.providers.http.errors import from_error_body, malformed_response
from pomelo.providers.http.parsing import parse, pick, well_formed
from pomelo.providers.text import completed_text, credible, finish_reason, token_usage
from pomelo.providers.text.tool_calls import ToolCallState, whole_calls

_FINISHES = {
    "max_tokens": FinishReason.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": FinishReason.FINISH_REASON_LENGTH,
    "compaction": FinishReason.FINISH_REASON_LENGTH,
    "refusal": FinishReason.FINISH_REASON_CONTENT_FILTER,
}


def parse_message(message: Any) -> Event:
    """The event of a whole response.

    Raises:
        UpstreamError: provider_failed if it can't be used; the mapped error of an `error` in it.
    """
    try:
        if message.get("error"):
            raise from_error_body(message, ERROR_MAPPING)
        blocks = message["content"]
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        given = [block for block in blocks if block["type"] == "tool_use"]
        finish = finish_reason(message["stop_reason"], _FINISHES)
        finish, calls = whole_calls(finish, map(_call, given)) if given else (finish, [])
        return completed_text(well_formed("".join(texts)), finish, _usage(message.get("usage")), calls)
    except (AttributeError, KeyError, TypeError):
        pass
    raise malformed_response("a response of another shape")


def _usage(usage: Any) -> Usage | None:
    """The vendor's count. Its `input_tokens` do not include what was read from its cache or written to it."""
    if not isinstance(usage, dict):
        return None
    prompt = credible(usage.get("input_tokens"))
    cached = credible(usage.get("cache_read_input_tokens") or 0)
    written = credible(usage.get("cache_creation_input_tokens") or 0)
    written_5m = credible(pick(usage, "cache_creation", "ephemeral_5m_input_tokens") or 0)
    written_1h = credible(pick(usage, "cache_creation", "ephemeral_1h_input_tokens") or 0)
    thinking = pick(usage, "output_tokens_details", "thinking_tokens")
    counts = (prompt, cached, written, written_5m, written_1h)
    if None in counts:
        return token_usage(None, usage.get("output_tokens"), reasoning=thinking)
    written = max(written, written_5m + written_1h)  # the parts may be there without their sum
    return token_usage(
        prompt + cached + written,
        usage.get("output_tokens"),
        cached=cached,
        written=written,
        written_1h=written_1h,
        reasoning=thinking,
    )


class MessageStream(ToolCallState):
    """A stream of typed events. Pings, and events and blocks of unknown types are skipped; thinking is only
    counted."""

    __slots__ = ("_block", "_counts")

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self._counts: dict[str, Any] = {}
        self._block: tuple[Any, Any] = (None, "text")
        """The index and the type of the block that began last; some proxies begin several before they end."""

    def parse_event(self, data: bytes) -> str:
        if self.ended:
            return ""
        try:
            event = parse(data, surrogates=True)
            event_type = event.get("type")
            if event_type == "content_block_delta":
                delta = event["delta"]
                delta_type = delta["type"]
                if delta_type == "text_delta":
                    index, block_type = self._block
                    if block_type != "text" and event.get("index") == index:
                        return ""
                    return _text(delta["text"])
                if delta_type == "input_json_delta" and event["index"] in self._by_index:
                    self.add_piece(event["index"], None, None, delta["partial_json"])
                elif delta_type == "thinking_delta":
                    self.add_thinking(delta.get("thinking"))
                return ""
            if event_type == "content_block_start":
                block = event["content_block"]
                block_type = block["type"]
                self._block = event.get("index"), block_type
                if block_type == "text":
                    return _text(block.get("text") or "")
                if block_type == "tool_use":
                    call_id, name, arguments = _call(block)
                    # An empty object is only a placeholder.
                    self.add_piece(event["index"], call_id, name, arguments or None)
                return ""
            if event_type == "message_start":
                usage = event["message"].get("usage")
                if isinstance(usage, dict):
                    # The first count of the output is meaningless; a later event has the real one.
                    self._counts = {n: count for n, count in usage.items() if not n.startswith("output_")}
                    self.report.usage = _usage(self._counts | {"output_tokens": 0})
            elif event_type == "message_delta":
                self._count(event.get("usage"))
                reason = event["delta"].get("stop_reason")
                if reason is not None and (reason != "" or self.finish is None):
                    self.finish = finish_reason(reason, _FINISHES)
            elif event_type == "message_stop":
                self.ended = True
            elif event.get("error"):
                raise from_error_body(event, ERROR_MAPPING)
            return ""
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise malformed_response("an event that can't be read")

    def _count(self, usage: Any) -> None:
        """Replace each count by a later one, which is larger; null and 0 replace nothing."""
        if isinstance(usage, dict):
            later = {name: count for name, count in usage.items() if count}
            self._counts = {**usage, **self._counts, **later}
            self.usage = _usage(self._counts) or self.usage


def _text(text: Any) -> str:
    if type(text) is not str:
        raise TypeError
    return text


def _call(block: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The id, name and arguments of a tool call."""
    return block.get("id"), block.get("name"), block.get("input")
