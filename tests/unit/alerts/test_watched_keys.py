"""Alerts about budgets and balances are about live mode, and none is lost or attributed to the wrong limit."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from pomelo.alerts.alert import Alert
from pomelo.alerts.watch import Watch
from pomelo.call import KeyBudget, Principal
from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from pomelo.stores.sqlite import open_sqlite
from pomelo.telemetry.events import TaskReport
from tests.calls import call_of
from tests.unit.accounts.audited_store import ACME_TEST, add_account, run

BUDGET = KeyBudget("budget:k1.day", 1_000, "day")


@pytest.fixture(name="store")
async def _store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_sqlite(tmp_path / "pomelo.db") as store:
        yield store


def ended(code: str = "", *, live: bool = True) -> TaskReport:
    """A task of a key with a budget that ended with that code."""
    call = call_of(None)
    call.principal = Principal("acme", "k1", live, None, "pro", BUDGET)
    outcome = "failed" if code else "completed"
    values: Any = (
        *(call, "acme", "k1", live, "gpt-4", False, outcome, code, 0, 1.0, False),
        *("", "", "", "", 0, 0, 0, "", "", "", 0.0, 0, 0, None),
    )
    return TaskReport(*values)


def watch_of(store: Store, sent: list[Alert], **options: Any) -> Watch:
    return Watch(store, sent.append, low_share=0.1, blocked_routes=set, **options)


async def test_a_refusal_by_a_budget_is_reported_also_if_a_smaller_task_follows(store: Store) -> None:
    await add_account(store)
    sent: list[Alert] = []
    watch = watch_of(store, sent)
    watch.task_ended(ended())
    await watch.search()
    assert sent == []
    watch.task_ended(ended("insufficient_credits"))
    watch.task_ended(ended())
    await watch.search()
    assert [(alert.type, alert.data["key_id"]) for alert in sent] == [("budget.reached", "k1")]
    await watch.search()
    assert len(sent) == 1


async def test_a_refusal_for_lack_of_credits_is_not_the_budgets(store: Store) -> None:
    await add_account(store, micros=900)
    sent: list[Alert] = []
    watch = watch_of(store, sent)
    watch.task_ended(ended("insufficient_credits"))
    await watch.search()
    assert sent == []


async def test_a_refusal_is_reported_after_an_outage(store: Store) -> None:
    await add_account(store)
    sent: list[Alert] = []
    failures = [PomeloError("store_unavailable")]

    async def note_state(subject: str, state: str, seconds: float) -> bool:
        if failures:
            raise failures.pop()
        return True

    watch = watch_of(store, sent, note_state=note_state)
    watch.task_ended(ended("insufficient_credits"))
    with pytest.raises(PomeloError):
        await watch.search()
    watch.task_ended(ended())
    await watch.search()
    assert [alert.type for alert in sent] == ["budget.reached"]


async def test_nothing_of_test_mode_is_reported(store: Store) -> None:
    await store.add_account("acme", "pro", 1.0)  # in live mode it has no credits
    await store.set_credit_limit(ACME_TEST, 1_000)
    sent: list[Alert] = []
    watch = watch_of(store, sent)
    watch.task_ended(ended("insufficient_credits", live=False))
    watch.charged(await run(store, "a", ACME_TEST, output_tokens=1))
    assert not watch._accounts
    assert not watch._keys
    await watch.search()
    assert sent == []
