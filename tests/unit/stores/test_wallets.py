"""What a wallet in memory decides: what a task may reserve, and what its end gives back or takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pomelo.stores.ledger import (
    DEFAULT_SHARES,
    Budget,
    Count,
    Counter,
    IdempotencyKey,
    Refused,
    ReserveRequest,
)
from pomelo.stores.sqlite.wallets import LoadedBudget, LoadedWallet, Reservation, WalletRow
from pomelo.stores.usage import UsageRecord
from tests.unit.accounts.audited_store import draft

REQUESTS = Counter("requests", 1, 10, 60.0)
RUNNING = Counter("concurrency", 1, 3)
BUDGET = Budget("budget:key", 50, 100.0)


@pytest.fixture(name="wallet")
def _wallet() -> LoadedWallet:
    """A wallet with 100 microcredits at time 100."""
    wallet = LoadedWallet("acme", True)
    wallet.load(WalletRow(True, True, 120, 20), 100.0)
    return wallet


def request(task_id: str = "a", minimum: int = 1, maximum: int = 10, **more: Any) -> ReserveRequest:
    return ReserveRequest(draft(task_id), minimum, maximum, **more)


def reserve(wallet: LoadedWallet, task_id: str = "a", now: float = 100.0, **values: Any) -> Reservation:
    reserved = wallet.reserve(request(task_id, **values), now)
    assert isinstance(reserved, Reservation)
    return reserved


def refuse(wallet: LoadedWallet, now: float = 100.0, **values: Any) -> tuple[str, str, int]:
    """The code and the counter of a refusal, and the credits that it reports. It takes nothing."""
    before = wallet.held, wallet.running, json.dumps(wallet.counts)
    refused = wallet.reserve(request("refused", **values), now)
    assert isinstance(refused, Refused)
    assert (wallet.held, wallet.running, json.dumps(wallet.counts)) == before
    return refused.code, refused.counter, refused.limit_status.available


def charged(reservation: Reservation, cost: int) -> UsageRecord:
    return reservation.charge(replace(reservation.record, cost=cost))


@pytest.mark.parametrize(
    ("now", "reported"),
    [(99.5, Count()), (100.0, Count(3, 60.0)), (159.5, Count(3, 0.5)), (160.0, Count()), (170.0, Count())],
)
def test_a_window_counts_from_its_beginning_until_its_end(now: float, reported: Count) -> None:
    wallet = LoadedWallet("acme", True)
    wallet.counts = {"requests": [3, 100.0, 160.0], "concurrency": [2, None, None]}
    status = wallet.limit_status((REQUESTS, Counter("concurrency")), now)
    assert status.counts == {"requests": reported, "concurrency": Count(2)}


def test_a_row_that_is_read_again_does_not_change_what_memory_knows_better() -> None:
    wallet = LoadedWallet("acme", True)
    wallet.withdrawing = 5
    wallet.budgets["key"] = LoadedBudget("key", 200.0)
    wallet.load(WalletRow(True, True, 10, 1, {}, 0, [("key", 100.0, 7), ("other", 100.0, 8)]), 250.0)
    assert wallet.available == 10 - 5 - 1
    assert (wallet.budgets["key"].start, wallet.budgets["key"].spent) == (200.0, 0)
    assert wallet.budgets["other"].spent == 8


def test_only_open_windows_are_read_and_only_once() -> None:
    wallet = LoadedWallet("acme", True)
    stored: dict[str, list[Any]] = {
        "open": [3, 90.0, 150.0],
        "over": [3, 0.0, 100.0],
        "future": [3, 101.0, 161.0],
        "running": [1, None, None],
    }
    again: dict[str, list[Any]] = {"open": [9, 90.0, 150.0]}
    for known, counts in ((False, stored), (True, again)):
        wallet.load(WalletRow(known, known, 10, 1, counts, 4, []), 100.0)
        assert (wallet.known, wallet.stored, wallet.loaded, wallet.credit_limit) == (known, known, True, 4)
        assert wallet.counts == {"open": [3, 90.0, 150.0]}
        assert wallet.closes == 150.0


def test_a_task_reserves_its_maximum_or_all_that_is_available(wallet: LoadedWallet) -> None:
    assert reserve(wallet, maximum=30).amount == 30
    assert (wallet.held, wallet.running, wallet.available) == (30, 1, 70)
    assert refuse(wallet, minimum=71, maximum=99) == ("insufficient_credits", "", 70)
    assert reserve(wallet, "b", minimum=70, maximum=99).amount == 70
    assert (wallet.held, wallet.running, wallet.available) == (100, 2, 0)
    assert reserve(wallet, "c", minimum=0).amount == 0


@pytest.mark.parametrize(
    ("used", "limit", "amount"),
    [
        (0, 4, 25),
        (1, 4, 33),
        (3, 4, 90),
        (4, 4, 90),
        (9, 4, 90),
        (0, 90, 6),
        (0, None, 100 // DEFAULT_SHARES),
    ],
)
def test_a_task_that_shares_reserves_its_part_of_the_credits(
    wallet: LoadedWallet, used: int, limit: int | None, amount: int
) -> None:
    shared = Counter("concurrency", 0, limit)
    if used:
        wallet.counts["concurrency"] = [used, None, None]
    options: dict[str, Any] = {"counters": (REQUESTS, shared), "shares": "concurrency"}
    sufficient = 6 if limit == 90 else 1
    assert reserve(wallet, maximum=90, sufficient=sufficient, **options).amount == amount


def test_a_share_is_at_least_sufficient_and_at_least_the_minimum(wallet: LoadedWallet) -> None:
    assert reserve(wallet, maximum=90, sufficient=40, minimum=30).amount == 40
    assert reserve(wallet, "b", maximum=90, sufficient=20, minimum=30).amount == 30
    assert reserve(wallet, "c", maximum=25, sufficient=90).amount == 25
    assert reserve(wallet, "d", maximum=90, sufficient=90).amount == 5


def test_a_budget_limits_what_a_task_reserves(wallet: LoadedWallet) -> None:
    first = reserve(wallet, maximum=30, budget=BUDGET)
    assert (first.budget, wallet.budgets["budget:key"].held) == (wallet.budgets["budget:key"], 30)
    assert refuse(wallet, minimum=21, budget=BUDGET) == ("insufficient_credits", "budget:key", 70)
    assert reserve(wallet, "b", minimum=20, maximum=90, budget=BUDGET).amount == 20
    assert refuse(wallet, minimum=51, maximum=90, budget=BUDGET._replace(limit=500)) == (
        *("insufficient_credits", ""),
        50,
    )
    first.release(101.0)
    assert (wallet.budgets["budget:key"].held, wallet.held) == (20, 20)
    wallet.budgets["budget:key"].spent = 25
    assert reserve(wallet, "c", maximum=90, budget=BUDGET).amount == 5


def test_a_budget_counts_anew_in_a_later_period_only(wallet: LoadedWallet) -> None:
    first = reserve(wallet, maximum=30, budget=BUDGET)
    earlier = reserve(wallet, "b", maximum=90, budget=BUDGET._replace(start=99.0))
    assert (earlier.amount, earlier.budget) == (20, first.budget)
    later = reserve(wallet, "c", maximum=40, budget=BUDGET._replace(start=101.0))
    assert (later.amount, later.budget is first.budget) == (40, False)
    assert wallet.budgets == {"budget:key": later.budget}
    first.release(101.0)
    assert (later.budget and later.budget.held, first.budget and first.budget.held) == (40, 20)


def test_a_limit_admits_exactly_as_much(wallet: LoadedWallet) -> None:
    tokens = Counter("tokens", 4, 7, 60.0)
    for task_id in "abc":
        reserve(wallet, task_id, counters=(REQUESTS, RUNNING))
    assert refuse(wallet, counters=(REQUESTS, RUNNING)) == ("limit_exceeded", "concurrency", 70)
    reserve(wallet, "status", counters=(RUNNING._replace(amount=0), tokens))
    assert refuse(wallet, counters=(REQUESTS, tokens)) == ("limit_exceeded", "tokens", 60)
    reserve(wallet, "less", counters=(tokens._replace(amount=3),))
    reserve(wallet, "none", counters=(tokens._replace(limit=None), RUNNING._replace(limit=None)))
    assert wallet.counts == {
        "requests": [3, 100.0, 160.0],
        "concurrency": [4, None, None],
        "tokens": [11, 100.0, 160.0],
    }


def test_a_window_begins_with_its_first_task_and_is_forgotten_at_its_end(wallet: LoadedWallet) -> None:
    minute, hour = REQUESTS, Counter("images", 2, 10, 3600.0)
    assert wallet.closes == math.inf
    reserve(wallet, "a", 100.0, counters=(hour, RUNNING))
    assert wallet.closes == 3700.0
    reserve(wallet, "b", 130.0, counters=(minute, hour, RUNNING))
    assert wallet.closes == 190.0
    reserve(wallet, "c", 189.5, counters=(minute,))
    assert wallet.counts["requests"] == [2, 130.0, 190.0]
    assert json.loads(wallet.encode_windows()) == {
        "images": [4, 100.0, 3700.0],
        "requests": [2, 130.0, 190.0],
    }
    reserve(wallet, "d", 190.0, counters=(minute,))
    assert wallet.counts["requests"] == [1, 190.0, 250.0]
    assert (wallet.counts["images"], wallet.counts["concurrency"]) == ([4, 100.0, 3700.0], [2, None, None])
    assert wallet.closes == 250.0


def test_the_end_of_a_task_forgets_the_windows_that_are_over(wallet: LoadedWallet) -> None:
    task = reserve(wallet, counters=(REQUESTS, RUNNING))
    task.release(159.5)
    assert wallet.counts == {"requests": [1, 100.0, 160.0]}
    other = reserve(wallet, "b", 159.5, counters=(RUNNING,))
    other.release(160.0)
    assert (wallet.counts, wallet.closes) == ({}, math.inf)


def test_a_released_task_gives_back_what_only_running_tasks_take(wallet: LoadedWallet) -> None:
    key = IdempotencyKey("key", b"")
    tasks = [reserve(wallet, task_id, counters=(REQUESTS, RUNNING), idempotency_key=key) for task_id in "a"]
    tasks.append(reserve(wallet, "b", counters=(REQUESTS, RUNNING)))
    assert wallet.keys == {"key": tasks[0]}
    tasks[0].release(101.0)
    assert (tasks[0].ended, tasks[1].ended, wallet.keys) == (True, False, {})
    assert (wallet.held, wallet.running) == (10, 1)
    assert wallet.counts == {"requests": [2, 100.0, 160.0], "concurrency": [1, None, None]}
    tasks[1].release(101.0)
    assert (wallet.held, wallet.running, wallet.counts) == (0, 0, {"requests": [2, 100.0, 160.0]})


def test_a_cost_up_to_the_reservation_is_charged_as_it_is(wallet: LoadedWallet) -> None:
    for task_id, cost in (("a", 0), ("b", 9), ("c", 10)):
        task = reserve(wallet, task_id)
        record = charged(task, cost)
        assert (record.cost, record.uncollected, task.amount) == (cost, 0, 10)
    assert wallet.held == 30  # until the ends are written


def test_a_cost_above_the_reservation_takes_available_credits(wallet: LoadedWallet) -> None:
    task = reserve(wallet, budget=BUDGET)
    record = charged(task, 60)
    assert (record.cost, record.uncollected, task.amount, wallet.held) == (60, 0, 60, 60)
    assert task.budget is not None
    assert task.budget.held == 60
    other = reserve(wallet, "b")
    record = charged(other, 60)
    assert (record.cost, record.uncollected, other.amount, wallet.held) == (40, 20, 40, 100)
    for each in (other, task):
        each.undo()
        each.undo()
    assert (task.amount, other.amount, wallet.held, task.budget.held) == (10, 10, 20, 10)


def test_a_recount_replaces_what_was_counted_in_open_windows(wallet: LoadedWallet) -> None:
    tokens, images = Counter("tokens", 30, 500, 60.0), Counter("images", 2, 10, 3600.0)
    task = reserve(wallet, counters=(REQUESTS, RUNNING, tokens, images))
    other = reserve(wallet, "b", counters=(REQUESTS, RUNNING, tokens))
    task.recount({"tokens": 45, "images": 2, "concurrency": 9, "unknown": 1}, 101.0)
    assert {name: count[0] for name, count in wallet.counts.items()} == {
        "requests": 2,
        "concurrency": 2,
        "tokens": 75,
        "images": 2,
    }
    for _ in range(2):
        task.undo()
        assert wallet.counts["tokens"][0] == 60
    task.recount({}, 101.0)
    assert wallet.counts["tokens"][0] == 60
    other.recount(None, 101.0)
    assert [wallet.counts[name][0] for name in ("requests", "concurrency", "tokens")] == [1, 2, 30]
    # At 160 the windows of a minute end, and a new one belongs to others.
    task.recount(None, 160.0)
    assert wallet.counts == {"concurrency": [2, None, None], "images": [0, 100.0, 3700.0]}
    late = reserve(wallet, "c", 161.0, counters=(tokens,))
    other.recount({"tokens": 400}, 161.0)
    assert wallet.counts["tokens"] == [30, 161.0, 221.0]
    late.recount({"tokens": 31}, 220.5)
    assert wallet.counts["tokens"] == [31, 161.0, 221.0]


@pytest.mark.parametrize("name", ["running", "waiting", "deciding"])
def test_a_wallet_that_something_refers_to_is_in_use(wallet: LoadedWallet, name: str) -> None:
    assert not wallet.in_use
    setattr(wallet, name, 1)
    assert wallet.in_use
