"""The page shows every error, and what to do about it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from pomelo.errors import NOT_UNDER_API, TABLE
from tests.app import RunningApp, app_fixture
from tests.browser.chromium import Browser
from tests.browser.page import ANSWER, FORBID_STORAGE, Page, open_page
from tests.faults.tcp_proxy import TcpProxy

app = app_fixture()

CODES = [
    code
    for code in TABLE
    if code not in NOT_UNDER_API | {"not_found", "method_not_allowed", "unsupported_media_type"}
]
"""The errors that the sandbox returns on request."""

RETRY = f"[...{ANSWER}.querySelectorAll('button')].find((each) => each.textContent.startsWith('Try again'))"
ALERT = f"{ANSWER}.querySelector('[role=alert]')"


@pytest.fixture(name="page", scope="module")
async def _page(browser: Browser, app: RunningApp) -> AsyncIterator[Page]:
    """The page in a tab, with a test key."""
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in((await app.account("unlimited")).test)
        yield page


@pytest.mark.parametrize("code", CODES)
async def test_an_error_has_its_message_its_code_its_status_and_what_to_do(page: Page, code: str) -> None:
    await page.write(f"[[error:{code}]]")
    assert await page.run() == "failed"
    paragraphs = await page.tab.run(f"[...{ALERT}.querySelectorAll('p')].map((each) => each.textContent)")
    message, *advice, last = paragraphs
    assert message
    assert last == f"{code} · HTTP {TABLE[code].http}"
    assert advice
    assert await page.fact("Request")
    assert await page.fact("Cost") == "0"


async def test_a_refused_request_can_be_tried_again_when_its_time_has_come(
    browser: Browser, app: RunningApp
) -> None:
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in((await app.account("five")).test)
        for _ in range(5):
            assert await page.run() == "done"
        assert await page.run() == "failed"
        assert "rate_limit_exceeded" in await page.answer()
        assert await page.tab.run(f"{RETRY}.disabled && /^Try again in \\d+ s$/.test({RETRY}.textContent)")
        shown = await page.tab.run(f"{RETRY}.textContent")
        await page.tab.until(f"{RETRY}.textContent !== {shown!r}")  # it counts down


async def test_an_error_without_a_wait_can_be_tried_again_immediately(page: Page) -> None:
    await page.write("[[error:provider_failed]]")
    assert await page.run() == "failed"
    await page.write("Hello")
    await page.tab.click("button:Try again")
    await page.tab.until(f"{ANSWER}.dataset.state === 'done'")
    assert "Hello" in await page.answer()


async def test_a_stream_that_fails_after_its_first_byte_keeps_what_was_delivered(page: Page) -> None:
    await page.write("[[words:40]] [[cut]]")
    assert await page.run() == "failed"
    assert "provider_failed" in await page.tab.run(f"{ALERT}.textContent")
    assert "Pomelo sandbox" in await page.tab.run(f"{ANSWER}.querySelector('.text').textContent")


async def test_a_broken_connection_keeps_what_was_delivered_and_an_unreachable_server_says_so(
    browser: Browser, app: RunningApp
) -> None:
    assert app.server.rest is not None
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(TcpProxy(app.server.rest[1]))
        page = await stack.enter_async_context(open_page(browser, f"http://127.0.0.1:{proxy.port}"))
        await page.sign_in((await app.account("unlimited")).test)
        await page.write("[[words:40]] [[stall]]")
        await page.tab.click("button:Run")
        await page.tab.until(f"{ANSWER}.querySelector('.text').textContent.includes('Pomelo sandbox')")
        await proxy.close()
        await page.tab.until(f"{ANSWER}.dataset.state === 'failed'")
        assert "may have been charged" in await page.tab.run(f"{ALERT}.textContent")
        assert "Pomelo sandbox" in await page.answer()
        await page.tab.click("button:Try again")
        await page.tab.until(f"{ALERT}.textContent.includes('Check your connection')")


async def test_every_error_says_what_to_do(page: Page) -> None:
    codes = [*(code for code in TABLE if code not in NOT_UNDER_API), "no_answer", "incomplete", "http_502"]
    silent = await page.tab.run(
        f"""import('./page/errors.js').then(({{errorPanel}}) => {codes}.filter((code) =>
          errorPanel({{code, message: 'It failed.'}}).querySelectorAll('p').length < 3))"""
    )
    assert silent == []


async def test_only_what_may_succeed_later_can_be_tried_again(page: Page) -> None:
    codes = [code for code in TABLE if code not in NOT_UNDER_API]
    offered = await page.tab.run(
        f"""import('./page/errors.js').then(({{errorPanel}}) => {codes}.filter((code) =>
          errorPanel({{code, message: 'It failed.'}}, () => {{}})
            .querySelector('button')?.textContent === 'Try again'))"""
    )
    may_succeed = [row for row in TABLE.values() if row.http in (409, 429, 502, 503, 504)]
    assert offered == [row.code for row in may_succeed if not row.permanent]


async def test_a_stream_that_ends_without_its_last_event_is_incomplete(page: Page) -> None:
    """As behind a proxy that ends a response which its server has cut."""
    code = await page.tab.run(
        """import('./page/api.js').then(({runTask}) => {
          const original = window.fetch;
          window.fetch = async () => new Response('data: {"id": "task_1"}\\n\\n');
          const ignore = () => {};
          return runTask({stream: true}, null, {onHead: ignore, onEvent: ignore})
            .then(() => 'complete', ({code}) => code)
            .finally(() => { window.fetch = original; });
        })"""
    )
    assert code == "incomplete"


@pytest.mark.parametrize(
    ("status", "charged", "cost"),
    [(402, None, "0"), (503, "0", "0"), (503, None, None), (504, None, None), (200, "0.04", "0.04 credits")],
)
async def test_the_cost_of_a_failed_task_is_shown_only_if_it_is_known(
    page: Page, status: int, charged: str | None, cost: str | None
) -> None:
    """A task whose charge was not confirmed may still be charged, and so may one behind a proxy that gave up."""
    headers = {} if charged is None else {"X-Credits-Charged": charged}
    await page.tab.run(
        f"""(() => {{
          const original = window.fetch;
          window.fetch = async () => {{
            window.fetch = original;
            return new Response('<html>', {{status: {status}, headers: {headers}}});
          }};
        }})()"""
    )
    await page.tab.click("#stream")
    assert await page.run() == "failed"
    await page.tab.click("#stream")
    facts = await page.tab.run(f"[...{ANSWER}.querySelectorAll('dt')].map((each) => each.textContent)")
    assert ("Cost" in facts) == (cost is not None)
    if cost is not None:
        assert await page.fact("Cost") == cost


async def test_a_wrong_value_is_reported_before_anything_is_sent(page: Page) -> None:
    await page.tab.click("summary")
    await page.tab.fill("label:temperature", "3")
    assert await page.run() == "failed"
    assert "temperature" in await page.tab.run(f"{ALERT}.textContent")
    assert not await page.tab.run(f"{ANSWER}.textContent.includes('Request')")
    await page.tab.fill("label:temperature", "")


async def test_audio_is_required_before_anything_is_sent(page: Page) -> None:
    await page.choose("eleven-labs-stt")
    assert await page.run() == "failed"
    assert "audio: choose a file" in await page.tab.run(f"{ALERT}.textContent")
    await page.choose("gpt-4")


@pytest.mark.parametrize("key", ["pml_test_wrong", "pml_test_…", "pml_test_ä", "pml test"])
async def test_a_wrong_key_is_refused_and_not_kept(browser: Browser, app: RunningApp, key: str) -> None:
    async with open_page(browser, app.urls["rest"]) as page:
        await page.tab.fill("label:API key", key)
        await page.tab.click("button:Continue")
        await page.tab.until("document.querySelector('.sign-in [role=alert]')")
        assert "invalid_api_key" in await page.tab.run("document.querySelector('.sign-in').textContent")
        assert await page.tab.run("sessionStorage.length + localStorage.length") == 0


@pytest.mark.parametrize("view", ["playground", "models"])
async def test_a_key_that_was_revoked_leads_back_to_the_form_that_asks_for_a_key(
    browser: Browser, app: RunningApp, view: str
) -> None:
    caller = await app.account("unlimited")
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(caller.test)
        await app.server.keyring.revoke(caller.test.split("_")[2])
        if view == "playground":
            assert await page.run() == "failed"
            await page.tab.click("button:Enter another key")
        else:
            await page.tab.run("location.hash = '#/models'")
        await page.tab.until("document.querySelector('.sign-in')")
        assert await page.tab.run("sessionStorage.length + localStorage.length") == 0


@pytest.mark.parametrize("remember", [False, True])
async def test_a_key_is_kept_beyond_its_tab_only_if_asked_and_forgotten_on_request(
    browser: Browser, app: RunningApp, remember: bool
) -> None:
    async with open_page(browser, app.urls["rest"]) as page:
        if remember:
            await page.tab.click("#remember")
        await page.sign_in((await app.account("unlimited")).test)
        assert await page.tab.run("localStorage.getItem('pomelo.key') !== null") == remember
        await page.view("account")
        await page.tab.click("button:Forget this key")
        await page.tab.until("document.querySelector('.sign-in')")
        assert await page.tab.run("sessionStorage.length + localStorage.length") == 0


async def test_a_browser_that_forbids_storage_has_the_key_as_long_as_the_page_is_open(
    browser: Browser, app: RunningApp
) -> None:
    async with open_page(browser, app.urls["rest"], script=FORBID_STORAGE) as page:
        await page.sign_in((await app.account("unlimited")).test)
        await page.tab.fill("#theme", "dark")
        assert await page.tab.run("document.documentElement.dataset.theme") == "dark"
        await page.view("account")
        await page.tab.click("button:Forget this key")
        await page.tab.until("document.querySelector('.sign-in')")
        await page.tab.run("location.hash = '#/models'")
        await page.tab.until("document.activeElement.id === 'content'")
        assert await page.tab.run("document.querySelector('.sign-in') !== null")


async def test_a_late_refusal_of_an_earlier_key_leaves_the_present_one(
    browser: Browser, app: RunningApp
) -> None:
    earlier, present = [(await app.account("unlimited")).test for _ in range(2)]
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(earlier)
        await page.view("account")
        await page.tab.run(
            """(() => {
              const original = window.fetch;
              window.fetch = (path, options) => (!path.includes('models') ? original(path, options)
                : new Promise((resolve) => { window.answer = () => original(path, options).then(resolve); }));
              window.restore = () => { window.fetch = original; };
              location.hash = '#/models';
            })()"""
        )
        await page.tab.until("window.answer")
        await page.tab.run("restore()")
        await app.server.keyring.revoke(earlier.split("_")[2])
        await page.tab.run("document.querySelector('main').dispatchEvent(new Event('signout'))")
        await page.tab.run("location.hash = '#/playground'")
        await page.sign_in(present)
        await page.tab.run("answer().then(() => fetch('healthz')).then((response) => response.text())")
        assert await page.tab.run("sessionStorage.getItem('pomelo.key')") == present
        assert await page.tab.run(f"{ANSWER} !== null")
