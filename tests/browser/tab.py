"""One tab of a browser: what a user does in it, and what it shows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

_KEYS = {"Tab": 9, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32}
_TEXTS = {"Enter": "\r", " ": " "}

_TRUE = """
(() => {
  try {
    return Boolean(%s);
  } catch (error) {
    if (error instanceof TypeError) return false; // a member of an element that does not exist, or not yet
    throw error;
  }
})()
"""


def find(target: str) -> str:
    """Returns the expression of an element: `label:TEXT` is a labelled control, `button:TEXT` a button with that
    text, everything else a selector."""
    by, _, text = target.partition(":")
    if by == "label":
        return f"{_with_text('label', text)}.control"
    if by == "button":
        return _with_text("button", text)
    return f"document.querySelector({json.dumps(target)})"


def _with_text(selector: str, text: str) -> str:
    matches = f"(each) => each.checkVisibility() && each.textContent.trim() === {json.dumps(text)}"
    return f"[...document.querySelectorAll({selector!r})].find({matches})"


class CommandError(Exception):
    """The browser could not run a command, such as one that needs the page that the tab is leaving."""


class Tab:
    """Controls a tab by the DevTools protocol. `problems` are uncaught exceptions, and what the browser logged as
    an error: violations of the page's policy among them, but not responses with an error status. `warnings` are
    those responses, what the browser logged below an error, and what the page itself wrote to its console as an
    error or a warning."""

    def __init__(self, tools: aiohttp.ClientWebSocketResponse) -> None:
        self._tools = tools
        self._calls = 0
        self.problems: list[str] = []
        self.warnings: list[str] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        """Calls a method of the protocol; returns its result."""
        self._calls += 1
        await self._tools.send_json({"id": self._calls, "method": method, "params": parameters})
        while True:
            message = await self._tools.receive_json()
            self._note(message)
            if message.get("id") == self._calls:
                if "error" in message:
                    raise CommandError(message["error"])
                return message["result"]

    def _note(self, message: Any) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            entry = parameters["entry"]
            is_problem = entry["level"] == "error" and entry["source"] != "network"
            (self.problems if is_problem else self.warnings).append(entry["text"])
        elif message.get("method") == "Runtime.consoleAPICalled" and parameters["type"] in (
            "error",
            "warning",
        ):
            self.warnings.append(json.dumps(parameters["args"]))

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def run(self, expression: str) -> Any:
        """Returns the value of an expression of the page, or of its promise."""
        result = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, condition: str, seconds: float = 30) -> None:
        """Returns when an expression of the page is true. It is false while an element in it does not exist.

        Raises:
            AssertionError: it is not within `seconds`.
        """
        try:
            async with asyncio.timeout(seconds):
                while not await self._is_true(condition):  # noqa: ASYNC110 (pages have no event for it)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            shown = await self.run("document.body.innerText")
            raise AssertionError(f"{condition} did not become true: {self.problems}\n{shown}") from None

    async def _is_true(self, condition: str) -> bool:
        try:
            return bool(await self.run(_TRUE.replace("%s", condition)))
        except CommandError:
            return False

    async def press(self, key: str, times: int = 1, *, shift: bool = False) -> None:
        """Presses a key."""
        event = {
            **{"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": _KEYS[key]},
            **{"modifiers": 8 if shift else 0},
        }
        for _ in range(times):
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=_TEXTS.get(key, ""), **event)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def write(self, text: str) -> None:
        """Writes text at the focus."""
        await self.call("Input.insertText", text=text)

    async def click(self, target: str) -> None:
        """Clicks an element, which `find` describes."""
        await self.run(f"{find(target)}.click()")

    async def fill(self, target: str, text: str) -> None:
        """Sets the value of a control, which `find` describes."""
        await self.run(
            f"""(() => {{ const control = {find(target)};
            control.value = {json.dumps(text)};
            for (const name of ['input', 'change']) control.dispatchEvent(new Event(name, {{bubbles: true}})); }})()"""
        )

    async def choose_files(self, target: str, paths: Sequence[Path]) -> None:
        """Chooses files in a file control, which `find` describes."""
        node = await self.call("Runtime.evaluate", expression=find(target))
        await self.call(
            "DOM.setFileInputFiles", objectId=node["result"]["objectId"], files=[str(path) for path in paths]
        )

    async def look(self, width: int, scheme: str) -> None:
        """Sets the width of the tab in pixels, and whether its user prefers `light` or `dark`."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        await self.call(
            "Emulation.setEmulatedMedia",
            features=[
                {"name": "prefers-color-scheme", "value": scheme},
                {"name": "prefers-reduced-motion", "value": "reduce"},
            ],
        )
