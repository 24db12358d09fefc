"""Files that get their name when they are complete, and what is written to as it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from pomelo.cli.sink import Sink
from pomelo.client.files import Writable, written_file
from pomelo.output_file import OutputFile
from tests.integration.commands import names

Opener = Callable[[Path], AbstractContextManager[Writable]]
WRITERS = pytest.mark.parametrize("open_output", [OutputFile, Sink, written_file])


def write(open_output: Opener, path: Path, data: bytes, error: Exception | None = None) -> None:
    """Writes data to a path, and then fails if there is an error."""
    with open_output(path) as file:
        file.write(data)
        if error is not None:
            raise error


@WRITERS
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path, open_output: Opener) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    large = bytes(1_000_000)  # more than a pipe holds
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(pipe.read_bytes)
        write(open_output, pipe, large)
        assert reading.result(20) == large
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_all_is_written_if_the_system_takes_a_part_of_it_at_a_time(tmp_path: Path) -> None:
    class Slow:
        def __init__(self, file: Any) -> None:
            self.close, self._write = file.close, file.write

        def write(self, data: memoryview) -> int:
            return int(self._write(data[:3]))

    path = tmp_path / "file"
    with OutputFile(path) as file:
        file._file = Slow(file._file)  # type: ignore[assignment]
        file.write(b"0123456789")
    assert path.read_bytes() == b"0123456789"


@WRITERS
def test_a_link_to_a_device_stays(tmp_path: Path, open_output: Opener) -> None:
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    write(open_output, link, b"x")
    with pytest.raises(ValueError, match="lost"):
        write(open_output, link, b"x", ValueError("lost"))
    assert link.is_char_device()
    assert list(tmp_path.iterdir()) == [link]


@WRITERS
@pytest.mark.parametrize("before", [None, b"before"])
def test_the_target_of_a_symbolic_link_is_replaced_when_the_file_is_complete(
    tmp_path: Path, open_output: Opener, before: bytes | None
) -> None:
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    target.parent.mkdir()
    link.symlink_to("folder/target")
    if before is not None:
        target.write_bytes(before)
    with pytest.raises(ValueError, match="lost"):
        write(open_output, link, b"half", ValueError("lost"))
    assert (target.read_bytes() if target.exists() else None) == before
    write(open_output, link, b"after")
    assert target.read_bytes() == b"after"
    assert link.is_symlink()
    assert [list(tmp_path.iterdir()), list(target.parent.iterdir())] == [[link, target.parent], [target]]


@WRITERS
@pytest.mark.parametrize("name", ["n" * 254, "none/a", ".", "file/a", "loop"])
def test_a_path_that_can_not_be_written_is_refused_by_its_name_before_anything_is_written(
    tmp_path: Path, open_output: Opener, name: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    with pytest.raises(OSError, match=r".") as caught, open_output(path):
        pytest.fail("it was opened")
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert names(tmp_path) == ["file", "loop"]


def test_a_file_of_the_user_beside_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(b"mine")
    write(OutputFile, tmp_path / "a", b"x")
    assert (tmp_path / "a.part").read_bytes() == b"mine"


def test_two_files_of_one_name_are_each_complete(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a") as first:
        first.write(b"one")
        write(OutputFile, tmp_path / "a", b"two")
        first.write(b"one")
    assert (tmp_path / "a").read_bytes() == b"oneone"
    assert names(tmp_path) == ["a"]
