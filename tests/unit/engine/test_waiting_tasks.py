"""Tasks that end while they wait for a free connection to the vendor: if nothing was sent, they leave no record and
count toward no limit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from pomelo.testing import Answer as Words
from pomelo.testing import Gate, VoiceList, error_reply
from tests.unit.engine.apps import CREDITS, STREAM, Account, EngineApp, open_engine
from tests.unit.engine.test_settlement import text_task
from tests.unit.telemetry.reports import Reports
from tests.waiting import until


@pytest.fixture(scope="module", name="opened_engine")
async def _opened_engine(
    tmp_path_factory: pytest.TempPathFactory, reports: Reports
) -> AsyncIterator[EngineApp]:
    """An app with one connection to its upstream, for which tasks wait longer than any test."""
    folder = tmp_path_factory.mktemp("waiting")
    async with open_engine(folder, observers=[reports], upstream_connections=1) as opened:
        opened.app.connections._max_wait = 60.0
        yield opened


@pytest.fixture(autouse=True)
def _fresh(reports: Reports) -> None:
    reports.attempts.clear()


@asynccontextmanager
async def connection_in_use(engine: EngineApp) -> AsyncIterator[None]:
    """Has a task of another account use the connection, or wait for it."""
    gate = Gate()
    engine.upstream.when("in use", Words("one", before=(gate,)))
    other = asyncio.create_task(engine.ask(await engine.account(), text_task("in use")))
    await until(lambda: engine.app.connections.in_use)
    yield
    gate.open()
    assert (await other).code == "ok"


async def assert_unused(engine: EngineApp, account: Account) -> None:
    await engine.settled(account)
    used = await engine.used(account)
    assert (used.requests, used.concurrency, used.tokens) == (0, 0, 0)
    assert not await engine.failures(account)
    assert (await engine.balance(account)).available == CREDITS
    assert not [request for request in engine.upstream.requests if "never sent" in request.prompt]


@STREAM
async def test_a_task_whose_deadline_passes_while_it_waits_uses_up_nothing(
    engine: EngineApp, reports: Reports, stream: bool
) -> None:
    account = await engine.account("limited")
    async with connection_in_use(engine):
        answer = await engine.ask(account, text_task("never sent"), stream=stream, within=2)
        await assert_unused(engine, account)
    headers = answer.call.response_headers
    assert (answer.code, headers["X-RateLimit-Remaining"]) == ("deadline_exceeded", "5")
    (attempt,) = reports.attempts
    assert (attempt.code, attempt.upstream_status) == ("deadline_exceeded", 0)
    assert attempt.reason == "nothing could be sent to the vendor before the task's deadline"


@STREAM
async def test_a_task_whose_caller_leaves_while_it_waits_uses_up_nothing(
    engine: EngineApp, reports: Reports, stream: bool
) -> None:
    account = await engine.account("limited")
    async with connection_in_use(engine):
        asking = asyncio.create_task(engine.ask(account, text_task("never sent"), stream=stream))
        await until(lambda: engine.app.connections.waiting == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await assert_unused(engine, account)
    assert not reports.attempts


@STREAM
async def test_a_task_that_waits_to_be_sent_again_was_sent(
    engine: EngineApp, reports: Reports, stream: bool
) -> None:
    account = await engine.account("limited")
    gate = Gate()
    engine.upstream.when("sent once", replace(error_reply(503), before=(gate,)))
    asking = asyncio.create_task(engine.ask(account, text_task("sent once"), stream=stream))
    await gate.reached.wait()
    async with connection_in_use(engine):
        await until(lambda: engine.app.connections.waiting == 1)
        gate.open()
        await until(lambda: len(reports.attempts) == 1 and engine.app.connections.waiting == 1)
        asking.cancel()
        await asyncio.wait([asking])
        await engine.settled(account)
    (record,) = await engine.failures(account)
    assert (record.code, record.cost) == ("cancelled", 0)
    assert (await engine.used(account)).requests == 1


async def test_a_task_that_ends_while_another_one_reads_the_list_of_voices_uses_up_nothing(
    engine: EngineApp, reports: Reports
) -> None:
    gate = Gate()
    engine.upstream.unscripted = None
    engine.upstream.script(VoiceList((("Otto", "A" * 20),), before=(gate,)))
    task = {"model": "eleven-labs-tts", "text": "never sent", "voice": "otto"}
    reading = asyncio.create_task(engine.ask(await engine.account(), task | {"text": "spoken"}))
    await gate.reached.wait()
    account = await engine.account("limited")
    waiting = [engine.ask(account, task, stream=stream, within=2) for stream in (False, True)]
    assert [answer.code for answer in await asyncio.gather(*waiting)] == ["deadline_exceeded"] * 2
    await assert_unused(engine, account)
    assert {attempt.reason for attempt in reports.attempts} == {
        "nothing could be sent to the vendor before the task's deadline"
    }
    gate.open()
    assert (await reading).code == "ok"
