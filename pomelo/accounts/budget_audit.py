"""The audit of budgets: compares what is used of them in the current period with the usage records.

A record has the time of its end, and a task counts in the period in which it began: records of the first
minutes of a period may belong to the one before. Clocks differ and are set back, and a task counts in the
latest period that has begun by any clock: records of the last minutes before a period may belong to it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NamedTuple

from pomelo.accounts import budgets
from pomelo.call import DEFAULT_TIMEOUT
from pomelo.stores.accounts import PAGE, Wallet
from pomelo.stores.acts import ActStore
from pomelo.stores.base import Store
from pomelo.stores.keys import KeyRecord, KeyStore
from pomelo.stores.ledger import Budget
from pomelo.stores.usage import UsageQuery, UsageStore

LONGEST_TASK = DEFAULT_TIMEOUT + 60.0
"""Seconds after which no task of an earlier period can end."""

CLOCK_TOLERANCE = LONGEST_TASK
"""Seconds by which the clock of a task may be behind that of the task that began a period."""


class Difference(NamedTuple):
    """What is `used` of a budget by the keys that succeeded `origin`, and what its records add up to."""

    wallet: Wallet
    origin: str
    used: int
    recorded: int


class _Group(NamedTuple):
    """A budget in the current period, and the ids of all keys that may have used it."""

    wallet: Wallet
    origin: str
    budget: Budget
    key_ids: frozenset[str]


_Sums = dict[Wallet, dict[float, dict[str, int]]]
"""What the records of a wallet cost from a time on, by key. All budgets of the wallet share these sums,
because one sum reads every record since then."""


async def find_differences(store: Store, now: float) -> AsyncIterator[Difference]:
    """Yields the budgets that differ from their records at Unix time `now`. Those of running tasks are left
    out.

    Raises:
        PomeloError: store_unavailable.
    """
    sums: _Sums = {}
    for group in await _groups(store, now):
        first = await _compare(store, group, sums)
        if first is None or group.key_ids & {draft.key_id for draft in await store.drafts()}:
            continue
        del sums[group.wallet]  # tasks may have ended since
        again = await _compare(store, group, sums)
        if again is not None and again.used == first.used:  # no task has begun or ended meanwhile
            yield again


async def _groups(store: KeyStore, now: float) -> list[_Group]:
    successors: dict[str, set[str]] = {}
    found: dict[tuple[str, str], tuple[Wallet, Budget]] = {}
    async for record in _keys(store):
        origin = record.origin or record.key_id
        if record.origin:
            successors.setdefault(origin, set()).add(record.key_id)
        if (budget := budgets.budget_of(record)) is not None:
            found[origin, budget.name] = Wallet(record.account, record.live), budgets.current(budget, now)
    return [
        _Group(wallet, origin, budget, frozenset({origin, *successors.get(origin, ())}))
        for (origin, _), (wallet, budget) in found.items()
    ]


async def _keys(store: KeyStore) -> AsyncIterator[KeyRecord]:
    after = None
    while records := await store.list_keys(limit=PAGE, after=after):
        for record in records:
            yield record
        after = records[-1].created, records[-1].key_id


async def _compare(store: Store, group: _Group, sums: _Sums) -> Difference | None:
    """The difference of a budget, if nothing is used of it meanwhile."""
    wallet, origin, budget, _ = group
    (use,) = await store.budget_use(wallet, [budget])
    used = use.used
    most = await _recorded(store, group, max(0.0, budget.start - CLOCK_TOLERANCE), sums)
    # This clock may be behind the period in which tasks count.
    least = await _recorded(store, group, use.start + LONGEST_TASK, sums)
    if least > used and await _was_changed(store, group):
        least = 0  # what was spent under another budget, or without one, does not count
    if least <= used <= most or [use] != await store.budget_use(wallet, [budget]):
        return None
    return Difference(wallet, origin, used, most if used > most else least)


async def _recorded(store: UsageStore, group: _Group, since: float, sums: _Sums) -> int:
    """What the records of a group cost from Unix time `since` on."""
    of_wallet = sums.setdefault(group.wallet, {})
    costs = of_wallet.get(since)
    if costs is None:
        query = UsageQuery(account=group.wallet.account, live=group.wallet.live, since=since)
        totals = await store.sum_usage(query, ("key",))
        costs = of_wallet[since] = {total.groups[0]: total.cost for total in totals}
    return sum(costs.get(key_id, 0) for key_id in group.key_ids)


async def _was_changed(store: ActStore, group: _Group) -> bool:
    """Whether the operator has changed the budget of a key of the group in this period."""
    after = None
    while acts := await store.list_acts(
        group.wallet.account, since=group.budget.start, limit=PAGE, after=after
    ):
        if any(act.action == "set_key_budget" and act.key_id in group.key_ids for act in acts):
            return True
        after = acts[-1].at, acts[-1].act_id
    return False
