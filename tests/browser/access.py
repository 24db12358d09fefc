"""Finds what keeps people from using a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.browser.tab import Tab


async def serious_faults(tab: Tab, modules: Path) -> list[Any]:
    """Returns the serious and critical faults that axe-core finds in a page, each with its elements. `modules`
    are the npm packages of these tests."""
    if not await tab.run("'axe' in window"):
        await tab.run((modules / "axe-core" / "axe.min.js").read_text() + ";0")
    found: list[Any] = await tab.run(
        """axe.run(document, {resultTypes: ['violations']}).then(({violations}) => violations
          .filter(({impact}) => ['serious', 'critical'].includes(impact))
          .map(({id, nodes}) => [id, ...nodes.map(({html}) => html)]))"""
    )
    return found


async def overflow(tab: Tab) -> list[Any]:
    """Returns the elements that make a page wider than its tab."""
    found: list[Any] = await tab.run(
        """document.documentElement.scrollWidth <= document.documentElement.clientWidth ? [] :
        [...document.querySelectorAll('body *')]
          .filter((each) => each.getBoundingClientRect().right > document.documentElement.clientWidth)
          .map((each) => each.outerHTML.slice(0, 100))"""
    )
    return found
