"""Tasks of every kind, way and ending, all mixed: afterwards the books are right to the microcredit.

`make load` runs 10,000 of them; an ordinary run of the tests a few hundred.
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
AT_ONCE = 32

ENDINGS = ("good", "good", "good", "failed", "cut", "left", "repeated")


def asked(kind: str, ending: str, number: int) -> dict[str, Any]:
    """A task's body: the sandbox fails, or stops half way, where its text says so."""
    mark = {"failed": " [[error:provider_failed]]", "cut": " [[cut]]", "left": " [[pace:0.01]]"}.get(
        ending, ""
    )
    if kind == "text":
        return text_body(f"Tell me of {number}.{mark}", max_tokens=20 + number % 50)
    body = dict(TASK_BODIES[kind])
    if kind == "image":
        body["prompt"] = f"A kite, {number}.{mark}"
    elif kind == "tts":
        body["text"] = f"Good morning, {number}.{mark}"
    return body


async def one(house: RunningApp, key: str, number: int, chance: random.Random) -> tuple[str, Decimal]:
    """Runs a task; gives how it ended, and what its caller was told that it cost."""
    kind, way, ending = chance.choice(list(TASK_BODIES)), chance.choice(PROTOCOLS), chance.choice(ENDINGS)
    stream, body = chance.random() < 0.5, asked(kind, ending, number)
    headers = {"Idempotency-Key": f"task {number}".replace(" ", "-")} if ending == "repeated" else None
    asking = house.ask(way, key, body, stream=stream, headers=headers)
    if ending == "left":
        try:
            async with asyncio.timeout(chance.random() * 0.03):
                await asking
        except TimeoutError:
            return "left", Decimal(0)
        return "good", Decimal(0)
    told = await asking
    if ending == "repeated":
        again = await house.ask(chance.choice(PROTOCOLS), key, body, stream=not stream, headers=headers)
        assert (again.code, again.id, again.content) == ("ok", told.id, told.content)
        assert again.metadata["x-credits-charged"] == "0"
    return told.code, Decimal(told.metadata.get("x-credits-charged", "0"))


@pytest.mark.timeout(600)
async def test_after_tasks_of_all_kinds_the_audit_finds_no_difference(tmp_path: Path) -> None:
    chance = random.Random(7)
    gate = asyncio.Semaphore(AT_ONCE)
    async with run_app(tmp_path) as house:
        caller = await house.account()

        async def run(number: int) -> tuple[str, Decimal]:
            async with gate:
                return await one(house, caller.test, number, chance)

        told = await asyncio.gather(*[run(number) for number in range(TASKS)])
        await house.server.draining.idle()
        await house.server.store.limit_status(
            (await house.records(caller))[0].wallet
        )  # behind all that was queued
        found = await audit(house.server.store)
        assert not found.findings
        assert (found.difference_micros, found.uncollected_micros, found.holds) == (0, 0, 0)
        balance = await house.balance(caller)
        assert balance.held == 0
        (total,) = await house.server.store.sum_usage(UsageQuery(account=caller.name), "account")
        assert total.cost == balance.spent == found.cost_micros
        counts = Counter(code for code, _ in told)
        assert (
            counts["ok"]
            <= total.tasks
            <= counts["ok"] + counts["good"] + counts["left"] + counts["provider_failed"]
        )
        assert counts["ok"] > TASKS / 3
