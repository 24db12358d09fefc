"""The sleeps of one task, which take no time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest


class Sleeps(list[float]):
    """The seconds of every sleep of the task that called `begin`; other tasks sleep as usual. Sleep number
    `last` is cancelled."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None = None) -> None:
        super().__init__()
        self._last = last
        self._task: asyncio.Task[Any] | None = None
        self._sleep = asyncio.sleep
        patch.setattr(asyncio, "sleep", self._record)

    def begin(self) -> None:
        """Records the sleeps of the current task from now on."""
        self._task = asyncio.current_task()

    async def _record(self, seconds: float, result: Any = None) -> Any:
        if self._task is None or asyncio.current_task() is not self._task or not seconds:
            return await self._sleep(seconds, result)
        self.append(seconds)
        if len(self) == self._last:
            raise asyncio.CancelledError
        return await self._sleep(0, result)
