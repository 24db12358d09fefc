"""Finds errors of Pomelo that nothing has waited for. asyncio reports them when the garbage is collected."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parents[1]
_TESTS = f"{_ROOT / 'tests'}/"
_POMELO = (f"{_ROOT / 'pomelo'}/", f"{_ROOT / 'gateway'}/")

_report = asyncio.BaseEventLoop.default_exception_handler

Context = Mapping[str, Any]
"""What asyncio reports: a message, and a future, a task or an exception."""


@contextmanager
def lost_errors() -> Iterator[list[str]]:
    """Yields a list, to which everything is added that event loops report within the context, unless it is of the
    tests themselves or in a context within this one."""
    found: list[str] = []

    def handle(loop: asyncio.BaseEventLoop, context: dict[str, Any]) -> None:
        if not is_of_tests(context):
            found.append(_describe(context))
        _report(loop, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.BaseEventLoop, "default_exception_handler", handle)
        yield found


def is_of_tests(context: Context) -> bool:
    """Whether a server, a client or another task of the tests has lost an error. It counts as Pomelo's if it is in
    doubt: if neither the task nor the traceback has a file of the tests or of Pomelo.

    The outermost such file decides: whose task it is, not whose code has raised the error.
    """
    files = (file for file in _files(context) if file.startswith((_TESTS, *_POMELO)))
    return next(files, "").startswith(_TESTS)


def _files(context: Context) -> Iterator[str]:
    """Yields the files of the code that was running, beginning with the outermost."""
    task = context.get("task") or context.get("future")
    if isinstance(task, asyncio.Task):
        code = getattr(task.get_coro(), "cr_code", None)
        if code is not None:
            yield code.co_filename
    error = context.get("exception")
    if error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            yield frame.f_code.co_filename


def _describe(context: Context) -> str:
    error = context.get("exception")
    trace = "" if error is None else "".join(traceback.format_exception(error))
    rest = {name: value for name, value in context.items() if name not in ("message", "exception")}
    return f"{context.get('message')} {rest}\n{trace}"


@contextmanager
def quiet_streams() -> Iterator[None]:
    """Within the context, no stream of asyncio reports how its connection has ended.

    It never should, as whoever reads or writes gets the error. But the future that has it, which nothing waits for,
    is marked as read only when the stream is deleted, and the garbage collector may delete the future first.
    """
    create = asyncio.StreamReaderProtocol.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        create(self, *arguments, **options)
        self._closed.add_done_callback(_read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio.StreamReaderProtocol, "__init__", init)
        yield


def _read(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()
