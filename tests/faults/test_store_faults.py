"""Unexpected errors, raised by the store's client at each of its calls during a task: the caller
receives at worst `store_unavailable`, no reservation is left, and no record is missing.

By default the errors are used in turn; with CRASH=full each call fails with each error, before and after
it was executed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis import exceptions as errors

from pomelo.app import App, open_app
from pomelo.engine import ledger
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.gen.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.stores.accounts import Grant
from pomelo.stores.ledger import ReserveRequest
from pomelo.stores.redis import scripts
from pomelo.stores.usage import UsageRecord
from pomelo.testing import Answer, FaultUpstream, Gate, Received, Reply, error_reply
from tests.app import app_settings, patient_router
from tests.faults.books import LIVE, state
from tests.faults.drivers import ChunkCounter, Driver, Outcome, open_drivers
from tests.faults.vendor import WORDS, Vendor, text
from tests.limits import limits
from tests.redis_server import RedisServer, reply_of
from tests.waiting import first

FULL = os.environ.get("CRASH") == "full"

CREDITS = 10**12
RELEASED_WITHIN = 30.0
SHORT_TIMEOUT = 0.05
"""The timeout of a Redis call that always fails, in seconds."""
LONG_TIMEOUT = 10.0
"""The timeout of all other calls, for a busy machine."""


class UnknownError(Exception):
    """An exception type that Pomelo does not handle."""


ERRORS: dict[str, Callable[[], Exception]] = {
    "uvloop": lambda: RuntimeError(
        "unable to perform operation on <TCPTransport closed=True reading=False 0x5>; the handler is closed"
    ),
    "reset": lambda: ConnectionResetError(104, "Connection reset by peer"),
    "unknown": UnknownError,
}
KNOWN: dict[str, Callable[[], Exception]] = {
    "sqlite": lambda: sqlite3.OperationalError("disk I/O error"),
    "redis": lambda: errors.ConnectionError("Connection closed by server."),
}


class Faults:
    """A fault of the store's client: of the calls made after `arm`, `times` calls from number `at` on fail,
    before they are executed, or `after`."""

    def __init__(self) -> None:
        self.count = 0
        self.hits = 0
        self._first = self._last = -1
        self._after = False
        self._error: Callable[[], Exception] = UnknownError

    def arm(self, at: int, times: int, error: Callable[[], Exception], *, after: bool) -> None:
        self.count = self.hits = 0
        self._first, self._last = at, at + times
        self._error, self._after = error, after

    def disarm(self) -> None:
        self._first = self._last = -1

    @contextmanager
    def next_call(self) -> Iterator[None]:
        """Counts a call, which is the body; raises the error before or after it if it is to fail."""
        hit = self._first <= self.count < self._last
        self.count += 1
        self.hits += hit
        if hit and not self._after:
            raise self._error()
        yield
        if hit:
            raise self._error()


_TASK_SCRIPTS = {
    one.digest
    for one in (
        *(scripts.READ_FIELDS, scripts.LIMIT_STATUS),
        *(scripts.RESERVE, scripts.NOTE, scripts.SETTLE, scripts.VOID),
    )
}
"""The scripts that a task runs."""


class FaultyClient:
    """The Redis client; the calls that a task makes can fail."""

    def __init__(self, client: Any, faults: Faults) -> None:
        self._client = client
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def execute_command(self, *command: Any) -> asyncio.Future[Any]:
        return reply_of(self._execute(command))

    async def _execute(self, command: tuple[Any, ...]) -> Any:
        of_task = command[0] in ("HGET", "SADD", "EVAL") or command[1] in _TASK_SCRIPTS
        with self._faults.next_call() if of_task else nullcontext():
            return await self._client.execute_command(*command)


class FaultyConnection(sqlite3.Connection):
    """A connection to a file whose statements fail, unless it is read-only."""

    faults: Faults
    reads = False

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        if sql == "PRAGMA query_only = ON":
            self.reads = True
        with nullcontext() if self.reads else self.faults.next_call():
            return super().execute(sql, parameters)

    def executemany(self, sql: str, parameters: Any, /) -> sqlite3.Cursor:
        with nullcontext() if self.reads else self.faults.next_call():
            return super().executemany(sql, parameters)


# --- tasks under faults


@dataclass
class TaskRun:
    """One task: how it is run, and the answer its caller received. `retried`: the store recovers from the fault
    by a retry, so the caller sees no error."""

    ending: str
    stream: bool
    request_id: str
    gate: Gate = field(default_factory=Gate)
    outcome: Outcome | None = None
    retried: bool = False

    @property
    def code(self) -> str:
        """The code that the caller received at the end."""
        return "left" if self.outcome is None else self.outcome.code

    def answer(self, received: Received) -> Reply:
        if self.ending == "failed":
            return error_reply(400)
        return Answer(WORDS, at={2: self.gate} if self.ending == "left" else {})(received)

    async def ask(self, driver: Driver) -> None:
        """Runs the task to its last byte, or until its caller leaves."""
        words = ChunkCounter()
        body = text(self.request_id)
        call = asyncio.create_task(driver(body, self.request_id, stream=self.stream, on_chunk=words.add))
        if self.ending == "left":
            half_way = asyncio.create_task(words.wait_for(2) if self.stream else self.gate.reached.wait())
            await asyncio.wait({call, half_way}, return_when=asyncio.FIRST_COMPLETED)
            half_way.cancel()
            call.cancel()
        with suppress(asyncio.CancelledError):
            self.outcome = await call


@dataclass
class FaultyApp:
    """A running app whose store can be made to fail."""

    app: App
    vendor: Vendor
    drivers: tuple[Driver, Driver]
    faults: Faults
    runs: dict[str, TaskRun] = field(default_factory=dict)

    def start(self, run: TaskRun, driver: Driver) -> asyncio.Task[None]:
        self.runs[run.request_id] = run
        self.vendor.scripts[run.request_id] = run.answer
        return asyncio.create_task(run.ask(driver))

    async def run(
        self, run: TaskRun, at: int, times: int, error: Callable[[], Exception], *, after: bool
    ) -> None:
        """Runs one task under a fault, and waits until no reservation of it is left."""
        store: Any = self.app.store
        self.app.keyring._cache.clear()  # so that the key is looked up
        if hasattr(store, "_wallet_index"):
            store._wallet_index._known.clear()
            run.retried = times == 1
        self._set_timeout(LONG_TIMEOUT if times == 1 else SHORT_TIMEOUT)
        self.faults.arm(at, times, error, after=after)
        await self.start(run, self.drivers[len(self.runs) % 2])
        await self.app.draining.idle()
        self.faults.disarm()
        self._set_timeout(LONG_TIMEOUT)
        await self.released()

    def _set_timeout(self, seconds: float) -> None:
        store: Any = self.app.store
        if hasattr(store, "_wallet_index"):  # Redis
            store._connection.timing = replace(store._connection.timing, timeout=seconds)

    async def released(self) -> None:
        """Returns when no reservation and no concurrent task is left."""
        store = self.app.store
        await first(lambda: store.balance(LIVE), lambda balance: not balance.held, RELEASED_WITHIN)
        await first(lambda: limits(store, LIVE), lambda status: not status.concurrency, RELEASED_WITHIN)

    async def audit(self) -> pb.AuditLedgerResponse:
        async with grpc.aio.insecure_channel(f"unix:{self.app.settings.admin_socket}") as channel:
            report: pb.AuditLedgerResponse = await AdminServiceStub(channel).AuditLedger(
                pb.AuditLedgerRequest()
            )
            return report

    async def records(self) -> dict[str, list[bool]]:
        """Whether each record is complete, by request id."""
        found = (await state(self.app.store))["records"]
        complete: dict[str, list[bool]] = {}
        for record in found:
            complete.setdefault(record["request_id"], []).append(record["complete"])
        return complete


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A type of store, and its URL."""
    if request.param == "sqlite":
        yield "sqlite", ""
        return
    with RedisServer() as server:
        yield "redis", server.url


@pytest.fixture
async def faulty(
    store: tuple[str, str],
    tmp_path: Path,
    upstream: FaultUpstream,
    vendor: Vendor,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[FaultyApp]:
    """An app on a store of that type."""
    store_type, url = store
    faults = Faults()
    monkeypatch.setattr(ledger, "PROGRESS_INTERVAL", 0.02)
    if store_type == "sqlite":
        FaultyConnection.faults = faults
        monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FaultyConnection))

    def wrap(opened: Any) -> Any:
        if store_type == "redis":
            connection = opened._connection
            connection._client = FaultyClient(connection._client, faults)
            connection.timing = replace(connection.timing, timeout=LONG_TIMEOUT)
        return opened

    settings = app_settings(tmp_path / "data", upstream, store=url)
    async with open_app(settings, wrap_store=wrap, make_router=patient_router, reconcile_every=0.05) as app:
        await app.store.set_plan("default", "unlimited")
        await app.store.grant(Grant("first", LIVE, CREDITS, time.time()))
        _, key = await app.keyring.create("default", live=True)
        assert app.rest is not None
        assert app.grpc is not None
        async with open_drivers("http://{}:{}".format(*app.rest), app.grpc, key) as drivers:
            yield FaultyApp(app, vendor, drivers, faults)


RUNS = list(itertools.product(("finished", "failed", "left"), (False, True)))


@pytest.mark.timeout(1800 if FULL else 300)
async def test_any_store_error_at_any_call_leaves_no_reservation_and_one_record_per_answer(
    store: tuple[str, str], faulty: FaultyApp, caplog: pytest.LogCaptureFixture
) -> None:
    store_type, _ = store
    warnings: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: warnings.append(context))
    errors_by_name = {**ERRORS, "known": KNOWN[store_type]}
    faults = list(itertools.product(errors_by_name, (False, True)))
    turn = itertools.cycle(faults)
    try:
        for (ending, stream), times in itertools.product(RUNS, (1, 10**6)):
            for at in itertools.count():
                hits = 0
                for error, after in faults if FULL else [next(turn)]:
                    run = TaskRun(ending, stream, f"{ending}-{stream}-{times > 1}-{error}-{len(faulty.runs)}")
                    await faulty.run(run, at, times, errors_by_name[error], after=after)
                    hits += faulty.faults.hits
                if not hits:
                    break  # the task ended after fewer calls
        await check(faulty)
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    codes = Counter(run.code for run in faulty.runs.values())
    print(f"{store_type}: {len(faulty.runs)} runs, {codes}")  # noqa: T201
    assert warnings == []
    assert "failed unexpectedly" not in caplog.text


async def check(faulty: FaultyApp) -> None:
    """Callers received only the allowed codes, and every vendor answer has exactly one usage record."""
    records, calls = await faulty.records(), faulty.vendor.calls
    assert set(calls.values()) == {1}
    assert set(records) <= set(calls)
    for request_id, run in faulty.runs.items():
        complete = records.get(request_id, [])
        expected = {"finished": "ok", "failed": "provider_failed", "left": "left"}[run.ending]
        assert run.code in ((expected,) if run.retried else (expected, "store_unavailable")), run
        if run.code == "ok":
            assert complete == [True], request_id
        elif run.ending == "failed" or request_id not in calls:
            assert complete == [], request_id
        elif run.ending == "left":
            assert complete == ([False] if run.stream else []), request_id
        elif "-known-" in request_id:
            # If the file is known not to have the record, the task is unpaid or pays its delivered output.
            assert len(complete) <= 1, request_id
        else:
            assert len(complete) == 1, request_id
    report = await faulty.audit()
    assert not report.findings, report
    assert (report.reservations, report.difference_micros) == (0, 0)


# --- reservations without a running task


async def test_a_reservation_without_a_running_task_is_an_audit_difference_and_is_ended(
    faulty: FaultyApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_list = asyncio.Event()
    store = faulty.app.store
    reservations = store.reservations

    async def waiting(*, own: bool = False) -> Any:
        if own:
            await may_list.wait()
        return await reservations(own=own)

    monkeypatch.setattr(store, "reservations", waiting)
    run = TaskRun("left", True, "running-1")
    running = faulty.start(run, faulty.drivers[0])
    await run.gate.reached.wait()
    draft = UsageRecord("task_lost", "r", "default", True, "k", "rest", "gpt-4", "text", at=time.time())
    await store.reserve(ReserveRequest(draft, minimum=1, maximum=2_740_000))
    report = await faulty.audit()
    assert [(finding.check, finding.subject, finding.difference_micros) for finding in report.findings] == [
        ("running", "task_lost", 2_740_000)
    ]
    may_list.set()
    await first(faulty.audit, lambda report: not report.findings, RELEASED_WITHIN)
    await running
    await faulty.app.draining.idle()
    await faulty.released()
    assert not (await faulty.audit()).findings
    assert list(await faulty.records()) == ["running-1"]
