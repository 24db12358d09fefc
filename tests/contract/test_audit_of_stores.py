"""The audit finds no difference in any intact store, however its tasks ended."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from redis import Redis

from pomelo.accounts.audit import audit
from pomelo.catalog.pricing import Usage, cost
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.ledger import Settlement
from pomelo.stores.usage import UsageRecord
from tests.contract.ledger_rig import RedisRig, Rig, rig
from tests.unit.accounts.audited_store import ACME, PRICES, draft, reserve, run

__all__ = ["rig"]

TEST = Wallet("acme", False)


async def run_tasks(rig: Rig) -> None:
    """Runs tasks that end, are voided, are cut off, and are lost with their process, in both modes."""
    store = rig.store
    for wallet in (ACME, TEST):
        await store.grant(Grant(f"more {wallet.live}", wallet, 1_000_000, 1.0))
        name = f"{wallet.live}"
        await asyncio.gather(*[run(store, f"ended {name} {n}", wallet) for n in range(20)])
        await reserve(store, f"voided {name}", wallet)
        await store.void(wallet, f"voided {name}")
        await reserve(store, f"left {name}", wallet)
        await store.settle(Settlement(delivered(f"left {name}", wallet, source="estimated", complete=False)))
        await reserve(store, f"lost {name}", wallet)
        await reserve(store, f"lost concurrently {name}", wallet)
        await store.note([delivered(f"lost {name}", wallet)])


def delivered(task_id: str, wallet: Wallet, **changes: Any) -> UsageRecord:
    """The record of a task that has delivered output."""
    counts = {"input_tokens": 100, "output_tokens": 7}
    return draft(task_id, wallet, **counts, cost=cost(Usage(**counts), PRICES), **changes)


async def test_the_audit_finds_no_difference_while_tasks_run_and_after_a_crash(rig: Rig) -> None:
    await run_tasks(rig)
    found = await audit(rig.store, page_size=7)
    assert not found.findings, found
    assert (found.records, found.reservations) == (42, 4)
    await rig.crash()
    found = await audit(rig.store, page_size=7)
    assert not found.findings, found
    assert (found.records, found.reservations) == (44, 0)
    assert found.uncollected_micros == 0


async def test_an_uncollected_cost_is_reported_but_is_no_difference(rig: Rig) -> None:
    await reserve(rig.store, "greedy", maximum=1_000)
    counts: dict[str, Any] = {"input_tokens": 10**6, "output_tokens": 10**6}
    record = replace(draft("greedy"), **counts, cost=cost(Usage(**counts), PRICES))
    settled = await rig.store.settle(Settlement(record))
    found = await audit(rig.store)
    assert not found.findings, found
    assert found.uncollected_micros == settled.record.uncollected > 0


async def test_damage_in_redis_is_found(rig: Rig) -> None:
    if not isinstance(rig, RedisRig):
        return  # damage of a file is tested in tests/faults/test_damage.py
    await run_tasks(rig)
    prefix = "pomelo:{acme/live}:"
    with Redis.from_url(rig.url) as server:
        for damage, findings in (
            (("HINCRBY", prefix + "wallet", "granted", 5), [("granted", 5)]),
            (("HINCRBY", prefix + "wallet", "spent", -3), [("spent", -3)]),
            (("HINCRBY", prefix + "wallet", "held", 2), [("held", 2)]),
        ):
            server.execute_command(*damage)
            found = await audit(rig.store)
            assert [(one.check, one.difference_micros) for one in found.findings] == findings
            assert found.findings[0].subject == "acme/live"
            server.execute_command(*damage[:3], -int(damage[3]))
    assert not (await audit(rig.store)).findings
