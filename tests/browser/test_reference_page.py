"""The API reference at /docs in a browser: it loads under its policy, and runs an operation."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.app import RunningApp, app_fixture
from tests.browser.access import overflow
from tests.browser.chromium import Browser
from tests.browser.page import FORBID_STORAGE
from tests.browser.tab import Tab

EACH_FRONT_END = pytest.mark.parametrize("front_end", ["rest", "remote"])

IS_SHOWN = "document.querySelectorAll('.opblock').length >= 5"
AUTHORIZE = """(async () => {
  const wait = async (find) => {
    for (let found; ; await new Promise((resolve) => setTimeout(resolve, 20)))
      if ((found = find())) return found;
  };
  const one = (selector) => wait(() => document.querySelector(selector));
  (await one('.btn.authorize')).click();
  const input = await one('.dialog-ux input');
  Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(input, KEY);
  input.dispatchEvent(new Event('input', {bubbles: true}));
  (await one('.dialog-ux .authorize.modal-btn')).click();
  (await one('.dialog-ux .btn-done')).click();
  (await one('#operations-Tasks-runTask .opblock-summary-control')).click();
  await wait(() => document.querySelector('#operations-Tasks-runTask textarea')?.value.includes('gpt-4'));
  (await one('#operations-Tasks-runTask .execute')).click();
  const status = await one('#operations-Tasks-runTask .live-responses-table tr.response .response-col_status');
  const body = await one('#operations-Tasks-runTask .live-responses-table .highlight-code');
  return JSON.stringify({status: status.textContent.trim(), body: body.textContent});
})()"""


@asynccontextmanager
async def open_page(browser: Browser, url: str, *, script: str = "") -> AsyncIterator[Tab]:
    """Opens a page, where `script` runs before its own; on exit, checks that it has caused no error and no
    warning."""
    async with browser.open_tab() as tab:
        await tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        await tab.open(url)
        yield tab
        assert tab.problems + tab.warnings == []


app = app_fixture()


@EACH_FRONT_END
async def test_the_page_shows_every_operation_and_runs_one_with_a_test_key(
    browser: Browser, app: RunningApp, front_end: str
) -> None:
    caller = await app.account()
    async with open_page(browser, f"{app.urls[front_end]}/docs") as tab:
        await tab.until(IS_SHOWN)
        answer = json.loads(await tab.run(AUTHORIZE.replace("KEY", json.dumps(caller.test))))
    assert answer["status"].startswith("200")
    assert "Pomelo sandbox" in answer["body"]
    (record,) = await app.records(caller)
    assert record.model == "gpt-4"


async def test_the_page_is_not_wider_than_a_small_screen_and_its_parts_have_names(
    browser: Browser, app: RunningApp
) -> None:
    async with open_page(browser, f"{app.urls['rest']}/docs") as tab:
        await tab.look(320, "light")
        await tab.until(IS_SHOWN)
        assert await overflow(tab) == []
        assert await tab.run("document.querySelectorAll('main').length") == 1
        unnamed = "[...document.querySelectorAll('select')].filter((each) => each.checkVisibility() && !each.labels[0])"
        assert await tab.run(f"{unnamed}.length") == 0


async def test_a_browser_that_forbids_storage_shows_the_page(browser: Browser, app: RunningApp) -> None:
    async with open_page(browser, f"{app.urls['rest']}/docs", script=FORBID_STORAGE) as tab:
        await tab.until(IS_SHOWN)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_follows_the_colours_of_the_system(
    browser: Browser, app: RunningApp, scheme: str
) -> None:
    async with open_page(browser, f"{app.urls['rest']}/docs") as tab:
        await tab.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        await tab.until(IS_SHOWN)
        color = await tab.run("getComputedStyle(document.documentElement).backgroundColor")
        text = await tab.run("getComputedStyle(document.querySelector('.info p')).color")
    assert (brightness(color) < brightness(text)) == (scheme == "dark"), (color, text)


async def test_the_page_keeps_the_theme_of_the_playground_and_links_to_it(
    browser: Browser, app: RunningApp
) -> None:
    async with open_page(browser, app.urls["rest"]) as tab:
        await tab.until("document.getElementById('theme')?.value === 'system'")
        await tab.run(
            "localStorage.setItem('pomelo.theme', 'dark'); location.assign('docs')",
        )
        await tab.until("document.querySelector('#page:not([hidden])') !== null")
        assert await tab.run("document.documentElement.classList.contains('dark-mode')")
        await tab.run("document.getElementById('page').click()")
        await tab.until("document.querySelector('.sign-in') !== null")
        await tab.run("localStorage.clear()")


def brightness(color: str) -> int:
    """The sum of red, green and blue of a computed color; of a transparent one that of white."""
    red, green, blue, *alpha = (float(each) for each in color.partition("(")[2].rstrip(")").split(","))
    return 765 if alpha == [0.0] else round(red + green + blue)
