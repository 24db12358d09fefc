"""The audit finds no difference in any intact store, however its tasks ended."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from redis import Redis

from pomelo.accounts.audit import audit
from pomelo.catalog.pricing import Usage, cost
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.acts import Act
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import Budget, Reserved, ReserveRequest, Settlement
from pomelo.stores.usage import UsageRecord
from tests.contract.ledger_rig import RedisRig, Rig
from tests.unit.accounts.audited_store import ACME, PRICES, draft, reserve, run

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


async def count(store: Store, task_id: str, key_id: str, budget: Budget | None, at: float = 1_000.0) -> int:
    """Runs a task of a key that counts toward a budget; returns its cost."""
    counts: dict[str, Any] = {"input_tokens": 100, "output_tokens": 50}
    record = draft(task_id, ACME, key_id=key_id, **counts, cost=cost(Usage(**counts), PRICES), at=at)
    request = ReserveRequest(replace(record, cost=0), minimum=1, maximum=5_000, budget=budget)
    assert isinstance(await store.reserve(request), Reserved)
    await store.settle(Settlement(record))
    return record.cost


async def test_a_budget_that_differs_from_the_records_of_its_keys_is_found(rig: Rig) -> None:
    store = rig.store
    await store.grant(Grant("more", ACME, 1_000_000, 1.0))
    first = KeyRecord("first", "acme", True, b"", (), 1.0, budget="1000000/total")
    successor = replace(first, key_id="successor", origin="first", created=2.0)
    other = replace(first, key_id="other")
    for key in (first, successor, other):
        await store.add_key(key)
    of_first, of_other = Budget("budget:first.total", 0, 0.0), Budget("budget:other.total", 0, 0.0)
    budget = of_first._replace(limit=1_000_000)
    spent = await count(store, "a", "first", budget) + await count(store, "b", "successor", budget)
    assert await store.budget_use(ACME, [of_first, of_other]) == [(spent, 0.0), (0, 0.0)]

    async def found() -> list[tuple[str, str, int]]:
        findings = (await audit(store, now=lambda: 1_500.0)).findings
        return [(one.check, one.subject, one.difference_micros) for one in findings]

    assert await found() == []
    missing = await count(store, "c", "other", None)  # as a bug would do it
    assert await found() == [("budget", "acme/live key other", -missing)]
    act = Act("a1", 900.0, "set_key_budget", "acme", "other", True, "", "1000000/total")
    await store.set_budget("other", "999999/total", act)
    assert await found() == []  # it may have been spent before the budget
    too_much = await count(store, "d", "other", budget)
    assert await found() == [("budget", "acme/live key first", too_much)]
    await store.reserve(ReserveRequest(draft("e", ACME, key_id="first"), 1, 5_000, budget=budget))
    assert await found() == []  # while a task runs, what it uses is not known
    await store.void(ACME, "e")
    assert await found() == [("budget", "acme/live key first", too_much)]


async def test_clocks_that_differ_at_the_edge_of_a_period_are_no_difference(rig: Rig) -> None:
    store, midnight = rig.store, 10 * 86_400.0
    await store.grant(Grant("more", ACME, 1_000_000, 1.0))
    await store.add_key(KeyRecord("first", "acme", True, b"", (), 1.0, budget="1000000/day"))
    before = Budget("budget:first.day", 1_000_000, midnight - 86_400.0)
    after = before._replace(start=midnight)

    async def found(now: float) -> list[tuple[str, str, int]]:
        findings = (await audit(store, now=lambda: now)).findings
        return [(one.check, one.subject, one.difference_micros) for one in findings]

    await count(store, "a", "first", before, midnight - 40_000.0)
    today = await count(store, "b", "first", after, midnight + 1.0)
    assert await found(midnight + 2.0) == []
    assert await found(midnight - 1.0) == []  # the clock of the audit is behind
    today += await count(store, "c", "first", before, midnight - 1.0)  # the clock of a server is behind
    assert await store.budget_use(ACME, [before, after]) == [(today, midnight)] * 2
    for now in (midnight - 1.0, midnight + 2.0, midnight + 80_000.0):
        assert await found(now) == []
    missing = 0
    for task_id in "def":  # as a bug would do it
        missing += await count(store, task_id, "first", None, midnight + 40_000.0)
    for now in (midnight - 1.0, midnight + 80_000.0):
        assert await found(now) == [("budget", "acme/live key first", today - missing)]


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
        reservation: Any = server.hget(prefix + "holds", "lost True")
        server.hset(prefix + "holds", "lost True", "damaged")
        found = await audit(rig.store)
        lost = int(reservation.split()[2])
        assert [(one.check, one.difference_micros) for one in found.findings] == [("held", lost)]
        server.hset(prefix + "holds", "lost True", reservation)
    assert not (await audit(rig.store)).findings
