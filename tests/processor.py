"""How fast the processor is now: what a limit of processor time has to allow for."""

from __future__ import annotations

import time

_USUAL_SECONDS = 0.06
"""What the loop takes on the machine that the limits were set on."""


def slowness() -> float:
    """Returns how much longer than usual this machine takes for the same work, at least 1: shared machines have
    hours in which it is twice as long."""

    def once() -> float:
        began = time.process_time()
        sum(number * number for number in range(1_000_000))
        return time.process_time() - began

    return max(1.0, min(once() for _ in range(5)) / _USUAL_SECONDS)
