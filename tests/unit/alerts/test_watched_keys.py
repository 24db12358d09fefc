"""Alerts about budgets and balances are about live mode, and none is lost or attributed to the wrong limit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from pomelo.accounts import budgets
from pomelo.alerts.alert import Alert
from pomelo.alerts.watch import Watch, _Notes
from pomelo.call import KeyBudget, Principal
from pomelo.errors import PomeloError
from pomelo.stores.accounts import Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReserveRequest, Settlement
from pomelo.telemetry.events import TaskReport
from pomelo.telemetry.log import open_log
from tests.calls import call_of
from tests.unit.accounts.audited_store import ACME_TEST, add_account, draft, run
from tests.unit.clock import Clock

BUDGET = KeyBudget("budget:k1.day", 1_000, "day")


def ended(code: str = "", *, live: bool = True, budget: KeyBudget = BUDGET) -> TaskReport:
    """A task of a key with a budget that ended with that code."""
    call = call_of(None)
    call.principal = Principal("acme", "k1", live, None, "pro", budget)
    outcome = "failed" if code else "completed"
    values: Any = (
        *(call, "acme", "k1", live, "gpt-4", False, outcome, code, 0, 1.0, False),
        *("", "", "", "", 0, 0, 0, "", "", "", 0.0, 0, 0, None),
    )
    return TaskReport(*values)


def watch_of(store: Store, sent: list[Alert], **options: Any) -> Watch:
    return Watch(store, sent.append, low_share=0.1, blocked_routes=set, **options)


async def test_a_refusal_by_a_budget_is_reported_also_if_a_smaller_task_follows(
    store: Store, sent: list[Alert]
) -> None:
    await add_account(store)
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


async def test_a_refusal_for_lack_of_credits_is_not_the_budgets(store: Store, sent: list[Alert]) -> None:
    await add_account(store, micros=900)
    watch = watch_of(store, sent)
    watch.task_ended(ended("insufficient_credits"))
    await watch.search()
    assert sent == []


async def test_a_refusal_is_reported_after_an_outage(store: Store, sent: list[Alert]) -> None:
    await add_account(store)
    failures = [PomeloError("store_unavailable")]

    async def note_state(subject: str, state: str, seconds: float) -> bool:
        if failures:
            watch.task_ended(ended("store_unavailable"))
            raise failures.pop()
        return True

    watch = watch_of(store, sent, note_state=note_state)
    watch.task_ended(ended("insufficient_credits"))
    with pytest.raises(PomeloError):
        await watch.search()
    watch.task_ended(ended())
    await watch.search()
    assert [alert.type for alert in sent] == ["budget.reached"]


async def test_a_key_whose_task_ends_while_the_store_is_out_is_reported_after_the_outage(
    store: Store, sent: list[Alert]
) -> None:
    await add_account(store)
    failures = [PomeloError("store_unavailable")]

    async def note_state(subject: str, state: str, seconds: float) -> bool:
        if failures:
            later = ended("insufficient_credits", budget=replace(BUDGET, name="budget:k2.day"))
            assert later.call.principal is not None
            later.call.principal = replace(later.call.principal, key_id="k2")
            watch.task_ended(later)
            raise failures.pop()
        return True

    watch = watch_of(store, sent, note_state=note_state)
    watch.task_ended(ended("insufficient_credits"))
    with pytest.raises(PomeloError):
        await watch.search()
    await watch.search()
    assert sorted(alert.data["key_id"] for alert in sent) == ["k1", "k2"]


async def test_nothing_of_test_mode_is_reported(store: Store, sent: list[Alert]) -> None:
    await store.add_account("acme", "pro", 1.0)  # in live mode it has no credits
    await store.set_credit_limit(ACME_TEST, 1_000)
    watch = watch_of(store, sent)
    watch.task_ended(ended("insufficient_credits", live=False))
    watch.charged(await run(store, "a", ACME_TEST, output_tokens=1))
    assert not watch._accounts
    assert not watch._keys
    await watch.search()
    assert sent == []


async def test_a_budget_that_is_used_up_is_reported_with_its_use(store: Store, sent: list[Alert]) -> None:
    await add_account(store)
    watch = watch_of(store, sent, now=lambda: 86_400.0 + 5)
    for number, used in enumerate((999, 1)):
        budget = budgets.current(BUDGET, 86_400.0)
        request = ReserveRequest(draft(f"t{number}"), minimum=1, maximum=5_000, budget=budget)
        await store.reserve(request)
        await store.settle(Settlement(replace(request.draft, cost=used)))
        watch.task_ended(ended())
        await watch.search()
        assert len(sent) == number
    (alert,) = sent
    assert (alert.type, alert.at) == ("budget.reached", 86_405.0)
    assert alert.data == {
        "account": "acme",
        "mode": "live",
        "key_id": "k1",
        "budget_micros": 1_000,
        "period": "day",
        "used_micros": 1_000,
    }
    watch.task_ended(ended(budget=replace(BUDGET, limit=900)))
    await watch.search()
    assert [alert.data["budget_micros"] for alert in sent] == [1_000, 900]  # another limit was reached
    assert sent[1].id != sent[0].id


async def test_a_budget_is_reported_once_in_each_of_its_periods(store: Store, sent: list[Alert]) -> None:
    await add_account(store)
    clock = Clock()
    watch = watch_of(store, sent, now=clock)
    for day in range(2):
        for _ in range(2):
            watch.task_ended(ended("insufficient_credits"))
            await watch.search()
        assert len(sent) == day + 1
        clock.now += 86_400.0
    assert sent[0].id != sent[1].id


async def test_a_rotated_key_with_another_amount_and_its_successor_are_reported_once_each(
    store: Store, sent: list[Alert]
) -> None:
    await add_account(store)
    watch = watch_of(store, sent)
    for _ in range(3):
        for key_id, limit in (("k1", 1_000), ("k2", 900)):
            report = ended("insufficient_credits", budget=replace(BUDGET, limit=limit))
            assert report.call.principal is not None
            report.call.principal = replace(report.call.principal, key_id=key_id)
            watch.task_ended(report)
        await watch.search()
    assert [(alert.data["key_id"], alert.data["budget_micros"]) for alert in sent] == [
        ("k1", 1_000),
        ("k2", 900),
    ]


async def test_each_event_is_in_a_log_of_warnings(
    store: Store, sent: list[Alert], capfd: pytest.CaptureFixture[str]
) -> None:
    await add_account(store)
    watch = watch_of(store, sent)
    record = await run(store, "a", output_tokens=1)
    with open_log("warning", "json"):
        for number in range(50):
            watch.charged(replace(record, task_id=f"task {number}", uncollected=7))
        await watch.search()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["task_id"] for line in lines] == [alert.data["task_id"] for alert in sent]
    assert len(lines) == 50
    assert {line["event"] for line in lines} == {"credits.uncollected: an alert is sent"}


async def test_charges_beyond_the_credits_are_reported_one_by_one(store: Store, sent: list[Alert]) -> None:
    await add_account(store)
    watch = watch_of(store, sent)
    record = await run(store, "a", output_tokens=1)
    for uncollected, live in ((7, True), (0, True), (8, False)):
        watch.charged(replace(record, uncollected=uncollected, live=live))
    await watch.search()
    (alert,) = sent
    assert alert.type == "credits.uncollected"
    assert alert.data == {
        "account": "acme",
        "mode": "live",
        "task_id": "a",
        "request_id": "req_a",
        "provider": "openai",
        "uncollected_micros": 7,
    }
    await watch.search()
    assert len(sent) == 1


async def test_blocked_routes_are_reported_when_they_open_and_close(store: Store, sent: list[Alert]) -> None:
    blocked: set[tuple[str, ...]] = {("openai", "b"), ("openai", "a")}
    watch = Watch(store, sent.append, low_share=0.1, blocked_routes=lambda: set(blocked))
    for _ in range(2):
        await watch.search()
    blocked.discard(("openai", "a"))
    for _ in range(2):
        await watch.search()
    assert [(alert.type, alert.data) for alert in sent] == [
        ("provider.open", {"provider": "openai", "provider_model": "a"}),
        ("provider.open", {"provider": "openai", "provider_model": "b"}),
        ("provider.closed", {"provider": "openai", "provider_model": "a"}),
    ]
    assert len({alert.id for alert in sent}) == 3


async def test_only_a_bounded_number_of_accounts_keys_and_records_is_marked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.alerts.watch.MAX_MARKED", 2)
    watch = watch_of(store, [])
    for name in ("a", "b", "c"):
        await add_account(store, name)
        watch.charged(replace(draft(name, Wallet(name, True)), uncollected=1))
        report = ended()
        assert report.call.principal is not None
        report.call.principal = replace(report.call.principal, key_id=name)
        watch.task_ended(report)
    assert watch._accounts == {"a", "b"}
    assert list(watch._keys) == ["a", "b"]
    assert [record.account for record in watch._uncollected] == ["a", "b"]
    for name in ("a", "b", "c"):
        watch._accounts = {name}
        await watch.search()
    assert list(watch._top_ups) == ["b", "c"]


async def test_what_was_reported_is_remembered_for_the_latest_subjects(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pomelo.alerts.watch.MAX_MARKED", 2)
    notes = _Notes()
    assert [await notes.note_state(subject, "low", 1.0) for subject in "aabacab"] == [
        *(True, False, True, False),
        *(True, False, True),  # c takes the place of b, and b that of c
    ]
    assert await notes.note_state("a", "high", 1.0)
    assert list(notes._states.items()) == [("b", "low"), ("a", "high")]
