"""Files that callers give: what is small goes into the task, what is large is uploaded in chunks."""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from pomelo.gen.v1.media_pb2 import Media, MediaSource
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest

MAX_INLINE_BYTES = 3 * 1024 * 1024
"""Bytes of audio that are sent in the task; larger audio is uploaded first."""

_CHUNK_BYTES = 256 * 1024

File = bytes | str | os.PathLike[str] | BinaryIO
"""The content of a file, its path, or a file that is open for reading bytes, from its position on."""

Audio = File | Media
"""A file, or what was uploaded or generated before."""


class Upload:
    """A file to upload. `repeatable`: it can be read again."""

    def __init__(self, file: File, content_type: str = "") -> None:
        self._file = Path(file) if isinstance(file, str) else file
        self._content_type = content_type
        self._start: int | None = None
        if isinstance(self._file, (bytes, os.PathLike)):
            self.repeatable = True
        else:
            self.repeatable = self._file.seekable()
            self._start = self._file.tell() if self.repeatable else None

    def size(self) -> int | None:
        """Returns how many bytes it has; None if only reading it can tell."""
        if isinstance(self._file, bytes):
            return len(self._file)
        if isinstance(self._file, os.PathLike):
            return Path(self._file).stat().st_size
        if self._start is None:
            return None
        end = self._file.seek(0, io.SEEK_END)
        self._file.seek(self._start)
        return end - self._start

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Returns the file, open at its start; a file of the caller's stays open at the end.

        Raises:
            OSError: it can't be read.
        """
        if isinstance(self._file, bytes):
            return io.BytesIO(self._file)
        if isinstance(self._file, os.PathLike):
            return Path(self._file).open("rb")
        if self._start is not None:
            self._file.seek(self._start)
        return nullcontext(self._file)

    def requests(self, file: BinaryIO) -> Iterator[UploadMediaRequest]:
        """Yields the messages of the upload of an open file."""
        yield UploadMediaRequest(header=UploadMediaHeader(content_type=self._content_type))
        while chunk := file.read(_CHUNK_BYTES):
            yield UploadMediaRequest(chunk=chunk)


def to_source(audio: Audio, content_type: str) -> MediaSource | Upload:
    """Returns the source of audio, or how to upload it if it is large.

    Raises:
        OSError: it can't be read.
    """
    if isinstance(audio, Media):
        return MediaSource(media_id=audio.id, content_type=content_type)
    upload = Upload(audio, content_type)
    size = upload.size()
    if size is None or size > MAX_INLINE_BYTES:
        return upload
    with upload.open() as file:
        return MediaSource(data=file.read(), content_type=content_type)


@contextmanager
def written_file(to: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    """Yields a file to write to: that of the caller, or a new one that gets its name at the end of the block.

    Raises:
        OSError: it can't be written.
    """
    if not isinstance(to, (str, os.PathLike)):
        yield to
        return
    path = Path(to)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("xb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
