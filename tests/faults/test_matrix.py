"""Every fault of every vendor, through the running app with a live key, over both protocols, as a table.

`pytest tests/faults/test_matrix.py -s` prints the table; POMELO_MATRIX names a file to write it to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.matrix import HEAD, MODELS, Block, Row, run_block
from tests.providers.subjects import SUBJECTS

WRITE_TO = os.environ.get("POMELO_MATRIX")
"""Read on import: a fixture removes the variable from the environment of the tests."""

BLOCKS = [Block(subject, job) for subject in SUBJECTS if subject.name in MODELS or len(subject.jobs) > 1
          for job in subject.jobs]  # fmt: skip


@pytest.fixture(name="table", scope="module")
def _table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    lines = [HEAD, *map(str, rows), f"{len(rows)} runs"]
    text = "\n".join(lines)
    print(f"\n{text}")  # noqa: T201 - shown by -s
    if WRITE_TO:
        Path(WRITE_TO).write_text(text + "\n")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
async def test_every_fault_is_the_same_error_over_both_protocols_and_leaves_nothing(
    block: Block, table: list[Row], tmp_path: Path
) -> None:
    rows, problems = await run_block(block, tmp_path)
    table += rows
    assert not problems, "\n".join(problems)


def test_every_vendor_and_task_type_is_in_the_matrix() -> None:
    assert len(BLOCKS) == 9
    assert {block.model for block in BLOCKS} == set(MODELS.values())
