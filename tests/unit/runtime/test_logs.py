"""Log lines are limited by kind, and unexpected errors are logged without their messages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator

import pytest

from pomelo.errors import PomeloError
from pomelo.runtime.logs import MAX_KINDS, LimitedHandler, UnexpectedErrors, format_trace
from pomelo.runtime.repetitions import WINDOW
from tests.unit.clock import Clock

unexpected = logging.getLogger("tests.unexpected")


class LineHandler(logging.Handler):
    """Stores the lines that it receives, and what else is called. Each line sets `received`."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.levels: list[int] = []
        self.calls: list[str] = []
        self.received = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")
        self.levels.append(record.levelno)
        self.received.set()

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")
        super().close()


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


def test_lines_that_each_count_are_not_limited(handler: LimitedHandler, output: LineHandler) -> None:
    for number in range(50):
        record = logging.LogRecord("pomelo.alerts", 30, "", 0, "event %d", (number,), None)
        record.unlimited = True
        handler.handle(record)
    assert output.lines == [f"pomelo.alerts: event {number}" for number in range(50)]
    assert handler.suppressed == 0


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


@pytest.mark.parametrize(
    ("name", "own"), [("pomelo", True), ("pomelo.app", True), ("pomelo_plugin", False), ("asyncio", False)]
)
def test_messages_are_of_different_kinds_only_in_loggers_of_pomelo(
    name: str, own: bool, output: LineHandler
) -> None:
    handler = LimitedHandler(output, lines=1)
    log(handler, "one", name=name)
    log(handler, "another", name=name)
    assert output.lines == [f"{name}: one", f"{name}: another"][: 1 + own]
    handler.close()


def test_a_window_ends_exactly_after_its_length(output: LineHandler, clock: Clock) -> None:
    handler = LimitedHandler(output, lines=1, monotonic=clock)
    for passed, count in ((0.0, 1), (WINDOW - 0.1, 1), (WINDOW, 3), (WINDOW, 3)):
        clock.now = 1_000.0 + passed
        log(handler, "one")
        assert len(output.lines) == count, passed
    handler.close()


def test_the_first_line_of_a_suppressed_message_is_shown_in_part(output: LineHandler) -> None:
    handler = LimitedHandler(output, lines=1)
    for _ in range(2):
        log(handler, "x" * 250 + "\nsecond line")
    handler.close()
    assert output.lines[1] == "pomelo.gateway: " + "x" * 200 + " … 1 similar lines suppressed"


def test_a_closed_or_flushed_handler_closes_or_flushes_the_inner_one(
    handler: LimitedHandler, output: LineHandler
) -> None:
    handler.flush()
    assert output.calls == ["flush"]
    handler.close()
    assert "close" in output.calls


def test_no_timer_is_left_after_a_close_and_none_keeps_the_process_alive(output: LineHandler) -> None:
    before = set(threading.enumerate())
    handler = LimitedHandler(output, lines=1)
    log(handler, "one")
    assert set(threading.enumerate()) == before
    log(handler, "one")
    (timer,) = set(threading.enumerate()) - before
    assert timer.daemon
    handler.close()
    timer.join(10)
    assert not timer.is_alive()


def raised(error: Exception) -> Exception:
    """Returns the error with the traceback of this line."""
    try:
        raise error
    except Exception as caught:
        return caught


def raised_elsewhere(error: Exception) -> Exception:
    """Returns the error with the traceback of another line."""
    try:
        raise error
    except Exception as caught:
        return caught


def test_an_error_is_logged_again_after_a_minute(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    errors = UnexpectedErrors(unexpected, clock=clock)
    for passed, count in ((0.0, 1), (59.9, 1), (60.0, 2), (119.9, 2), (120.0, 3)):
        clock.now = 1_000.0 + passed
        errors.log("It failed", raised(ValueError("secret")))
        assert len(caplog.records) == count, passed
    assert "secret" not in caplog.text


def test_other_types_and_lines_are_other_errors(caplog: pytest.LogCaptureFixture) -> None:
    errors = UnexpectedErrors(unexpected)
    for error in (raised(ValueError()), raised(KeyError()), raised_elsewhere(ValueError()), ValueError()):
        errors.log("It failed", error)
        errors.log("It failed", error)
    assert len(caplog.records) == 4


def test_the_innermost_line_identifies_an_error(caplog: pytest.LogCaptureFixture) -> None:
    def outer(inner: Callable[[Exception], Exception]) -> Exception:
        try:
            raise inner(ValueError())
        except ValueError as error:
            return error

    errors = UnexpectedErrors(unexpected)
    for inner in (raised, raised_elsewhere, raised):
        errors.log("It failed", outer(inner))
    assert len(caplog.records) == 2


def test_a_limited_number_of_errors_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    errors = UnexpectedErrors(unexpected)
    types = [type(f"Error{number}", (Exception,), {}) for number in range(1_001)]
    for one in types[:1_000]:
        errors.log("It failed", one())
    errors.log("It failed", types[0]())
    assert len(caplog.records) == 1_000
    errors.log("It failed", types[1_000]())  # nothing else is remembered then
    errors.log("It failed", types[0]())
    assert len(caplog.records) == 1_002


def last_lines(error: Exception) -> list[str]:
    """Returns the lines of a trace that are no frames."""
    return [line for line in format_trace(error).splitlines() if not line.startswith(" ")]


def test_a_trace_has_the_code_of_an_error_and_no_message() -> None:
    assert last_lines(raised(PomeloError("store_unavailable"))) == [
        "pomelo.errors.PomeloError: store_unavailable"
    ]
    assert last_lines(raised(ValueError("secret"))) == ["builtins.ValueError"]


def test_a_trace_begins_with_the_causes_unless_they_are_suppressed() -> None:
    cause, error = raised(KeyError("secret")), ValueError("secret")
    error.__cause__ = cause
    assert last_lines(error) == ["builtins.KeyError", "which led to", "builtins.ValueError"]
    error = ValueError()
    error.__context__ = cause
    assert last_lines(error) == ["builtins.KeyError", "which led to", "builtins.ValueError"]
    error.__suppress_context__ = True
    assert last_lines(error) == ["builtins.ValueError"]


def test_a_trace_has_all_errors_of_a_group() -> None:
    group = ExceptionGroup("secret", [raised(ValueError()), raised(KeyError())])
    assert last_lines(group) == [
        "builtins.ValueError",
        "which led to",
        "builtins.KeyError",
        "which led to",
        "builtins.ExceptionGroup",
    ]


def test_a_trace_of_errors_that_cause_each_other_ends() -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert last_lines(one) == ["builtins.KeyError", "which led to", "builtins.ValueError"]
