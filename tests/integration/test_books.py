"""Many tasks of all types, over all protocols, with all outcomes: the audit then finds no difference.

`make load` runs 10,000 tasks, `make test` a few hundred.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.audit import audit
from pomelo.stores.usage import UsageQuery
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import TASK_BODIES, text_body

TASKS = int(os.environ.get("LOAD_TASKS", "400"))
CONCURRENCY = 32

OUTCOMES = ("good", "good", "good", "failed", "cut", "cancelled", "repeated")


TRIGGERS = {"failed": " [[error:provider_failed]]", "cut": " [[cut]]", "cancelled": " [[pace:0.01]]"}
"""The sandbox triggers in a text, by the outcome that they cause."""


def task_body(task_type: str, outcome: str, number: int) -> dict[str, Any]:
    """The body of a task that ends with this outcome in the sandbox."""
    trigger = TRIGGERS.get(outcome, "")
    if task_type == "text":
        return text_body(f"Tell me of {number}.{trigger}", max_tokens=20 + number % 50)
    body = dict(TASK_BODIES[task_type])
    if task_type == "image":
        body["prompt"] = f"A kite, {number}.{trigger}"
    elif task_type == "tts":
        body["text"] = f"Good morning, {number}.{trigger}"
    return body


async def run_task(app: RunningApp, key: str, number: int, rng: random.Random) -> tuple[str, Decimal]:
    """Runs a task; returns its error code or outcome, and the cost reported to the caller."""
    task_type, way, outcome = rng.choice(list(TASK_BODIES)), rng.choice(PROTOCOLS), rng.choice(OUTCOMES)
    stream, body = rng.random() < 0.5, task_body(task_type, outcome, number)
    headers = {"Idempotency-Key": f"task {number}".replace(" ", "-")} if outcome == "repeated" else None
    call = app.ask(way, key, body, stream=stream, headers=headers)
    if outcome == "cancelled":
        try:
            async with asyncio.timeout(rng.random() * 0.03):
                await call
        except TimeoutError:
            return "cancelled", Decimal(0)
        return "good", Decimal(0)
    answer = await call
    if outcome == "repeated":
        again = await app.ask(rng.choice(PROTOCOLS), key, body, stream=not stream, headers=headers)
        assert (again.code, again.id, again.content) == ("ok", answer.id, answer.content)
        assert again.metadata["x-credits-charged"] == "0"
    return answer.code, Decimal(answer.metadata.get("x-credits-charged", "0"))


@pytest.mark.timeout(600)
async def test_the_audit_finds_no_difference_after_tasks_of_all_types_and_outcomes(tmp_path: Path) -> None:
    rng = random.Random(7)
    semaphore = asyncio.Semaphore(CONCURRENCY)
    async with run_app(tmp_path) as app:
        caller = await app.account()

        async def run(number: int) -> tuple[str, Decimal]:
            async with semaphore:
                return await run_task(app, caller.test, number, rng)

        results = await asyncio.gather(*[run(number) for number in range(TASKS)])
        await app.server.draining.idle()
        await app.server.store.limit_status((await app.records(caller))[0].wallet)  # after all queued writes
        report = await audit(app.server.store)
        assert not report.findings
        assert (report.difference_micros, report.uncollected_micros, report.reservations) == (0, 0, 0)
        balance = await app.balance(caller)
        assert balance.held == 0
        (total,) = await app.server.store.sum_usage(UsageQuery(account=caller.name), ())
        assert total.cost == balance.spent == report.cost_micros
        counts = Counter(code for code, _ in results)
        assert (
            counts["ok"]
            <= total.tasks
            <= counts["ok"] + counts["good"] + counts["cancelled"] + counts["provider_failed"]
        )
        assert counts["ok"] > TASKS / 3
