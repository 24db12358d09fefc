"""The ledger of running tasks: reserves limits and credits, saves progress, and ends what no task runs any
more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from pomelo import money
from pomelo.accounts import budgets
from pomelo.accounts.plans import Plan
from pomelo.call import CHARGED_HEADER, MODE_NAMES, Call, Principal
from pomelo.catalog.catalog import Model
from pomelo.catalog.pricing import cost_at
from pomelo.engine.job import AcceptedJob
from pomelo.engine.limits import SHARES, CallLimits, LimitedCall
from pomelo.engine.reservation import Reservation
from pomelo.engine.store_operations import MAX_CONCURRENT_RETRIES, StoreOperations
from pomelo.errors import PomeloError
from pomelo.ids import new_id
from pomelo.runtime.process import periodically
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    Counter,
    LedgerStore,
    LimitStatus,
    LostReservationError,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    UnknownOutcomeError,
)
from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import Observer

PROGRESS_INTERVAL = 1.0
"""Seconds between saves of what running tasks have used: what a crash can leave unbilled."""

RECONCILE_INTERVAL = 10.0
"""Seconds between searches for reservations of this process whose tasks are not running. A reservation that
two successive searches find is ended."""

_MAX_RECOVERED = 1_024
"""The most reservations that one search ends."""

_NOTHING_RESERVED = (PomeloError, LostReservationError)
"""What `LedgerStore.reserve` raises if nothing is reserved, apart from UnknownOutcomeError."""

log = logging.getLogger("pomelo.engine")


class Ledger:
    """Reserves what tasks need, and ends every reservation: no error of the store, expected or not, drops
    one. Each end is retried until its outcome is known; `reconcile` ends what is left.

    `now` is Unix time, `monotonic` times tasks, `reconcile_every` is RECONCILE_INTERVAL or another interval;
    all in seconds. `observers` get each record.
    """

    def __init__(
        self,
        store: LedgerStore,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        reconcile_every: float = RECONCILE_INTERVAL,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.store = store
        self.now = now
        self.monotonic = monotonic
        self.operations = StoreOperations(monotonic, self._ended)
        self._observers = observers
        self.running: dict[str, Reservation] = {}
        """By task id."""
        self._reserving: set[str] = set()
        """The tasks that are being reserved."""
        self._reconcile_every = reconcile_every
        self._orphans: set[str] = set()
        """Tasks whose reservation the last search found without a running task."""

    # --- limits and credits

    async def report(self, call: Call, principal: Principal, plan: Plan, model: Model | None) -> None:
        limits = CallLimits(LimitedCall(plan, principal, model))
        status = await self.limit_status(Wallet(principal.account, principal.live), limits.counters)
        call.response_headers |= limits.headers(status, self.now())

    async def count_request(self, call: Call, principal: Principal, plan: Plan) -> None:
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
        limits = CallLimits(LimitedCall(plan, principal))
        request = ReserveRequest(draft, minimum=0, maximum=0, counters=limits.counters)
        self._reserving.add(draft.task_id)
        try:
            outcome = await self._reserve(request)
            if isinstance(outcome, Refused):
                now = self.now()
                call.response_headers |= limits.headers(outcome.limit_status, now)
                raise limits.refusal(outcome, request.minimum, now)
            void = partial(self.store.void, draft.wallet, draft.task_id)
            voiding = self.operations.run_in_background(draft.task_id, void)
            await self.operations.finished(voiding)
        finally:
            self._reserving.discard(draft.task_id)

    async def limit_status(self, wallet: Wallet, counters: Sequence[Counter]) -> LimitStatus:
        """A wallet's current credits and counts.

        Raises:
            PomeloError: store_unavailable.
        """
        return await self.operations.outcome(partial(self.store.limit_status, wallet, counters))

    # --- reserving

    async def reserve(self, accepted: AcceptedJob, plan: Plan, call: Call) -> Reservation | ReplayedAnswer:
        """Reserves all that a task needs in one step; or returns the answer to its Idempotency-Key, if there
        is one. A caller that leaves meanwhile leaves nothing reserved. Writes limits and credits into the
        response headers, unless the task is reserved and not streamed.

        Raises:
            PomeloError: rate_limit_exceeded, concurrency_limit_exceeded, token_limit_exceeded,
                insufficient_credits, idempotency_conflict, idempotency_mismatch, store_unavailable.
        """
        job, principal = accepted.job, accepted.principal
        estimate, prices = accepted.estimate, accepted.prices
        max_prices = prices.max_prices(estimate.maximum.input_tokens)
        limits = CallLimits(LimitedCall(plan, principal, job.model, accepted))
        draft = UsageRecord(
            task_id=job.task_id,
            request_id=job.request_id,
            account=principal.account,
            live=principal.live,
            key_id=principal.key_id,
            wire=accepted.protocol,
            model=job.model.name,
            task_type=accepted.definition.name,
            user=accepted.user,
            metadata=accepted.metadata,
            prices=prices.encoded,
            price_version=accepted.price_version,
            at=self.now(),
        )
        request = ReserveRequest(
            draft,
            minimum=cost_at(estimate.minimum, max_prices),
            maximum=cost_at(estimate.maximum, max_prices),
            sufficient=0 if estimate.sufficient is None else cost_at(estimate.sufficient, max_prices),
            counters=limits.counters,
            shares=SHARES,
            idempotency_key=accepted.idempotency_key,
            budget=None if principal.budget is None else budgets.current(principal.budget, draft.at),
        )
        self._reserving.add(job.task_id)
        try:
            outcome = await self._reserve(request)
            if isinstance(outcome, Reserved):
                reservation = Reservation(self, accepted, limits, draft, outcome, call)
                self.running[job.task_id] = reservation
                call.reserved = True
                if job.stream:  # otherwise the headers are sent at the end, with the limits of then
                    reservation.report()
                if estimate.exact and not prices.bills_reported_cost():  # a reported cost is known at the end
                    call.response_headers[CHARGED_HEADER] = money.format_credits(request.maximum)
                return reservation
            now = self.now()
            call.response_headers |= limits.headers(outcome.limit_status, now)
            if isinstance(outcome, Refused):
                if request.budget is not None and outcome.counter == request.budget.name:
                    assert principal.budget is not None
                    read = partial(self.store.budget_use, draft.wallet, [request.budget])
                    (use,) = await self.operations.outcome(read)
                    # If this clock was set back, the store may be in a later period.
                    raise budgets.exceeded(principal.budget, request.minimum, max(now, use.start))
                raise limits.refusal(outcome, request.minimum, now)
            call.reserved = True
            return outcome
        finally:
            self._reserving.discard(job.task_id)

    async def _reserve(self, request: ReserveRequest) -> Reserved | Refused | ReplayedAnswer:
        reserving = self.operations.start(partial(self.store.reserve, request))
        try:
            return await self.operations.finished(reserving)
        except LostReservationError as error:
            raise PomeloError("store_unavailable") from error  # it was voided before
        except (PomeloError, asyncio.CancelledError):
            self._void_late_reservation(reserving, request.draft)
            raise

    def refund(self, draft: UsageRecord, *, once: bool = False) -> asyncio.Future[None]:
        """Voids the reservation of a task that was never begun, and gives back what it counted."""
        void = partial(self.store.void, draft.wallet, draft.task_id, refund=True)
        return self.operations.run_in_background(draft.task_id, void, once=once)

    def _void_late_reservation(
        self, reserving: asyncio.Future[Reserved | Refused | ReplayedAnswer], draft: UsageRecord
    ) -> None:
        """Voids what was, or may have been, reserved for a caller that had left by then.

        If the outcome is unknown, the store is asked once, and not at all after a reserve that had no effect:
        a long outage must not queue work for each refused call. `reconcile` ends what is left.
        """
        self.operations.acquire(draft.task_id)

        def done(future: asyncio.Future[Reserved | Refused | ReplayedAnswer]) -> None:
            error = None if future.cancelled() else future.exception()
            if error is None:
                if future.cancelled() or isinstance(future.result(), Reserved):
                    self.refund(draft)
            elif isinstance(error, UnknownOutcomeError) or not isinstance(error, _NOTHING_RESERVED):
                self.refund(draft, once=True)
            self.operations.release(draft.task_id)

        if reserving.done():
            done(reserving)
        else:
            reserving.add_done_callback(done)

    # --- while tasks run

    def runs(self, task_id: str) -> bool:
        """Whether this process runs a task: it is being reserved, it runs, or its end is in progress or
        waits for a retry."""
        running = task_id in self.running or task_id in self._reserving
        return running or self.operations.concerns(task_id)

    async def keep_progress(self) -> None:
        """Until cancelled, periodically saves what running tasks have used, ends those whose reservation is
        lost, and retries store operations that failed."""

        async def save() -> None:
            self.operations.retry_pending()
            await self.save_progress()

        unexpected = self.operations.unexpected
        await periodically(save, PROGRESS_INTERVAL, "The progress of running tasks was not saved", unexpected)

    async def keep_reconciled(self) -> None:
        """Until cancelled, periodically ends reservations whose tasks are not running."""
        await periodically(
            self.reconcile,
            self._reconcile_every,
            "Reservations without a running task could not be searched for",
            self.operations.unexpected,
        )

    async def save_progress(self) -> None:
        """Saves what running tasks have used.

        Raises:
            PomeloError: store_unavailable.
        """
        records = []
        saved = [reservation for reservation in self.running.values() if not reservation.lost]
        for reservation in saved:
            try:
                record = reservation.progress()
            except Exception as error:  # the progress of the other tasks is still saved
                self.operations.unexpected.log("What a task used could not be counted", error)
                continue
            if record is not None:
                records.append(record)
        if not records:
            return
        all_noted = False
        try:
            lost_ids = await self.operations.outcome(partial(self.store.note, records))
            all_noted = not lost_ids
        finally:
            if not all_noted:
                for reservation in saved:
                    reservation.repeat_progress()
        for task_id in lost_ids:
            lost = self.running.get(task_id)
            if lost is not None:
                lost.lost = True
                if lost.on_lost is not None:
                    lost.on_lost()

    async def reconcile(self) -> None:
        """Ends reservations of this process whose tasks are not running, as if the process had died: the
        store made one late, or a bug lost its end. A reservation that one search finds is ended by the next.

        Raises:
            PomeloError: store_unavailable.
        """
        operations = self.operations
        found = await operations.outcome(partial(self.store.reservations, own=True))
        orphans = {one.record.task_id: one.record for one in found if not self.runs(one.record.task_id)}
        lost = [orphans[task_id] for task_id in orphans if task_id in self._orphans][:_MAX_RECOVERED]
        self._orphans = set(orphans)
        if lost:
            log.warning(
                "%d reservations without a running task are ended, such as that of %s",
                len(lost),
                lost[0].task_id,
            )
        for at in range(0, len(lost), MAX_CONCURRENT_RETRIES):
            await asyncio.wait(
                [
                    operations.run_in_background(
                        one.task_id, partial(self.store.recover, one.wallet, one.task_id), once=True
                    )
                    for one in lost[at : at + MAX_CONCURRENT_RETRIES]
                ]
            )

    def _ended(self, result: object) -> None:
        """Reports a record that the store has written, and logs what its task cost beyond its reservation and
        the balance: the operator's loss."""
        if not isinstance(result, Settled):
            return
        record = result.record
        for observer in self._observers:
            observer.charged(record)
        if record.uncollected:
            log.error(
                "account %s (%s) could not pay all of task %s: %s credits are uncollected. "
                "The provider counted more than was reserved",
                record.account,
                MODE_NAMES[record.live],
                record.task_id,
                money.format_credits(record.uncollected),
                extra={
                    "fields": {
                        "request_id": record.request_id,
                        "task_id": record.task_id,
                        "account": record.account,
                        "uncollected": money.format_credits(record.uncollected),
                    },
                    "unlimited": True,
                },
            )
