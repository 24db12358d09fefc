"""How often media are scanned, and which errors of a scan are logged."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from pomelo.errors import PomeloError
from pomelo.media.store import MediaStore
from pomelo.media.sweep import MAX_SWEEP_SHARE, sweep
from tests.unit.sleeps import Sleeps

TIMES = 4


class Scanned(MediaStore):
    """Media whose scan takes a moment and raises `error`."""

    refresh_interval = 0.25
    took = 0.0
    error: Exception | None = None

    async def refresh(self) -> int:
        time.sleep(self.took)  # noqa: ASYNC251 (no other task runs)
        if self.error is not None:
            raise self.error
        return 0


@pytest.fixture(name="media")
def _media(tmp_path: Path) -> Scanned:
    return Scanned(tmp_path / "media", b"s" * 32)


@pytest.fixture(name="waits")
def _waits(monkeypatch: pytest.MonkeyPatch) -> Sleeps:
    return Sleeps(monkeypatch, last=TIMES)


async def test_quick_scans_follow_each_other_at_the_interval(media: Scanned, waits: Sleeps) -> None:
    media.refresh_interval = 60.0
    waits.begin()
    with pytest.raises(asyncio.CancelledError):
        await sweep(media)
    assert waits == [60.0] * TIMES


async def test_long_scans_are_less_frequent(media: Scanned, waits: Sleeps) -> None:
    media.took = 0.02
    waits.begin()
    with pytest.raises(asyncio.CancelledError):
        await sweep(media)
    assert waits[0] == media.refresh_interval
    assert min(waits[1:]) >= media.took / MAX_SWEEP_SHARE > media.refresh_interval


@pytest.mark.parametrize(
    ("error", "logged"), [(PomeloError("store_unavailable"), False), (OSError("disk"), True)]
)
async def test_a_scan_that_fails_is_repeated_and_an_unexpected_error_logged(
    media: Scanned, waits: Sleeps, error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    media.error = error
    waits.begin()
    with pytest.raises(asyncio.CancelledError):
        await sweep(media)
    assert len(waits) == TIMES
    lines = [one.getMessage().splitlines()[0] for one in caplog.records if one.name == "pomelo.media"]
    assert lines == (["expired media were not deleted"] * (TIMES - 1) if logged else [])
