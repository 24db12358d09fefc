"""Log lines are limited by kind, and suppressed lines are counted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from pomelo.logs import MAX_KINDS, WINDOW, LimitedHandler


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Kept(logging.Handler):
    """Stores the lines that it receives; each sets `came`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.levels: list[int] = []
        self.came = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")
        self.levels.append(record.levelno)
        self.came.set()


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handler(kept: Kept, clock: Clock) -> Iterator[LimitedHandler]:
    made = LimitedHandler(kept, lines=3, monotonic=clock)
    yield made
    made.close()


def log(
    handler: logging.Handler, message: str, *values: object, name: str = "pomelo.gateway", level: int = 30
) -> None:
    handler.handle(logging.LogRecord(name, level, "", 0, message, values, None))


def test_the_first_lines_of_a_kind_are_written_and_the_others_counted(handler, kept, clock):
    for number in range(1_237):
        log(handler, "a connection was refused: %d are open", number)
    assert kept.lines == [f"pomelo.gateway: a connection was refused: {n} are open" for n in range(3)]
    clock.now += WINDOW
    log(handler, "a connection was refused: %d are open", 7)
    assert kept.lines[3:] == [
        "pomelo.gateway: a connection was refused: 3 are open … 1,234 similar lines suppressed",
        "pomelo.gateway: a connection was refused: 7 are open",
    ]


def test_kinds_are_limited_separately(handler, kept):
    for _ in range(5):
        log(handler, "one")
        log(handler, "another")
        log(handler, "one", level=40)
        log(handler, "one", name="pomelo.server")
    assert len(kept.lines) == 12
    assert set(kept.levels) == {30, 40}


def test_a_library_s_lines_are_one_kind_though_all_differ(handler, kept):
    for number in range(100):
        log(handler, f"Exception in callback <0x{number:x}>\nand where", name="asyncio", level=40)
    assert len(kept.lines) == 3
    handler.close()
    assert kept.lines[3:] == ["asyncio: Exception in callback <0x3> … 97 similar lines suppressed"]


def test_suppressed_lines_are_reported_even_if_no_line_follows(kept):
    handler = LimitedHandler(kept, lines=1, window=0.05)
    log(handler, "one")
    log(handler, "one")
    kept.came.clear()
    assert kept.came.wait(10)
    assert kept.lines == ["pomelo.gateway: one", "pomelo.gateway: one … 1 similar lines suppressed"]
    handler.close()
    assert len(kept.lines) == 2


def test_nothing_is_reported_if_nothing_was_suppressed(handler, kept, clock):
    for _ in range(3):
        for _ in range(3):
            log(handler, "one")
        clock.now += WINDOW
    handler.close()
    assert kept.lines == ["pomelo.gateway: one"] * 9


def test_lines_of_many_threads_are_counted_exactly(kept):
    handler = LimitedHandler(kept, lines=10)
    threads = [threading.Thread(target=lambda: [log(handler, "one") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handler.close()
    assert kept.lines == ["pomelo.gateway: one"] * 10 + [
        "pomelo.gateway: one … 3,990 similar lines suppressed"
    ]


def test_memory_is_bounded_however_many_kinds_there_are(handler, kept):
    for number in range(3 * MAX_KINDS):
        log(handler, f"made up {number}")
    assert len(kept.lines) == MAX_KINDS + 3
    handler.close()
    assert kept.lines[-1].endswith(f"{2 * MAX_KINDS - 3:,} similar lines suppressed")


def test_a_formatter_is_the_inner_handler_s(handler, kept):
    formatter = logging.Formatter("%(message)s")
    handler.setFormatter(formatter)
    assert kept.formatter is formatter
