"""Simulations of processes with a store, with faults at random: whatever happens, no balance is overdrawn, nothing
stays reserved, and each task is charged once.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from random import Random

import pytest

from pomelo.accounts import budgets
from pomelo.accounts.audit import audit
from pomelo.stores.accounts import Grant
from pomelo.stores.base import Store
from pomelo.stores.usage import UsageQuery, UsageRecord
from tests.faults.simulated_network import SimulatedLoop
from tests.faults.simulated_stores import EPOCH, SimulatedRedis, SimulatedSqlite, SimulatedStore
from tests.faults.simulated_tasks import BUDGETS, PLAN, WALLETS, Facts
from tests.memory import MEMORY

SEEDS = int(os.environ.get("POMELO_SIMULATIONS", "2"))
SECONDS = 150.0
"""Simulated seconds in which tasks begin."""

QUIET = 180.0
"""Simulated seconds after the last fault in which all must end: a lease, and two reconciliations."""


async def run(simulated: SimulatedStore) -> None:
    """Runs tasks and faults for SECONDS, and then until all have ended."""
    random, loop = simulated.random, asyncio.get_running_loop()
    end = loop.time() + SECONDS
    while loop.time() < end:
        await asyncio.sleep(random.expovariate(8.0))
        process, chance = random.choice(simulated.processes), random.random()
        if chance < 0.93:
            process.begin()
        elif chance < 0.98:
            process.operate()
        else:
            await simulated.fail()
        simulated.check()
    await simulated.recover()
    await asyncio.sleep(QUIET)
    for process in simulated.processes:
        await process.finished()


async def check_books(store: Store, facts: Facts) -> None:
    """Checks what is left when all tasks have ended."""
    assert await store.reservations() == []
    assert list((await audit(store)).findings) == []
    records = {record.task_id: record for record in await all_records(store)}
    for task_id, charged in facts.charged.items():
        assert records[task_id] == charged
    assert not records.keys() & facts.refused
    assert records.keys() <= facts.tasks.keys()
    for answer in facts.answers.values():
        for replayed in answer.replayed:
            assert replayed == records[answer.task_id]
    for wallet in WALLETS:
        uses = await store.budget_use(wallet, [budgets.current(each, EPOCH) for each in BUDGETS.values()])
        for budget, use in zip(BUDGETS.values(), uses, strict=True):
            of_budget = {task for task, taken in facts.tasks.items() if taken == (wallet, budget.name)}
            assert use.used == sum(records[task].cost for task in of_budget & records.keys())
        given = await store.list_grants(wallet)
        assert {grant.grant_id: (wallet, grant.amount) for grant in given}.items() <= facts.grants.items()


async def all_records(store: Store) -> list[UsageRecord]:
    """All records, also those of failed tasks."""
    found = []
    for query in (UsageQuery(), UsageQuery(failed=True)):
        after = ""
        while True:
            page, after = await store.list_usage(query, limit=1_000, after=after)
            found += page
            if not after:
                break
    return found


@pytest.mark.parametrize("store", [SimulatedSqlite, SimulatedRedis])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_fault_overdraws_a_balance_or_charges_a_task_twice(store: type[SimulatedStore], seed: int) -> None:
    async def simulate(folder: Path) -> None:
        facts = Facts()
        simulated = store(folder, Random(seed), facts, exceeds=seed % 2 == 0)
        try:
            await simulated.open()
            opened = simulated.processes[0].store
            await opened.add_account("acme", PLAN.name, EPOCH)
            for wallet in WALLETS:
                facts.grants[f"first {wallet.live}"] = wallet, 5_000
                await opened.grant(Grant(f"first {wallet.live}", wallet, 5_000, EPOCH))
            await run(simulated)
            await check_books(simulated.processes[0].store, facts)
            await simulated.check_end()
        finally:
            await simulated.close()

    loop = SimulatedLoop()
    try:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            loop.run_until_complete(simulate(Path(folder)))
    finally:
        loop.close()
