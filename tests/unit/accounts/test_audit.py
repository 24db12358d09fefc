"""The audit: it finds every kind of damage, and nothing in an undamaged store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.audit import OVERDUE, audit
from pomelo.call import DEFAULT_TIMEOUT
from pomelo.catalog.pricing import Usage, cost
from pomelo.errors import PomeloError
from pomelo.gen.admin.v1.admin_service_pb2 import AuditLedgerResponse
from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import OpenReservation, ReserveRequest, Settlement
from pomelo.stores.usage import UsageRecord, WalletState
from tests.unit.accounts.audited_store import (
    ACME,
    ACME_TEST,
    PRICES,
    add_account,
    corrupt,
    draft,
    reserve,
    run,
)
from tests.unit.refusals import refused

COST = 750
"""Microcredits that a task of `audited_store.run` costs."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of `store`."""
    return tmp_path / "pomelo.db"


@pytest.fixture(name="store")
async def _store(store: Store) -> Store:
    """A store with seven finished tasks."""
    await add_account(store)
    await add_account(store, "other")
    for n in range(5):
        await run(store, f"task_{n}")
    await run(store, "task_test", ACME_TEST)
    await run(store, "task_other", Wallet("other", True))
    return store


async def test_a_wallet_that_is_listed_twice_is_checked_once(store: Store) -> None:
    async def wallet_states() -> AsyncIterator[list[WalletState]]:
        async for page in store.wallet_states():
            for _ in range(2):
                yield [replace(state, grants_sum=state.grants_sum + 1) for state in page]

    response = await audit(Replaced(store, wallet_states=wallet_states))
    subjects = [finding.subject for finding in response.findings]
    assert len(subjects) == len({*subjects}) == response.wallets


class Replaced:
    """The same store, but for these methods."""

    def __init__(self, store: Store, **methods: Any) -> None:
        self._store = store
        vars(self).update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def findings_of(report: AuditLedgerResponse) -> list[tuple[str, str, int]]:
    return sorted((one.check, one.subject, one.difference_micros) for one in report.findings)


@pytest.mark.parametrize("page_size", [1, 2, 7, 500])
async def test_an_undamaged_store_has_no_findings(store: Store, page_size: int) -> None:
    report = await audit(store, page_size=page_size)
    assert not report.findings
    assert report.difference_micros == 0
    assert (report.wallets, report.records, report.reservations) == (5, 7, 0)
    assert (report.cost_micros, report.uncollected_micros) == (7 * COST, 0)


async def test_running_tasks_are_counted_and_are_no_finding(store: Store) -> None:
    await reserve(store, "task_running")
    await reserve(store, "task_running_too", ACME_TEST)
    report = await audit(store)
    assert (report.reservations, list(report.findings)) == (2, [])


async def test_a_reservation_without_a_running_task_is_reported_with_its_full_amount(store: Store) -> None:
    await reserve(store, "task_running")
    await reserve(store, "task_lost", ACME_TEST, maximum=400)
    report = await audit(store, runs=lambda task_id: task_id == "task_running")
    assert findings_of(report) == [("running", "task_lost", 400)]
    assert report.difference_micros == 400
    assert report.findings[0].detail == "It reserves 400 microcredits of acme/test, but no process runs it"
    assert not (await audit(store, runs=lambda task_id: True)).findings
    await store.recover(ACME_TEST, "task_lost")
    assert not (await audit(store, runs=lambda task_id: task_id == "task_running")).findings


async def test_an_overdue_reservation_is_found_even_if_a_process_runs_its_task(store: Store) -> None:
    await reserve(store, "task_old", maximum=300)  # at 1,000 s
    for at, expected in (
        (1000.0, []),
        (1030.0 + DEFAULT_TIMEOUT, []),
        (1000.0 + OVERDUE, []),
        (1001.0 + OVERDUE, [("running", "task_old", 300)]),
    ):
        report = await audit(store, runs=lambda task_id: True, now=partial(float, at))
        assert findings_of(report) == expected
    await store.note([draft("task_old", at=1500.0)])
    assert findings_of(await audit(store, now=lambda: 1001.0 + OVERDUE)) == []
    assert findings_of(await audit(store, now=lambda: 1501.0 + OVERDUE)) == [("running", "task_old", 300)]


@pytest.mark.parametrize("ends_during", [1, 2], ids=["first read", "second read"])
async def test_a_task_that_ends_while_reservations_are_read_is_no_finding(
    store: Store, ends_during: int
) -> None:
    await reserve(store, "task_ending")
    await reserve(store, "task_lost", maximum=400)  # so that they are read again
    running, reads = {"task_ending"}, 0

    async def end_after_the_read() -> list[OpenReservation]:
        nonlocal reads
        reads += 1
        reservations = await store.reservations()
        if reads == ends_during:
            await store.void(ACME, "task_ending")
            running.clear()
        return reservations

    ending: Any = Replaced(store, reservations=end_after_the_read)
    report = await audit(ending, runs=lambda task_id: task_id in running)
    assert (findings_of(report), reads) == ([("running", "task_lost", 400)], 2)


async def test_a_reservation_of_another_process_is_no_finding_before_it_is_overdue(store: Store) -> None:
    await reserve(store, "task_elsewhere")

    async def of_another_process() -> list[OpenReservation]:
        return [replace(one, own=False) for one in await store.reservations()]

    shared: Any = Replaced(store, reservations=of_another_process)
    assert not (await audit(shared, runs=lambda task_id: False)).findings
    report = await audit(shared, runs=lambda task_id: False, now=lambda: 1001.0 + OVERDUE)
    assert findings_of(report) == [("running", "task_elsewhere", 5_000)]


async def test_an_error_that_no_damage_explains_is_raised(store: Store) -> None:
    async def unreadable() -> list[UsageRecord]:
        raise PomeloError("store_unavailable")

    failing: Any = Replaced(store, drafts=unreadable)
    with refused("store_unavailable"):
        await audit(failing)


@pytest.mark.parametrize("found_at", [1, 2], ids=["first", "with the error"])
async def test_an_error_that_damage_explains_is_reported_as_the_damage_once(
    store: Store, found_at: int
) -> None:
    searches = 0

    async def damage() -> list[tuple[str, str]]:
        nonlocal searches
        searches += 1
        return [("pomelo.db", "A page is unreadable")] if searches >= found_at else []

    async def unreadable() -> list[UsageRecord]:
        raise KeyError("unreadable")

    damaged: Any = Replaced(store, damage=damage, drafts=unreadable)
    (finding,) = (await audit(damaged)).findings
    assert (finding.check, finding.subject, finding.detail) == (
        *("database", "pomelo.db"),
        "A page is unreadable",
    )


async def test_the_wallets_of_many_accounts_belong_to_them(store: Store) -> None:
    for number in range(1_001):  # more than one page
        assert await store.add_account(f"account-{number}", "pro", 1.0)
    report = await audit(store)
    assert not report.findings


async def test_an_uncollected_amount_is_no_finding(store: Store) -> None:
    wallet = Wallet("other", True)
    await store.reserve(ReserveRequest(draft("task_last", wallet), minimum=1, maximum=10**12))
    used = {"input_tokens": 10**6, "output_tokens": 10**6}
    record = draft("task_last", wallet, **used, cost=cost(Usage(**used), PRICES))
    settled = await store.settle(Settlement(record))
    assert settled.record.uncollected > 0  # it costs more than the wallet's balance
    report = await audit(store)
    assert not report.findings
    assert report.uncollected_micros > 0


DAMAGE = {
    "a raised balance": (
        "UPDATE wallets SET granted = granted + 5 WHERE account = 'acme' AND live = 1",
        [("granted", "acme/live", 5)],
    ),
    "a missing grant": (
        "DELETE FROM grants WHERE account = 'acme' AND live = 0",
        [("granted", "acme/test", 1_000_000)],
    ),
    "a lowered spent amount": (
        "UPDATE wallets SET spent = spent - 1 WHERE account = 'other' AND live = 1",
        [("spent", "other/live", -1)],
    ),
    "a missing record": ("DELETE FROM usage WHERE task_id = 'task_3'", [("spent", "acme/live", COST)]),
    "a record of another account": (
        "UPDATE usage SET account = 'other' WHERE task_id = 'task_3'",
        [("spent", "acme/live", COST), ("spent", "other/live", -COST)],
    ),
    "a changed cost": (
        "UPDATE usage SET cost = cost + 7 WHERE task_id = 'task_test'",
        [("bill", "task_test", 7), ("spent", "acme/test", -7)],
    ),
    "changed counts": (
        "UPDATE usage SET output_tokens = 0 WHERE task_id = 'task_other'",
        [("bill", "task_other", 500)],
    ),
    "changed prices": (
        "UPDATE usage SET prices = 'million_input_tokens=1000000' WHERE task_id = 'task_1'",
        [("bill", "task_1", 650)],
    ),
    "unreadable prices": (
        "UPDATE usage SET prices = 'a penny' WHERE task_id = 'task_1'",
        [("bill", "task_1", 0)],
    ),
    "a raised uncollected amount": (
        "UPDATE usage SET uncollected = 9 WHERE task_id = 'task_2'",
        [("bill", "task_2", 9)],
    ),
    "a negative uncollected amount": (
        "UPDATE usage SET uncollected = -9, cost = cost + 9 WHERE task_id = 'task_2'",
        [("bill", "task_2", 0), ("spent", "acme/live", -9)],
    ),
    "negative counts": (
        "UPDATE usage SET input_tokens = -100 WHERE task_id = 'task_2'",
        [("bill", "task_2", 0)],
    ),
    "a changed estimate": (
        "UPDATE usage SET source = 'recovered', cost = 0 WHERE task_id = 'task_4'",
        [("bill", "task_4", -COST), ("spent", "acme/live", COST)],
    ),
    "a reserved amount without a task": (
        "UPDATE wallets SET held = 300 WHERE account = 'acme' AND live = 1",
        [("held", "acme/live", 300)],
    ),
    "more spent than granted": (
        "UPDATE wallets SET spent = 2000000 WHERE account = 'acme' AND live = 1",
        [("balance", "acme/live", -1_000_000), ("spent", "acme/live", 2_000_000 - 5 * COST)],
    ),
    "a credit limit below zero": (
        "UPDATE wallets SET credit_limit = -7, granted = granted - 7 WHERE account = 'acme' AND live = 1",
        [("balance", "acme/live", -7)],
    ),
    "a missing account": (
        "DELETE FROM accounts WHERE name = 'other'",
        [("account", "other/live", 0), ("account", "other/test", 0)],
    ),
    "a missing wallet": (
        "DELETE FROM wallets WHERE account = 'other' AND live = 1",
        [("granted", "other/live", -1_000_000), ("spent", "other/live", -COST)],
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_found(name: str, store: Store, path: Path) -> None:
    statement, findings = DAMAGE[name]
    corrupt(path, statement)
    report = await audit(store, page_size=2)
    assert findings_of(report) == findings
    assert report.difference_micros == sum(abs(difference) for _, _, difference in findings)
    assert all(one.detail for one in report.findings)


@pytest.mark.parametrize("change", [1, -1])
async def test_a_balance_that_reserves_more_or_less_than_its_tasks_is_found(
    store: Store, path: Path, change: int
) -> None:
    await reserve(store, "task_running")
    await reserve(store, "task_running_too", ACME_TEST)
    # Behind the store's back: it never writes such a value itself.
    corrupt(path, f"UPDATE wallets SET held = held + {change} WHERE account = 'acme' AND live = 0")
    assert findings_of(await audit(store)) == [("held", "acme/test", change)]


async def test_a_wallet_that_is_missing_with_its_account_is_counted_and_found(
    store: Store, path: Path
) -> None:
    wallets = (await audit(store)).wallets
    corrupt(
        path,
        "DELETE FROM wallets WHERE account = 'other' AND live = 1",
        "DELETE FROM accounts WHERE name = 'other'",
    )
    report = await audit(store)
    assert findings_of(report) == [
        ("account", "other/live", 0),
        ("account", "other/test", 0),
        ("granted", "other/live", -1_000_000),
        ("spent", "other/live", -COST),
    ]
    assert report.wallets == wallets


async def test_findings_of_wallets_are_sorted_in_whatever_order_the_store_lists_them(
    store: Store, path: Path
) -> None:
    async def reversed_states() -> AsyncIterator[list[WalletState]]:
        for page in reversed([page async for page in store.wallet_states()]):
            yield page[::-1]

    corrupt(path, "UPDATE wallets SET granted = granted + 5")
    unordered: Any = Replaced(store, wallet_states=reversed_states)
    for listed in (store, unordered):
        subjects = [finding.subject for finding in (await audit(listed)).findings]
        assert subjects == sorted(subjects)
        assert len(subjects) > 3


async def test_a_task_with_two_records_is_found(store: Store, path: Path) -> None:
    corrupt(
        path,
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = replace(sql, 'task_id TEXT NOT NULL UNIQUE', 'task_id TEXT NOT NULL')"
        " WHERE name = 'usage'",
        "DELETE FROM sqlite_schema WHERE name = 'sqlite_autoindex_usage_1'",
    )
    corrupt(path, "INSERT INTO usage SELECT * FROM usage WHERE task_id = 'task_3'")
    report = await audit(store)
    assert findings_of(report)[0] == ("database", str(path), 0)
    others = [one for one in findings_of(report) if one[0] != "database"]
    assert others == [("spent", "acme/live", -COST), ("task", "task_3", 0)]


async def test_a_task_with_a_record_and_a_reservation_is_found(store: Store) -> None:
    await reserve(store, "task_running", maximum=400)

    async def of_an_ended_task() -> list[UsageRecord]:
        return [draft("task_3")]

    shared: Any = Replaced(store, drafts=of_an_ended_task)
    report = await audit(shared)
    assert findings_of(report) == [("task", "task_3", 0)]


async def test_findings_above_the_maximum_are_summed_and_not_listed(store: Store, path: Path) -> None:
    corrupt(path, "UPDATE usage SET uncollected = 10")
    report = await audit(store, max_findings=3)
    assert len(report.findings) == 3
    assert report.difference_micros == 70


async def test_tasks_that_begin_and_end_during_the_audit_are_no_finding(store: Store) -> None:
    active, ended, audits = True, 0, 0

    async def run_tasks(name: str) -> None:
        nonlocal ended
        count = 0
        while active:
            await run(store, f"task_{name}_{count}", (ACME, ACME_TEST)[count % 2])
            count += 1
            ended += 1

    running = [asyncio.create_task(run_tasks(name)) for name in "abc"]
    while ended < 100 or audits < 20:
        report = await audit(store, page_size=50)
        assert not report.findings, report
        audits += 1
    active = False
    await asyncio.gather(*running)
    report = await audit(store)
    assert not report.findings


async def test_damage_is_found_while_tasks_run(store: Store, path: Path) -> None:
    corrupt(
        path, "UPDATE wallets SET spent = spent + 1000000, granted = granted + 1000000 WHERE account = 'acme'"
    )
    running = asyncio.create_task(run(store, "task_new"))
    report = await audit(store)
    await running
    assert {one.check for one in report.findings} == {"granted", "spent"}
