"""A ledger store that fails on request, and a ledger on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from pomelo.accounts.plans import BUILTIN
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Prices, Usage
from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    Budget,
    BudgetUse,
    Counter,
    LimitStatus,
    LostReservationError,
    OpenReservation,
    Refused,
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


T = TypeVar("T")


class FailingStore:
    """A ledger store that fails on request and records its calls in `calls`. `errors` maps the name of a
    method, or the name and a task's id, to the error that it raises; names passed to the constructor
    raise store_unavailable. `reserved` are the reserved tasks, `ended` the records of settled ones, and
    `settlements` what was to settle them; a method first waits for its event in `waits`."""

    def __init__(self, *failing: str) -> None:
        self.errors: dict[str, BaseException] = {name: PomeloError("store_unavailable") for name in failing}
        self.calls: list[str] = []
        self.noted = asyncio.Event()
        self.last_noted: list[str] = []
        self.lost: set[str] = set()
        """Tasks that `note` reports as without a reservation."""
        self.refunded: list[str] = []
        """Tasks whose void gives back what they counted."""
        self.reserved: dict[str, UsageRecord] = {}
        self.ended: list[UsageRecord] = []
        self.settlements: list[Settlement] = []
        self.waits: dict[str, asyncio.Event] = {}
        self.refused = False
        """Whether each reserve is refused for lack of credits."""
        self.refused_counter = ""
        """The name of the budget that lacks them; empty: the wallet does."""
        self.budget_start = 0.0
        """When the latest period of its budgets began, if later than that of a request."""
        self.takes_effect = False
        """Whether a call takes effect before its error is raised."""
        self.concurrent = self.max_concurrent = 0

    async def _do(self, name: str, task_id: str, value: T, work: Callable[[], object]) -> T:
        self.concurrent += 1
        self.max_concurrent = max(self.max_concurrent, self.concurrent)
        try:
            if name in self.waits:
                await self.waits[name].wait()
            await asyncio.sleep(0)
            error = self.errors.get(f"{name} {task_id}") or self.errors.get(name)
            if error is None or self.takes_effect:
                work()
            if error is not None:
                raise error
            return value
        finally:
            self.concurrent -= 1

    def _end(self, record: UsageRecord) -> None:
        if self.reserved.pop(record.task_id, None) is None:
            raise LostReservationError(record.task_id)
        self.ended.append(record)

    def reserve(self, request: ReserveRequest) -> Awaitable[Any]:
        self.calls.append("reserve")
        draft = request.draft
        if self.refused:
            refused = Refused(LimitStatus(0), "insufficient_credits", self.refused_counter)
            return self._do("reserve", draft.task_id, refused, lambda: None)
        work = lambda: self.reserved.__setitem__(draft.task_id, draft)  # noqa: E731
        return self._do("reserve", draft.task_id, Reserved(LimitStatus(0), request.maximum), work)

    def settle(self, settlement: Settlement) -> Awaitable[Any]:
        record = settlement.record
        self.calls.append(f"settle {record.task_id}")
        self.settlements.append(settlement)
        settled = Settled(LimitStatus(0), record)
        return self._do("settle", record.task_id, settled, lambda: self._end(record))

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        self.calls.append(f"void {task_id}")
        if refund:
            self.refunded.append(task_id)
        return self._do("void", task_id, None, lambda: self.reserved.pop(task_id, None))

    async def recover(self, wallet: Wallet, task_id: str) -> None:
        self.calls.append(f"recover {task_id}")
        await self._do("recover", task_id, None, lambda: self.reserved.pop(task_id, None))

    async def reservations(self, *, own: bool = False) -> list[OpenReservation]:
        assert own
        reservations = [OpenReservation(record, 1, own=True) for record in self.reserved.values()]
        return await self._do("reservations", "", reservations, lambda: None)

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        self.noted.set()
        self.last_noted = [record.task_id for record in records]
        lost = [task_id for task_id in self.last_noted if task_id in self.lost]
        return await self._do("note", "", lost, lambda: None)

    async def budget_use(self, wallet: Wallet, budgets: Sequence[Budget]) -> list[BudgetUse]:
        uses = [BudgetUse(0, max(self.budget_start, budget.start)) for budget in budgets]
        return await self._do("budget_use", "", uses, lambda: None)

    async def limit_status(self, wallet: Wallet, counters: Sequence[Counter] = ()) -> LimitStatus:
        return await self._do("limit_status", "", LimitStatus(0), lambda: None)


def failing_ledger(*failing: str, **options: Any) -> tuple[FailingStore, Ledger]:
    """Returns a store whose methods of these names fail, and a ledger on it."""
    store = FailingStore(*failing)
    return store, Ledger(store, **options)


async def reserve(ledger: Ledger, task_id: str, **changes: Any) -> Any:
    """Reserves an image task; `changes` are values of its job."""
    job = replace(accepted_job(task_id, MODEL, Usage(images=1), CALLER, prices=PRICES), **changes)
    return await ledger.reserve(
        job, BUILTIN["unlimited"], Call.from_headers(lambda name: None, protocol="rest")
    )


class FixedUsage(ImageCollector):
    """A collector whose partial usage is the result of a function."""

    __slots__ = ("_usage",)

    def __init__(self, usage: Callable[[], Usage]) -> None:
        self._usage = usage

    def partial_usage(self, task_input: Any) -> Usage:
        return self._usage()


UNEXPECTED_ERRORS: dict[str, Callable[[], BaseException]] = {
    "uvloop's closed transport": lambda: RuntimeError(
        "unable to perform operation on <TCPTransport closed=True reading=False 0x5>; the handler is closed"
    ),
    "a reset": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "a bug": lambda: KeyError("reply"),
    "an unexpected cancellation": asyncio.CancelledError,
    "an unknown outcome": lambda: UnknownOutcomeError("store_unavailable"),
}


def usage_record(task_id: str) -> UsageRecord:
    """Returns the draft record of an image task."""
    return UsageRecord(task_id, "r", "default", True, "k", "rest", "flux-1-pro", "image")


ANY_ERROR = pytest.mark.parametrize("error", UNEXPECTED_ERRORS)
