"""Tasks that a bug of their task type ends, and tasks whose deadline passes while they are settled."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.stores.sqlite.store import SqliteStore
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.text_output import TextCollector
from pomelo.testing import Answer as Words
from pomelo.testing import Gate
from tests.unit.engine.apps import CREDITS, STREAM, EngineApp
from tests.unit.engine.test_settlement import text_task
from tests.unit.telemetry.reports import Reports
from tests.waiting import until

TEXT = next(task_type for task_type, definition in TASK_TYPES.items() if definition.name == "text")
DEFINITION = TASK_TYPES[TEXT]


def broken(*_: Any) -> Any:
    """Raises the error of a bug."""
    raise KeyError("a bug")


class BrokenAtTheEnd(TextCollector):
    """A collector of text that has a bug."""

    def finish(self, result: TaskResult) -> None:
        broken()


@STREAM
@pytest.mark.parametrize("part", ["collector", "limit_output"])
async def test_a_task_that_can_not_begin_leaves_nothing_reserved(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch, part: str, stream: bool
) -> None:
    changes: dict[str, Callable[..., Any]] = {part: broken}
    monkeypatch.setitem(TASK_TYPES, TEXT, replace(DEFINITION, **changes))  # type: ignore[arg-type]
    account = await engine.account("limited")
    with pytest.raises(KeyError):
        await engine.ask(account, text_task("never asked"), stream=stream)
    await engine.settled(account)
    assert (await engine.balance(account)).available == CREDITS


@STREAM
async def test_no_deadline_is_left_of_a_task_that_can_not_begin(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setitem(TASK_TYPES, TEXT, replace(DEFINITION, collector=broken))
    account = await engine.account()
    deadline = time.monotonic() + 1.5
    with pytest.raises(KeyError):
        await engine.ask(account, text_task("never asked"), stream=stream, within=1.5)
    await until(
        lambda: time.monotonic() > deadline + 0.2
    )  # a connection has the next request in the same task


@STREAM
async def test_a_bug_during_a_task_is_reported_as_a_failure_and_not_as_a_caller_who_left(
    engine: EngineApp, monkeypatch: pytest.MonkeyPatch, reports: Reports, stream: bool
) -> None:
    engine.upstream.when("a bug", Words("one two three"))
    monkeypatch.setitem(TASK_TYPES, TEXT, replace(DEFINITION, collector=BrokenAtTheEnd))
    account = await engine.account("limited")
    with pytest.raises(KeyError):
        await engine.ask(account, text_task("a bug"), stream=stream)
    await engine.settled(account)
    report = reports.tasks[-1]
    assert (report.outcome, report.code) == ("failed", "internal_error")
    (record,) = await engine.failures(account)
    assert (record.code, record.complete) == ("internal_error", False)


async def test_a_task_that_is_being_settled_is_delivered_after_its_deadline(engine: EngineApp) -> None:
    assert isinstance(engine.app.store, SqliteStore)
    account = await engine.account()
    gate, disk = Gate(), threading.Event()
    engine.upstream.when("in time", Words("one", before=(gate,)))
    deadline = time.monotonic() + 5
    asking = asyncio.create_task(engine.ask(account, text_task("in time"), within=5))
    try:
        await gate.reached.wait()
        busy = engine.app.store._writer.do(lambda connection: disk.wait(20))
        gate.open()
        await until(lambda: time.monotonic() > deadline + 0.2)
    finally:
        disk.set()
    await busy
    assert (await asking).code == "ok"
    (record,) = await engine.records(account)
    assert record.complete
