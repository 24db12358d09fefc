"""Files that callers give: what is small goes into the task, what is large is uploaded in chunks."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Protocol

from pomelo.client.pipes import OpenPipe, blocking_pipe, is_pipe, waiting_read
from pomelo.gen.v1.media_pb2 import Media, MediaSource
from pomelo.gen.v1.media_service_pb2 import UploadMediaHeader, UploadMediaRequest
from pomelo.output_file import OutputFile

MAX_INLINE_BYTES = 3 * 1024 * 1024
"""Bytes of audio that are sent in the task; larger audio is uploaded first."""

_CHUNK_BYTES = 256 * 1024

File = bytes | str | os.PathLike[str] | IO[bytes]
"""The content of a file, its path, or a file that is open for reading bytes, from its position on."""

Audio = File | Media
"""A file, or what was uploaded or generated before."""


class Upload:
    """A file to upload. `repeatable`: it can be read again.

    Raises:
        TypeError: it is no file.
    """

    def __init__(self, file: File, content_type: str = "") -> None:
        if not isinstance(file, (bytes, str, os.PathLike)) and (
            isinstance(file, io.TextIOBase) or not hasattr(file, "read")
        ):
            raise TypeError(
                f"A file is bytes, a path, or open for reading bytes, not of the type {type(file).__name__}"
            )
        self._file = Path(file) if isinstance(file, str) else file
        self._content_type = content_type
        self._start = 0
        self.is_pipe = is_pipe(self._file)
        if isinstance(self._file, bytes):
            self.repeatable = True
        elif isinstance(self._file, os.PathLike):
            self.repeatable = not self.is_pipe
        else:
            self.repeatable = self._file.seekable()
            if self.repeatable:
                self._start = self._file.tell()

    def size(self) -> int | None:
        """Returns how many bytes it has; None if only reading it can tell."""
        if not self.repeatable:
            return None
        if isinstance(self._file, bytes):
            return len(self._file)
        if isinstance(self._file, os.PathLike):
            return Path(self._file).stat().st_size
        end = self._file.seek(0, io.SEEK_END)
        self._file.seek(self._start)
        return end - self._start

    def open(self) -> AbstractContextManager[IO[bytes]]:
        """Returns the file, open at its start; a file of the caller's stays open at the end. Opening a pipe
        waits for its writer.

        Raises:
            OSError: it can't be read.
        """
        if isinstance(self._file, bytes):
            return io.BytesIO(self._file)
        if isinstance(self._file, os.PathLike):
            # Without a buffer, closing does not wait for a read in another thread.
            return Path(self._file).open("rb", buffering=0)
        if self.repeatable:
            self._file.seek(self._start)
        return nullcontext(self._file)

    def requests(self, file: IO[bytes]) -> Iterator[UploadMediaRequest]:
        """Yields the messages of the upload of an open file.

        Raises:
            OSError: it can't be read.
        """
        yield UploadMediaRequest(header=UploadMediaHeader(content_type=self._content_type))
        read = waiting_read(file)
        while chunk := read(_CHUNK_BYTES):
            yield UploadMediaRequest(chunk=chunk)
        if chunk is None:  # else the upload would end here, and look complete
            raise _not_blocking()


def _not_blocking() -> BlockingIOError:
    return BlockingIOError(errno.EAGAIN, "The file does not wait for data. Open it in blocking mode")


def to_source(audio: Audio, content_type: str) -> MediaSource | Upload:
    """Returns the source of audio, or how to upload it if it is large.

    Raises:
        OSError: it can't be read.
        TypeError: it is no audio.
    """
    if isinstance(audio, Media):
        return MediaSource(media_id=audio.id, content_type=content_type)
    upload = Upload(audio, content_type)
    size = upload.size()
    if size is None or size > MAX_INLINE_BYTES:
        return upload
    with upload.open() as file:
        return MediaSource(data=file.read(), content_type=content_type)


def media_id(media: Media | str) -> str:
    """Returns the id of stored media.

    Raises:
        TypeError: it is neither media nor an id.
    """
    if isinstance(media, str):
        return media
    if not isinstance(media, Media):
        raise TypeError(
            f"Stored media is a Media, such as result.media, or its id, not {type(media).__name__}"
        )
    return media.id


class Writable(Protocol):
    """A file that bytes can be written to."""

    def write(self, data: bytes, /) -> object:
        """Writes the bytes."""


def written_file(to: str | os.PathLike[str] | IO[bytes]) -> AbstractContextManager[Writable]:
    """Returns a block with a file to write: the caller's, or a new one that gets its name at the end.

    Raises:
        OSError: it can't be written.
        TypeError: it is no file.
    """
    if isinstance(to, (str, os.PathLike)):
        return _open_output(Path(to))
    if not hasattr(to, "write"):
        raise TypeError(f"A file is a path, or open for writing bytes, not of the type {type(to).__name__}")
    if (pipe := blocking_pipe(to)) is not None:
        return nullcontext(OpenPipe(to, pipe))
    return nullcontext(_Unbuffered(to) if isinstance(to, io.RawIOBase) else to)


class _Unbuffered:
    """A file without a buffer: a single write may take a part of the bytes."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def write(self, data: bytes, /) -> None:
        rest = memoryview(data)
        while rest:
            written = self._file.write(rest)
            if written is None:
                raise _not_blocking()
            rest = rest[written:]


@contextmanager
def _open_output(path: Path) -> Iterator[Writable]:
    with OutputFile(path) as file:
        yield file
