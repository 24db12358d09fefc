"""Tasks whose reservation another process has ended, because it considered this process dead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from pomelo.engine import ledger
from pomelo.testing import Answer as Words
from pomelo.testing import Gate
from tests.unit.engine.apps import Account, EngineApp, open_engine
from tests.unit.engine.test_settlement import text_task


@pytest.fixture(scope="module", name="opened_engine")
async def _opened_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineApp]:
    """An app that records every few milliseconds what running tasks have used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "PROGRESS_INTERVAL", 0.005)
        async with open_engine(tmp_path_factory.mktemp("lost")) as opened:
            yield opened


async def recover(engine: EngineApp, account: Account) -> None:
    """Ends the reservation of the account's only task, as another process would."""
    (reservation,) = [
        one for one in await engine.app.store.reservations() if one.record.wallet == account.wallet
    ]
    await engine.app.store.recover(account.wallet, reservation.record.task_id)


async def test_a_stream_whose_reservation_is_lost_is_ended_and_closed_at_the_provider(
    engine: EngineApp,
) -> None:
    account = await engine.account()
    first, second = Gate(), Gate()
    engine.upstream.when("to be lost", Words("one two three four", at={1: first, 3: second}))
    asking = asyncio.create_task(engine.ask(account, text_task("to be lost"), stream=True, within=60))
    await first.reached.wait()
    await recover(engine, account)
    spent = (await engine.balance(account)).spent
    first.open()  # later output can't be recorded
    async with asyncio.timeout(20):
        answer = await asking
        await engine.upstream.idle()
    assert answer.code == "store_unavailable"
    assert "four" not in answer.text
    balance = await engine.balance(account)
    assert (balance.spent, balance.held) == (spent, 0)
    assert "X-Credits-Charged" not in answer.call.response_trailers


async def test_an_answer_whose_reservation_is_lost_is_not_delivered(engine: EngineApp) -> None:
    account = await engine.account()
    gate = Gate()
    engine.upstream.when("whole", Words("one two", before=(gate,)))
    asking = asyncio.create_task(engine.ask(account, text_task("whole")))
    await gate.reached.wait()
    await recover(engine, account)
    gate.open()
    answer = await asking
    assert (answer.code, answer.events) == ("store_unavailable", [])
    balance = await engine.balance(account)
    assert (balance.spent, balance.held) == (0, 0)
    assert not await engine.records(account)


async def test_a_missed_deadline_is_not_reported_as_a_lost_reservation(engine: EngineApp) -> None:
    account = await engine.account()
    engine.upstream.when("too late", Words("one two", at={1: Gate()}))
    answer = await engine.ask(account, text_task("too late"), stream=True, within=3)
    assert answer.code == "deadline_exceeded"
    (record,) = await engine.records(account)
    assert answer.call.response_trailers["X-Credits-Charged"] == f"{record.cost / 10**6:f}".rstrip("0")
