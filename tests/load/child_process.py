"""Test modules as processes of their own. A child prints a line when it is ready, and ends when its stdin ends."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 300.0
"""Seconds for the start, and for the end."""


@dataclass
class Child:
    """The output of a child: its first line, and everything after it, which is set when the child has ended."""

    first_line: str
    result: str = ""


@asynccontextmanager
async def start_child(module: str, *arguments: str) -> AsyncIterator[Child]:
    """Runs a module with arguments and waits until it is ready; ends it on exit."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    child = Child("")
    try:
        async with asyncio.timeout(TIMEOUT):
            child.first_line = (await process.stdout.readline()).decode().strip()
        assert child.first_line, f"{module} failed to start"
        yield child
    finally:
        async with asyncio.timeout(TIMEOUT):
            child.result = (await process.communicate(b""))[0].decode()  # without input it leaves stdin open


def print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def stdin_end() -> asyncio.Future[str]:
    return asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
