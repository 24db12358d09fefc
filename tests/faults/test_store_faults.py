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
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis import exceptions as errors

from pomelo.app import App, open_app
from pomelo.engine import ledger
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.engine.routing import Router
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.gen.v1.admin_service_pb2_grpc import AdminServiceStub
from pomelo.settings import Settings
from pomelo.stores.accounts import Grant
from pomelo.stores.base import Store
from pomelo.stores.ledger import ReserveRequest
from pomelo.stores.redis import scripts
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.testing import Answer, FaultUpstream, Gate, Received, Reply, error_reply
from tests.faults.books import LIVE
from tests.faults.drivers import GrpcDriver, Outcome, RestDriver, open_drivers
from tests.limits import limits
from tests.redis_server import RedisServer

FULL = os.environ.get("CRASH") == "full"

CREDITS = 10**12
WORDS = "one two three four five six"
RELEASED_WITHIN = 10.0
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
        """Starts counting calls."""
        self.count = self.hits = 0
        self._first, self._last = at, at + times
        self._error, self._after = error, after

    def disarm(self) -> None:
        """Stops failing calls."""
        self._first = self._last = -1

    def next_call(self) -> tuple[bool, bool]:
        """Counts a call; returns whether it fails before it is executed, and whether after."""
        hit = self._first <= self.count < self._last
        self.count += 1
        self.hits += hit
        return hit and not self._after, hit and self._after

    def error(self) -> Exception:
        """Returns the error that a call raises."""
        return self._error()


_TASK_SCRIPTS = {
    one.digest for one in (scripts.RESERVE, scripts.SETTLE, scripts.VOID, scripts.NOTE, scripts.LIMIT_STATUS)
}
"""The scripts that a task runs."""


class FaultyClient:
    """The Redis client; the calls that a task makes can fail."""

    def __init__(self, client: Any, faults: Faults) -> None:
        self._client = client
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def execute_command(self, *command: Any) -> Any:
        """Executes a command, and fails before or after it."""
        of_task = command[0] in ("HGET", "SADD", "EVAL") or command[1] in _TASK_SCRIPTS
        before, after = self._faults.next_call() if of_task else (False, False)
        if before:
            raise self._faults.error()
        result = await self._client.execute_command(*command)
        if after:
            raise self._faults.error()
        return result


class FaultyConnection(sqlite3.Connection):
    """A connection to a file whose statements fail, unless it is read-only."""

    faults: Faults
    reads = False

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """Executes a statement, and fails before or after it."""
        if sql == "PRAGMA query_only = ON":
            self.reads = True
        before, after = (False, False) if self.reads else self.faults.next_call()
        if before:
            raise self.faults.error()
        cursor = super().execute(sql, parameters)
        if after:
            raise self.faults.error()
        return cursor


# --- tasks under faults


@dataclass
class TaskRun:
    """One task: how it is run, and the answer its caller received. `words`: how many its caller has
    received. `retried`: the store recovers from the fault by a retry, so the caller sees no error."""

    ending: str
    stream: bool
    request_id: str
    gate: Gate = field(default_factory=Gate)
    outcome: Outcome | None = None
    words: int = 0
    retried: bool = False

    def body(self) -> dict[str, Any]:
        """The request of its caller."""
        return {"model": "gpt-4", "messages": [{"role": "user", "content": f"{self.request_id} Go on."}]}

    def answer(self, received: Received) -> Reply:
        """The answer of its vendor."""
        if self.ending == "failed":
            return error_reply(400)
        return Answer(WORDS, at={2: self.gate} if self.ending == "left" else {})(received)

    def count_word(self) -> None:
        """Counts a received word."""
        self.words += 1

    async def ask(self, client: RestDriver | GrpcDriver) -> None:
        """Runs the task to its last byte, or until its caller leaves."""
        call = asyncio.create_task(
            client(self.body(), self.request_id, stream=self.stream, on_chunk=self.count_word)
        )
        if self.ending == "left":
            half_way = asyncio.create_task(self.gate.reached.wait())
            await asyncio.wait({call, half_way}, return_when=asyncio.FIRST_COMPLETED)
            while self.stream and self.words < 2 and not call.done():  # noqa: ASYNC110 (no event to wait for)
                await asyncio.sleep(0.001)
            half_way.cancel()
            if not call.done():
                call.cancel()
        (result,) = await asyncio.gather(call, return_exceptions=True)
        if isinstance(result, Outcome):
            self.outcome = result
        else:
            assert isinstance(result, asyncio.CancelledError), result


@dataclass
class FaultyApp:
    """A running app whose store can be made to fail."""

    app: App
    upstream: FaultUpstream
    clients: tuple[RestDriver, GrpcDriver]
    faults: Faults
    runs: dict[str, TaskRun]

    async def run(
        self,
        run: TaskRun,
        client: RestDriver | GrpcDriver,
        at: int,
        times: int,
        error: Callable[[], Exception],
        *,
        after: bool,
    ) -> None:
        """Runs one task under a fault, and waits until no reservation of it is left."""
        self.runs[run.request_id] = run
        store: Any = self.app.store
        self.app.keyring._cache.clear()  # so that the key is looked up
        if hasattr(store, "_wallet_index"):
            store._wallet_index._known.clear()
            run.retried = times == 1
            store._connection.timing = replace(
                store._connection.timing, timeout=SHORT_TIMEOUT if times > 1 else LONG_TIMEOUT
            )
        self.faults.arm(at, times, error, after=after)
        await run.ask(client)
        await self.app.draining.idle()
        self.faults.disarm()
        if hasattr(store, "_wallet_index"):
            store._connection.timing = replace(store._connection.timing, timeout=LONG_TIMEOUT)
        async with asyncio.timeout(RELEASED_WITHIN):
            while (await store.balance(LIVE)).held or (await limits(store, LIVE)).concurrency:  # noqa: ASYNC110
                await asyncio.sleep(0.002)

    async def audit(self) -> pb.AuditResponse:
        """The audit of the running server."""
        async with grpc.aio.insecure_channel(f"unix:{self.app.settings.admin_socket}") as channel:
            return await AdminServiceStub(channel).Audit(pb.AuditRequest())

    async def records(self) -> dict[str, list[UsageRecord]]:
        """All records, by request id."""
        found: dict[str, list[UsageRecord]] = {}
        after = ""
        while True:
            page, after = await self.app.store.list_usage(UsageQuery(), limit=500, after=after)
            for record in page:
                found.setdefault(record.request_id, []).append(record)
            if not after:
                return found


@asynccontextmanager
async def open_faulty(
    store_type: str, url: str, folder: Path, patch: pytest.MonkeyPatch
) -> AsyncIterator[FaultyApp]:
    """Starts an app on a store of that type."""
    faults = Faults()
    patch.setattr(ledger, "PROGRESS_INTERVAL", 0.02)

    def wrap(store: Any) -> Any:
        if store_type == "redis":
            store._connection._client = FaultyClient(store._connection._client, faults)
            store._connection.timing = replace(store._connection.timing, timeout=LONG_TIMEOUT)
        return store

    if store_type == "sqlite":
        FaultyConnection.faults = faults
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=FaultyConnection))
    runs: dict[str, TaskRun] = {}
    async with FaultUpstream() as upstream:
        upstream.default = lambda received: runs[received.prompt.split()[0]].answer(received)
        settings = Settings(
            rest="127.0.0.1:0",
            grpc="127.0.0.1:0",
            data=folder / "data",
            store=url,
            openai_api_key="sk-x",
            openai_base_url=upstream.openai_base_url,
            grace=1.0,
        )
        without_breaker = partial(Router, breaker=partial(CircuitBreaker, minimum_calls=10**9))
        async with open_app(
            settings, wrap_store=wrap, make_router=without_breaker, reconcile_every=0.05
        ) as app:
            await app.store.set_plan("default", "unlimited")
            await app.store.grant(Grant("first", LIVE, CREDITS, time.time()))
            _, key = await app.keyring.create("default", live=True)
            assert app.rest is not None
            assert app.grpc is not None
            async with open_drivers("http://{}:{}".format(*app.rest), app.grpc, key) as clients:
                yield FaultyApp(app, upstream, clients, faults, runs)


@pytest.fixture(params=["sqlite", "redis"])
def store_type(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """A type of store, and its URL."""
    if request.param == "sqlite":
        yield "sqlite", ""
        return
    with RedisServer() as server:
        yield "redis", server.url


RUNS = list(itertools.product(("finished", "failed", "left"), (False, True)))
STEPS = {"sqlite": 1 if FULL else 3, "redis": 1}
"""The distance between the calls that fail: a task executes about thirty statements on a file."""


@pytest.mark.timeout(1800 if FULL else 120)
async def test_any_store_error_at_any_call_leaves_no_reservation_and_one_record_per_answer(
    store_type: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store, url = store_type
    warnings: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: warnings.append(context))
    errors_by_name = {**ERRORS, "known": KNOWN[store]}
    faults = list(itertools.product(errors_by_name, (False, True)))
    turn = itertools.cycle(faults)
    try:
        async with open_faulty(store, url, tmp_path, monkeypatch) as faulty:
            number = 0
            for (ending, stream), times in itertools.product(RUNS, (1, 10**6)):
                for at in itertools.count(0, STEPS[store]):
                    hits = 0
                    for error, after in faults if FULL else [next(turn)]:
                        number += 1
                        run = TaskRun(
                            ending,
                            stream,
                            f"{ending}-{stream}-{times > 1}-{error.replace(' ', '-')}-{number}",
                        )
                        client = faulty.clients[number % 2]
                        await faulty.run(run, client, at, times, errors_by_name[error], after=after)
                        hits += faulty.faults.hits
                    if not hits:
                        break  # the task ended after fewer calls
            await check(faulty)
            print(f"{store}: {number} runs, {Counter(outcome_code(one) for one in faulty.runs.values())}")  # noqa: T201
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
    assert warnings == []
    assert "failed unexpectedly" not in caplog.text


def outcome_code(run: TaskRun) -> str:
    """The code that a task's caller received at the end."""
    return "left" if run.outcome is None else run.outcome.code


async def check(faulty: FaultyApp) -> None:
    """Callers received only the allowed codes, and every vendor answer has exactly one usage record."""
    records = await faulty.records()
    called = Counter(received.prompt.split()[0] for received in faulty.upstream.requests)
    assert set(called.values()) == {1}
    assert set(records) <= set(called)
    for request_id, run in faulty.runs.items():
        own = records.get(request_id, [])
        expected = {"finished": "ok", "failed": "provider_failed", "left": "left"}[run.ending]
        assert outcome_code(run) in ((expected,) if run.retried else (expected, "store_unavailable")), (
            request_id,
            run.outcome,
        )
        if outcome_code(run) == "ok":
            assert [record.complete for record in own] == [True], request_id
        elif run.ending == "failed" or request_id not in called:
            assert own == [], request_id
        elif run.ending == "left":
            assert [record.complete for record in own] == ([False] if run.stream else []), request_id
        elif "known" in request_id:
            # If the file is known not to have the record, the task is unpaid or pays its delivered output.
            assert len(own) <= 1, request_id
        else:
            assert len(own) == 1, request_id
    report = await faulty.audit()
    assert not report.findings, report
    assert (report.holds, report.difference_micros) == (0, 0)


# --- reservations without a running task


async def test_a_reservation_without_a_running_task_is_an_audit_difference_and_is_ended(
    store_type: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, url = store_type
    async with open_faulty(store, url, tmp_path, monkeypatch) as faulty:
        may_list = asyncio.Event()
        inner: Store = faulty.app.store
        reservations = inner.reservations

        async def waiting(*, own: bool = False) -> Any:
            if own:
                await may_list.wait()
            return await reservations(own=own)

        monkeypatch.setattr(inner, "reservations", waiting)
        run = TaskRun("left", True, "running-1")
        faulty.runs[run.request_id] = run
        running = asyncio.create_task(run.ask(faulty.clients[0]))
        await run.gate.reached.wait()
        draft = UsageRecord("task_lost", "r", "default", True, "k", "rest", "gpt-4", "text", at=time.time())
        await inner.reserve(ReserveRequest(draft, minimum=1, maximum=2_740_000))
        report = await faulty.audit()
        assert [
            (finding.check, finding.subject, finding.difference_micros) for finding in report.findings
        ] == [("running", "task_lost", 2_740_000)]
        may_list.set()
        async with asyncio.timeout(RELEASED_WITHIN):
            while (await faulty.audit()).findings:
                pass
        await running
        await faulty.app.draining.idle()
        async with asyncio.timeout(RELEASED_WITHIN):
            while (await inner.balance(LIVE)).held:
                pass
        assert not (await faulty.audit()).findings
        assert list(await faulty.records()) == ["running-1"]
