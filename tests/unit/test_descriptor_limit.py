"""The limit of file descriptors is raised as far as the system allows, and to a maximum."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
from pomelo import process
soft, hard, process._MAX_DESCRIPTORS = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
before = process.descriptor_limit()
print(json.dumps([before, process.raise_descriptor_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "maximum", "raised"),
    [(300, 500, 1_000, 500), (500, 500, 1_000, 500), (300, 500, 400, 400), (450, 500, 400, 450)],
)
def test_the_soft_limit_is_raised_and_never_lowered(soft: int, hard: int, maximum: int, raised: int) -> None:
    command = [sys.executable, "-c", PROGRAM, *map(str, (soft, hard, maximum))]
    printed = subprocess.run(command, capture_output=True, check=True).stdout
    assert json.loads(printed) == [soft, raised, raised, hard]
