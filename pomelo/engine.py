"""The engine: takes a task in, finds who serves it, folds or passes on what comes, and settles the bill.

It implements the ports `TaskService` and `ModelService` for this process. It knows no transport; what a
kind of task is stands in `pomelo.tasks`, what a vendor's wire is in `pomelo.providers`, what a task may take
in `pomelo.admission`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

from pomelo import audio as sounds
from pomelo import repeats
from pomelo.admission.admit import Admission, Hold
from pomelo.call import Call, Principal
from pomelo.catalog import Catalog, Model
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1 import model_service_pb2 as model_pb
from pomelo.gen.v1.media_pb2 import ResponseFormat
from pomelo.gen.v1.speech_pb2 import AudioInput
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse, TaskStarted
from pomelo.ids import new_id
from pomelo.media import MediaStore, sniff
from pomelo.pricing import affordable
from pomelo.providers.base import AudioSource, Job
from pomelo.routing import Candidate, Router
from pomelo.stores.ledger import Repeatable, Repeated, UsageRecord
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import Bound, Delivered, Fold, Folding, Heard, TaskKind

INLINE_LIMIT = 4 * 1024 * 1024
"""Bytes of sound that may ride in a task."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A task that can be run, if its account may."""

    model: Model
    kind: TaskKind
    given: Any
    audio: AudioSource | None
    heard: Heard
    repeatable: Repeatable | None
    spent: Path | None
    """An upload that is of no use once the task has ended."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A task that was taken in."""

    kind: TaskKind
    job: Job
    candidates: list[Candidate]
    fold: Fold
    hold: Hold
    bound: Bound
    created: int
    keep: bool
    """Whether its answer is kept for its Idempotency-Key."""
    spent: Path | None
    """An upload that is of no use once the task has ended."""


class Engine:
    """Runs tasks on providers.

    `router` knows who serves a model; `authenticate` tells whose key a call bears; `admission` lets tasks in;
    `now` is Unix time in seconds.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        router: Router,
        authenticate: Callable[[Call], Awaitable[Principal]],
        admission: Admission,
        media: MediaStore,
        inline_limit: int = INLINE_LIMIT,
        now: Callable[[], float] = time.time,
        ids: Callable[[str], str] = new_id,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._authenticate = authenticate
        self._admission = admission
        self._media = media
        self._inline_limit = inline_limit
        self._now = now
        self._ids = ids

    # --- TaskService

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """See the port."""
        run = await self._take_in(task, call, stream=False)
        if isinstance(run, _Replay):
            return run.result
        result = _result(task, run)
        async with self._life(run) as deadline:
            async with aclosing(self._events(run)) as events:
                async for event in events:
                    run.fold.add(event)
            run.fold.finish(result)
            await self._settle(run, result, deadline)
        return result

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[StreamTaskResponse]]:
        """See the port."""
        run = await self._take_in(task, call, stream=True)
        if isinstance(run, _Replay):
            async with aclosing(run.events()) as events:
                yield events
            return
        async with self._life(run) as deadline, aclosing(self._stream(task, run, deadline)) as events:
            yield events

    # --- ModelService

    async def list_models(self, call: Call) -> list[model_pb.Model]:
        """See the port."""
        principal = await self._enter(call)
        return [
            self._describe(model, principal)
            for model in self._catalog.models.values()
            if self._may(principal, model.name)
        ]

    async def get_model(self, name: str, call: Call) -> model_pb.Model:
        """See the port."""
        principal = await self._enter(call, self._catalog.models.get(name))
        return self._describe(self._allowed(name, principal), principal)

    # --- taking in

    async def _enter(self, call: Call, model: Model | None = None) -> Principal:
        """Whose call it is, if it may come in; for what takes nothing, and so is told its limits here.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter (of a header), store_unavailable.
        """
        principal = await self._authenticate(call)
        await self._admission.tell(call, principal, model)
        if call.fault is not None:
            raise call.fault
        return principal

    def _may(self, principal: Principal, name: str) -> bool:
        plan = self._admission.plan(principal)
        return (principal.models is None or name in principal.models) and (
            plan.models is None or name in plan.models
        )

    def _allowed(self, name: str, principal: Principal) -> Model:
        model = self._catalog.resolve(name)
        if not self._may(principal, name):
            raise PomeloError("model_not_allowed", field="model")
        return model

    async def _take_in(self, task: Task, call: Call, *, stream: bool) -> "_Run | _Replay":
        """Everything that can be refused before a provider is called: in this order the key, the model, the
        fields, the limits, the credits, the provider."""
        principal = await self._authenticate(call)
        try:
            asked = await self._checked(task, call, principal)
        except PomeloError:
            await self._admission.tell(call, principal, self._catalog.models.get(task.model))
            raise
        try:
            run = await self._admit(asked, call, principal, stream)
        except BaseException:
            _drop(asked.spent)
            raise
        if isinstance(run, _Replay):
            _drop(asked.spent)
        return run

    async def _admit(self, asked: _Asked, call: Call, principal: Principal, stream: bool) -> "_Run | _Replay":
        """Takes what a task needs, and makes it ready to run."""
        model, kind, given = asked.model, asked.kind, asked.given
        candidates, failure = self._candidates(model, kind, principal)
        route = candidates[0].route if candidates else model.routes[0]
        bound = kind.bound(given, model, route, asked.heard)
        # A test key pays what the first route costs.
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
            bound.least,
            bound.most,
            tokens=bound.tokens,
            exact=bound.exact,
            repeatable=asked.repeatable,
        )
        if isinstance(hold, Repeated):
            return _Replay(hold.answer, given, principal.account, self._media, stream=stream)
        if failure is not None:
            await hold.refuse()
            raise failure
        job = Job(
            task_id=task_id,
            model=model,
            route=route,
            input=_cut(given, bound, affordable(hold.amount, bound.most.input_tokens, prices))
            if kind.name == "text"
            else given,
            stream=stream,
            deadline=call.deadline,
            audio=asked.audio,
        )
        writer = partial(self._media.writer, principal.account)
        keep = asked.repeatable is not None
        fold = kind.fold(Folding(given, bound, stream, writer, keep))
        return _Run(kind, job, candidates, fold, hold, bound, int(self._now()), keep, asked.spent)

    async def _checked(self, task: Task, call: Call, principal: Principal) -> _Asked:
        """What is asked for, if it can be.

        Raises:
            PomeloError: what is wrong with headers, model or fields; store_unavailable.
        """
        if call.fault is not None:
            raise call.fault
        if not task.model:
            raise PomeloError("missing_parameter", "Missing required field: model", field="model")
        model = self._allowed(task.model, principal)
        kind = TASK_TYPES[model.task_type]
        # An input of another kind is an empty one of this kind: its required fields are missing.
        given = getattr(task, kind.name)
        kind.check(given, model)
        audio = self._audio(given.audio, principal) if kind.audio else None
        repeatable = None
        if call.repeat_key is not None:
            repeatable = Repeatable(call.repeat_key, await repeats.fingerprint(task, audio))
        # What came with a REST request has no name that its caller knows: no other task can want it.
        spent = audio.path if audio is not None and call.wire == "rest" else None
        return _Asked(model, kind, given, audio, await _heard(audio), repeatable, spent)

    def _candidates(
        self, model: Model, kind: TaskKind, principal: Principal
    ) -> tuple[list[Candidate], PomeloError | None]:
        """The routes that can serve a task; or why there is none, to be told after the limits."""
        try:
            return self._router.candidates(model, kind.name, live=principal.live), None
        except PomeloError as error:
            return [], error

    # --- running

    @asynccontextmanager
    async def _life(self, run: _Run) -> AsyncIterator[asyncio.Timeout]:
        """The life of a task: bounded by its deadline, freed and settled however it ends.

        Raises:
            PomeloError: deadline_exceeded; store_unavailable where the store took this process for dead.
        """
        deadline = asyncio.timeout_at(run.job.deadline)
        hold = run.hold
        hold.on_lost = partial(_end_now, deadline)
        try:
            async with deadline:
                yield deadline
        except TimeoutError as error:
            run.fold.close()
            await hold.fail()
            if not deadline.expired():
                raise  # a fault that bears the same name
            raise PomeloError("store_unavailable" if hold.lost else "deadline_exceeded") from error
        except Exception:
            run.fold.close()
            await hold.fail()
            raise
        finally:
            run.fold.close()
            hold.leave()
            _drop(run.spent)

    def _events(self, run: _Run) -> AsyncGenerator[StreamTaskResponse, None]:
        return self._router.events(run.job, run.candidates, run.hold.answered_by)

    async def _stream(
        self, task: Task, run: _Run, deadline: asyncio.Timeout
    ) -> AsyncGenerator[StreamTaskResponse, None]:
        """The contract's order of events: `started` with the first one, the held one or the result last."""
        fold, hold = run.fold, run.hold
        delivered = Delivered()
        hold.delivering(lambda: run.kind.partly(run.job.input, run.bound, delivered))
        started = False
        async with aclosing(self._events(run)) as events:
            async for event in events:
                passed = fold.add(event)
                if passed is not None:
                    size = _size(passed)
                    if size:
                        hold.came(size)
                        delivered.size += size
                        delivered.pieces += 1
                    if not started:
                        started = True
                        yield _started(task, run)
                    yield passed
        result = _result(task, run)
        last = fold.finish(result)
        await self._settle(run, result, deadline)
        if not started:
            yield _started(task, run)
        yield StreamTaskResponse(result=result) if last is None else last

    async def _settle(self, run: _Run, result: TaskResult, deadline: asyncio.Timeout) -> None:
        """Charges a finished task, and keeps its answer where it has an Idempotency-Key. No deadline passes
        from here on: what is being charged is delivered.

        Raises:
            PomeloError: store_unavailable.
        """
        if deadline.expired():
            await asyncio.sleep(0)  # it is told here
        deadline.reschedule(None)
        hold = run.hold
        if not hold.size:
            hold.came(_result_size(result))
        answer = None
        if run.keep:
            answer = repeats.kept(result, _wanted(run.job.input), self._media, stream=run.job.stream)
        used, counted = run.fold.used()
        await hold.settle(used, counted=counted, answer=answer)

    def _audio(self, audio: AudioInput, principal: Principal) -> AudioSource:
        if audio.media_id:
            try:
                path, media = self._media.find(audio.media_id, principal.account)
            except PomeloError as error:
                raise invalid("audio", "a medium that this account uploaded within the last hour") from error
            return AudioSource(media.content_type, media.size_bytes, path=path)
        size = len(audio.data)
        if size > self._inline_limit:
            raise PomeloError(
                "payload_too_large",
                f"audio is larger than the {self._inline_limit:,} bytes that may be inline. Upload it",
                field="audio",
            )
        return AudioSource(sniff(audio.content_type, audio.data[:16]), size, data=audio.data)

    # --- telling of models

    def _describe(self, model: Model, principal: Principal) -> model_pb.Model:
        route = model.routes[0]
        try:
            found = self._router.candidates(model, TASK_TYPES[model.task_type].name, live=principal.live)
            if principal.live:  # a test key pays what the first route costs
                route = found[0].route
            available = True
        except PomeloError:
            available = False
        limits = model.limits
        prices, price_version = model.priced(route)
        return model_pb.Model(
            name=model.name,
            task_type=model.task_type,
            limits=model_pb.ModelLimits(
                max_input_tokens=limits.max_input_tokens,
                max_output_tokens=limits.max_output_tokens,
                max_characters=limits.max_characters,
                max_audio_seconds=limits.max_audio_seconds,
            ),
            prices=[model_pb.Price(unit=unit, amount_micros=micros) for unit, micros in prices.items()],
            price_version=price_version,
            available=available,
        )


class _Replay:
    """The answer to a request that was answered before."""

    def __init__(self, answer: bytes, given: Any, account: str, media: MediaStore, *, stream: bool) -> None:
        self._answer = answer
        self._account = account
        self._media = media
        self.result = repeats.again(answer, _wanted(given), account, media, stream=stream)

    async def events(self) -> AsyncGenerator[StreamTaskResponse, None]:
        """It as a stream."""
        for event in repeats.replayed(self._answer, self.result, self._account, self._media):
            yield event


def _end_now(deadline: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it is ending anyway
        deadline.reschedule(0)


def _drop(spent: Path | None) -> None:
    """Deletes an upload that nobody can want any more."""
    if spent is not None:
        with suppress(OSError):  # it expires soon
            spent.unlink(missing_ok=True)


def _wanted(given: Any) -> "ResponseFormat.ValueType":
    return getattr(given, "response_format", ResponseFormat.RESPONSE_FORMAT_UNSPECIFIED)


async def _heard(audio: AudioSource | None) -> Heard:
    """How long a sound is.

    Raises:
        PomeloError: store_unavailable.
    """
    if audio is None:
        return Heard()
    try:
        seconds = await asyncio.to_thread(_seconds, audio)
    except OSError as error:
        raise PomeloError("store_unavailable") from error
    return Heard(audio.size, ceil((seconds or 0) * 1000))


def _seconds(audio: AudioSource) -> float | None:
    with audio.path.open("rb") if audio.path is not None else BytesIO(audio.data) as file:
        return sounds.seconds(file, audio.size, audio.content_type)


def _cut(given: Any, bound: Bound, affordable_tokens: int) -> Any:
    """A text input whose answer is not longer than what was held for it; the given one where it can't be."""
    most = min(bound.most.output_tokens, affordable_tokens)
    if given.HasField("max_tokens"):
        if given.max_tokens == most:
            return given
    elif most >= bound.most.output_tokens:
        return given  # the model's own maximum, whatever it is, is paid for
    cut = type(given)()
    cut.CopyFrom(given)
    cut.max_tokens = most
    return cut


def _size(event: StreamTaskResponse) -> int:
    """Bytes of output that an event bears."""
    if event.HasField("text_delta"):
        text = event.text_delta.content
        return len(text) if text.isascii() else len(text.encode())
    return len(event.audio_chunk.data)


def _result_size(result: TaskResult) -> int:
    """Bytes of output that a result bears or leads to."""
    which = result.WhichOneof("output")
    if which == "text":
        return len(result.text.content.encode())
    if which == "transcription":
        return len(result.transcription.text.encode())
    if which is None:
        return 0  # a stream of text that had none
    part = result.speech if which == "speech" else result.image.images[0]
    return len(part.data) or part.media.size_bytes


def _started(task: Task, run: _Run) -> StreamTaskResponse:
    started = TaskStarted(id=run.job.task_id, model=task.model)
    started.created.seconds = run.created
    return StreamTaskResponse(started=started)


def _result(task: Task, run: _Run) -> TaskResult:
    result = TaskResult(id=run.job.task_id, model=task.model)
    result.created.seconds = run.created
    return result
