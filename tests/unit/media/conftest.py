"""A clock of real time, an empty media store, and a measurer of audio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.media.duration import Measurer
from pomelo.media.store import MediaStore
from tests.unit.media.files import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> MediaStore:
    return MediaStore(tmp_path / "media", b"s" * 32, public_url="https://pomelo.test", lifetime=60, now=clock)


@pytest.fixture(scope="module")
async def measurer() -> AsyncIterator[Measurer]:
    """A measurer whose processes are shared by the tests of a module."""
    measurer = Measurer()
    yield measurer
    await measurer.aclose()
