"""A store that is unavailable for a while: every reservation is released, and only delivered output is charged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.accounts.access import Access
from pomelo.accounts.keys import Keyring
from pomelo.accounts.plans import Plan
from pomelo.call import Call, Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine.ledger import Ledger
from pomelo.errors import PomeloError
from pomelo.stores.accounts import Grant, Wallet
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReplayedAnswer, UnknownOutcomeError
from pomelo.stores.sqlite import open_sqlite
from pomelo.testing import Answer, Gate
from tests.app import RunningApp, run_app
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, PROTOCOLS, REST_PROTOCOL, STREAM
from tests.tasks import TASK_BODIES, text_body
from tests.unit.engine.jobs import accepted_job
from tests.waiting import cancel

OPERATIONS = {"reserve", "settle", "void", "note", "limit_status"}


class FaultyStore:
    """A store whose `OPERATIONS` in `failing` raise store_unavailable: before their effect, or after it if
    `after` is set. An operation in `waits` first waits for its event."""

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self.failing: set[str] = set()
        self.after = False
        self.waits: dict[str, asyncio.Event] = {}

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._inner, name)
        return partial(self._run, name, operation) if name in OPERATIONS else operation

    async def _run(
        self, name: str, operation: Callable[..., Awaitable[Any]], *args: Any, **options: Any
    ) -> Any:
        if name in self.waits:
            await self.waits[name].wait()
        if name not in self.failing:
            return await operation(*args, **options)
        if self.after:
            await operation(*args, **options)
        raise (UnknownOutcomeError if self.after else PomeloError)("store_unavailable")


@pytest.fixture(scope="module", name="stores")
def _stores() -> list[FaultyStore]:
    return []


@pytest.fixture(scope="module", name="app")
async def _app(
    stores: list[FaultyStore], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    def wrap(store: Store) -> Any:
        stores.append(FaultyStore(store))
        return stores[-1]

    async with run_app(tmp_path_factory.mktemp("outage"), wrap_store=wrap) as opened:
        yield opened


@pytest.fixture(name="store")
def _store(app: RunningApp, stores: list[FaultyStore]) -> Any:
    (store,) = stores
    yield store
    store.failing.clear()
    for event in store.waits.values():  # what still waits, if the test has failed
        event.set()
    store.waits.clear()
    store.after = False


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("after", [False, True], ids=["not done", "done"])
async def test_a_reservation_of_unknown_outcome_is_released(
    app: RunningApp, store: FaultyStore, protocol: str, stream: bool, after: bool
) -> None:
    account = await app.account("five")
    store.failing, store.after = {"reserve"}, after
    outcome = await app.ask(protocol, account.test, text_body(), stream=stream)
    assert outcome.code == "store_unavailable"
    await app.idle(account)
    store.failing.clear()
    outcome = await app.ask(protocol, account.test, text_body(), stream=stream)
    assert outcome.code == "ok"
    assert outcome.headers["x-ratelimit-remaining"] == "4"


@PROTOCOL_AND_STREAM
async def test_an_answer_that_cannot_be_charged_fails_and_releases_its_reservation(
    app: RunningApp, store: FaultyStore, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    store.failing = {"settle", "void"}
    for _ in range(2):
        outcome = await app.ask(protocol, account.test, text_body("[[words:5]]", max_tokens=5), stream=stream)
        assert outcome.code == "store_unavailable"
        assert not outcome.done
    assert await app.concurrency(account) == 2
    store.failing.clear()
    await app.idle(account)
    records = await app.records(account)
    assert len(records) == (2 if stream else 0), "a stream is charged for its delivered output"
    assert not any(record.complete for record in records)
    assert (await app.balance(account)).spent == sum(record.cost for record in records)


@PROTOCOL
async def test_an_image_that_cannot_be_charged_reports_no_price(
    app: RunningApp, store: FaultyStore, protocol: str
) -> None:
    account = await app.account()
    store.failing = {"settle"}
    outcome = await app.ask(protocol, account.test, TASK_BODIES["image"])
    assert outcome.code == "store_unavailable"
    assert "x-credits-charged" not in outcome.metadata
    store.failing.clear()
    await app.idle(account)


@STREAM
async def test_a_charge_whose_confirmation_is_lost_is_made_once(
    app: RunningApp, store: FaultyStore, stream: bool
) -> None:
    account = await app.account()
    store.failing, store.after = {"settle"}, True
    outcome = await app.ask("rest", account.test, text_body(), stream=stream)
    assert outcome.code == "store_unavailable"
    store.failing.clear()
    await app.idle(account)
    (record,) = await app.records(account)
    assert record.complete
    assert (await app.balance(account)).spent == record.cost


@PROTOCOL
@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with an Idempotency-Key"])
async def test_an_unsettled_task_is_repeated_automatically_only_with_an_idempotency_key(
    app: RunningApp, store: FaultyStore, protocol: str, keyed: bool
) -> None:
    account = await app.account()
    sent = {"Idempotency-Key": f"unsettled-{protocol}"} if keyed else {}
    store.failing, store.after = {"settle"}, True
    outcome = await app.ask(protocol, account.test, text_body(), headers=sent)
    assert (outcome.code, outcome.headers["retry-after"]) == ("store_unavailable", "5")
    assert ("may still be charged" in outcome.message) is not keyed
    if protocol == "grpc":
        assert outcome.headers["grpc-retry-pushback-ms"] == ("5000" if keyed else "-1")
    else:
        url = f"{app.urls[protocol]}/v1/chat/completions"
        headers = {
            "Authorization": f"Bearer {account.test}",
            **{name: f"{value}-2" for name, value in sent.items()},
        }
        async with app.session.post(url, json=text_body(), headers=headers) as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "5")
            assert response.headers["X-Should-Retry"] == ("true" if keyed else "false")
    store.failing.clear()
    await app.idle(account)
    if keyed:
        repeated = await app.ask(protocol, account.test, text_body(), headers=sent)
        assert (repeated.code, repeated.headers["idempotent-replayed"]) == ("ok", "true")
    records = await app.records(account)
    assert [record.complete for record in records] == [True] * (1 if protocol == "grpc" else 2)


@PROTOCOL_AND_STREAM
async def test_a_caller_who_leaves_during_an_outage_is_charged_after_it(
    app: RunningApp, store: FaultyStore, protocol: str, stream: bool
) -> None:
    account = await app.account("wide")
    prompt = f"outage {protocol} {stream}"
    gate = Gate()
    app.upstream.when(prompt, Answer("one two three", at={2: gate}))
    task = asyncio.create_task(
        app.ask(protocol, account.live, text_body(prompt, max_tokens=9), stream=stream)
    )
    await gate.reached.wait()
    store.failing = {"settle", "void", "note"}
    await cancel(task)
    assert await app.concurrency(account, live=True) == 1
    store.failing.clear()
    await app.idle(account, live=True)
    records = await app.records(account)
    assert len(records) == stream
    assert all(1 <= record.output_tokens <= 2 and not record.complete for record in records)


@STREAM
@REST_PROTOCOL
async def test_no_deadline_applies_while_a_task_is_charged(
    app: RunningApp, store: FaultyStore, protocol: str, stream: bool
) -> None:
    account = await app.account()
    store.waits["settle"] = asyncio.Event()
    task = asyncio.create_task(app.ask(protocol, account.test, text_body(), stream=stream, within=3))
    done, _ = await asyncio.wait([task], timeout=3.5)
    assert not done, "the task waits, although its deadline has passed"
    store.waits["settle"].set()
    outcome = await task
    assert outcome.code == "ok"
    (record,) = await app.records(account)
    assert record.complete


async def test_an_error_is_sent_soon_although_the_store_hangs(
    app: RunningApp, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.engine.reservation.STATUS_TIMEOUT", 0.2)
    account = await app.account("all")
    store.waits["settle"] = asyncio.Event()
    start = time.monotonic()
    outcome = await app.ask("rest", account.test, text_body("[[stall]]"), within=1)
    assert outcome.code == "deadline_exceeded"
    assert time.monotonic() - start < 10
    assert "x-ratelimit-remaining" in outcome.headers
    store.waits["settle"].set()
    await app.idle(account)


@STREAM
async def test_a_deadline_ends_a_task_that_a_store_that_hangs_keeps_from_starting(
    app: RunningApp, store: FaultyStore, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("pomelo.engine.engine.STATUS_TIMEOUT", 0.2)
    account = await app.account("all")
    assert (await app.ask("rest", account.test, text_body())).code == "ok"
    store.waits = {"reserve": asyncio.Event(), "limit_status": asyncio.Event()}
    async with asyncio.timeout(20):
        outcome = await app.ask("rest", account.test, text_body(), stream=stream, within=1)
    assert (outcome.status, outcome.code) == (504, "deadline_exceeded")
    for event in store.waits.values():
        event.set()
    await app.idle(account)


async def test_a_task_that_fails_to_start_after_its_reservation_releases_it(
    app: RunningApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await app.account()

    def broken(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pomelo.engine.engine.CollectorContext", broken)
    for protocol in PROTOCOLS:
        outcome = await app.ask(protocol, account.test, text_body())
        assert outcome.code == "internal_error"
    await app.idle(account)


# --- the window in the headers of a late failure


async def test_a_task_that_fails_late_reports_the_end_of_its_own_window(tmp_path: Path) -> None:
    now = 1_000_000.25
    clock = lambda: now  # noqa: E731
    async with open_sqlite(tmp_path / "own.db", now=clock, monotonic=clock) as store:
        await store.add_account("a", "five", 0)
        await store.grant(Grant("g", Wallet("a", False), 10**9, 0))
        plan = Plan("five", requests=5, concurrent=2)
        ledger = Ledger(store, now=clock, monotonic=clock)
        model = Catalog.load().models["flux-1-pro"]
        job = accepted_job("img_1", model, Usage(images=1), Principal("a", "k", False), exact=True)
        call = Call.from_headers(lambda name: None, protocol="rest")
        reservation = await ledger.reserve(job, plan, call)
        assert not isinstance(reservation, ReplayedAnswer)
        reservation.report()
        assert call.response_headers["X-RateLimit-Reset"] == "1000061"
        assert call.response_headers["X-Credits-Charged"] == "0.04"
        now += 50
        await reservation.fail()
        assert call.response_headers["X-RateLimit-Reset"] == "1000061"
        assert call.response_headers["X-RateLimit-Remaining-Concurrent"] == "2"
        assert call.response_headers["X-Credits-Charged"] == "0"
        assert call.response_headers["X-Credits-Remaining"] == "1000"
        assert call.response_trailers["X-Credits-Charged"] == "0"
        await reservation.fail()
        reservation.release()

        late = accepted_job("img_2", model, Usage(images=1), Principal("a", "k", False), exact=True)
        reservation = await ledger.reserve(late, plan, call)
        assert not isinstance(reservation, ReplayedAnswer)
        now += 30  # another window
        await reservation.fail()
        assert call.response_headers["X-RateLimit-Remaining"] == "5"
        await ledger.operations.idle()


async def test_an_error_has_the_same_reset_time_in_message_and_header(tmp_path: Path) -> None:
    ticks = iter(1_000_000 + tick * 0.7 for tick in range(10_000))
    async with open_sqlite(tmp_path / "own.db") as store:
        await store.add_account("a", "none", 0)
        plan = Plan("none", requests=0, tokens=0)
        ledger = Ledger(store, now=lambda: next(ticks))
        model = Catalog.load().models["gpt-4"]
        for number in range(20):
            call = Call.from_headers(lambda name: None, protocol="rest")
            job = accepted_job(f"task_{number}", model, Usage(1, 1), Principal("a", "k", False))
            with pytest.raises(PomeloError) as refused:
                await ledger.reserve(job, plan, call)
            reset = int(call.response_headers["X-RateLimit-Reset"])
            assert time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(reset)) in refused.value.message


async def test_a_removed_plan_blocks_its_accounts(tmp_path: Path) -> None:
    async with open_sqlite(tmp_path / "own.db") as store:
        ledger = Ledger(store)
        access = Access(Keyring(store, b"s" * 32), {}, Catalog.load(), ledger)
        principal = Principal("a", "k", False, plan="gone")
        with pytest.raises(PomeloError, match="'gone' does not exist"):
            access.plan(principal)
        call = Call.from_headers(lambda name: None, protocol="rest")
        await access.report_limits(call, principal)
        assert call.response_headers["X-Credits-Remaining"] == "0"
