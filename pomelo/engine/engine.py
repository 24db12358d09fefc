"""The engine: runs a task that was taken in, folds or passes on what comes, and settles the bill.

It implements the port `TaskService` for this process. It knows no transport; what is refused before a
provider is asked stands in `pomelo.engine.intake`, what a kind of task is in `pomelo.tasks`, what a vendor's
wire is in `pomelo.providers`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial

from pomelo.call import Call, report_adjustments
from pomelo.engine import idempotency
from pomelo.engine.intake import Intake, ReplayedTask, Run, requested_format
from pomelo.engine.routing import Router
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import Task, TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse, TaskStarted
from pomelo.media.store import MediaStore
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.turns import Turns, in_turns


class Engine:
    """Runs the tasks that `intake` lets in on the providers that `router` knows.

    `turns` are those of the event loop.
    """

    def __init__(self, intake: Intake, router: Router, media: MediaStore, turns: Turns) -> None:
        self._intake = intake
        self._router = router
        self._media = media
        self._turns = turns

    async def run_task(self, task: Task, call: Call) -> TaskResult:
        """See the port."""
        run = await self._intake.take_in(task, call, stream=False)
        if isinstance(run, ReplayedTask):
            return run.result
        turn = self._turns.stream()
        async with self._life(run) as deadline:
            async with aclosing(self._events(run)) as events:
                async for event in events:
                    if turn.over():
                        await turn.next()
                    run.fold.add(event)
            result = _result(task, run)
            report_adjustments(call, result.adjustments)  # another route than the first may have answered
            run.fold.finish(result)
            await self._settle(run, result, deadline)
        return result

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[StreamTaskResponse]]:
        """See the port."""
        run = await self._intake.take_in(task, call, stream=True)
        if isinstance(run, ReplayedTask):
            async with aclosing(in_turns(run.events(), self._turns.stream())) as events:
                yield events
            return
        async with self._life(run) as deadline, aclosing(self._stream(task, call, run, deadline)) as events:
            yield events

    # --- running

    @asynccontextmanager
    async def _life(self, run: Run) -> AsyncIterator[asyncio.Timeout]:
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
        except Exception as error:
            run.fold.close()
            if _not_begun(error) and not hold.size:
                await hold.refuse()
            else:
                await hold.fail()
            raise
        finally:
            try:
                run.fold.close()
            finally:
                hold.leave()
                run.drop()

    def _events(self, run: Run) -> AsyncGenerator[StreamTaskResponse, None]:
        account = run.hold.wallet.account
        return self._router.events(run.job, run.candidates, run.asked, account=account)

    async def _stream(
        self, task: Task, call: Call, run: Run, deadline: asyncio.Timeout
    ) -> AsyncGenerator[StreamTaskResponse, None]:
        """The contract's order of events: `started` with the first one, the held one or the result last."""
        fold, hold, delivered = run.fold, run.hold, run.delivered
        hold.delivering(lambda: run.kind.partly(run.job.input, run.bound, delivered))
        started = False
        turn = self._turns.stream()
        async with aclosing(self._events(run)) as events:
            async for event in events:
                if turn.over():
                    await turn.next()
                passed = fold.add(event)
                if passed is not None:
                    size = _size(passed)
                    if size:
                        hold.came(size)
                        delivered.size += size
                        delivered.pieces += 1
                    if not started:
                        started = True
                        report_adjustments(call, run.job.adjustments)  # another route may have taken over
                        yield _started(task, run)
                    yield passed
        result = _result(task, run)
        last = fold.finish(result)
        await self._settle(run, result, deadline)
        if not started:
            report_adjustments(call, run.job.adjustments)
            yield _started(task, run)
        yield StreamTaskResponse(result=result) if last is None else last

    async def _settle(self, run: Run, result: TaskResult, deadline: asyncio.Timeout) -> None:
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
            answer = idempotency.store_answer(
                result, requested_format(run.job.input), self._media, stream=run.job.stream
            )
        used, counted = run.fold.used()
        await hold.settle(used, counted=counted, answer=answer)


def _not_begun(error: Exception) -> bool:
    """Whether a task failed because there was no connection to send it on."""
    if not isinstance(error, UpstreamError) or error.code != "overloaded":
        return False
    return error.retry is not RetryPolicy.NEVER


def _end_now(deadline: asyncio.Timeout) -> None:
    with suppress(RuntimeError):  # it is ending anyway
        deadline.reschedule(0)


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


def _started(task: Task, run: Run) -> StreamTaskResponse:
    started = TaskStarted(id=run.job.task_id, model=task.model, adjustments=run.job.adjustments)
    started.created.seconds = run.created
    return StreamTaskResponse(started=started)


def _result(task: Task, run: Run) -> TaskResult:
    result = TaskResult(id=run.job.task_id, model=task.model, adjustments=run.job.adjustments)
    result.created.seconds = run.created
    return result
