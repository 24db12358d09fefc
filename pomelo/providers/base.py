"""The interface of providers: `Provider`, its methods, and the `Job` that they take.

A provider translates between our contract and a vendor's API. It checks no key, no limit and no price.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Generic, Protocol

from pydantic import AfterValidator

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.reported_cost import Report
from pomelo.catalog.rows import Row
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Adjustment
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.media.audio import AudioSource
from pomelo.providers.errors import TOKEN, safe_token
from pomelo.providers.fitting import Fitting, Given, Hook, InputT, fit
from pomelo.runtime.logs import format_trace
from pomelo.values import value_type

__all__ = ["CALLER", "AudioSource", "Event", "Fitting", "Given", "Job", "Options", "Probe", "Provider"]

log = logging.getLogger("pomelo.providers")

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""The account for which a provider is called, or "". Connections are shared fairly between accounts. It is a
context variable so that providers need not pass it on."""


_ID_FIELDS = frozenset(
    (b"x-request-id", b"request-id", b"x-trace-id", b"mistral-correlation-id", b"x-generation-id", b"cf-ray")
)
_ID_LENGTHS = frozenset(map(len, _ID_FIELDS))


_SECRET_LENGTH = 8
"""Characters from which a part of a sent header can be a key."""


class VendorCall:
    """The last request and response in one call to a vendor, for the operator's log: the `job`, the headers
    that were `sent` (None before the first request), the status of the response, 0 before it has begun, and
    the fields of its head.

    `waits`: its first request waits for a connection or for what another call reads, or it got no connection,
    so the vendor knows nothing of the call.
    """

    __slots__ = ("fields", "job", "sent", "status", "waits")

    def __init__(self) -> None:
        self.job: Job[Any] | None = None
        self.status = 0
        self.sent: Mapping[str, str] | None = None
        self.waits = False
        self.fields: Sequence[tuple[bytes, bytes]] = ()

    @property
    def request_id(self) -> str:
        """The vendor's id of the request; empty if it sent no id, or text that can't be an id."""
        found = b""
        if self.status:
            for name, value in self.fields:
                if len(name) in _ID_LENGTHS and (lower := name.lower()) in _ID_FIELDS:
                    found = value
                    if lower != b"cf-ray":  # which is the proxy's
                        break
        return self.token(found.decode("latin-1")) if found else ""

    def token(self, text: str) -> str:
        """Return a vendor's code or id; empty if it can't be one, or if it repeats what a header sent to the
        vendor, such as the API key."""
        if not TOKEN.fullmatch(text):
            return ""
        if self.sent is not None and len(text) >= _SECRET_LENGTH:
            for value in self.sent.values():
                secret = value.rpartition(" ")[2]
                if text in value or (len(secret) >= _SECRET_LENGTH and secret in text):
                    return ""
        return text


VENDOR_CALL: ContextVar[VendorCall | None] = ContextVar("vendor call", default=None)
"""The current call to a vendor, None outside of one. The HTTP client writes into it."""


def vendor_token(text: str) -> str:
    """Return a vendor's code or id as `VendorCall.token` of the current call does."""
    call = VENDOR_CALL.get()
    return safe_token(text) if call is None else call.token(text)


def log_fields() -> dict[str, Any]:
    """Return the `extra` of a log line about the current call to a vendor: its request and its route."""
    call = VENDOR_CALL.get()
    if call is None or call.job is None:
        return {}
    job = call.job
    fields = {
        "request_id": job.request_id,
        "task_id": job.task_id,
        "model": job.model.name,
        "provider": job.route.provider,
        "provider_model": job.route.model,
    }
    return {"fields": fields}


@value_type(frozen=True, slots=True)
class Job(Generic[InputT]):
    """One task for one provider.

    `input` is the input message of the task type, such as TextInput: valid, and not to be changed. It is
    already fitted to the route: what the model or the provider can't take was clamped or dropped, and is
    listed in `adjustments`. Images in it are `data:` URIs. `user` is the caller's id of the end user, or "".
    If `stream` is False, the provider makes one whole call to the vendor and yields the result as one event.
    `deadline` is absolute, on the event loop's clock; the engine enforces it. `request_id` is for log lines.
    If the vendor reports the cost of the task, the provider sets `report.cost`, in US dollars, before its
    last event; if it counts the input of a stream before its end, `report.usage`.

    The router fits the input to another route from `given`, the caller's own (None: `input` and `user` are),
    and `max_tokens`, the tokens of output that are reserved (None: the model's maximum).
    """

    task_id: str
    model: Model
    route: Route
    input: InputT
    stream: bool
    deadline: float
    audio: AudioSource | None = None
    adjustments: Sequence[Adjustment] = ()
    user: str = ""
    given: Given[InputT] | None = None
    max_tokens: int | None = None
    request_id: str = ""
    report: Report = field(default_factory=Report)

    def with_output_limit(self, task_input: InputT, max_tokens: int) -> Job[InputT]:
        """The same job with reserved tokens of output, and its input fitted to them."""
        return Job(
            self.task_id,
            self.model,
            self.route,
            task_input,
            self.stream,
            self.deadline,
            self.audio,
            self.adjustments,
            self.user,
            self.given,
            max_tokens,
            self.request_id,
            self.report,
        )


JobMethod = Callable[[Job[Any]], AsyncGenerator[Event, None]]
"""A provider's method for one task type, which has the type's name: text, image, text_to_speech,
speech_to_speech, speech_to_text.

It is an async generator. What it yields, by task type:

* text: any number of `text_delta` and `tool_call_delta`, then `completed` with `text.finish_reason`, with
  `usage` if the vendor reported a credible one, and with a `text.message` of the text and then the tool calls
  that no delta had: all of it without a stream. The first piece of a call has its id and name; calls are
  numbered from 0, without gaps. A stop and tool calls are one finish reason: the engine sets the right one.
* image: any number of `image_progress`, then `completed` with `image.images[0].data` and `.content_type`.
* text_to_speech, speech_to_speech: `audio_chunk` events of at most 64 KiB; the first has content_type.
* speech_to_text: `completed` with `transcription`.

Text, image and speech_to_text have failed if they end without `completed`. Sequence numbers are set later.

Closing or cancelling it closes the connection to the vendor immediately. It raises only `PomeloError` with
one of CODES, and what `Http` raises. Any other exception, and any other event (None, an event of another task
type, an event after the last), is logged, and the task fails with provider_failed.
"""

CompleteMethod = Callable[[Job[Any]], Awaitable[Event]]
"""A provider's method `complete_text`, `complete_image` and so on: a coroutine that returns the `completed`
of a job without a stream. A provider may have it beside its `JobMethod`, to save the cost of a generator."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A GET that costs nothing and needs the key, for `pomelo doctor`: its path below the base URL, the
    header of the key, the prefix of the key in that header, and further headers."""

    path: str
    header: str = "Authorization"
    prefix: str = "Bearer "
    headers: Mapping[str, str] = field(default_factory=dict)


class Options(Row):
    """The keys that a provider reads in a route beside the common keys, or in the operator's settings beside
    the key and the base URL. Subclass it with a field for each key, with its type and a default. An unknown
    key or a wrong type is refused at start."""


_BOUNDS = ("max_tokens", "max_completion_tokens", "n")
"""Fields of a request for text that limit what it costs: a task's own, or no more than one answer."""


def _keeps_bounds(extra: dict[str, Any]) -> dict[str, Any]:
    for name in _BOUNDS:
        if name in extra:
            raise ValueError(
                f"must not have {name}: a task could cost more than it reserves. "
                "Limit tokens by clamp = { max_tokens = [1, 4_096] }"
            )
    return extra


Extra = Annotated[dict[str, Any], AfterValidator(_keeps_bounds)]
"""The operator's fields of every request for text."""


class Provider(Protocol):
    """A vendor, or the sandbox. It has a `JobMethod` for each task type that it supports, and may have a
    `CompleteMethod` beside it.

    If its API does not take every valid input of a task type, it has a `Hook` named after the type (fit_text,
    fit_image, …), which changes such inputs before the JobMethod gets them. The hook must work even if the
    provider is not configured.

    Its class is called with (credentials, http). It may have these class attributes: `base_url`, the default
    address of the vendor's API; `probe`, a Probe; `options`, Options or a subclass (without it, routes may
    have any keys); `settings`, a subclass of Options (`credentials.settings` is an instance of it); and, in a
    plug-in, `catalog`, the path of a catalogue file with its models.
    """

    @property
    def configured(self) -> bool:
        """Whether it has what it needs to be called, such as a key."""
        ...

    async def aclose(self) -> None:
        """Free its resources; idempotent."""
        ...


def job_method(provider: Provider, task_type: str) -> JobMethod | None:
    """Return the provider's method for a task type, or None if it does not support the type."""
    return getattr(provider, task_type, None)


def complete_method(provider: Provider, task_type: str) -> CompleteMethod | None:
    """Return the provider's method for jobs of a task type without a stream, or None if it has none, or if a
    subclass or the instance replaces only the `JobMethod`."""
    name = f"complete_{task_type}"
    for namespace in (getattr(provider, "__dict__", {}), *map(vars, type(provider).__mro__)):
        if name in namespace:
            method: CompleteMethod = getattr(provider, name)
            return method
        if task_type in namespace:
            break
    return None


async def one_event(complete: CompleteMethod, job: Job[Any]) -> AsyncGenerator[Event, None]:
    """Yield the result of a `CompleteMethod`, for a `JobMethod` that also takes jobs without a stream."""
    yield await complete(job)


def is_built_in(provider: Provider) -> bool:
    """Whether a provider is Pomelo's own code, and not that of a plug-in."""
    return type(provider).__module__.startswith("pomelo.providers.")


def fit_hook(provider: Provider | None, task_type: str) -> Hook | None:
    """Return the provider's hook for inputs of a task type, or None if it has none. An exception of the hook
    is logged, and raised as `provider_failed`."""
    hook = getattr(provider, f"fit_{task_type}", None)
    return None if hook is None else partial(_guarded, hook)


def _guarded(hook: Hook, fitting: Fitting) -> None:
    try:
        hook(fitting)
    except BaseException as error:
        log.error("the provider %s failed to fit an input\n%s", fitting.route.provider, format_trace(error))
        raise PomeloError("provider_failed") from None


def fit_job(job: Job[InputT], hook: Hook | None) -> Job[InputT]:
    """Return the job with its input fitted to its route, and to the provider by its `hook`."""
    given = Given(job.input, job.user) if job.given is None else job.given
    fitting = fit(given, job.model, job.route, hook, job.max_tokens)
    return replace(job, input=fitting.input, user=fitting.user, adjustments=fitting.adjustments)
