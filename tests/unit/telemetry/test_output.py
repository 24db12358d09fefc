"""Log lines are written in a thread: whole, in order, in batches, and never by the caller."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from pomelo.telemetry import output
from pomelo.telemetry.output import MAX_WAITING, MAX_WRITE, LogOutput
from tests.waiting import until

HOUR = 3600.0


@pytest.fixture(name="pipe")
def _pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def report(count: int) -> bytes:
    """The line about dropped lines."""
    return b"dropped %d\n" % count


def read(descriptor: int, size: int) -> bytes:
    """Reads exactly so many bytes."""
    data = b""
    while len(data) < size:
        data += os.read(descriptor, size - len(data))
    return data


def test_an_urgent_line_is_written_immediately_after_those_before_it(pipe: tuple[int, int]) -> None:
    out = LogOutput(pipe[1], report, batch_time=HOUR)
    out.write(b"one\n")
    out.write(b"two\n", urgent=True)
    assert read(pipe[0], 8) == b"one\ntwo\n"
    out.close()


def test_other_lines_are_written_soon(pipe: tuple[int, int]) -> None:
    out = LogOutput(pipe[1], report)
    for line in (b"one\n", b"two\n"):
        out.write(line)
        assert read(pipe[0], 4) == line
    out.close()


def test_the_last_lines_are_written_at_the_end(pipe: tuple[int, int]) -> None:
    out = LogOutput(pipe[1], report, batch_time=HOUR)
    out.write(b"one\n")
    out.close()
    assert read(pipe[0], 4) == b"one\n"
    assert not out._thread.is_alive()


def test_each_write_has_whole_lines_and_is_not_larger_than_a_pipe_takes_in_one_write() -> None:
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lines = [b"%d %s\n" % (number, b"x" * (number % 700)) for number in range(200)]
    lines[50] = b"y" * 10_000 + b"\n"
    with reader, writer:
        out = LogOutput(writer.fileno(), report)
        for line in lines:
            out.write(line)
        packets: list[bytes] = []
        while sum(map(len, packets)) < sum(map(len, lines)):
            packets.append(reader.recv(20_000))
        out.close()
    assert b"".join(packets) == b"".join(lines)
    assert all(packet.endswith(b"\n") for packet in packets)
    assert all(len(packet) <= MAX_WRITE for packet in packets if packet != lines[50])
    assert len(packets) < len(lines) / 2


def test_a_reader_that_stalls_blocks_no_writer_and_the_dropped_lines_are_counted(
    pipe: tuple[int, int],
) -> None:
    out = LogOutput(pipe[1], report)
    line = b"x" * 999 + b"\n"
    sent = 2 * MAX_WAITING
    for _ in range(sent):
        out.write(line)
    data = b""
    while not data.endswith(b"\n") or b"dropped" not in data:
        data += os.read(pipe[0], 65536)
    written, dropped = data.count(line), int(data.split(b"dropped ")[1])
    assert written + dropped == sent
    assert dropped > MAX_WAITING // 2
    out.close()


def test_each_dropped_line_is_reported_once(pipe: tuple[int, int]) -> None:
    out = LogOutput(pipe[1], report, batch_time=HOUR)
    for dropped in (3, 5):
        out.write(b"first\n", urgent=True)  # wakes the thread up
        assert read(pipe[0], 6) == b"first\n"
        out.dropped += dropped
        out.write(b"last\n", urgent=True)
        assert read(pipe[0], 5 + 10) == b"last\n" + report(dropped)
    out.close()


async def test_lines_that_a_full_disk_does_not_take_are_reported_when_it_has_space(
    pipe: tuple[int, int],
) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    out = LogOutput(full, report, batch_time=HOUR)
    out.write(b"lost\n" * 4, urgent=True)
    await until(lambda: out.unwritten)
    os.dup2(pipe[1], full)
    out.write(b"next\n", urgent=True)
    assert sorted(read(pipe[0], 5 + 10).splitlines()) == [b"dropped 4", b"next"]
    out.close()
    os.close(full)
    assert (out.dropped, out.unwritten) == (0, 4)


async def test_a_line_does_not_continue_one_that_was_written_in_part(pipe: tuple[int, int]) -> None:
    reader, writer = os.pipe()
    out = LogOutput(writer, report, batch_time=HOUR)
    out.write(b"whole\n" + b"x" * 1_000_000 + b"\n", urgent=True)
    assert read(reader, 6) == b"whole\n"
    os.close(reader)  # after what the pipe has taken
    await until(lambda: out.unwritten)
    os.dup2(pipe[1], writer)
    out.write(b"next\n", urgent=True)
    end, *lines = read(pipe[0], 6 + 10).splitlines()
    assert (end, sorted(lines)) == (b"", [b"dropped 1", b"next"])
    out.close()
    os.close(writer)


def test_closing_gives_up_on_a_reader_that_stalls(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "CLOSE_TIME", 0.05)
    out = LogOutput(pipe[1], report)
    for _ in range(200):
        out.write(b"x" * 999 + b"\n")
    out.close()
    left = 200 * 1000  # all of it: the descriptor will be another file's
    while left:
        left -= len(os.read(pipe[0], 1_000_000))


def test_lines_after_a_reader_has_gone_are_dropped_without_an_error() -> None:
    reader, writer = os.pipe()
    out = LogOutput(writer, report)
    os.close(reader)
    out.write(b"one\n", urgent=True)
    out.close()
    os.close(writer)


def test_a_non_blocking_descriptor_is_waited_for(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    out = LogOutput(pipe[1], report)
    lines = b"".join(b"%07d\n" % number for number in range(8_000)) * 4
    for at in range(0, len(lines), 8_000):
        out.write(lines[at : at + 8_000])
    assert read(pipe[0], len(lines)) == lines
    out.close()
