"""The audit finds nothing in any store that was used well, whatever became of its tasks."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from redis import Redis

from pomelo.accounts.audit import audit
from pomelo.catalog.pricing import Usage, cost
from pomelo.stores.ledger import Grant, Settlement, Wallet
from tests.contract.ledger_rig import RedisRig, Rig, rig
from tests.unit.accounts.audited_store import ACME, PRICES, draft, reserve, run

__all__ = ["rig"]

TEST = Wallet("acme", False)


async def used(rig: Rig) -> None:
    """Tasks that ended, were voided, were left, and were lost with their process, on both sides."""
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
        await reserve(store, f"lost at once {name}", wallet)
        await store.note([delivered(f"lost {name}", wallet)])


def delivered(task_id: str, wallet: Wallet, **changes):
    """The record of a task that has delivered something."""
    counts = {"input_tokens": 100, "output_tokens": 7}
    return draft(task_id, wallet, **counts, cost=cost(Usage(**counts), PRICES), **changes)


async def test_nothing_differs_while_tasks_run_and_after_a_crash(rig):
    await used(rig)
    found = await audit(rig.store, page_size=7)
    assert not found.findings, found
    assert (found.records, found.holds) == (42, 4)
    await rig.crash()
    found = await audit(rig.store, page_size=7)
    assert not found.findings, found
    assert (found.records, found.holds) == (44, 0)
    assert found.uncollected_micros == 0


async def test_what_could_not_be_collected_is_told_and_no_difference(rig):
    await reserve(rig.store, "greedy", maximum=1_000)
    much = {"input_tokens": 10**6, "output_tokens": 10**6}
    record = replace(draft("greedy"), **much, cost=cost(Usage(**much), PRICES))
    settled = await rig.store.settle(Settlement(record))
    found = await audit(rig.store)
    assert not found.findings, found
    assert found.uncollected_micros == settled.record.uncollected > 0


async def test_damage_in_redis_is_found(rig):
    if not isinstance(rig, RedisRig):
        return  # that in a file is found in tests/unit/metering
    await used(rig)
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
