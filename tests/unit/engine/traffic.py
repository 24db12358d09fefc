"""Calls of accounts at a vendor, through a circuit breaker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pomelo.engine.circuit_breaker import (
    CircuitBreaker,
    State,
)

DOWN = "provider_unavailable"


@dataclass
class Traffic:
    """Calls of accounts at a vendor, in steps of 10 ms; `healthy` says whether the vendor serves an account."""

    breaker: CircuitBreaker = field(default_factory=lambda: CircuitBreaker("acme", "large"))
    healthy: Callable[[str], bool] = lambda account: True
    now: float = 1000.0
    passed: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    last_call: float = 0.0

    def call(self, account: str) -> bool:
        """Makes one call; returns whether it was served."""
        attempt = self.breaker.acquire(account, self.now)
        if attempt is None:
            self.refused[account] = self.refused.get(account, 0) + 1
            return False
        self.passed[account] = self.passed.get(account, 0) + 1
        self.last_call = self.now
        served = self.healthy(account)
        if served:
            self.breaker.succeeded(attempt, self.now)
        else:
            self.breaker.failed(attempt, self.now, DOWN)
        self.breaker.release(attempt, self.now)
        return served

    def state(self) -> State:
        """Returns the state of the breaker for all accounts."""
        return self.breaker.state

    def account_state(self, account: str) -> State:
        """Returns the state of an account's own circuit, which no call changes."""
        own = self.breaker._accounts.get(account)
        return State.CLOSED if own is None else own.state

    def run(self, seconds: float, rates: dict[str, float]) -> None:
        """Makes calls of each account at its rate per second."""
        steps = round(seconds * 100)
        for step in range(steps):
            for account, rate in rates.items():
                for _ in range(int((step + 1) * rate / 100) - int(step * rate / 100)):
                    self.call(account)
            self.now += 0.01

    def share(self, account: str) -> float:
        """Returns the share of an account's calls that passed."""
        passed, refused = self.passed.get(account, 0), self.refused.get(account, 0)
        return passed / (passed + refused)

    def reset_counts(self) -> None:
        """Resets the counts."""
        self.passed, self.refused = {}, {}


def open_route(*accounts: str, **options: float) -> Traffic:
    """Returns traffic to a vendor that is down, after calls of these accounts opened its route."""
    traffic = Traffic(CircuitBreaker("acme", "large", **options), lambda account: False)  # type: ignore[arg-type]
    while traffic.breaker.state is State.CLOSED:
        for account in accounts:
            traffic.call(account)
        traffic.now += 0.05
    return traffic
