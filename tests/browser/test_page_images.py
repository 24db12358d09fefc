"""Images in the messages of a text task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.app import Account, RunningApp, app_fixture
from tests.browser.chromium import Browser
from tests.browser.page import Page, open_page

app = app_fixture()

IMAGE_TOKENS = 85
"""What the sandbox counts for an image."""

GIF = b"GIF89a" + bytes(1000)
SHOWN = "[...document.querySelectorAll('.attachment .file')].map((each) => each.textContent)"
NOTE = "document.querySelector('.images [role=status]').textContent"


@pytest.fixture(name="caller", scope="module")
async def _caller(app: RunningApp) -> Account:
    return await app.account("unlimited")


@pytest.fixture(name="page")
async def _page(browser: Browser, app: RunningApp, caller: Account) -> AsyncIterator[Page]:
    """The page in a tab, with a message of one word."""
    async with open_page(browser, app.urls["rest"]) as page:
        await page.sign_in(caller.test)
        await page.write("Look")
        yield page


async def test_attached_images_are_sent_until_they_are_removed(page: Page, tmp_path: Path) -> None:
    paths = [tmp_path / "one.gif", tmp_path / "two.jpg"]
    for path in paths:
        path.write_bytes(GIF)
    await page.attach(*paths)
    assert await page.tab.run(SHOWN) == ["one.gif 1006 B", "two.jpg 1006 B"]
    await page.tab.fill("[aria-label='Detail of two.jpg']", "high")
    assert await page.run() == "done"
    assert (await page.fact("Tokens")).startswith(f"{1 + 2 * IMAGE_TOKENS} in")
    code = await page.code("gRPC")
    assert "two.jpg" in code
    assert "IMAGE_DETAIL_HIGH" in code
    await page.tab.click("[aria-label='Remove two.jpg']")
    assert await page.tab.run("document.activeElement.textContent") == "Attach images"
    assert "two.jpg" not in await page.code("gRPC")
    await page.tab.fill("[aria-label=Role]", "assistant")
    assert "one.gif" not in await page.code("gRPC")
    await page.tab.fill("[aria-label=Role]", "user")
    assert await page.run() == "done"
    assert (await page.fact("Tokens")).startswith(f"{1 + IMAGE_TOKENS} in")


async def test_files_that_can_not_be_sent_are_refused_before_the_request(page: Page, tmp_path: Path) -> None:
    text, large, more = tmp_path / "text.png", tmp_path / "large.gif", tmp_path / "more.gif"
    text.write_bytes(b"no image")
    large.write_bytes(GIF + bytes(5_990_000))
    more.write_bytes(GIF + bytes(20_000))
    await page.tab.choose_files(".turn input[type=file]", [text, large, more])
    await page.tab.until(f"{NOTE}.includes('more.gif has 21 KiB')")
    assert "text.png is not a PNG, JPEG, WebP or GIF image." in await page.tab.run(NOTE)
    assert await page.tab.run(SHOWN) == ["large.gif 5.7 MiB"]
    assert await page.run() == "done"  # the largest body that the page sends fits


@pytest.mark.parametrize("event", ["paste", "drop"])
async def test_an_image_can_be_pasted_and_dropped(page: Page, event: str) -> None:
    await page.give_image(event)
    assert await page.tab.run(SHOWN) == ["given.gif 6 B"]


async def test_a_message_that_can_not_have_images_ignores_them_and_the_page_stays(page: Page) -> None:
    await page.tab.fill("[aria-label=Role]", "assistant")
    is_cancelled = await page.tab.run(
        """(() => {
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File(['GIF89a'], 'given.gif'));
          const text = document.querySelector('.turn textarea');
          const drag = (name) => !text.dispatchEvent(new DragEvent(name, {bubbles: true, cancelable: true, dataTransfer}));
          const isOver = drag('dragover') && !document.querySelector('.dropping');
          return isOver && drag('drop');  // otherwise the browser shows the file
        })()"""
    )
    assert is_cancelled
    assert await page.tab.run(SHOWN) == []
