"""Where a command writes what a task has made: stdout, or a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Self

from pomelo.cli.safe_text import visible_lines
from pomelo.cli.terminal import print_line
from pomelo.output_file import OutputFile


class Sink:
    """stdout, or a file that gets its name when it is complete; the name is then printed.

    As a context manager it ends the output: as complete, or after an exception as incomplete. On stdout,
    `end_line` ends the output with a newline.

    Raises:
        OSError: the file can't be written. The error has the name that the user gave.
    """

    def __init__(self, path: Path | None, *, end_line: bool = False) -> None:
        self._file = None if path is None else OutputFile(path)
        self._end_line = end_line
        self._last = b""
        self.size = 0

    def rename(self, name: str) -> None:
        """Changes the name that the file will get in its folder."""
        if self._file is not None:
            self._file.rename(name)

    def write_text(self, text: str) -> None:
        """Writes text without buffering; on a terminal, with escapes for control characters."""
        is_terminal = (self._file or sys.stdout).isatty()
        self.write((visible_lines(text) if is_terminal else text).encode())

    def write(self, data: bytes) -> None:
        """Writes bytes without buffering."""
        if self._file is not None:
            self._file.write(data)
        else:
            _write_stdout(data)
        self._last = data[-1:] or self._last
        self.size += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.commit()
        else:
            self.discard()

    def commit(self) -> None:
        """Ends complete output: gives the file its name and prints it."""
        if self._file is None:
            self._finish_line()
            return
        self._file.commit()
        print_line(str(self._file.path))

    def discard(self) -> None:
        """Ends incomplete output: removes the file, so that none looks complete."""
        if self._file is None:
            self._finish_line()
        else:
            self._file.discard()

    def _finish_line(self) -> None:
        if self._end_line and self._last not in (b"", b"\n"):
            _write_stdout(b"\n")


def _write_stdout(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
