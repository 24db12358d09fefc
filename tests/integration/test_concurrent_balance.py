"""Many tasks at once on a balance that covers one: one runs, the others are refused, and all of it is paid."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from pomelo.testing import Gate, Received, Reply, Script
from pomelo.testing.upstream import WIRES
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS, Outcome
from tests.redis_server import RedisServer
from tests.tasks import TASK_BODIES, text_body
from tests.unit.media import corpus

TASKS = 20
CLAIMS_NOTHING = base64.b64encode(corpus.wav(6, per_second=0xFFFFFFFF)).decode()
"""Six seconds of sound; by its header it is over in an instant."""

BODIES: dict[str, dict[str, Any]] = {
    "text": text_body("Hello there, all of you", max_tokens=20),
    "image": TASK_BODIES["image"],
    "tts": TASK_BODIES["tts"],
    "sts": TASK_BODIES["sts"] | {"audio": CLAIMS_NOTHING},
    "stt": TASK_BODIES["stt"] | {"audio": CLAIMS_NOTHING},
}


@pytest.fixture(scope="module", name="house", params=["sqlite", "redis"])
async def _house(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("balance")
    if request.param == "sqlite":
        async with run_app(folder) as opened:
            yield opened
        return
    with RedisServer() as server:
        async with run_app(folder, settings={"store": server.url}) as opened:
            yield opened


def waiting(gate: Gate) -> Script:
    """What the vendors answer by default, after a gate."""

    def script(received: Received) -> Reply:
        wire = next(wire for wire in WIRES if wire.serves(received))
        reply = wire.default if isinstance(wire.default, Reply) else wire.default(received)
        return replace(reply, before=(gate, *reply.before))

    return script


async def ended(tasks: set[asyncio.Task[Outcome]], count: int) -> None:
    """Returns when that many tasks have ended."""
    left = tasks
    while len(tasks) - len(left) < count:
        _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", BODIES)
async def test_of_many_tasks_on_a_balance_for_one_a_single_one_runs_and_is_paid(
    house: RunningApp, kind: str, stream: bool, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    rich = await house.account()
    gate = Gate()
    house.upstream.default = waiting(gate)
    async with asyncio.timeout(30):
        one = asyncio.create_task(house.ask(way, rich.live, BODIES[kind], stream=stream))
        await gate.reached.wait()
        reserved = (await house.balance(rich, live=True)).held
        gate.open()
        assert (await one).code == "ok"

        caller = await house.account(live=reserved)
        gate = Gate()
        house.upstream.default = waiting(gate)
        tasks = {
            asyncio.create_task(house.ask(way, caller.live, BODIES[kind], stream=stream))
            for _ in range(TASKS)
        }
        await ended(tasks, TASKS - 1)
        gate.open()
        codes = [told.code for told in await asyncio.gather(*tasks)]
    assert sorted(codes) == ["insufficient_credits"] * (TASKS - 1) + ["ok"]
    (record,) = await house.records(caller)
    assert (record.uncollected, record.complete) == (0, True)
    assert 0 < record.cost <= reserved
    balance = await house.balance(caller, live=True)
    assert (balance.available, balance.held) == (reserved - record.cost, 0)
    assert not [entry for entry in caplog.records if "uncollected" in entry.getMessage()]
