"""Which tasks that fail leave a usage record, and what it says."""

from __future__ import annotations

import asyncio
import time

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.testing import Answer as Words
from pomelo.testing import Gate, error_reply
from pomelo.testing.reply import Stop, json_reply
from tests.calls import call_of
from tests.tasks import to_task
from tests.unit.engine.apps import CREDITS, STREAM, EngineApp
from tests.unit.engine.failing_store import failing_ledger, reserve
from tests.unit.engine.test_settlement import text_task
from tests.waiting import cancel


@STREAM
async def test_a_failed_task_leaves_a_record(engine: EngineApp, stream: bool) -> None:
    account = await engine.account("limited")
    engine.upstream.when("forbidden", error_reply(400, code="content_policy_violation"))
    spec = to_task(text_task("forbidden"))
    spec.user, spec.metadata["team"] = "ada", "red"
    answer = await engine.ask(account, spec, stream=stream)
    (record,) = await engine.failures(account)
    assert (record.code, record.cost, record.complete) == ("content_policy_violation", 0, False)
    assert record.request_id == answer.call.request_id
    route = Catalog.load().models["gpt-4"].routes[0]
    assert (record.model, record.provider, record.provider_model) == ("gpt-4", route.provider, route.model)
    assert (record.user, record.metadata, record.live) == ("ada", '{"team":"red"}', True)
    assert 0 <= record.processing_ms < 10_000
    assert not await engine.records(account)
    assert (await engine.balance(account)).available == CREDITS
    used = await engine.used(account)
    assert (used.requests, used.concurrency, used.tokens) == (1, 0, 0)


async def test_a_task_that_is_cut_off_has_a_code_and_a_cost(engine: EngineApp) -> None:
    account = await engine.account()
    engine.upstream.when("cut off", Words("one two three", at={2: Stop.CLOSE}))
    answer = await engine.ask(account, text_task("cut off"), stream=True)
    (record,) = await engine.failures(account)
    assert record.code == answer.code == "provider_failed"
    assert record.cost > 0
    assert not record.complete
    assert await engine.records(account) == [record]


async def test_a_task_whose_caller_leaves_before_any_output_is_cancelled(engine: EngineApp) -> None:
    account = await engine.account("limited")
    gate = Gate()
    engine.upstream.when("left", Words("one", before=(gate,)))
    asking = asyncio.create_task(engine.ask(account, text_task("left")))
    await gate.reached.wait()
    asking.cancel()
    await asyncio.wait([asking])
    await engine.settled(account)
    (record,) = await engine.failures(account)
    assert (record.code, record.cost, record.provider) == ("cancelled", 0, "openai")
    assert not await engine.records(account)
    assert (await engine.used(account)).tokens > 9, "as they were reserved: the provider may have answered"


async def test_a_task_that_is_past_its_deadline_leaves_a_record(engine: EngineApp) -> None:
    account = await engine.account("limited")
    engine.upstream.when("too slow", Words("one", before=(Gate(),)))
    answer = await engine.ask(account, text_task("too slow"), within=1)
    (record,) = await engine.failures(account)
    assert record.code == answer.code == "deadline_exceeded"
    assert (await engine.used(account)).tokens > 9, "as they were reserved"


@STREAM
async def test_a_task_whose_caller_leaves_at_its_deadline_is_late(engine: EngineApp, stream: bool) -> None:
    """As a gRPC client does, whose own deadline passes a moment earlier."""
    account = await engine.account()
    gate = Gate()
    engine.upstream.when("at the deadline", Words("one", before=(gate,)))
    call = call_of(account.key)

    async def run() -> None:
        tasks, spec = engine.app.services.tasks, to_task(text_task("at the deadline"))
        if not stream:
            await tasks.run_task(spec, TaskOptions(), call)
            return
        async with tasks.stream_task(spec, TaskOptions(), call) as events:
            await anext(events)

    running = asyncio.create_task(run())
    await gate.reached.wait()
    call.deadline = time.monotonic()
    await cancel(running)
    await engine.settled(account)
    (record,) = await engine.failures(account)
    assert record.code == "deadline_exceeded"


async def test_a_task_that_is_refused_leaves_no_record(engine: EngineApp) -> None:
    poor, busy = await engine.account(micros=1), await engine.account("one request")
    engine.upstream.when("once", Words("one"))
    assert (await engine.ask(poor, text_task("never"))).code == "insufficient_credits"
    assert (await engine.ask(busy, text_task("once"))).code == "ok"
    assert (await engine.ask(busy, text_task("never"))).code == "rate_limit_exceeded"
    claude = {**text_task("never"), "model": "claude-3-opus"}
    unknown = await engine.account()
    assert (await engine.ask(unknown, claude)).code == "provider_not_configured"
    for account in (poor, busy, unknown):
        assert not await engine.failures(account)


async def test_a_task_that_the_circuit_breakers_keep_from_the_provider_uses_up_nothing(
    engine: EngineApp,
) -> None:
    account = await engine.account()
    task = {**text_task("down"), "model": "gpt-3.5-turbo"}  # the circuit of gpt-4 stays closed
    down = json_reply({"error": {"message": "Overloaded"}}, 503, {"Retry-After": "60"})  # too long to retry
    engine.upstream.when("down", down)
    failed = 0
    while True:
        before = await engine.used(account)
        answer = await engine.ask(account, task, stream=failed % 2 == 0)
        assert answer.code == "provider_unavailable"
        if len(engine.upstream.requests) == failed:
            break
        failed += 1
        assert failed < 50, "the circuit never opens"
    used = await engine.used(account)
    assert (before.requests, used.requests, used.tokens, used.concurrency) == (failed, failed, 0, 0)
    assert len(await engine.failures(account)) == failed


async def test_a_task_whose_settlement_fails_is_recorded_as_failed() -> None:
    store, ledger = failing_ledger("settle")
    reservation = await reserve(ledger, "img_1")
    reservation.record_route(reservation.job)
    with pytest.raises(PomeloError):
        await reservation.settle(Usage(images=1), counted=True)
    store.errors.clear()
    await ledger.operations.idle()
    assert store.reserved == {}
    (ended,) = store.ended
    assert (ended.code, ended.cost) == ("store_unavailable", 0)
