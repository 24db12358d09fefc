"""What comes back from a host of chat completions, whole or as a stream, made into the contract's words.

`pomelo.providers.chat.chat` calls it. It reads what OpenAI, Mistral and the hosts that copy them send: text
as a string or as chunks, the count of tokens in any place, an error in place of an answer or of a part of it.
"""

from __future__ import annotations

from typing import Any

from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.text_pb2 import FinishReason, TextDelta, TokenUsage
from pomelo.providers.http.errors import ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import parse, well_formed
from pomelo.providers.text import Answer, counted

_FINISHES = {
    "stop": FinishReason.FINISH_REASON_STOP,
    "length": FinishReason.FINISH_REASON_LENGTH,
    "model_length": FinishReason.FINISH_REASON_LENGTH,
    "content_filter": FinishReason.FINISH_REASON_CONTENT_FILTER,
}
"""Any other reason is a stop: no tool was offered, and a reason that is new is no failure."""

_END = b"[DONE]"


def whole(answer: Any, dialect: ErrorMapping) -> TextDelta:
    """The one delta of a whole answer.

    Raises:
        PomeloError: provider_failed where it is unusable; what an `error` in it means.
    """
    try:
        if "choices" not in answer and (answer.get("error") or answer.get("object") == "error"):
            raise from_error_body(answer, dialect)
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content") or message.get("refusal") or ""
        finish = _finish(choice, dialect)
        if type(content) is list:
            content = _joined(content)
        usage = _usage(answer.get("usage"))
        return TextDelta(content=well_formed(content), finish_reason=finish, usage=usage)
    except (AttributeError, IndexError, KeyError, TypeError):
        pass
    raise malformed_response("an answer of another shape")


class ChatAnswer(Answer):
    """A stream of chunks. The cost that the host tells goes into `report`, if there is one."""

    __slots__ = ("_dialect", "_report")

    def __init__(self, dialect: ErrorMapping, report: Report | None = None) -> None:
        super().__init__()
        self._dialect = dialect
        self._report = report

    def take(self, data: bytes) -> str:
        """The text that a chunk adds; often empty at the beginning and the end.

        Raises:
            PomeloError: provider_failed; what an `error` in place of a chunk means.
        """
        if self.ended:
            return ""
        if data == _END:
            self.ended = True
            return ""
        try:
            chunk = parse(data, surrogates=True)
            if chunk.get("error"):
                raise from_error_body(chunk, self._dialect)
            usage = chunk.get("usage")
            aside = chunk.get("x_groq")  # Groq's place for what OpenAI has elsewhere
            if aside:
                if aside.get("error"):
                    raise from_error_body(aside, self._dialect)
                usage = usage or aside.get("usage")
            if usage is not None:
                self._count(_usage(usage))
                if self._report is not None and (cost := reported_cost(usage)) is not None:
                    self._report.cost = cost
            choices = chunk.get("choices")
            if not choices:
                if chunk.get("object") == "error":
                    raise from_error_body(chunk, self._dialect)
                return ""
            choice = choices[0]
            if choice.get("finish_reason") is not None:
                self.finish = _finish(choice, self._dialect)
            delta = choice.get("delta")
            if not delta:
                return ""
            content = delta.get("content") or delta.get("refusal")
            if not content:
                return ""
            if type(content) is list:
                content = _joined(content)
            if type(content) is str:
                return content
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass
        raise malformed_response("a chunk that can't be read")

    def _count(self, usage: TokenUsage | None) -> None:
        """Takes in a count; an empty one at the end takes nothing back."""
        if usage is not None and (self.usage is None or usage.prompt_tokens >= self.usage.prompt_tokens):
            self.usage = usage
            if usage.prompt_tokens:
                self.prompt = usage


def reported_cost(usage: Any) -> Any:
    """What a host says that an answer cost, in US dollars; None where it says nothing.

    Of an answer that the operator pays to another vendor (OpenRouter's `is_byok`) a host tells its fee alone.
    """
    return None if not isinstance(usage, dict) or usage.get("is_byok") else usage.get("cost")


def _joined(chunks: list[Any]) -> str:
    """The text among the chunks of a content; what a model thought is left out."""
    return "".join([chunk["text"] for chunk in chunks if chunk.get("type") == "text"])


def _finish(choice: dict[str, Any], dialect: ErrorMapping) -> FinishReason.ValueType:
    reason = choice["finish_reason"]
    if reason == "error" and choice.get("error"):
        raise from_error_body(choice, dialect)
    if reason == "error" or not isinstance(reason, str):
        raise malformed_response("a finish_reason that is none")
    return _FINISHES.get(reason, FinishReason.FINISH_REASON_STOP)


def _usage(usage: Any) -> TokenUsage | None:
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    if not isinstance(details, dict):
        details = {}
    return counted(
        usage.get("prompt_tokens"),
        usage.get("completion_tokens"),
        cached=details.get("cached_tokens") or usage.get("num_cached_tokens"),  # the latter is Mistral's
        written=details.get("cache_write_tokens"),
    )
