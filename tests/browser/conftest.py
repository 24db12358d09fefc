"""The browser of the tests in this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.browser.chromium import NAMES, Browser, find_browser, open_browser


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """The installed browser."""
    if find_browser() is None:
        pytest.skip(f"no browser is installed: install {' or '.join(NAMES)} (`make browser` does it as root)")
    async with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser
