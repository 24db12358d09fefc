"""Ids sort by their time and are random."""

from __future__ import annotations

import re
import time

import pytest

from pomelo.ids import new_id


def test_an_id_has_its_prefix_and_26_characters() -> None:
    assert re.fullmatch(r"task_[0-9a-hjkmnp-tv-z]{26}", new_id("task_"))


def test_ids_of_the_same_millisecond_differ_in_80_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_900_000_000_000_000_000)
    ids = [new_id("") for _ in range(1_000)]
    assert len({one[:10] for one in ids}) == 1
    assert len({one[10:] for one in ids}) == 1_000
    assert all(len({one[place] for one in ids}) == 32 for place in range(10, 26))


def test_a_later_id_sorts_after_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for milliseconds in (0, 1, 31, 32, 1_023, 1_024, 1_900_000_000_000, 1_900_000_000_001, 2**47):
        monkeypatch.setattr(time, "time_ns", lambda ms=milliseconds: ms * 1_000_000)
        ids.append(new_id(""))
    assert ids == sorted(ids)
