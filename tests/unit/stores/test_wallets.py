"""What a wallet in memory reports of a window: nothing before it began, as after the clock was set back, and nothing
from its end on."""

from __future__ import annotations

import pytest

from pomelo.stores.ledger import Count, Counter
from pomelo.stores.sqlite.wallets import LoadedBudget, LoadedWallet

REQUESTS = Counter("requests", 1, 10, 60.0)


@pytest.mark.parametrize(
    ("now", "reported"),
    [(99.5, Count()), (100.0, Count(3, 60.0)), (159.5, Count(3, 0.5)), (160.0, Count()), (170.0, Count())],
)
def test_a_window_counts_from_its_beginning_until_its_end(now: float, reported: Count) -> None:
    wallet = LoadedWallet("acme", True)
    wallet.counts = {"requests": [3, 100.0, 160.0], "concurrency": [2, None, None]}
    status = wallet.limit_status((REQUESTS, Counter("concurrency")), now)
    assert status.counts == {"requests": reported, "concurrency": Count(2)}


def test_a_row_that_is_read_again_does_not_change_what_memory_knows_better() -> None:
    wallet = LoadedWallet("acme", True)
    wallet.withdrawing = 5
    wallet.budgets["key"] = LoadedBudget("key", 200.0)
    wallet.load(True, True, 10, 1, {}, 0, [("key", 100.0, 7), ("other", 100.0, 8)], now=250.0)
    assert wallet.available == 10 - 5 - 1
    assert (wallet.budgets["key"].start, wallet.budgets["key"].spent) == (200.0, 0)
    assert wallet.budgets["other"].spent == 8
