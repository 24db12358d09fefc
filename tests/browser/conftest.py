"""The browser and the npm packages of the tests in this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests import node_client
from tests.app import Account, RunningApp
from tests.browser.chromium import NAMES, Browser, find_browser, open_browser
from tests.browser.page import Page, open_page


@pytest.fixture(scope="session")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """The installed browser."""
    if find_browser() is None:
        pytest.skip(f"no browser is installed: install {' or '.join(NAMES)} (`make browser` does it as root)")
    async with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
async def caller(app: RunningApp) -> Account:
    """A new account, with all limits."""
    return await app.account("all")


@pytest.fixture
async def page(browser: Browser, app: RunningApp, caller: Account) -> AsyncIterator[Page]:
    """The page in a tab, with a test key."""
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(caller.test)
        yield page


@pytest.fixture(scope="session")
def modules(request: pytest.FixtureRequest) -> Path:
    """The npm packages of these tests."""
    cache = request.config.cache
    assert cache is not None
    return node_client.install(Path(cache.mkdir("node")), Path(__file__).parent)
