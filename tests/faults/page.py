"""Generates docs/faults.md from the table of faults: `python -m tests.faults.page` writes it."""

from __future__ import annotations

from pathlib import Path

from pomelo.testing.faults import FAULTS, TASK_TYPES, unsupported_faults
from pomelo.testing.suite import cases
from tests.faults.test_matrix import BLOCKS
from tests.providers.subjects import SUBJECTS

PATH = Path(__file__).parents[2] / "docs" / "faults.md"

_HEAD = """\
# Faults of vendors

The error code that a caller gets for each fault of a vendor. The table is defined in
`pomelo.testing.faults`. `python -m tests.faults.page` writes this page, and a test compares the two.

The table is checked in two ways:

* **Each provider alone**, by `pomelo.testing.suite`: {cases:,} cases over the built-in providers
  (`pytest tests/providers/test_suite.py`). Each case checks the error code, what the error's message reveals,
  the time it takes, that no connection, task or file is left, and that the next task gets a good answer.
* **Through the running app**, with a live key: {runs:,} runs, which are {faults} faults and a good answer
  for {blocks} pairs of a vendor and a task type, whole and streamed, over gRPC and REST. Each run must have
  the code and the status of its row in the error table. A stream that is cut has no `[DONE]`, or a status
  other than OK. A failed whole task delivers nothing and costs nothing; a failed stream costs what it has
  delivered. Nothing is left of either. `pytest tests/faults/test_matrix.py -s` prints the outcome and time
  of every run, and the bytes that were delivered and billed. `POMELO_MATRIX=FILE` writes the same to a
  file.

*Whole* and *streamed* are the codes of a task without and with `stream`, after all retries: each attempt
meets the same fault. `ok` means a good answer despite the fault, and a dash that the fault can't occur.
*Only with* lists the task types that can have the fault; empty means all.

| fault | what happens | whole | streamed | only with |
|---|---|---|---|---|
"""

_LEFT_OUT = """
## Left out

Faults that do not apply to a vendor, and why.

| vendor | task type | fault | why |
|---|---|---|---|
"""


def page() -> str:
    # Each run is made over two protocols: a good answer whole and streamed, a fault in each way it can occur.
    runs = sum(4 + sum(2 * len(block.streams(fault)) for fault in block.faults()) for block in BLOCKS)
    total = sum(len(cases(subject)) for subject in SUBJECTS)
    text = _HEAD.format(cases=total, runs=runs, faults=len(FAULTS), blocks=len(BLOCKS))
    for fault in FAULTS:
        whole = "-" if "whole" in fault.unsupported else fault.whole
        streamed = "-" if "stream" in fault.unsupported else fault.stream
        task_types = [name.replace("_", " ") for name in TASK_TYPES if name not in fault.unsupported]
        only = "" if len(task_types) == len(TASK_TYPES) else ", ".join(task_types)
        text += f"| {fault.name} | {fault.description} | {whole} | {streamed} | {only} |\n"
    text += _LEFT_OUT
    for block in BLOCKS:
        for (name, stream), reason in unsupported_faults(block.subject.protocol, block.task_type).items():
            fault = next(fault for fault in FAULTS if fault.name == name)
            if not stream and block.task_type not in fault.unsupported and "whole" not in fault.unsupported:
                text += f"| {block.vendor} | {block.task_type.replace('_', ' ')} | {name} | {reason} |\n"
    return text


if __name__ == "__main__":
    PATH.write_text(page())
