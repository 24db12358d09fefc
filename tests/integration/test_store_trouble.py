"""A store that can't be reached for a while: nothing is held for ever, and nobody pays for what didn't come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.plans import Plan
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine import reservation
from pomelo.engine.reservation import Ledger
from pomelo.errors import PomeloError
from pomelo.stores.base import Store
from pomelo.stores.ledger import (
    Grant,
    Refused,
    ReplayedAnswer,
    Reserved,
    ReserveRequest,
    Settled,
    Settlement,
    UsageRecord,
    Wallet,
)
from pomelo.stores.sqlite import open_sqlite
from pomelo.testing import Answer, Gate
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import text_body

WAY = pytest.mark.parametrize("way", PROTOCOLS)
HOW = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


class Troubled:
    """A store whose ledger can't be reached when a test says so; `after`: it does what it is asked, and then
    the way back is lost."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.out: set[str] = set()
        self.after = False
        self.waits: dict[str, asyncio.Event] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def _through(self, name: str, work: Callable[[], Awaitable[Any]]) -> Any:
        if name in self.waits:
            await self.waits[name].wait()
        if name not in self.out:
            return await work()
        if self.after:
            await work()
        raise PomeloError("store_unavailable")

    async def reserve(self, take: ReserveRequest) -> Reserved | Refused | ReplayedAnswer:
        return await self._through("reserve", lambda: self._inner.reserve(take))

    async def settle(self, settlement: Settlement) -> Settled:
        return await self._through("settle", lambda: self._inner.settle(settlement))

    async def void(self, wallet: Wallet, task_id: str, *, refund: bool = False) -> None:
        await self._through("void", lambda: self._inner.void(wallet, task_id, refund=refund))

    async def note(self, records: Sequence[UsageRecord]) -> list[str]:
        return await self._through("note", lambda: self._inner.note(records))


@pytest.fixture(scope="module", name="stores")
def _stores() -> list[Troubled]:
    return []


@pytest.fixture(scope="module", name="house")
async def _house(
    stores: list[Troubled], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    def wrap(store: Store) -> Any:
        stores.append(Troubled(store))
        return stores[-1]

    async with run_app(tmp_path_factory.mktemp("trouble"), wrap_store=wrap) as opened:
        yield opened


@pytest.fixture(name="store")
def _store(house: RunningApp, stores: list[Troubled]) -> Any:
    (store,) = stores
    yield store
    store.out.clear()
    store.waits.clear()
    store.after = False


async def freed(house: RunningApp, caller: Any, *, live: bool = False) -> None:
    """Returns once nothing is held or taken."""
    async with asyncio.timeout(10):
        while (await house.balance(caller, live=live)).held or await house.concurrency(caller, live=live):
            pass


@WAY
@HOW
@pytest.mark.parametrize("after", [False, True], ids=["not done", "done"])
async def test_a_take_of_unknown_outcome_is_given_back(
    house: RunningApp, store: Troubled, way: str, stream: bool, after: bool
) -> None:
    caller = await house.account("five")
    store.out, store.after = {"reserve"}, after
    told = await house.ask(way, caller.test, text_body(), stream=stream)
    assert told.code == "store_unavailable"
    await freed(house, caller)
    store.out.clear()
    told = await house.ask(way, caller.test, text_body(), stream=stream)
    assert told.code == "ok"
    assert told.headers["x-ratelimit-remaining"] == "4"


@WAY
@HOW
async def test_an_answer_that_cannot_be_charged_is_none_and_holds_nothing(
    house: RunningApp, store: Troubled, way: str, stream: bool
) -> None:
    caller = await house.account("wide")
    store.out = {"settle", "void"}
    for _ in range(2):
        told = await house.ask(way, caller.test, text_body("[[words:5]]", max_tokens=5), stream=stream)
        assert told.code == "store_unavailable"
        assert not told.done
    assert await house.concurrency(caller) == 2
    store.out.clear()
    await freed(house, caller)
    records = await house.records(caller)
    assert len(records) == (2 if stream else 0), "of a stream, what was delivered"
    assert not any(record.complete for record in records)
    assert (await house.balance(caller)).spent == sum(record.cost for record in records)


@HOW
async def test_what_was_charged_though_nobody_heard_is_charged_once(
    house: RunningApp, store: Troubled, stream: bool
) -> None:
    caller = await house.account()
    store.out, store.after = {"settle"}, True
    told = await house.ask("rest", caller.test, text_body(), stream=stream)
    assert told.code == "store_unavailable"
    store.out.clear()
    await freed(house, caller)
    (record,) = await house.records(caller)
    assert record.complete
    assert (await house.balance(caller)).spent == record.cost


@WAY
@HOW
async def test_who_leaves_while_the_store_is_away_is_settled_when_it_is_back(
    house: RunningApp, store: Troubled, way: str, stream: bool
) -> None:
    caller = await house.account("wide")
    prompt = f"away {way} {stream}"
    gate = Gate()
    house.upstream.when(prompt, Answer("one two three", at={2: gate}))
    asked = asyncio.create_task(house.ask(way, caller.live, text_body(prompt, max_tokens=9), stream=stream))
    await gate.reached.wait()
    store.out = {"settle", "void", "note"}
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await house.concurrency(caller, live=True) == 1
    store.out.clear()
    await freed(house, caller, live=True)
    records = await house.records(caller)
    assert len(records) == stream
    assert all(1 <= record.output_tokens <= 2 and not record.complete for record in records)


@HOW
async def test_no_deadline_passes_while_a_task_is_charged(
    house: RunningApp, store: Troubled, stream: bool
) -> None:
    caller = await house.account()
    store.waits["settle"] = asyncio.Event()
    asked = asyncio.create_task(house.ask("rest", caller.test, text_body(), stream=stream, within=0.3))
    done, _ = await asyncio.wait([asked], timeout=0.5)
    assert not done, "its deadline has passed meanwhile"
    store.waits["settle"].set()
    told = await asked
    assert told.code == "ok"
    (record,) = await house.records(caller)
    assert record.complete


async def test_an_error_is_told_soon_though_the_store_hangs(house: RunningApp, store: Troubled) -> None:
    caller = await house.account("all")
    store.waits["void"] = asyncio.Event()
    began = time.monotonic()
    told = await house.ask("rest", caller.test, text_body("[[stall]]"), within=0.3)
    assert told.code == "deadline_exceeded"
    assert time.monotonic() - began < 0.3 + reservation.STATUS_TIMEOUT + 0.25
    assert "x-ratelimit-remaining" in told.headers
    store.waits["void"].set()
    await freed(house, caller)


async def test_a_task_that_can_not_be_begun_after_it_was_taken_in_holds_nothing(
    house: RunningApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = await house.account()

    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pomelo.engine.intake.CollectorContext", broken)
    for way in PROTOCOLS:
        told = await house.ask(way, caller.test, text_body())
        assert told.code == "internal_error"
    await freed(house, caller)


# --- the hour on the headers of a late failure


async def test_a_task_that_fails_late_tells_when_its_window_really_ends(tmp_path: Path) -> None:
    now = 1_000_000.25
    clock = lambda: now  # noqa: E731
    async with open_sqlite(tmp_path / "own.db", now=clock, monotonic=clock) as store:
        await store.add_account("a", "five", 0)
        await store.grant(Grant("g", Wallet("a", False), 10**9, 0))
        plan = Plan("five", requests=5, concurrent=2)
        admission = Ledger(store, {"five": plan}, now=clock, monotonic=clock)
        model = Catalog.load().models["flux-1-pro"]
        draft = UsageRecord("img_1", "r", "a", False, "k", "rest", model.name, "image")
        call = Call.from_headers(lambda name: None, wire="rest")
        picture = Usage(images=1)
        hold = await admission.enter(call, plan, draft, model.prices, picture, picture, exact=True)
        assert not isinstance(hold, ReplayedAnswer)
        assert call.response_headers["X-RateLimit-Reset"] == "1000061"
        assert call.response_headers["X-Credits-Charged"] == "0.04"
        now += 50
        await hold.fail()
        assert call.response_headers["X-RateLimit-Reset"] == "1000061"
        assert call.response_headers["X-RateLimit-Remaining-Concurrent"] == "2"
        assert (call.response_headers["X-Credits-Charged"], call.response_headers["X-Credits-Remaining"]) == (
            "0",
            "1000",
        )
        assert call.trailer["X-Credits-Charged"] == "0"
        await hold.fail()
        hold.leave()

        late = replace(draft, task_id="img_2")
        hold = await admission.enter(call, plan, late, model.prices, picture, picture, exact=True)
        assert not isinstance(hold, ReplayedAnswer)
        now += 30  # another window
        await hold.fail()
        assert call.response_headers["X-RateLimit-Remaining"] == "5"
        await admission.idle()


async def test_a_refusal_names_one_moment_though_time_goes_on(tmp_path: Path) -> None:
    ticks = iter(1_000_000 + tick * 0.7 for tick in range(10_000))
    async with open_sqlite(tmp_path / "own.db") as store:
        await store.add_account("a", "none", 0)
        plan = Plan("none", requests=0, tokens=0)
        admission = Ledger(store, {"none": plan}, now=lambda: next(ticks))
        model = Catalog.load().models["gpt-4"]
        for number in range(20):
            call = Call.from_headers(lambda name: None, wire="rest")
            draft = UsageRecord(f"task_{number}", "r", "a", False, "k", "rest", model.name, "text")
            with pytest.raises(PomeloError) as refused:
                await admission.enter(call, plan, draft, model.prices, Usage(1, 1), Usage(1, 1))
            reset = int(call.response_headers["X-RateLimit-Reset"])
            assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(reset)) in refused.value.message


async def test_plans_that_are_gone_limit_nothing_and_allow_nothing(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "own.db") as store:
        admission = Ledger(store, {})
        principal = Principal("a", "k", False, plan="gone")
        with pytest.raises(PomeloError, match="'gone' does not exist"):
            admission.plan(principal)
        call = Call.from_headers(lambda name: None, wire="rest")
        await admission.tell(call, principal)
        assert call.response_headers["X-Credits-Remaining"] == "0"
