"""Logging: tracebacks without messages, and limits on the number of log lines.

The message of an exception may contain a caller's text, a vendor's response or a key. So a log line has only
the exception's type, files and lines, which are enough to find the cause. A caller who can cause one line can
cause millions, so similar lines are limited.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from pomelo.errors import ErrorRow
from pomelo.runtime.repetitions import MAX_LINES, WINDOW, Repetitions

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


MAX_KINDS = 1_000
"""Maximum number of kinds that are counted separately; Pomelo itself has fewer."""

_EXCERPT = 200
"""Characters of a suppressed line that are shown beside the number of suppressed lines."""

_Kind = tuple[str, int, str]


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
        self._repetitions = Repetitions(self._report, MAX_KINDS, _rest, lines, window, monotonic)
        self.lock = self._repetitions.lock  # with two, a thread that reports could wait for one that logs
        self.suppressed = 0
        """Lines that were suppressed since the start."""

    def setFormatter(self, fmt: logging.Formatter | None) -> None:
        self._inner.setFormatter(fmt)

    def emit(self, record: logging.LogRecord) -> None:
        """Passes the record on, or counts it."""
        unlimited = getattr(record, "unlimited", False)
        if unlimited or self._repetitions.admits(_kind(record), lambda: _excerpt(record)):
            self._inner.handle(record)
        else:
            self.suppressed += 1

    def flush(self) -> None:
        self._inner.flush()

    def close(self) -> None:
        """Logs the number of lines that were suppressed so far, and closes the inner handler."""
        self._repetitions.flush()
        self._inner.close()
        super().close()

    def _report(self, kind: _Kind, count: int, text: str) -> None:
        """Logs the number of suppressed lines."""
        name, level, _ = kind
        message, values = "%s … %s similar lines suppressed", (text, f"{count:,}")
        self._inner.handle(logging.LogRecord(name or "pomelo", level, __file__, 0, message, values, None))


def _kind(record: logging.LogRecord) -> _Kind:
    return record.name, record.levelno, str(record.msg) if is_own(record.name) else ""


def _rest(kind: _Kind) -> _Kind:
    return "", kind[1], ""


def _excerpt(record: logging.LogRecord) -> str:
    return record.getMessage().partition("\n")[0][:_EXCERPT]


def is_own(name: str) -> bool:
    """Whether a logger of that name is Pomelo's own."""
    return name == "pomelo" or name.startswith("pomelo.")
