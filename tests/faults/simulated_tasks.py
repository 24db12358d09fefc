"""Random tasks of several simulated processes, and what must be true of the books whatever happened to them."""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from pomelo.accounts.plans import Plan
from pomelo.call import Call, KeyBudget, Principal
from pomelo.catalog.pricing import Prices, Usage
from pomelo.engine.ledger import Ledger
from pomelo.engine.reservation import Reservation
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.stores.accounts import Grant, OverdrawnError, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import IdempotencyKey, ReplayedAnswer
from pomelo.stores.usage import UsageRecord
from pomelo.tasks.base import Estimate
from tests.unit.engine.failing_store import FixedUsage
from tests.unit.engine.jobs import accepted_job
from tests.unit.tasks.collectors import MODELS

MODEL = MODELS["gpt-4"]
PRICES = Prices({PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: 1_000_000})
"""A token of output costs a microcredit."""

PLAN = Plan("simulated", requests=10_000, concurrent=6)
WALLETS = (Wallet("acme", True), Wallet("acme", False))
BUDGETS = {
    name: KeyBudget(f"budget:{name}.total", limit, "total") for name, limit in (("a", 2_000), ("b", 9_000))
}


@dataclass
class Answer:
    """A stored answer: the task, its fingerprint, and the records with which it was replayed."""

    task_id: str
    fingerprint: bytes
    replayed: list[UsageRecord] = field(default_factory=list)


@dataclass
class Facts:
    """What the callers and the operator of all processes know."""

    numbers: int = 0
    tasks: dict[str, tuple[Wallet, str]] = field(default_factory=dict)
    """The wallet and the budget of each task."""
    charged: dict[str, UsageRecord] = field(default_factory=dict)
    """The records of completed tasks whose callers got their answers."""
    refused: set[str] = field(default_factory=set)
    answers: dict[tuple[Wallet, str, bytes], Answer] = field(default_factory=dict)
    grants: dict[str, tuple[Wallet, int]] = field(default_factory=dict)
    tally: Tally[str] = field(default_factory=Tally)


class Process:
    """A process with an engine's ledger on a store, whose callers do random things."""

    def __init__(self, store: Store, random: Random, facts: Facts, *, exceeds: bool) -> None:
        self.store = store
        loop = asyncio.get_running_loop()
        self.ledger = Ledger(store, now=loop.time, monotonic=loop.time)
        self._random = random
        self._facts = facts
        self._exceeds = exceeds
        self._jobs: set[asyncio.Task[None]] = set()
        self._keeping = [
            loop.create_task(self.ledger.keep_progress()),
            loop.create_task(self.ledger.keep_reconciled()),
        ]

    def begin(self) -> None:
        """Begins a task, whose caller may leave at any moment."""
        job = self._start(self._task())
        if self._random.random() < 0.1:
            asyncio.get_running_loop().call_later(self._random.random() * 2, job.cancel)

    def operate(self) -> None:
        """Begins a change of the credits."""
        self._start(self._change())

    async def stop(self) -> None:
        """Ends all work, as if the process were killed."""
        for task in (*self._keeping, *self._jobs):
            task.cancel()
        await asyncio.wait((*self._keeping, *self._jobs))

    async def finished(self) -> None:
        """Returns when no caller waits any more."""
        while self._jobs:
            await asyncio.wait(self._jobs)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        job = asyncio.get_running_loop().create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def _change(self) -> None:
        random, facts = self._random, self._facts
        wallet = random.choice(WALLETS)
        with suppress(OverdrawnError, PomeloError):
            if random.random() < 0.3:
                await self.store.set_credit_limit(wallet, random.choice((0, 300, 1_000)))
                return
            facts.numbers += 1
            grant = Grant(f"g{facts.numbers}", wallet, random.choice((1_500, 900, 300, -200, -1_500)), 1.0)
            facts.grants[grant.grant_id] = wallet, grant.amount
            await self.store.grant(grant)

    async def _task(self) -> None:
        random, facts = self._random, self._facts
        facts.numbers += 1
        task_id, wallet = f"task_{facts.numbers:06}", random.choice(WALLETS)
        budget = BUDGETS.get(random.choice("ab..."))
        facts.tasks[task_id] = wallet, "" if budget is None else budget.name
        least = random.choice((1, 20, 150))
        most = least + random.choice((0, 30, 400))
        key = None
        if random.random() < 0.3:
            key = IdempotencyKey(random.choice("uvwxyz"), random.choice((b"1", b"1", b"1", b"2")))
        principal = Principal(wallet.account, "k1", wallet.live, plan=PLAN.name, budget=budget)
        accepted = replace(
            accepted_job(task_id, MODEL, Usage(output_tokens=most), principal, prices=PRICES),
            estimate=Estimate(
                Usage(output_tokens=least),
                Usage(output_tokens=most),
                sufficient=random.choice((None, Usage(output_tokens=least + 10))),
            ),
            idempotency_key=key,
        )
        call = Call(None, task_id, "rest", 0.0)
        try:
            reservation = await self.ledger.reserve(accepted, PLAN, call)
        except PomeloError as error:
            facts.refused.add(task_id)
            facts.tally[error.code] += 1
            return
        if isinstance(reservation, ReplayedAnswer):
            assert key is not None
            facts.answers[wallet, key.key, reservation.answer].replayed.append(reservation.record)
            facts.tally["replayed"] += 1
            return
        if random.random() < 0.03:
            self.ledger.running.pop(task_id)  # as if a bug lost its end: reconciliation ends it
            return
        try:
            await self._run(reservation, wallet, key)
        except PomeloError as error:
            facts.tally[f"end: {error.code}"] += 1
        finally:
            reservation.release()

    async def _run(self, reservation: Reservation, wallet: Wallet, key: IdempotencyKey | None) -> None:
        random, facts = self._random, self._facts
        task_id, amount = reservation.accepted.job.task_id, reservation.amount
        running = asyncio.current_task()

        def cancel() -> None:
            assert running is not None
            running.cancel()

        reservation.on_lost = cancel
        delivered = 0
        reservation.bill_partially(FixedUsage(lambda: Usage(output_tokens=delivered)))
        if random.random() < 0.05:
            await reservation.refuse()
            return
        reservation.record_route(reservation.job)
        for _ in range(random.choice((0, 1, 4))):
            await asyncio.sleep(random.expovariate(1.5))
            delivered = random.randint(delivered, amount)
            reservation.record_output(reservation.output_bytes + 1)
        if random.random() < 0.2:
            await reservation.fail("provider_failed")
            return
        used = random.randint(1, 2 * amount if self._exceeds else amount)
        answer = None
        if key is not None and random.random() < 0.8:
            answer = task_id.encode()
            facts.answers[wallet, key.key, answer] = Answer(task_id, key.fingerprint)
        facts.charged[task_id] = await reservation.settle(
            Usage(output_tokens=used), counted=True, answer=answer
        )
        facts.tally["charged"] += 1
