"""The page can be used by everyone: by keyboard, by screen readers, on small and wide screens, light and dark."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest

from gateway import page as page_module
from tests.app import RunningApp, app_fixture
from tests.browser.access import overflow, serious_faults
from tests.browser.chromium import Browser
from tests.browser.page import ANSWER, Page, open_page

app = app_fixture()

FOCUSED = "document.activeElement"
FOCUSABLE = """[...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex]')]
  .filter((each) => each.tabIndex >= 0 && !each.disabled && each.checkVisibility())"""


@pytest.fixture(name="page")
async def _page(browser: Browser, app: RunningApp) -> AsyncIterator[Page]:
    """The page in a tab, without a key."""
    async with open_page(browser, app.urls["rest"]) as page:
        yield page


async def nothing(page: Page) -> None:
    pass


async def text(page: Page) -> None:
    await page.tab.click("summary")
    await page.give_image()
    assert await page.run() == "done"
    await page.fact("Cost")


async def tools(page: Page) -> None:
    await page.tab.click("summary")
    await page.tab.click("button:Insert an example")
    assert await page.run() == "done"
    assert "get_weather" in await page.answer()


async def image(page: Page) -> None:
    await page.choose("flux-1-pro")
    assert await page.run() == "done"


async def speech(page: Page) -> None:
    await page.choose("eleven-labs-tts")
    await page.tab.click("summary")
    assert await page.run() == "done"


async def transcript(page: Page) -> None:
    await page.choose("eleven-labs-stt")
    await page.tab.choose_files("label:audio", [Path(__file__)])
    assert await page.run() == "done"


async def error(page: Page) -> None:
    await page.write("[[error:overloaded]]")
    assert await page.run() == "failed"


async def usage(page: Page) -> None:
    assert await page.run() == "done"
    await page.view("usage")
    await page.tab.until("document.querySelector('.chart canvas') && document.querySelector('.records')")
    await page.tab.click("summary")


async def models(page: Page) -> None:
    await page.view("models")


async def account(page: Page) -> None:
    assert await page.run() == "done"
    await page.view("account")


SCENES: Mapping[str, Callable[[Page], Awaitable[None]]] = {
    each.__name__: each
    for each in (nothing, text, tools, image, speech, transcript, error, usage, models, account)
}


@pytest.mark.parametrize("width", [320, 1440])
@pytest.mark.parametrize("scene", SCENES)
async def test_axe_finds_nothing_serious_and_nothing_is_wider_than_the_screen(
    page: Page, app: RunningApp, modules: Path, scene: str, width: int
) -> None:
    await page.tab.look(width, "light")
    if scene != "nothing":
        await page.sign_in((await app.account("all")).test)
    await SCENES[scene](page)
    for scheme in ("light", "dark"):
        await page.tab.look(width, scheme)
        assert await serious_faults(page.tab, modules) == [], scheme
        assert await overflow(page.tab) == [], scheme


async def test_a_task_is_run_by_keyboard_alone(page: Page, app: RunningApp) -> None:
    tab = page.tab
    key = (await app.account("all")).test

    async def focus(name: str) -> None:
        """Presses the tabulator until an element with this name has the focus."""
        described = f"({FOCUSED}.labels?.[0] ?? {FOCUSED}).textContent.trim()"
        for _ in range(60):
            await tab.press("Tab")
            if await tab.run(described) == name:
                return
        raise AssertionError(f"{name} is not reached by keyboard")

    await focus("API key")
    await tab.write(key)
    await tab.press("Enter")
    await tab.until(ANSWER)
    await focus("Message")
    await tab.run(f"{FOCUSED}.select()")
    await tab.write("By keyboard alone")
    await focus("Parameters")
    await tab.press("Enter")
    await focus("max tokens")
    await tab.write("20")
    await focus("Run")
    await tab.press("Enter")
    await tab.until(f"{ANSWER}.dataset.state === 'done'")
    assert "By keyboard alone" in await page.answer()
    assert await page.fact("Tokens") == "3 in, 20 out"
    await focus("curl")
    await tab.press("ArrowRight", times=3)
    assert await tab.run(f"{FOCUSED}.textContent + {FOCUSED}.ariaSelected") == "gRPCtrue"
    assert "TaskService/StreamTask" in await tab.run("document.querySelector('[role=tabpanel]').textContent")


async def test_a_running_task_is_stopped_by_keyboard(page: Page, app: RunningApp) -> None:
    await page.sign_in((await app.account("all")).test)
    await page.write("[[stall]]")
    await page.tab.run(
        "[...document.querySelectorAll('button')].find((each) => each.textContent === 'Run').focus()"
    )
    await page.tab.press("Enter")
    await page.tab.until(f"{FOCUSED}.textContent === 'Stop' && {ANSWER}.querySelector('.text').textContent")
    await page.tab.press("Enter")
    await page.tab.until(f"{ANSWER}.dataset.state === 'stopped' && {FOCUSED}.textContent === 'Run'")


async def press(page: Page, name: str) -> None:
    """Presses the last button with this name by the keyboard."""
    buttons = "[...document.querySelectorAll('button')]"
    await page.tab.run(f"{buttons}.findLast((each) => each.textContent === {name!r}).focus()")
    await page.tab.press("Enter")


async def test_a_button_that_disappears_passes_the_focus_on(page: Page, app: RunningApp) -> None:
    await page.sign_in((await app.account("all")).test)
    await press(page, "Add a message")
    await press(page, "Remove")
    assert await page.tab.run(f"{FOCUSED}.textContent") == "Add a message"
    await page.write("[[error:provider_failed]]")
    assert await page.run() == "failed"
    await page.write("[[stall]]")
    await press(page, "Try again")
    await page.tab.until(f"{FOCUSED}.textContent === 'Stop' && {ANSWER}.querySelector('.text').textContent")
    await page.tab.press("Enter")
    await page.tab.until(f"{FOCUSED}.textContent === 'Run'")
    await page.view("account")
    await press(page, "Forget this key")
    await page.tab.until(
        f"document.querySelector('.sign-in') && {FOCUSED} === document.querySelector('main')"
    )


@pytest.mark.parametrize("view", ["models", "usage"])
async def test_a_view_that_is_read_again_gets_the_focus(page: Page, app: RunningApp, view: str) -> None:
    await page.sign_in((await app.account("all")).test)
    await page.tab.run(
        f"""(() => {{
          const original = window.fetch;
          window.fetch = async () => {{
            window.fetch = original;
            return new Response('', {{status: 503}});
          }};
          location.hash = '#/{view}';
        }})()"""
    )
    await page.tab.until("document.querySelector('.error button')")
    await press(page, "Try again")
    await page.tab.until("document.querySelector('main h1') && !document.querySelector('.error')")
    await page.tab.until(f"{FOCUSED} === document.querySelector('main')")


@pytest.mark.parametrize("view", ["playground", "usage", "models", "account"])
async def test_every_control_is_reached_by_keyboard_in_the_order_of_the_page_and_shows_its_focus(
    page: Page, app: RunningApp, view: str
) -> None:
    await page.sign_in((await app.account("all")).test)
    await page.view(view)
    if view == "usage":
        await page.tab.until("document.querySelector('.records')")
    tab = page.tab
    await tab.run("document.activeElement.blur(); window.scrollTo(0, 0); getSelection().removeAllRanges()")
    await tab.run(f"window.expected = {FOCUSABLE}; window.reached = []; expected[0].focus()")
    controls = await tab.run("expected.length")
    for _ in range(controls * 4):  # a date has four parts
        await tab.run(f"if (reached.at(-1) !== {FOCUSED}) reached.push({FOCUSED})")
        if await tab.run("reached.at(-1) === expected.at(-1)"):
            break
        await tab.press("Tab")
        shows = f"{FOCUSED} === document.body || getComputedStyle({FOCUSED}).outlineStyle !== 'none'"
        assert await tab.run(shows), await tab.run(f"{FOCUSED}.outerHTML")
    missed = await tab.run("expected.filter((each) => !reached.includes(each)).map((each) => each.outerHTML)")
    assert missed == []
    assert await tab.run("reached.every((each, i) => each === expected[i])")


async def test_the_skip_link_leads_to_the_content_of_the_view_that_is_shown(
    page: Page, app: RunningApp
) -> None:
    await page.sign_in((await app.account("all")).test)
    await page.view("models")
    await page.tab.run("document.querySelector('.skip').focus()")
    await page.tab.press("Enter")
    await page.tab.until(f"{FOCUSED} === document.querySelector('main')")
    assert await page.tab.run("location.hash") == "#/models"


async def test_the_theme_of_the_system_can_be_replaced_and_is_kept(page: Page) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    await page.tab.look(800, "light")
    light = await page.tab.run(colour)
    await page.tab.look(800, "dark")
    dark = await page.tab.run(colour)
    assert light != dark
    await page.tab.fill("#theme", "light")
    assert await page.tab.run(colour) == light
    await page.tab.open(f"{page.url}/?again")
    await page.tab.until("document.querySelector('.sign-in')")
    assert await page.tab.run(colour) == light
    assert await page.tab.run("document.querySelector('#theme').value") == "light"


def test_the_copy_of_uplot_is_that_of_its_npm_package(modules: Path) -> None:
    copy = Path(page_module.__file__).parent / "static" / "vendor"
    package = modules / "uplot"
    version = json.loads((package / "package.json").read_text())["version"]
    assert f" {version}," in (copy / "README.md").read_text()
    for name in ("dist/uPlot.esm.js", "dist/uPlot.min.css", "LICENSE"):
        assert (copy / Path(name).name).read_bytes() == (package / name).read_bytes(), name
