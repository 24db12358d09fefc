"""Log lines are limited by kind, and suppressed lines are counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from pomelo.logs import MAX_KINDS, WINDOW, LimitedHandler
from tests.unit.clock import Clock


class LineHandler(logging.Handler):
    """Stores the lines that it receives; each sets `received`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.levels: list[int] = []
        self.received = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")
        self.levels.append(record.levelno)
        self.received.set()


@pytest.fixture
def output() -> LineHandler:
    return LineHandler()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handler(output: LineHandler, clock: Clock) -> Iterator[LimitedHandler]:
    handler = LimitedHandler(output, lines=3, monotonic=clock)
    yield handler
    handler.close()


def log(
    handler: logging.Handler, message: str, *values: object, name: str = "pomelo.gateway", level: int = 30
) -> None:
    handler.handle(logging.LogRecord(name, level, "", 0, message, values, None))


def test_the_first_lines_of_a_kind_are_logged_and_the_others_counted(
    handler: LimitedHandler, output: LineHandler, clock: Clock
) -> None:
    for number in range(1_237):
        log(handler, "a connection was refused: %d are open", number)
    assert output.lines == [f"pomelo.gateway: a connection was refused: {n} are open" for n in range(3)]
    clock.now += WINDOW
    log(handler, "a connection was refused: %d are open", 7)
    assert output.lines[3:] == [
        "pomelo.gateway: a connection was refused: 3 are open … 1,234 similar lines suppressed",
        "pomelo.gateway: a connection was refused: 7 are open",
    ]


def test_kinds_are_limited_separately(handler: LimitedHandler, output: LineHandler) -> None:
    for _ in range(5):
        log(handler, "one")
        log(handler, "another")
        log(handler, "one", level=40)
        log(handler, "one", name="pomelo.server")
    assert len(output.lines) == 12
    assert set(output.levels) == {30, 40}


def test_all_lines_of_a_library_are_of_one_kind(handler: LimitedHandler, output: LineHandler) -> None:
    for number in range(100):
        log(handler, f"Exception in callback <0x{number:x}>\nand where", name="asyncio", level=40)
    assert len(output.lines) == 3
    handler.close()
    assert output.lines[3:] == ["asyncio: Exception in callback <0x3> … 97 similar lines suppressed"]


def test_suppressed_lines_are_reported_even_if_no_line_follows(output: LineHandler) -> None:
    handler = LimitedHandler(output, lines=1, window=0.05)
    log(handler, "one")
    log(handler, "one")
    output.received.clear()
    assert output.received.wait(10)
    assert output.lines == ["pomelo.gateway: one", "pomelo.gateway: one … 1 similar lines suppressed"]
    handler.close()
    assert len(output.lines) == 2


def test_nothing_is_reported_if_nothing_was_suppressed(
    handler: LimitedHandler, output: LineHandler, clock: Clock
) -> None:
    for _ in range(3):
        for _ in range(3):
            log(handler, "one")
        clock.now += WINDOW
    handler.close()
    assert output.lines == ["pomelo.gateway: one"] * 9


def test_lines_of_many_threads_are_counted_exactly(output: LineHandler) -> None:
    handler = LimitedHandler(output, lines=10)

    def log_often() -> None:
        for _ in range(500):
            log(handler, "one")

    threads = [threading.Thread(target=log_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handler.close()
    assert output.lines == ["pomelo.gateway: one"] * 10 + [
        "pomelo.gateway: one … 3,990 similar lines suppressed"
    ]


def test_the_number_of_kinds_is_limited(handler: LimitedHandler, output: LineHandler) -> None:
    for number in range(3 * MAX_KINDS):
        log(handler, f"message {number}")
    assert len(output.lines) == MAX_KINDS + 3
    handler.close()
    assert output.lines[-1].endswith(f"{2 * MAX_KINDS - 3:,} similar lines suppressed")


def test_a_formatter_is_set_on_the_inner_handler(handler: LimitedHandler, output: LineHandler) -> None:
    formatter = logging.Formatter("%(message)s")
    handler.setFormatter(formatter)
    assert output.formatter is formatter
