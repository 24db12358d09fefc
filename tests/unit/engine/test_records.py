"""What the record of a task has, and that each task ends once, also on a store that hangs."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace

import pytest

from pomelo.accounts.plans import BUILTIN
from pomelo.call import KeyBudget
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine import ledger as ledgers
from pomelo.engine.reservation import Reservation
from pomelo.engine.store_operations import MAX_CONCURRENT_RETRIES
from pomelo.errors import PomeloError
from tests.calls import call_of
from tests.unit.clock import Clock
from tests.unit.engine.failing_store import (
    CALLER,
    MODEL,
    PRICES,
    FailingStore,
    FixedUsage,
    failing_ledger,
    reserve,
)
from tests.unit.engine.jobs import accepted_job
from tests.unit.refusals import refused
from tests.waiting import until

USAGE = Usage(**{one.name: number for number, one in enumerate(fields(Usage), 1)})
"""Every count has another value."""


async def running(clock: Clock) -> tuple[FailingStore, Reservation]:
    """A task that its provider was called for, at Unix time 5000 and later; and its store."""
    store, ledger = failing_ledger(monotonic=clock, now=lambda: 5_000 + clock.now)
    job = replace(
        accepted_job("img_1", MODEL, USAGE, CALLER, prices=PRICES),
        user="ada",
        metadata='{"team":"red"}',
        price_version="2026-01",
    )
    reservation = await ledger.reserve(job, BUILTIN["unlimited"], call_of(""))
    assert isinstance(reservation, Reservation)
    reservation.record_route(reservation.job)
    return store, reservation


async def test_the_record_of_a_task_has_every_count_and_its_times() -> None:
    clock = Clock()
    _, reservation = await running(clock)
    clock.now += 0.25
    reservation.record_output(10)
    clock.now += 0.5
    reservation.record_output(20)
    clock.now += 1
    record = await reservation.settle(USAGE, counted=False)
    assert {name: getattr(record, name) for name in Usage.__slots__} == {
        name: getattr(USAGE, name) for name in Usage.__slots__
    }
    assert (record.first_byte_ms, record.processing_ms, record.output_bytes) == (250, 1_750, 20)
    assert record.at == 5_000 + clock.now
    assert (record.user, record.metadata, record.price_version) == ("ada", '{"team":"red"}', "2026-01")
    assert (record.account, record.key_id, record.live) == ("default", "key", True)
    assert (record.wire, record.model, record.task_type) == ("rest", "flux-1-pro", "image")
    assert (record.provider, record.provider_model) == ("bfl", MODEL.routes[0].model)
    assert (record.request_id, record.prices) == ("req_1", PRICES.encoded)
    assert (record.source, record.complete, record.code) == ("estimated", True, "")
    assert record.cost == USAGE.images * 40_000


async def test_the_record_of_a_failed_task_has_the_time_of_its_end() -> None:
    clock = Clock()
    store, reservation = await running(clock)
    clock.now += 2
    await reservation.fail("provider_failed")
    (record,) = store.ended
    assert (record.at, record.processing_ms) == (5_000 + clock.now, 2_000)
    assert (record.code, record.cost, record.provider) == ("provider_failed", 0, "bfl")


async def test_a_task_ends_once() -> None:
    store, reservation = await running(Clock())
    await reservation.fail("provider_failed")
    await reservation.fail("internal_error")
    reservation.release()
    assert store.calls == ["reserve", "settle img_1"]


async def test_a_lost_task_is_not_ended_again_and_reports_limits_and_no_cost() -> None:
    store, reservation = await running(Clock())
    call = reservation._call
    reservation.lost = True
    call.response_headers["X-Credits-Charged"] = "0.04"  # the price of a complete result
    await reservation.fail("store_unavailable")
    assert store.calls == ["reserve"]  # whoever took the reservation has ended it
    assert call.response_trailers["X-Credits-Remaining"] == "0"
    assert "X-Credits-Charged" not in call.response_trailers
    assert "X-Credits-Charged" not in call.response_headers


async def test_a_cost_that_could_not_be_charged_is_not_reported() -> None:
    store, reservation = await running(Clock())
    store.errors["settle"] = PomeloError("store_unavailable")
    reservation._call.response_headers["X-Credits-Charged"] = "0.04"  # the price of a complete result
    with refused("store_unavailable"):
        await reservation.settle(Usage(images=1), counted=True)
    assert "X-Credits-Charged" not in reservation._call.response_headers
    await reservation._ledger.operations.idle()


@pytest.mark.parametrize(
    ("thinks", "code", "tokens"),
    [
        (True, "deadline_exceeded", 500),
        (True, "provider_unavailable", 13),
        (False, "deadline_exceeded", 13),
    ],
)
async def test_a_text_whose_thinking_was_perhaps_cut_off_uses_no_fewer_tokens_than_expected(
    thinks: bool, code: str, tokens: int
) -> None:
    store, ledger = failing_ledger()
    model = Catalog.load().models["gpt-4"]
    job = accepted_job("task_1", model, Usage(), CALLER, tokens=500)
    reservation = await ledger.reserve(job, BUILTIN["unlimited"], call_of(""))
    assert isinstance(reservation, Reservation)
    reservation.record_route(reservation.job)
    reservation.job.report.thinks = thinks
    reservation.bill_partially(FixedUsage(lambda: Usage(input_tokens=10, output_tokens=3)))
    reservation.record_output(5)
    await reservation.fail(code)
    (settlement,) = store.settlements
    assert {counter.name: counter.amount for counter in settlement.counters}["tokens:gpt-4"] == tokens


@pytest.mark.parametrize("method", ["settle", "limit_status"])
async def test_a_failed_task_does_not_wait_for_a_store_that_hangs(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.engine.reservation.STATUS_TIMEOUT", 0.01)
    store, reservation = await running(Clock())
    if method == "limit_status":
        reservation._route = None  # nothing is charged
    store.waits[method] = asyncio.Event()
    reservation._call.response_headers["X-Credits-Charged"] = "0.04"  # the price of a complete result
    async with asyncio.timeout(20):
        await reservation.fail()
    assert reservation._call.response_headers["X-Credits-Charged"] == "0"
    assert reservation._call.response_trailers["X-Credits-Charged"] == "0"
    store.waits[method].set()
    await reservation._ledger.operations.idle()
    assert store.reserved == {}


async def test_a_lack_of_credits_is_not_reported_as_one_of_the_keys_budget() -> None:
    store, ledger = failing_ledger()
    store.refused = True
    caller = replace(CALLER, budget=KeyBudget("key", 1, "day"))
    job = accepted_job("img_1", MODEL, Usage(images=1), caller, prices=PRICES)
    with refused("insufficient_credits") as refusal:
        await ledger.reserve(job, BUILTIN["unlimited"], call_of(""))
    assert refusal.value.values == {"requiredMicros": "40000", "availableMicros": "0"}


# --- retries


async def test_failed_operations_are_retried_while_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "PROGRESS_INTERVAL", 0.001)
    clock = Clock()
    store, ledger = failing_ledger("void", monotonic=clock)
    (await reserve(ledger, "img_1")).release()
    await until(lambda: not ledger.operations._in_progress)
    store.errors.clear()
    clock.now += 60
    saving = asyncio.create_task(ledger.keep_progress())
    await until(lambda: not store.reserved)
    saving.cancel()


@pytest.mark.parametrize("fails", [False, True])
async def test_the_last_retries_at_the_end_stop_if_the_store_still_fails(fails: bool) -> None:
    store, ledger = failing_ledger("void", monotonic=Clock())
    many = 3 * MAX_CONCURRENT_RETRIES
    for number in range(many):
        (await reserve(ledger, f"img_{number}")).release()
    await until(lambda: not ledger.operations._in_progress)
    store.calls.clear()
    if not fails:
        store.errors.clear()
    await ledger.operations.idle()
    assert len(store.calls) == (MAX_CONCURRENT_RETRIES if fails else many)
    assert len(store.reserved) == (many if fails else 0)


async def test_progress_is_a_record_of_a_task_that_is_not_complete() -> None:
    _, ledger = failing_ledger()
    reservation = await reserve(ledger, "img_1")
    reservation.bill_partially(FixedUsage(lambda: Usage(images=1)))
    reservation.record_output(3)
    record = reservation.progress()
    assert record is not None
    assert (record.images, record.output_bytes, record.complete, record.source) == (1, 3, False, "estimated")
    assert reservation.progress() is None
