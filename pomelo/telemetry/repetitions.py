"""Limits the log lines of calls that no provider was called for: no limit of a plan bounds their number."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pomelo.runtime.logs import MAX_LINES, WINDOW

MAX_KINDS = 10_000
"""Accounts and codes that are counted separately in a window; the accounts beyond it are counted together."""


class Repetitions:
    """Says which lines are written: the first of each account and code in a window. `report` gets an account
    (empty: all further ones), a code and the number of the other lines, at the end of a window that had some.
    It may be called in another thread."""

    def __init__(
        self,
        report: Callable[[str, str, int], None],
        lines: int = MAX_LINES,
        window: float = WINDOW,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._limit = lines
        self._window = window
        self._monotonic = monotonic
        self._counts: dict[tuple[str, str], int] = {}
        self._ends = 0.0
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def admits(self, account: str, code: str) -> bool:
        """Whether a line is written; otherwise it is counted."""
        with self._lock:
            now = self._monotonic()
            if now >= self._ends:
                self._end_window()
                self._ends = now + self._window
            kind = account, code
            if kind not in self._counts and len(self._counts) >= MAX_KINDS:
                kind = "", code
            count = self._counts[kind] = self._counts.get(kind, 0) + 1
            if count > self._limit and self._timer is None:
                self._timer = threading.Timer(self._ends - now, self.flush)
                self._timer.daemon = True
                self._timer.start()
            return count <= self._limit

    def flush(self) -> None:
        """Ends the window."""
        with self._lock:
            self._end_window()
            self._ends = 0.0

    def _end_window(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counts, self._counts = self._counts, {}
        for (account, code), count in counts.items():
            if count > self._limit:
                self._report(account, code, count - self._limit)
