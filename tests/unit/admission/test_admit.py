"""Admission before a store in trouble: what it does again, and what it leaves to the store."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import pytest

from pomelo.admission.admit import Admission
from pomelo.admission.plans import BUILTIN
from pomelo.call import Call
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.pricing import Used
from pomelo.stores.ledger import Standing, Take, Taken, UsageRecord, Wallet

PRICES = {PriceUnit.PRICE_UNIT_IMAGE: 40_000}


class TroubledStore:
    """A ledger that fails at what it is told to fail at, and tells what it was asked for."""

    def __init__(self, *failing: str) -> None:
        self.failing = set(failing)
        self.asked: list[str] = []
        self.noted = asyncio.Event()

    async def _do(self, name: str, value: Any) -> Any:
        if name in self.failing:
            raise PomeloError("store_unavailable")
        return value

    def take(self, take: Take) -> Awaitable[Any]:
        """See LedgerStore."""
        self.asked.append("take")
        return self._do("take", Taken(Standing(0), take.most))

    def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> Awaitable[None]:
        """See LedgerStore."""
        self.asked.append(f"void {task_id}")
        return self._do("void", None)

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        """See LedgerStore."""
        self.noted.set()
        return []

    async def standing(self, wallet: Wallet, model: str = "") -> Standing:
        """See LedgerStore."""
        return Standing(0)


async def enter(admission: Admission, task_id: str) -> Any:
    """Lets a picture in."""
    draft = UsageRecord(task_id, "req_1", "default", True, "key", "rest", "flux-1-pro", "image")
    call = Call.from_headers({}.get, wire="rest")
    used = Used(images=1)
    return await admission.enter(call, BUILTIN["unlimited"], draft, PRICES, used, used)


async def test_a_long_outage_leaves_nothing_to_do_for_each_call_that_it_refused() -> None:
    store = TroubledStore("take", "void")
    admission = Admission(store, BUILTIN)  # type: ignore[arg-type]
    for number in range(100):
        with pytest.raises(PomeloError):
            await enter(admission, f"img_{number}")
    await admission.idle()
    store.asked.clear()
    store.failing.clear()
    await admission.idle()
    assert store.asked == []


async def test_running_tasks_are_noted_also_while_something_can_not_be_done() -> None:
    store = TroubledStore("void")
    admission = Admission(store, BUILTIN)  # type: ignore[arg-type]
    (await enter(admission, "img_left")).leave()
    running = await enter(admission, "img_running")
    running.delivering(lambda: Used(images=1))
    running.came(1)
    noting = asyncio.create_task(admission.keep_notes())
    async with asyncio.timeout(10):
        await store.noted.wait()
    noting.cancel()


async def test_what_could_not_be_done_is_done_when_the_store_is_there_again() -> None:
    store = TroubledStore("void")
    admission = Admission(store, BUILTIN)  # type: ignore[arg-type]
    (await enter(admission, "img_left")).leave()
    await admission.idle()
    store.failing.clear()
    await admission.idle()
    await admission.idle()
    assert store.asked == ["take", "void img_left", "void img_left", "void img_left"]
