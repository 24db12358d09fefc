"""Periodic work, cancellation of tasks, and the limit of file descriptors."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.runtime.logs import UnexpectedErrors
from pomelo.runtime.process import fail, is_cancelled, periodically, shielded, stop, uncancel
from tests.unit.loop import iterations

log = logging.getLogger("tests.periodic")


@pytest.mark.parametrize("waits", [0, 1])
async def test_a_shielded_future_outlives_the_caller_and_its_error_is_not_logged(
    waits: int, caplog: pytest.LogCaptureFixture
) -> None:
    future = asyncio.get_running_loop().create_future()
    left = asyncio.create_task(shielded(future))
    others = [asyncio.create_task(shielded(future)) for _ in range(waits)]
    await asyncio.sleep(0)
    left.cancel()
    await asyncio.wait([left])
    assert left.cancelled()
    assert not future.done()
    future.set_exception(KeyError("late"))
    for other in others:
        with pytest.raises(KeyError, match="late"):
            await other
    await asyncio.sleep(0)
    del future, left, others
    gc.collect()
    assert not caplog.records


async def test_an_error_for_an_awaiter_who_has_left_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    future = asyncio.get_running_loop().create_future()
    fail(future, KeyError("late"))
    fail(future, KeyError("later"))
    del future
    gc.collect()
    assert not caplog.records


async def test_stopping_a_task_waits_until_it_has_ended() -> None:
    ended: list[bool] = []

    async def end_slowly() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await iterations(10)
            ended.append(True)

    task = asyncio.create_task(end_slowly())
    await asyncio.sleep(0)
    await stop(task)
    assert ended
    await stop(None)


async def test_a_shielded_future_that_is_done_costs_no_turn_of_the_loop() -> None:
    future = asyncio.get_running_loop().create_future()
    future.set_result(3)
    with pytest.raises(StopIteration) as done:
        shielded(future).send(None)
    assert done.value.value == 3


PROGRAM = """
import json, resource, sys
from pomelo.runtime import process
soft, hard, process._MAX_DESCRIPTORS = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
before = process.descriptor_limit()
print(json.dumps([before, process.raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""

ERRORS = [PomeloError("store_unavailable"), RuntimeError("secret"), OSError(), asyncio.CancelledError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("immediately", [False, True])
async def test_no_exception_ends_periodic_work(
    error: BaseException, immediately: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rounds = asyncio.Semaphore(0)

    async def work() -> None:
        rounds.release()
        raise error

    with caplog.at_level(logging.ERROR, "tests.periodic"):
        task = asyncio.create_task(
            periodically(work, 0.001, "It failed", UnexpectedErrors(log), immediately=immediately)
        )
        async with asyncio.timeout(20):
            for _ in range(5):
                await rounds.acquire()
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()
    messages = [one.getMessage() for one in caplog.records]
    if isinstance(error, PomeloError):
        assert messages == [], "it was logged when it was raised"
    else:
        assert len(messages) == 1, "once, however often it happened"
        assert messages[0].startswith("It failed\n")
        assert "secret" not in messages[0]


async def test_cancellation_ends_periodic_work() -> None:
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(
        periodically(work, 0.001, "It failed", UnexpectedErrors(log), immediately=True)
    )
    await begun.wait()
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize(("immediately", "rounds"), [(False, 0), (True, 1)])
async def test_the_first_round_waits_unless_it_is_immediate(immediately: bool, rounds: int) -> None:
    done = 0

    async def work() -> None:
        nonlocal done
        done += 1

    task = asyncio.create_task(
        periodically(work, 3600.0, "It failed", UnexpectedErrors(log), immediately=immediately)
    )
    await iterations(10)
    assert done == rounds
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_future_does_not_cancel_the_task_that_awaits_it() -> None:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await future
    assert not is_cancelled()


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancellation_of_the_task_is_seen_and_reverted(times: int) -> None:
    seen = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append(is_cancelled())
            uncancel()
            seen.append(is_cancelled())

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
    await task
    assert seen == [True, False]


def test_outside_a_task_everything_counts_as_cancelled() -> None:
    seen: list[bool] = []
    loop = asyncio.new_event_loop()

    def work() -> None:
        uncancel()
        seen.append(is_cancelled())
        loop.stop()

    try:
        loop.call_soon(work)
        loop.run_forever()
    finally:
        loop.close()
    assert seen == [True]


@pytest.mark.parametrize(
    ("soft", "hard", "maximum", "raised"),
    [(300, 500, 1_000, 500), (500, 500, 1_000, 500), (300, 500, 400, 400), (450, 500, 400, 450)],
)
def test_the_soft_limit_is_raised_and_never_lowered(soft: int, hard: int, maximum: int, raised: int) -> None:
    command = [sys.executable, "-c", PROGRAM, *map(str, (soft, hard, maximum))]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    assert json.loads(printed) == [soft, raised, raised, hard]


SERVING_PROGRAM = """
import asyncio, gc, json, sys
from pomelo.cli.process import serve_app, serve_gateway
from pomelo.settings import Settings
from pomelo.telemetry.log import open_log
settings = Settings(rest="127.0.0.1:0", grpc="127.0.0.1:0", admin="", data=sys.argv[1])
stop = asyncio.Event()
stop.set()
with open_log("info", None) as log:
    if sys.argv[2:]:
        asyncio.run(serve_gateway(settings, "127.0.0.1:1", False, None, lambda: settings, stop, log))
    else:
        asyncio.run(serve_app(settings, lambda: settings, stop, log))
print(json.dumps([gc.get_freeze_count(), gc.get_threshold()]))
"""


@pytest.mark.parametrize("front_end", [(), ("gateway",)], ids=["server", "gateway"])
def test_a_serving_process_does_not_collect_what_it_has_loaded(tmp_path: Path, front_end: tuple[str]) -> None:
    command = [sys.executable, "-c", SERVING_PROGRAM, str(tmp_path), *front_end]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    frozen, thresholds = json.loads(done.stdout.splitlines()[-1])
    assert frozen > 10_000
    assert thresholds[0] > 700, "Python's own default"
