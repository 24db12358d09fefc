"""The lock of the SQLite file, with a clock that the test sets."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from pomelo.stores.base import StoreError
from pomelo.stores.sqlite import file as sqlite_file
from tests.unit.clock import Clock


@pytest.mark.parametrize("changes", [True, False], ids=["commands", "server"])
def test_opening_waits_for_processes_that_take_turns_and_not_for_one_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: bool
) -> None:
    clock, waits = Clock(), 0
    holder = os.open(tmp_path / "pomelo.db.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def sleep(seconds: float) -> None:
        nonlocal waits
        clock.now += seconds
        waits += 1
        if changes:
            os.ftruncate(holder, 0)
            os.pwrite(holder, f"pid {1 + waits // 10}".encode(), 0)
        if waits == 200:
            os.close(holder)

    monkeypatch.setattr(sqlite_file, "time", SimpleNamespace(monotonic=clock, sleep=sleep))
    if changes:
        os.close(sqlite_file._lock(tmp_path / "pomelo.db", 1.0))
        assert waits == 200
        return
    os.pwrite(holder, b"pid 1", 0)
    with pytest.raises(StoreError, match=r"used by another process \(pid 1\)"):
        sqlite_file._lock(tmp_path / "pomelo.db", 1.0)
    assert 20 <= waits <= 21
    os.close(holder)
