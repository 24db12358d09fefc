"""The books of a store: its balances, records and reservations, which must always add up to the
microcredit."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict
from typing import Any

from pomelo.accounts.audit import audit
from pomelo.accounts.budgets import used
from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from pomelo.stores.usage import UsageQuery, UsageRecord
from tests.limits import limits

LIVE = Wallet("default", True)


async def state(store: Store, since: float = 0.0) -> dict[str, Any]:
    """The state of the live wallet, with its records from `since` on."""
    records: list[UsageRecord] = []
    after = ""
    while True:
        page, after = await store.list_usage(UsageQuery(since=since), limit=1000, after=after)
        records += page
        if not after:
            break
    audited = await audit(store, now=time.time)
    balance = await store.balance(LIVE)
    return {
        "audit": {
            "difference": audited.difference_micros,
            "findings": [finding.detail for finding in audited.findings],
            "records": audited.records,
        },
        "granted": sum(grant.amount for grant in await store.list_grants(LIVE)),
        "balance": asdict(balance) | {"available": balance.available},
        "spent": sum(total.cost for total in await store.sum_usage(UsageQuery(live=True), ("account",))),
        "budgets": [*(await used(store, await store.list_keys(), time.time())).values()],
        "held": [draft.task_id for draft in await store.drafts()],
        "slots": (await limits(store, LIVE)).concurrency,
        "records": [asdict(record) for record in records],
    }


class Books:
    """The state of a store, as `state` returns it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.balance: dict[str, int] = state["balance"]
        self.concurrency: int = state["slots"]
        self.held: list[str] = state["held"]
        self.records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        """By request id."""
        for record in state["records"]:
            self.records[record["request_id"]].append(record)
        self._state = state

    def check(self) -> None:
        """Everything adds up, to the microcredit."""
        audit = self._state["audit"]
        assert audit["findings"] == []
        assert audit["difference"] == 0
        assert self.balance["granted"] == self._state["granted"]
        assert self.balance["spent"] == self._state["spent"]
        for budget in self._state["budgets"]:  # of the only live key
            assert budget == self.balance["spent"] + self.balance["held"]
        left = self.balance["granted"] - self.balance["spent"] - self.balance["held"]
        assert self.balance["available"] == left
        assert min(self.balance.values()) >= 0

    def check_idle(self) -> None:
        """Everything adds up, and nothing is reserved."""
        self.check()
        assert self.held == []
        assert self.balance["held"] == 0
        assert self.concurrency == 0
