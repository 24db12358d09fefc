"""Reads the bytes of a stored media file, wherever it is stored."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol, Self

from pomelo.errors import PomeloError


class Reader(Protocol):
    """The bytes of a media file; a context manager that closes it."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def skip(self, size: int) -> None:
        """Skips the next `size` bytes.

        Raises:
            PomeloError: store_unavailable.
        """

    async def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; empty at the end.

        Raises:
            PomeloError: store_unavailable.
        """


class FileReader:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def skip(self, size: int) -> None:
        try:
            self._file.seek(size, os.SEEK_CUR)
        except OSError as error:
            raise PomeloError("store_unavailable") from error

    async def read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except OSError as error:
            raise PomeloError("store_unavailable") from error
