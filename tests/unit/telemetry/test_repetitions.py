"""Lines of calls that cost nothing are limited by account and code, and the others are counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pomelo.telemetry import repetitions
from pomelo.telemetry.repetitions import Repetitions
from tests.unit.clock import Clock

Reported = list[tuple[str, str, int]]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reported() -> Reported:
    return []


@pytest.fixture
def limited(reported: Reported, clock: Clock) -> Iterator[Repetitions]:
    made = Repetitions(lambda *values: reported.append(values), lines=3, window=60.0, monotonic=clock)
    yield made
    made.flush()


def test_the_first_lines_of_an_account_and_code_are_written(
    limited: Repetitions, reported: Reported, clock: Clock
) -> None:
    kinds = [("acme", "rate_limit_exceeded"), ("acme", "unsupported_model"), ("other", "rate_limit_exceeded")]
    for kind in kinds:
        assert [limited.admits(*kind) for _ in range(5)] == [True] * 3 + [False] * 2
    assert reported == []
    clock.now += 60.0
    assert limited.admits(*kinds[0])
    assert reported == [(*kind, 2) for kind in kinds]
    limited.flush()
    limited.flush()
    assert len(reported) == 3


def test_a_window_begins_with_the_first_line_after_the_end_of_the_one_before(
    limited: Repetitions, clock: Clock
) -> None:
    kind = "acme", "not_found"
    assert [limited.admits(*kind) for _ in range(4)] == [True] * 3 + [False]
    clock.now += 50.0
    limited.flush()
    assert [limited.admits(*kind) for _ in range(4)] == [True] * 3 + [False]
    clock.now += 59.0
    assert not limited.admits(*kind)
    clock.now += 1.0
    assert limited.admits(*kind)


def test_what_was_not_written_is_reported_even_if_no_line_follows() -> None:
    reported: Reported = []
    ended = threading.Event()

    def report(*values: object) -> None:
        reported.append(values)  # type: ignore[arg-type]
        ended.set()

    limited = Repetitions(report, lines=1, window=0.05)
    while limited.admits("acme", "not_found"):
        pass
    assert ended.wait(20)
    assert reported[0] == ("acme", "not_found", 1)


def test_the_memory_is_bounded(
    limited: Repetitions, reported: Reported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repetitions, "MAX_KINDS", 10)
    written = sum(limited.admits(f"account {number}", "not_found") for number in range(100))
    assert written == 10 + 3
    assert len(limited._counts) == 11
    limited.flush()
    assert reported == [("", "not_found", 87)]
