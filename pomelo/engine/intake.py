"""What becomes of a task before a provider is asked: who asks, for what, may it be, and what does it take.

The engine calls `Intake.take_in` for every task, and runs the `Run` that it gives. Whatever is refused is
refused here, on both wires alike and in one order. It knows no transport and no vendor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from pomelo.call import STRICT, Call, Principal, report_adjustments
from pomelo.catalog import retirement
from pomelo.catalog.catalog import Catalog, Model
from pomelo.catalog.pricing import affordable_output_tokens
from pomelo.engine import idempotency
from pomelo.engine.reservation import Ledger, Reservation
from pomelo.engine.routing import Candidate, Router
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import AudioInput
from pomelo.gen.v1.task_pb2 import Adjustment, Task
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.ids import new_id
from pomelo.media.duration import Measurer
from pomelo.media.store import MediaStore, sniff
from pomelo.providers.base import AudioSource, Job
from pomelo.providers.fitting import Fitting
from pomelo.stores.ledger import IdempotencyKey, ReplayedAnswer, UsageRecord
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate, Progress, TaskDefinition

T = TypeVar("T")

INLINE_LIMIT = 4 * 1024 * 1024
"""Bytes of audio that a gRPC caller may send inline in a task."""


LARGE = 256 * 1024
"""Bytes above which a task is examined in a thread, so that it does not block the event loop."""


@dataclass(frozen=True, slots=True)
class _Routing:
    """The routes that can serve a task, and its input as the first of them takes it. `failure` is why there
    is no route; then the input is as the model's first one would take it."""

    candidates: list[Candidate]
    failure: PomeloError | None
    fitted: Fitting
    reported: Fitting
    """Whose adjustments the caller gets: for a test key those of the model's first route."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A task that can be run, if its account may."""

    model: Model
    kind: TaskDefinition
    given: Any
    routing: _Routing
    audio: AudioSource | None
    heard: AudioInfo
    idempotency_key: IdempotencyKey | None
    large: bool


@dataclass(slots=True)
class Run:
    """A task that was taken in."""

    kind: TaskDefinition
    job: Job[Any]
    """That of the route that is asked now."""
    candidates: list[Candidate]
    fold: Collector
    delivered: Progress
    hold: Reservation
    bound: Estimate
    created: int
    keep: bool
    """Whether its answer is kept for its Idempotency-Key."""
    drop: Callable[[], None]
    """Deletes what is not needed after the task has ended."""

    def asked(self, job: Job[Any]) -> None:
        """A route is asked, with a job of its own."""
        self.job = job
        self.hold.answered_by(job.route, job.report)


class ReplayedTask:
    """The answer to a request that was answered before."""

    def __init__(self, answer: bytes, given: Any, owner: str, media: MediaStore, *, stream: bool) -> None:
        self._answer = answer
        self._owner = owner
        self._media = media
        self.result = idempotency.restore_answer(answer, requested_format(given), owner, media, stream=stream)

    async def events(self) -> AsyncGenerator[StreamTaskResponse, None]:
        """It as a stream."""
        for event in idempotency.replay_events(self._answer, self.result, self._owner, self._media):
            yield event


class Intake:
    """Takes tasks in.

    `router` knows who serves a model; `authenticate` tells whose key a call bears; `admission` lets tasks in;
    `measurer` says how long audio is; `now` is Unix time in seconds.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        router: Router,
        authenticate: Callable[[Call], Awaitable[Principal]],
        admission: Ledger,
        media: MediaStore,
        measurer: Measurer,
        inline_limit: int = INLINE_LIMIT,
        now: Callable[[], float] = time.time,
        ids: Callable[[str], str] = new_id,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._authenticate = authenticate
        self._admission = admission
        self._media = media
        self._measurer = measurer
        self._inline_limit = inline_limit
        self._now = now
        self._ids = ids

    async def enter(self, call: Call, model: Model | None = None) -> Principal:
        """Whose call it is, if it may come in; for what takes nothing, and so is told its limits here.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter (of a header), store_unavailable.
        """
        principal = await self._authenticate(call)
        await self._admission.tell(call, principal, model)
        if call.header_error is not None:
            raise call.header_error
        return principal

    def may(self, principal: Principal, name: str) -> bool:
        """Whether a key may use the model of that name.

        Raises:
            PomeloError: model_not_allowed; the account's plan is none any more.
        """
        plan = self._admission.plan(principal)
        return (principal.models is None or name in principal.models) and (
            plan.models is None or name in plan.models
        )

    def allowed(self, name: str, principal: Principal) -> Model:
        """The model of that name, if the key may use it.

        Raises:
            PomeloError: unsupported_model, model_not_allowed.
        """
        model = self._catalog.resolve(name)
        if not self.may(principal, name):
            raise PomeloError("model_not_allowed", field="model")
        return model

    async def take_in(self, task: Task, call: Call, *, stream: bool) -> Run | ReplayedTask:
        """Everything that can be refused before a provider is called: in this order the key, the model, the
        fields, the limits, the credits, the provider.

        Raises:
            PomeloError: any row of the table but those of a provider that was asked.
        """
        principal = await self._authenticate(call)
        drop = self._spent(task, call, principal)
        try:
            try:
                asked = await self._checked(task, call, principal)
            except PomeloError:
                await self._admission.tell(call, principal, self._catalog.models.get(task.model))
                raise
            run = await self._admit(asked, call, principal, stream, drop)
        except BaseException:
            drop()
            raise
        if isinstance(run, ReplayedTask):
            drop()
            report_adjustments(call, run.result.adjustments)
            if call.strict and run.result.adjustments:  # those of a route that took over from the first one
                raise _refused_replay(run.result.adjustments[0])
        else:
            report_adjustments(call, run.job.adjustments)
        return run

    async def _admit(
        self, asked: _Asked, call: Call, principal: Principal, stream: bool, drop: Callable[[], None]
    ) -> Run | ReplayedTask:
        """Takes what a task needs, and makes it ready to run."""
        model, kind, routing = asked.model, asked.kind, asked.routing
        candidates, failure, given = routing.candidates, routing.failure, routing.fitted.input
        route = routing.fitted.route
        # A test key pays what a live one would on the model's first route.
        paid = routing.reported
        bound = await _beside(asked.large, kind.bound, paid.input, model, paid.route, asked.heard)
        prices, price_version = model.priced(route if principal.live else model.routes[0])
        task_id = self._ids(kind.id_prefix)
        draft = UsageRecord(
            task_id=task_id,
            request_id=call.request_id,
            account=principal.account,
            live=principal.live,
            key_id=principal.key_id,
            wire=call.wire,
            model=model.name,
            task_type=kind.name,
            price_version=price_version,
        )
        hold = await self._admission.enter(
            call,
            self._admission.plan(principal),
            draft,
            prices,
            bound.minimum,
            bound.maximum,
            enough=bound.sufficient,
            tokens=bound.tokens,
            exact=bound.exact,
            idempotency_key=asked.idempotency_key,
        )
        if isinstance(hold, ReplayedAnswer):
            return ReplayedTask(hold.answer, given, principal.owner, self._media, stream=stream)
        if failure is None:
            failure = self._no_room(asked, given, bound, principal)
        if failure is not None:
            await hold.refuse()
            raise failure
        try:
            most_tokens = None
            if kind.name == "text":
                most_tokens = _paid(
                    given, bound, affordable_output_tokens(hold.amount, bound.maximum.input_tokens, prices)
                )
                if most_tokens is not None and given.max_tokens != most_tokens:
                    given = candidates[0].fit(asked.given, model, most_tokens).input
            job = Job(
                task_id=task_id,
                model=model,
                route=route,
                input=given,
                stream=stream,
                deadline=call.deadline,
                audio=asked.audio,
                adjustments=routing.reported.adjustments,
                original_input=asked.given,
                max_tokens=most_tokens,
                request_id=call.request_id,
            )
            writer = partial(self._media.writer, principal.owner)
            keep = asked.idempotency_key is not None
            folding = CollectorContext(given, model, bound, stream, writer, keep)
            fold = kind.fold(folding)
            return Run(
                kind, job, candidates, fold, folding.delivered, hold, bound, int(self._now()), keep, drop
            )
        except BaseException:
            hold.leave()  # the task will not run
            raise

    async def _checked(self, task: Task, call: Call, principal: Principal) -> _Asked:
        """What is asked for, if it can be.

        Raises:
            PomeloError: what is wrong with headers, model or fields; store_unavailable.
        """
        if call.header_error is not None:
            raise call.header_error
        if not task.model:
            raise PomeloError("missing_parameter", "Missing required field: model", field="model")
        model = self.allowed(task.model, principal)
        call.response_headers |= retirement.headers(model)
        kind = TASK_TYPES[model.task_type]
        which = task.WhichOneof("input")
        if which is not None and which != kind.name:
            raise PomeloError(
                "invalid_parameter",
                f"Invalid input: {task.model} takes {kind.name}, not {which}",
                field=which,
            )
        given = getattr(task, kind.name)
        large = task.ByteSize() > LARGE
        await _beside(large, kind.check, given, model)
        routing = await self._route(given, model, kind, live=principal.live, strict=call.strict, large=large)
        if call.strict:
            call.response_headers["Preference-Applied"] = STRICT
            if routing.reported.adjustments:
                raise routing.reported.refusal()
        audio = self._audio(given.audio, call, principal) if kind.audio else None
        repeatable = None
        if call.idempotency_key is not None:
            repeatable = await idempotency.idempotency_key(call.idempotency_key, task, audio)
        heard = AudioInfo()
        if audio is not None:
            measured = await self._measurer.measure(audio, principal.account)
            audio = replace(audio, ms=measured.ms, content_type=measured.content_type)
            heard = AudioInfo(audio.size, audio.ms)
            if heard.exceeds(model):
                raise invalid("audio", f"audio of at most {model.limits.max_audio_seconds} seconds")
        return _Asked(model, kind, given, routing, audio, heard, repeatable, large)

    def _spent(self, task: Task, call: Call, principal: Principal) -> Callable[[], None]:
        """Returns a function that deletes a task's upload once the task has ended or is refused. The caller
        doesn't know the id of an upload that came inside a REST request, so nobody can use it again."""
        given = getattr(task, task.WhichOneof("input") or "text")
        if call.wire != "rest" or "audio" not in given.DESCRIPTOR.fields_by_name or not given.audio.media_id:
            return _nothing
        return partial(self._media.delete, given.audio.media_id, principal.owner)

    def _no_room(
        self, asked: _Asked, given: Any, bound: Estimate, principal: Principal
    ) -> PomeloError | None:
        """Why an answer that must be stored (as a link, or for its Idempotency-Key) can't be."""
        as_link = requested_format(given) == ResponseFormat.RESPONSE_FORMAT_URL
        if not as_link and asked.idempotency_key is None:
            return None
        if not principal.live:  # the sandbox takes inputs that a live model would not
            route = asked.routing.fitted.route
            bound = asked.kind.bound(given, asked.model, route, asked.heard)
        size = asked.kind.media_size(given, bound)
        if size:
            try:
                self._media.check_answer(principal.owner, size)
            except PomeloError as error:
                return error
        return None

    async def _route(
        self, given: Any, model: Model, kind: TaskDefinition, *, live: bool, strict: bool, large: bool
    ) -> _Routing:
        """Which routes can serve a task, and as what. With `strict` only those that adjust nothing may take
        over from the first one. That there is no route is raised later, after the limits."""
        candidates: list[Candidate] = []
        failure = None
        try:
            candidates = self._router.candidates(model, kind.name, live=live)
        except PomeloError as error:
            failure = error
        if not (live and candidates):
            first = await _beside(large, self._router.preview, model, kind.name, given)
            fitted = await _beside(large, candidates[0].fit, given, model) if candidates else first
            return _Routing(candidates, failure, fitted, first)
        fitted = await _beside(large, candidates[0].fit, given, model)
        if strict:
            for other in candidates[1:]:
                if (await _beside(large, other.fit, given, model)).adjustments:
                    candidates.remove(other)
        return _Routing(candidates, failure, fitted, fitted)

    def _audio(self, audio: AudioInput, call: Call, principal: Principal) -> AudioSource:
        if audio.media_id:
            try:
                path, media = self._media.find(audio.media_id, principal.owner)
            except PomeloError as error:
                if error.code != "not_found":
                    raise
                raise invalid(
                    "audio", "a medium that this account uploaded in the same mode within the last hour"
                ) from error
            return AudioSource(media.content_type, media.size_bytes, path=path)
        size = len(audio.data)
        # A REST caller can't upload: the gateway decides what goes inline, within the limits of its bodies.
        if size > self._inline_limit and call.wire != "rest":
            raise PomeloError(
                "payload_too_large",
                f"audio is larger than the {self._inline_limit:,} bytes that may be inline. Upload it",
                field="audio",
            )
        return AudioSource(sniff(audio.content_type, audio.data[:16]), size, data=audio.data)


def _nothing() -> None:
    """Deletes nothing."""


async def _beside(large: bool, look: Callable[..., T], *given: Any) -> T:
    """Examines a task: a large one in a thread."""
    return await asyncio.to_thread(look, *given) if large else look(*given)


def requested_format(given: Any) -> ResponseFormat.ValueType:
    """How the caller wants a medium back."""
    return getattr(given, "response_format", ResponseFormat.RESPONSE_FORMAT_UNSPECIFIED)


def _refused_replay(made: Adjustment) -> PomeloError:
    return invalid(made.field, "left out or changed: the answer to repeat was made without it as given")


def _paid(given: Any, bound: Estimate, affordable_tokens: int) -> int | None:
    """The tokens of output that a text task has paid for; None where the model's own maximum is, and no
    max_tokens need be sent."""
    most = min(bound.maximum.output_tokens, affordable_tokens)
    return None if most >= bound.maximum.output_tokens and not given.HasField("max_tokens") else most
