"""How a task ended, as its report says it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.engine.observed import ObservedTask
from pomelo.engine.routing import DEADLINE_MARGIN
from pomelo.errors import PomeloError
from pomelo.providers.errors import UpstreamError
from pomelo.telemetry.events import TaskReport
from tests.calls import call_of
from tests.unit.clock import Clock
from tests.unit.engine.failing_store import CALLER, failing_ledger, reserve, usage_record
from tests.unit.telemetry.reports import Reports

DEADLINE = 1_010.0


async def report(
    error: BaseException | None,
    *,
    stream: bool = False,
    reserved: bool = True,
    own: bool = False,
    replayed: bool = False,
    at: float = 1_005.0,
) -> TaskReport:
    """The report of a task that `error` ended `at` that time. `own`: its events raised the error."""
    clock, reports, second, call = Clock(), Reports(), Reports(), call_of("")
    call.deadline = DEADLINE
    reservation = await reserve(failing_ledger()[1], "img_1") if reserved else None
    task = ObservedTask([reports, second], clock, call, CALLER, "flux-1-pro", stream=stream)
    task.reservation, task.replayed = reservation, replayed
    task.failure = error if own and isinstance(error, Exception) else None
    clock.now = at
    task.__exit__(None if error is None else type(error), error, None)
    assert call.reported
    (found,) = reports.tasks
    assert second.tasks == [found]
    return found


def test_the_model_of_a_refused_task_is_reported_shortened() -> None:
    reports, error = Reports(), PomeloError("unsupported_model")
    task = ObservedTask([reports], Clock(), call_of(""), CALLER, "x" * 8_000_000, stream=False)
    task.__exit__(type(error), error, None)
    assert reports.tasks[0].model == "x" * 200


@pytest.mark.parametrize(
    ("error", "options", "outcome", "code", "status"),
    [
        (None, {"stream": True}, "cancelled", "", 0),
        (None, {"stream": True, "replayed": True}, "completed", "", 200),
        (PomeloError("rate_limit_exceeded"), {"reserved": False}, "refused", "rate_limit_exceeded", 429),
        (UpstreamError("provider_failed"), {}, "failed", "provider_failed", 502),
        (KeyError("a bug"), {}, "failed", "internal_error", 500),
        (KeyError("a bug"), {"stream": True, "own": True}, "failed", "internal_error", 500),
        (ConnectionResetError("left"), {"stream": True}, "cancelled", "", 0),
        (GeneratorExit(), {"stream": True}, "cancelled", "", 0),
        (asyncio.CancelledError(), {}, "cancelled", "", 0),
        (asyncio.CancelledError(), {"at": DEADLINE - 2 * DEADLINE_MARGIN}, "cancelled", "", 0),
        (
            asyncio.CancelledError(),
            {"at": DEADLINE - DEADLINE_MARGIN / 2},
            "failed",
            "deadline_exceeded",
            504,
        ),
        (asyncio.CancelledError(), {"at": DEADLINE, "reserved": False}, "refused", "deadline_exceeded", 504),
    ],
)
async def test_the_outcome_of_a_task_says_who_ended_it(
    error: BaseException | None, options: dict[str, Any], outcome: str, code: str, status: int
) -> None:
    found = await report(error, **options)
    assert (found.outcome, found.code, found.http_status) == (outcome, code, status)


async def test_a_report_has_what_the_task_and_its_calls_took() -> None:
    clock, reports = Clock(), Reports()
    task = ObservedTask([reports], clock, call_of(""), CALLER, "flux-1-pro", stream=True)
    task.reservation = await reserve(failing_ledger()[1], "img_1")
    task.reservation.first_byte_ms, task.reservation.output_bytes = 7, 9
    task.calls.route, task.calls.route_number, task.calls.attempts = Route("bfl", "flux"), 2, 3
    task.calls.status, task.calls.seconds = 503, 1.5
    clock.now += 4
    task.__exit__(None, None, None)
    (found,) = reports.tasks
    assert (found.provider, found.provider_model) == ("bfl", "flux")
    assert (found.route, found.attempts, found.upstream_status) == (2, 3, 503)
    assert (found.elapsed_ms, found.upstream_ms, found.first_byte_ms, found.output_bytes) == (
        4_000,
        1_500,
        7,
        9,
    )
    assert (found.account, found.key_id, found.live, found.stream) == ("default", "key", True, True)


async def test_a_task_with_a_complete_record_is_completed_unless_an_error_ended_it() -> None:
    clock, record = Clock(), usage_record("img_1")
    for complete, error, outcome, code in (
        (True, None, "completed", ""),
        (False, None, "cancelled", ""),
        (True, PomeloError("store_unavailable"), "failed", "store_unavailable"),
    ):
        reports = Reports()
        task = ObservedTask([reports], clock, call_of(""), CALLER, "flux-1-pro", stream=False)
        task.reservation = await reserve(failing_ledger()[1], "img_1")
        task.reservation.record = replace(record, complete=complete)
        task.__exit__(None, error, None)
        (found,) = reports.tasks
        assert (found.outcome, found.code, found.record) == (outcome, code, task.reservation.record)
