"""The wire of chat completions, as OpenAI made it and many hosts speak it, each with its own habits.

`openai`, `mistral` and `compatible` give it a `Profile`, which says in data how a host differs. A route may
overrule it with options of the same names: `max_tokens_field`, `seed_field`, `user_field`, `stream_usage`;
and it may have `reasoning_effort` (sent as it is) and `extra` (a table of further fields to send). Nothing
else is read, and no field is sent that neither the caller gave nor the profile or the route asks for.
It knows no key of a caller, no limit and no price.
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
from pomelo.providers.base import Event, Job, Options
from pomelo.providers.chat.answers import ChatAnswer, reported_cost, whole
from pomelo.providers.chat.errors import MEANINGS, read_complaint
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping
from pomelo.providers.text import streamed

_ROLES = {Role.ROLE_SYSTEM: "system", Role.ROLE_USER: "user", Role.ROLE_ASSISTANT: "assistant"}

StreamUsage = Literal["option", "always", "none"]


def _some_field(name: str) -> str:
    if name == "none":
        raise ValueError("must be the host's name of max_tokens: without it nothing bounds what a task costs")
    return name


TokensField = Annotated[Name, AfterValidator(_some_field)]


class ChatOptions(Options):
    """What a route may say to a host of chat completions."""

    max_tokens_field: TokensField | None = None
    seed_field: Name | None = None
    user_field: Name | None = None
    stream_usage: StreamUsage | None = None
    reasoning_effort: Name | None = None
    extra: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Profile:
    """How a host differs from the others; the defaults are what most of them take.

    The `…_field` knobs give the host's name of a parameter, "none" where it has none. `stream_usage` tells
    how a stream comes to have its count of tokens: "option" asks for it by `stream_options`; "always" and
    "none" ask for nothing, as it comes by itself or never does (then the words are counted). `user_most` is
    the longest name of an end user that is sent as it is; a longer one is sent as a digest. `drop` names
    parameters of the contract that no model of the host takes; `least` gives what is sent of one in place of
    anything less, where no model takes that. `extra` are fields of every request, `headers` of every call.
    `meanings` are codes of the host's own: its code -> that of our table. With `patient` a stream may be
    silent for as long as a whole answer: the host may have to load the model. With `reports_cost` the
    `usage` of an answer has its `cost` in US dollars. With `system_first` what the system says goes ahead of
    the conversation, wherever it stood, and answers without a word are left out.
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
    least: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    meanings: Mapping[str, str] = field(default_factory=dict)
    patient: bool = False
    reports_cost: bool = False
    system_first: bool = False


class Chat:
    """A host of chat completions as a provider of text."""

    options = ChatOptions

    def __init__(self, key: str | None, url: str, profile: Profile, http: Http) -> None:
        """`url` is where requests go, whole; empty where the host isn't known."""
        key = (key or "").strip()
        self.configured = bool(url) and (bool(key) or not profile.key_needed)
        self._http = http
        self._url = URL(url)
        self._profile = profile
        self._dialect = ErrorMapping(profile.vendor, read_complaint, {**MEANINGS, **profile.meanings})
        self._headers = {**profile.headers, "Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    async def aclose(self) -> None:
        """Nothing to free: the session is shared."""

    def fit_text(self, fitting: Fitting) -> None:
        """Adjusts an input to what the host takes, whatever the model."""
        fit(fitting, self._profile)

    def text(self, job: Job) -> AsyncGenerator[Event, None]:
        """Answers a conversation; see JobMethod.

        An answer that is complete but lacks a credible count of tokens has none.

        Raises:
            PomeloError: by the map in `failures`.
        """
        if not job.stream:
            return self._whole(job)
        return streamed(
            lambda: self._http.events(
                self._url, self._headers, self._body(job), self._dialect, patient=self._profile.patient
            ),
            ChatAnswer(self._dialect, job.report if self._profile.reports_cost else None),
        )

    async def _whole(self, job: Job) -> AsyncGenerator[Event, None]:
        answer = await self._http.whole(
            self._url, self._headers, self._body(job), self._dialect, surrogates=True
        )
        delta = whole(answer, self._dialect)
        if self._profile.reports_cost:
            job.report.cost = reported_cost(answer.get("usage"))
        yield Event(text_delta=delta)

    def _body(self, job: Job) -> bytes:
        return to_json(request(job, self._profile))


def fit(fitting: Fitting, profile: Profile) -> None:
    """Adjusts an input to what no model of a host takes, and to the fields that the operator has fixed."""
    names = _names(fitting.route, profile)
    for name, theirs in names.items():
        if theirs == "none" or name in profile.drop:
            fitting.drop(name)
    for name, least in profile.least.items():
        given = fitting.get(name)
        if given is not None and given < least:
            fitting.replace(name, least, f"at least {least:g}")
    fitting.override(names, {**profile.extra, **fitting.route.options.get("extra", {})})


def request(job: Job, profile: Profile) -> dict[str, Any]:
    """The request body for a text job on a host."""
    given: TextInput = job.input
    options = job.route.options
    body: dict[str, Any] = {
        "model": job.route.model,
        "messages": _messages(given, profile),
    }
    names = _names(job.route, profile)
    for name in ("max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"):
        if given.HasField(name):
            body[names[name]] = getattr(given, name)
    if given.stop:
        body["stop"] = list(given.stop)
    if given.user:
        body[names["user"]] = _user(given.user, profile.user_most)
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
    """The contract's name of each parameter -> the host's, "none" where it has none."""
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


def _user(user: str, most: int) -> str:
    """The caller's name of the end user, or a digest of it where it is too long for the wire."""
    return user if len(user) <= most else sha256(user.encode()).hexdigest()


def _messages(given: TextInput, profile: Profile) -> list[dict[str, Any]]:
    messages = [_message(message) for message in given.messages]
    if not profile.system_first:
        return messages
    said = [message for message in messages if message["role"] != "assistant" or message["content"]]
    return sorted(said, key=lambda message: message["role"] != "system")  # it keeps the order of equals


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
