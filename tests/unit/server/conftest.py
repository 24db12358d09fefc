"""A guard whose connections the test lists."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from pomelo.server import connection_guard
from tests.unit.server.guard_rig import Guarded, Kernel


@pytest.fixture
async def guarded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    kernel = Kernel()
    monkeypatch.setattr(connection_guard, "AcceptedSockets", lambda ports: kernel)
    guarded = Guarded(kernel)
    async with guarded.guard.watch(1):
        yield guarded
