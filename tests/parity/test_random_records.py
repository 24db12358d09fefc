"""Random tasks leave the same headers, bills and usage records over every front end."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from pomelo.stores.usage import UsageRecord
from tests.app import Account, RunningApp, app_fixture
from tests.parity.random_tasks import PREFERENCES, RandomTasks
from tests.parity.test_random_parity import TASKS

FRONT_ENDS = {
    "grpc": ("grpc", False),
    "rest": ("rest", False),
    "form": ("rest", True),
    "remote": ("remote", False),
}
"""The protocol of each front end, and whether its body is a form."""

COMPARED = (
    *("x-pomelo-mode", "x-pomelo-adjusted", "preference-applied", "idempotent-replayed"),
    *("x-credits-remaining", "x-credits-charged", "x-ratelimit-limit", "x-ratelimit-limit-tokens"),
    *("x-ratelimit-limit-concurrent", "x-ratelimit-remaining-concurrent"),
)
"""The headers that do not depend on the time."""

OWN = ("task_id", "request_id", "account", "key_id", "wire", "at", "processing_ms", "first_byte_ms")
"""The fields in which the records of the same task differ."""

app = app_fixture(settings={"anthropic_api_key": "anthropic-upstream"})


@pytest.mark.parametrize("live", [False, True], ids=["test", "live"])
async def test_random_tasks_leave_the_same_bills_and_records(app: RunningApp, live: bool) -> None:
    tasks = RandomTasks(3 + live)
    accounts = {name: await app.account("all") for name in FRONT_ENDS}
    completed = 0
    for _ in range(TASKS // 2):
        body, stream = tasks.body(), tasks.chance(0.4)
        headers = {"Prefer": tasks.pick(PREFERENCES)} if tasks.chance(0.15) else {}
        if tasks.chance(0.2):
            headers["Idempotency-Key"] = tasks.pick(("a", "b", "c"))
        without_form = "\ufeff" in json.dumps(body, ensure_ascii=False)
        answers = {}
        for name, (protocol, form) in FRONT_ENDS.items():
            key = accounts[name].live if live else accounts[name].test
            await app.idle(accounts[name], live=live)
            outcome = await app.ask(
                protocol, key, body, stream=stream, form=form and not without_form, headers=headers
            )
            answers[name] = [(header, outcome.headers.get(header)) for header in COMPARED]
            completed += outcome.code == "ok"
        for name, answer in answers.items():
            assert answer == answers["rest"], f"{name}: {body} {stream} {headers}"
    left = {name: await left_behind(app, account, live=live) for name, account in accounts.items()}
    for name, records in left.items():
        assert records == left["rest"], name
    assert completed
    await app.assert_audit_clean()


async def left_behind(app: RunningApp, account: Account, *, live: bool) -> list[Any]:
    """Returns what an account has left to spend, and its records but for what is their own."""
    await app.idle(account, live=live)
    records = [*await app.records(account), *await app.records(account, failed=True)]
    balance = await app.balance(account, live=live)
    assert balance.spent == sum(record.cost for record in records)
    return [balance, *map(without_own, records)]


def without_own(record: UsageRecord) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name not in OWN}
