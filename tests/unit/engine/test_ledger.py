"""The ledger with a failing store: progress, limits, and recovery of reservations without a task."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from pomelo.accounts.plans import BUILTIN
from pomelo.call import KeyBudget
from pomelo.catalog.pricing import Prices, Usage
from pomelo.engine import ledger as ledgers
from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import LostReservationError, UnknownOutcomeError
from tests.calls import call_of
from tests.unit.engine.failing_store import (
    ANY_ERROR,
    CALLER,
    MODEL,
    UNEXPECTED_ERRORS,
    FixedUsage,
    failing_ledger,
    reserve,
    usage_record,
)
from tests.unit.engine.jobs import accepted_job
from tests.unit.refusals import refused
from tests.waiting import until


async def test_progress_is_saved_while_a_void_is_pending() -> None:
    store, ledger = failing_ledger("void")
    (await reserve(ledger, "img_released")).release()
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    running.record_output(1)
    noting = asyncio.create_task(ledger.keep_progress())
    async with asyncio.timeout(20):
        await store.noted.wait()
    noting.cancel()


async def test_progress_is_saved_only_when_there_is_more_output() -> None:
    store, ledger = failing_ledger()
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    for total, saved in ((0, False), (1, True), (1, False), (2, True), (2, False)):
        store.noted.clear()
        running.output_bytes = total
        await ledger.save_progress()
        assert store.noted.is_set() == saved


async def test_progress_that_was_not_saved_is_saved_by_the_next_attempt_without_more_output() -> None:
    store, ledger = failing_ledger("note")
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    running.record_output(1)
    with pytest.raises(PomeloError):
        await ledger.save_progress()
    store.errors.clear()
    for saved in (True, False):
        store.noted.clear()
        await ledger.save_progress()
        assert store.noted.is_set() == saved


async def test_progress_that_was_perhaps_not_saved_beside_a_lost_task_is_saved_by_the_next_attempt() -> None:
    store, ledger = failing_ledger()
    for name in ("img_lost", "img_running"):
        reservation = await reserve(ledger, name)
        reservation.bill_partially(FixedUsage(lambda: Usage(images=1)))
        reservation.record_output(1)
    store.lost = {"img_lost"}
    for noted in (["img_lost", "img_running"], ["img_running"], []):
        store.last_noted = []
        await ledger.save_progress()
        assert store.last_noted == noted


async def test_a_failing_collector_delays_no_other_progress_and_its_task_is_recovered() -> None:
    store, ledger = failing_ledger()

    def broken() -> Usage:
        raise ZeroDivisionError

    for name, used in (("img_broken", broken), ("img_intact", lambda: Usage(images=1))):
        reservation = await reserve(ledger, name)
        reservation.bill_partially(FixedUsage(used))
        reservation.record_output(1)
    await ledger.save_progress()
    assert store.noted.is_set()
    ledger.running["img_broken"].release()
    await ledger.operations.idle()
    assert store.calls[-1] == "recover img_broken"


@ANY_ERROR
async def test_any_error_of_reading_limits_is_store_unavailable(error: str) -> None:
    store, ledger = failing_ledger()
    store.errors["limit_status"] = UNEXPECTED_ERRORS[error]()
    with refused("store_unavailable"):
        await ledger.limit_status(Wallet("default", True), ())


@ANY_ERROR
async def test_any_error_of_reading_the_use_of_a_budget_is_store_unavailable(error: str) -> None:
    store, ledger = failing_ledger()
    store.errors["budget_use"] = UNEXPECTED_ERRORS[error]()
    store.refused, store.refused_counter = True, "budget:key.day"
    caller = replace(CALLER, budget=KeyBudget("budget:key.day", 1, "day"))
    job = accepted_job("img_1", MODEL, Usage(images=1), caller)
    with refused("store_unavailable"):
        await ledger.reserve(job, BUILTIN["unlimited"], call_of(""))


@pytest.mark.parametrize(
    ("exact", "unit", "charged"),
    [
        (True, PriceUnit.PRICE_UNIT_IMAGE, "0.04"),
        (False, PriceUnit.PRICE_UNIT_IMAGE, None),
        (True, PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR, None),
    ],
)
async def test_only_an_exact_cost_is_reported_before_the_task_runs(
    exact: bool, unit: PriceUnit.ValueType, charged: str | None
) -> None:
    call = call_of("")
    usage, prices = Usage(images=1, provider_micros=1), Prices({unit: 40_000})
    job = accepted_job("img_1", MODEL, usage, CALLER, exact=exact, prices=prices)
    await failing_ledger()[1].reserve(job, BUILTIN["unlimited"], call)
    assert call.response_headers.get("X-Credits-Charged") == charged


async def test_a_refused_caller_that_has_left_has_nothing_to_void() -> None:
    store, ledger = failing_ledger()
    store.refused = True
    store.waits["reserve"] = asyncio.Event()
    reserving = asyncio.create_task(reserve(ledger, "img_1"))
    await until(lambda: store.calls == ["reserve"])
    reserving.cancel()
    await asyncio.wait([reserving])
    store.waits["reserve"].set()
    await ledger.operations.idle()
    assert store.calls == ["reserve"]


@pytest.mark.parametrize(
    ("error", "voids"),
    [
        (PomeloError("store_unavailable"), 0),
        (LostReservationError("img_1"), 0),
        (UnknownOutcomeError("store_unavailable"), 1),
        (KeyError("reply"), 1),
    ],
)
@pytest.mark.parametrize("leaves", [False, True])
async def test_only_a_reserve_with_an_unknown_outcome_is_voided_once(
    error: Exception, voids: int, leaves: bool
) -> None:
    store, ledger = failing_ledger("void")
    store.errors["reserve"] = error
    store.waits["reserve"] = asyncio.Event()
    reserving = asyncio.create_task(reserve(ledger, "img_1"))
    await until(lambda: store.calls == ["reserve"])
    if leaves:
        reserving.cancel()
        await asyncio.wait([reserving])
    store.waits["reserve"].set()
    await asyncio.wait([reserving])
    await ledger.operations.idle()
    assert store.calls == ["reserve"] + ["void img_1"] * voids
    assert not ledger.runs("img_1")


async def test_a_reserve_that_was_voided_meanwhile_is_refused_and_not_voided_again() -> None:
    store, ledger = failing_ledger()
    store.errors["reserve"] = LostReservationError("img_1")
    with refused("store_unavailable"):
        await reserve(ledger, "img_1")
    await ledger.operations.idle()
    assert store.calls == ["reserve"]


async def test_a_void_is_retried_although_progress_can_not_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "PROGRESS_INTERVAL", 0.001)
    store, ledger = failing_ledger("void", "note")
    (await reserve(ledger, "img_released")).release()
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    running.record_output(1)
    await until(lambda: "void img_released" in store.calls)
    saving = asyncio.create_task(ledger.keep_progress())
    await until(store.noted.is_set)
    del store.errors["void"]
    await until(lambda: "img_released" not in store.reserved)
    saving.cancel()


async def test_a_task_that_is_being_reserved_runs() -> None:
    store, ledger = failing_ledger()
    store.waits["reserve"] = asyncio.Event()
    reserving = asyncio.create_task(reserve(ledger, "img_1"))
    await until(lambda: store.calls == ["reserve"])
    assert ledger.runs("img_1")
    store.reserved["img_1"] = usage_record("img_1")  # the store has it, and its caller does not know yet
    await reconcile(ledger, 2)
    assert store.calls == ["reserve"]
    store.waits["reserve"].set()
    await reserving
    assert ledger.runs("img_1")


@pytest.mark.parametrize("failing", [None, "reserve", "void"])
async def test_a_request_that_is_counted_runs_no_longer(failing: str | None) -> None:
    store, ledger = failing_ledger()
    if failing is not None:
        store.errors[failing] = UnknownOutcomeError("store_unavailable")
    counting = ledger.count_request(call_of(""), CALLER, BUILTIN["free"])
    if failing is None:
        await counting
    else:
        with refused("store_unavailable"):
            await counting
    store.errors.clear()
    await ledger.operations.idle()
    (task_id,) = {each.removeprefix("void ") for each in store.calls if each.startswith("void ")}
    assert not ledger.runs(task_id)
    store.reserved[task_id] = usage_record(task_id)  # else `reconcile` would never end a late reservation
    await reconcile(ledger, 2)
    assert store.reserved == {}


async def test_a_used_budget_is_reset_at_the_end_of_the_period_that_the_store_is_in() -> None:
    """This clock was set back by an hour, over midnight."""
    store, ledger = failing_ledger(now=lambda: 86_400.0 - 3_600)
    store.refused, store.refused_counter = True, "budget:key.day"
    store.budget_start = 86_400.0
    job = accepted_job(
        "img_1", MODEL, Usage(images=1), replace(CALLER, budget=KeyBudget("budget:key.day", 1, "day"))
    )
    with refused("insufficient_credits") as refusal:
        await ledger.reserve(job, BUILTIN["unlimited"], call_of(""))
    assert refusal.value.values["resetTime"] == "1970-01-03T00:00:00Z"


async def reconcile(ledger: Ledger, checks: int) -> None:
    """Runs that many checks for reservations without a running task."""
    for _ in range(checks):
        await ledger.reconcile()


async def test_a_reservation_without_a_running_task_is_recovered_at_the_second_check() -> None:
    store, ledger = failing_ledger()
    await reserve(ledger, "img_running")
    store.reserved["img_lost"] = usage_record("img_lost")
    await reconcile(ledger, 1)
    assert store.calls == ["reserve"]
    await reconcile(ledger, 1)
    assert store.calls == ["reserve", "recover img_lost"]
    assert set(store.reserved) == {"img_running"}
    await reconcile(ledger, 5)
    assert store.calls == ["reserve", "recover img_lost"]


async def test_a_check_recovers_a_bounded_number_of_reservations_and_the_next_check_the_rest() -> None:
    store, ledger = failing_ledger()
    for number in range(1_500):
        name = f"img_{number}"
        store.reserved[name] = usage_record(name)
    await reconcile(ledger, 2)
    assert len(store.reserved) == 1_500 - 1_024
    assert store.max_concurrent <= 64
    await reconcile(ledger, 1)
    assert store.reserved == {}


@ANY_ERROR
async def test_a_failed_recovery_is_retried_at_every_check(error: str) -> None:
    store, ledger = failing_ledger()
    for name in ("img_a", "img_b"):
        store.reserved[name] = usage_record(name)
    store.errors["recover img_a"] = UNEXPECTED_ERRORS[error]()
    await reconcile(ledger, 4)
    assert set(store.reserved) == {"img_a"}
    store.errors.clear()
    await reconcile(ledger, 1)
    assert store.reserved == {}


async def test_tasks_in_progress_or_awaiting_a_retry_are_not_recovered() -> None:
    store, ledger = failing_ledger()
    settling = await reserve(ledger, "img_settling")
    released = await reserve(ledger, "img_released")
    store.waits |= {"settle": asyncio.Event(), "reserve": asyncio.Event()}
    store.errors["void"] = KeyError()
    released.release()
    calls = [
        asyncio.create_task(settling.settle(Usage(images=1), counted=True)),
        asyncio.create_task(reserve(ledger, "img_reserving")),
    ]
    await until(lambda: len(store.calls) == 5)
    store.reserved["img_reserving"] = usage_record("img_reserving")
    calls[1].cancel()  # The caller disconnects; the reservation is released once its outcome is known.
    await reconcile(ledger, 4)
    assert not [call for call in store.calls if "recover" in call]
    store.errors.clear()
    for event in store.waits.values():
        event.set()
    await asyncio.gather(*calls, return_exceptions=True)
    await ledger.operations.idle()
    assert store.reserved == {}


async def test_a_reservation_that_appears_late_is_recovered() -> None:
    store, ledger = failing_ledger()
    store.errors["reserve"] = ConnectionResetError()
    with pytest.raises(PomeloError):
        await reserve(ledger, "img_1")
    await ledger.operations.idle()
    await reconcile(ledger, 1)
    store.reserved["img_1"] = usage_record("img_1")
    await reconcile(ledger, 2)
    assert store.reserved == {}


@pytest.mark.parametrize("error", [*UNEXPECTED_ERRORS, "store_unavailable"])
async def test_the_background_loops_outlive_any_error(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "PROGRESS_INTERVAL", 0.001)
    store, ledger = failing_ledger(reconcile_every=0.001)
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    for name in ("note", "reservations"):
        store.errors[name] = (
            PomeloError("store_unavailable") if error == "store_unavailable" else UNEXPECTED_ERRORS[error]()
        )
    store.reserved["img_lost"] = usage_record("img_lost")
    loops = [asyncio.create_task(ledger.keep_progress()), asyncio.create_task(ledger.keep_reconciled())]
    for size in range(5):
        store.noted.clear()
        running.record_output(size + 1)
        async with asyncio.timeout(20):
            await store.noted.wait()
    assert not any(loop.done() for loop in loops)
    store.errors.clear()
    await until(lambda: "img_lost" not in store.reserved)
    for loop in loops:
        loop.cancel()
    await asyncio.wait(loops)
    assert all(loop.cancelled() for loop in loops)


async def test_a_reservation_must_be_found_by_two_successive_checks() -> None:
    store, ledger = failing_ledger()
    for found in (True, False, True):
        store.reserved = {"img_1": usage_record("img_1")} if found else {}
        await reconcile(ledger, 1)
    assert store.calls == []
