"""Chat completions: OpenAI's API, which many hosts have with differences.

A `Profile` describes the differences of a host as data. A route may override `max_tokens_field`,
`seed_field`, `user_field` and `stream_usage`; it may also have `reasoning_effort` (sent unchanged) and
`extra` (a table of further fields to send). No field is sent unless the caller, the profile or the route sets
it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.catalog import Route
from pomelo.catalog.rows import Name
from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job, Options, Probe, one_event
from pomelo.providers.chat.errors import MEANINGS, read_error_body
from pomelo.providers.chat.responses import ChunkStream, parse_completion, reported_cost
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping
from pomelo.providers.http.vendor import Vendor
from pomelo.providers.text import stream_text

_ROLES = {Role.ROLE_SYSTEM: "system", Role.ROLE_USER: "user", Role.ROLE_ASSISTANT: "assistant"}

StreamUsage = Literal["option", "always", "none"]


def _required_field(name: str) -> str:
    if name == "none":
        raise ValueError("must be the host's name of max_tokens: without it nothing bounds what a task costs")
    return name


TokensField = Annotated[Name, AfterValidator(_required_field)]


class ChatOptions(Options):
    max_tokens_field: TokensField | None = None
    seed_field: Name | None = None
    user_field: Name | None = None
    stream_usage: StreamUsage | None = None
    reasoning_effort: Name | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """How a host differs from others; the defaults fit most hosts.

    * `…_field`: the host's name of a parameter, or "none".
    * `stream_usage`: how a stream gets its token count. "option" requests it with `stream_options`, "always"
      gets it without a request, "none" never does (Pomelo estimates it).
    * `user_most`: the longest id of an end user that is sent unchanged; a longer one is sent as a digest.
    * `drop`: parameters that no model of the host takes; `minimums`: the smallest values that it takes.
    * `extra`: fields of every request; `headers`: headers of every request.
    * `meanings`: the host's own error codes -> the codes of our table.
    * `patient`: a stream may be silent as long as a whole response, because the host loads its models.
    * `reports_cost`: the `usage` of a response has its `cost` in US dollars.
    * `system_first`: system messages are moved before the conversation, and empty messages of the assistant
      are left out.
    """

    vendor: str
    max_tokens_field: str = "max_tokens"
    seed_field: str = "seed"
    user_field: str = "user"
    user_most: int = 256
    stream_usage: str = "option"
    stream_options: Mapping[str, Any] = field(default_factory=lambda: {"include_usage": True})
    key_needed: bool = True
    drop: frozenset[str] = frozenset()
    minimums: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False
    reports_cost: bool = False
    system_first: bool = False


class Chat(Vendor):
    """A host of chat completions as a provider of text: the endpoint is at `path` below its base URL."""

    options = ChatOptions
    probe = Probe("/models")
    path = "/chat/completions"
    profile: Profile

    def __init__(self, credentials: Credentials, http: Http) -> None:
        super().__init__(credentials, http)
        profile = self.profile
        self.configured = bool(self._base) and (self.configured or not profile.key_needed)
        self._url = URL(self._base + self.path)
        self._json_headers = {**profile.headers, **self._json_headers}
        self._error_mapping = ErrorMapping(profile.vendor, read_error_body, {**MEANINGS, **profile.meanings})

    def fit_text(self, fitting: Fitting) -> None:
        """Adjust an input to what a host accepts for every model, and to the fields that the operator has
        fixed."""
        if not fitting.present:
            return
        names = _names(fitting.route, self.profile)
        for name, host_name in names.items():
            if host_name == "none" or name in self.profile.drop:
                fitting.drop(name)
        for name, minimum in self.profile.minimums.items():
            value = fitting.get(name)
            if value is not None and value < minimum:
                fitting.replace(name, minimum, f"at least {minimum:g}")
        fitting.override(names, {**self.profile.extra, **fitting.route.options.get("extra", {})})

    def text(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        """Answer a conversation. A complete response without a credible count of tokens has no usage.

        Raises:
            UpstreamError: by the error map.
        """
        if not job.stream:
            return one_event(self.complete_text, job)
        return stream_text(
            lambda: self._http.stream_events(
                self._url,
                self._json_headers,
                self._body(job),
                self._error_mapping,
                patient=self.profile.patient,
            ),
            ChunkStream(self._error_mapping, job.report, reports_cost=self.profile.reports_cost),
        )

    async def complete_text(self, job: Job[TextInput]) -> Event:
        """As `text`, without a stream."""
        completion = await self._http.request_json(
            self._url, self._json_headers, self._body(job), self._error_mapping, surrogates=True
        )
        event = parse_completion(completion, self._error_mapping)
        if self.profile.reports_cost:
            job.report.cost = reported_cost(completion.get("usage"))
        return event

    def _body(self, job: Job[TextInput]) -> bytes:
        return to_json(request(job, self.profile))


def request(job: Job[TextInput], profile: Profile) -> dict[str, Any]:
    """Return the request body for a text job on a host."""
    text, options = job.input, job.route.options
    body: dict[str, Any] = {"model": job.route.model, "messages": _messages(text, profile)}
    names = _names(job.route, profile)
    for name in ("max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"):
        if text.HasField(name):
            body[names[name]] = getattr(text, name)
    if text.stop:
        body["stop"] = list(text.stop)
    if job.user:
        body[names["user"]] = _user(job.user, profile.user_most)
    effort = options.get("reasoning_effort")
    if effort is not None:
        body["reasoning_effort"] = effort
    if job.stream:
        body["stream"] = True
        if options.get("stream_usage", profile.stream_usage) == "option":
            body["stream_options"] = profile.stream_options
    if profile.extra:
        body.update(profile.extra)
    if "extra" in options:
        body.update(options["extra"])
    return body


def _names(route: Route, profile: Profile) -> dict[str, str]:
    """The contract's name of each parameter -> the host's, or "none"."""
    options = route.options
    return {
        "max_tokens": options.get("max_tokens_field", profile.max_tokens_field),
        "temperature": "temperature",
        "top_p": "top_p",
        "stop": "stop",
        "seed": options.get("seed_field", profile.seed_field),
        "presence_penalty": "presence_penalty",
        "frequency_penalty": "frequency_penalty",
        "user": options.get("user_field", profile.user_field),
    }


def _user(user: str, max_length: int) -> str:
    """The caller's id of the end user, or a digest of it if it is too long for the host."""
    return user if len(user) <= max_length else sha256(user.encode()).hexdigest()


def _messages(text: TextInput, profile: Profile) -> list[dict[str, Any]]:
    messages = list(map(_message, text.messages))
    if not profile.system_first:
        return messages
    messages = [message for message in messages if message["role"] != "assistant" or message["content"]]
    return sorted(messages, key=lambda message: message["role"] != "system")  # a stable sort


def _message(message: Message) -> dict[str, Any]:
    role, content = _ROLES[message.role], message.content
    if len(content) == 1 and content[0].HasField("text"):
        return {"role": role, "content": content[0].text}
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.HasField("text"):
            parts.append({"type": "text", "text": part.text})
        else:
            parts.append({"type": "image_url", "image_url": {"url": part.image.source.url}})
    return {"role": role, "content": parts}
