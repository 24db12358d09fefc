"""The limits and credits of an account, as every response reports them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of the plan, what remains of it, and when its window ends: None for concurrent tasks."""

    limit: int
    remaining: int
    reset: datetime | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of an account in the mode of the key, and the credits that are left. None: the plan has no
    such limit, or the response did not report it."""

    requests: Limit | None = None
    tokens: Limit | None = None
    concurrent: Limit | None = None
    credits: Decimal | None = None


def to_credits(micros: int) -> Decimal:
    """Returns the credits of an amount in millionths, such as `cost_micros` of a usage record."""
    return Decimal(micros).scaleb(-6)


def read_limits(metadata: Mapping[str, str]) -> Limits:
    left = metadata.get("x-credits-remaining")
    return Limits(
        requests=_limit(metadata, ""),
        tokens=_limit(metadata, "-tokens"),
        concurrent=_limit(metadata, "-concurrent"),
        credits=None if left is None else Decimal(left),
    )


def _limit(metadata: Mapping[str, str], suffix: str) -> Limit | None:
    limit = metadata.get(f"x-ratelimit-limit{suffix}")
    if limit is None:
        return None
    reset = metadata.get(f"x-ratelimit-reset{suffix}")
    return Limit(
        int(limit),
        int(metadata[f"x-ratelimit-remaining{suffix}"]),
        None if reset is None else datetime.fromtimestamp(int(reset), UTC),
    )
