"""Chat completions: OpenAI's API, which many hosts have with differences.

A `Profile` describes the differences of a host as data. A route may override `max_tokens_field`,
`seed_field`, `user_field` and `stream_usage`; it may also have `reasoning_effort` (if the caller sets none),
`reasoning_excludes` (parameters that the model takes only without reasoning), `context_tokens` (the context
of the host's model, if it differs from `max_input_tokens`) and `extra` (a table of further fields to send).
No field but the limit of output is sent unless the caller, the profile or the route sets it.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import to_json
from yarl import URL

from pomelo.catalog.catalog import Route
from pomelo.catalog.check import parameters
from pomelo.catalog.rows import Limit, Name
from pomelo.gen.v1.text_pb2 import ReasoningEffort, TextInput
from pomelo.protobuf.enums import enum_names
from pomelo.providers.base import Event, Extra, Job, Options, Probe, one_event
from pomelo.providers.chat.errors import MEANINGS, read_error_body
from pomelo.providers.chat.messages import convert_messages
from pomelo.providers.chat.responses import ChunkStream, parse_completion, reported_cost
from pomelo.providers.chat.thoughts import MISSING_SIGNATURE, MISSING_TEXT, add_placeholders
from pomelo.providers.chat.tools import response_format_json, tool_choice, tools_json
from pomelo.providers.credentials import Credentials
from pomelo.providers.errors import UpstreamError
from pomelo.providers.fitting import Fitting
from pomelo.providers.http.client import Http
from pomelo.providers.http.errors import ErrorMapping
from pomelo.providers.http.responses import SseStream
from pomelo.providers.http.vendor import Vendor
from pomelo.providers.text import stream_text
from pomelo.providers.text.input_texts import LONG_INPUT_BYTES, likely_tokens
from pomelo.providers.text.raw_json import with_member

_EFFORTS = enum_names(ReasoningEffort.DESCRIPTOR)

_SAME_NAMES = {name: name for name in parameters("text") if name != "messages"}

PARAMETERS = frozenset(_SAME_NAMES)
"""The parameters of a text task."""

StreamUsage = Literal["option", "always", "none"]

_MIN_SHARE = 32
"""Part of a host's context that is left to the output, however long the prompt seems to be."""


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
    context_tokens: Limit | None = None
    reasoning_effort: Name | None = None
    reasoning_excludes: list[Literal["temperature", "tools", "top_p"]] | None = None
    extra: Extra | None = None


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
    * `patient`: before its first text, a stream may be silent as long as a whole response, because the host
      loads its models.
    * `reports_cost`: the `usage` of a response has its `cost` in US dollars.
    * `hidden_thinking`: if a response counts more tokens in total than in its prompt and its output, the rest
      is the model's thinking, as at Gemini.
    * `strict_order`: it takes system messages only before the conversation, no empty message of the
      assistant, and no message of the user's right after the result of a tool.
    * `message_names`: messages may have the name of their author.
    * `text_lists`: a message without an image may be a list of texts. DeepSeek refuses all such messages,
      Groq those of the system and the assistant.
    * `call_ids`: the ids of tool calls that it takes; others are sent as a digest.
    * `no_parameters`: the schema of a tool without parameters, or "" if it needs none.
    * `sends_maximum`: without max_tokens it gets the model's maximum. Otherwise only its context would end an
      answer, which may be longer than what was reserved, and whose count would be ignored as impossible. A
      host refuses a request whose prompt and max_tokens exceed its context together.
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
    hidden_thinking: bool = True
    strict_order: bool = False
    message_names: bool = True
    text_lists: bool = False
    call_ids: re.Pattern[str] = re.compile(r"[!-~]{1,40}")
    no_parameters: str = '{"type":"object","properties":{}}'
    sends_maximum: bool = True


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
        self._missing: dict[tuple[str, Any], str] = {}
        """What stands for the thoughts behind tool calls, by model and effort, where a model has refused a
        request without them and accepted it so. A refusal may just repeat a caller's words."""
        self._json_headers = {**profile.headers, **self._json_headers}
        own_names = {
            profile.max_tokens_field: "max_tokens",
            profile.seed_field: "seed",
            profile.user_field: "user",
        }
        own_names.pop("none", None)
        self._error_mapping = ErrorMapping(
            profile.vendor,
            partial(read_error_body, own_names=own_names),
            {**MEANINGS, **profile.meanings},
        )

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
        fitting.override(names, _extra(fitting.route, self.profile))
        if "reasoning_excludes" in fitting.route.options:
            _fit_reasoning(fitting)

    def text(self, job: Job[TextInput]) -> AsyncGenerator[Event, None]:
        """Answer a conversation. A complete response without a credible count of tokens has no usage.

        Raises:
            UpstreamError: by the error map.
        """
        if not job.stream:
            return one_event(self.complete_text, job)
        profile = self.profile
        return stream_text(
            partial(self._open, job),
            ChunkStream(
                self._error_mapping,
                job.report,
                hidden_thinking=profile.hidden_thinking,
                reports_cost=profile.reports_cost,
            ),
        )

    @asynccontextmanager
    async def _open(self, job: Job[TextInput]) -> AsyncGenerator[SseStream, None]:
        """Open the stream of an answer."""
        job.report.thinks = thinks = _effort(job.input, job.route) not in (None, "none")
        # A model sends nothing while it reads and reasons.
        patient = self.profile.patient or thinks or job.input.ByteSize() > LONG_INPUT_BYTES
        opened = partial(
            self._http.stream_events,
            self._url,
            self._json_headers,
            error_mapping=self._error_mapping,
            patient=patient,
        )
        async with AsyncExitStack() as stack:
            try:
                stream = await stack.enter_async_context(opened(self._body(job)))
            except UpstreamError as error:
                if not (missing := self._missing_thoughts(job, error)):
                    raise
                stream = await stack.enter_async_context(opened(self._body(job, missing)))
                self._missing[_thinking_mode(job)] = missing
            yield stream

    async def complete_text(self, job: Job[TextInput]) -> Event:
        """As `text`, without a stream."""
        ask = partial(
            self._http.request_json,
            self._url,
            self._json_headers,
            error_mapping=self._error_mapping,
            surrogates=True,
        )
        try:
            completion = await ask(self._body(job))
        except UpstreamError as error:
            if not (missing := self._missing_thoughts(job, error)):
                raise
            completion = await ask(self._body(job, missing))
            self._missing[_thinking_mode(job)] = missing
        event = parse_completion(
            completion, self._error_mapping, hidden_thinking=self.profile.hidden_thinking
        )
        if self.profile.reports_cost:
            job.report.cost = reported_cost(completion.get("usage"))
        return event

    def _missing_thoughts(self, job: Job[TextInput], error: UpstreamError) -> str:
        """The code of a refusal, which costs nothing, if the request can be sent again with placeholders for
        the missing thoughts behind tool calls; "" for any other error."""
        code = error.vendor_code
        if code not in (MISSING_SIGNATURE, MISSING_TEXT) or code == self._missing.get(_thinking_mode(job)):
            return ""
        return code

    def _body(self, job: Job[TextInput], missing: str = "") -> bytes:
        text = job.input
        fields = request(job, self.profile)
        if self._missing and not missing:
            missing = self._missing.get(_thinking_mode(job), "")
        if missing:
            add_placeholders(fields["messages"], missing)
        body = to_json(fields)
        if text.tools:
            body = with_member(body, "tools", tools_json(text.tools, self.profile.no_parameters))
        if text.HasField("format"):
            body = with_member(body, "response_format", response_format_json(text.format))
        return body


def _thinking_mode(job: Job[TextInput]) -> tuple[str, Any]:
    return job.route.model, _effort(job.input, job.route)


def request(job: Job[TextInput], profile: Profile) -> dict[str, Any]:
    """Return the request body for a text job on a host, without what has a schema: tools and format."""
    text, options = job.input, job.route.options
    messages = convert_messages(
        text.messages,
        call_ids=profile.call_ids,
        names=profile.message_names,
        strict_order=profile.strict_order,
        text_lists=profile.text_lists,
    )
    body: dict[str, Any] = {"model": job.route.model, "messages": messages}
    names = _names(job.route, profile)
    if limit := _max_tokens(job, profile):
        body[names["max_tokens"]] = limit
    for name in ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"):
        if text.HasField(name):
            body[names[name]] = getattr(text, name)
    if text.stop:
        body["stop"] = list(text.stop)
    if text.HasField("tool_choice"):
        body["tool_choice"] = tool_choice(text.tool_choice)
    if text.HasField("parallel_tool_calls"):
        body["parallel_tool_calls"] = text.parallel_tool_calls
    if user := job.user:
        fits = len(user) <= profile.user_most
        body[names["user"]] = user if fits else sha256(user.encode()).hexdigest()
    effort = _effort(text, job.route)
    if effort is not None:
        body["reasoning_effort"] = effort
    if job.stream:
        body["stream"] = True
        if options.get("stream_usage", profile.stream_usage) == "option":
            body["stream_options"] = profile.stream_options
    if profile.extra or "extra" in options:
        extra = _extra(job.route, profile)
        extra.pop(names["max_tokens"], None)  # whatever its name: it bounds what the task costs
        body.update(extra)
    return body


def _max_tokens(job: Job[TextInput], profile: Profile) -> int:
    """The limit of output to send, or 0. One that the caller has not set leaves room for the prompt."""
    text, route, limits = job.input, job.route, job.model.limits
    limit = text.max_tokens
    given = text if job.given is None else job.given.input
    if given.HasField("max_tokens"):
        return limit
    if not limit and limits.max_output_tokens and (profile.sends_maximum or "max_tokens" in route.clamp):
        limit = route.fit("max_tokens", limits.max_output_tokens) or 0
    context = route.options.get("context_tokens", limits.max_input_tokens if profile.sends_maximum else 0)
    if limit and context:
        # The prompt may have fewer tokens than is likely, so a part of the context always stays.
        limit = min(limit, max(context - likely_tokens(text), context // _MIN_SHARE))
    return limit


def _effort(text: TextInput, route: Route) -> Any:
    """The reasoning effort to request, or None."""
    return _EFFORTS.get(text.reasoning_effort) or route.options.get("reasoning_effort")


def _fit_reasoning(fitting: Fitting) -> None:
    """Adjust an input to a model that takes some parameters only without reasoning. With tools, it does not
    reason; otherwise, the others are left out if it does."""
    if _effort(fitting.input, fitting.route) in (None, "none"):
        return
    excluded = fitting.route.options["reasoning_excludes"]
    if "tools" in excluded and fitting.get("tools"):
        none = ReasoningEffort.REASONING_EFFORT_NONE
        fitting.replace("reasoning_effort", none, "none, because the model does not reason beside tools")
        return
    for name in excluded:
        fitting.drop(name, "left out unless reasoning_effort is none")


def _extra(route: Route, profile: Profile) -> dict[str, Any]:
    """The operator's fields of every request; those of the route replace those of the host."""
    return {**profile.extra, **route.options.get("extra", {})}


def _names(route: Route, profile: Profile) -> dict[str, str]:
    """The contract's name of each parameter -> the host's, or "none"."""
    options = route.options
    return _SAME_NAMES | {
        "max_tokens": options.get("max_tokens_field", profile.max_tokens_field),
        "seed": options.get("seed_field", profile.seed_field),
        "format": "response_format",
        "user": options.get("user_field", profile.user_field),
    }
