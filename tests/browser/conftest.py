"""The browser and the npm packages of the tests in this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import node_client
from tests.browser.chromium import NAMES, Browser, find_browser, open_browser


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """The installed browser."""
    if find_browser() is None:
        pytest.skip(f"no browser is installed: install {' or '.join(NAMES)} (`make browser` does it as root)")
    async with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module")
def modules(request: pytest.FixtureRequest) -> Path:
    """The npm packages of these tests."""
    cache = request.config.cache
    assert cache is not None
    return node_client.install(Path(cache.mkdir("node")), Path(__file__).parent)
