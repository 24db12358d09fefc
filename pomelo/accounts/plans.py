"""Plans: what an account may do, as data. The built-in ones, and those of the operator's settings.

`pomelo.engine.reservation` makes takes of them; the operator's service lists them. A plan limits each side of
an account, live and test, by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NEW_ACCOUNTS = "free"
"""The plan of an account that is made without one."""

TEST_CREDITS = 100_000_000
"""Microcredits that the test side of a new account has to begin with."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The limits of a plan; None: no limit. `requests` and `tokens` (of each text model) are per minute,
    `concurrent` is the number of concurrent tasks. `models` None: all."""

    name: str
    requests: int | None = None
    concurrent: int | None = None
    tokens: int | None = None
    models: frozenset[str] | None = None


BUILTIN: Mapping[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan("free", requests=20, concurrent=2, tokens=40_000),
        Plan("pro", requests=300, concurrent=20, tokens=400_000),
        Plan("scale", requests=3_000, concurrent=200, tokens=4_000_000),
        Plan("unlimited"),
    )
}
