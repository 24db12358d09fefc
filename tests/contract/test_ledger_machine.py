"""Every store's ledger against a small model of it, over histories that hypothesis makes up.

A thousand steps by default; POMELO_LEDGER_STEPS is the number for a full run, which `make crash` does.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pomelo.stores.ledger import (
    REPLAY_SECONDS,
    WINDOW,
    Balance,
    Grant,
    IdempotencyKey,
    LimitStatus,
    LostReservationError,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settlement,
    UsageQuery,
    UsageRecord,
    Wallet,
)
from tests.contract.ledger_rig import STORES, Rig, record

STEPS = int(os.environ.get("POMELO_LEDGER_STEPS", "1000"))
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where no disk is waited for."""

WALLETS = (Wallet("acme", True), Wallet("acme", False))
MODELS = ("gpt-4", "claude")
ALL = UsageQuery()

T = TypeVar("T")


TAKES: dict[str, Any] = {
    "wallet": st.sampled_from((*WALLETS, WALLETS[0])),
    "model": st.sampled_from(MODELS),
    "least": st.integers(0, 60),
    "more": st.integers(0, 100),
    "requests": st.sampled_from([None, None, None, 0, 1, 3, 5]),
    "slots": st.sampled_from([None, None, None, 1, 2, 4]),
    "tokens": st.integers(0, 40),
    "limit": st.sampled_from([None, None, 40, 100]),
    "enough": st.sampled_from([0, 0, 1, 20, 70, 300]),
    "repeatable": st.sampled_from([None, None, None, ("k", b"1"), ("k", b"2"), ("l", b"1")]),
}

# --- the model


@dataclass
class Window:
    """What was counted since a moment."""

    start: float
    count: int = 0


@dataclass
class Running:
    """A task that runs."""

    asked: ReserveRequest
    held: int
    requests: Window
    tokens: Window | None
    noted: UsageRecord


@dataclass
class Side:
    """A wallet."""

    granted: int = 0
    requests: Window | None = None
    tokens: dict[str, Window] = field(default_factory=dict)
    running: dict[str, Running] = field(default_factory=dict)
    records: dict[str, UsageRecord] = field(default_factory=dict)
    answers: dict[str, tuple[bytes, str, bytes, float]] = field(default_factory=dict)
    over: dict[str, float] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    touched: bool = False

    @property
    def spent(self) -> int:
        return sum(kept.cost for kept in self.records.values())

    @property
    def held(self) -> int:
        return sum(task.held for task in self.running.values())

    @property
    def available(self) -> int:
        return self.granted - self.spent - self.held


def opened(window: Window | None, now: float) -> Window | None:
    return window if window is not None and 0 <= now - window.start < WINDOW else None


class LedgerMachine(RuleBasedStateMachine):
    """Does the same to a store and to the model, and compares."""

    make: Callable[[Path], Rig]
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY)
        self.sides = {wallet: Side() for wallet in WALLETS}
        self.grants: dict[str, Grant] = {}
        self.number = 0
        self.now = self.ahead = 0.0

    def do(self, asked: Awaitable[T]) -> T:
        return self.loop.run_until_complete(_awaited(asked))

    def count(self) -> None:
        type(self).steps += 1

    @property
    def store(self) -> Any:
        return self.rig.store

    def some_task(self) -> st.SearchStrategy[str]:
        """Mostly one that runs, else one that ended or never was."""
        running = [task for side in self.sides.values() for task in side.running]
        ended = [task for side in self.sides.values() for task in side.records]
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

    def side(self, wallet: Wallet) -> Side:
        """The model's wallet; answers that are over are forgotten."""
        side = self.sides[wallet]
        for key in [key for key, kept in side.answers.items() if kept[3] <= self.now]:
            side.over[key] = side.answers.pop(key)[3]
        return side

    def requests(self, side: Side) -> Window | None:
        """The window that is open. One that is over may be open again, after a clock was set back."""
        return opened(side.requests, self.now)

    def tokens(self, side: Side, model: str) -> Window | None:
        return opened(side.tokens.get(model), self.now)

    def limit_status(self, wallet: Wallet, model: str) -> LimitStatus:
        side = self.side(wallet)
        requests, tokens = self.requests(side), self.tokens(side, model)
        return LimitStatus(
            side.available,
            requests.count if requests else 0,
            requests.start + WINDOW - self.now if requests else 0.0,
            len(side.running),
            tokens.count if tokens else 0,
            tokens.start + WINDOW - self.now if tokens else 0.0,
        )

    def compare(self, found: LimitStatus, wallet: Wallet, model: str) -> None:
        expected = self.limit_status(wallet, model)
        if self.rig.clock is None:
            expected = replace(expected, requests_reset=found.requests_reset, tokens_reset=found.tokens_reset)
        assert found == expected

    # --- rules

    @rule(wallet=st.sampled_from(WALLETS), amount=st.integers(1, 200), again=st.integers(0, 9))
    def grant(self, wallet: Wallet, amount: int, again: int) -> None:
        self.count()
        grant_id = f"g{len(self.grants) if again > 2 else again}"
        given = Grant(grant_id, wallet, amount, float(len(self.grants)))
        if grant_id not in self.grants:
            self.grants[grant_id] = given
            self.sides[wallet].granted += amount
            self.sides[wallet].touched = True
        side = self.side(wallet)
        assert self.do(self.store.grant(given)) == Balance(side.granted, side.spent, side.held)

    def asks(self, wallet, model, least, more, requests, slots, tokens, limit, enough, repeatable) -> None:  # type: ignore[no-untyped-def]
        self.count()
        self.number += 1
        draft = record(f"t{self.number:04}", account=wallet.account, live=wallet.live, model=model)
        side = self.side(wallet)
        key = IdempotencyKey(*repeatable) if repeatable and repeatable[0] not in side.unsure else None
        asked = ReserveRequest(draft, least, least + more, requests, slots, tokens, limit, key, enough)
        answer = self.do(self.store.reserve(asked))
        expected = self.predicted(side, asked)
        if expected == "repeated":
            assert isinstance(answer, ReplayedAnswer)
            assert key is not None
            _, first, kept, _ = side.answers[key.key]
            assert (answer.record, answer.answer) == (side.records[first], kept)
        elif expected is not None:
            assert isinstance(answer, Refused)
            assert answer.code == expected
        else:
            assert isinstance(answer, Reserved)
            held = min(asked.maximum, side.available)
            if enough:
                share = side.available // (20 if slots is None else slots - len(side.running))
                held = min(held, max(share, enough, least))
            assert answer.held == held
            assert asked.minimum <= answer.held
            side.requests = self.requests(side) or Window(self.now)
            side.requests.count += 1
            if requests is not None:
                assert side.requests.count <= requests
            window = None
            if tokens or limit is not None:
                window = side.tokens[model] = self.tokens(side, model) or Window(self.now)
                window.count += tokens
            side.running[draft.task_id] = Running(asked, answer.held, side.requests, window, draft)
            side.touched = True
        self.compare(answer.limit_status, wallet, model)

    @rule(**TAKES)
    def reserve(self, **asked: Any) -> None:
        self.asks(**asked)

    # Takes come up more often than other steps, since many are refused.
    @rule(**TAKES)
    def take_too(self, **asked: Any) -> None:
        self.asks(**asked)

    @rule(**TAKES)
    def one_more_take(self, **asked: Any) -> None:
        self.asks(**asked)

    def predicted(self, side: Side, asked: ReserveRequest) -> str | None:
        """What the port says comes of it; None: it is taken."""
        if asked.idempotency_key is not None:
            key, print_ = asked.idempotency_key.key, asked.idempotency_key.fingerprint
            runs = [
                t.asked.idempotency_key for t in side.running.values() if t.asked.idempotency_key is not None
            ]
            known = {r.key: r.fingerprint for r in runs} | {k: a[0] for k, a in side.answers.items()}
            if key in known:
                if known[key] != print_:
                    return "idempotency_mismatch"
                return "repeated" if key in side.answers else "idempotency_conflict"
        requests = self.requests(side) or Window(0.0)
        if asked.requests_limit is not None and requests.count >= asked.requests_limit:
            return "rate_limit_exceeded"
        if asked.concurrency_limit is not None and len(side.running) >= asked.concurrency_limit:
            return "concurrency_limit_exceeded"
        window = self.tokens(side, asked.draft.model) or Window(0.0)
        if asked.tokens_limit is not None and window.count + asked.tokens > asked.tokens_limit:
            return "token_limit_exceeded"
        return "insufficient_credits" if side.available < asked.minimum else None

    @rule(data=st.data())
    def take_again(self, data: st.DataObject) -> None:
        self.count()
        running = [task for side in self.sides.values() for task in side.running.values()]
        if not running:
            return
        task = data.draw(st.sampled_from(running))
        answer = self.do(self.store.reserve(task.asked))
        assert isinstance(answer, Reserved)
        assert answer.held == task.held
        self.compare(answer.limit_status, task.asked.draft.wallet, task.asked.draft.model)

    @rule(data=st.data(), used=st.integers(0, 90))
    def note(self, data: st.DataObject, used: int) -> None:
        self.count()
        noted, gone = [], []
        for task_id in data.draw(st.lists(self.some_task(), min_size=1, max_size=4, unique=True)):
            wallet, task = self.found(task_id)
            if task is None:
                gone.append(task_id)
            drawn = replace(
                record(task_id, account=wallet.account, live=wallet.live), cost=used, output_tokens=used
            )
            if task is not None:
                drawn = replace(task.asked.draft, cost=used, output_tokens=used)
                task.noted = drawn
            noted.append(drawn)
        assert self.do(self.store.note(noted)) == gone

    def found(self, task_id: str) -> tuple[Wallet, Running | None]:
        for wallet, side in self.sides.items():
            if task_id in side.running or task_id in side.records:
                return wallet, side.running.get(task_id)
        return WALLETS[0], None

    @rule(
        data=st.data(),
        cost=st.one_of(st.integers(0, 100), st.integers(0, 1_000)),
        tokens=st.integers(0, 90),
        answer=st.sampled_from([None, b"", b"answer"]),
    )
    def settle(self, data: st.DataObject, cost: int, tokens: int, answer: bytes | None) -> None:
        self.count()
        task_id = data.draw(self.some_task())
        wallet, task = self.found(task_id)
        side = self.side(wallet)
        first = side.records.get(task_id)
        model = task.asked.draft.model if task else first.model if first else MODELS[0]
        ended = record(
            task_id,
            account=wallet.account,
            live=wallet.live,
            model=model,
            cost=cost,
            output_tokens=tokens,
            at=self.now,
        )
        asked = self.store.settle(Settlement(ended, tokens, answer))
        if task is None and (first is None or first.source == "recovered"):
            with pytest.raises(LostReservationError):
                self.do(asked)
            return
        settled = self.do(asked)
        if task is None:
            assert settled.record == first
        else:
            charged = min(cost, task.held + side.available)
            assert settled.record == replace(ended, cost=charged, uncollected=cost - charged)
            del side.running[task_id]
            side.records[task_id] = settled.record
            if task.tokens is not None and opened(task.tokens, self.now):
                task.tokens.count += tokens - task.asked.tokens
            if task.asked.idempotency_key is not None and answer is not None:
                key = task.asked.idempotency_key
                side.answers[key.key] = (key.fingerprint, task_id, answer, self.now + REPLAY_SECONDS)
        self.compare(settled.limit_status, wallet, model)

    @rule(data=st.data(), refund=st.booleans())
    def void(self, data: st.DataObject, refund: bool) -> None:
        self.count()
        task_id = data.draw(self.some_task())
        wallet, task = self.found(task_id)
        for _ in range(2):  # The second call changes nothing.
            self.do(self.store.void(wallet, task_id, refund=refund))
        if task is None:
            return
        del self.sides[wallet].running[task_id]
        if refund and opened(task.requests, self.now):
            task.requests.count -= 1
        if refund and task.tokens is not None and opened(task.tokens, self.now):
            task.tokens.count -= task.asked.tokens

    @rule(data=st.data(), now=st.sampled_from([False, False, True]))
    def recover(self, data: st.DataObject, now: bool) -> None:
        if not now:  # Otherwise few tasks would be left to settle.
            return
        self.count()
        task_id = data.draw(self.some_task())
        wallet, task = self.found(task_id)
        for _ in range(2):  # The second call changes nothing.
            self.do(self.store.recover(wallet, task_id))
        if task is None:
            return
        side = self.side(wallet)
        noted, available = task.noted, side.available
        del side.running[task_id]
        if noted.cost > 0:
            kept = {found.task_id: found for found in self.do(self.store.list_usage(ALL, limit=10_000))[0]}
            charged = min(noted.cost, task.held + available)
            side.records[task_id] = replace(
                noted,
                cost=charged,
                uncollected=noted.cost - charged,
                source="recovered",
                complete=False,
                at=kept[task_id].at,
            )

    @precondition(lambda self: self.rig.clock is not None)
    @rule(seconds=st.sampled_from([0.5, 10.0, 29.5, 59.5, 60.0, REPLAY_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.count()
        self.rig.clock.passes(seconds)
        self.now += seconds

    @precondition(lambda self: self.rig.clock is not None)
    @rule(seconds=st.sampled_from([-100_000.0, -60.0, -0.5, 30.0, 100_000.0]))
    def the_clock_jumps(self, seconds: float) -> None:
        self.count()
        self.rig.clock.jumps(seconds)
        if self.rig.clock.jumping:
            self.ahead += seconds

    @rule(now=st.sampled_from([False, False, False, False, True]))
    def crash(self, now: bool) -> None:
        if not now:  # After a crash there is little to be seen for a while.
            return
        self.count()
        self.do(self.rig.crash())
        self.now, self.ahead = self.now + self.ahead, 0.0
        kept = {found.task_id: found for found in self.do(self.store.list_usage(ALL, limit=10_000))[0]}
        for wallet in WALLETS:
            side = self.side(wallet)
            # A clock that was set back: whether a store still has an answer that was over is its own affair.
            side.unsure |= {key for key, until in side.over.items() if until > self.now}
            for task_id, task in side.running.items():
                if task.noted.cost == 0:
                    assert task_id not in kept
                    continue
                # Which of several that noted too much got what was available, is not told.
                found = kept[task_id]
                whole = replace(task.noted, source="recovered", complete=False, at=found.at)
                assert replace(found, cost=found.cost + found.uncollected, uncollected=0) == whole
                assert found.cost >= min(task.noted.cost, task.held)
                side.records[task_id] = found
            side.running.clear()

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        self.count()
        wallet, model = data.draw(st.sampled_from(WALLETS)), data.draw(st.sampled_from(MODELS))
        self.compare(self.do(self.store.limit_status(wallet, model)), wallet, model)

    # --- what always holds

    @invariant()
    def the_books_balance(self) -> None:
        if not hasattr(self, "rig"):
            return
        for wallet, side in self.sides.items():
            found = self.do(self.store.balance(wallet))
            assert found == Balance(side.granted, side.spent, side.held)
            assert min(found.granted, found.spent, found.held, found.available) >= 0
            given = self.do(self.store.list_grants(wallet))
            assert given == [g for g in self.grants.values() if g.wallet == wallet]
            assert sum(g.amount for g in given) == found.granted

    @invariant()
    def every_task_ends_once(self) -> None:
        if not hasattr(self, "rig"):
            return
        kept, after = self.do(self.store.list_usage(ALL, limit=10_000))
        expected = {task: r for side in self.sides.values() for task, r in side.records.items()}
        assert after == ""
        assert len(kept) == len(expected)
        assert {found.task_id: found for found in kept} == expected
        held = {found.task_id: found for found in self.do(self.store.held())}
        running = {task: r for side in self.sides.values() for task, r in side.running.items()}
        assert held == {task: r.noted for task, r in running.items()}
        reserved = self.do(self.store.reservations(own=True))
        assert [one.record.task_id for one in reserved] == sorted(running)
        assert all(one.amount == running[one.record.task_id].held and one.own for one in reserved)
        touched = {wallet for wallet, side in self.sides.items() if side.touched}
        assert touched == {wallet for wallet in self.do(self.store.wallets()) if wallet.account == "acme"}


async def _awaited(asked: Awaitable[T]) -> T:
    return await asked


@pytest.mark.timeout(0 if STEPS > 10_000 else 300)
@pytest.mark.parametrize("kind", STORES)
def test_the_store_does_what_the_model_does(kind: str) -> None:
    machine = type("Machine", (LedgerMachine,), {"make": staticmethod(STORES[kind]), "steps": 0})
    while machine.steps < STEPS:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=min(200, max(1, STEPS // 50)),
                stateful_step_count=50,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(f"{kind}: {machine.steps} steps")  # noqa: T201
