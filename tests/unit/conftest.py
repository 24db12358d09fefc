"""What holds for all unit tests."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _time_zone() -> Iterator[None]:
    """Runs the tests 5:45 hours ahead of UTC: nothing that Pomelo stores, compares or shows is local time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "LOCAL-5:45")
        time.tzset()
        yield
    time.tzset()
