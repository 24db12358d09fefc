"""The wire of OpenAI's chat completions, and of hosts that speak it.

`open_providers` makes it; the engine calls `text`. It reads these keys of a route beside the common ones:
`max_tokens_field` (the vendor's name of max_tokens; default "max_tokens") and `reasoning_effort` (sent as it
is). It knows no key of a caller, no limit and no price.
"""

from collections.abc import AsyncGenerator
from hashlib import sha256
from re import compile as pattern
from typing import Any

from pydantic_core import from_json, to_json
from yarl import URL

from pomelo.gen.v1.text_pb2 import FinishReason, Message, Role, TextDelta, TextInput, TokenUsage
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job
from pomelo.providers.failures import Complaint, Dialect, complained, nonsense
from pomelo.providers.fit import fitted
from pomelo.providers.http import Http

_ROLES = {Role.ROLE_SYSTEM: "system", Role.ROLE_USER: "user", Role.ROLE_ASSISTANT: "assistant"}

_FINISHES = {
    "stop": FinishReason.FINISH_REASON_STOP,
    "length": FinishReason.FINISH_REASON_LENGTH,
    "content_filter": FinishReason.FINISH_REASON_CONTENT_FILTER,
}
"""Any other reason is a stop: no tool was offered, and a reason that is new is no failure."""

_TOKENS_MOST = 10**9
"""More tokens than any model takes: a count above it is a fault."""

_SAFETY_IDENTIFIER_MOST = 64

_END = b"[DONE]"

_MEANINGS = {
    "context_length_exceeded": "context_length_exceeded",
    "content_policy_violation": "content_policy_violation",
    "image_content_policy_violation": "content_policy_violation",
    "content_filter": "content_policy_violation",
    "invalid_prompt": "content_policy_violation",
    "invalid_image": "invalid_parameter",
    "invalid_image_format": "invalid_parameter",
    "invalid_base64_image": "invalid_parameter",
    "unsupported_image_media_type": "invalid_parameter",
    "image_parse_error": "invalid_parameter",
    "image_too_large": "invalid_parameter",
    "image_too_small": "invalid_parameter",
    "image_file_too_large": "invalid_parameter",
    "empty_image_file": "invalid_parameter",
    "rate_limit_exceeded": "provider_unavailable",
    "slow_down": "provider_unavailable",
    "server_is_overloaded": "provider_unavailable",
    # Our own money, key or rights. Some come with a 429, where a retry would be pointless.
    "credit_balance_exhausted": "provider_failed",
    "organization_spend_limit_exceeded": "provider_failed",
    "project_spend_limit_exceeded": "provider_failed",
    "organization_usage_limit_exceeded": "provider_failed",
    "insufficient_quota": "provider_failed",
    "billing_hard_limit_reached": "provider_failed",
    "billing_not_active": "provider_failed",
    "invalid_api_key": "provider_failed",
    "model_not_found": "provider_failed",
    # Types; they count only where the code says nothing.
    "server_error": "provider_unavailable",
    "service_unavailable_error": "provider_unavailable",
    "rate_limit_error": "provider_unavailable",
    "requests": "provider_unavailable",
    "tokens": "provider_unavailable",
}

_FIELDS = {
    "messages": "messages",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "stop": "stop",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "safety_identifier": "user",
}
"""The vendor's name of a parameter -> the contract's."""

_PARAM = pattern(r"[a-z_]+")


def _read_complaint(body: Any) -> Complaint:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return Complaint()
    codes = tuple(word for key in ("code", "type") if isinstance(word := error.get(key), str))
    param = error.get("param")
    name = _PARAM.match(param) if isinstance(param, str) else None
    return Complaint(codes, _FIELDS.get(name[0]) if name else None)


DIALECT = Dialect("openai", _read_complaint, _MEANINGS)


class OpenAI:
    """OpenAI as a provider of text."""

    def __init__(self, credentials: Credentials, http: Http) -> None:
        key = (credentials.api_key or "").strip()
        self.configured = bool(key)
        self._http = http
        self._url = URL(credentials.base_url.rstrip("/") + "/chat/completions")
        self._headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}

    async def aclose(self) -> None:
        """Nothing to free: the session is shared."""

    async def text(self, job: Job) -> AsyncGenerator[Event, None]:
        """Answers a conversation; see JobMethod.

        A stream that is complete but lacks a credible count of tokens is counted here, by words; a whole
        answer that lacks it has failed.

        Raises:
            PomeloError: by the map in `failures`.
        """
        body = to_json(request(job))
        if not job.stream:
            whole = await self._http.whole(self._url, self._headers, body, DIALECT)
            yield Event(text_delta=_whole(whole))
            return
        async with self._http.events(self._url, self._headers, body, DIALECT) as stream:
            answer = _Answer()
            while not answer.ended:
                events = await stream.read()
                if not events:
                    raise nonsense("a stream without its end marker")
                for _, data in events:
                    content = answer.take(data)
                    if content:
                        event = Event()
                        event.text_delta.content = content  # a sixth of the cost of the constructors
                        yield event
            await stream.goodbye()
        yield Event(text_delta=answer.last(job.input))


def request(job: Job) -> dict[str, Any]:
    """The request body for a text job."""
    given: TextInput = job.input
    route = job.route
    body: dict[str, Any] = {
        "model": route.model,
        "messages": [_message(message) for message in given.messages],
    }
    if given.HasField("max_tokens"):
        most = fitted(route, "max_tokens", given.max_tokens)
        if most is not None:
            limit = job.model.limits.max_output_tokens
            field = route.options.get("max_tokens_field", "max_tokens")
            body[field] = min(most, limit) if limit else most
    for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"):
        if given.HasField(name):
            value = fitted(route, name, getattr(given, name))
            if value is not None:
                body[name] = value
    if given.stop and "stop" not in route.drop:
        body["stop"] = list(given.stop)
    if given.user and "user" not in route.drop:
        body["safety_identifier"] = _safety_identifier(given.user)
    effort = route.options.get("reasoning_effort")
    if effort is not None:
        body["reasoning_effort"] = effort
    if job.stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True, "include_obfuscation": False}
    return body


def _safety_identifier(user: str) -> str:
    """The caller's name of the end user, or a digest of it where it is too long for the wire."""
    return user if len(user) <= _SAFETY_IDENTIFIER_MOST else sha256(user.encode()).hexdigest()


def _message(message: Message) -> dict[str, Any]:
    role = _ROLES[message.role]
    if message.HasField("content"):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.parts.parts:
        if part.HasField("text"):
            parts.append({"type": "text", "text": part.text})
        else:
            parts.append({"type": "image_url", "image_url": {"url": part.image_url.url}})
    return {"role": role, "content": parts}


def _whole(answer: Any) -> TextDelta:
    """The one delta of a whole answer.

    Raises:
        PomeloError: provider_failed where it is unusable; what an `error` in it means.
    """
    try:
        if "choices" not in answer and answer.get("error"):
            raise complained(answer, DIALECT)
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content")
        if content is None:
            content = message.get("refusal") or ""
        finish = choice["finish_reason"]
        usage = _usage(answer.get("usage"))
        if usage is not None:
            return TextDelta(content=content, finish_reason=_finish(finish), usage=usage)
    except (AttributeError, IndexError, KeyError, TypeError):
        pass
    raise nonsense("an answer of another shape")


def _finish(reason: Any) -> "FinishReason.ValueType":
    if reason == "error" or not isinstance(reason, str):
        raise nonsense("a finish_reason that is none")
    return _FINISHES.get(reason, FinishReason.FINISH_REASON_STOP)


def _usage(usage: Any) -> TokenUsage | None:
    """The vendor's count, or None where it is absent or can't be true."""
    if not isinstance(usage, dict):
        return None
    prompt = usage.get("prompt_tokens")
    completion = usage.get("completion_tokens")
    # type() and not isinstance: true and false are ints, too.
    if type(prompt) is not int or type(completion) is not int:
        return None
    if not (0 <= prompt <= _TOKENS_MOST and 0 <= completion <= _TOKENS_MOST):
        return None
    return TokenUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class _Answer:
    """A stream's state: what has come of an answer so far."""

    __slots__ = ("_finish", "_pieces", "_usage", "ended")

    def __init__(self) -> None:
        self.ended = False
        """Whether the end marker has come."""
        self._finish: FinishReason.ValueType | None = None
        self._usage: TokenUsage | None = None
        self._pieces: list[str] = []

    def take(self, data: bytes) -> str:
        """The text that an event adds; often empty at the beginning and the end.

        Raises:
            PomeloError: provider_failed; what an `error` in place of a chunk means.
        """
        if self.ended:
            return ""
        if data == _END:
            self.ended = True
            return ""
        try:
            chunk = from_json(data)
            if chunk.get("error"):
                raise complained(chunk, DIALECT)
            usage = chunk.get("usage")
            if usage is not None:
                self._usage = _usage(usage)
            choices = chunk.get("choices")
            if not choices:
                return ""
            choice = choices[0]
            finish = choice.get("finish_reason")
            if finish is not None:
                self._finish = _finish(finish)
            delta = choice.get("delta")
            if not delta:
                return ""
            content = delta.get("content") or delta.get("refusal")
            if not content:
                return ""
            if type(content) is str:
                self._pieces.append(content)
                return content
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            pass
        raise nonsense("a chunk that can't be read")

    def last(self, given: TextInput) -> TextDelta:
        """The delta that ends the answer to `given`.

        Raises:
            PomeloError: provider_failed; no finish_reason came.
        """
        if self._finish is None:
            raise nonsense("a stream without finish_reason")
        return TextDelta(finish_reason=self._finish, usage=self._usage or self._estimate(given))

    def _estimate(self, given: TextInput) -> TokenUsage:
        """A count of our own, by words: less than any tokenizer's, so nobody pays too much for it."""
        prompt = 0
        for message in given.messages:
            prompt += len(message.content.split())
            prompt += sum(len(part.text.split()) for part in message.parts.parts)
        completion = len("".join(self._pieces).split())
        return TokenUsage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )
