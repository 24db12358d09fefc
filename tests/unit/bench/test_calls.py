"""The counter of function calls counts exactly, and gives the same figure twice."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from bench.calls import count_calls
from bench.processes import module


async def counted(folder: Path, program: str) -> int:
    """Returns the calls of a program, which takes no arguments."""
    (folder / "program.py").write_text(program)
    file = folder / "count"
    file.write_bytes(bytes(8))
    process = await asyncio.create_subprocess_exec(
        *module("bench.calls", "--profile", str(file), "program"),
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=Path(__file__).parents[3],
    )
    assert await process.wait() == 0
    return int.from_bytes(file.read_bytes(), "little")


async def test_the_calls_of_all_threads_are_counted_and_those_of_functions_in_c_are_not(
    tmp_path: Path,
) -> None:
    program = (
        "import threading\n"
        "def called(): len('')\n"
        "def work():\n"
        "    for _ in range({}): called()\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "work()\n"
    )
    few, many = [await counted(tmp_path, program.format(count)) for count in (10, 110)]
    assert abs(many - few - 200) <= 20  # the waiting of the threads makes some more or fewer


BOUNDS = {
    "pomelo REST whole": 412,
    "pomelo REST stream": 18,
    "pomelo gRPC whole": 490,
    "pomelo gRPC stream": 26,
}
"""Calls of a request, or of an event of a stream, some 5 % (of a stream 20 %, whose packets differ) above what
was counted last. Lower a bound when a change makes fewer; a change that needs more has to be worth it."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", BOUNDS)
async def test_a_request_makes_no_more_calls_than_it_did(scenario: str) -> None:
    counts: list[float] = []
    while not counts or min(counts) > BOUNDS[scenario]:
        assert len(counts) < 3, counts  # a busy machine can only add calls
        counts.append(await count_calls(scenario, requests=20))


@pytest.mark.timeout(300)
async def test_a_request_makes_the_same_number_of_calls_in_two_servers() -> None:
    counts = [await count_calls("pomelo REST whole", requests=20)]
    while not any(count == pytest.approx(counts[-1], rel=0.02) for count in counts[:-1]):
        assert len(counts) < 4, counts  # a busy machine can only add calls
        counts.append(await count_calls("pomelo REST whole", requests=20))
    assert counts[-1] > await count_calls("aiohttp REST whole", requests=20)
