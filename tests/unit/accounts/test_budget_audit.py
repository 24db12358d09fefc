"""The audit of budgets, on keys that were rotated, on budgets that were changed, and while tasks end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts import budgets
from pomelo.accounts.audit import audit
from pomelo.accounts.budget_audit import Difference, find_differences
from pomelo.stores.accounts import Wallet
from pomelo.stores.acts import Act
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import Budget, OpenReservation, ReserveRequest, Settlement
from pomelo.stores.usage import UsageRecord, UsageTotal
from tests.unit.accounts.audited_store import ACME, ACME_TEST, add_account, corrupt, draft, reserve, run

NOW = 1_500.0
TOTAL = "1000000/total"
BUDGET = Budget("budget:first.total", 1_000_000, 0.0)
MIDNIGHT = 10 * 86_400.0
DAILY = KeyRecord("daily", "acme", True, b"", (), 1.0, budget="1000000/day")
TODAY = Budget("budget:daily.day", 1_000_000, MIDNIGHT)
COST = 5
"""Microcredits of a task of `spend`."""


class Same:
    """The same store. Its subclasses differ in one method."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class Counting(Same):
    """It counts its sums."""

    sums = 0

    async def sum_usage(self, *arguments: Any, **options: Any) -> list[UsageTotal]:
        self.sums += 1
        return await self.store.sum_usage(*arguments, **options)


@pytest.fixture(name="store")
async def _store(store: Store) -> Store:
    """A store in which the key `first` has a budget, and was replaced by `second`."""
    await add_account(store)
    first = KeyRecord("first", "acme", True, b"", (), 1.0, budget=TOTAL)
    await store.add_key(first)
    await store.add_key(replace(first, key_id="second", origin="first", created=2.0))
    return store


async def spend(
    store: Store, task_id: str, key_id: str, budget: Budget | None, wallet: Wallet = ACME, at: float = 1_000.0
) -> None:
    """Runs a task of a key that counts toward a budget."""
    record = draft(task_id, wallet, key_id=key_id, at=at)
    await store.reserve(ReserveRequest(record, minimum=1, maximum=100, budget=budget))
    await store.settle(Settlement(replace(record, cost=COST)))


async def differences(store: Any, now: float = NOW) -> list[Difference]:
    """What the audit of budgets finds."""
    return [found async for found in find_differences(store, now)]


async def test_the_tasks_of_all_keys_that_replaced_each_other_count_toward_one_budget(store: Store) -> None:
    for key_id in ("first", "second"):
        await spend(store, f"of {key_id}", key_id, BUDGET)
    assert await differences(store) == []
    await spend(store, "counted too much", "another key", BUDGET)
    assert await differences(store) == [Difference(ACME, "first", 3 * COST, 2 * COST)]


async def test_too_little_is_used_of_a_budget_only_if_it_was_not_changed(store: Store) -> None:
    await spend(store, "of first", "first", None)
    assert await differences(store) == [Difference(ACME, "first", 0, COST)]
    await store.add_key(KeyRecord("other", "acme", True, b"", (), 1.0))
    act = Act("a1", 900.0, "set_key_budget", "acme", "other", True, "", TOTAL)
    await store.set_budget("other", TOTAL, act)
    assert await differences(store) == [Difference(ACME, "first", 0, COST)]
    await store.set_budget("second", "9/total", replace(act, act_id="a2", key_id="second"))
    assert await differences(store) == []


async def test_a_budget_of_which_more_is_used_meanwhile_is_not_compared(store: Store) -> None:
    class Late(Same):
        """Its sums are those before the tasks. The second task ends before the second comparison."""

        async def sum_usage(self, *_: Any, **__: Any) -> list[UsageTotal]:
            return []

        async def drafts(self) -> list[UsageRecord]:
            if meanwhile:
                await spend(store, meanwhile.pop(), "first", BUDGET)
            return await store.drafts()

    meanwhile = ["second"]
    await spend(store, "first", "first", BUDGET)
    assert await differences(Late(store)) == []
    assert await differences(Late(store)) == [Difference(ACME, "first", 2 * COST, 0)]


@pytest.mark.parametrize("comparison", [1, 2])
async def test_a_difference_that_only_one_comparison_finds_is_no_finding(
    store: Store, comparison: int
) -> None:
    class Late(Same):
        """The two sums of one comparison are those before the task."""

        sums = 0

        async def sum_usage(self, *arguments: Any, **options: Any) -> list[UsageTotal]:
            self.sums += 1
            late = self.sums in (2 * comparison - 1, 2 * comparison)
            return [] if late else await store.sum_usage(*arguments, **options)

    await spend(store, "of first", "first", BUDGET)
    assert await differences(Late(store)) == []


async def test_the_records_of_an_account_are_summed_once_for_all_its_budgets(store: Store) -> None:
    for number in range(20):
        await store.add_key(KeyRecord(f"k{number}", "acme", True, b"", (), 3.0 + number, budget=TOTAL))
        await spend(store, f"t{number}", f"k{number}", BUDGET._replace(name=f"budget:k{number}.total"))
    counting = Counting(store)
    assert await differences(counting) == []
    assert counting.sums == 2  # from two times on
    await spend(store, "counted too much", "another key", BUDGET)
    assert await differences(counting) == [Difference(ACME, "first", COST, 0)]


async def test_only_the_budget_of_a_running_task_is_left_out(store: Store) -> None:
    for key_id, created in (("before", 0.5), ("after", 3.0)):
        await store.add_key(KeyRecord(key_id, "acme", True, b"", (), created, budget=TOTAL))
    for key_id in ("before", "first", "after"):
        await spend(
            store, f"counted for {key_id}", "another key", BUDGET._replace(name=f"budget:{key_id}.total")
        )
    running = draft("running", key_id="second")
    await store.reserve(ReserveRequest(running, minimum=1, maximum=100))
    assert sorted(await differences(store)) == [
        Difference(ACME, "after", COST, 0),
        Difference(ACME, "before", COST, 0),
    ]
    await store.void(ACME, "running")
    assert Difference(ACME, "first", COST, 0) in await differences(store)


async def test_what_was_spent_at_the_end_of_a_period_does_not_count_in_the_next(store: Store) -> None:
    await store.add_key(DAILY)
    for task_id, at in (("yesterday", MIDNIGHT - 1), ("until this morning", MIDNIGHT + 1)):
        await spend(store, task_id, "daily", TODAY._replace(start=0.0), at=at)
    await spend(store, "today", "daily", TODAY, at=MIDNIGHT + 1_000)
    assert await differences(store, MIDNIGHT + 2_000) == []


@pytest.mark.parametrize(
    ("counted", "uncounted", "by_others", "found"),
    [
        ([-300], [], 0, None),  # by a clock that is behind
        ([], [-40_000], 1, (1, 0)),
        ([], [10, 1_000], 0, (0, 1)),  # the first may be yesterday's
        ([1_000], [10], 2, (3, 2)),  # the other may be today's
    ],
)
async def test_records_near_the_beginning_of_a_period_may_belong_to_it_or_not(
    store: Store, counted: list[int], uncounted: list[int], by_others: int, found: tuple[int, int] | None
) -> None:
    """The numbers are the seconds after midnight of the key's tasks, and the number of tasks of another key
    that count toward its budget. `found` are the tasks that are used of it, and those that are recorded."""
    await store.add_key(DAILY)
    for after in counted:
        await spend(store, f"counted {after}", "daily", TODAY, at=MIDNIGHT + after)
    for after in uncounted:
        await spend(store, f"uncounted {after}", "daily", None, at=MIDNIGHT + after)
    for number in range(by_others):
        await spend(store, f"other {number}", "another key", TODAY, at=MIDNIGHT + 1_000)
    expected = [] if found is None else [Difference(ACME, "daily", found[0] * COST, found[1] * COST)]
    assert await differences(store, MIDNIGHT + 2_000) == expected


async def test_only_a_change_of_the_budget_in_its_period_explains_that_too_little_is_used(
    store: Store,
) -> None:
    created = Act("created", MIDNIGHT + 5, "create_key", "acme", "daily", True, "", "")
    await store.add_key(DAILY, created)
    await spend(store, "uncounted", "daily", None, at=MIDNIGHT + 1_000)
    for at, expected in ((-10, [Difference(ACME, "daily", 0, COST)]), (10, [])):
        budget = f"{1_000 + at}/day"
        act = Act(f"act {at}", MIDNIGHT + at, "set_key_budget", "acme", "daily", True, "", budget)
        await store.set_budget("daily", budget, act)
        assert await differences(store, MIDNIGHT + 2_000) == expected


async def test_what_a_key_has_used_of_its_budget_is_that_of_its_mode(store: Store) -> None:
    live = KeyRecord("first", "acme", True, b"", (), 1.0, budget=TOTAL)
    test = replace(live, key_id="third", live=False)
    unlimited = replace(live, key_id="fourth", budget="")
    await spend(store, "of first", "first", BUDGET)
    for number in range(2):
        await spend(
            store, f"of third {number}", "third", BUDGET._replace(name="budget:third.total"), ACME_TEST
        )
    assert await budgets.used(store, [live, test, unlimited], NOW) == {"first": COST, "third": 2 * COST}


async def test_a_task_that_begins_during_the_audit_is_no_finding(store: Store) -> None:
    await reserve(store, "lost", maximum=300)

    class Busy(Same):
        """A task begins after its reservations were read."""

        async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
            found = await store.reservations(own=own)
            await reserve(store, "begun")
            return found

    findings = (await audit(Busy(store), runs=lambda task_id: False)).findings
    assert [one.subject for one in findings] == ["lost"]


async def test_the_records_of_a_wallet_at_rest_are_read_once(store: Store) -> None:
    await run(store, "task")
    counting = Counting(store)
    assert not (await audit(counting)).findings
    assert counting.sums == 0


@pytest.mark.parametrize("damage", [5, -5])
async def test_a_wrong_balance_is_found_although_a_task_ends_during_the_audit(
    store: Store, tmp_path: Path, damage: int
) -> None:
    await run(store, "before")
    corrupt(
        tmp_path / "pomelo.db", f"UPDATE wallets SET spent = spent + {damage} WHERE live = 1 AND spent > 0"
    )

    class Busy(Same):
        """A task ends after its records were read."""

        async def drafts(self) -> list[UsageRecord]:
            await run(store, "meanwhile")
            return await store.drafts()

    (finding,) = (await audit(Busy(store))).findings
    assert (finding.check, finding.subject, finding.difference_micros) == ("spent", "acme/live", damage)


async def test_a_task_that_ends_before_the_records_are_read_is_no_finding(store: Store) -> None:
    class Busy(Same):
        """A task ends after the balances were read."""

        begun = False

        async def list_usage(self, *arguments: Any, **options: Any) -> Any:
            if not self.begun:
                self.begun = True
                await run(store, "meanwhile")
            return await store.list_usage(*arguments, **options)

    report = await audit(Busy(store))
    assert (report.records, list(report.findings)) == (1, [])
