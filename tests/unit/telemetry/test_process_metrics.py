"""What a process reports about itself."""

from __future__ import annotations

import json
import logging
import time

import pytest

from pomelo.cli.process import process_metrics
from pomelo.runtime.repetitions import MAX_LINES
from pomelo.telemetry.log import open_log
from pomelo.telemetry.metrics import LAG_SECONDS, Metrics
from pomelo.telemetry.process import measure_process
from pomelo.telemetry.readiness import Readiness
from tests.unit.telemetry.reports import task
from tests.waiting import until


def test_suppressed_log_lines_are_counted(capfd: pytest.CaptureFixture[str]) -> None:
    with open_log("info", "json") as task_log:
        metrics = process_metrics(task_log)
        for number in range(MAX_LINES + 3):
            logging.getLogger("pomelo.test").warning("the same line %d", number)
        assert dict(metrics.log_lines_dropped.readings()) == {(): 3}
    assert capfd.readouterr().err.count("the same line") == MAX_LINES + 1  # and one line with the number


def test_tasks_that_were_not_logged_are_counted_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    with open_log("info", "json") as task_log:
        for _ in range(MAX_LINES + 3):
            task_log.task_ended(task(attempts=0))
    last = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert (last["event"], last["suppressed"]) == ("similar lines suppressed", 3)


async def test_a_blocked_event_loop_is_measured() -> None:
    metrics = Metrics()
    async with measure_process(metrics, Readiness()):
        await until(lambda: bool(metrics.loop_lag.values))
        time.sleep(0.6)  # noqa: ASYNC251 (blocks the event loop on purpose)
        found = metrics.loop_lag.values[()]
        await until(lambda: found.sum > 0.3)
    late = found.counts[LAG_SECONDS.index(0.5) :]
    assert sum(late) >= 1


async def test_readiness_is_a_metric() -> None:
    metrics, readiness = Metrics(), Readiness()
    async with measure_process(metrics, readiness):
        assert dict(metrics.ready.readings()) == {(): 1}
        assert dict(metrics.draining.readings()) == {(): 0}
        readiness.drain()
        assert dict(metrics.ready.readings()) == {(): 0}
        assert dict(metrics.draining.readings()) == {(): 1}


@pytest.mark.parametrize(
    ("level", "own", "others"), [("debug", 10, 30), ("info", 20, 30), ("warning", 30, 30), ("error", 40, 40)]
)
def test_lines_of_other_libraries_are_logged_from_warning(
    capfd: pytest.CaptureFixture[str], level: str, own: int, others: int
) -> None:
    root, pomelo = logging.getLogger(), logging.getLogger("pomelo")
    before = root.level, pomelo.level, root.handlers[:]
    with open_log(level, "json", 3):
        assert (root.level, pomelo.level) == (others, own)
        logging.getLogger("pomelo.test").error("an error")
    assert (root.level, pomelo.level, root.handlers) == before
    (line,) = capfd.readouterr().err.splitlines()
    assert [json.loads(line)[name] for name in ("event", "level", "worker")] == ["an error", "error", 3]
