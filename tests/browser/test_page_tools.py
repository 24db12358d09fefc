"""Tools and output formats in the page."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.app import RunningApp, app_fixture
from tests.browser.chromium import Browser
from tests.browser.page import ANSWER, Page, open_page

app = app_fixture()

EACH_DELIVERY = pytest.mark.parametrize("stream", [True, False])


@pytest.fixture(name="page")
async def _page(browser: Browser, app: RunningApp) -> AsyncIterator[Page]:
    """The page in a tab, with the parameters of a text task open."""
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in((await app.account("unlimited")).test)
        await page.tab.click("summary")
        yield page


@EACH_DELIVERY
async def test_tool_calls_are_shown_and_their_results_sent_back(page: Page, stream: bool) -> None:
    if not stream:
        await page.tab.click("label:Stream")
    await page.write("[[calls:2]] What is the weather?")
    await page.tab.click("button:Insert an example")
    assert await page.run() == "done"
    calls = await page.tab.run(f"[...{ANSWER}.querySelectorAll('.call p')].map((each) => each.textContent)")
    assert calls == ['get_weather {"city": "text"}'] * 2
    assert "Finish reason: tool_calls" in await page.answer()
    await page.tab.run(
        f"""{ANSWER}.querySelectorAll('textarea').forEach((each, i) => {{ each.value = i ? 'snow' : 'rain'; }})"""
    )
    await page.tab.click("button:Send the results")
    await page.tab.until(f"{ANSWER}.dataset.state === 'done' && {ANSWER}.querySelector('.text').textContent")
    assert "rain" in await page.answer()
    assert "Finish reason: stop" in await page.answer()
    await page.tab.click("button:Continue the conversation")
    await page.tab.fill(".turn:last-child textarea", "Thanks")
    await page.tab.fill("label:tool choice", "none")
    assert await page.run() == "done"
    assert 'You said: "Thanks"' in await page.answer()


@EACH_DELIVERY
async def test_an_answer_has_the_form_of_its_schema(page: Page, stream: bool) -> None:
    if not stream:
        await page.tab.click("label:Stream")
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    await page.tab.fill("label:response format", json.dumps(form))
    assert await page.run() == "done"
    assert json.loads(await page.tab.run(f"{ANSWER}.querySelector('.text').textContent")) == {"city": "Rome"}


async def test_tools_that_are_not_json_are_reported_before_anything_is_sent(page: Page) -> None:
    await page.tab.fill("label:tools", "[{")
    assert await page.run() == "failed"
    assert "tools: this is not valid JSON" in await page.answer()
