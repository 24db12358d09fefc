"""Connection limits: the cap, the share of an address, and which connection is evicted first."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from gateway.connections.limits import ConnectionLimits, Connections, Slot, SlotGroups
from pomelo.origin import network

ROOMY = ConnectionLimits(max_connections=1000, lifetime=60.0)


class Visitors:
    """Connections of a test, and how each was ended: True if a 503 was sent first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.connections = Connections(limits)
        self.ended: dict[Slot, bool] = {}

    def open(self, address: str = "192.0.2.1", owner: str | None = None, *, busy: bool = False) -> Slot:
        """Opens a connection; with an `owner`, it is authenticated."""

        def end(told: bool) -> None:
            self.ended[slot] = told

        slot = self.connections.open(address, end)
        if owner is not None:
            self.connections.trust(slot, owner)
        slot.busy = busy
        return slot

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; `Connections` checks every quarter of a second."""
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)


def test_groups_know_their_largest_and_its_oldest_whatever_comes_and_goes() -> None:
    chance = random.Random(7)
    groups, kept = SlotGroups(), []
    for _ in range(3000):
        if kept and chance.random() < 0.48:
            gone = kept.pop(chance.randrange(len(kept)))
            groups.discard(gone)
            groups.discard(gone)
        else:
            slot = Slot(f"a{chance.randrange(12)}", lambda _: None)
            groups.add(slot)
            kept.append(slot)
        sizes = {name: sum(slot.group == name for slot in kept) for name in {s.group for s in kept}}
        oldest = groups.oldest()
        if not kept:
            assert oldest is None
            continue
        assert oldest is not None
        assert sizes[oldest.group] == max(sizes.values())
        assert oldest is next(slot for slot in kept if slot.group == oldest.group)
        assert groups.size(oldest.group) == sizes[oldest.group]


async def test_at_the_cap_the_oldest_keyless_connection_of_the_fullest_address_is_evicted() -> None:
    visitors = Visitors(ConnectionLimits(max_connections=6))
    lone = visitors.open("192.0.2.9")
    crowd = [visitors.open("192.0.2.1") for _ in range(4)]
    caller = visitors.open("192.0.2.1", "acme")
    visitors.open("192.0.2.7")
    assert visitors.ended == {crowd[0]: True}
    visitors.open("192.0.2.8")
    assert visitors.ended == {crowd[0]: True, crowd[1]: True}
    assert lone.open
    assert caller.open
    assert len(visitors.connections) == 6


async def test_with_only_callers_the_longest_idle_one_of_the_largest_owner_is_evicted() -> None:
    visitors = Visitors(ConnectionLimits(max_connections=5))
    visitors.open(owner="small")
    many = [visitors.open(owner="large") for _ in range(3)]
    for age, slot in enumerate(reversed(many)):
        slot.idle_since = age
    visitors.open(owner="large", busy=True)
    new = visitors.open()
    assert visitors.ended == {many[2]: False}
    assert not new.surplus


async def test_when_all_are_busy_new_ones_are_surplus_and_the_oldest_one_is_evicted() -> None:
    visitors = Visitors(ConnectionLimits(max_connections=2, reserve=2))
    for _ in range(2):
        visitors.open(owner="acme", busy=True)
    told = [visitors.open() for _ in range(3)]
    assert all(slot.surplus for slot in told)
    assert visitors.ended == {told[0]: True}
    assert len(visitors.connections) == 2


async def test_a_connection_without_a_key_is_closed_after_its_lifetime_and_a_caller_stays() -> None:
    visitors = Visitors(ConnectionLimits(lifetime=0.3))
    early, caller = visitors.open(), visitors.open(owner="acme")
    await visitors.until(lambda: early in visitors.ended)
    assert visitors.ended == {early: False}
    assert caller.open
    visitors.connections.distrust(caller)
    await visitors.until(lambda: caller in visitors.ended)


async def test_slow_requests_of_one_address_beyond_its_share_are_ended_and_silent_ones_only_when_it_is_full() -> (
    None
):
    visitors = Visitors(ConnectionLimits(max_connections=100, per_address=2, grace=0.1, lifetime=60.0))
    silent = [visitors.open() for _ in range(5)]
    slow = [visitors.open() for _ in range(5)]
    for slot in slow:
        visitors.connections.mark_request_started(slot)
    waits = slow[1]
    waits.waiting = True  # the client waits for the server
    await visitors.until(lambda: len(visitors.ended) == 2)
    assert set(visitors.ended) == {slow[0], slow[2]}
    others = [visitors.open(f"198.51.100.{i}") for i in range(85)]
    await visitors.until(lambda: len(visitors.ended) >= 6)
    assert not set(others) & set(visitors.ended)
    assert all(visitors.ended.values())
    assert waits.open
    assert set(silent) & set(visitors.ended)


async def test_time_in_which_the_event_loop_stood_still_is_not_the_clients() -> None:
    visitors = Visitors(ConnectionLimits(lifetime=2.0))
    slot = visitors.open()
    loop = asyncio.get_running_loop()
    real = loop.time
    stood = 0.0
    loop.time = lambda: real() + stood  # type: ignore[method-assign]
    try:
        stood = 30.0
        await asyncio.sleep(0.6)
        assert slot.open
    finally:
        loop.time = real  # type: ignore[method-assign]
        visitors.connections.stop()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
    ],
)
def test_an_address_is_one_of_ipv4_or_a_64_of_ipv6(one: str, other: str, same: bool) -> None:
    assert (network(one) == network(other)) is same
