"""What must not be left behind: connections, asyncio tasks, open files, and secrets in what an error shows.

`pomelo.testing.suite` asks; it knows neither a provider nor a vendor.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import traceback
from asyncio import Task
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pomelo.testing.upstream import FaultUpstream


@asynccontextmanager
async def nothing_left(problems: list[str], *, within: float) -> AsyncIterator[None]:
    """Adds to `problems` what of the process is left when the context ends and `within` seconds have passed:
    tasks, open files, and what the event loop hears of that nobody awaited or closed."""
    loop = asyncio.get_running_loop()
    tasks, files, usual = asyncio.all_tasks(loop), _open_files(), loop.get_exception_handler()
    loop.set_exception_handler(lambda _, told: problems.append(f"the loop complains: {told['message']}"))
    try:
        yield
        if more := asyncio.all_tasks(loop) - tasks:
            _, more = await asyncio.wait(more, timeout=within)
        await asyncio.sleep(0)  # for what a task's end has called
    finally:
        loop.set_exception_handler(usual)
    if more:
        problems.append(f"asyncio tasks are left: {', '.join(sorted(map(_named, more)))}")
    if opened := _open_files() - files:
        problems.append(f"files are left open: {', '.join(sorted(opened))}")


async def closed(upstream: FaultUpstream, *, within: float) -> bool:
    """Whether all connections to a server are closed, or are so within some seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within
    while upstream.connections and loop.time() < until:  # noqa: ASYNC110 - the server has no event for it
        await asyncio.sleep(0.001)
    return not upstream.connections


def shown(error: BaseException) -> str:
    """All that a log could show of an error, what it arose from included."""
    told: list[str] = []
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        told += [str(found), repr(found), *getattr(found, "__notes__", ())]
        told += traceback.format_exception_only(found)
        queue += [found.__cause__, found.__context__]
    return "\n".join(told)


def _named(task: Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", task.get_name())


def _open_files() -> set[str]:
    """The files that the process has open; empty where the system doesn't tell."""
    if not sys.platform.startswith("linux"):
        return set()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
                found.add(target)
    return found
