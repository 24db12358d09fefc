"""Importing Pomelo and printing its help are fast, and an idle server uses little memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.processor import slowness
from tests.serving import serve_interpreter

MAX_IMPORT_SECONDS = 0.1
MAX_HELP_SECONDS = 0.3


def seconds(*command: str) -> float:
    """Returns the CPU seconds of a command: the minimum of five runs, so that a busy machine makes no test
    fail."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(["-c", "import pomelo"], MAX_IMPORT_SECONDS), (["-m", "pomelo.cli", "--help"], MAX_HELP_SECONDS)],
    ids=["import pomelo", "pomelo --help"],
)
def test_it_starts_within_the_limit(arguments: Sequence[str], limit: float) -> None:
    assert seconds(sys.executable, *arguments) < limit * slowness()


# For the same modules, Python 3.14 needs about 10 MB more than 3.11 to 3.13.
MAX_IDLE_BYTES = (90 if sys.version_info < (3, 14) else 100) * 1024 * 1024


async def test_an_idle_server_uses_little_memory(tmp_path: Path) -> None:
    async with serve_interpreter(tmp_path, POMELO_ADMIN="127.0.0.1:0") as served:
        assert psutil.Process(served.pid).memory_info().rss < MAX_IDLE_BYTES
