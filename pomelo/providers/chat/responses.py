"""Parses the responses of chat completions, whole or streamed.

It reads what OpenAI, Mistral and compatible hosts send: text as a string or as chunks, tool calls whole or in
pieces, token counts in several places, errors in place of a response or of a chunk.
"""

from __future__ import annotations

from typing import Any

from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.text_pb2 import FINISH_REASON_CONTENT_FILTER, FINISH_REASON_STOP, FinishReason
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event
from pomelo.providers.errors import never_retried
from pomelo.providers.http.errors import ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import parse, pick, pick_list, well_formed
from pomelo.providers.text import completed_text, credible, finish_reason, token_usage
from pomelo.providers.text.tool_calls import ToolCallState, whole_calls

_FINISHES = {
    "length": FinishReason.FINISH_REASON_LENGTH,
    "model_length": FinishReason.FINISH_REASON_LENGTH,
    "max_tokens": FinishReason.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": FinishReason.FINISH_REASON_LENGTH,
    "content_filter": FINISH_REASON_CONTENT_FILTER,
    "refusal": FINISH_REASON_CONTENT_FILTER,
    "sensitive": FINISH_REASON_CONTENT_FILTER,
    "safety": FINISH_REASON_CONTENT_FILTER,
    "recitation": FINISH_REASON_CONTENT_FILTER,
    "blocklist": FINISH_REASON_CONTENT_FILTER,
    "prohibited_content": FINISH_REASON_CONTENT_FILTER,
    "spii": FINISH_REASON_CONTENT_FILTER,
}
"""A host's finish reason in lower case, as some gateways pass on Gemini's, such as MAX_TOKENS, and up to a
colon, behind which Gemini itself has its own reason."""

_INTERRUPTED = frozenset((
    "abort", "error", "insufficient_system_resource", "network_error", "function_call_filter",
    "malformed_function_call", "unexpected_tool_call",
))  # fmt: skip
"""Finish reasons of answers that the host could not complete, such as vLLM's and DeepSeek's, and Gemini's
attempts to call a tool, of which the answer has nothing."""

_CACHED = ("num_cached_tokens", "cached_tokens", "prompt_cache_hit_tokens")
"""Where Mistral, Kimi and DeepSeek count the tokens that were read from their cache."""

_COUNTS = frozenset(("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"))
"""All counts of Gemini, whose thoughts are only in the total."""

_REQUESTED = (None, 0, "0")
"""The index of the choice that is requested, as hosts write it."""

_END_MARKER = b"[DONE]"


def parse_completion(completion: Any, error_mapping: ErrorMapping, *, hidden_thinking: bool) -> Event:
    """Return the event of a whole response. `hidden_thinking` is that of a `Profile`.

    Raises:
        UpstreamError: provider_failed if it can't be used; the mapped error of an `error` in it.
    """
    try:
        choices = completion.get("choices")
        if not choices and (completion.get("error") or completion.get("object") == "error"):
            raise from_error_body(completion, error_mapping)
        choice = _requested(choices)
        finish = _finish_reason(choice, error_mapping)
        # Gemini leaves out the message that its filter withholds.
        message = choice.get("message") or {} if finish == FINISH_REASON_CONTENT_FILTER else choice["message"]
        content: Any = message.get("content")
        if not content and (content := message.get("refusal") or ""):
            finish = _of_refusal(finish)
        if type(content) is list:
            content = _join_text(content)
        calls = message.get("tool_calls") or ()
        if calls:
            finish, calls = whole_calls(finish, map(_call, calls))
        usage = _usage(completion.get("usage"), hidden_thinking)
        return completed_text(well_formed(content), finish, usage, calls)
    except (AttributeError, IndexError, KeyError, TypeError):
        pass
    raise malformed_response("a response of another shape")


class ChunkStream(ToolCallState):
    """A stream of chunks. `hidden_thinking` and `reports_cost` are those of a `Profile`."""

    __slots__ = ("_began", "_error_mapping", "_hidden_thinking", "_refused", "_reports_cost")

    def __init__(
        self, error_mapping: ErrorMapping, report: Report, *, hidden_thinking: bool, reports_cost: bool
    ) -> None:
        super().__init__(report)
        self._error_mapping = error_mapping
        self._hidden_thinking = hidden_thinking
        self._reports_cost = reports_cost
        self._began = False
        self._refused = False

    def completed(self) -> Event:
        if self._refused and self.finish is not None:
            self.finish = _of_refusal(self.finish)
        return super().completed()

    def parse_event(self, data: bytes) -> str:
        if self.ended:
            return ""
        if data == _END_MARKER:
            self.ended = True
            return ""
        try:
            chunk = parse(data, surrogates=True)
            if chunk.get("error"):
                raise from_error_body(chunk, self._error_mapping)
            usage = chunk.get("usage")
            groq = chunk.get("x_groq")  # Groq's own object for usage and errors
            if groq:
                if groq.get("error"):
                    raise from_error_body(groq, self._error_mapping)
                usage = usage or groq.get("usage")
            if usage is not None:
                self._count(_usage(usage, self._hidden_thinking))
                if self._reports_cost and (cost := reported_cost(usage)) is not None:
                    self.report.cost = cost
            choices = chunk.get("choices")
            if not choices:
                if chunk.get("object") == "error":
                    raise from_error_body(chunk, self._error_mapping)
                return ""
            choice = choices[0]
            if choice.get("index"):
                choice = _requested(choices)
                if choice is None:
                    return ""
            reason = choice.get("finish_reason")
            # Some hosts write "" where there is no reason, also after the real one.
            if reason is not None and (reason != "" or self.finish is None):
                self.finish = _finish_reason(choice, self._error_mapping)
                if own_usage := choice.get("usage"):  # Kimi's, which is in no other place
                    self._count(_usage(own_usage, self._hidden_thinking))
            delta = choice.get("delta")
            if delta:
                self._began = True
            elif delta is not None or not (delta := self._message(chunk, choice)):
                return ""
            for call in delta.get("tool_calls") or ():
                self.add_piece(call.get("index"), *_call(call))
            content = delta.get("content")
            if not content:
                # Hosts have two names for the model's thinking.
                if thought := delta.get("reasoning_content") or delta.get("reasoning"):
                    self.add_thinking(thought)
                content = delta.get("refusal")
                if not content:
                    return ""
                self._refused = True
            if type(content) is list:
                for part in _parts(content, "thinking"):
                    for piece in pick_list(part, "thinking"):
                        self.add_thinking(pick(piece, "text"))
                content = _join_text(content)
            if type(content) is str:
                return content
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass
        raise malformed_response("a chunk that can't be read")

    def _message(self, chunk: Any, choice: Any) -> Any:
        """Return the message of a choice without a delta, to be read as one; None if it has nothing new. A
        host that does not stream an answer sends a whole completion, without an end marker; others repeat
        the whole answer at the end of a stream."""
        message = choice.get("message")
        if self.finish is None or chunk.get("object") != "chat.completion":
            return message
        self.ended = True
        if self._began or not message:
            return None
        calls = [{**call, "index": number} for number, call in enumerate(message.get("tool_calls") or ())]
        return {**message, "tool_calls": calls}

    def _count(self, usage: Usage | None) -> None:
        """Replace each count by a later one; null and 0 replace nothing. A count with a smaller prompt is
        ignored."""
        if usage is None:
            return
        if self.usage is None:
            self.usage = usage
        elif not usage.input_tokens or usage.input_tokens >= self.usage.input_tokens:
            self.usage.MergeFrom(usage)
            if self.usage.reasoning_tokens > self.usage.output_tokens:
                self.usage.ClearField("reasoning_tokens")
        if usage.input_tokens:
            self.report.usage = self.usage


def _requested(choices: list[Any]) -> Any:
    """Return the choice with the index 0 or without an index, or None. One is requested, but a host may send
    several."""
    return next((choice for choice in choices if choice.get("index") in _REQUESTED), None)


def reported_cost(usage: Any) -> Any:
    """Return the cost of a response in US dollars, as the host reports it; None if it does not.

    If the operator pays another vendor for the response (OpenRouter's `is_byok`), the host reports only its
    own fee, which does not count.
    """
    return None if not isinstance(usage, dict) or usage.get("is_byok") else usage.get("cost")


def _call(call: Any) -> tuple[Any, Any, Any]:
    """The id, name and arguments of a tool call, or of a piece of one."""
    function = call.get("function") or {}
    return call.get("id"), function.get("name"), function.get("arguments")


def _of_refusal(finish: FinishReason.ValueType) -> FinishReason.ValueType:
    """The finish reason of a text in which the model says why it refuses to answer: it must not be taken for
    the answer, which may have to be JSON."""
    return FINISH_REASON_CONTENT_FILTER if finish == FINISH_REASON_STOP else finish


def _join_text(chunks: list[Any]) -> str:
    """The text of a content's chunks, without the model's thinking."""
    return "".join([chunk["text"] for chunk in _parts(chunks, "text")])


def _parts(chunks: list[Any], kind: str) -> list[Any]:
    return [chunk for chunk in chunks if chunk.get("type") == kind]


def _finish_reason(choice: dict[str, Any], error_mapping: ErrorMapping) -> FinishReason.ValueType:
    reason = choice["finish_reason"]
    if type(reason) is str:
        reason = reason.lower().partition(":")[0]
    if reason in _INTERRUPTED:
        if choice.get("error"):
            with never_retried():
                raise from_error_body(choice, error_mapping)
        raise malformed_response("an answer that the host has not completed")
    return finish_reason(reason, _FINISHES)


def _usage(usage: Any, hidden_thinking: bool) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    cached = written = reasoning = None
    if isinstance(details := usage.get("prompt_tokens_details"), dict):
        cached, written = details.get("cached_tokens"), details.get("cache_write_tokens")
    if isinstance(details := usage.get("completion_tokens_details"), dict):
        reasoning = details.get("reasoning_tokens")
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if prompt and (reasoning or (hidden_thinking and usage.keys() <= _COUNTS)):
        counts = [credible(count) for count in (usage.get("total_tokens"), prompt, completion or 0)]
        beside = 0 if None in counts else counts[0] - counts[1] - counts[2]
        # xAI counts, and charges, the reasoning beside the output. Cached tokens may be beside the prompt.
        if beside > 0 and (credible(reasoning) == beside if reasoning else beside != cached):
            completion, reasoning = counts[2] + beside, beside
    return token_usage(
        prompt,
        completion,
        cached=cached or next(filter(None, map(usage.get, _CACHED)), None),
        written=written,
        reasoning=reasoning,
    )
