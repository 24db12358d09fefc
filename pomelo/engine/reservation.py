"""Admission: what a task must have before its provider is called, and what becomes of it in the end.

`Admission.enter` takes all of it from the store in one step, or refuses; the `Hold` that it gives is settled
once or left once. Which limits and prices there are comes in; how they are counted is the store's. What
callers are told of it, on both wires, is written by `told`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from pomelo import money
from pomelo.accounts.plans import Plan
from pomelo.call import Call, Principal
from pomelo.catalog.pricing import Prices, Usage, cost, encode_prices, max_cost
from pomelo.catalog.reported_cost import Report, billed
from pomelo.engine.limits import limit_headers, refusal
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.ids import new_id
from pomelo.logs import UnexpectedErrors
from pomelo.process import is_cancelled, periodically
from pomelo.stores.ledger import (
    IdempotencyKey,
    LedgerStore,
    LimitStatus,
    LostReservationError,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UnknownOutcomeError,
    UsageRecord,
    Wallet,
)

if TYPE_CHECKING:
    from pomelo.catalog.catalog import Model, Route

PROGRESS_INTERVAL = 1.0
"""Seconds between notes of what running tasks have used: what a crash can leave unbilled."""

STATUS_TIMEOUT = 0.2
"""Seconds that the answer to a failed task waits for the store to tell its credits."""

RECONCILE_INTERVAL = 10.0
"""Seconds between looks for reservations of this process whose tasks it does not run. A reservation
that two successive looks find is ended."""

_PAUSE = 0.5
_LONGEST_PAUSE = 8.0
"""Seconds before ending a task is retried after a failure: the first wait, and the longest."""

_AT_ONCE = 64
"""The most task ends that are retried concurrently."""

_RECOVERED_MOST = 1_024
"""The most reservations that one look ends."""

log = logging.getLogger("pomelo.admission")

T = TypeVar("T")


class Reservation:
    """What one running task has taken. Settled once or left once; then it is over."""

    __slots__ = (
        "_admission", "_call", "_draft", "_noted", "_over", "_plan", "_prices", "_report", "_standing",
        "_started", "_used", "amount", "first_byte_ms", "lost", "on_lost", "size",
    )  # fmt: skip

    def __init__(
        self,
        admission: Ledger,
        call: Call,
        plan: Plan,
        draft: UsageRecord,
        prices: Prices,
        taken: Reserved,
    ) -> None:
        self._admission = admission
        self._standing = taken.limit_status
        self._call = call
        self._plan = plan
        self._draft = draft
        self._prices = prices
        self._report = Report()
        self._started = admission.monotonic()
        self._used: Callable[[], Usage] | None = None
        self._noted = 0
        self._over = False
        self.amount = taken.held
        """Microcredits that are held."""
        self.size = 0
        """Bytes of output so far."""
        self.first_byte_ms = 0
        self.lost = False
        """Whether the store has charged it already, because this process was taken for dead."""
        self.on_lost: Callable[[], None] = lambda: None

    @property
    def wallet(self) -> Wallet:
        """Who pays."""
        return self._draft.wallet

    def came(self, size: int) -> None:
        """So many bytes of output have come."""
        if not self.size:
            self.first_byte_ms = self._elapsed()
        self.size += size

    def delivering(self, used: Callable[[], Usage]) -> None:
        """What has come goes out piece by piece: an answer that ends early costs what `used` tells then."""
        self._used = used

    def answered_by(self, route: Route, report: Report) -> None:
        """Which route is asked now, and where its provider reports what the task costs."""
        self._draft = replace(self._draft, provider=route.provider, provider_model=route.model)
        self._report = report

    def note(self) -> UsageRecord | None:
        """What it has used and cost so far, where that is more than at the last time."""
        if self._used is None or self.size == self._noted:
            return None
        self._noted = self.size
        return self._record(self._used(), "estimated", complete=False)

    async def settle(self, used: Usage, *, counted: bool, answer: bytes | None = None) -> None:
        """The task is done: charges it, keeps its record, frees the rest, and tells the caller what it cost.

        If the settlement fails, the caller gets no answer. If it is known that nothing was written,
        the task ends as by `leave`. If the outcome is unknown, the settlement is retried until it
        is known, since the record may have been written.

        Raises:
            PomeloError: store_unavailable; the settlement failed, or the hold was lost.
        """
        record = self._record(used, "provider" if counted else "estimated", complete=True)
        settlement = Settlement(record, tokens=used.input_tokens + used.output_tokens, answer=answer)
        self._end()
        settling = self._admission.see_to(
            record.task_id, partial(self._admission.store.settle, settlement), instead=self._let_go
        )
        try:
            settled = await self._admission.outcome(lambda: asyncio.shield(settling))
        except LostReservationError as error:
            raise PomeloError("store_unavailable") from error
        self._tell(settled.limit_status, settled.record.cost)

    def leave(self) -> None:
        """The caller has left: what was delivered is charged, all else is free.

        Begins at once and is done by itself, also where this task is being cancelled. After the end nothing
        happens.
        """
        if not self._over:
            self._end()
            self._let_go()

    async def fail(self) -> None:
        """The task has failed: as `leave`, and the caller is told what it cost. Never raises."""
        if self._over:
            return
        self._end()
        ending = self._let_go()
        try:
            async with asyncio.timeout(STATUS_TIMEOUT):
                settled = await self._admission.outcome(lambda: asyncio.shield(ending))
                if settled is not None:
                    self._tell(settled.limit_status, settled.record.cost)
                else:
                    standing = await self._admission.limit_status(self.wallet, self._draft.model)
                    self._tell(standing, None if self.lost else 0)
        except (PomeloError, LostReservationError, TimeoutError):
            pass  # The store is failing: the caller keeps the headers written at the start.

    async def refuse(self) -> None:
        """The task was not begun after all: everything is given back, its request of this minute, too.

        Raises:
            PomeloError: store_unavailable.
        """
        self._end()
        self._call.response_headers.pop("X-Credits-Charged", None)
        giving = self._admission.give_back(self._draft)
        await self._admission.outcome(lambda: asyncio.shield(giving))
        self._tell(await self._admission.limit_status(self.wallet, self._draft.model), None)

    def _let_go(self) -> asyncio.Future[Settled | None]:
        """Charges what was delivered, or frees all; begins at once."""
        if self.lost:
            done: asyncio.Future[Settled | None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        return self._admission.see_to(self._draft.task_id, self._letting_go())

    def _letting_go(self) -> Callable[[], Awaitable[Settled | None]]:
        """The store operation that ends a task which did not complete."""
        store, task_id = self._admission.store, self._draft.task_id
        if self._used is None or not self.size:
            return partial(store.void, self.wallet, task_id)
        try:
            used = self._used()
            record = self._record(used, "estimated", complete=False)
        except Exception as error:
            self._admission.unexpected.log("What a task used could not be counted", error)
            return partial(store.recover, self.wallet, task_id)
        return partial(store.settle, Settlement(record, tokens=used.input_tokens + used.output_tokens))

    def _tell(self, standing: LimitStatus, cost: int | None) -> None:
        """Tells the caller of limits and credits; `cost` None: it is unknown or there is none."""
        told = limit_headers(
            self._plan, standing, self._admission.now(), tokens=self._draft.task_type == "text"
        )
        if cost is not None:
            told["X-Credits-Charged"] = money.format_credits(cost)
        self._call.response_headers |= told
        self._call.response_trailers |= told

    def _end(self) -> None:
        self._over = True
        self._admission.running.pop(self._draft.task_id, None)

    def _elapsed(self) -> int:
        return round((self._admission.monotonic() - self._started) * 1000)

    def _record(self, used: Usage, source: str, *, complete: bool) -> UsageRecord:
        draft = self._draft
        whose = f"request {draft.request_id}: the provider {draft.provider}"
        used = billed(used, self._report, self._prices, self.amount, whose)
        return replace(
            draft,
            input_tokens=used.input_tokens,
            cached_input_tokens=used.cached_input_tokens,
            cache_write_input_tokens=used.cache_write_input_tokens,
            cache_write_1h_input_tokens=used.cache_write_1h_input_tokens,
            output_tokens=used.output_tokens,
            characters=used.characters,
            images=used.images,
            pixels=used.pixels,
            audio_ms=used.audio_ms,
            provider_micros=used.provider_micros,
            processing_ms=self._elapsed(),
            first_byte_ms=self.first_byte_ms,
            output_bytes=self.size,
            cost=cost(used, self._prices),
            source=source,
            complete=complete,
            at=self._admission.now(),
        )


class _Ending:
    """An idempotent store operation that ends a task. `instead` replaces its retries if it is known
    to have failed without effect; with `once` it is not retried. `due` is monotonic."""

    __slots__ = ("due", "instead", "once", "pause", "task_id", "work")

    def __init__(
        self,
        task_id: str,
        work: Callable[[], Awaitable[Any]],
        once: bool,
        instead: Callable[[], object] | None,
    ) -> None:
        self.task_id = task_id
        self.work = work
        self.once = once
        self.instead = instead
        self.pause = _PAUSE / 2
        self.due = 0.0


class Ledger:
    """Admits tasks and ends them. `now` is Unix time, `monotonic` times tasks, and
    `reconcile_every` is the interval between looks for reservations whose tasks are not running;
    all are in seconds.

    Every admitted task is ended: no store error, expected or not, drops one. Each end is retried
    until its outcome is known; `reconcile` ends what is left.
    """

    def __init__(
        self,
        store: LedgerStore,
        plans: Mapping[str, Plan],
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        reconcile_every: float = RECONCILE_INTERVAL,
    ) -> None:
        self.store = store
        self.now = now
        self.monotonic = monotonic
        self.unexpected = UnexpectedErrors(log)
        self.running: dict[str, Reservation] = {}
        """By task id."""
        self._plans = plans
        self._reconcile_every = reconcile_every
        self._doing: set[asyncio.Future[Any]] = set()
        self._busy: Counter[str] = Counter()
        """Store operations in progress, by task id."""
        self._pending: dict[str, _Ending] = {}
        """Failed ends that wait for a retry, by task id; those that have waited longest are
        first."""
        self._retrying = 0
        self._orphans: set[str] = set()
        """Tasks with a reservation that this process does not run, as of the last look."""

    def plan(self, principal: Principal) -> Plan:
        """What the account may do.

        Raises:
            PomeloError: model_not_allowed; its plan is none any more.
        """
        plan = self._plans.get(principal.plan)
        if plan is None:
            raise PomeloError(
                "model_not_allowed",
                f"The account's plan {principal.plan!r} does not exist any more. Ask the operator for one",
            )
        return plan

    async def tell(self, call: Call, principal: Principal, model: Model | None = None) -> None:
        """Writes the limits and credits of a call that takes nothing into its reply; those of tokens where
        it is about a `model` that counts them.

        Raises:
            PomeloError: store_unavailable.
        """
        plan = self._plans.get(principal.plan, _NO_PLAN)
        name = model.name if model is not None and model.task_type == TaskType.TASK_TYPE_TEXT else ""
        standing = await self.limit_status(Wallet(principal.account, principal.live), name)
        call.response_headers |= limit_headers(plan, standing, self.now(), tokens=bool(name))

    def concurrent(self, principal: Principal) -> int | None:
        """How many tasks the account's plan allows at a time; None: no limit."""
        return self._plans.get(principal.plan, _NO_PLAN).concurrent

    async def count_request(self, call: Call, principal: Principal) -> None:
        """Counts a request toward the minute's limit when its body was refused; reserves nothing.

        Raises:
            PomeloError: rate_limit_exceeded, store_unavailable.
        """
        plan = self._plans.get(principal.plan, _NO_PLAN)
        draft = UsageRecord(
            task_id=new_id("refused_"),
            request_id=call.request_id,
            account=principal.account,
            live=principal.live,
            key_id=principal.key_id,
            wire=call.protocol,
            model="",
            task_type="",
            at=self.now(),
        )
        take = ReserveRequest(draft, minimum=0, maximum=0, requests_limit=plan.requests)
        self._busy[draft.task_id] += 1
        try:
            outcome = await self._take(take)
            if isinstance(outcome, Refused):
                now = self.now()
                call.response_headers |= limit_headers(plan, outcome.limit_status, now, tokens=False)
                raise refusal(outcome, take, now)
            void = partial(self.store.void, draft.wallet, draft.task_id)
            await asyncio.shield(self.see_to(draft.task_id, void))
        finally:
            self._done_with(draft.task_id)

    async def limit_status(self, wallet: Wallet, model: str) -> LimitStatus:
        """A wallet's current limits and credits.

        Raises:
            PomeloError: store_unavailable.
        """
        return await self.outcome(partial(self.store.limit_status, wallet, model))

    def runs(self, task_id: str) -> bool:
        """Whether this process runs a task: it is being admitted, it runs, or its end is in
        progress or waits for a retry."""
        return task_id in self.running or task_id in self._busy or task_id in self._pending

    async def enter(
        self,
        call: Call,
        plan: Plan,
        draft: UsageRecord,
        prices: Prices,
        least: Usage,
        most: Usage,
        *,
        enough: Usage | None = None,
        tokens: int = 0,
        exact: bool = False,
        idempotency_key: IdempotencyKey | None = None,
    ) -> Reservation | ReplayedAnswer:
        """Takes all that a task needs; where its Idempotency-Key was answered before, that answer.

        `draft` says whose task it is and what is asked for; `least` and `most` what it can use, `enough`
        what it may use where others need the rest, `exact` whether `most` is what it will use; `tokens` what
        is likely of a minute's. A caller who leaves meanwhile leaves nothing taken.

        Raises:
            PomeloError: rate_limit_exceeded, concurrency_limit_exceeded, token_limit_exceeded,
                insufficient_credits, idempotency_conflict, idempotency_mismatch, store_unavailable.
        """
        draft = replace(draft, prices=encode_prices(prices), at=self.now())
        is_text = draft.task_type == "text"
        take = ReserveRequest(
            draft,
            minimum=max_cost(least, prices),
            maximum=max_cost(most, prices),
            sufficient=0 if enough is None else max_cost(enough, prices),
            requests_limit=plan.requests,
            concurrency_limit=plan.concurrent,
            tokens=tokens,
            tokens_limit=plan.tokens if is_text else None,
            idempotency_key=idempotency_key,
        )
        self._busy[draft.task_id] += 1
        try:
            outcome = await self._take(take)
            now = self.now()
            call.response_headers |= limit_headers(plan, outcome.limit_status, now, tokens=is_text)
            if isinstance(outcome, Refused):
                raise refusal(outcome, take, now)
            if isinstance(outcome, ReplayedAnswer):
                call.response_headers["X-Credits-Charged"] = money.format_credits(0)
                call.response_headers["Idempotent-Replayed"] = "true"
                return outcome
            if exact and not prices.by_report():  # what a provider reports is known at the end
                call.response_headers["X-Credits-Charged"] = money.format_credits(take.maximum)
            hold = Reservation(self, call, plan, draft, prices, outcome)
            self.running[draft.task_id] = hold
            return hold
        finally:
            self._done_with(draft.task_id)

    async def _take(self, take: ReserveRequest) -> Reserved | Refused | ReplayedAnswer:
        taking = self._begin(partial(self.store.reserve, take))
        try:
            return await self.outcome(lambda: asyncio.shield(taking))
        except LostReservationError as error:
            raise PomeloError("store_unavailable") from error  # It was voided before.
        except (PomeloError, asyncio.CancelledError):
            self._take_back(taking, take.draft)
            raise

    # --- while tasks run

    async def keep_notes(self) -> None:
        """Until cancelled, periodically notes what running tasks have used, ends those whose hold
        is lost, and retries store operations that failed."""

        async def keep() -> None:
            self._retry()
            await self.note()

        await periodically(keep, PROGRESS_INTERVAL, "Notes of running tasks were not kept", self.unexpected)

    async def keep_reconciled(self) -> None:
        """Until cancelled, periodically ends reservations whose tasks are not running."""
        await periodically(
            self.reconcile,
            self._reconcile_every,
            "Reservations that nobody runs could not be looked for",
            self.unexpected,
        )

    async def note(self) -> None:
        """Notes what running tasks have used.

        Raises:
            PomeloError: store_unavailable.
        """
        records = []
        for hold in self.running.values():
            try:
                record = hold.note()
            except Exception as error:  # the other tasks' notes are still kept
                self.unexpected.log("What a task used could not be counted", error)
                continue
            if record is not None:
                records.append(record)
        if not records:
            return
        for task_id in await self.outcome(partial(self.store.note, records)):
            gone = self.running.get(task_id)
            if gone is not None:
                gone.lost = True
                gone.on_lost()

    async def reconcile(self) -> None:
        """Ends reservations of this process whose tasks it does not run, as if the process had
        died: a take that the store executed late, or an end that a bug lost. A reservation found by
        one look is ended by the next.

        Raises:
            PomeloError: store_unavailable.
        """
        found = await self.outcome(partial(self.store.reservations, own=True))
        orphans = {one.record.task_id: one.record for one in found if not self.runs(one.record.task_id)}
        lost = [orphans[task_id] for task_id in orphans if task_id in self._orphans][:_RECOVERED_MOST]
        self._orphans = set(orphans)
        if lost:
            log.warning(
                "%d reservations that nobody ran are ended, such as that of %s", len(lost), lost[0].task_id
            )
        for at in range(0, len(lost), _AT_ONCE):
            await asyncio.wait(
                [
                    self.see_to(one.task_id, partial(self.store.recover, one.wallet, one.task_id), once=True)
                    for one in lost[at : at + _AT_ONCE]
                ]
            )

    # --- store operations that must succeed

    def see_to(
        self,
        task_id: str,
        work: Callable[[], Awaitable[T]],
        *,
        once: bool = False,
        instead: Callable[[], object] | None = None,
    ) -> asyncio.Future[T]:
        """Runs an idempotent store operation for a task in the background, whether or not its
        future is awaited.

        It starts immediately. After any error but LostHoldError it is retried until its outcome
        is known, unless `once`. If `instead` is given, it is called in place of the retries when
        the operation is known to have failed without effect.
        """
        return self._end(_Ending(task_id, work, once, instead))

    def give_back(self, draft: UsageRecord, *, once: bool = False) -> asyncio.Future[None]:
        """Gives back all that a task took which never ran."""
        work = partial(self.store.void, draft.wallet, draft.task_id, refund=True)
        return self.see_to(draft.task_id, work, once=once)

    async def idle(self) -> None:
        """Returns when nothing is left to the store; what it still can't do is left to its next opening."""
        await self._quiet()
        left = list(self._pending.values())
        for at in range(0, len(left), _AT_ONCE):
            batch = [ending for ending in left[at : at + _AT_ONCE] if ending.task_id in self._pending]
            for ending in batch:
                self._try_again(ending)
            await self._quiet()
            if batch and all(ending.task_id in self._pending for ending in batch):
                return

    async def _quiet(self) -> None:
        while self._doing:
            await asyncio.wait(self._doing)

    def _end(self, ending: _Ending) -> asyncio.Future[Any]:
        doing = self._begin(ending.work)
        self._busy[ending.task_id] += 1

        def done(future: asyncio.Future[Any]) -> None:
            try:
                error = asyncio.CancelledError() if future.cancelled() else future.exception()
                if error is None:
                    _report_uncollected(future.result())
                elif not isinstance(error, LostReservationError):
                    self._failed(ending, error)
            finally:
                self._done_with(ending.task_id)

        doing.add_done_callback(done)
        return doing

    def _failed(self, ending: _Ending, error: BaseException) -> None:
        """Handles an end that failed or whose outcome is unknown."""
        if not isinstance(error, PomeloError):
            error = self._unknown(error)
        if isinstance(error, UnknownOutcomeError):
            ending.instead = None  # It may be recorded: only repeating it shows the outcome.
        if ending.instead is not None:
            ending.instead()
        elif not ending.once:
            ending.pause = min(2 * ending.pause, _LONGEST_PAUSE)
            ending.due = self.monotonic() + ending.pause
            self._pending[ending.task_id] = ending

    def _retry(self) -> None:
        """Retries ends that are due, at most _AT_ONCE concurrently; a retry that succeeds starts
        the next. So one that always fails delays no other, and a failing store is not
        overloaded."""
        now = self.monotonic()
        due = (ending for ending in self._pending.values() if ending.due <= now)
        for ending in list(islice(due, max(0, _AT_ONCE - self._retrying))):
            self._try_again(ending)

    def _try_again(self, ending: _Ending) -> None:
        del self._pending[ending.task_id]
        self._retrying += 1

        def done(future: asyncio.Future[Any]) -> None:
            self._retrying -= 1
            if ending.task_id not in self._pending:
                self._retry()

        self._end(ending).add_done_callback(done)

    def _begin(self, work: Callable[[], Awaitable[T]]) -> asyncio.Future[T]:
        """Starts `work` immediately; `idle` waits for it."""
        try:
            begun = work()
        except Exception as error:
            begun = _raise(error)
        doing = asyncio.ensure_future(begun)
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)
        return doing

    async def outcome(self, work: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of a store operation.

        Raises:
            PomeloError: store_unavailable; UnknownOutcomeError for any error that the store's
                contract does not list.
            LostHoldError: the store raised it.
        """
        try:
            return await work()
        except (PomeloError, LostReservationError):
            raise
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise self._unknown(error) from error  # Something inside was cancelled, not this task.
        except Exception as error:
            raise self._unknown(error) from error

    def _unknown(self, error: BaseException) -> UnknownOutcomeError:
        """Logs an unexpected error of the store, and returns it as an UnknownOutcomeError."""
        self.unexpected.log("The store failed", error)
        return UnknownOutcomeError("store_unavailable")

    def _done_with(self, task_id: str) -> None:
        self._busy[task_id] -= 1
        if not self._busy[task_id]:
            del self._busy[task_id]

    def _take_back(
        self, taking: asyncio.Future[Reserved | Refused | ReplayedAnswer], draft: UsageRecord
    ) -> None:
        """Gives back what was taken for a caller who had left by then, or may have been taken.

        If the outcome is unknown, the store is asked once: a long outage must not queue work for
        each refused call. `reconcile` ends what is left.
        """
        self._busy[draft.task_id] += 1
        self._doing.add(taking)

        def taken(future: asyncio.Future[Reserved | Refused | ReplayedAnswer]) -> None:
            self._doing.discard(taking)
            if future.cancelled():
                self.give_back(draft)
            elif future.exception() is not None:
                self.give_back(draft, once=True)
            elif isinstance(future.result(), Reserved):
                self.give_back(draft)
            self._done_with(draft.task_id)

        taking.add_done_callback(taken)


def _report_uncollected(ended: object) -> None:
    """Logs what a task cost beyond its reservation and the balance: the operator's loss."""
    if isinstance(ended, Settled) and ended.record.uncollected:
        record = ended.record
        log.error(
            "account %s (%s) could not pay all of task %s: %s credits are uncollected. "
            "The provider counted more than was reserved",
            record.account,
            "live" if record.live else "test",
            record.task_id,
            money.format_credits(record.uncollected),
        )


async def _raise(error: Exception) -> Any:
    raise error


_NO_PLAN = Plan("")
