"""The page of a running app in a tab."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.browser.chromium import Browser
from tests.browser.tab import Tab

ANSWER = "document.querySelector('.answer')"
ENDED = f"['done', 'stopped', 'failed'].includes({ANSWER}.dataset.state)"
READY = "document.querySelector('main').ariaBusy !== 'true' && document.querySelector('main h1')"


@dataclass
class Page:
    """The page in a tab, as its user sees it."""

    tab: Tab
    url: str

    async def sign_in(self, key: str) -> None:
        """Enters a key, and waits for the playground."""
        await self.tab.until("document.querySelector('.sign-in')")
        await self.tab.fill("label:API key", key)
        await self.tab.click("button:Continue")
        await self.tab.until(ANSWER)

    async def view(self, name: str) -> None:
        """Opens a view by the navigation."""
        await self.tab.run(f"location.hash = '#/{name}'")
        title = name.partition("?")[0].capitalize()
        await self.tab.until(f"document.title.startsWith({title!r}) && {READY}")

    async def choose(self, model: str) -> None:
        """Chooses a model in the playground."""
        await self.tab.fill("select[name=model]", model)

    async def write(self, text: str) -> None:
        """Writes the first message of a text task."""
        await self.tab.fill("label:Message", text)

    async def attach(self, *paths: Path) -> None:
        """Attaches images to the first message, and waits until they are there."""
        await self.tab.choose_files(".turn input[type=file]", paths)
        await self.tab.until(f"document.querySelectorAll('.attachment').length === {len(paths)}")

    async def give_image(self, event: str = "paste") -> None:
        """Pastes or drops an image into the first message, and waits until it is there."""
        kind = {"paste": "ClipboardEvent", "drop": "DragEvent"}[event]
        data = {"paste": "clipboardData", "drop": "dataTransfer"}[event]
        await self.tab.run(
            f"""(() => {{ const {data} = new DataTransfer();
            {data}.items.add(new File(['GIF89a'], 'given.gif'));
            document.querySelector('.turn textarea').dispatchEvent(
              new {kind}('{event}', {{bubbles: true, cancelable: true, {data}}})); }})()"""
        )
        await self.tab.until("document.querySelector('.attachment')?.textContent.includes('given.gif')")

    async def run(self) -> str:
        """Runs the task to its end; returns the state of the answer."""
        await self.tab.click("button:Run")
        await self.tab.until(ENDED)
        return await self.state()

    async def state(self) -> str:
        state: str = await self.tab.run(f"{ANSWER}.dataset.state")
        return state

    async def answer(self) -> str:
        """Returns the text of the answer and its facts."""
        text: str = await self.tab.run(f"{ANSWER}.innerText")
        return text

    async def fact(self, name: str) -> str:
        """Returns a fact of the answer, once it is known."""
        value = f"""[...{ANSWER}.querySelectorAll('dt')].find((each) => each.textContent === {json.dumps(name)})
          ?.nextSibling.textContent"""
        await self.tab.until(f"!['…', undefined].includes({value})")
        text: str = await self.tab.run(value)
        return text

    async def code(self, form: str) -> str:
        """Returns the request as code in one of the forms."""
        await self.tab.click(f"button:{form}")
        text: str = await self.tab.run("document.querySelector('[role=tabpanel]').textContent")
        return text


FORBID_STORAGE = """for (const name of ['localStorage', 'sessionStorage'])
  Object.defineProperty(window, name, {get() { throw new DOMException('Access is denied', 'SecurityError'); }});"""
"""As in a browser whose user blocks the data of all sites."""


@asynccontextmanager
async def open_page(browser: Browser, url: str, *, script: str = "") -> AsyncIterator[Page]:
    """Opens the page in a tab with no key, where `script` runs before its own; asserts at the end that nothing
    went wrong in it."""
    async with browser.open_tab() as tab:
        await tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        await tab.call("Storage.clearDataForOrigin", origin=url, storageTypes="local_storage")
        await tab.open(f"{url}/")
        await tab.until("document.querySelector('.sign-in')")
        yield Page(tab, url)
        assert tab.problems == []
