"""The operations of the store on Redis: their order for each task, their repetition, and their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.stores.ledger import LostReservationError, UnknownOutcomeError
from pomelo.stores.redis import ordered_tasks
from pomelo.stores.redis.connection import Attempt
from pomelo.stores.redis.ordered_tasks import Operation, OrderedTasks
from tests.waiting import until

HANGS = 0.05
"""Seconds that an operation waits for an earlier one that hangs."""


@pytest.fixture
async def tasks() -> OrderedTasks:
    return OrderedTasks(HANGS, UnexpectedErrors(logging.getLogger("pomelo.stores")))


class Calls:
    """Operations whose outcomes the test sets: a value, an error, or nothing, while they hang."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.outcomes: dict[str, asyncio.Future[str]] = {}

    def named(self, name: str) -> Operation[str]:
        """An operation that needs a task of its own."""
        return Operation(lambda: None, str, lambda attempt: self.do(name))

    async def do(self, name: str) -> str:
        self.begun.append(name)
        future = self.outcomes.setdefault(name, asyncio.get_running_loop().create_future())
        return await asyncio.shield(future)

    def end(self, name: str, outcome: str | Exception = "done") -> None:
        """Ends the calls of an operation, those that wait and later ones."""
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        before = self.outcomes.get(name, future)
        self.outcomes[name] = future
        for each in {before, future}:
            if each.done():
                continue
            if isinstance(outcome, Exception):
                each.set_exception(outcome)
                each.exception()
            else:
                each.set_result(outcome)


async def fails(call: Awaitable[object]) -> type[Exception]:
    with pytest.raises((PomeloError, LostReservationError)) as caught:
        await call
    return type(caught.value)


async def test_operations_of_a_task_run_in_their_order_and_those_of_others_do_not_wait() -> None:
    tasks = OrderedTasks(30.0, UnexpectedErrors(logging.getLogger("pomelo.stores")))
    calls = Calls()
    first, second = tasks.start("a", calls.named("first")), tasks.start("a", calls.named("second"))
    other = tasks.start("b", calls.named("other"))
    await until(lambda: calls.begun == ["first", "other"])
    assert tasks.is_busy("a")
    calls.end("other")
    assert await other == "done"
    await until(lambda: not tasks.is_busy("b"))
    calls.end("first", "one")
    await until(lambda: calls.begun == ["first", "other", "second"])
    calls.end("second", "two")
    assert (await first, await second) == ("one", "two")
    await until(lambda: not tasks.is_busy("a"))


@pytest.mark.parametrize(("earlier_ends", "later_ends"), [(False, False), (True, True), (True, False)])
async def test_what_waits_too_long_for_an_earlier_operation_is_dropped(
    tasks: OrderedTasks, earlier_ends: bool, later_ends: bool
) -> None:
    calls = Calls()
    first = tasks.start("a", calls.named("first"), ends_task=earlier_ends)
    later = tasks.start("a", calls.named("later"), ends_task=later_ends)
    assert await fails(later) is UnknownOutcomeError
    calls.end("first")
    assert await first == "done"
    await tasks.close(30.0)
    assert calls.begun == ["first"]


async def test_a_task_ends_after_its_reserve_that_hung(tasks: OrderedTasks) -> None:
    calls = Calls()
    tasks.start("a", calls.named("reserve"))
    settling = tasks.start("a", calls.named("settle"), ends_task=True)
    assert await fails(settling) is UnknownOutcomeError
    assert calls.begun == ["reserve"]
    calls.end("reserve")
    await until(lambda: calls.begun == ["reserve", "settle"])
    calls.end("settle")
    await tasks.close(30.0)
    assert calls.begun == ["reserve", "settle"]


async def test_a_task_is_busy_until_the_operation_that_ends_it_has_ended(tasks: OrderedTasks) -> None:
    calls = Calls()
    tasks.start("a", calls.named("reserve"))
    tasks.start("a", calls.named("settle"), ends_task=True)
    noting = tasks.start("a", calls.named("note"))
    assert await fails(noting) is UnknownOutcomeError  # it waited too long
    calls.end("reserve")
    await until(lambda: calls.begun == ["reserve", "settle"])
    assert tasks.is_busy("a")
    voiding = tasks.start("a", calls.named("void"), ends_task=True)
    assert await fails(voiding) is UnknownOutcomeError  # it waited for the settlement, not for the note
    assert tasks.is_busy("a")
    calls.end("settle")
    await until(lambda: not tasks.is_busy("a"))
    assert calls.begun == ["reserve", "settle"]


async def test_what_ends_a_task_is_repeated_until_its_outcome_is_known(
    tasks: OrderedTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_tasks, "_WAIT_INITIAL", 0.001)
    errors: tuple[Exception, ...] = (
        PomeloError("store_unavailable"),
        UnknownOutcomeError("store_unavailable"),
        KeyError("x"),
    )
    for number, error in enumerate(errors):
        for known in ("done", LostReservationError("a")):
            calls = Calls()
            calls.end("settle", error)
            settling = tasks.start(f"{number}{known}", calls.named("settle"), ends_task=True)
            assert issubclass(await fails(settling), PomeloError)
            await until(lambda: len(calls.begun) > 3)  # noqa: B023 (awaited here)
            assert tasks.is_busy(f"{number}{known}")
            calls.end("settle", known)
            await until(lambda: not tasks.is_busy(f"{number}{known}"))  # noqa: B023
            ended = len(calls.begun)
            await asyncio.sleep(0)
            assert len(calls.begun) == ended


async def test_the_waits_between_repetitions_are_bounded(
    tasks: OrderedTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_tasks, "_WAIT_INITIAL", 0.001)
    monkeypatch.setattr(ordered_tasks, "_WAIT_MAX", 0.002)
    calls = Calls()
    calls.end("settle", PomeloError("store_unavailable"))
    settling = tasks.start("a", calls.named("settle"), ends_task=True)
    await fails(settling)
    await until(lambda: len(calls.begun) > 20)  # the last of unbounded waits would take 9 minutes
    calls.end("settle")
    await until(lambda: not tasks.is_busy("a"))


@pytest.mark.parametrize(
    ("error", "undone"),
    [
        (PomeloError("store_unavailable"), 0),
        (LostReservationError("a"), 0),
        (UnknownOutcomeError("store_unavailable"), 1),
        (KeyError("x"), 1),
    ],
)
async def test_only_a_reserve_with_an_unknown_outcome_is_undone(
    tasks: OrderedTasks, error: Exception, undone: int
) -> None:
    calls = Calls()
    calls.end("reserve", error)
    count = []

    async def undo() -> None:
        count.append(1)

    reserving = tasks.start("a", calls.named("reserve"), undo=undo)
    await fails(reserving)
    await tasks.close(30.0)
    assert (len(calls.begun), len(count)) == (1, undone)


async def test_an_undo_is_not_repeated_without_end(
    tasks: OrderedTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_tasks, "_MAX_UNDO_TIME", 0.01)
    calls = Calls()
    for name in ("reserve", "undo"):
        calls.end(name, UnknownOutcomeError("store_unavailable"))

    async def undo() -> None:
        await calls.do("undo")

    reserving = tasks.start("a", calls.named("reserve"), undo=undo)
    await fails(reserving)
    await until(lambda: not tasks._all)
    assert calls.begun == ["reserve", "undo"]


async def test_an_end_that_gives_up_is_not_repeated_without_end(
    tasks: OrderedTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered_tasks, "_MAX_UNDO_TIME", 0.01)
    calls = Calls()
    calls.end("void", PomeloError("store_unavailable"))
    voiding = tasks.start("a", calls.named("void"), ends_task=True, gives_up=True)
    await fails(voiding)
    await until(lambda: not tasks._all)
    assert calls.begun == ["void", "void"]


async def test_the_void_of_a_reserve_that_is_being_undone_is_dropped(tasks: OrderedTasks) -> None:
    calls = Calls()
    calls.end("reserve", UnknownOutcomeError("store_unavailable"))

    async def undo() -> None:
        await calls.do("undo")

    reserving = tasks.start("a", calls.named("reserve"), undo=undo)
    await fails(reserving)
    await until(lambda: "undo" in calls.begun)
    voiding = tasks.start("a", calls.named("void"), ends_task=True)
    assert await fails(voiding) is UnknownOutcomeError
    assert tasks.is_busy("a")
    calls.end("undo")
    await until(lambda: not tasks.is_busy("a"))
    await tasks.close(30.0)
    assert calls.begun == ["reserve", "undo"]


async def test_after_it_was_closed_nothing_starts_and_what_hangs_is_cancelled(tasks: OrderedTasks) -> None:
    calls = Calls()
    running = tasks.start("a", calls.named("hangs"))
    reply: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    sent: Operation[str] = Operation(lambda: Attempt(reply, 0.0, ()), str, lambda attempt: calls.do("repeat"))
    waiting = tasks.start("b", sent)
    await until(lambda: calls.begun == ["hangs"])
    await tasks.close(0.01)
    late = tasks.start("c", calls.named("late"))
    for outcome in (running, waiting, late):
        assert await fails(outcome) is PomeloError
    assert not any(tasks.is_busy(task) for task in "abc")
    reply.set_exception(KeyError("too late"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert calls.begun == ["hangs"]


async def test_an_operation_that_can_not_be_sent_reports_its_error(tasks: OrderedTasks) -> None:
    def send() -> Attempt | None:
        raise ValueError("not a counter")

    async def complete(attempt: Attempt | None) -> str:
        raise ValueError("not a counter")

    assert await fails(tasks.start("a", Operation(send, str, complete))) is UnknownOutcomeError


async def test_a_reply_that_is_not_the_end_continues_with_the_same_attempt(tasks: OrderedTasks) -> None:
    reply: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    attempt = Attempt(reply, 0.0, ())

    async def complete(begun: Attempt | None) -> bool:
        return begun is attempt

    def decode(found: object) -> bool:
        raise LookupError

    outcome = tasks.start("a", Operation(lambda: attempt, decode, complete))
    reply.set_result(b"key")
    assert await outcome


async def test_cancelling_an_outcome_does_not_stop_its_operation(tasks: OrderedTasks) -> None:
    reply: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    found: list[object] = []
    decode: Callable[[object], None] = found.append

    async def complete(attempt: Attempt | None) -> None:
        raise AssertionError("its reply was the end")

    outcome = tasks.start("a", Operation(lambda: Attempt(reply, 0.0, ()), decode, complete))
    outcome.cancel()
    reply.set_result("reply")
    await until(lambda: not tasks.is_busy("a"))
    assert found == ["reply"]
