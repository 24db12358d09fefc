"""The engine: takes a task in, finds who serves it, and folds or passes on what comes.

It implements the ports `TaskService` and `ModelService` for this process. It knows no transport; what a
kind of task is stands in `pomelo.tasks`, what a vendor's wire is in `pomelo.providers`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pomelo.call import Call, Principal
from pomelo.catalog import Catalog, Model
from pomelo.errors import PomeloError, invalid
from pomelo.gen.v1 import model_service_pb2 as model_pb
from pomelo.gen.v1.speech_pb2 import AudioInput
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse, TaskStarted
from pomelo.ids import new_id
from pomelo.media import MediaStore, sniff
from pomelo.providers.base import AudioSource, Job
from pomelo.routing import Candidate, Router
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import Fold, Folding

INLINE_LIMIT = 4 * 1024 * 1024
"""Bytes of sound that may ride in a task."""


@dataclass(frozen=True, slots=True)
class _Run:
    """A task that was taken in."""

    job: Job
    candidates: list[Candidate]
    fold: Fold
    created: int
    spent: Path | None
    """An upload that is of no use once the task has ended."""


class Engine:
    """Runs tasks on providers.

    `router` knows who serves a model; `authenticate` tells whose key a call bears and fills its reply; `now`
    is Unix time in seconds.
    """

    def __init__(
        self,
        *,
        catalog: Catalog,
        router: Router,
        authenticate: Callable[[Call], Awaitable[Principal]],
        media: MediaStore,
        inline_limit: int = INLINE_LIMIT,
        now: Callable[[], float] = time.time,
        ids: Callable[[str], str] = new_id,
    ) -> None:
        self._catalog = catalog
        self._router = router
        self._authenticate = authenticate
        self._media = media
        self._inline_limit = inline_limit
        self._now = now
        self._ids = ids

    # --- TaskService

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """See the port."""
        run = await self._take_in(task, call, stream=False)
        result = _result(task, run)
        async with self._until_deadline(run):
            async with aclosing(self._router.events(run.job, run.candidates)) as events:
                async for event in events:
                    run.fold.add(event)
            run.fold.finish(result)
        return result

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[StreamTaskResponse]]:
        """See the port."""
        run = await self._take_in(task, call, stream=True)
        async with self._until_deadline(run), aclosing(self._stream(task, run)) as events:
            yield events

    # --- ModelService

    async def list_models(self, call: Call) -> list[model_pb.Model]:
        """See the port."""
        principal = await self._enter(call)
        return [
            self._describe(model, principal)
            for model in self._catalog.models.values()
            if principal.models is None or model.name in principal.models
        ]

    async def get_model(self, name: str, call: Call) -> model_pb.Model:
        """See the port."""
        principal = await self._enter(call)
        return self._describe(self._allowed(name, principal), principal)

    # --- taking in

    async def _enter(self, call: Call) -> Principal:
        """Whose call it is, if it may come in.

        Raises:
            PomeloError: invalid_api_key, invalid_parameter (of a header), store_unavailable.
        """
        principal = await self._authenticate(call)
        if call.fault is not None:
            raise call.fault
        return principal

    def _allowed(self, name: str, principal: Principal) -> Model:
        model = self._catalog.resolve(name)
        if principal.models is not None and name not in principal.models:
            raise PomeloError("model_not_allowed", field="model")
        return model

    async def _take_in(self, task: Task, call: Call, *, stream: bool) -> _Run:
        """Everything that can be refused before a provider is called."""
        principal = await self._enter(call)
        if not task.model:
            raise PomeloError("missing_parameter", "Missing required field: model", field="model")
        model = self._allowed(task.model, principal)
        kind = TASK_TYPES[model.task_type]
        # An input of another kind is an empty one of this kind: its required fields are missing.
        given = getattr(task, kind.name)
        kind.check(given, model)
        audio = self._audio(given.audio, principal) if kind.audio else None
        candidates = self._router.candidates(model, kind.name, live=principal.live)
        job = Job(
            task_id=self._ids(kind.id_prefix),
            model=model,
            route=candidates[0].route,
            input=given,
            stream=stream,
            deadline=call.deadline,
            audio=audio,
        )
        fold = kind.fold(Folding(given, stream, partial(self._media.writer, principal.account)))
        # What came with a REST request has no name that its caller knows: no other task can want it.
        spent = audio.path if audio is not None and call.wire == "rest" else None
        return _Run(job, candidates, fold, int(self._now()), spent)

    @asynccontextmanager
    async def _until_deadline(self, run: _Run) -> AsyncIterator[None]:
        """The life of a task: bounded by its deadline, freed however it ends.

        Raises:
            PomeloError: deadline_exceeded.
        """
        deadline = asyncio.timeout_at(run.job.deadline)
        try:
            async with deadline:
                yield
        except TimeoutError as error:
            if not deadline.expired():
                raise  # a fault that bears the same name
            raise PomeloError("deadline_exceeded") from error
        finally:
            run.fold.close()
            if run.spent is not None:
                with suppress(OSError):  # it expires soon
                    run.spent.unlink(missing_ok=True)

    async def _stream(self, task: Task, run: _Run) -> AsyncGenerator[StreamTaskResponse, None]:
        """The contract's order of events: `started` with the first one, the held one or the result last."""
        fold = run.fold
        started = False
        async with aclosing(self._router.events(run.job, run.candidates)) as events:
            async for event in events:
                passed = fold.add(event)
                if passed is not None:
                    if not started:
                        started = True
                        yield _started(task, run)
                    yield passed
        result = _result(task, run)
        last = fold.finish(result)
        if not started:
            yield _started(task, run)
        yield StreamTaskResponse(result=result) if last is None else last

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


def _started(task: Task, run: _Run) -> StreamTaskResponse:
    started = TaskStarted(id=run.job.task_id, model=task.model)
    started.created.seconds = run.created
    return StreamTaskResponse(started=started)


def _result(task: Task, run: _Run) -> TaskResult:
    result = TaskResult(id=run.job.task_id, model=task.model)
    result.created.seconds = run.created
    return result
