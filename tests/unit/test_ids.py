"""Ids sort by their time and are random."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pomelo.ids import id_time, new_id


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


def test_an_id_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for milliseconds in (0, 1, 1_023, 1_900_000_000_001, 2**47):
        monkeypatch.setattr(time, "time_ns", lambda ms=milliseconds: ms * 1_000_000)
        assert id_time(new_id("")) == milliseconds / 1000


FORK = """
import os
from pomelo.ids import new_id

new_id("")  # from here on there are random numbers in store
if child := os.fork():
    os.waitpid(child, 0)
for _ in range(300):
    print(new_id("")[10:])
"""


def test_parent_and_child_of_a_fork_make_different_ids() -> None:
    # In an interpreter without threads, which a fork must not have.
    forked = subprocess.run([sys.executable, "-c", FORK], check=True, capture_output=True, text=True)
    made = forked.stdout.split()
    assert len(made) == len(set(made)) == 600


def test_concurrent_threads_make_different_ids() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: [new_id("") for _ in range(2_000)], range(8)))
    assert len({one for ids in made for one in ids}) == 16_000
