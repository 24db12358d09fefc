"""Writes log lines in a thread, so that no slow or blocked reader of them holds up the server."""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

BATCH_TIME = 0.1
"""Seconds for which lines are collected before they are written; urgent ones are written immediately."""

MAX_WAITING = 8_192
"""Lines that may wait to be written; more are dropped, and counted."""

MAX_WRITE = 4_096
"""Bytes that are written at a time, in whole lines: the largest write to a pipe that other processes, which
write to it too, can't interrupt."""

CLOSE_TIME = 1.0
"""Seconds that the remaining lines have to be written at the end."""


class LogOutput:
    """Writes lines to a file descriptor, which it does not close. `on_dropped` makes the line that reports
    how many lines were dropped. Lines may come from any thread."""

    def __init__(
        self, descriptor: int, on_dropped: Callable[[int], bytes], batch_time: float = BATCH_TIME
    ) -> None:
        self._descriptor = descriptor
        self._batch_time = batch_time
        self._on_dropped = on_dropped
        self._lines: deque[bytes] = deque()
        self.dropped = 0
        """Lines that were dropped since the start, because too many waited."""
        self.unwritten = 0
        """Lines that could not be written since the start, for example on a full disk."""
        self._reported = 0
        self._torn = False
        """Whether the last line was written only in part."""
        self._scheduled = False
        self._ending = False
        self._wake: SimpleQueue[bool] = SimpleQueue()
        """Wakes the thread up: for a batch (False), then immediately (True). Costs less than events."""
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, line: bytes, *, urgent: bool = False) -> None:
        """Adds a line, which ends with a line feed. Never blocks: if too many lines wait, it is dropped."""
        if len(self._lines) >= MAX_WAITING:
            self.dropped += 1
            return
        self._lines.append(line)
        if urgent or not self._scheduled:
            self._scheduled = True
            self._wake.put(urgent)

    def close(self) -> None:
        """Writes the remaining lines; gives up after CLOSE_TIME. No line may follow."""
        self._ending = True
        self._wake.put(True)
        self._thread.join(CLOSE_TIME)

    def _run(self) -> None:
        while not self._ending or self._lines:
            if not self._wake.get():
                with suppress(Empty):
                    self._wake.get(timeout=self._batch_time)  # an urgent line ends the batch
            self._scheduled = False  # before the lines are taken: a later one wakes the thread up again
            self._write_all()

    def _write_all(self) -> None:
        lines = self._lines
        while lines:
            batch = [lines.popleft()]
            size = len(batch[0])
            while lines and size + len(lines[0]) <= MAX_WRITE:
                size += len(lines[0])
                batch.append(lines.popleft())
            self.unwritten += self._write(b"".join(batch))
        lost = self.dropped + self.unwritten
        if lost > self._reported and not self._write(self._on_dropped(lost - self._reported)):
            self._reported = lost

    def _write(self, lines: bytes) -> int:
        """Writes lines; drops them if the descriptor can't be written to. Returns the number of lines that
        were not written whole. The next line does not continue one that was written in part."""
        data = b"\n" + lines if self._torn else lines
        size, written = len(data), 0
        while written < size:
            try:
                written += os.write(self._descriptor, data[written:])
            except BlockingIOError:  # another process has made it non-blocking
                select.select((), (self._descriptor,), ())
            except OSError:  # the reader has gone, or the disk is full
                if not written:
                    return lines.count(b"\n")
                self._torn = data[written - 1 : written] != b"\n"
                return data.count(b"\n", written)
        self._torn = False
        return 0
