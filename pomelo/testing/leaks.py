"""Finds leaks: of connections, asyncio tasks and open files, and of secrets in errors."""

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
async def no_leaks(problems: list[str], *, within: float) -> AsyncIterator[None]:
    """Add to `problems` the asyncio tasks and open files that are left `within` seconds after the context,
    and what the event loop reports, such as an exception that was never retrieved."""
    loop = asyncio.get_running_loop()
    tasks, files, handler = asyncio.all_tasks(loop), _open_files(), loop.get_exception_handler()
    loop.set_exception_handler(
        lambda _, context: problems.append(f"the event loop reports: {context['message']}")
    )
    try:
        yield
        more = asyncio.all_tasks(loop) - tasks
        # A gRPC server in the same event loop always has tasks that wait for its next calls.
        more = {task for task in more if not _task_name(task).startswith("AioServer.")}
        if more:
            _, more = await asyncio.wait(more, timeout=within)
        await asyncio.sleep(0)  # for the callbacks of tasks that have ended
        until = loop.time() + within
        # Another thread may have a file open for a moment, such as one that lists a folder.
        opened = _open_files() - files
        while opened and loop.time() < until:  # nothing reports it
            await asyncio.sleep(0.001)
            opened = _open_files() - files
    finally:
        loop.set_exception_handler(handler)
    if more:
        problems.append(f"asyncio tasks are left: {', '.join(sorted(map(_task_name, more)))}")
    if opened:
        problems.append(f"files are left open: {', '.join(sorted(opened))}")


async def connections_closed(upstream: FaultUpstream, *, within: float) -> bool:
    """Return whether all connections to a server are closed within some seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within
    while upstream.connections and loop.time() < until:  # noqa: ASYNC110 - aiohttp has no event for it
        await asyncio.sleep(0.001)
    return not upstream.connections


def printed_error(error: BaseException) -> str:
    """Return everything that a log could print of an error, including its causes."""
    lines: list[str] = []
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        lines += [str(current), repr(current), *getattr(current, "__notes__", ())]
        lines += traceback.format_exception_only(current)
        queue += [current.__cause__, current.__context__]
    return "\n".join(lines)


def _task_name(task: Task[Any]) -> str:
    return getattr(task.get_coro(), "__qualname__", task.get_name())


def _open_files() -> set[str]:
    """The open files of the process; empty except on Linux."""
    if not sys.platform.startswith("linux"):
        return set()
    files = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
                files.add(target)
    return files
