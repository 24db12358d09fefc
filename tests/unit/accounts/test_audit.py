"""The audit: nothing differs in a store that was used well, and every kind of damage is found."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pomelo.accounts.audit import OVERDUE, audit
from pomelo.catalog.pricing import Usage, cost
from pomelo.gen.v1.admin_service_pb2 import AuditResponse
from pomelo.stores import open_store
from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReserveRequest, Settlement
from tests.unit.accounts.audited_store import ACME, ACME_TEST, PRICES, draft, endow, hold, run, spoil

COST = 750
"""Microcredits of a task of `kept.run`."""


@pytest.fixture
async def path(tmp_path: Path) -> Path:
    """The file of a store with seven finished tasks and two that run, which nobody has open."""
    path = tmp_path / "pomelo.db"
    async with open_store(f"sqlite:{path}") as store:
        await endow(store)
        await endow(store, "other")
        for n in range(5):
            await run(store, f"task_{n}")
        await run(store, "task_test", ACME_TEST)
        await run(store, "task_other", Wallet("other", True))
    return path


async def audited(path: Path, page: int = 2) -> AuditResponse:
    async with open_store(f"sqlite:{path}") as store:
        return await audit(store, page=page)


def told(found: AuditResponse) -> list[tuple[str, str, int]]:
    return sorted((one.check, one.subject, one.difference_micros) for one in found.findings)


@pytest.mark.parametrize("page", [1, 2, 7, 500])
async def test_nothing_differs_in_a_store_that_was_used_well(path, page):
    found = await audited(path, page)
    assert not found.findings
    assert found.difference_micros == 0
    assert (found.wallets, found.records, found.holds) == (5, 7, 0)
    assert (found.cost_micros, found.uncollected_micros) == (7 * COST, 0)


async def test_running_tasks_are_told_and_differ_in_nothing(path):
    async with open_store(f"sqlite:{path}") as store:
        await hold(store, "task_running")
        await hold(store, "task_running_too", ACME_TEST)
        found = await audit(store)
        assert (found.holds, list(found.findings)) == (2, [])


async def test_a_reservation_that_no_process_runs_differs_by_its_whole_amount(path):
    async with open_store(f"sqlite:{path}") as store:
        await hold(store, "task_running")
        await hold(store, "task_lost", ACME_TEST, most=400)
        found = await audit(store, runs=lambda task_id: task_id == "task_running")
        assert told(found) == [("running", "task_lost", 400)]
        assert found.difference_micros == 400
        assert (
            "400 microcredits of acme/test are held by it, and no process runs it" in found.findings[0].detail
        )
        assert not (await audit(store, runs=lambda task_id: True)).findings
        await store.recover(ACME_TEST, "task_lost")
        assert not (await audit(store, runs=lambda task_id: task_id == "task_running")).findings


async def test_an_overdue_reservation_differs_even_if_a_process_runs_it(path):
    async with open_store(f"sqlite:{path}") as store:
        await hold(store, "task_old", most=300)  # at 1,000 s
        for at, found in (
            (1000.0, []),
            (1000.0 + OVERDUE, []),
            (1001.0 + OVERDUE, [("running", "task_old", 300)]),
        ):
            assert told(await audit(store, runs=lambda task_id: True, now=lambda at=at: at)) == found
        await store.note([draft("task_old", at=1500.0)])
        assert told(await audit(store, now=lambda: 1001.0 + OVERDUE)) == []
        assert told(await audit(store, now=lambda: 1501.0 + OVERDUE)) == [("running", "task_old", 300)]


async def test_a_task_that_ends_while_it_is_looked_at_is_no_difference(path):
    async with open_store(f"sqlite:{path}") as store:
        await hold(store, "task_ending")

        class Ending:
            """The same store; its task ends after the reservations were read."""

            def __getattr__(self, name):
                return getattr(store, name)

            async def reservations(self, *, own=False):
                found = await store.reservations(own=own)
                await store.void(ACME, "task_ending")
                return found

        assert not (await audit(Ending(), runs=lambda task_id: False)).findings


async def test_what_could_not_be_collected_is_no_difference(path):
    async with open_store(f"sqlite:{path}") as store:
        wallet = Wallet("other", True)
        await store.reserve(ReserveRequest(draft("task_last", wallet), minimum=1, maximum=10**12))
        await run_out(store, wallet)
        found = await audit(store)
    assert not found.findings
    assert found.uncollected_micros > 0


async def run_out(store: Store, wallet: Wallet) -> None:
    """Ends task_last of `wallet`, which used more than there was to pay for it."""
    used = Usage(input_tokens=10**6, output_tokens=10**6)
    record = draft("task_last", wallet, input_tokens=10**6, output_tokens=10**6, cost=cost(used, PRICES))
    settled = await store.settle(Settlement(record))
    assert settled.record.uncollected > 0


DAMAGE = {
    "a balance that was raised": (
        "UPDATE wallets SET granted = granted + 5 WHERE account = 'acme' AND live = 1",
        [("granted", "acme/live", 5)],
    ),
    "a grant that is gone": (
        "DELETE FROM grants WHERE account = 'acme' AND live = 0",
        [("granted", "acme/test", 1_000_000)],
    ),
    "spending that was forgotten": (
        "UPDATE wallets SET spent = spent - 1 WHERE account = 'other' AND live = 1",
        [("spent", "other/live", -1)],
    ),
    "a record that is gone": (
        "DELETE FROM usage WHERE task_id = 'task_3'",
        [("spent", "acme/live", COST)],
    ),
    "a record of another's": (
        "UPDATE usage SET account = 'other' WHERE task_id = 'task_3'",
        [("spent", "acme/live", COST), ("spent", "other/live", -COST)],
    ),
    "a cost that was changed": (
        "UPDATE usage SET cost = cost + 7 WHERE task_id = 'task_test'",
        [("bill", "task_test", 7), ("spent", "acme/test", -7)],
    ),
    "counts that were changed": (
        "UPDATE usage SET output_tokens = 0 WHERE task_id = 'task_other'",
        [("bill", "task_other", 500)],
    ),
    "prices that were changed": (
        "UPDATE usage SET prices = 'million_input_tokens=1000000' WHERE task_id = 'task_1'",
        [("bill", "task_1", 650)],
    ),
    "prices that can't be read": (
        "UPDATE usage SET prices = 'a penny' WHERE task_id = 'task_1'",
        [("bill", "task_1", 0)],
    ),
    "a debt that was made up": (
        "UPDATE usage SET uncollected = 9 WHERE task_id = 'task_2'",
        [("bill", "task_2", 9)],
    ),
    "a debt below nothing": (
        "UPDATE usage SET uncollected = -9, cost = cost + 9 WHERE task_id = 'task_2'",
        [("bill", "task_2", 0), ("spent", "acme/live", -9)],
    ),
    "an estimate that was changed": (
        "UPDATE usage SET source = 'recovered', cost = 0 WHERE task_id = 'task_4'",
        [("bill", "task_4", -COST), ("spent", "acme/live", COST)],
    ),
    "money held by nobody": (
        "UPDATE wallets SET held = 300 WHERE account = 'acme' AND live = 1",
        [("held", "acme/live", 300)],
    ),
    "more spent than was granted": (
        "UPDATE wallets SET spent = 2000000 WHERE account = 'acme' AND live = 1",
        [("balance", "acme/live", -1_000_000), ("spent", "acme/live", 2_000_000 - 5 * COST)],
    ),
    "an account that is gone": (
        "DELETE FROM accounts WHERE name = 'other'",
        [("account", "other/live", 0), ("account", "other/test", 0)],
    ),
    "a wallet that is gone": (
        "DELETE FROM wallets WHERE account = 'other' AND live = 1",
        [("granted", "other/live", -1_000_000), ("spent", "other/live", -COST)],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
async def test_damage_is_found(kind, path):
    statement, findings = DAMAGE[kind]
    spoil(path, statement)
    found = await audited(path)
    assert told(found) == findings
    assert found.difference_micros == sum(abs(difference) for _, _, difference in findings)
    assert all(one.detail for one in found.findings)


@pytest.mark.parametrize("change", [1, -1])
async def test_a_balance_that_holds_more_or_less_than_its_tasks_is_found(path, change):
    async with open_store(f"sqlite:{path}") as store:
        await hold(store, "task_running")
        await hold(store, "task_running_too", ACME_TEST)
        # Beside the store, as only something that is none of ours can.
        spoil(path, f"UPDATE wallets SET held = held + {change} WHERE account = 'acme' AND live = 0")
        assert told(await audit(store)) == [("held", "acme/test", change)]


async def test_a_task_with_two_records_is_found(path):
    async with open_store(f"sqlite:{path}") as store:  # the store no longer opens such a file
        spoil(
            path,
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_schema SET sql = replace(sql, 'task_id TEXT NOT NULL UNIQUE', 'task_id TEXT NOT NULL')"
            " WHERE name = 'usage'",
            "DELETE FROM sqlite_schema WHERE name = 'sqlite_autoindex_usage_1'",
        )
        spoil(path, "INSERT INTO usage SELECT * FROM usage WHERE task_id = 'task_3'")
        found = await audit(store)
    assert told(found)[0] == ("database", str(path), 0)
    others = [one for one in told(found) if one[0] != "database"]
    assert others == [("spent", "acme/live", -COST), ("task", "task_3", 0)]


async def test_a_task_with_a_record_that_still_holds_something_is_found(path):
    async with open_store(f"sqlite:{path}") as store:
        await hold(store, "task_running", most=400)

        class Rewritten:
            """The same store, whose running task bears the id of one that has ended."""

            def __getattr__(self, name):
                return getattr(store, name)

            async def drafts(self):
                return [draft("task_3")]

        found = await audit(Rewritten())
    assert told(found) == [("task", "task_3", 0)]


async def test_findings_beyond_the_most_are_summed_and_not_told(path):
    spoil(path, "UPDATE usage SET uncollected = 10")
    async with open_store(f"sqlite:{path}") as store:
        found = await audit(store, most=3)
    assert len(found.findings) == 3
    assert found.difference_micros == 70


async def test_tasks_that_come_and_go_meanwhile_are_no_difference(path):
    async with open_store(f"sqlite:{path}") as store:
        going, ended, audits = True, 0, 0

        async def traffic(name: str) -> None:
            nonlocal ended
            count = 0
            while going:
                await run(store, f"task_{name}_{count}", (ACME, ACME_TEST)[count % 2])
                count += 1
                ended += 1

        running = [asyncio.create_task(traffic(name)) for name in "abc"]
        while ended < 100 or audits < 20:
            found = await audit(store, page=50)
            assert not found.findings, found
            audits += 1
        going = False
        await asyncio.gather(*running)
        found = await audit(store)
        assert not found.findings


async def test_damage_is_found_also_while_tasks_come_and_go(path):
    spoil(
        path, "UPDATE wallets SET spent = spent + 1000000, granted = granted + 1000000 WHERE account = 'acme'"
    )
    async with open_store(f"sqlite:{path}") as store:
        running = asyncio.create_task(run(store, "task_new"))
        found = await audit(store)
        await running
    assert {one.check for one in found.findings} == {"granted", "spent"}
