"""What a running task has reserved, and how it ends: settled with its usage record, or voided if no provider
was asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pomelo import money
from pomelo.call import CHARGED_HEADER, Call
from pomelo.catalog.catalog import Route
from pomelo.catalog.pricing import Usage, cost
from pomelo.catalog.reported_cost import with_reported_cost
from pomelo.engine.job import AcceptedJob
from pomelo.engine.limits import CallLimits
from pomelo.errors import PomeloError
from pomelo.providers.base import Job
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import LimitStatus, LostReservationError, Reserved, Settled, Settlement
from pomelo.stores.usage import CANCELLED, UsageRecord
from pomelo.tasks.base import Collector

if TYPE_CHECKING:
    from pomelo.engine.ledger import Ledger

STATUS_TIMEOUT = 0.2
"""Seconds that the response to a task that failed, or is late, waits for the store to report its limits and
credits."""

_MAYBE_ANSWERED = frozenset((CANCELLED, "deadline_exceeded", "store_unavailable", "internal_error"))
"""Codes of tasks that failed although the provider may have worked for them. They keep the estimate of their
tokens: otherwise a caller who leaves before each answer would get any number of tokens from the provider."""

_UNSETTLED = (
    "The task has run, but storage did not confirm its charge, and it may still be charged. Check your usage "
    "before you send it again, or send tasks with an Idempotency-Key"
)


class Reservation:
    """What one running task has reserved. It ends once, by `settle`, `release`, `fail` or `refuse`."""

    __slots__ = (
        "_call", "_collector", "_draft", "_ended", "_ledger", "_limits", "_route", "_saved_bytes", "_started",
        "_status", "accepted", "amount", "first_byte_ms", "job", "lost", "on_lost", "output_bytes", "record",
    )  # fmt: skip

    def __init__(
        self,
        ledger: Ledger,
        accepted: AcceptedJob,
        limits: CallLimits,
        draft: UsageRecord,
        reserved: Reserved,
        call: Call,
    ) -> None:
        self._ledger = ledger
        self._call = call
        self._limits = limits
        self._status: LimitStatus | None = reserved.limit_status
        """Limits and credits after the reservation; None if the response headers have them, or later ones."""
        self._draft = draft
        self.accepted = accepted
        self.job = accepted.job
        """The job of the route that is called now."""
        self._route: Route | None = None
        """The route that was called last."""
        self._started = ledger.monotonic()
        self._collector: Collector | None = None
        """Of a stream."""
        self._saved_bytes = 0
        self._ended = False
        self.amount = reserved.amount
        """Microcredits."""
        self.output_bytes = 0
        """Bytes of output so far."""
        self.first_byte_ms = 0
        self.lost = False
        """Whether the store has ended it, because this process was taken for dead."""
        self.on_lost: Callable[[], None] | None = None
        self.record: UsageRecord | None = None
        """Its usage record, once that is known; None if it leaves none."""

    @property
    def wallet(self) -> Wallet:
        """Who pays."""
        return self._draft.wallet

    def report(self) -> None:
        """Writes limits and credits, as they are after the reservation, into the response headers."""
        if self._status is not None:
            self._call.response_headers |= self._limits.headers(self._status, self._draft.at)
            self._status = None

    def record_route(self, job: Job[Any]) -> None:
        self.job = job
        self._route = job.route

    def forget_route(self) -> None:
        """Makes the task end as one that was never begun: no provider has seen anything of it."""
        self._route = None

    def record_output(self, total: int) -> None:
        if not self.output_bytes:
            self.first_byte_ms = self._elapsed_ms()
        self.output_bytes = total

    def bill_partially(self, collector: Collector) -> None:
        """Bills a task that does not complete by what its collector has passed on when it ends."""
        self._collector = collector

    def progress(self) -> UsageRecord | None:
        """The record so far, if there is more output than at the last call."""
        if self._collector is None or self.output_bytes == self._saved_bytes:
            return None
        self._saved_bytes = self.output_bytes
        return self._record(self._collector.partial_usage(self.job.input), "estimated", complete=False)

    def repeat_progress(self) -> None:
        """Makes the next call of `progress` return the record again: the last one was perhaps not saved."""
        self._saved_bytes = 0

    async def settle(self, usage: Usage, *, counted: bool, answer: bytes | None = None) -> UsageRecord:
        """Charges a completed task, writes and returns its record, releases the rest, and reports what it
        cost. `counted` is whether the provider counted the usage; `answer` is stored for its Idempotency-Key.

        If the settlement fails, the caller gets no result. If it is known to have had no effect, the task
        ends as by `release`; if its outcome is unknown, it is retried until it is known, because the record
        may have been written.

        Raises:
            PomeloError: store_unavailable; the settlement failed, or the reservation was lost. A client must
                not repeat an unsettled task automatically, unless it has an Idempotency-Key.
        """
        record = self._record(usage, "provider" if counted else "estimated", complete=True)
        settlement = Settlement(record, self._limits.actual_counters(usage), answer)
        self._end()
        self._call.settling = True
        operations = self._ledger.operations
        settling = operations.run_in_background(
            record.task_id,
            partial(self._ledger.store.settle, settlement),
            # A completed task that could not be charged ends as a failed one.
            fallback=partial(self._settle_or_void, "store_unavailable"),
        )
        try:
            settled = await operations.finished(settling)
        except (LostReservationError, PomeloError) as error:
            self._call.response_headers.pop(CHARGED_HEADER, None)  # it is not known
            if isinstance(error, LostReservationError):
                raise PomeloError("store_unavailable") from error
            if self.accepted.idempotency_key is not None:
                raise  # the same request gets the answer once it is settled
            raise PomeloError(error.code, _UNSETTLED, repeatable=False) from error
        self.record = settled.record
        self._report_status(settled.limit_status, settled.record.cost)
        return settled.record

    def release(self, code: str = CANCELLED) -> None:
        """Charges what was delivered, records the `code` of the failure, and releases the rest, in the
        background. Does nothing after the end."""
        if not self._ended:
            self.report()
            self._end()
            self._settle_or_void(code)

    async def fail(self, code: str = "internal_error") -> None:
        """As `release`, and reports what the task cost. Never raises."""
        self.report()
        if self._ended:
            return
        self._end()
        self._call.response_headers.pop(CHARGED_HEADER, None)  # perhaps the price of a complete result
        if self._delivered is None and not self.lost:
            charged = {CHARGED_HEADER: money.format_credits(0)}
            self._call.response_headers |= charged
            self._call.response_trailers |= charged
        ending = self._settle_or_void(code)
        operations = self._ledger.operations
        try:
            async with asyncio.timeout(STATUS_TIMEOUT):
                settled = await operations.finished(ending)
                if settled is not None:
                    self.record = settled.record
                    self._report_status(settled.limit_status, settled.record.cost)
                else:
                    status = await self._ledger.limit_status(self.wallet, self._limits.counters)
                    self._report_status(status, None if self.lost else 0)
        except (PomeloError, LostReservationError, TimeoutError):
            pass  # The store fails: what was reported first remains.

    async def refuse(self) -> None:
        """Voids a task that was never begun; it does not count toward the limits.

        Raises:
            PomeloError: store_unavailable.
        """
        self.report()
        self._end()
        self._call.response_headers.pop(CHARGED_HEADER, None)
        voiding = self._ledger.refund(self._draft)
        await self._ledger.operations.finished(voiding)
        self._report_status(await self._ledger.limit_status(self.wallet, self._limits.counters), None)

    def _settle_or_void(self, code: str) -> asyncio.Future[Settled | None]:
        """Starts to charge what was delivered, or to void the task if no provider was asked."""
        if self.lost:
            done: asyncio.Future[Settled | None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        return self._ledger.operations.run_in_background(self._draft.task_id, self._incomplete_end(code))

    def _incomplete_end(self, code: str) -> Callable[[], Awaitable[Settled | None]]:
        """The store operation that ends a task which did not complete."""
        store, task_id = self._ledger.store, self._draft.task_id
        delivered = self._delivered
        if delivered is None:
            if self._route is None:
                return partial(store.void, self.wallet, task_id, refund=True)
            limits = self._limits
            # A failed task is a request, but one that the provider did not answer has used no tokens.
            counters = limits.counters if code in _MAYBE_ANSWERED else limits.actual_counters(Usage())
            failure = self.record = self._failure(self._route, code)
            return partial(store.settle, Settlement(failure, counters))
        try:
            usage = delivered.partial_usage(self.job.input)
            record = self.record = self._record(usage, "estimated", complete=False, code=code)
        except Exception as error:
            self._ledger.operations.unexpected.log("What a task used could not be counted", error)
            return partial(store.recover, self.wallet, task_id)
        thinks = self.job.report.thinks and code in _MAYBE_ANSWERED
        counters = self._limits.actual_counters(usage, at_least=thinks)
        return partial(store.settle, Settlement(record, counters))

    def _report_status(self, status: LimitStatus, cost: int | None) -> None:
        """Writes limits, credits and the cost, if it is known, into the response headers and trailers."""
        self._status = None
        headers = self._limits.headers(status, self._ledger.now())
        if cost is not None:
            headers[CHARGED_HEADER] = money.format_credits(cost)
        self._call.response_headers |= headers
        self._call.response_trailers |= headers

    @property
    def _delivered(self) -> Collector | None:
        """The collector of what a task that does not complete is billed for; None if that is nothing."""
        return self._collector if self.output_bytes else None

    def _end(self) -> None:
        self._ended = True
        self._ledger.running.pop(self._draft.task_id, None)

    def _elapsed_ms(self) -> int:
        return round((self._ledger.monotonic() - self._started) * 1000)

    def _failure(self, route: Route, code: str) -> UsageRecord:
        """The record of a task that delivered nothing. It costs nothing, whatever the provider reported."""
        return replace(
            self._draft,
            provider=route.provider,
            provider_model=route.model,
            processing_ms=self._elapsed_ms(),
            source="estimated",
            complete=False,
            code=code,
            at=self._ledger.now(),
        )

    def _record(self, usage: Usage, source: str, *, complete: bool, code: str = "") -> UsageRecord:
        draft, route = self._draft, self._route
        provider, provider_model = ("", "") if route is None else (route.provider, route.model)
        prices = self.accepted.prices
        if self.job.report.cost is not None:
            task = f"request {draft.request_id}: the provider {provider}"
            usage = with_reported_cost(usage, self.job.report, prices, self.amount, task)
        return UsageRecord(
            task_id=draft.task_id,
            request_id=draft.request_id,
            account=draft.account,
            live=draft.live,
            key_id=draft.key_id,
            wire=draft.wire,
            model=draft.model,
            task_type=draft.task_type,
            provider=provider,
            provider_model=provider_model,
            input_tokens=usage.input_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            cache_write_input_tokens=usage.cache_write_input_tokens,
            cache_write_1h_input_tokens=usage.cache_write_1h_input_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            characters=usage.characters,
            images=usage.images,
            pixels=usage.pixels,
            audio_ms=usage.audio_ms,
            provider_micros=usage.provider_micros,
            processing_ms=self._elapsed_ms(),
            first_byte_ms=self.first_byte_ms,
            output_bytes=self.output_bytes,
            cost=cost(usage, prices),
            prices=draft.prices,
            price_version=draft.price_version,
            source=source,
            complete=complete,
            at=self._ledger.now(),
            user=draft.user,
            metadata=draft.metadata,
            code=code,
        )
