"""The header that lists what had to be adjusted of a task. `pomelo.fitting` says what that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pomelo.call import Call
from pomelo.gen.v1.task_pb2 import Adjustment

HEADER = "X-Pomelo-Adjusted"
"""The header, and in lower case the metadata."""


def header(adjustments: Iterable[Adjustment]) -> str:
    """Adjustments as the header has them, such as `stop; temperature=1`."""
    return "; ".join(f"{made.field}={made.used}" if made.used else made.field for made in adjustments)


def report(call: Call, adjustments: Sequence[Adjustment]) -> None:
    """Puts adjustments into the headers of an answer, in place of others."""
    if adjustments:
        call.reply[HEADER] = header(adjustments)
    else:
        call.reply.pop(HEADER, None)
