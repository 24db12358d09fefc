"""Pipes and devices: to open, read or write one may take forever, and the program may end meanwhile."""

from __future__ import annotations

import asyncio
import io
import os
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import IO, Any, TypeVar

from pomelo.client.errors import ClientClosed, DeadlineExceeded
from pomelo.output_file import is_special

T = TypeVar("T")

_LOOK = 0.1
"""Seconds after which a waiting thread looks whether the client was closed."""


def is_pipe(file: object) -> bool:
    """Returns whether it is the path of a pipe or a device.

    Raises:
        OSError: it can't be looked up.
    """
    return isinstance(file, (str, os.PathLike)) and is_special(Path(file))


def may_stall(file: object) -> bool:
    """Returns whether writing to it may take forever: to a pipe or a device, by path or open.

    Raises:
        OSError: it can't be looked up.
    """
    return is_pipe(file) or (isinstance(file, io.IOBase) and not file.seekable())


def waiting_read(file: IO[bytes]) -> Callable[[int], bytes | None]:
    """Returns the function that reads from a file. At an open pipe it waits for data before it reads. During
    a read, the lock of the file's buffer would keep it from closing, and the end of the program would be an
    abort."""
    raw = blocking_pipe(file)
    if raw is None:
        return file.read
    ready = select.poll()
    ready.register(raw, select.POLLIN)
    read = file.read1 if isinstance(file, io.BufferedReader) else file.read

    def wait_and_read(size: int) -> bytes | None:
        ready.poll()
        return read(size)

    return wait_and_read


class OpenPipe:
    """The pipe `raw`, below the buffer of an open `file`. A write passes on no more than there is room for,
    and waits in between: as with `waiting_read`, not while the buffer is locked."""

    def __init__(self, file: IO[bytes], raw: io.FileIO) -> None:
        self._file = file
        self._raw = raw
        self._ready = select.poll()
        self._ready.register(raw, select.POLLOUT)

    def write(self, data: bytes) -> None:
        self._ready.poll()
        self._file.flush()  # what its owner has written before
        rest = memoryview(data)
        while rest:
            self._ready.poll()
            rest = rest[self._raw.write(rest[: select.PIPE_BUF]) :]


def blocking_pipe(file: object) -> io.FileIO | None:
    """Returns the file below the buffer of an open pipe, None for other files."""
    raw = file.raw if isinstance(file, (io.BufferedReader, io.BufferedWriter)) else file
    if (
        hasattr(select, "poll")  # not on Windows
        and isinstance(raw, io.FileIO)
        and not raw.seekable()
        and os.get_blocking(raw.fileno())
    ):
        return raw
    return None


def open_pipe(open_file: Callable[[], T], seconds: float, closed: threading.Event) -> T:
    """Opens a pipe, which waits for its other end.

    Raises:
        DeadlineExceeded: it is not open after so many `seconds`.
        ClientClosed: the client is `closed` before.
    """
    opening, until = _in_daemon_thread(open_file), time.monotonic() + seconds
    while not opening.done() and (left := until - time.monotonic()) > 0 and not closed.is_set():
        wait([opening], min(left, _LOOK))
    if opening.done():
        return opening.result()
    raise _unopened(closed.is_set())


async def open_pipe_async(open_file: Callable[[], T], seconds: float, closed: asyncio.Event) -> T:
    """Opens a pipe, which waits for its other end.

    Raises:
        DeadlineExceeded: it is not open after so many `seconds`.
        ClientClosed: the client is `closed` before.
    """
    opening = asyncio.create_task(to_daemon_thread(open_file))
    closing = asyncio.create_task(closed.wait())
    try:
        await asyncio.wait((opening, closing), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if opening.done():
            return opening.result()
    finally:
        opening.cancel()
        closing.cancel()
    raise _unopened(closed.is_set())


async def to_daemon_thread(function: Callable[..., T], *arguments: Any) -> T:
    """Does what `asyncio.to_thread` does, in a thread for which the end of the program does not wait."""
    return await asyncio.wrap_future(_in_daemon_thread(function, *arguments))


def _in_daemon_thread(function: Callable[..., T], *arguments: Any) -> Future[T]:
    future = Future[T]()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _unopened(closed: bool) -> Exception:
    if closed:
        return ClientClosed("The client was closed during the call")
    return DeadlineExceeded("The timeout passed before the pipe was opened at its other end")
