"""The engine: runs tasks. Each task is accepted, reserved, run by a provider and settled, in this order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import partial
from typing import Any

from pomelo import money
from pomelo.accounts.access import Access
from pomelo.call import CHARGED_HEADER, REPLAYED_HEADER, Call, Principal, report_adjustments
from pomelo.catalog.pricing import affordable_output_tokens
from pomelo.engine import idempotency, shared_media
from pomelo.engine.acceptance import Acceptance
from pomelo.engine.job import AcceptedJob
from pomelo.engine.ledger import Ledger
from pomelo.engine.observed import ObservedTask
from pomelo.engine.reservation import STATUS_TIMEOUT, Reservation
from pomelo.engine.results import new_result, started_event, write_usage
from pomelo.engine.routing import Events, Router
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskSpec
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.media.content_types import storable_type
from pomelo.media.store import MediaStore
from pomelo.providers.base import Job
from pomelo.runtime.process import CancelScope
from pomelo.runtime.turns import Turns, in_turns
from pomelo.stores.ledger import ReplayedAnswer
from pomelo.stores.usage import CANCELLED
from pomelo.tasks.base import Collector, CollectorContext
from pomelo.telemetry.events import Observer


class Engine:
    """Runs tasks in this process; implements `pomelo.service.TaskService`. `turns` are those of the event
    loop; `observers` get a report of each task and each failed attempt."""

    def __init__(
        self,
        access: Access,
        acceptance: Acceptance,
        ledger: Ledger,
        router: Router,
        media: MediaStore,
        turns: Turns,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._access = access
        self._acceptance = acceptance
        self._ledger = ledger
        self._router = router
        self._media = media
        self._turns = turns
        self._replays = idempotency.ReplayQueue()
        self._observe = partial(ObservedTask, observers, ledger.monotonic)

    async def run_task(self, spec: TaskSpec, options: TaskOptions, call: Call) -> TaskResult:
        principal = await self._access.authenticate(call)
        try:
            with self._observe(call, principal, spec.model, stream=False) as task:
                deadline = CancelScope(call.deadline).start()
                reservation = await self._begin(spec, options, call, principal, task, deadline, stream=False)
                if isinstance(reservation, idempotency.ReplayedTask):
                    deadline.ended_by(None)
                    task.replayed = True
                    return reservation.result
                task.reservation = reservation
                accepted = reservation.accepted
                collector = self._collect(reservation, deadline)
                reservation.on_lost = deadline.expire
                try:
                    answer = await self._router.start(
                        reservation.job, accepted.candidates, task.calls, reservation.record_route
                    )
                    if isinstance(answer, TaskEvent):
                        collector.add(answer)
                    else:
                        await self._add_all(answer, collector)
                    result = new_result(reservation.job, accepted.created)
                    if reservation.job.route is not accepted.job.route:  # a later route has taken over
                        report_adjustments(call, result.adjustments)
                    collector.finish(result)
                    if self._media.shared:
                        await shared_media.share_output(result, accepted, self._media)
                    await self._settle(reservation, collector, result, deadline)
                except BaseException as error:
                    await self._fail(reservation, collector, deadline, error, task)
                    raise
                collector.close()
                return result
        finally:
            self._delete_upload(spec, call, principal)
            call.end()

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[TaskEvent]]:
        principal = await self._access.authenticate(call)
        try:
            with self._observe(call, principal, spec.model, stream=True) as task:
                deadline = CancelScope(call.deadline).start()
                reservation = await self._begin(spec, options, call, principal, task, deadline, stream=True)
                if isinstance(reservation, idempotency.ReplayedTask):
                    task.replayed = True
                    self._delete_upload(spec, call, principal)
                    try:
                        async with aclosing(in_turns(reservation.events(), self._turns.stream())) as events:
                            yield events
                    except BaseException as error:
                        if deadline.ended_by(error):
                            raise PomeloError("deadline_exceeded") from error
                        raise
                    deadline.ended_by(None)
                    return
                task.reservation = reservation
                collector = self._collect(reservation, deadline)
                reservation.on_lost = deadline.expire
                try:
                    async with aclosing(self._stream(call, reservation, collector, deadline, task)) as events:
                        yield events
                except BaseException as error:
                    await self._fail(reservation, collector, deadline, error, task)
                    raise
                else:
                    deadline.ended_by(None)
                    collector.close()
                    reservation.release()  # if the caller did not read the events to their end
        finally:
            self._delete_upload(spec, call, principal)
            call.end()

    # --- accepted and reserved

    async def _begin(
        self,
        spec: TaskSpec,
        options: TaskOptions,
        call: Call,
        principal: Principal,
        task: ObservedTask,
        deadline: CancelScope,
        *,
        stream: bool,
    ) -> Reservation | idempotency.ReplayedTask:
        """Accepts and reserves a task; or finds the answer to its Idempotency-Key. A refusal has the limits
        in the response headers, if the store reports them before or soon after the deadline.

        Raises:
            PomeloError: what `Acceptance.accept` and `_reserve` raise; deadline_exceeded (nothing is reserved
                then).
        """
        try:
            try:
                accepted = await self._acceptance.accept(spec, options, call, principal, stream=stream)
            except PomeloError:
                await self._access.report_limits(call, principal, spec.model)
                raise
            task.accepted = accepted
            return await self._reserve(accepted, call)
        except BaseException as error:
            if not deadline.ended_by(error):
                raise
            with suppress(PomeloError, TimeoutError):  # the store may be what was too slow
                async with asyncio.timeout(STATUS_TIMEOUT):
                    await self._access.report_limits(call, principal, spec.model)
            raise PomeloError("deadline_exceeded") from error

    async def _reserve(self, accepted: AcceptedJob, call: Call) -> Reservation | idempotency.ReplayedTask:
        """Reserves what the job needs, and fits the job to it; or finds the answer to its Idempotency-Key.

        Raises:
            PomeloError: what `Ledger.reserve`, `Call.reserve` and `ReplayedTask` raise;
                provider_not_configured, or why the output can't be stored (nothing is reserved then);
                store_unavailable.
        """
        reserved = await self._ledger.reserve(accepted, self._access.plan(accepted.principal), call)
        if isinstance(reserved, ReplayedAnswer):
            call.reserve(len(reserved.answer))  # before it waits: a thousand replays may wait at a time
            await self._replays.turn(reserved, accepted)
            if self._media.shared:
                await shared_media.fetch_answer(reserved.answer, accepted.principal.owner, self._media, call)
            replayed = idempotency.ReplayedTask(reserved, accepted, self._media, call)
            if call.strict:
                replayed.check_strict()
            call.response_headers |= {CHARGED_HEADER: money.format_credits(0), REPLAYED_HEADER: "true"}
            report_adjustments(call, replayed.result.adjustments)
            return replayed
        try:
            if not accepted.candidates:
                raise PomeloError("provider_not_configured", field="model")
            if accepted.media_bytes:
                self._media.check_answer(accepted.principal.owner, accepted.media_bytes)
        except PomeloError:
            await reserved.refuse()
            raise
        try:
            reserved.job = _limit_output(accepted, reserved.amount)
        except BaseException:
            reserved.release()
            raise
        if reserved.job.adjustments:
            report_adjustments(call, reserved.job.adjustments)
        return reserved

    def _delete_upload(self, spec: TaskSpec, call: Call, principal: Principal) -> None:
        """Deletes an upload that came within a REST request: the caller doesn't know its id, so no other
        request can use it."""
        if call.protocol != "rest":
            return
        given = getattr(spec, spec.WhichOneof("input") or "text")
        if "audio" in given.DESCRIPTOR.fields_by_name and given.audio.media_id:
            self._media.delete(given.audio.media_id, principal.owner)

    # --- running

    def _collect(self, reservation: Reservation, deadline: CancelScope) -> Collector:
        accepted, job = reservation.accepted, reservation.job
        try:
            return accepted.definition.collector(
                CollectorContext(
                    job.input,
                    job.model,
                    accepted.estimate,
                    job.stream,
                    accepted.delivery,
                    job.report,
                    lambda content_type: self._media.writer(
                        accepted.principal.owner, storable_type(content_type)
                    ),
                    accepted.idempotency_key is not None,
                )
            )
        except BaseException:
            deadline.ended_by(None)
            reservation.release()
            raise

    async def _fail(
        self,
        reservation: Reservation,
        collector: Collector,
        deadline: CancelScope,
        error: BaseException,
        task: ObservedTask,
    ) -> None:
        """Ends the reservation of a task that `error` ended.

        Raises:
            PomeloError: deadline_exceeded, or store_unavailable if the store took this process for dead; it
                replaces `error`.
        """
        unsent = task.calls.attempts == task.calls.unsent  # no provider has seen it
        if unsent:
            reservation.forget_route()
        try:
            collector.close()
            if deadline.ended_by(error):
                code = "store_unavailable" if reservation.lost else "deadline_exceeded"
                await reservation.fail(code)
                raise PomeloError(code) from error
            if isinstance(error, Exception) and not task.left_with(error):
                if unsent:
                    await reservation.refuse()
                else:
                    await reservation.fail(error.code if isinstance(error, PomeloError) else "internal_error")
        finally:
            reservation.release("deadline_exceeded" if task.is_late(error) else CANCELLED)

    async def _add_all(self, events: Events, collector: Collector) -> None:
        """Collects the events of an answer that is not streamed."""
        turn = self._turns.stream()
        async with aclosing(events):
            async for event in events:
                if turn.over():
                    await turn.next()
                collector.add(event)

    async def _stream(
        self,
        call: Call,
        reservation: Reservation,
        collector: Collector,
        deadline: CancelScope,
        task: ObservedTask,
    ) -> AsyncGenerator[TaskEvent, None]:
        """The events in the contract's order, numbered: `started` with the first one, `completed` last."""
        try:
            reservation.bill_partially(collector)
            created = reservation.accepted.created
            number = 0
            turn = self._turns.stream()
            candidates = reservation.accepted.candidates
            answer = await self._router.start(
                reservation.job, candidates, task.calls, reservation.record_route
            )
            assert not isinstance(answer, TaskEvent)  # which is for whole answers
            async with aclosing(answer) as events:
                async for event in events:
                    if turn.over():
                        await turn.next()
                    passed = collector.add(event)
                    if passed is not None:
                        if number:
                            reservation.output_bytes = collector.output_bytes
                        else:
                            reservation.record_output(collector.output_bytes)
                            number = 1
                            # A later route may have taken over, with adjustments of its own.
                            report_adjustments(call, reservation.job.adjustments)
                            yield started_event(new_result(reservation.job, created))
                        number += 1
                        passed.sequence_number = number
                        yield passed
            result = new_result(reservation.job, created)
            collector.finish(result)
            if self._media.shared:
                await shared_media.share_output(result, reservation.accepted, self._media)
            if collector.output_bytes > reservation.output_bytes:
                reservation.record_output(collector.output_bytes)
            await self._settle(reservation, collector, result, deadline)
            if not number:
                number = 1
                report_adjustments(call, reservation.job.adjustments)
                yield started_event(result)
            for rest in collector.end_stream(result):
                number += 1
                rest.sequence_number = number
                yield rest
            yield TaskEvent(sequence_number=number + 1, completed=result)
        except Exception as error:
            task.failure = error
            raise

    async def _settle(
        self, reservation: Reservation, collector: Collector, result: TaskResult, deadline: CancelScope
    ) -> None:
        """Charges a finished task, writes its usage and cost into its result, and stores its answer if it has
        an Idempotency-Key. The deadline no longer applies: what is charged is delivered.

        Raises:
            PomeloError: store_unavailable.
        """
        if collector.must_count:
            await asyncio.to_thread(collector.count)
        deadline.stop()
        accepted = reservation.accepted
        if not reservation.output_bytes:
            reservation.record_output(collector.output_bytes or accepted.definition.output_size(result))
        answer = None
        if accepted.idempotency_key is not None:
            answer = idempotency.store_answer(
                result, accepted.delivery, self._media, stream=reservation.job.stream
            )
        usage, counted = collector.usage(reservation.job.input)
        write_usage(result, await reservation.settle(usage, counted=counted, answer=answer))


def _limit_output(accepted: AcceptedJob, reserved: int) -> Job[Any]:
    """The job with the maximum output that `reserved` microcredits pay for, if its output can be limited."""
    job, estimate = accepted.job, accepted.estimate
    if accepted.definition.limit_output is None:
        return job
    affordable = affordable_output_tokens(reserved, estimate.maximum.input_tokens, accepted.prices)
    tokens = accepted.definition.limit_output(job.input, estimate, affordable)
    if tokens is None:
        return job
    fitted = job.input
    if fitted.max_tokens != tokens:
        assert job.given is not None
        fitted = accepted.candidates[0].fit(job.given, job.model, tokens).input
    return job.with_output_limit(fitted, tokens)
