"""Iterations of the running event loop."""

from __future__ import annotations

import asyncio


async def iterations(count: int = 5) -> None:
    """Runs `count` iterations: by default those that ready tasks need."""
    for _ in range(count):
        await asyncio.sleep(0)
