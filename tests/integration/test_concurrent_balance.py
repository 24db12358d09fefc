"""Concurrent tasks on a balance that covers one of them: one runs and is paid, the others are refused."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pomelo.testing import Gate, Received, Reply, Script
from pomelo.testing.upstream import PROTOCOLS as VENDOR_PROTOCOLS
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL, STREAM, Outcome
from tests.tasks import TASK_BODIES, text_body
from tests.unit.media import corpus

TASKS = 20
ZERO_LENGTH_HEADER = base64.b64encode(corpus.wav(6, per_second=0xFFFFFFFF)).decode()
"""Six seconds of audio whose header declares a length of zero."""

BODIES: dict[str, dict[str, Any]] = {
    "text": text_body("Hello there, all of you", max_tokens=20),
    "image": TASK_BODIES["image"],
    "tts": TASK_BODIES["tts"],
    "sts": TASK_BODIES["sts"] | {"audio": ZERO_LENGTH_HEADER},
    "stt": TASK_BODIES["stt"] | {"audio": ZERO_LENGTH_HEADER},
}


@pytest.fixture(scope="module", name="app")
async def _app(
    store_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("balance"), settings=store_settings) as opened:
        yield opened


def behind(gate: Gate) -> Script:
    """Returns the script by which the vendors give their default answers when the gate opens."""

    def script(received: Received) -> Reply:
        vendor = next(protocol for protocol in VENDOR_PROTOCOLS if protocol.serves(received))
        reply = vendor.default if isinstance(vendor.default, Reply) else vendor.default(received)
        return replace(reply, before=(gate, *reply.before))

    return script


async def wait_for(tasks: set[asyncio.Task[Outcome]], count: int) -> None:
    """Returns when that many tasks have ended."""
    left = tasks
    while len(tasks) - len(left) < count:
        _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)


@PROTOCOL
@STREAM
@pytest.mark.parametrize("task_type", BODIES)
async def test_one_of_many_concurrent_tasks_runs_and_is_paid_if_the_balance_covers_one(
    app: RunningApp, task_type: str, stream: bool, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    rich, body = await app.account(), BODIES[task_type]
    gate = Gate()
    app.upstream.default = behind(gate)
    async with asyncio.timeout(30):
        first = asyncio.create_task(app.ask(protocol, rich.live, body, stream=stream))
        await gate.reached.wait()
        reserved = (await app.balance(rich, live=True)).held
        gate.open()
        assert (await first).code == "ok"

        account = await app.account(live=reserved)
        gate = Gate()
        app.upstream.default = behind(gate)
        tasks = {
            asyncio.create_task(app.ask(protocol, account.live, body, stream=stream)) for _ in range(TASKS)
        }
        await wait_for(tasks, TASKS - 1)
        gate.open()
        codes = [outcome.code for outcome in await asyncio.gather(*tasks)]
    assert sorted(codes) == ["insufficient_credits"] * (TASKS - 1) + ["ok"]
    (record,) = await app.records(account)
    assert (record.uncollected, record.complete) == (0, True)
    assert 0 < record.cost <= reserved
    balance = await app.balance(account, live=True)
    assert (balance.available, balance.held) == (reserved - record.cost, 0)
    assert not [entry for entry in caplog.records if "uncollected" in entry.getMessage()]
