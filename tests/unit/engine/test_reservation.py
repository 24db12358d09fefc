"""Reservations on a failing store: every reserve, settlement and void is retried until its outcome is known."""

from __future__ import annotations

import logging

import pytest

from pomelo.catalog.pricing import Prices, Usage
from pomelo.engine.store_operations import MAX_CONCURRENT_RETRIES
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from tests.unit.clock import Clock
from tests.unit.engine.failing_store import (
    ANY_ERROR,
    UNEXPECTED_ERRORS,
    failing_ledger,
    reserve,
)
from tests.unit.refusals import refused
from tests.waiting import until

DONE = pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])


async def test_calls_refused_during_an_outage_leave_no_pending_operations() -> None:
    store, ledger = failing_ledger("reserve", "void")
    for number in range(100):
        with pytest.raises(PomeloError):
            await reserve(ledger, f"img_{number}")
    await ledger.operations.idle()
    store.calls.clear()
    store.errors.clear()
    await ledger.operations.idle()
    assert store.calls == []


async def test_a_failed_void_is_retried_when_the_store_is_available_again() -> None:
    store, ledger = failing_ledger("void")
    (await reserve(ledger, "img_released")).release()
    await ledger.operations.idle()
    store.errors.clear()
    await ledger.operations.idle()
    await ledger.operations.idle()
    assert store.calls == ["reserve", "void img_released", "void img_released", "void img_released"]


@ANY_ERROR
@DONE
async def test_any_error_of_reserve_is_store_unavailable_and_the_reservation_is_released(
    error: str, done: bool
) -> None:
    store, ledger = failing_ledger()
    store.errors["reserve"], store.takes_effect = UNEXPECTED_ERRORS[error](), done
    with refused("store_unavailable"):
        await reserve(ledger, "img_1")
    await ledger.operations.idle()
    assert store.reserved == {}
    assert not ledger.runs("img_1")


@ANY_ERROR
@DONE
async def test_a_settlement_that_fails_with_any_error_is_retried_until_its_outcome_is_known(
    error: str, done: bool
) -> None:
    store, ledger = failing_ledger()
    reservation = await reserve(ledger, "img_1")
    store.errors["settle"], store.takes_effect = UNEXPECTED_ERRORS[error](), done
    with refused("store_unavailable"):
        await reservation.settle(Usage(images=1), counted=True)
    reservation.release()
    for _ in range(3):
        await ledger.operations.idle()
        assert ledger.runs("img_1") != done
    store.errors.clear()
    await ledger.operations.idle()
    assert store.reserved == {}
    assert not ledger.runs("img_1")
    assert set(store.calls) == {"reserve", "settle img_1"}, (
        "a settlement of unknown outcome must not be voided"
    )


async def test_a_settlement_that_failed_without_effect_is_voided() -> None:
    store, ledger = failing_ledger("settle")
    reservation = await reserve(ledger, "img_1")
    with pytest.raises(PomeloError):
        await reservation.settle(Usage(images=1), counted=True)
    await ledger.operations.idle()
    assert store.calls == ["reserve", "settle img_1", "void img_1"]
    assert store.reserved == {}


@pytest.mark.parametrize("key", [None, b"key"], ids=["no key", "with a key"])
async def test_an_unsettled_task_may_be_repeated_only_with_an_idempotency_key(key: bytes | None) -> None:
    _, ledger = failing_ledger("settle")
    reservation = await reserve(ledger, "img_1", idempotency_key=key)
    with refused("store_unavailable") as caught:
        await reservation.settle(Usage(images=1), counted=True)
    assert caught.value.repeatable == (key is not None)
    assert ("it may still be charged" in caught.value.message) == (key is None)
    await ledger.operations.idle()


@ANY_ERROR
@DONE
async def test_a_void_that_fails_with_any_error_is_retried_until_its_outcome_is_known(
    error: str, done: bool
) -> None:
    store, ledger = failing_ledger()
    reservation = await reserve(ledger, "img_1")
    store.errors["void"], store.takes_effect = UNEXPECTED_ERRORS[error](), done
    await reservation.fail()
    for _ in range(3):
        await ledger.operations.idle()
        assert ledger.runs("img_1")
    store.errors.clear()
    await ledger.operations.idle()
    assert store.reserved == {}
    assert not ledger.runs("img_1")


async def test_an_unexpected_error_is_logged_once_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    store, ledger = failing_ledger()
    store.errors["void"] = KeyError("secret")
    with caplog.at_level(logging.ERROR, "pomelo.engine"):
        for number in range(20):
            (await reserve(ledger, f"img_{number}")).release()
        await ledger.operations.idle()
    (message,) = [record.getMessage() for record in caplog.records]
    assert "builtins.KeyError" in message
    assert "secret" not in message


async def test_operations_that_always_fail_delay_no_others() -> None:
    clock = Clock()
    store, ledger = failing_ledger(monotonic=clock)
    store.errors |= {f"void img_{number}": KeyError() for number in range(70)}
    store.errors["void"] = PomeloError("store_unavailable")
    for number in range(300):
        (await reserve(ledger, f"img_{number}")).release()
    await until(lambda: not ledger.operations._in_progress)
    assert len(ledger.operations._pending) == 300
    del store.errors["void"]
    rounds = 0
    while len(store.reserved) > 70:
        clock.now += 1.0
        ledger.operations.retry_pending()
        await until(lambda: not ledger.operations._in_progress)
        rounds += 1
        assert rounds < 20
    assert set(store.reserved) == {f"img_{number}" for number in range(70)}


async def test_retries_to_a_failing_store_are_few_and_back_off() -> None:
    clock = Clock()
    store, ledger = failing_ledger("void", monotonic=clock)
    for number in range(500):
        (await reserve(ledger, f"img_{number}")).release()
    await until(lambda: not ledger.operations._in_progress)
    store.calls.clear()
    store.max_concurrent = 0
    for second in range(60):
        clock.now += 1.0
        ledger.operations.retry_pending()
        await until(lambda: not ledger.operations._in_progress)
        assert len(store.calls) <= (second + 1) * MAX_CONCURRENT_RETRIES
    assert store.max_concurrent <= MAX_CONCURRENT_RETRIES
    store, ledger = failing_ledger("void", monotonic=clock)
    (await reserve(ledger, "img_1")).release()
    for _ in range(60):
        clock.now += 1.0
        await until(lambda: not ledger.operations._in_progress)
        ledger.operations.retry_pending()
    await until(lambda: not ledger.operations._in_progress)
    assert 8 <= len(store.calls) - 2 <= 12


@pytest.mark.parametrize(("dollars", "charged"), [(0.03, 30_000), (1, 40_000)])
async def test_a_reported_cost_above_the_reservation_is_not_charged(dollars: float, charged: int) -> None:
    units = {PriceUnit.PRICE_UNIT_IMAGE: 40_000, PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR: 10**6}
    _, ledger = failing_ledger()
    reservation = await reserve(ledger, "img_1", prices=Prices(units))
    reservation.job.report.cost = dollars
    assert (await reservation.settle(Usage(images=1), counted=True)).cost == charged


async def test_only_a_task_that_was_never_begun_gives_back_what_it_counted() -> None:
    store, ledger = failing_ledger()
    for begun in (await reserve(ledger, "img_left"), await reserve(ledger, "img_failed")):
        begun.record_route(begun.job)
        if begun.accepted.job.task_id == "img_left":
            begun.release()
        else:
            await begun.fail()
    never_begun = await reserve(ledger, "img_refused")
    await never_begun.refuse()
    never_begun.release()
    await ledger.operations.idle()
    assert (store.reserved, ledger.running) == ({}, {})
    assert store.calls.count("void img_refused") == 1
    assert store.refunded == ["img_refused"]


async def test_a_task_of_which_no_provider_has_seen_anything_was_never_begun() -> None:
    store, ledger = failing_ledger()
    waited = await reserve(ledger, "img_waited")
    waited.record_route(waited.job)
    waited.forget_route()
    await waited.fail("deadline_exceeded")
    (await reserve(ledger, "img_left")).release()
    await ledger.operations.idle()
    assert (store.reserved, store.ended) == ({}, [])
    assert store.refunded == ["img_waited", "img_left"]


async def test_a_refused_task_whose_void_fails_is_store_unavailable() -> None:
    store, ledger = failing_ledger("void")
    refused_task = await reserve(ledger, "img_1")
    with refused("store_unavailable"):
        await refused_task.refuse()
    assert ([*store.reserved], store.refunded) == (["img_1"], ["img_1"])
    store.errors.clear()
    await ledger.operations.idle()
    assert (store.reserved, store.refunded) == ({}, ["img_1", "img_1"])
