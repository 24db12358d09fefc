"""The metrics about the reservations of a store, and how often it is read for them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pomelo.errors import PomeloError
from pomelo.stores.ledger import OpenReservation
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.store import OpenReservations
from tests.unit.accounts.audited_store import ACME, ACME_TEST, draft


class Store:
    """A store with these reservations, or that fails."""

    def __init__(self, found: Sequence[OpenReservation]) -> None:
        self.found = found
        self.fails = False
        self.reads = 0

    async def reservations(self, *, own: bool = False) -> Sequence[OpenReservation]:
        self.reads += 1
        assert not own
        if self.fails:
            raise PomeloError("store_unavailable")
        return self.found


def reservation(number: int, amount: int, at: float, live: bool = True) -> OpenReservation:
    wallet = ACME if live else ACME_TEST
    return OpenReservation(draft(f"task_{number}", wallet, at=at), amount, own=True)


def readings(metrics: Metrics) -> tuple[float, ...]:
    """The credits reserved in live and in test mode, and the age of the oldest reservation; empty if they are not
    known."""
    held, age = dict(metrics.held.readings()), dict(metrics.reservation_age.readings())
    return (held["live",], held["test",], age[()]) if held or age else ()


async def test_reserved_credits_are_read_by_mode_with_the_age_of_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pomelo.telemetry.store.READ_INTERVAL", 0.0)
    monkeypatch.setattr("pomelo.telemetry.store.MAX_READ_SHARE", 1e12)
    found = [
        reservation(1, 1_500_000, 90.0),
        reservation(2, 500_000, 70.0),
        reservation(3, 250_000, 80.0, False),
    ]
    store, metrics = Store(found), Metrics()
    OpenReservations(store, lambda: 100.0).register(metrics)  # type: ignore[arg-type]
    assert readings(metrics) == ()
    await metrics.refresh()
    assert readings(metrics) == (2.0, 0.25, 30.0)
    store.fails = True  # the reservations may have ended
    await metrics.refresh()
    assert (readings(metrics), store.reads) == ((), 2)
    store.fails, store.found = False, [reservation(1, 1, 100.5)]
    await metrics.refresh()
    assert (readings(metrics), store.reads) == ((0.000001, 0, 0), 3)


async def test_a_store_is_read_again_only_after_the_interval() -> None:
    store, metrics = Store([]), Metrics()
    OpenReservations(store, lambda: 100.0).register(metrics)  # type: ignore[arg-type]
    for _ in range(3):
        await metrics.refresh()
    assert store.reads == 1


async def test_a_read_that_took_long_is_repeated_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomelo.telemetry.store.READ_INTERVAL", 0.0)
    monkeypatch.setattr("pomelo.telemetry.store.MAX_READ_SHARE", 1e-12)
    store, metrics = Store([]), Metrics()
    OpenReservations(store, lambda: 100.0).register(metrics)  # type: ignore[arg-type]
    for _ in range(3):
        await metrics.refresh()
    assert store.reads == 1
