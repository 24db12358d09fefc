"""Pomelo starts light: importing it and asking for help cost little."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.serving import serve

IMPORT_MOST = 0.1
HELP_MOST = 0.3


def seconds(*command: str) -> float:
    """CPU seconds of a command: the least of five runs, so that a busy machine fails nobody."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


@pytest.mark.parametrize(
    ("arguments", "most"),
    [(["-c", "import pomelo"], IMPORT_MOST), (["-m", "pomelo.cli", "--help"], HELP_MOST)],
    ids=["import pomelo", "pomelo --help"],
)
def test_it_starts_within(arguments: Sequence[str], most: float) -> None:
    assert seconds(sys.executable, *arguments) < most


IDLE_MOST = 90 * 1024 * 1024


async def test_an_idle_server_is_small(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        assert psutil.Process(served.pid).memory_info().rss < IDLE_MOST
