"""What is logged of a failure that nobody foresaw: where it came from, and nothing of what it says.

Both doors log with it. What an exception says may be a caller's words, a vendor's answer or a header with a
key in it, whoever wrote the code that raised it; files, lines and types are enough to find the fault.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable

from pomelo.errors import ErrorRow

_KINDS = 1_000
"""The most kinds of failure that are remembered."""


class Unforeseen:
    """Logs unexpected failures. Each kind (exception type and the line that raised it) is logged at
    most once in `every` seconds, so that a repeated failure does not fill the log."""

    def __init__(
        self, log: logging.Logger, *, every: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log = log
        self._every = every
        self._clock = clock
        self._told: dict[tuple[type[BaseException], str, int], float] = {}

    def tell(self, what: str, error: BaseException) -> None:
        """Logs `what` with the trace of `error`, unless the same kind was logged recently."""
        kind = (type(error), *_raised_at(error))
        now = self._clock()
        if kind in self._told and now < self._told[kind] + self._every:
            return
        if len(self._told) >= _KINDS:
            self._told.clear()
        self._told[kind] = now
        self._log.error("%s\n%s", what, trace(error))


def _raised_at(error: BaseException) -> tuple[str, int]:
    """The file and line of the innermost frame; empty and 0 if the error has no traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return ("", 0) if frame is None else (frame.tb_frame.f_code.co_filename, frame.tb_lineno)


def trace(error: BaseException) -> str:
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
