"""Plans: the limits of an account, which apply to its live and its test mode separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

NEW_ACCOUNTS = "free"
"""The plan of a new account by default."""

TEST_CREDITS = 100_000_000
"""Microcredits that a new account gets in test mode."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Limits of an account; None is unlimited. `requests` and `tokens` are per minute, `tokens` for each text
    model; `concurrent` is the maximum number of concurrent tasks; `models` are the allowed models."""

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
