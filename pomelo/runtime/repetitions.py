"""Limits the number of similar log lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

KindT = TypeVar("KindT")

MAX_LINES = 10
"""Lines of one kind that are written in a window."""

WINDOW = 60.0
"""Seconds from the first line to the end of its window."""


@dataclass(slots=True)
class _Lines:
    """The lines of one kind in a window, and the text of the first one that is not written."""

    count: int = 0
    text: str = ""


class Repetitions(Generic[KindT]):
    """Says which lines are written: the first of each kind in a window. At its end, `report` gets each kind
    that had more lines, their number and the text of the first of them. It may be called in another thread.

    `max_kinds` are counted separately in a window; a further one is counted as the kind that `rest` returns.
    """

    def __init__(
        self,
        report: Callable[[KindT, int, str], None],
        max_kinds: int,
        rest: Callable[[KindT], KindT],
        lines: int = MAX_LINES,
        window: float = WINDOW,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._max_kinds = max_kinds
        self._rest = rest
        self._limit = lines
        self._window = window
        self._monotonic = monotonic
        self._kinds: dict[KindT, _Lines] = {}
        self._ends = 0.0
        self._timer: threading.Timer | None = None
        self.lock = threading.RLock()
        """Reentrant: a garbage collection may log a line while its thread has the lock."""

    def admits(self, kind: KindT, text: Callable[[], str] = str) -> bool:
        """Whether a line is written; otherwise it is counted. `text` returns what `report` gets of it."""
        with self.lock:
            now = self._monotonic()
            if now >= self._ends:
                self._ends = now + self._window
                self._end_window()
            if kind not in self._kinds and len(self._kinds) >= self._max_kinds:
                kind = self._rest(kind)
            lines = self._kinds.setdefault(kind, _Lines())
            lines.count += 1
            if lines.count <= self._limit:
                return True
            if self._timer is None:
                self._timer = threading.Timer(self._ends - now, self.flush)
                self._timer.daemon = True
                self._timer.start()
            if lines.count == self._limit + 1:
                lines.text = text()
            return False

    def flush(self) -> None:
        """Ends the window."""
        with self.lock:
            self._ends = 0.0
            self._end_window()

    def _end_window(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        kinds, self._kinds = self._kinds, {}
        for kind, lines in kinds.items():
            if lines.count > self._limit:
                self._report(kind, lines.count - self._limit, lines.text)
