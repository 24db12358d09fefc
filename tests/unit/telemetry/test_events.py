"""The reports of tasks and of failed attempts: what they say, and that each task has exactly one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.errors import TABLE
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.testing import Answer, Gate, Reply, Stop, error_reply
from tests.calls import call_of
from tests.tasks import text_body, text_task
from tests.unit.engine.apps import EngineApp, open_engine
from tests.unit.telemetry.reports import Reports
from tests.waiting import cancel, until

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
BUSY = error_reply(503, code="busy", headers={"x-request-id": "req_vendor"})


@pytest.fixture(name="reports")
def _reports() -> Reports:
    return Reports()


@pytest.fixture(name="engine")
async def _engine(tmp_path: Path, reports: Reports) -> AsyncIterator[EngineApp]:
    async with open_engine(tmp_path, observers=[reports]) as opened:
        yield opened


@STREAM
async def test_a_completed_task_is_reported_once_with_its_record(
    engine: EngineApp, reports: Reports, stream: bool
) -> None:
    account = await engine.account()
    engine.upstream.default = Answer("Hello")
    answer = await engine.ask(account, text_body(), stream=stream, headers={"x-request-id": "r1"})
    assert answer.code == "ok"
    (report,) = reports.tasks
    (record,) = await engine.records(account)
    assert (report.outcome, report.code, report.http_status) == ("completed", "", 200)
    assert (report.call.request_id, report.task_id, report.key_id) == ("r1", record.task_id, record.key_id)
    assert (report.model, report.task_type, report.stream) == ("gpt-4", "text", stream)
    assert (report.provider, report.provider_model) == (record.provider, record.provider_model)
    assert (report.route, report.attempts, report.upstream_status) == (1, 1, 200)
    assert report.record == record
    assert 0 < report.upstream_ms <= report.elapsed_ms
    assert reports.records == [record]
    assert reports.attempts == []
    assert answer.call.reported


@STREAM
async def test_each_failed_attempt_is_reported_with_the_vendors_code(
    engine: EngineApp, reports: Reports, stream: bool
) -> None:
    account = await engine.account()
    engine.upstream.script(BUSY, Answer("Hello"))
    answer = await engine.ask(account, text_body(), stream=stream)
    assert answer.code == "ok"
    (attempt,) = reports.attempts
    assert (attempt.request_id, attempt.task_id) == (answer.call.request_id, reports.tasks[0].task_id)
    assert (attempt.provider, attempt.route, attempt.attempt) == ("openai", 1, 1)
    assert (attempt.code, attempt.upstream_status) == ("provider_unavailable", 503)
    assert (attempt.vendor_code, attempt.vendor_request_id) == ("busy", "req_vendor")
    assert attempt.reason == "the vendor is overloaded or down"
    assert attempt.next_step == "retry"
    assert attempt.wait > 0
    assert (reports.tasks[0].attempts, reports.tasks[0].upstream_status) == (2, 200)


async def test_the_last_attempt_of_a_failed_task_is_followed_by_its_end(
    engine: EngineApp, reports: Reports
) -> None:
    account = await engine.account()
    engine.upstream.default = error_reply(401, code="invalid_api_key")
    assert (await engine.ask(account, text_body(model="gpt-4"))).code == "provider_failed"
    assert reports.attempts[-1].next_step == "end"
    assert reports.attempts[-1].reason == "the vendor refused your key"
    (report,) = reports.tasks
    assert (report.outcome, report.code) == ("failed", "provider_failed")
    assert report.http_status == TABLE["provider_failed"].http
    assert (report.upstream_status, report.vendor_code) == (401, "invalid_api_key")
    assert report.attempts == len(reports.attempts)
    assert report.record is not None
    assert (report.record.cost, report.record.code) == (0, "provider_failed")


async def test_a_refused_task_is_reported_without_a_provider(engine: EngineApp, reports: Reports) -> None:
    account = await engine.account("one request")
    bodies = [text_body(model="gpt-9"), text_body(), text_body()]
    codes = [(await engine.ask(account, body)).code for body in bodies]
    assert codes == ["unsupported_model", "ok", "rate_limit_exceeded"]
    first, _, last = reports.tasks
    assert (first.outcome, first.code, first.model, first.task_id) == (
        "refused", "unsupported_model", "gpt-9", "",
    )  # fmt: skip
    assert (last.outcome, last.code, last.provider, last.attempts) == (
        "refused", "rate_limit_exceeded", "", 0,
    )  # fmt: skip
    assert last.task_id.startswith("task_")


async def test_a_stream_that_the_vendor_cuts_is_reported_with_what_it_cost(
    engine: EngineApp, reports: Reports
) -> None:
    account = await engine.account()
    engine.upstream.default = Answer("Hello world", at={1: Stop.RESET})
    answer = await engine.ask(account, text_body(), stream=True)
    assert answer.code == "provider_failed"
    (attempt,), (report,) = reports.attempts, reports.tasks
    assert (attempt.reason, attempt.upstream_status) == ("the vendor's response broke off", 200)
    assert attempt.next_step == "end"
    assert (report.outcome, report.upstream_status) == ("failed", 200)
    assert report.output_bytes > 0
    assert report.record is not None
    assert [report.record.cost] == [one.cost for one in await engine.records(account)]


async def test_a_stream_whose_caller_leaves_is_reported_as_cancelled(
    engine: EngineApp, reports: Reports
) -> None:
    account = await engine.account()
    engine.upstream.default = Answer("Hello world")
    call = call_of(account.key)

    async def leave() -> None:
        async with engine.app.services.tasks.stream_task(text_task(), TaskOptions(), call) as events:
            await anext(events)
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await leave()
    await until(lambda: bool(reports.records))
    (report,) = reports.tasks
    assert (report.call, report.outcome, report.code, report.http_status) == (call, "cancelled", "", 0)
    assert report.record is not None
    assert reports.records[0].cost == report.record.cost > 0
    assert reports.records[0].code == report.record.code == "cancelled"


async def test_a_task_that_reaches_its_deadline_at_the_vendor_is_reported_with_the_attempt(
    engine: EngineApp, reports: Reports
) -> None:
    account = await engine.account()
    engine.upstream.default = Reply(before=(Stop.SILENCE,))
    assert (await engine.ask(account, text_body(), within=1)).code == "deadline_exceeded"
    (attempt,) = reports.attempts
    assert (attempt.code, attempt.reason) == (
        "deadline_exceeded", "the vendor did not answer before the task's deadline",
    )  # fmt: skip
    (report,) = reports.tasks
    assert (report.outcome, report.code, report.provider) == ("failed", "deadline_exceeded", "openai")


async def test_a_replayed_answer_is_reported_without_a_charge(engine: EngineApp, reports: Reports) -> None:
    account = await engine.account()
    engine.upstream.default = Answer("Hello")
    for _ in range(2):
        assert (await engine.ask(account, text_body(), headers={"idempotency-key": "k"})).code == "ok"
    first, second = reports.tasks
    assert (first.replayed, second.replayed, second.outcome) == (False, True, "completed")
    assert (second.record, second.attempts) == (None, 0)
    assert len(reports.records) == 1


@pytest.mark.parametrize(
    ("left", "outcome", "code"), [(60.0, "cancelled", ""), (0.05, "failed", "deadline_exceeded")]
)
async def test_a_task_that_is_cancelled_just_before_its_deadline_is_late(
    engine: EngineApp, reports: Reports, left: float, outcome: str, code: str
) -> None:
    account = await engine.account()
    gate = Gate()
    engine.upstream.default = Reply(before=(gate,))
    call = call_of(account.key)
    running = asyncio.create_task(engine.app.services.tasks.run_task(text_task(), TaskOptions(), call))
    await gate.reached.wait()
    call.deadline = asyncio.get_running_loop().time() + left
    await cancel(running)
    (report,) = reports.tasks
    assert (report.outcome, report.code, report.provider) == (outcome, code, "openai")
    await engine.settled(account)
    (record,) = await engine.failures(account)
    assert record.code == (code or outcome)


async def test_a_task_that_the_circuit_breaker_stops_is_reported_with_the_provider(
    engine: EngineApp, reports: Reports
) -> None:
    account = await engine.account()
    engine.upstream.default = BUSY
    while not reports.tasks or reports.tasks[-1].attempts:
        assert (await engine.ask(account, text_body())).code == "provider_unavailable"
    report = reports.tasks[-1]
    assert (report.provider, report.route, report.upstream_status) == ("openai", 1, 0)
    assert "circuit" in report.reason
