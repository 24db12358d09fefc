"""Logs: unexpected failures without what they quote, and a limit on the number of log lines.

The message of an exception may contain a caller's words, a vendor's answer or a key, whoever raised it. So a
log line names the exception's type, files and lines, which are enough to find the fault. A caller who can
cause one line can cause millions, so lines of a kind are limited.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable

from pomelo.errors import ErrorRow

_KINDS = 1_000
"""The most kinds of failure that are remembered."""


class UnexpectedErrors:
    """Logs unexpected failures. Each kind (exception type and the line that raised it) is logged at
    most once in `every` seconds, so that a repeated failure does not fill the log."""

    def __init__(
        self, log: logging.Logger, *, every: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._every = every
        self._clock = clock
        self._told: dict[tuple[type[BaseException], str, int], float] = {}

    def log(self, what: str, error: BaseException) -> None:
        """Logs `what` with the trace of `error`, unless the same kind was logged recently."""
        kind = (type(error), *_raised_at(error))
        now = self._clock()
        if kind in self._told and now < self._told[kind] + self._every:
            return
        if len(self._told) >= _KINDS:
            self._told.clear()
        self._told[kind] = now
        self._log.error("%s\n%s", what, format_trace(error))


def _raised_at(error: BaseException) -> tuple[str, int]:
    """The file and line of the innermost frame; empty and 0 if the error has no traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return ("", 0) if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)


def format_trace(error: BaseException) -> str:
    """The frames and the type of an exception, after those of what led to it; lines of text."""
    return "\n".join(_lines(error, set()))


def _lines(error: BaseException, seen: set[int]) -> list[str]:
    seen.add(id(error))
    lines: list[str] = []
    led = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (*inner, led):
        if other is not None and id(other) not in seen:
            lines += [*_lines(other, seen), "which led to"]
    lines += "".join(traceback.format_tb(error.__traceback__)).splitlines()
    kind = type(error)
    row = getattr(error, "row", None)  # a plug-in's own subclass of PomeloError may lack it
    own = f": {row.code}" if isinstance(row, ErrorRow) else ""
    return [*lines, f"{kind.__module__}.{kind.__qualname__}{own}"]


LINES = 10
"""Lines of a kind that are written in a window."""

WINDOW = 60.0
"""Seconds from the first line of a kind to the end of its window."""

MAX_KINDS = 1_000
"""The most kinds that are counted separately; Pomelo itself has fewer, whatever its libraries log."""

_TEXT = 200
"""Characters of a suppressed line that are shown beside their number."""

_Kind = tuple[str, int, str]


class _Lines:
    """The lines of one kind in a window; `ends` is on the monotonic clock."""

    __slots__ = ("count", "ends", "suppressed", "text", "timer")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.count = 0
        self.suppressed = 0
        self.text = ""
        self.timer: threading.Timer | None = None


class LimitedHandler(logging.Handler):
    """Passes records to `inner`: the first lines of each kind in a window, then one line with the number
    of suppressed ones.

    A kind of Pomelo's own is a message without its values; of a library, whose messages may be all
    different, it is its logger and level.
    """

    def __init__(
        self,
        inner: logging.Handler,
        lines: int = LINES,
        window: float = WINDOW,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._inner = inner
        self._limit = lines
        self._window = window
        self._monotonic = monotonic
        self._kinds: dict[_Kind, _Lines] = {}

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        """Sets how the inner handler writes a record."""
        self._inner.setFormatter(fmt)

    def emit(self, record: logging.LogRecord) -> None:
        """Passes the record on, or counts it."""
        kind = _kind(record)
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind = ("", record.levelno, "")
        now = self._monotonic()
        lines = self._kinds.get(kind)
        if lines is None or lines.ends <= now:
            if lines is not None:
                self._report(kind, lines)
            lines = self._kinds[kind] = _Lines(now + self._window)
        lines.count += 1
        if lines.count <= self._limit:
            self._inner.handle(record)
            return
        lines.suppressed += 1
        if lines.timer is None:
            lines.text = record.getMessage().partition("\n")[0][:_TEXT]
            lines.timer = threading.Timer(self._window, self._late, (kind, lines))
            lines.timer.daemon = True
            lines.timer.start()

    def flush(self) -> None:
        """Flushes the inner handler."""
        self._inner.flush()

    def close(self) -> None:
        """Logs what was suppressed so far, and closes the inner handler."""
        self.acquire()
        try:
            for kind, lines in self._kinds.items():
                self._report(kind, lines)
            self._kinds.clear()
        finally:
            self.release()
        self._inner.close()
        super().close()

    def _late(self, kind: _Kind, lines: _Lines) -> None:
        self.acquire()
        try:
            self._report(kind, lines)
        finally:
            self.release()

    def _report(self, kind: _Kind, lines: _Lines) -> None:
        """Logs once how many lines were suppressed."""
        if lines.timer is not None:
            lines.timer.cancel()
        count, lines.suppressed = lines.suppressed, 0
        if count:
            name, level, _ = kind
            self._inner.handle(
                logging.LogRecord(
                    name or "pomelo",
                    level,
                    __file__,
                    0,
                    "%s … %s similar lines suppressed",
                    (lines.text, f"{count:,}"),
                    None,
                )
            )


def _kind(record: logging.LogRecord) -> _Kind:
    own = record.name == "pomelo" or record.name.startswith("pomelo.")
    return record.name, record.levelno, str(record.msg) if own else ""
