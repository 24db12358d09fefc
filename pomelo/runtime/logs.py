"""Logging: tracebacks without messages, and limits on the number of log lines.

The message of an exception may contain a caller's text, a vendor's response or a key. So a log line has only
the exception's type, files and lines, which are enough to find the cause. A caller who can cause one line can
cause millions, so similar lines are limited.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from pomelo.errors import ErrorRow

_MAX_REMEMBERED = 1_000
"""Maximum number of different errors that are remembered."""


class UnexpectedErrors:
    """Logs unexpected errors. Errors of the same type and line of code are logged at most once a
    minute, so that a repeated error does not fill the log."""

    def __init__(self, log: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._logged_at: dict[tuple[type[BaseException], str, int], float] = {}

    def log(self, description: str, error: BaseException) -> None:
        """Logs `description` with the traceback of `error`, unless a similar error was logged recently."""
        identity = (type(error), *_raised_at(error))
        now = self._clock()
        if identity in self._logged_at and now < self._logged_at[identity] + 60.0:
            return
        if len(self._logged_at) >= _MAX_REMEMBERED:
            self._logged_at.clear()
        self._logged_at[identity] = now
        self._log.error("%s\n%s", description, format_trace(error))


def _raised_at(error: BaseException) -> tuple[str, int]:
    """Returns the file and line of the innermost frame; empty and 0 without a traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return ("", 0) if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)


def format_trace(error: BaseException) -> str:
    """Returns the frames and the type of an exception as text, after those of its causes."""
    return "\n".join(_lines(error, set()))


def _lines(error: BaseException, seen: set[int]) -> list[str]:
    seen.add(id(error))
    lines: list[str] = []
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    for other in (*inner, cause):
        if other is not None and id(other) not in seen:
            lines += [*_lines(other, seen), "which led to"]
    lines += "".join(traceback.format_tb(error.__traceback__)).splitlines()
    kind = type(error)
    row = getattr(error, "row", None)  # a plug-in's subclass of PomeloError may lack it
    code = f": {row.code}" if isinstance(row, ErrorRow) else ""
    return [*lines, f"{kind.__module__}.{kind.__qualname__}{code}"]


MAX_LINES = 10
"""Lines of one kind that are logged in a window."""

WINDOW = 60.0
"""Seconds from the first line of a kind to the end of its window."""

MAX_KINDS = 1_000
"""Maximum number of kinds that are counted separately; Pomelo itself has fewer."""

_EXCERPT = 200
"""Characters of a suppressed line that are shown beside the number of suppressed lines."""

_Kind = tuple[str, int, str]


@dataclass(slots=True, eq=False)
class _Lines:
    """The lines of one kind in a window, which ends at `ends` on the monotonic clock."""

    ends: float
    count: int = 0
    suppressed: int = 0
    text: str = ""
    timer: threading.Timer | None = None


class LimitedHandler(logging.Handler):
    """Passes on to `inner` the first lines of each kind in a window, then one line with the number of
    suppressed ones.

    Pomelo's lines are of one kind if they have the same message apart from its values. Lines of a library,
    whose messages may all differ, are of one kind if they have the same logger and level. A line with
    `extra={"unlimited": True}` is always passed on: each one counts, and no caller can cause many.
    """

    def __init__(
        self,
        inner: logging.Handler,
        lines: int = MAX_LINES,
        window: float = WINDOW,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._inner = inner
        self._limit = lines
        self._window = window
        self._monotonic = monotonic
        self._kinds: dict[_Kind, _Lines] = {}
        self.suppressed = 0
        """Lines that were suppressed since the start."""

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        self._inner.setFormatter(fmt)

    def emit(self, record: logging.LogRecord) -> None:
        """Passes the record on, or counts it."""
        if getattr(record, "unlimited", False):
            self._inner.handle(record)
            return
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
        self.suppressed += 1
        if lines.timer is None:
            lines.text = record.getMessage().partition("\n")[0][:_EXCERPT]
            lines.timer = threading.Timer(self._window, self._window_ended, (kind, lines))
            lines.timer.daemon = True
            lines.timer.start()

    def flush(self) -> None:
        self._inner.flush()

    def close(self) -> None:
        """Logs the number of lines that were suppressed so far, and closes the inner handler."""
        self.acquire()
        try:
            for kind, lines in self._kinds.items():
                self._report(kind, lines)
            self._kinds.clear()
        finally:
            self.release()
        self._inner.close()
        super().close()

    def _window_ended(self, kind: _Kind, lines: _Lines) -> None:
        self.acquire()
        try:
            self._report(kind, lines)
        finally:
            self.release()

    def _report(self, kind: _Kind, lines: _Lines) -> None:
        """Logs the number of suppressed lines, once."""
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
    return record.name, record.levelno, str(record.msg) if is_own(record.name) else ""


def is_own(name: str) -> bool:
    """Whether a logger of that name is Pomelo's own."""
    return name == "pomelo" or name.startswith("pomelo.")
