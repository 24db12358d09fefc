"""The port that every provider implements, and what it is given.

The engine calls a provider's method of the task's kind with a `Job` and passes on what it yields. A
provider translates between the contract and one vendor's wire; it decides nothing else: no key check,
no limit, no price.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.reported_cost import Report
from pomelo.catalog.rows import Row
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Adjustment
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.logs import format_trace
from pomelo.media.audio import AudioSource
from pomelo.providers.fitting import Fitting, Hook, fit

__all__ = ["CALLER", "CODES", "AudioSource", "Event", "Fitting", "Job", "Options", "Probe", "Provider"]

log = logging.getLogger("pomelo.providers")

J = TypeVar("J", bound="Job")

CALLER: ContextVar[str] = ContextVar("caller", default="")
"""The account for which a provider is called now; empty if it is for none. Connections are shared
fairly between accounts. The router sets it; it is a context variable so that providers need not
pass it on."""

CODES = frozenset(
    (
        "provider_unavailable",
        "provider_failed",
        "content_policy_violation",
        "context_length_exceeded",
        "invalid_parameter",
        "payload_too_large",
        "deadline_exceeded",
    )
)
"""The codes that a provider may raise. With any other one, which only Pomelo itself may give, the task fails
with provider_failed."""


@dataclass(frozen=True, slots=True)
class Job:
    """One task for one provider.

    `input` is the contract's input message of the task's kind, valid, not to be changed. It is as the route
    takes it: what the model or the provider can't take is clamped or dropped already, and listed in
    `adjustments`. `stream` tells whether the caller wants pieces as they come; when False the provider makes
    one whole upstream call and yields it as one event. `deadline` is absolute, on the event loop's clock; the
    engine enforces it. `request_id` is the caller's name of the request, for log lines. `report` is
    the provider's to fill: if the vendor reports what the task cost, it sets `report.cost`, in US dollars,
    at any time before its last event.

    `given` and `most_tokens` are for the router, which fits the input to the next route from them: the
    caller's own input (None: `input` is it), and the tokens of output that are paid for (None: the model's
    maximum is).
    """

    task_id: str
    model: Model
    route: Route
    input: Any
    stream: bool
    deadline: float
    audio: AudioSource | None = None
    adjustments: Sequence[Adjustment] = ()
    given: Any = None
    most_tokens: int | None = None
    request_id: str = ""
    report: Report = field(default_factory=Report)


JobMethod = Callable[[Job], AsyncGenerator[Event, None]]
"""A provider's method of one kind of task, named as the kind is: text, image, text_to_speech,
speech_to_speech, speech_to_text.

It is an async generator. What it yields, by kind:

* text: `text_delta` events; the last one bears finish_reason, and usage where the vendor gave a credible one.
  Ending without it is a failure.
* image: any number of `image_progress`, then `result` with `image.images[0].data` and `.content_type`.
* text_to_speech, speech_to_speech: `audio_chunk` events of at most 64 KiB; the first bears content_type.
* speech_to_text: one `result` with `transcription`.

Closing or cancelling it closes the upstream connection at once. It raises `PomeloError` alone, with one of
CODES, and what `Http` raises. Whatever else it raises or yields (None, an event of another task type, one
after the last) is logged, and the task fails with provider_failed.
"""


@dataclass(frozen=True, slots=True)
class Probe:
    """A GET that costs nothing and needs the key, for `pomelo doctor`: its path below the base URL, the
    header that bears the key, what stands before the key there, and further headers."""

    path: str
    header: str = "Authorization"
    prefix: str = "Bearer "
    headers: Mapping[str, str] = field(default_factory=dict)


class Options(Row):
    """What a provider reads of a route beside the common keys. Subclass it with a field for each key, with
    its type and a default; by itself it has none. A route with another key or type is refused at start."""


class Provider(Protocol):
    """A vendor, or the sandbox. It has a `JobMethod` for each kind of task that it can do.

    For a kind of which its API can't take every valid input, it has a `Hook` called fit_KIND (fit_text,
    fit_image, …), which changes such inputs before JobMethod gets them. It is called whether or not the
    provider is configured.

    Its class is called with (credentials, http). It may have, as class attributes: `base_url`, where the
    vendor's API begins unless the operator says otherwise; `probe`, a Probe; `options`, Options or a subclass
    (without it, routes may have any keys); and, in a plug-in, `catalog`, the path of a catalogue file with
    the models that it brings.
    """

    @property
    def configured(self) -> bool:
        """Whether it has what it needs to be called, such as a key."""
        ...

    async def aclose(self) -> None:
        """Frees what it holds; idempotent."""
        ...


def method(provider: Provider, kind: str) -> JobMethod | None:
    """The provider's method for a kind of task, or None when it has none."""
    return getattr(provider, kind, None)


def fit_hook(provider: Provider | None, kind: str) -> Hook | None:
    """What the provider changes of the inputs of a kind of task, or None when it takes them all. Whatever a
    plug-in's method raises is `provider_failed`, with a line in the log."""
    hook = getattr(provider, f"fit_{kind}", None)
    return None if hook is None else partial(_guarded, hook)


def _guarded(hook: Hook, fitting: Fitting) -> None:
    try:
        hook(fitting)
    except BaseException as error:
        log.error("the provider %s failed to fit an input\n%s", fitting.route.provider, format_trace(error))
        raise PomeloError("provider_failed") from None


def fitted(job: J, hook: Hook | None) -> J:
    """The job with its input as its route and the provider of `hook` take it."""
    given = job.input if job.given is None else job.given
    fitting = fit(given, job.model, job.route, hook, job.most_tokens)
    return replace(job, input=fitting.input, adjustments=fitting.adjustments)
