"""Admission: what a task must have before its provider is called, and what becomes of it in the end.

`Admission.enter` takes all of it from the store in one step, or refuses; the `Hold` that it gives is settled
once or left once. Which limits and prices there are comes in; how they are counted is the store's. The
headers that tell of limits and credits are written here, for both wires.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from math import ceil
from typing import TYPE_CHECKING, Any

from pomelo.admission.plans import Plan
from pomelo.call import Call, Principal
from pomelo.catalog import MICROS, Prices
from pomelo.errors import PomeloError
from pomelo.pricing import Used, cost, written
from pomelo.stores.ledger import (
    LedgerStore,
    LostHoldError,
    Refused,
    Repeatable,
    Repeated,
    Settlement,
    Standing,
    Take,
    Taken,
    UsageRecord,
    Wallet,
)

if TYPE_CHECKING:
    from pomelo.catalog import Route

NOTE_EVERY = 1.0
"""Seconds between notes of what running tasks have used: what a crash can leave unbilled."""


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
        told = self._tell(settled.standing)
        told["X-Credits-Charged"] = self._call.reply["X-Credits-Charged"] = credits(settled.record.cost)
        self._call.trailer |= told

    def leave(self) -> None:
        """The task ends without an answer that is whole: what was delivered is charged, all else is free.

        Begins at once and is done by itself, also where this task is being cancelled. After `settle` nothing
        happens. The caller's headers tell the credits as they will be.
        """
        if self._over:
            return
        self._end()
        store = self._admission.store
        if self._used is not None and self.size and not self.lost:
            used = self._used()
            record = self._record(used, "estimated", complete=False)
            self._admission.detach(
                store.settle(Settlement(record, tokens=used.input_tokens + used.output_tokens))
            )
        elif not self.lost:
            self._admission.detach(store.void(self.wallet, self._draft.task_id))
            free = self._standing
            free = replace(free, available=free.available + self.amount, slots=free.slots - 1)
            self._call.trailer |= self._tell(free)
            self._call.reply.pop("X-Credits-Charged", None)

    async def refuse(self) -> None:
        """The task was not begun after all: everything is given back, its request of this minute, too."""
        self._end()
        await self._admission.store.void(self.wallet, self._draft.task_id, refund=True)
        self._tell(await self._admission.store.standing(self.wallet, self._draft.model))
        self._call.reply.pop("X-Credits-Charged", None)

    def _tell(self, standing: Standing) -> dict[str, str]:
        told = self._admission.headers(self._plan, standing, tokens=self._draft.task_type == "text")
        self._call.reply |= told
        return told

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
        self._detached: set[asyncio.Future[Any]] = set()

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

    async def tell(self, call: Call, principal: Principal) -> None:
        """Writes the limits and credits of a call that takes nothing into its reply.

        Raises:
            PomeloError: store_unavailable.
        """
        plan = self._plans.get(principal.plan, _NO_PLAN)
        standing = await self.store.standing(Wallet(principal.account, principal.live))
        call.reply |= self.headers(plan, standing, tokens=False)

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
        except asyncio.CancelledError:
            self._take_back(taking, draft)
            raise
        call.reply |= self.headers(plan, outcome.standing, tokens=is_text)
        if isinstance(outcome, Refused):
            raise self._refusal(outcome, take)
        if isinstance(outcome, Repeated):
            call.reply["X-Credits-Charged"] = credits(0)
            return outcome
        if exact:
            call.reply["X-Credits-Charged"] = credits(take.most)
        hold = Hold(self, call, plan, draft, prices, outcome)
        self.running[draft.task_id] = hold
        return hold

    def headers(self, plan: Plan, standing: Standing, *, tokens: bool) -> dict[str, str]:
        """The headers of limits and credits; those of `tokens` where the model counts them."""
        told = {}
        now = self.now()
        if plan.requests is not None:
            told["X-RateLimit-Limit"] = str(plan.requests)
            told["X-RateLimit-Remaining"] = str(max(0, plan.requests - standing.requests))
            told["X-RateLimit-Reset"] = str(ceil(now + standing.requests_reset))
        if plan.tokens is not None and tokens:
            told["X-RateLimit-Limit-Tokens"] = str(plan.tokens)
            told["X-RateLimit-Remaining-Tokens"] = str(max(0, plan.tokens - standing.tokens))
            told["X-RateLimit-Reset-Tokens"] = str(ceil(now + standing.tokens_reset))
        if plan.concurrent is not None:
            told["X-RateLimit-Limit-Concurrent"] = str(plan.concurrent)
            told["X-RateLimit-Remaining-Concurrent"] = str(max(0, plan.concurrent - standing.slots))
        told["X-Credits-Remaining"] = credits(standing.available)
        return told

    async def keep_notes(self) -> None:
        """Notes what running tasks have used, again and again, until it is cancelled; ends those whose hold
        is lost."""
        while True:
            await asyncio.sleep(NOTE_EVERY)
            with contextlib.suppress(PomeloError):  # the store is in trouble: the next notes say it all
                await self.note()

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

    def detach(self, doing: Awaitable[Any]) -> None:
        """Leaves something to the store that nobody awaits; what goes wrong is the store's to mend."""
        future = asyncio.ensure_future(doing)
        self._detached.add(future)
        future.add_done_callback(self._done)

    async def idle(self) -> None:
        """Returns when nothing is left to the store."""
        while self._detached:
            await asyncio.wait(self._detached)

    def _done(self, future: "asyncio.Future[Any]") -> None:
        self._detached.discard(future)
        if not future.cancelled():
            future.exception()  # looked at: a store that can't be reached was told of by others

    def _take_back(self, taking: "asyncio.Future[Taken | Refused | Repeated]", draft: UsageRecord) -> None:
        """Gives back what was taken for a caller who had left by then."""

        def taken(future: "asyncio.Future[Taken | Refused | Repeated]") -> None:
            if not future.cancelled() and future.exception() is None and isinstance(future.result(), Taken):
                self.detach(self.store.void(draft.wallet, draft.task_id, refund=True))

        self.detach(taking)
        taking.add_done_callback(taken)

    def _refusal(self, refused: Refused, take: Take) -> PomeloError:
        standing = refused.standing
        match refused.code:
            case "rate_limit_exceeded":
                until = self._at(standing.requests_reset)
                wait = max(1, ceil(standing.requests_reset))
                return PomeloError(refused.code, f"Rate limit exceeded. Reset at {until}", retry_after=wait)
            case "token_limit_exceeded":
                return self._too_many_tokens(standing, take)
            case _:
                return PomeloError(refused.code)

    def _too_many_tokens(self, standing: Standing, take: Take) -> PomeloError:
        limit = take.tokens_limit or 0
        if take.tokens > limit:
            return PomeloError(
                "token_limit_exceeded",
                f"About {take.tokens:,} tokens are asked for, and the plan has {limit:,} a minute for the "
                "model. Shorten messages, or lower max_tokens",
                retry_after=60,
            )
        return PomeloError(
            "token_limit_exceeded",
            f"Token limit of the model exceeded. Reset at {self._at(standing.tokens_reset)}",
            retry_after=max(1, ceil(standing.tokens_reset)),
        )

    def _at(self, seconds: float) -> str:
        """The time in so many seconds, rounded up: then it is over for sure."""
        return datetime.fromtimestamp(ceil(self.now() + seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


_NO_PLAN = Plan("")


def credits(micros: int) -> str:  # noqa: A001 (the contract's word)
    """Microcredits as credits, exact, without needless zeros."""
    whole, rest = divmod(abs(micros), MICROS)
    sign = "-" if micros < 0 else ""
    return f"{sign}{whole}.{rest:06}".rstrip("0").rstrip(".") if rest else f"{sign}{whole}"
