"""Compares every store's ledger with a small model of it, over histories that hypothesis generates.

POMELO_LEDGER_STEPS is the number of steps; `make crash` makes a full run.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule, run_state_machine_as_test

from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    REPLAY_SECONDS,
    Budget,
    Counter,
    IdempotencyKey,
    LimitStatus,
    LostReservationError,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settlement,
)
from pomelo.stores.usage import UsageQuery
from tests.contract.ledger_model import (
    ALL_COUNTERS,
    COUNTERS,
    REQUESTS,
    WALLETS,
    Running,
    StoredAnswer,
    WalletModel,
    drawn_counters,
)
from tests.contract.ledger_operator import OperatorRules
from tests.contract.ledger_rig import STORES, Rig, record, wallets
from tests.memory import MEMORY

STEPS = int(os.environ.get("POMELO_LEDGER_STEPS", "1000"))
ALL, FAILED = UsageQuery(), UsageQuery(failed=True)

T = TypeVar("T")


class LedgerMachine(OperatorRules):
    """Applies the same operations to a store and to the model, and compares the results."""

    make: Callable[[Path], Rig]
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.wallets = {wallet: WalletModel() for wallet in WALLETS}
        self.grants: dict[str, Grant] = {}
        self.number = 0
        self.now = self.ahead = 0.0

    def do(self, call: Awaitable[T]) -> T:
        return self.loop.run_until_complete(_awaited(call))

    def count(self) -> None:
        type(self).steps += 1

    @property
    def store(self) -> Store:
        return self.rig.store

    def some_task(self) -> st.SearchStrategy[str]:
        """Mostly a running task, else one that has ended or never existed."""
        running = [task for state in self.wallets.values() for task in state.running]
        ended = [task for state in self.wallets.values() for task in state.records]
        others = st.sampled_from([*ended, "none"])
        return st.one_of(st.sampled_from(running), st.sampled_from(running), others) if running else others

    @initialize()
    def start(self) -> None:
        self.rig = type(self).make(Path(self.folder.name))
        self.do(self.rig.open())
        self.do(self.store.add_account("acme", "pro", 1.0))
        for wallet in WALLETS:
            self.grant(wallet, 500, 9)

    def teardown(self) -> None:
        try:
            if hasattr(self, "rig"):
                self.do(self.rig.close())
        finally:
            self.loop.close()
            self.folder.cleanup()

    def state_of(self, wallet: Wallet) -> WalletModel:
        """The model of a wallet, without expired answers."""
        state = self.wallets[wallet]
        state.expire_answers(self.now)
        return state

    def compare(self, found: LimitStatus, wallet: Wallet, counters: tuple[Counter, ...]) -> None:
        assert found == self.state_of(wallet).limit_status(counters, self.now)

    # --- rules

    def do_reserve(
        self,
        wallet: Wallet,
        minimum: int,
        more: int,
        counters: tuple[Counter, ...],
        sufficient: int,
        shares: str,
        budget: tuple[str, int] | None,
        key: tuple[str, bytes] | None,
    ) -> None:
        self.count()
        self.number += 1
        draft = record(f"t{self.number:04}", account=wallet.account, live=wallet.live)
        state = self.state_of(wallet)
        idempotency_key = IdempotencyKey(*key) if key and key[0] not in state.uncertain else None
        request = ReserveRequest(
            draft,
            minimum,
            minimum + more,
            counters,
            idempotency_key,
            sufficient,
            shares,
            budget and Budget(*budget, self.period),
        )
        answer = self.do(self.store.reserve(request))
        code, refusing = state.answer_of(request), ""
        if not code:
            code, refusing = state.refusal(request, self.now)
        if code == "replayed":
            assert isinstance(answer, ReplayedAnswer)
            assert idempotency_key is not None
            stored = state.answers[idempotency_key.key]
            assert (answer.record, answer.answer) == (state.records[stored.task_id], stored.answer)
        elif code:
            assert isinstance(answer, Refused)
            assert (answer.code, answer.counter) == (code, refusing)
        else:
            assert isinstance(answer, Reserved)
            assert answer.amount == state.reservable(request, self.now)
            assert request.minimum <= answer.amount
            state.reserve(request, answer.amount, self.now)
            for each in counters:
                if each.limit is not None and each.amount:
                    assert state.count(each, self.now).used <= each.limit
        self.compare(answer.limit_status, wallet, counters)

    @rule(**REQUESTS)
    def reserve(self, **drawn: Any) -> None:
        self.do_reserve(**drawn)

    # Three rules, so that more tasks are reserved: many requests are refused.
    @rule(**REQUESTS)
    def reserve_too(self, **drawn: Any) -> None:
        self.do_reserve(**drawn)

    @rule(**REQUESTS)
    def reserve_another(self, **drawn: Any) -> None:
        self.do_reserve(**drawn)

    @rule(data=st.data())
    def repeat_reserve(self, data: st.DataObject) -> None:
        self.count()
        running = [task for state in self.wallets.values() for task in state.running.values()]
        if not running:
            return
        task = data.draw(st.sampled_from(running))
        answer = self.do(self.store.reserve(task.request))
        assert isinstance(answer, Reserved)
        assert answer.amount == task.amount
        self.compare(answer.limit_status, task.request.draft.wallet, task.request.counters)

    @rule(data=st.data(), used=st.integers(0, 90))
    def note(self, data: st.DataObject, used: int) -> None:
        self.count()
        noted, lost = [], []
        for task_id in data.draw(st.lists(self.some_task(), min_size=1, max_size=4, unique=True)):
            wallet, task = self.found(task_id)
            if task is None:
                lost.append(task_id)
            drawn = replace(
                record(task_id, account=wallet.account, live=wallet.live), cost=used, output_tokens=used
            )
            if task is not None:
                drawn = replace(task.request.draft, cost=used, output_tokens=used)
                task.noted = drawn
            noted.append(drawn)
        assert self.do(self.store.note(noted)) == lost

    def found(self, task_id: str) -> tuple[Wallet, Running | None]:
        for wallet, state in self.wallets.items():
            if task_id in state.running or task_id in state.records:
                return wallet, state.running.get(task_id)
        return WALLETS[0], None

    @rule(
        data=st.data(),
        cost=st.one_of(st.integers(0, 100), st.integers(0, 1_000)),
        counters=drawn_counters(),
        answer=st.sampled_from([None, b"", b"answer"]),
        code=st.sampled_from(["", "", "provider_failed"]),
        delivered=st.booleans(),
    )
    def settle(
        self,
        data: st.DataObject,
        cost: int,
        counters: tuple[Counter, ...],
        answer: bytes | None,
        code: str,
        delivered: bool,
    ) -> None:
        self.count()
        task_id = data.draw(self.some_task())
        wallet, task = self.found(task_id)
        state = self.state_of(wallet)
        first = state.records.get(task_id)
        if code and not delivered:
            cost, answer = 0, None
        ended = record(task_id, account=wallet.account, live=wallet.live, cost=cost, at=self.now, code=code)
        settling = self.store.settle(Settlement(ended, counters, answer))
        if task is None and (first is None or first.source == "recovered"):
            with pytest.raises(LostReservationError):
                self.do(settling)
            return
        settled = self.do(settling)
        if task is None:
            assert settled.record == first
        else:
            charged = min(cost, task.amount + state.balance.available)
            assert settled.record == replace(ended, cost=charged, uncollected=cost - charged)
            state.end(task_id, self.now, {each.name: each.amount for each in counters})
            state.records[task_id] = settled.record
            key = task.request.idempotency_key
            if key is not None and answer is not None:
                until = self.now + REPLAY_SECONDS
                state.answers[key.key] = StoredAnswer(key.fingerprint, task_id, answer, until)
        self.compare(settled.limit_status, wallet, counters)

    @rule(data=st.data(), refund=st.booleans())
    def void(self, data: st.DataObject, refund: bool) -> None:
        self.count()
        task_id = data.draw(self.some_task())
        wallet, task = self.found(task_id)
        for _ in range(2):  # the second call changes nothing
            self.do(self.store.void(wallet, task_id, refund=refund))
        if task is not None:
            self.wallets[wallet].end(task_id, self.now, dict.fromkeys(COUNTERS, 0) if refund else {})

    @rule(data=st.data(), now=st.sampled_from([False, False, True]))
    def recover(self, data: st.DataObject, now: bool) -> None:
        if not now:  # otherwise few tasks would be left to settle
            return
        self.count()
        task_id = data.draw(self.some_task())
        wallet, task = self.found(task_id)
        for _ in range(2):  # the second call changes nothing
            self.do(self.store.recover(wallet, task_id))
        if task is None:
            return
        state = self.state_of(wallet)
        noted, available = task.noted, state.balance.available
        state.end(task_id, self.now, {})
        if noted.cost > 0:
            stored = {found.task_id: found for found in self.do(self.store.list_usage(ALL, limit=10_000))[0]}
            charged = min(noted.cost, task.amount + available)
            state.records[task_id] = replace(
                noted,
                cost=charged,
                uncollected=noted.cost - charged,
                source="recovered",
                complete=False,
                at=stored[task_id].at,
            )

    @rule(seconds=st.sampled_from([0.5, 10.0, 29.5, 59.5, 60.0, REPLAY_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.count()
        self.rig.clock.passes(seconds)
        self.now += seconds

    @rule(seconds=st.sampled_from([-100_000.0, -60.0, -0.5, 30.0, 100_000.0]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.count()
        self.rig.clock.jumps(seconds)
        if self.rig.clock.jumping:
            self.ahead += seconds

    @rule(now=st.sampled_from([False, False, False, False, True]))
    def crash(self, now: bool) -> None:
        if not now:  # after a crash, few tasks are running for a while
            return
        self.count()
        self.do(self.rig.crash())
        self.now, self.ahead = self.now + self.ahead, 0.0
        stored = {found.task_id: found for found in self.do(self.store.list_usage(ALL, limit=10_000))[0]}
        for wallet in WALLETS:
            state = self.state_of(wallet)
            state.future += [item for item in state.windows.items() if item[1].start > self.now]
            # After the clock was set back, a store may or may not still have an expired answer.
            state.uncertain |= {key for key, until in state.expired.items() if until > self.now}
            for task_id, task in list(state.running.items()):
                state.end(task_id, self.now, {})
                if task.noted.cost == 0:
                    assert task_id not in stored
                    continue
                # If several noted more than is available, the order of their recovery is undefined.
                found = stored[task_id]
                complete = replace(task.noted, source="recovered", complete=False, at=found.at)
                assert replace(found, cost=found.cost + found.uncollected, uncollected=0) == complete
                assert found.cost >= min(task.noted.cost, task.amount)
                state.records[task_id] = found
            state.forget_closed(self.now)
            status = self.do(self.store.limit_status(wallet, ALL_COUNTERS))
            state.reopen(status, self.now)
            self.compare(status, wallet, ALL_COUNTERS)

    @rule(wallet=st.sampled_from(WALLETS))
    def check_limit_status(self, wallet: Wallet) -> None:
        self.count()
        self.compare(self.do(self.store.limit_status(wallet, ALL_COUNTERS)), wallet, ALL_COUNTERS)

    # --- invariants

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "rig"):
            return
        for wallet, state in self.wallets.items():
            found = self.do(self.store.balance(wallet))
            assert found == state.balance
            assert min(found.credit_limit, found.spent, found.held, found.available) >= 0
            given = self.do(self.store.list_grants(wallet))
            assert given == [g for g in self.grants.values() if g.wallet == wallet]
            assert sum(g.amount for g in given) == found.granted

    @invariant()
    def every_task_ends_once(self) -> None:
        if not hasattr(self, "rig"):
            return
        stored, after = self.do(self.store.list_usage(ALL, limit=10_000))
        failed, _ = self.do(self.store.list_usage(FAILED, limit=10_000))
        expected = {task: r for state in self.wallets.values() for task, r in state.records.items()}
        assert after == ""
        assert all(found.cost or found.uncollected or not found.code for found in stored)
        assert all(found.code for found in failed)
        # Those with a code that were billed are in both.
        both = [found for found in failed if found.cost or found.uncollected]
        assert len(stored) + len(failed) == len(expected) + len(both)
        assert {found.task_id: found for found in (*stored, *failed)} == expected
        drafts = {draft.task_id: draft for draft in self.do(self.store.drafts())}
        running = {task: r for state in self.wallets.values() for task, r in state.running.items()}
        assert drafts == {task: r.noted for task, r in running.items()}
        reservations = self.do(self.store.reservations(own=True))
        assert [one.record.task_id for one in reservations] == sorted(running)
        assert all(one.amount == running[one.record.task_id].amount and one.own for one in reservations)
        touched = {wallet for wallet, state in self.wallets.items() if state.touched}
        assert touched == {wallet for wallet in self.do(wallets(self.store)) if wallet.account == "acme"}


async def _awaited(call: Awaitable[T]) -> T:
    return await call


@pytest.mark.timeout(300 + STEPS // 10)
@pytest.mark.parametrize("store", STORES)
def test_the_store_behaves_like_the_model(store: str) -> None:
    class Machine(LedgerMachine):
        make = staticmethod(STORES[store])

    while Machine.steps < STEPS:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=min(200, max(1, STEPS // 50)),
                stateful_step_count=50,
                database=None,
                phases=[Phase.generate],  # shrinking may take an hour, which no time limit ends
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(f"{store}: {Machine.steps} steps")  # noqa: T201
