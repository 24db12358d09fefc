"""The views of the page besides the playground: usage, models and account."""

from __future__ import annotations

from tests.app import Account, RunningApp, app_fixture
from tests.browser.chromium import Browser
from tests.browser.page import Page, open_page
from tests.tasks import TASK_BODIES, text_body

app = app_fixture()

ROWS = "[...document.querySelectorAll('.records tbody tr')].map((each) => each.innerText)"
TASKS = "[...document.querySelectorAll('.records tbody th')].map((each) => each.textContent)"
LEGEND = "[...document.querySelectorAll('.legend li')].map((each) => each.textContent)"
DRAWN = """(() => {
  const canvas = document.querySelector('.chart canvas');
  const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] === 255) colours.add(data.slice(i, i + 3).join());
  return [...document.querySelectorAll('.swatch')]
    .map((each) => getComputedStyle(each).backgroundColor.match(/\\d+/g).join())
    .map((each) => colours.has(each));
})()"""
"""For each model of the legend, whether its colour is in the chart."""

HOLD_USAGE = """(() => {
  const original = window.fetch;
  window.held = [];
  window.passed = false;
  window.fetch = (path, options) => (passed || !path.includes('usage') ? original(path, options)
    : new Promise((resolve) => held.push(() => original(path, options).then(resolve))));
})()"""
"""Keeps requests for usage until the functions in `held` are called; later ones are sent if `passed` is set."""

TURN_TWICE = """(() => {
  const older = [...document.querySelectorAll('button')].find((each) => each.textContent === 'Older');
  older.click();
  older.click();
})()"""


async def test_usage_is_charted_by_day_and_model_and_listed(
    page: Page, app: RunningApp, caller: Account
) -> None:
    for body in (TASK_BODIES["image"], TASK_BODIES["tts"], text_body(max_tokens=5)):
        await app.ask("rest", caller.test, body)
    await page.view("usage")
    await page.tab.until("document.querySelector('.chart canvas') && document.querySelector('.records')")
    assert await page.tab.run(TASKS) == ["gpt-4", "eleven-labs-tts", "flux-1-pro"]
    rows = await page.tab.run(ROWS)
    assert "2 + 5 tokens" in rows[0]
    assert "20 characters" in rows[1]
    assert "1 image" in rows[2]
    legend = await page.tab.run(LEGEND)
    assert legend[0] == "flux-1-pro 0.04"
    assert [each.split()[0] for each in legend] == ["flux-1-pro", "eleven-labs-tts", "gpt-4"]
    await page.tab.fill("[aria-label='Shown in the chart']", "tasks")
    await page.tab.until(f"{LEGEND}[0] === 'flux-1-pro 1'")
    await page.tab.until(f"document.querySelector('.chart canvas') && {DRAWN}.every(Boolean)")


async def test_usage_is_filtered_by_model_outcome_and_time(
    page: Page, app: RunningApp, caller: Account
) -> None:
    await app.ask("rest", caller.test, text_body())
    await app.ask("rest", caller.test, text_body("[[error:provider_failed]]", model="claude-3-haiku"))
    await app.ask("rest", caller.test, text_body(model="claude-3-haiku"))
    await page.view("usage")
    await page.tab.until(f"{TASKS}.join() === 'claude-3-haiku,gpt-4'")
    await page.tab.fill("label:Model", "gpt-4")
    await page.tab.until(f"{TASKS}.join() === 'gpt-4'")
    await page.tab.fill("label:Model", "")
    await page.tab.fill("label:Outcome", "true")
    await page.tab.until(f"{ROWS}.length === 1 && {ROWS}[0].includes('provider_failed')")
    await page.tab.fill("label:Outcome", "false")
    await page.tab.until(f"{TASKS}.length === 2")
    await page.tab.fill("label:To", "2020-01-02")
    await page.tab.fill("label:From", "2020-01-01")
    await page.tab.until(f"{ROWS}.join() === 'No task in this period.'")


async def test_the_page_links_the_api_reference(page: Page) -> None:
    assert await page.tab.run("fetch(document.querySelector('.bar-end a').href).then(({ok}) => ok)")


async def test_usage_has_pages_that_can_be_turned_both_ways(
    page: Page, app: RunningApp, caller: Account
) -> None:
    for number in range(30):
        await app.ask("rest", caller.test, text_body(max_tokens=number + 1))
    await page.view("usage")
    await page.tab.until(f"{TASKS}.length === 25")
    first = await page.tab.run(ROWS)
    await page.tab.click("button:Older")
    await page.tab.until(f"{TASKS}.length === 5")
    await page.tab.until("document.activeElement.matches('.scroll[aria-label=Tasks]')")
    assert not set(await page.tab.run(ROWS)) & set(first)
    assert await page.tab.run("document.body.innerText.includes('Page 2')")
    assert await page.tab.run(
        "[...document.querySelectorAll('button')].find((each) => each.textContent === 'Older').disabled"
    )
    await page.tab.click("button:Newer")
    await page.tab.until(f"{TASKS}.length === 25")
    assert await page.tab.run(ROWS) == first
    await page.tab.run(TURN_TWICE)
    await page.tab.until(f"{TASKS}.length === 5 && document.body.innerText.includes('Page 2')")


async def test_usage_is_that_of_the_latest_filters_however_late_an_earlier_answer_comes(
    page: Page, app: RunningApp, caller: Account
) -> None:
    await app.ask("rest", caller.test, text_body())
    await app.ask("rest", caller.test, text_body("[[error:provider_failed]]", model="claude-3-haiku"))
    await page.tab.run(HOLD_USAGE)
    await page.view("usage")
    await page.tab.until("held.length === 2")
    await page.tab.fill("[aria-label='Shown in the chart']", "tasks")  # nothing is known yet
    await page.tab.run("passed = true")
    await page.tab.fill("label:Outcome", "true")
    await page.tab.until(f"{LEGEND}.join() === 'claude-3-haiku 1' && {TASKS}.join() === 'claude-3-haiku'")
    await page.tab.run("Promise.all(held.map((answer) => answer()))")
    for _ in range(5):  # what an answer leads to
        await page.tab.run("fetch('healthz').then((response) => response.text())")
    assert await page.tab.run(LEGEND) == ["claude-3-haiku 1"]
    assert await page.tab.run(TASKS) == ["claude-3-haiku"]


async def test_a_chart_that_is_drawn_again_while_uplot_is_loaded_has_its_totals_once(
    page: Page, app: RunningApp, caller: Account
) -> None:
    await app.ask("rest", caller.test, text_body())
    await page.tab.run(HOLD_USAGE)
    await page.view("usage")
    await page.tab.until("held.length === 2")
    await page.tab.run("passed = true")
    await page.tab.run(
        """(() => {
          const metric = document.querySelector("[aria-label='Shown in the chart']");
          const again = new MutationObserver(() => {
            again.disconnect();
            metric.value = 'tasks';
            metric.dispatchEvent(new Event('change'));
          });
          again.observe(metric.closest('section'), {childList: true, subtree: true});
        })()"""
    )
    await page.tab.run("Promise.all(held.map((answer) => answer()))")
    await page.tab.until(f"{LEGEND}.join() === 'gpt-4 1' && document.querySelector('.facts')")
    await page.tab.run("fetch('healthz').then((response) => response.text())")
    assert await page.tab.run("document.querySelectorAll('.facts').length") == 1
    assert await page.tab.run("document.querySelectorAll('.chart canvas').length") == 1


async def test_credits_that_are_not_known_are_not_shown(page: Page) -> None:
    """As while the store is down."""
    status = "document.querySelector('#status').innerText"
    assert " credits" in await page.tab.run(status)
    await page.tab.run(
        "import('./page/limits.js').then(({observe}) => observe(new Headers({'X-Pomelo-Mode': 'test'})))"
    )
    assert (await page.tab.run(status)).strip().lower() == "test"


async def test_models_are_listed_with_prices_and_limits_and_can_be_tried(
    page: Page, app: RunningApp, caller: Account
) -> None:
    models = (await app.get_json("rest", caller.test, "/api/v1/models"))["data"]
    await page.view("models")
    names = "[...document.querySelectorAll('tbody th')].map((each) => each.firstChild.textContent)"
    assert await page.tab.run(names) == [model["id"] for model in models]
    row = await page.tab.run("document.querySelector('tbody tr').innerText")
    assert f"{models[0]['price']['million_output_tokens']} per million output tokens" in row
    assert f"{models[0]['limits']['max_output_tokens']:,} max output tokens" in row
    await page.tab.fill("label:Search", "gpt-4")
    [tier] = next(model for model in models if model["id"] == "gpt-4")["price_tiers"]
    row = await page.tab.run("document.querySelector('tbody tr').innerText")
    assert f"From {tier['from_input_tokens']:,} input tokens" in row
    assert f"{tier['price']['million_output_tokens']} per million output tokens" in row
    await page.tab.fill("label:Search", "speech to text")
    assert await page.tab.run(names) == ["eleven-labs-stt"]
    await page.tab.click("[aria-label='Try eleven-labs-stt']")
    await page.tab.until("document.querySelector('select[name=model]')?.value === 'eleven-labs-stt'")


async def test_a_key_sees_the_models_that_it_may_use(browser: Browser, app: RunningApp) -> None:
    caller = await app.account("images", models=("flux-1-dev",))
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(caller.test)
        options = "[...document.querySelectorAll('select[name=model] option')].map((each) => each.value)"
        assert await page.tab.run(options) == ["flux-1-dev"]


async def test_the_account_has_its_plan_credits_and_the_usage_of_its_keys(
    page: Page, app: RunningApp, caller: Account
) -> None:
    await app.ask("rest", caller.test, TASK_BODIES["image"])
    await page.view("account")
    shown = await page.tab.run("document.querySelector('main').innerText")
    for fact in (caller.name, "1,000", "100,000", "0.04"):
        assert fact in shown
    key_id = caller.test.split("_")[2]
    assert await page.tab.run("document.querySelector('tbody th').textContent") == f"{key_id}this key"
    assert caller.test not in await page.tab.run("document.documentElement.outerHTML")
    await page.tab.click(f"[aria-label='Show the usage of {key_id}']")
    await page.tab.until(f"{TASKS}.join() === 'flux-1-pro'")
    assert await page.tab.run("document.querySelectorAll('.filters select')[1].value") == key_id


async def test_a_live_key_is_shown_as_live_and_its_answers_come_from_the_provider(
    browser: Browser, app: RunningApp, caller: Account
) -> None:
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(caller.live)
        assert "live" in await page.tab.run("document.querySelector('#status').textContent")
        await page.write("Hello")
        assert await page.run() == "done"
        assert "Pomelo sandbox" not in await page.answer()
        record = await app.only_record(caller)
        assert await page.fact("Id") == record.task_id


async def test_a_key_without_any_model_gets_a_notice(browser: Browser, app: RunningApp) -> None:
    caller = await app.account("images", models=("gpt-4",))
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(caller.test)
        assert "may not use any model" in await page.tab.run("document.querySelector('main').innerText")
        await page.tab.click("#stream")
        await page.tab.click("button:Run")
