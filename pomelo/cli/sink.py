"""Where a command writes what a task has made: stdout, or a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from pomelo.cli.safe_text import visible_lines
from pomelo.cli.terminal import print_line


class Sink:
    """stdout, or a file that gets its name when it is complete; the name is then printed.

    As a context manager it ends the output: as complete, or after an exception as incomplete. On stdout,
    `end_line` ends the output with a newline.

    Raises:
        OSError: the file can't be written. The error has the name that the user gave.
    """

    def __init__(self, path: Path | None, *, end_line: bool = False) -> None:
        self._path = path
        self._end_line = end_line
        self._partial = path
        # Devices and pipes are written to directly: renaming a file to their name would replace them.
        if path is not None and (path.is_file() or not path.exists()):
            self._partial = path.with_name(path.name + ".part")
        with self._user_path():
            self._file: BinaryIO = sys.stdout.buffer if self._partial is None else self._partial.open("wb")
        self._last = b""
        self.size = 0

    def write_text(self, text: str) -> None:
        """Writes text without buffering; on a terminal, with escapes for control characters."""
        self.write((visible_lines(text) if self._file.isatty() else text).encode())

    def write(self, data: bytes) -> None:
        """Writes bytes without buffering."""
        with self._user_path():
            self._file.write(data)
            self._file.flush()
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
        if self._partial is None or self._path is None:
            self._finish_line()
            return
        try:
            with self._user_path():
                self._file.close()
                if self._partial != self._path:
                    self._partial.replace(self._path)
        except OSError:
            self.discard()
            raise
        print_line(str(self._path))

    def discard(self) -> None:
        """Ends incomplete output: removes the file, so that none looks complete."""
        if self._partial is None:
            self._finish_line()
            return
        with suppress(OSError):
            self._file.close()
        if self._partial != self._path:
            self._partial.unlink(missing_ok=True)

    @contextmanager
    def _user_path(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._path is not None:
                error.filename, error.filename2 = str(self._path), None
            raise

    def _finish_line(self) -> None:
        if self._end_line and self._last not in (b"", b"\n"):
            self._file.write(b"\n")
            self._file.flush()
