"""Lines are limited by kind, and the others are counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from pomelo.runtime.repetitions import Repetitions
from tests.unit.clock import Clock

Kind = tuple[str, str]
Reported = list[tuple[str, str, int]]


def repetitions(
    reported: Reported, ended: threading.Event | None = None, **options: Any
) -> Repetitions[Kind]:
    """Counts lines by account and code, at most 10 separately."""

    def report(kind: Kind, count: int, text: str) -> None:
        reported.append((*kind, count))
        if ended is not None:
            ended.set()

    return Repetitions(report, 10, lambda kind: ("", kind[1]), **options)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reported() -> Reported:
    return []


@pytest.fixture
def limited(reported: Reported, clock: Clock) -> Iterator[Repetitions[Kind]]:
    made = repetitions(reported, lines=3, window=60.0, monotonic=clock)
    yield made
    made.flush()


def test_the_first_lines_of_an_account_and_code_are_written(
    limited: Repetitions[Kind], reported: Reported, clock: Clock
) -> None:
    kinds = [("acme", "rate_limit_exceeded"), ("acme", "unsupported_model"), ("other", "rate_limit_exceeded")]
    for kind in kinds:
        assert [limited.admits(kind) for _ in range(5)] == [True] * 3 + [False] * 2
    assert reported == []
    clock.now += 60.0
    assert limited.admits(kinds[0])
    assert reported == [(*kind, 2) for kind in kinds]
    limited.flush()
    limited.flush()
    assert len(reported) == 3


def test_a_window_begins_with_the_first_line_after_the_end_of_the_one_before(
    limited: Repetitions[Kind], clock: Clock
) -> None:
    kind = "acme", "not_found"
    assert [limited.admits(kind) for _ in range(4)] == [True] * 3 + [False]
    clock.now += 50.0
    limited.flush()
    assert [limited.admits(kind) for _ in range(4)] == [True] * 3 + [False]
    clock.now += 59.0
    assert not limited.admits(kind)
    clock.now += 1.0
    assert limited.admits(kind)


def test_what_was_not_written_is_reported_even_if_no_line_follows() -> None:
    reported: Reported = []
    ended = threading.Event()
    limited = repetitions(reported, ended, lines=1, window=0.05)
    while limited.admits(("acme", "not_found")):
        pass
    assert ended.wait(20)
    assert reported[0] == ("acme", "not_found", 1)


def test_the_memory_is_bounded(limited: Repetitions[Kind], reported: Reported) -> None:
    written = sum(limited.admits((f"account {number}", "not_found")) for number in range(100))
    assert written == 10 + 3
    assert len(limited._kinds) == 11
    limited.flush()
    assert reported == [("", "not_found", 87)]


def test_a_kind_that_is_counted_separately_stays_so_when_there_are_many(
    limited: Repetitions[Kind], reported: Reported
) -> None:
    for number in range(20):
        limited.admits((f"account {number}", "not_found"))
    for _ in range(5):
        limited.admits(("account 0", "not_found"))
    limited.flush()
    assert reported == [("account 0", "not_found", 3), ("", "not_found", 7)]


def test_the_first_line_that_is_not_written_is_reported_when_its_window_ends(clock: Clock) -> None:
    texts: list[str] = []
    limited: Repetitions[str] = Repetitions(
        lambda kind, count, text: texts.append(text), 10, str, 1, 60.0, clock
    )
    assert limited.admits("a kind")
    clock.now += 50.0
    for text in ("first", "second"):
        assert not limited.admits("a kind", lambda text=text: text)  # type: ignore[misc]
    assert limited._timer is not None
    assert limited._timer.interval == 10.0
    limited.flush()
    assert texts == ["first"]


def test_a_line_may_be_logged_while_others_are_reported() -> None:
    def report(kind: Kind, count: int, text: str) -> None:
        counting.admits(("reported", text))

    counting = Repetitions(report, 10, lambda kind: kind, lines=1)
    assert counting.admits(("acme", "not_found"))
    assert not counting.admits(("acme", "not_found"), lambda: "a text")
    counting.flush()
    assert not counting.admits(("reported", "a text"))
