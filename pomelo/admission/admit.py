"""Admission: what a task must have before its provider is called, and what becomes of it in the end.

`Admission.enter` takes all of it from the store in one step, or refuses; the `Hold` that it gives is settled
once or left once. Which limits and prices there are comes in; how they are counted is the store's. What
callers are told of it, on both wires, is written by `told`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pomelo import money
from pomelo.admission.plans import Plan
from pomelo.admission.told import headers, refusal
from pomelo.call import Call, Principal
from pomelo.catalog import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.ids import new_id
from pomelo.pricing import Used, cost, written
from pomelo.stores.ledger import (
    LedgerStore,
    LostHoldError,
    Refused,
    Repeatable,
    Repeated,
    Settled,
    Settlement,
    Standing,
    Take,
    Taken,
    UsageRecord,
    Wallet,
)
from pomelo.traces import trace

if TYPE_CHECKING:
    from pomelo.catalog import Model, Route

NOTE_EVERY = 1.0
"""Seconds between notes of what running tasks have used: what a crash can leave unbilled."""

TOLD_WITHIN = 0.2
"""Seconds that the answer to a failed task waits for the store to tell its credits."""

log = logging.getLogger("pomelo.admission")

T = TypeVar("T")


class Hold:
    """What one running task has taken. Settled once or left once; then it is over."""

    __slots__ = (
        "_admission", "_call", "_draft", "_noted", "_over", "_plan", "_prices", "_standing", "_started",
        "_used", "amount", "first_byte_ms", "lost", "on_lost", "size",
    )  # fmt: skip

    def __init__(
        self,
        admission: "Admission",
        call: Call,
        plan: Plan,
        draft: UsageRecord,
        prices: Prices,
        taken: Taken,
    ) -> None:
        self._admission = admission
        self._standing = taken.standing
        self._call = call
        self._plan = plan
        self._draft = draft
        self._prices = prices
        self._started = admission.monotonic()
        self._used: Callable[[], Used] | None = None
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

    def delivering(self, used: Callable[[], Used]) -> None:
        """What has come goes out piece by piece: an answer that ends early costs what `used` tells then."""
        self._used = used

    def answered_by(self, route: "Route") -> None:
        """Which route is asked now."""
        self._draft = replace(self._draft, provider=route.provider, provider_model=route.model)

    def note(self) -> UsageRecord | None:
        """What it has used and cost so far, where that is more than at the last time."""
        if self._used is None or self.size == self._noted:
            return None
        self._noted = self.size
        return self._record(self._used(), "estimated", complete=False)

    async def settle(self, used: Used, *, counted: bool, answer: bytes | None = None) -> None:
        """The task is done: charges it, keeps its record, frees the rest, and tells the caller what it cost.

        Where that can't be awaited to its end, the caller gets no answer, and the task is left as by `leave`.

        Raises:
            PomeloError: store_unavailable; the outcome is unknown, or the hold was lost.
        """
        self._end()
        record = self._record(used, "provider" if counted else "estimated", complete=True)
        try:
            settled = await self._admission.store.settle(
                Settlement(record, tokens=used.input_tokens + used.output_tokens, answer=answer)
            )
        except LostHoldError as error:
            raise PomeloError("store_unavailable") from error
        except (PomeloError, asyncio.CancelledError):
            self._let_go()
            raise
        self._tell(settled.standing, settled.record.cost)

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
        # A store in trouble: what the caller was told at the beginning must do.
        with contextlib.suppress(PomeloError, TimeoutError):
            async with asyncio.timeout(TOLD_WITHIN):
                settled = await asyncio.shield(ending)
                if settled is not None:
                    self._tell(settled.standing, settled.record.cost)
                else:
                    standing = await self._admission.store.standing(self.wallet, self._draft.model)
                    self._tell(standing, None if self.lost else 0)

    async def refuse(self) -> None:
        """The task was not begun after all: everything is given back, its request of this minute, too.

        Raises:
            PomeloError: store_unavailable.
        """
        self._end()
        self._call.reply.pop("X-Credits-Charged", None)
        await asyncio.shield(self._admission.give_back(self._draft))
        self._tell(await self._admission.store.standing(self.wallet, self._draft.model), None)

    def _let_go(self) -> "asyncio.Future[Settled | None]":
        """Charges what was delivered, or frees all; begins at once."""
        store = self._admission.store
        if self.lost:
            done: asyncio.Future[Settled | None] = asyncio.get_running_loop().create_future()
            done.set_result(None)
            return done
        if self._used is None or not self.size:
            return self._admission.see_to(partial(store.void, self.wallet, self._draft.task_id))
        used = self._used()
        record = self._record(used, "estimated", complete=False)
        settlement = Settlement(record, tokens=used.input_tokens + used.output_tokens)
        return self._admission.see_to(partial(store.settle, settlement))

    def _tell(self, standing: Standing, cost: int | None) -> None:
        """Tells the caller of limits and credits; `cost` None: it is unknown or there is none."""
        told = headers(self._plan, standing, self._admission.now(), tokens=self._draft.task_type == "text")
        if cost is not None:
            told["X-Credits-Charged"] = money.written(cost)
        self._call.reply |= told
        self._call.trailer |= told

    def _end(self) -> None:
        self._over = True
        self._admission.running.pop(self._draft.task_id, None)

    def _elapsed(self) -> int:
        return round((self._admission.monotonic() - self._started) * 1000)

    def _record(self, used: Used, source: str, *, complete: bool) -> UsageRecord:
        return replace(
            self._draft,
            input_tokens=used.input_tokens,
            output_tokens=used.output_tokens,
            characters=used.characters,
            images=used.images,
            pixels=used.pixels,
            audio_ms=used.audio_ms,
            processing_ms=self._elapsed(),
            first_byte_ms=self.first_byte_ms,
            output_bytes=self.size,
            cost=cost(used, self._prices),
            source=source,
            complete=complete,
            at=self._admission.now(),
        )


class Admission:
    """Lets tasks in and out. `now` is Unix time, `monotonic` times tasks; both in seconds."""

    def __init__(
        self,
        store: LedgerStore,
        plans: Mapping[str, Plan],
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.now = now
        self.monotonic = monotonic
        self.running: dict[str, Hold] = {}
        """By task id."""
        self._plans = plans
        self._doing: set[asyncio.Future[Any]] = set()
        self._owed: list[Callable[[], Awaitable[Any]]] = []

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

    async def tell(self, call: Call, principal: Principal, model: "Model | None" = None) -> None:
        """Writes the limits and credits of a call that takes nothing into its reply; those of tokens where
        it is about a `model` that counts them.

        Raises:
            PomeloError: store_unavailable.
        """
        plan = self._plans.get(principal.plan, _NO_PLAN)
        name = model.name if model is not None and model.task_type == TaskType.TASK_TYPE_TEXT else ""
        standing = await self.store.standing(Wallet(principal.account, principal.live), name)
        call.reply |= headers(plan, standing, self.now(), tokens=bool(name))

    def concurrent(self, principal: Principal) -> int | None:
        """How many tasks the account's plan allows at a time; None: no limit."""
        return self._plans.get(principal.plan, _NO_PLAN).concurrent

    async def count_request(self, call: Call, principal: Principal) -> None:
        """Counts a request of this minute that takes nothing else: one whose body was refused.

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
            wire=call.wire,
            model="",
            task_type="",
        )
        take = Take(draft, least=0, most=0, requests_limit=plan.requests)
        outcome = await self.store.take(take)
        if isinstance(outcome, Refused):
            now = self.now()
            call.reply |= headers(plan, outcome.standing, now, tokens=False)
            raise refusal(outcome, take, now)
        await asyncio.shield(self.see_to(partial(self.store.void, draft.wallet, draft.task_id)))

    async def enter(
        self,
        call: Call,
        plan: Plan,
        draft: UsageRecord,
        prices: Prices,
        least: Used,
        most: Used,
        *,
        tokens: int = 0,
        exact: bool = False,
        repeatable: Repeatable | None = None,
    ) -> Hold | Repeated:
        """Takes all that a task needs; where its Idempotency-Key was answered before, that answer.

        `draft` says whose task it is and what is asked for; `least` and `most` what it can use, `exact`
        whether that is what it will use; `tokens` what is likely of a minute's. A caller who leaves meanwhile
        leaves nothing taken.

        Raises:
            PomeloError: rate_limit_exceeded, concurrency_limit_exceeded, token_limit_exceeded,
                insufficient_credits, idempotency_conflict, idempotency_mismatch, store_unavailable.
        """
        draft = replace(draft, prices=written(prices))
        is_text = draft.task_type == "text"
        take = Take(
            draft,
            least=cost(least, prices),
            most=cost(most, prices),
            requests_limit=plan.requests,
            slots_limit=plan.concurrent,
            tokens=tokens,
            tokens_limit=plan.tokens if is_text else None,
            repeatable=repeatable,
        )
        taking = asyncio.ensure_future(self.store.take(take))
        try:
            outcome = await asyncio.shield(taking)
        except (PomeloError, asyncio.CancelledError):
            self._take_back(taking, draft)
            raise
        now = self.now()
        call.reply |= headers(plan, outcome.standing, now, tokens=is_text)
        if isinstance(outcome, Refused):
            raise refusal(outcome, take, now)
        if isinstance(outcome, Repeated):
            call.reply["X-Credits-Charged"] = money.written(0)
            return outcome
        if exact:
            call.reply["X-Credits-Charged"] = money.written(take.most)
        hold = Hold(self, call, plan, draft, prices, outcome)
        self.running[draft.task_id] = hold
        return hold

    async def keep_notes(self) -> None:
        """Notes what running tasks have used, again and again, until it is cancelled; ends those whose hold
        is lost, and does what the store could not do before."""
        while True:
            await asyncio.sleep(NOTE_EVERY)
            try:
                await self.note()  # first: what can't be done holds up nothing else
                await self._pay()
            except PomeloError:
                pass  # the store is in trouble: the next notes say it all
            except Exception as error:
                log.error("notes of running tasks were not kept\n%s", trace(error))

    async def note(self) -> None:
        """Notes what running tasks have used.

        Raises:
            PomeloError: store_unavailable.
        """
        records = [record for hold in self.running.values() if (record := hold.note()) is not None]
        if not records:
            return
        for task_id in await self.store.note(records):
            hold = self.running.get(task_id)
            if hold is not None:
                hold.lost = True
                hold.on_lost()

    def see_to(self, work: Callable[[], Awaitable[T]], *, once: bool = False) -> "asyncio.Future[T]":
        """Has the store do something that must be done, whoever waits for it, and that may be done twice.

        It begins at once. Where the store can't be reached it is tried again until it can, unless `once`.
        """
        doing = asyncio.ensure_future(work())
        self._doing.add(doing)

        def done(future: "asyncio.Future[T]") -> None:
            self._doing.discard(future)
            error = None if future.cancelled() else future.exception()
            if isinstance(error, PomeloError):
                if not once:
                    self._owed.append(work)
            elif error is not None and not isinstance(error, LostHoldError):
                log.error("the store failed to end a task\n%s", trace(error))

        doing.add_done_callback(done)
        return doing

    def give_back(self, draft: UsageRecord, *, once: bool = False) -> "asyncio.Future[None]":
        """Gives back all that a task took which never ran."""
        return self.see_to(partial(self.store.void, draft.wallet, draft.task_id, refund=True), once=once)

    async def idle(self) -> None:
        """Returns when nothing is left to the store; what it still can't do is left to its next opening."""
        while self._doing:
            await asyncio.wait(self._doing)
        with contextlib.suppress(PomeloError):
            await self._pay()

    async def _pay(self) -> None:
        """Does what the store could not do before.

        Raises:
            PomeloError: store_unavailable, still.
        """
        while self._owed:
            try:
                await self._owed[0]()
            except (PomeloError, asyncio.CancelledError):
                raise
            except LostHoldError:
                pass
            except Exception as error:
                log.error("the store failed to end a task\n%s", trace(error))
            del self._owed[0]

    def _take_back(self, taking: "asyncio.Future[Taken | Refused | Repeated]", draft: UsageRecord) -> None:
        """Gives back what was taken for a caller who had left by then, or may have been taken.

        In doubt the store is asked once: a long outage must not leave something to do for each refused call.
        """

        def taken(future: "asyncio.Future[Taken | Refused | Repeated]") -> None:
            self._doing.discard(future)
            if not future.cancelled() and future.exception() is not None:
                self.give_back(draft, once=True)
            elif future.cancelled() or isinstance(future.result(), Taken):
                self.give_back(draft)

        self._doing.add(taking)
        taking.add_done_callback(taken)


_NO_PLAN = Plan("")
