"""The API reference at /docs in a browser: it loads under its policy, and runs an operation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from tests.app import RunningApp, run_app
from tests.browser.chromium import NAMES, Browser, find_browser, open_browser
from tests.browser.tab import CommandError

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


class Tab:
    """A tab of the browser. `complaints` are the errors and warnings that its page has caused so far."""

    def __init__(self, tools: aiohttp.ClientWebSocketResponse) -> None:
        self.complaints: list[str] = []
        self._tools = tools
        self._number = 0

    async def call(self, method: str, **parameters: Any) -> Any:
        """Calls a method of DevTools, and returns its result."""
        self._number += 1
        await self._tools.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._tools.receive_json()
            if message.get("id") == self._number:
                if "error" in message:
                    raise CommandError(message["error"])
                return message["result"]
            if message["method"] in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(message["params"]))
            elif message["method"] == "Runtime.consoleAPICalled" and message["params"]["type"] in (
                "error",
                "warning",
            ):
                self.complaints.append(json.dumps(message["params"]["args"]))

    async def evaluate(self, expression: str) -> Any:
        """Returns the value of an expression, awaited."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait_for(self, expression: str) -> None:
        """Waits until an expression is true."""
        async with asyncio.timeout(30):
            while not await self._is_true(expression):  # noqa: ASYNC110 (the page has no event for it)
                await asyncio.sleep(0.05)

    async def _is_true(self, expression: str) -> bool:
        try:
            return bool(await self.evaluate(expression))
        except CommandError:  # the tab was leaving its page
            return False


@asynccontextmanager
async def open_tab(browser: Browser, url: str) -> AsyncIterator[Tab]:
    """Opens a page; on exit, checks that it has caused no error."""
    async with browser.session.put(f"{browser.address}/json/new?about:blank") as response:
        page = await response.json()
    async with browser.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as tools:
        tab = Tab(tools)
        for domain in ("Runtime", "Log", "Page"):
            await tab.call(f"{domain}.enable")
        await tab.call("Page.navigate", url=url)
        yield tab
        assert tab.complaints == []
    await browser.session.get(f"{browser.address}/json/close/{page['id']}")


@pytest.fixture(scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    """The installed browser."""
    if find_browser() is None:
        pytest.skip(f"no browser is installed: install {' or '.join(NAMES)} (`make browser` does it as root)")
    async with open_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module", name="app")
async def _app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    async with run_app(tmp_path_factory.mktemp("reference")) as opened:
        yield opened


@EACH_FRONT_END
async def test_the_page_shows_every_operation_and_runs_one_with_a_test_key(
    browser: Browser, app: RunningApp, front_end: str
) -> None:
    caller = await app.account()
    async with open_tab(browser, f"{app.urls[front_end]}/docs") as tab:
        await tab.wait_for(IS_SHOWN)
        answer = json.loads(await tab.evaluate(AUTHORIZE.replace("KEY", json.dumps(caller.test))))
    assert answer["status"].startswith("200")
    assert "Pomelo sandbox" in answer["body"]
    (record,) = await app.records(caller)
    assert record.model == "gpt-4"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_follows_the_colours_of_the_system(
    browser: Browser, app: RunningApp, scheme: str
) -> None:
    async with open_tab(browser, f"{app.urls['rest']}/docs") as tab:
        await tab.call(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        await tab.wait_for(IS_SHOWN)
        color = await tab.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        text = await tab.evaluate("getComputedStyle(document.querySelector('.info p')).color")
    assert (brightness(color) < brightness(text)) == (scheme == "dark"), (color, text)


async def test_the_page_keeps_the_theme_of_the_playground_and_links_to_it(
    browser: Browser, app: RunningApp
) -> None:
    async with open_tab(browser, app.urls["rest"]) as tab:
        await tab.wait_for("document.getElementById('theme')?.value === 'system'")
        await tab.evaluate(
            "localStorage.setItem('pomelo.theme', 'dark'); location.assign('docs')",
        )
        await tab.wait_for("document.querySelector('#page:not([hidden])') !== null")
        assert await tab.evaluate("document.documentElement.classList.contains('dark-mode')")
        await tab.evaluate("document.getElementById('page').click()")
        await tab.wait_for("document.querySelector('.sign-in') !== null")
        await tab.evaluate("localStorage.clear()")


def brightness(color: str) -> int:
    """The sum of red, green and blue of a computed color; of a transparent one that of white."""
    red, green, blue, *alpha = (float(each) for each in color.partition("(")[2].rstrip(")").split(","))
    return 765 if alpha == [0.0] else round(red + green + blue)
