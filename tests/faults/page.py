"""docs/faults.md, made of the table: `python -m tests.faults.page` writes it."""

from __future__ import annotations

from pathlib import Path

from pomelo.testing.faults import FAULTS, TASK_TYPES, unsupported_faults
from pomelo.testing.suite import cases
from tests.faults.test_matrix import BLOCKS
from tests.providers.subjects import SUBJECTS

PLACE = Path(__file__).parents[2] / "docs" / "faults.md"

_HEAD = """\
# What can go wrong at a vendor

What a caller hears when a vendor fails, fault by fault. The table is `pomelo.testing.faults`; this page is made
of it by `python -m tests.faults.page`, and a test compares them.

It is checked twice:

* **Each provider alone**: `pomelo.testing.suite`, {cases:,} cases over the built-in providers
  (`pytest tests/providers/test_suite.py`). Beside the code each case looks at what an error shows, at how long
  it takes, at connections, tasks and files that are left, and at whether the next task has a good answer.
* **Through the running app**, with a live key: {runs:,} runs, {faults} faults and a good answer at
  {blocks} pairs of a vendor and a kind of task, whole and streamed, over gRPC and REST. Each has the code and
  the status of its row in `pomelo/errors.py`; a stream that is cut has no `[DONE]`, or a status that is not OK;
  a failed whole task delivers and costs nothing, a stream what came before; nothing is left of either.
  `pytest tests/faults/test_matrix.py -s` prints every run with its outcome, its time and the bytes that were
  delivered and billed; `POMELO_MATRIX=FILE` writes them to a file.

`ok` is a good answer in spite of the fault. The codes are those after all retries: each request meets the same
fault. A dash: it can't be.

| fault | what happens | whole | streamed | only with |
|---|---|---|---|---|
"""

_LEFT_OUT = """
## Left out

Where a vendor can't have a fault of its own words, and why.

| vendor | kind | fault | because |
|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    # A good answer is asked for four times; a fault twice for each of whole and streamed that can have it.
    runs = sum(4 + sum(2 * len(block.hows(fault)) for fault in block.faults()) for block in BLOCKS)
    total = sum(len(cases(subject)) for subject in SUBJECTS)
    text = _HEAD.format(cases=total, runs=runs, faults=len(FAULTS), blocks=len(BLOCKS))
    for fault in FAULTS:
        whole = "-" if "whole" in fault.unsupported else fault.whole
        stream = "-" if "stream" in fault.unsupported else fault.stream
        kinds = [kind.replace("_", " ") for kind in TASK_TYPES if kind not in fault.unsupported]
        only = "" if len(kinds) == len(TASK_TYPES) else ", ".join(kinds)
        text += f"| {fault.name} | {fault.description} | {whole} | {stream} | {only} |\n"
    text += _LEFT_OUT
    for block in BLOCKS:
        for (name, stream), why in unsupported_faults(block.subject.protocol, block.kind).items():
            fault = next(fault for fault in FAULTS if fault.name == name)
            if not stream and block.kind not in fault.unsupported and "whole" not in fault.unsupported:
                text += f"| {block.vendor} | {block.kind.replace('_', ' ')} | {name} | {why} |\n"
    return text


if __name__ == "__main__":
    PLACE.write_text(page())
