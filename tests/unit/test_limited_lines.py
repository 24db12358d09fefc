"""The limit of log lines: what belongs to Pomelo, the ends of windows, and what reaches the inner handler."""

from __future__ import annotations

import logging
import threading

import pytest

from pomelo.logs import WINDOW, LimitedHandler


class Inner(logging.Handler):
    """Stores the messages that it receives, and what else is called."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.calls: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")
        super().close()


def log(handler: logging.Handler, message: str, name: str = "pomelo") -> None:
    handler.handle(logging.LogRecord(name, logging.WARNING, "", 0, message, (), None))


@pytest.mark.parametrize(
    ("name", "own"), [("pomelo", True), ("pomelo.app", True), ("pomelo_plugin", False), ("asyncio", False)]
)
def test_messages_are_of_different_kinds_only_in_loggers_of_pomelo(name: str, own: bool) -> None:
    inner = Inner()
    handler = LimitedHandler(inner, lines=1)
    log(handler, "one", name)
    log(handler, "another", name)
    assert inner.lines == (["one", "another"] if own else ["one"])
    handler.close()


def test_a_window_ends_exactly_after_its_length() -> None:
    now = 50.0
    inner = Inner()
    handler = LimitedHandler(inner, lines=1, monotonic=lambda: now)
    for now, count in ((50.0, 1), (50.0 + WINDOW - 0.1, 1), (50.0 + WINDOW, 3), (50.0 + WINDOW, 3)):
        log(handler, "one")
        assert len(inner.lines) == count, now
    handler.close()


def test_the_first_line_of_a_suppressed_message_is_shown_in_part() -> None:
    inner = Inner()
    handler = LimitedHandler(inner, lines=1)
    for _ in range(2):
        log(handler, "x" * 250 + "\nsecond line")
    handler.close()
    assert inner.lines[1] == "x" * 200 + " … 1 similar lines suppressed"


def test_a_closed_or_flushed_handler_closes_or_flushes_the_inner_one() -> None:
    inner = Inner()
    handler = LimitedHandler(inner)
    handler.flush()
    assert inner.calls == ["flush"]
    handler.close()
    assert "close" in inner.calls


def test_no_timer_is_left_after_a_close_and_none_keeps_the_process_alive() -> None:
    before = set(threading.enumerate())
    inner = Inner()
    handler = LimitedHandler(inner, lines=1)
    log(handler, "one")
    assert set(threading.enumerate()) == before
    log(handler, "one")
    (timer,) = set(threading.enumerate()) - before
    assert timer.daemon
    handler.close()
    timer.join(10)
    assert not timer.is_alive()
