"""Headless Chromium, controlled by its DevTools protocol."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import aiohttp

from tests.browser.tab import Tab

NAMES = ("chromium", "chromium-browser", "google-chrome")

_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # root can't use the sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-breakpad",
    "--no-first-run",
    # One process for all pages, whose start takes a sixth of the time of a test.
    "--disable-site-isolation-trials",
    "--disable-features=IsolateOrigins,site-per-process",
    "--renderer-process-limit=1",
    "--no-zygote",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",  # a microphone that beeps
    "--use-fake-ui-for-media-stream",  # and that every page may use
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    """Returns the path of an installed browser, or None if no browser is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass(frozen=True)
class Browser:
    """A running browser; `address` is the URL of its DevTools."""

    address: str
    session: aiohttp.ClientSession

    async def read(self, url: str, element: str, until: str) -> str:
        """Opens a page, and returns the text of the element with this id once it contains `until`."""
        return await self.evaluate(url, f"document.getElementById({element!r})?.textContent", until)

    async def evaluate(self, url: str, expression: str, until: str) -> str:
        """Opens a URL in a tab, and returns the text of an expression of its page once it contains `until`."""
        async with self.session.put(f"{self.address}/json/new?{quote(url, safe='')}") as response:
            page = await response.json()
        text = ""
        try:
            async with asyncio.timeout(30), self.session.ws_connect(page["webSocketDebuggerUrl"]) as tools:
                while until not in text:
                    await asyncio.sleep(0.05)
                    parameters = {"expression": f"String({expression} ?? '')"}
                    await tools.send_json({"id": 1, "method": "Runtime.evaluate", "params": parameters})
                    text = (await tools.receive_json())["result"]["result"].get("value", "")
        except TimeoutError:
            raise AssertionError(f"the page does not contain {until!r}: {text}") from None
        finally:
            await self.session.get(f"{self.address}/json/close/{page['id']}")
        return text

    @asynccontextmanager
    async def open_tab(self) -> AsyncIterator[Tab]:
        """Opens an empty tab; closes it on exit."""
        async with self.session.put(f"{self.address}/json/new?about:blank") as response:
            page = await response.json()
        try:
            async with self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as tools:
                tab = Tab(tools)
                for domain in ("Page", "Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
                yield tab
        finally:
            await self.session.get(f"{self.address}/json/close/{page['id']}")


@asynccontextmanager
async def open_browser(folder: Path) -> AsyncIterator[Browser]:
    """Starts the installed browser with an empty profile in `folder`; ends it on exit."""
    name = find_browser()
    assert name is not None
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(name, *_OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"),
            stdout=log,
            stderr=log,
            env=os.environ | {"HOME": str(folder)},
            start_new_session=True,
        )
    try:
        port_file = folder / "profile" / "DevToolsActivePort"
        async with asyncio.timeout(60):
            while not port_file.exists() or not port_file.read_text().strip():
                assert process.returncode is None, (folder / "log").read_text()
                await asyncio.sleep(0.05)
        async with aiohttp.ClientSession() as session:
            yield Browser(f"http://127.0.0.1:{port_file.read_text().split()[0]}", session)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
