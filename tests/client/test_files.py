"""Files that are uploaded from their position on, and downloads that are complete or absent."""

from __future__ import annotations

import io
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pomelo.client.files import MAX_INLINE_BYTES, Upload, to_source, written_file
from pomelo.gen.v1.media_pb2 import MediaSource
from tests.client.clients import Pipe


def contents(upload: Upload) -> bytes:
    """Returns the bytes of an upload's messages."""
    with upload.open() as file:
        header, *chunks = upload.requests(file)
    assert header.HasField("header")
    return b"".join(one.chunk for one in chunks)


def fail(path: Path, error: BaseException) -> None:
    """Writes half of a download, which then fails."""
    with written_file(path) as file:
        file.write(b"half")
        raise error


def test_a_download_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="lost"):
        fail(tmp_path / "new.png", OSError("lost"))
    assert list(tmp_path.iterdir()) == []


def test_a_download_replaces_a_file_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "old.png"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        fail(path, KeyboardInterrupt())
    assert path.read_bytes() == b"before"
    with written_file(str(path)) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_a_buffer_gets_all_bytes() -> None:
    data = os.urandom(2**20)
    own, other = socket.socketpair()
    own.settimeout(20)  # with a timeout, a socket takes as much as fits into its buffer
    file: Any = own.makefile("wb", buffering=0)
    with own, other, file, ThreadPoolExecutor(1) as pool:
        received = pool.submit(other.recv, len(data), socket.MSG_WAITALL)
        with written_file(file) as target:
            target.write(data)
        own.shutdown(socket.SHUT_WR)
        assert received.result(20) == data


def test_a_pipe_that_does_not_wait_is_refused() -> None:
    reading, writing = os.pipe()
    for end in (reading, writing):
        os.set_blocking(end, False)
    with os.fdopen(reading, "rb", 0) as source, os.fdopen(writing, "wb", 0) as target:
        with pytest.raises(BlockingIOError, match="blocking mode"), written_file(target) as file:
            file.write(bytes(2**20))
        with pytest.raises(BlockingIOError, match="blocking mode"):
            contents(Upload(source))


def test_an_open_file_is_uploaded_from_its_position_each_time_and_stays_open() -> None:
    file = io.BytesIO(b"skipped" + b"sent")
    file.seek(7)
    upload = Upload(file)
    assert (upload.size(), upload.repeatable) == (4, True)
    assert contents(upload) == contents(upload) == b"sent"
    assert not file.closed


def test_a_pipe_is_read_once_and_its_size_is_unknown() -> None:
    upload = Upload(Pipe(b"sent"))
    assert (upload.size(), upload.repeatable) == (None, False)
    assert contents(upload) == b"sent"
    assert isinstance(to_source(Pipe(b"sent"), ""), Upload)


def test_the_path_of_a_pipe_is_read_once_and_its_size_is_unknown(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    upload = Upload(str(pipe))
    assert (upload.size(), upload.repeatable) == (None, False)
    assert isinstance(to_source(pipe, ""), Upload)


def test_audio_of_exactly_the_limit_is_sent_in_the_task() -> None:
    source = to_source(bytes(MAX_INLINE_BYTES), "audio/mpeg")
    assert isinstance(source, MediaSource)
    assert len(source.data) == MAX_INLINE_BYTES
    assert isinstance(to_source(bytes(MAX_INLINE_BYTES + 1), "audio/mpeg"), Upload)
