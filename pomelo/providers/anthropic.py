"""Anthropic: the Messages API, in the version that still takes sampling parameters.

`open_providers` makes it, with a base URL without /v1; the engine calls `text`. It reads these keys of a
route beside the common ones: `sampling` ("both": the model takes temperature and top_p together; by default
it takes one of them, and the temperature wins) and `extra` (a table of further fields to send). A seed and
penalties have no place on this wire and are never sent. It knows no key of a caller, no limit and no price.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from hashlib import sha256
from re import compile as pattern
from typing import Any, Literal

from pydantic_core import to_json
from yarl import URL

from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import FinishReason, ImageUrl, Message, Role, TextDelta, TextInput, TokenUsage
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorBody, ErrorMapping, from_error_body, malformed_response
from pomelo.providers.http.parsing import parse, well_formed
from pomelo.providers.text import Answer, counted, credible, streamed

_VERSION = "2023-06-01"
"""The later one refuses temperature and top_p for every model."""

_WHOLE_MOST = 21_000
"""Tokens of output above which the vendor wants to be asked for a stream: a whole answer could take more
than ten minutes."""

_OUTPUT_MOST = 4096
"""max_tokens, which the wire must have, where neither the caller nor the catalogue names any."""

_FINISHES = {
    "end_turn": FinishReason.FINISH_REASON_STOP,
    "stop_sequence": FinishReason.FINISH_REASON_STOP,
    "max_tokens": FinishReason.FINISH_REASON_LENGTH,
    "model_context_window_exceeded": FinishReason.FINISH_REASON_LENGTH,
    "compaction": FinishReason.FINISH_REASON_LENGTH,
    "refusal": FinishReason.FINISH_REASON_CONTENT_FILTER,
}
"""Any other reason is a stop: no tool was offered, and a reason that is new is no failure."""

_MEANINGS = {
    "prompt_too_long": "context_length_exceeded",
    "output_blocked": "content_policy_violation",
    "begun_answer": "invalid_parameter",
    "request_too_large": "payload_too_large",
    # Our own money, key or rights; the first comes with a 429, where a retry would be pointless.
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
"""The vendor's code, or our name for what its message begins with -> the code of our table."""

_TEXTS = (
    (pattern(r"prompt is too long|input length and .max_tokens. exceed"), "prompt_too_long"),
    (pattern(r"Output blocked by content filtering"), "output_blocked"),
    (pattern(r"This model does not support assistant message prefill"), "begun_answer"),
)
"""The vendor has one code for all that is wrong with a request; only the beginning of its message differs."""

_FIELDS = {
    "messages": "messages",
    "system": "messages",
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop_sequences": "stop",
    "metadata": "user",
}
"""The vendor's name of a parameter -> the contract's."""

_NAMES = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop_sequences",
    "user": "metadata",
}
"""The contract's name of a parameter -> the vendor's."""

_BLAMED = pattern(r"([a-z_]+)[.\w]*: ")


def _read_complaint(body: Any) -> ErrorBody:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ErrorBody()
    details = error.get("details")
    codes = [details.get("error_code") if isinstance(details, dict) else None]
    name = None
    message = error.get("message")
    if isinstance(message, str):
        codes += [code for text, code in _TEXTS if text.match(message)]
        name = _BLAMED.match(message)
    codes.append(error.get("type"))
    said = tuple(code for code in codes if isinstance(code, str))
    return ErrorBody(said, _FIELDS.get(name[1]) if name else None)


DIALECT = ErrorMapping("anthropic", _read_complaint, _MEANINGS)


class AnthropicOptions(Options):
    """What a route may say."""

    sampling: Literal["both"] | None = None
    extra: dict[str, Any] | None = None


class Anthropic:
    """Anthropic as a provider of text."""

    base_url = "https://api.anthropic.com"
    options = AnthropicOptions
    probe = Probe("/v1/models", "x-api-key", "", {"anthropic-version": _VERSION})

    def __init__(self, credentials: Credentials, http: Http) -> None:
        key = (credentials.api_key or "").strip()
        self.configured = bool(key)
        self._http = http
        self._url = URL(credentials.base_url.rstrip("/") + "/v1/messages")
        self._headers = {
            "x-api-key": key,
            "anthropic-version": _VERSION,
            "Content-Type": "application/json",
        }

    async def aclose(self) -> None:
        """Nothing to free: the session is shared."""

    def fit_text(self, fitting: Fitting) -> None:
        """Adjusts an input to what the API takes, whatever the model."""
        fit(fitting)

    def text(self, job: Job) -> AsyncGenerator[Event, None]:
        """Answers a conversation; see JobMethod.

        A whole answer that may become very long is asked for as a stream and put together here. An answer
        that is complete but lacks a credible count of tokens has none.

        Raises:
            PomeloError: by the map in `failures`; invalid_parameter where nothing is said but by the system.
        """
        if job.stream:
            return self._streamed(job, _Answer())
        return self._folded(job) if _most(job) > _WHOLE_MOST else self._whole(job)

    async def _whole(self, job: Job) -> AsyncGenerator[Event, None]:
        body = to_json(request(job, stream=False))
        answer = await self._http.whole(self._url, self._headers, body, DIALECT, surrogates=True)
        yield Event(text_delta=_whole(answer))

    def _streamed(self, job: Job, answer: _Answer) -> AsyncGenerator[Event, None]:
        return streamed(
            lambda: self._http.events(self._url, self._headers, to_json(request(job, stream=True)), DIALECT),
            answer,
        )

    async def _folded(self, job: Job) -> AsyncGenerator[Event, None]:
        answer = _Answer()
        text = bytearray()  # in a list each piece would take sixty bytes more
        turn = self._http.turns.stream()
        usage = None
        async with aclosing(self._streamed(job, answer)) as events:
            async for event in events:
                if turn.over():
                    await turn.next()
                text += event.text_delta.content.encode()
                if event.text_delta.HasField("usage"):
                    usage = event.text_delta.usage
                last = event
        last.text_delta.content = text.decode()
        if usage is not None:
            last.text_delta.usage.CopyFrom(usage)
        yield last


def fit(fitting: Fitting) -> None:
    """Adjusts an input to what the API takes, and to the fields that the operator has fixed."""
    for name in ("seed", "presence_penalty", "frequency_penalty"):
        fitting.drop(name)
    options = fitting.route.options
    if fitting.get("temperature") is not None and options.get("sampling") != "both":
        fitting.drop("top_p", "left out beside temperature: the model takes one of the two")
    fitting.drop_items("stop", lambda text: not text.strip(), "strings that are not blank")
    fitting.override(_NAMES, options.get("extra"))


def request(job: Job, *, stream: bool) -> dict[str, Any]:
    """The request body for a text job.

    What the system says goes ahead of the conversation, wherever it stood. Texts of blanks alone, which the
    vendor refuses, are left out.

    Raises:
        PomeloError: invalid_parameter; nothing is left of the messages.
    """
    given: TextInput = job.input
    route = job.route
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in given.messages:
        if message.role == Role.ROLE_SYSTEM:
            system += _texts(message)
        elif content := _content(message):
            turns.append(
                {"role": "user" if message.role == Role.ROLE_USER else "assistant", "content": content}
            )
    if not turns:
        raise PomeloError(
            "invalid_parameter",
            "Invalid messages: this model needs a message of the user's that is not blank",
            field="messages",
        )
    body: dict[str, Any] = {"model": route.model, "max_tokens": _most(job), "messages": turns}
    if system:
        body["system"] = "\n\n".join(system)
    for name in ("temperature", "top_p"):
        if given.HasField(name):
            body[name] = getattr(given, name)
    if given.stop:
        body["stop_sequences"] = list(given.stop)
    if given.user:
        # The vendor wants an opaque id, and refuses what looks like an address or a number.
        body["metadata"] = {"user_id": sha256(given.user.encode()).hexdigest()}
    if stream:
        body["stream"] = True
    if "extra" in route.options:
        body.update(route.options["extra"])
    return body


def _most(job: Job) -> int:
    """The most tokens to ask for: the caller's number, else the model's own maximum."""
    given: TextInput = job.input
    if given.HasField("max_tokens"):
        return given.max_tokens
    limit = job.model.limits.max_output_tokens or _OUTPUT_MOST
    return job.route.fit("max_tokens", limit) or limit


def _texts(message: Message) -> list[str]:
    if message.HasField("content"):
        return [message.content] if message.content.strip() else []
    return [part.text for part in message.parts.parts if part.text.strip()]


def _content(message: Message) -> str | list[dict[str, Any]]:
    """A message's content; empty where it has none that the vendor would take."""
    if message.HasField("content"):
        return message.content if message.content.strip() else ""
    blocks: list[dict[str, Any]] = []
    for part in message.parts.parts:
        if part.HasField("image_url"):
            blocks.append({"type": "image", "source": _source(part.image_url)})
        elif part.text.strip():
            blocks.append({"type": "text", "text": part.text})
    return blocks


def _source(image: ImageUrl) -> dict[str, str]:
    head, _, data = image.url.partition(",")
    if not head.startswith("data:"):
        return {"type": "url", "url": image.url}
    return {"type": "base64", "media_type": head[5:].partition(";")[0], "data": data}


def _whole(answer: Any) -> TextDelta:
    """The one delta of a whole answer.

    Raises:
        PomeloError: provider_failed where it is unusable; what an `error` in it means.
    """
    try:
        if answer.get("error"):
            raise from_error_body(answer, DIALECT)
        texts = [block["text"] for block in answer["content"] if block["type"] == "text"]
        content = well_formed("".join(texts))
        finish = _finish(answer["stop_reason"])
        return TextDelta(content=content, finish_reason=finish, usage=_usage(answer.get("usage")))
    except (AttributeError, KeyError, TypeError):
        pass
    raise malformed_response("an answer of another shape")


def _finish(reason: Any) -> FinishReason.ValueType:
    if not isinstance(reason, str):
        raise malformed_response("a stop_reason that is none")
    return _FINISHES.get(reason, FinishReason.FINISH_REASON_STOP)


def _usage(usage: Any) -> TokenUsage | None:
    """The vendor's count. What was read from its cache and written to it is beside its `input_tokens`."""
    if not isinstance(usage, dict):
        return None
    prompt = credible(usage.get("input_tokens"))
    cached = credible(usage.get("cache_read_input_tokens") or 0)
    written = credible(usage.get("cache_creation_input_tokens") or 0)
    parts = usage.get("cache_creation")
    if not isinstance(parts, dict):
        parts = {}
    written_5m = credible(parts.get("ephemeral_5m_input_tokens") or 0)
    written_1h = credible(parts.get("ephemeral_1h_input_tokens") or 0)
    counts = (prompt, cached, written, written_5m, written_1h)
    if None in counts:
        return counted(None, usage.get("output_tokens"))
    written = max(written, written_5m + written_1h)  # the parts may come without their sum
    return counted(
        prompt + cached + written,
        usage.get("output_tokens"),
        cached=cached,
        written=written,
        written_1h=written_1h,
    )


class _Answer(Answer):
    """A stream of named events. What the model thinks, pings and events of unknown types are passed over."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, Any] = {}

    def take(self, data: bytes) -> str:
        """The text that an event adds.

        Raises:
            PomeloError: provider_failed; what an event of an error means.
        """
        if self.ended:
            return ""
        try:
            event = parse(data, surrogates=True)
            kind = event.get("type")
            if kind == "content_block_delta":
                delta = event["delta"]
                return _text(delta["text"]) if delta["type"] == "text_delta" else ""
            if kind == "content_block_start":
                block = event["content_block"]
                return _text(block.get("text") or "") if block["type"] == "text" else ""
            if kind == "message_start":
                usage = event["message"].get("usage")
                if isinstance(usage, dict):
                    # The count of the output is worth nothing until it is told again.
                    self._counts = {name: count for name, count in usage.items() if name != "output_tokens"}
                    self.prompt = _usage(self._counts | {"output_tokens": 0})
            elif kind == "message_delta":
                self._count(event.get("usage"))
                reason = event["delta"].get("stop_reason")
                if reason is not None:
                    self.finish = _finish(reason)
            elif kind == "message_stop":
                self.ended = True
            elif event.get("error"):
                raise from_error_body(event, DIALECT)
            return ""
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise malformed_response("an event that can't be read")

    def _count(self, usage: Any) -> None:
        """Counts grow as the answer does: later ones replace earlier ones, each for itself. Null and 0 do
        not."""
        if isinstance(usage, dict):
            self._counts |= {name: count for name, count in usage.items() if count}
            self.usage = _usage(self._counts) or self.usage


def _text(text: Any) -> str:
    if type(text) is not str:
        raise TypeError
    return text
