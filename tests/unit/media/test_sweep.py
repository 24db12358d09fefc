"""How often media are scanned, and which errors of a scan are logged."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.media.store import MediaStore
from pomelo.media.sweep import MAX_SWEEP_SHARE, sweep

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
def _waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of every sleep, none of which takes any time; the last one is cancelled."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def record(seconds: float, result: Any = None) -> Any:
        waits.append(seconds)
        if len(waits) == TIMES:
            raise asyncio.CancelledError
        return await sleep(0, result)

    monkeypatch.setattr(asyncio, "sleep", record)
    return waits


async def test_quick_scans_follow_each_other_at_the_interval(media: Scanned, waits: list[float]) -> None:
    media.refresh_interval = 60.0
    with pytest.raises(asyncio.CancelledError):
        await sweep(media)
    assert waits == [60.0] * TIMES


async def test_long_scans_are_less_frequent(media: Scanned, waits: list[float]) -> None:
    media.took = 0.02
    with pytest.raises(asyncio.CancelledError):
        await sweep(media)
    assert waits[0] == media.refresh_interval
    assert min(waits[1:]) >= media.took / MAX_SWEEP_SHARE > media.refresh_interval


@pytest.mark.parametrize(
    ("error", "logged"), [(PomeloError("store_unavailable"), False), (OSError("disk"), True)]
)
async def test_a_scan_that_fails_is_repeated_and_an_unexpected_error_logged(
    media: Scanned, waits: list[float], error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    media.error = error
    with pytest.raises(asyncio.CancelledError):
        await sweep(media)
    assert len(waits) == TIMES
    assert [message.splitlines()[0] for message in caplog.messages] == (
        ["expired media were not deleted"] * (TIMES - 1) if logged else []
    )
