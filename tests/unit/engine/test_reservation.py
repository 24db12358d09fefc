"""The ledger with a failing store: what it retries, recovers, and leaves to the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from pomelo.accounts.plans import BUILTIN
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Prices, Usage
from pomelo.engine import ledger as ledgers
from pomelo.engine.ledger import Ledger
from pomelo.engine.store_operations import MAX_CONCURRENT_RETRIES
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    LimitStatus,
    LostReservationError,
    OpenReservation,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UnknownOutcomeError,
)
from pomelo.stores.usage import UsageRecord
from pomelo.tasks.image import ImageCollector
from tests.unit.engine.jobs import accepted_job

MODEL = Catalog.load().models["flux-1-pro"]
CALLER = Principal("default", "key", True)
PRICES = Prices({PriceUnit.PRICE_UNIT_IMAGE: 40_000})


class TroubledStore:
    """A ledger that fails on request and records its calls in `asked`. `failing` maps the name of a
    method, or the name and a task's id, to the error that it raises; names passed to the constructor
    raise store_unavailable. `held` are the reserved tasks; a method first waits for its event in
    `waits`."""

    def __init__(self, *failing: str) -> None:
        self.failing: dict[str, BaseException] = {name: PomeloError("store_unavailable") for name in failing}
        self.asked: list[str] = []
        self.noted = asyncio.Event()
        self.held: dict[str, UsageRecord] = {}
        self.waits: dict[str, asyncio.Event] = {}
        self.done_first = False
        """Whether a call takes effect before it fails."""
        self.at_once = self.most_at_once = 0

    async def _do(self, name: str, task_id: str, value: Any, work: Callable[[], Any]) -> Any:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if name in self.waits:
                await self.waits[name].wait()
            await asyncio.sleep(0)
            error = self.failing.get(f"{name} {task_id}") or self.failing.get(name)
            if error is None or self.done_first:
                work()
            if error is not None:
                raise error
            return value
        finally:
            self.at_once -= 1

    def _end(self, task_id: str) -> None:
        if self.held.pop(task_id, None) is None:
            raise LostReservationError(task_id)

    def reserve(self, take: ReserveRequest) -> Awaitable[Any]:
        """See LedgerStore."""
        self.asked.append("reserve")
        draft = take.draft
        work = lambda: self.held.__setitem__(draft.task_id, draft)  # noqa: E731
        return self._do("reserve", draft.task_id, Reserved(LimitStatus(0), take.maximum), work)

    def settle(self, settlement: Settlement) -> Awaitable[Any]:
        """See LedgerStore."""
        record = settlement.record
        self.asked.append(f"settle {record.task_id}")
        settled = Settled(LimitStatus(0), record)
        return self._do("settle", record.task_id, settled, lambda: self._end(record.task_id))

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """See LedgerStore."""
        self.asked.append(f"void {task_id}")
        return self._do("void", task_id, None, lambda: self.held.pop(task_id, None))

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        """See LedgerStore."""
        self.asked.append(f"recover {task_id}")
        await self._do("recover", task_id, None, lambda: self.held.pop(task_id, None))

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        """See LedgerStore."""
        assert own
        found = [OpenReservation(record, 1, own=True) for record in self.held.values()]
        return await self._do("reservations", "", found, lambda: None)

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """See LedgerStore."""
        self.noted.set()
        return await self._do("note", "", [], lambda: None)

    async def limit_status(self, wallet: Wallet, model: str = "") -> LimitStatus:
        """See LedgerStore."""
        return await self._do("limit_status", "", LimitStatus(0), lambda: None)


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def open_ledger(store: TroubledStore, **options: Any) -> Ledger:
    """A ledger that uses the store."""
    return Ledger(store, BUILTIN, **options)  # type: ignore[arg-type]


async def reserve(ledger: Ledger, task_id: str) -> Any:
    """Reserves an image task."""
    job = accepted_job(task_id, MODEL, Usage(images=1), CALLER, prices=PRICES)
    return await ledger.reserve(job, BUILTIN["unlimited"], Call.from_headers({}.get, protocol="rest"))


class FixedUsage(ImageCollector):
    """A collector of a stream whose usage so far is what a function returns."""

    __slots__ = ("_usage",)

    def __init__(self, usage: Callable[[], Usage]) -> None:
        self._usage = usage

    def partial_usage(self, task_input: Any) -> Usage:
        return self._usage()


async def until(there: Callable[[], bool]) -> None:
    """Waits for a condition."""
    async with asyncio.timeout(10):
        while not there():  # noqa: ASYNC110 (no event to wait for)
            await asyncio.sleep(0)


UNFORESEEN: dict[str, Callable[[], BaseException]] = {
    "uvloop's closed transport": lambda: RuntimeError(
        "unable to perform operation on <TCPTransport closed=True reading=False 0x5>; the handler is closed"
    ),
    "a reset": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "a fault of ours": lambda: KeyError("reply"),
    "a stray cancellation": asyncio.CancelledError,
    "an outcome that is unknown": lambda: UnknownOutcomeError("store_unavailable"),
}
ANY_ERROR = pytest.mark.parametrize("error", UNFORESEEN)
DONE = pytest.mark.parametrize("done", [False, True], ids=["not done", "done"])


async def test_a_long_outage_leaves_nothing_to_do_for_each_call_that_it_refused() -> None:
    store = TroubledStore("reserve", "void")
    ledger = open_ledger(store)
    for number in range(100):
        with pytest.raises(PomeloError):
            await reserve(ledger, f"img_{number}")
    await ledger.operations.idle()
    store.asked.clear()
    store.failing.clear()
    await ledger.operations.idle()
    assert store.asked == []


async def test_running_tasks_are_noted_also_while_something_can_not_be_done() -> None:
    store = TroubledStore("void")
    ledger = open_ledger(store)
    (await reserve(ledger, "img_left")).release()
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    running.record_output(1)
    noting = asyncio.create_task(ledger.keep_progress())
    async with asyncio.timeout(10):
        await store.noted.wait()
    noting.cancel()


async def test_a_task_whose_use_can_not_be_counted_holds_up_no_other_note_and_is_recovered() -> None:
    store = TroubledStore()
    ledger = open_ledger(store)

    def broken() -> Usage:
        raise ZeroDivisionError

    for name, used in (("img_broken", broken), ("img_sound", lambda: Usage(images=1))):
        reservation = await reserve(ledger, name)
        reservation.bill_partially(FixedUsage(used))
        reservation.record_output(1)
    await ledger.save_progress()
    assert store.noted.is_set()
    ledger.running["img_broken"].release()
    await ledger.operations.idle()
    assert store.asked[-1] == "recover img_broken"


async def test_what_could_not_be_done_is_done_when_the_store_is_there_again() -> None:
    store = TroubledStore("void")
    ledger = open_ledger(store)
    (await reserve(ledger, "img_left")).release()
    await ledger.operations.idle()
    store.failing.clear()
    await ledger.operations.idle()
    await ledger.operations.idle()
    assert store.asked == ["reserve", "void img_left", "void img_left", "void img_left"]


# --- no error drops a task


@ANY_ERROR
@DONE
async def test_any_error_of_take_is_store_unavailable_and_the_reservation_is_returned(
    error: str, done: bool
) -> None:
    store = TroubledStore()
    store.failing["reserve"], store.done_first = UNFORESEEN[error](), done
    ledger = open_ledger(store)
    with pytest.raises(PomeloError) as raised:
        await reserve(ledger, "img_1")
    assert raised.value.code == "store_unavailable"
    await ledger.operations.idle()
    assert store.held == {}
    assert not ledger.runs("img_1")


@ANY_ERROR
@DONE
async def test_a_settlement_that_fails_with_any_error_is_retried_until_its_outcome_is_known(
    error: str, done: bool
) -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    reservation = await reserve(ledger, "img_1")
    store.failing["settle"], store.done_first = UNFORESEEN[error](), done
    with pytest.raises(PomeloError) as raised:
        await reservation.settle(Usage(images=1), counted=True)
    assert raised.value.code == "store_unavailable"
    reservation.release()
    for _ in range(3):
        await ledger.operations.idle()
        assert ledger.runs("img_1") != done
    store.failing.clear()
    await ledger.operations.idle()
    assert store.held == {}
    assert not ledger.runs("img_1")
    assert set(store.asked) == {"reserve", "settle img_1"}, "it may be on the record: nothing else may end it"


async def test_a_settlement_that_was_not_done_leaves_the_task_unpaid() -> None:
    store = TroubledStore("settle")
    ledger = open_ledger(store)
    reservation = await reserve(ledger, "img_1")
    with pytest.raises(PomeloError):
        await reservation.settle(Usage(images=1), counted=True)
    await ledger.operations.idle()
    assert store.asked == ["reserve", "settle img_1", "void img_1"]
    assert store.held == {}


@ANY_ERROR
@DONE
async def test_a_void_that_fails_with_any_error_is_retried_until_its_outcome_is_known(
    error: str, done: bool
) -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    reservation = await reserve(ledger, "img_1")
    store.failing["void"], store.done_first = UNFORESEEN[error](), done
    await reservation.fail()
    for _ in range(3):
        await ledger.operations.idle()
        assert ledger.runs("img_1")
    store.failing.clear()
    await ledger.operations.idle()
    assert store.held == {}
    assert not ledger.runs("img_1")


@ANY_ERROR
async def test_any_error_of_reading_limits_is_store_unavailable(error: str) -> None:
    store = TroubledStore()
    store.failing["limit_status"] = UNFORESEEN[error]()
    with pytest.raises(PomeloError) as raised:
        await open_ledger(store).limit_status(Wallet("default", True), "")
    assert raised.value.code == "store_unavailable"


async def test_an_unexpected_error_is_logged_once_with_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    store.failing["void"] = KeyError("secret")
    with caplog.at_level(logging.ERROR, "pomelo.engine"):
        for number in range(20):
            (await reserve(ledger, f"img_{number}")).release()
        await ledger.operations.idle()
    (told,) = [found.getMessage() for found in caplog.records]
    assert "builtins.KeyError" in told
    assert "secret" not in told


async def test_one_end_that_always_fails_holds_up_no_other() -> None:
    store, clock = TroubledStore(), Clock()
    ledger = open_ledger(store, monotonic=clock)
    store.failing |= {f"void img_{number}": KeyError() for number in range(70)}
    store.failing["void"] = PomeloError("store_unavailable")
    for number in range(300):
        (await reserve(ledger, f"img_{number}")).release()
    await until(lambda: not ledger.operations._in_progress)
    assert len(ledger.operations._pending) == 300
    del store.failing["void"]
    rounds = 0
    while len(store.held) > 70:
        clock.now += 1.0
        ledger.operations.retry_pending()
        await until(lambda: not ledger.operations._in_progress)
        rounds += 1
        assert rounds < 20
    assert set(store.held) == {f"img_{number}" for number in range(70)}


async def test_a_store_in_trouble_is_asked_a_few_at_a_time_and_ever_more_rarely() -> None:
    store, clock = TroubledStore("void"), Clock()
    ledger = open_ledger(store, monotonic=clock)
    for number in range(500):
        (await reserve(ledger, f"img_{number}")).release()
    await until(lambda: not ledger.operations._in_progress)
    store.asked.clear()
    store.most_at_once = 0
    for second in range(60):
        clock.now += 1.0
        ledger.operations.retry_pending()
        await until(lambda: not ledger.operations._in_progress)
        assert len(store.asked) <= (second + 1) * MAX_CONCURRENT_RETRIES
    assert store.most_at_once <= MAX_CONCURRENT_RETRIES
    one = TroubledStore("void")
    ledger = open_ledger(one, monotonic=clock)
    (await reserve(ledger, "img_1")).release()
    for _ in range(60):
        clock.now += 1.0
        await until(lambda: not ledger.operations._in_progress)
        ledger.operations.retry_pending()
    await until(lambda: not ledger.operations._in_progress)
    assert 8 <= len(one.asked) - 2 <= 12


# --- reservations that no task runs


async def found_by(ledger: Ledger, looks: int) -> None:
    for _ in range(looks):
        await ledger.reconcile()


async def test_a_reservation_without_a_running_task_is_ended_at_the_second_check() -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    await reserve(ledger, "img_running")
    lost = UsageRecord("img_lost", "r", "default", True, "k", "rest", "flux-1-pro", "image")
    store.held["img_lost"] = lost
    await found_by(ledger, 1)
    assert store.asked == ["reserve"]
    await found_by(ledger, 1)
    assert store.asked == ["reserve", "recover img_lost"]
    assert set(store.held) == {"img_running"}
    await found_by(ledger, 5)
    assert store.asked == ["reserve", "recover img_lost"]


async def test_a_check_ends_a_bounded_number_of_reservations_and_the_next_one_the_rest() -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    for number in range(1_500):
        name = f"img_{number}"
        store.held[name] = UsageRecord(name, "r", "default", True, "k", "rest", "flux-1-pro", "image")
    await found_by(ledger, 2)
    assert len(store.held) == 1_500 - 1_024
    assert store.most_at_once <= 64
    await found_by(ledger, 1)
    assert store.held == {}


@ANY_ERROR
async def test_a_failed_recovery_is_retried_at_every_check(error: str) -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    for name in ("img_a", "img_b"):
        store.held[name] = UsageRecord(name, "r", "default", True, "k", "rest", "flux-1-pro", "image")
    store.failing["recover img_a"] = UNFORESEEN[error]()
    await found_by(ledger, 4)
    assert set(store.held) == {"img_a"}
    store.failing.clear()
    await found_by(ledger, 1)
    assert store.held == {}


async def test_tasks_in_progress_or_awaiting_a_retry_are_not_recovered() -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    settling = await reserve(ledger, "img_settling")
    leaving = await reserve(ledger, "img_leaving")
    store.waits |= {"settle": asyncio.Event(), "reserve": asyncio.Event()}
    store.failing["void"] = KeyError()
    leaving.release()
    asked = [
        asyncio.create_task(settling.settle(Usage(images=1), counted=True)),
        asyncio.create_task(reserve(ledger, "img_entering")),
    ]
    await until(lambda: len(store.asked) == 5)
    store.held["img_entering"] = UsageRecord(
        "img_entering", "r", "default", True, "k", "rest", "flux-1-pro", "image"
    )
    asked[1].cancel()  # The caller leaves; the reservation is returned once its outcome is known.
    await found_by(ledger, 4)
    assert not [one for one in store.asked if "recover" in one]
    store.failing.clear()
    for event in store.waits.values():
        event.set()
    await asyncio.gather(*asked, return_exceptions=True)
    await ledger.operations.idle()
    assert store.held == {}


async def test_a_late_reservation_is_found() -> None:
    store = TroubledStore()
    ledger = open_ledger(store)
    store.failing["reserve"] = ConnectionResetError()
    with pytest.raises(PomeloError):
        await reserve(ledger, "img_1")
    await ledger.operations.idle()
    await found_by(ledger, 1)
    store.held["img_1"] = UsageRecord("img_1", "r", "default", True, "k", "rest", "flux-1-pro", "image")
    await found_by(ledger, 2)
    assert store.held == {}


@pytest.mark.parametrize("error", [*UNFORESEEN, "store_unavailable"])
async def test_the_background_loops_outlive_any_error(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "PROGRESS_INTERVAL", 0.001)
    store = TroubledStore()
    ledger = open_ledger(store, reconcile_every=0.001)
    running = await reserve(ledger, "img_running")
    running.bill_partially(FixedUsage(lambda: Usage(images=1)))
    for name in ("note", "reservations"):
        store.failing[name] = (
            PomeloError("store_unavailable") if error == "store_unavailable" else UNFORESEEN[error]()
        )
    lost = UsageRecord("img_lost", "r", "default", True, "k", "rest", "flux-1-pro", "image")
    store.held["img_lost"] = lost
    loops = [asyncio.create_task(ledger.keep_progress()), asyncio.create_task(ledger.keep_reconciled())]
    for size in range(5):
        store.noted.clear()
        running.record_output(size + 1)
        async with asyncio.timeout(10):
            await store.noted.wait()
    assert not any(loop.done() for loop in loops)
    store.failing.clear()
    await until(lambda: "img_lost" not in store.held)
    for loop in loops:
        loop.cancel()
    await asyncio.wait(loops)
    assert all(loop.cancelled() for loop in loops)
