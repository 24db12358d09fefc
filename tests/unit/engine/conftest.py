"""An app whose engine is called in this process: one for each module of tests, with an upstream that each test
finds fresh."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.engine.apps import EngineApp, open_engine
from tests.unit.engine.routing_rig import rig
from tests.unit.telemetry.reports import Reports

__all__ = ["rig"]


@pytest.fixture(scope="module")
def reports() -> Reports:
    """What the app reports to an observer."""
    return Reports()


@pytest.fixture(scope="module")
async def opened_engine(
    tmp_path_factory: pytest.TempPathFactory, reports: Reports
) -> AsyncIterator[EngineApp]:
    """The app. A module that needs other settings has its own."""
    async with open_engine(tmp_path_factory.mktemp("engine"), observers=[reports]) as opened:
        yield opened


@pytest.fixture
def engine(opened_engine: EngineApp) -> EngineApp:
    opened_engine.upstream.reset()
    return opened_engine
