"""A file that gets its name when it is complete, as a command or the client writes it."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self


class OutputFile:
    """A new file that gets the name `path` when it is complete; a device or a pipe is written to as it is.

    A symbolic link stays: its target is replaced. As a context manager it ends the file: as complete, or
    after an exception as incomplete.

    Raises:
        OSError: the file can't be written. The error has `path`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial: Path | None = None
        """None: `path` itself is written to."""
        self._target = path
        with self._named_errors():
            if is_special(path):  # renaming a file to its name would replace it
                self._file = path.open("wb", buffering=0)
                return
            self._target = Path(os.path.realpath(path))
            partial = self._target.with_name(f".{self._target.name}.{secrets.token_hex(4)}.part")
            self._file = partial.open("xb", buffering=0)
            self._partial = partial

    def rename(self, name: str) -> None:
        """Changes the name that the file will get in its folder."""
        self.path, self._target = self.path.with_name(name), self._target.with_name(name)

    def write(self, data: bytes) -> None:
        """Writes all of the bytes, without buffering: closing never waits for the reader of a pipe."""
        rest = memoryview(data)
        with self._named_errors():
            while rest:
                rest = rest[self._file.write(rest) :]

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._file.isatty()

    def commit(self) -> None:
        """Ends a complete file: gives it its name."""
        try:
            with self._named_errors():
                self._file.close()
                if self._partial is not None:
                    self._partial.replace(self._target)
        except OSError:
            self.discard()
            raise

    def discard(self) -> None:
        """Ends an incomplete file: removes it, so that none looks complete."""
        with suppress(OSError):
            self._file.close()
        if self._partial is not None:
            self._partial.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.commit()
        else:
            self.discard()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename, error.filename2 = str(self.path), None
            raise


def is_special(path: Path) -> bool:
    """Whether it exists and is no regular file, but a device or a pipe, for example."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False
