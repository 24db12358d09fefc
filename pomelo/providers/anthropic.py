"""Anthropic: the Messages API, in the version that still accepts sampling parameters.

Its base URL has no /v1. It reads two keys of a route: `sampling` ("both": the model accepts temperature and
top_p together; by default only the temperature is sent) and `extra` (a table of further fields to send). The
API has no seed and no penalties.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from hashlib import sha256
from re import compile as pattern
from typing import Any, Literal

from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.text_pb2 import FinishReason, Message, Role, TextInput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe, one_event
from pomelo.providers.errors import UpstreamError
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import parse, pick, pick_text, well_formed
from pomelo.providers.http.vendor import Vendor
from pomelo.providers.text import (
    StreamState,
    completed_text,
    credible,
    finish_reason,
    only_text,
    stream_text,
    token_usage,
)

_VERSION = "2023-06-01"
"""The later version refuses temperature and top_p for every model."""

_MAX_WHOLE_TOKENS = 21_000
"""Tokens of output above which the vendor asks clients to stream: a whole response could take more than ten
minutes."""

_DEFAULT_MAX_TOKENS = 4096
"""max_tokens, which the API requires, if neither the caller nor the catalogue sets it."""

_FINISHES = {
    "max_tokens": FinishReason.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": FinishReason.FINISH_REASON_LENGTH,
    "compaction": FinishReason.FINISH_REASON_LENGTH,
    "refusal": FinishReason.FINISH_REASON_CONTENT_FILTER,
}

_MEANINGS = {
    "prompt_too_long": "context_length_exceeded",
    "output_blocked": "content_policy_violation",
    "prefill": "invalid_parameter",
    "request_too_large": "payload_too_large",
    # Our account, key or permissions. The first has the status 429, but a retry is pointless.
    "enforced_spend_limit_reached": "provider_failed",
    "authentication_error": "provider_failed",
    "billing_error": "provider_failed",
    "permission_error": "provider_failed",
    "not_found_error": "provider_failed",
    "rate_limit_error": "provider_unavailable",
    "api_error": "provider_unavailable",
    "timeout_error": "provider_unavailable",
    "overloaded_error": "provider_unavailable",
}
"""The vendor's code, or our name for the beginning of its message -> the code of our table."""

_MESSAGES = (
    (pattern(r"prompt is too long|input length and .max_tokens. exceed"), "prompt_too_long"),
    (pattern(r"Output blocked by content filtering"), "output_blocked"),
    (pattern(r"This model does not support assistant message prefill"), "prefill"),
)
"""The vendor has one code for every invalid request; only the beginning of its message differs."""

_NAMES = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop_sequences",
    "user": "metadata",
}
"""The contract's name of a parameter -> the vendor's."""

_CONTRACT_NAMES = {vendor_name: name for name, vendor_name in _NAMES.items()} | {
    "messages": "messages",
    "system": "messages",
}
"""The vendor's name of a parameter -> the contract's."""

_FIELD = pattern(r"([a-z_]+)[.\w]*: ")


def _read_error_body(body: Any) -> ErrorBody:
    error = pick(body, "error")
    message = pick_text(error, "message")
    known = [code for text, code in _MESSAGES if text.match(message)]
    codes = (pick_text(error, "details", "error_code"), *known, pick_text(error, "type"))
    name = _FIELD.match(message)
    return ErrorBody(codes, _CONTRACT_NAMES.get(name[1]) if name else None)


ERROR_MAPPING = ErrorMapping("anthropic", _read_error_body, _MEANINGS)


class AnthropicOptions(Options):
    sampling: Literal["both"] | None = None
    extra: dict[str, Any] | None = None


class Anthropic(Vendor):
    """Anthropic as a provider of text."""

    base_url = "https://api.anthropic.com"
    options = AnthropicOptions
    probe = Probe("/v1/models", "x-api-key", "", {"anthropic-version": _VERSION})

    def __init__(self, credentials: Credentials, http: Http) -> None:
        super().__init__(credentials, http)
        self._url = URL(self._base + "/v1/messages")

    def fit_text(self, fitting: Fitting) -> None:
        """Adjust an input to what the API accepts, and to the fields that the operator has fixed."""
        for name in ("seed", "presence_penalty", "frequency_penalty"):
            fitting.drop(name)
        options = fitting.route.options
        if fitting.get("temperature") is not None and options.get("sampling") != "both":
            fitting.drop("top_p", "left out beside temperature: the model takes one of the two")
        fitting.drop_items("stop", lambda text: not text.strip(), "strings that are not blank")
        fitting.override(_NAMES, options.get("extra"))

    def text(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        """Answer a conversation.

        A whole response that may become very long is requested as a stream and collected. A complete response
        without a credible count of tokens has no usage.

        Raises:
            UpstreamError: by the error map; invalid_parameter if there is no message but the system's.
        """
        return self._stream(job) if job.stream else one_event(self.complete_text, job)

    async def complete_text(self, job: Job[TextInput]) -> Event:
        """As `text`, without a stream."""
        if _max_tokens(job) > _MAX_WHOLE_TOKENS:
            return await self._collect(job)
        message = await self._http.request_json(
            self._url, self._json_headers, to_json(request(job, stream=False)), ERROR_MAPPING, surrogates=True
        )
        return _parse_message(message)

    def _stream(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        return stream_text(
            lambda: self._http.stream_events(
                self._url, self._json_headers, to_json(request(job, stream=True)), ERROR_MAPPING
            ),
            _MessageStream(job.report),
        )

    async def _collect(self, job: Job[TextInput]) -> Event:
        text = bytearray()  # in a list, each chunk would take sixty bytes more
        turn = self._http.turns.stream()
        async with aclosing(self._stream(job)) as events:
            async for event in events:
                if turn.over():
                    await turn.next()
                text += event.text_delta.text.encode()
        result = event.completed
        usage = result.usage if result.HasField("usage") else None
        return completed_text(text.decode(), result.text.finish_reason, usage)


def request(job: Job[TextInput], *, stream: bool) -> dict[str, Any]:
    """Return the request body for a text job.

    System messages are moved before the conversation. Blank texts, which the vendor refuses, are left out.

    Raises:
        UpstreamError: invalid_parameter; no message is left.
    """
    text = job.input
    route = job.route
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in text.messages:
        if message.role == Role.ROLE_SYSTEM:
            system += [part.text for part in message.content if part.text.strip()]
        elif content := _content(message):
            turns.append(
                {"role": "user" if message.role == Role.ROLE_USER else "assistant", "content": content}
            )
    if not turns:
        raise UpstreamError(
            "invalid_parameter",
            "Invalid messages: this model needs a message of the user's that is not blank",
            field="messages",
        )
    body: dict[str, Any] = {"model": route.model, "max_tokens": _max_tokens(job), "messages": turns}
    if system:
        body["system"] = "\n\n".join(system)
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
    if "extra" in route.options:
        body.update(route.options["extra"])
    return body


def _max_tokens(job: Job[TextInput]) -> int:
    """The caller's max_tokens, else the model's own maximum."""
    if job.input.HasField("max_tokens"):
        return job.input.max_tokens
    limit = job.model.limits.max_output_tokens or _DEFAULT_MAX_TOKENS
    return job.route.fit("max_tokens", limit) or limit


def _content(message: Message) -> str | list[dict[str, Any]]:
    """A message's content; empty if it has none that the vendor would accept."""
    text = only_text(message)
    if text is not None:
        return text if text.strip() else ""
    blocks: list[dict[str, Any]] = []
    for part in message.content:
        if part.HasField("image"):
            blocks.append({"type": "image", "source": _source(part.image.source)})
        elif part.text.strip():
            blocks.append({"type": "text", "text": part.text})
    return blocks


def _source(image: MediaSource) -> dict[str, str]:
    head, _, data = image.url.partition(",")
    if not head.startswith("data:"):
        return {"type": "url", "url": image.url}
    return {"type": "base64", "media_type": head[5:].partition(";")[0], "data": data}


def _parse_message(message: Any) -> Event:
    """The event of a whole response.

    Raises:
        UpstreamError: provider_failed if it can't be used; the mapped error of an `error` in it.
    """
    try:
        if message.get("error"):
            raise from_error_body(message, ERROR_MAPPING)
        texts = [block["text"] for block in message["content"] if block["type"] == "text"]
        finish = finish_reason(message["stop_reason"], _FINISHES)
        return completed_text(well_formed("".join(texts)), finish, _usage(message.get("usage")))
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


class _MessageStream(StreamState):
    """A stream of typed events. Thinking, pings and events of unknown types are skipped."""

    __slots__ = ("_counts",)

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self._counts: dict[str, Any] = {}

    def parse_event(self, data: bytes) -> str:
        if self.ended:
            return ""
        try:
            event = parse(data, surrogates=True)
            event_type = event.get("type")
            if event_type == "content_block_delta":
                delta = event["delta"]
                return _text(delta["text"]) if delta["type"] == "text_delta" else ""
            if event_type == "content_block_start":
                block = event["content_block"]
                return _text(block.get("text") or "") if block["type"] == "text" else ""
            if event_type == "message_start":
                usage = event["message"].get("usage")
                if isinstance(usage, dict):
                    # The first count of the output is meaningless; a later event has the real one.
                    self._counts = {n: count for n, count in usage.items() if not n.startswith("output_")}
                    self.report.usage = _usage(self._counts | {"output_tokens": 0})
            elif event_type == "message_delta":
                self._count(event.get("usage"))
                reason = event["delta"].get("stop_reason")
                if reason is not None:
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
            self._counts |= {name: count for name, count in usage.items() if count}
            self.usage = _usage(self._counts) or self.usage


def _text(text: Any) -> str:
    if type(text) is not str:
        raise TypeError
    return text
