"""The log of a process: all lines go to stderr, in one form."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pomelo.runtime.logs import LimitedHandler
from pomelo.telemetry.lines import RENDERERS, RecordFormatter, Style, timestamp
from pomelo.telemetry.output import LogOutput
from pomelo.telemetry.task_log import TaskLog


class _OutputHandler(logging.Handler):
    """Writes the records of the standard library's loggers; from level WARNING immediately."""

    def __init__(self, output: LogOutput, formatter: RecordFormatter) -> None:
        super().__init__()
        self._output = output
        self._line = formatter.format

    def emit(self, record: logging.LogRecord) -> None:
        self._output.write(self._line(record), urgent=record.levelno >= logging.WARNING)


@contextmanager
def open_log(level: str, style: Style | None, worker: int | None = None) -> Iterator[TaskLog]:
    """Logs to stderr within the context; yields the observer that logs tasks. `level` is a name such as info,
    `style` None: text on a terminal, otherwise JSON. `worker` is the number of this process among several.

    Lines of other libraries are logged from WARNING.
    """
    number = getattr(logging, level.upper())
    render = RENDERERS[style or ("text" if sys.stderr is not None and sys.stderr.isatty() else "json")]
    constant = {} if worker is None else {"worker": worker}

    def dropped(count: int) -> bytes:
        event = f"{count:,} log lines were dropped: stderr was full, or not read fast enough"
        return render({"time": timestamp(time.time()), "level": "error", "event": event, **constant})

    # Without stderr, its descriptor may be that of another file, such as the database.
    descriptor = os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else sys.stderr.fileno()
    output = LogOutput(descriptor, dropped)
    handler = LimitedHandler(_OutputHandler(output, RecordFormatter(render, constant)))
    root, own = logging.getLogger(), logging.getLogger("pomelo")
    levels = root.level, own.level
    root.addHandler(handler)
    root.setLevel(max(number, logging.WARNING))
    own.setLevel(number)
    task_log = TaskLog(
        output.write,
        render,
        number,
        constant,
        lines_dropped=lambda: output.dropped + output.unwritten + handler.suppressed,
    )
    try:
        yield task_log
    finally:
        task_log.close()
        root.removeHandler(handler)
        root.setLevel(levels[0])
        own.setLevel(levels[1])
        handler.close()
        output.close()
