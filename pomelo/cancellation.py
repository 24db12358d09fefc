"""Distinguish the cancellation of a task from the cancellation of something that it awaits."""

from __future__ import annotations

import asyncio


def is_cancelled() -> bool:
    """Whether the current task itself was cancelled. False in an `except asyncio.CancelledError` that is due
    to a future which the task awaited: raised on, that would end a task which nobody cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def uncancel() -> None:
    """Undoes the cancellation of the current task, which something within it has cancelled."""
    task = asyncio.current_task()
    while task is not None and task.uncancel():
        pass
