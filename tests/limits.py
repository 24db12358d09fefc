"""The counters of tasks, and how much of them a wallet has used."""

from __future__ import annotations

from typing import NamedTuple

from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import (
    Count,
    Counter,
    LedgerStore,
    LimitStatus,
    Refused,
    ReplayedAnswer,
    Reserved,
    Settled,
)

MODEL = "gpt-4"
WINDOW = 60.0
"""The length of the windows in seconds."""


def counters(
    requests_limit: int | None = None,
    concurrency_limit: int | None = None,
    tokens: int = 0,
    tokens_limit: int | None = None,
    model: str = MODEL,
) -> tuple[Counter, ...]:
    """What a text task counts in the engine."""
    return (
        Counter("requests", 1, requests_limit, WINDOW),
        Counter("concurrency", 1, concurrency_limit),
        Counter(f"tokens:{model}", tokens, tokens_limit, WINDOW),
    )


class Used(NamedTuple):
    """What a wallet has left and has used."""

    available: int
    requests: int = 0
    requests_reset: float = 0.0
    concurrency: int = 0
    tokens: int = 0
    tokens_reset: float = 0.0

    def without_resets(self) -> Used:
        """The same in an unknown moment of the windows."""
        return self._replace(requests_reset=0.0, tokens_reset=0.0)


def used(answer: Reserved | Refused | ReplayedAnswer | Settled | LimitStatus, model: str = MODEL) -> Used:
    """The limits in an answer of a store; the tokens are those of `model`."""
    status = answer if isinstance(answer, LimitStatus) else answer.limit_status
    requests, concurrency, tokens = [
        status.counts.get(counter.name, Count()) for counter in counters(model=model)
    ]
    assert concurrency.reset == 0
    return Used(status.available, requests.used, requests.reset, concurrency.used, tokens.used, tokens.reset)


async def limits(store: LedgerStore, wallet: Wallet, model: str = MODEL) -> Used:
    """A wallet's current limits."""
    return used(await store.limit_status(wallet, counters(model=model)), model)
