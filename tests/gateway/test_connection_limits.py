"""Connection limits: the maximum, the share of an address, and which connection is evicted first."""

from __future__ import annotations

import asyncio
import random

import pytest

from gateway.connections.limits import ConnectionLimits, Connections, Slot, SlotGroups
from tests.waiting import until


class ConnectionSet:
    """Opens connections, and records how each was ended: True if a 503 was sent first."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.table = Connections(limits)
        self.ended: dict[Slot, bool] = {}

    def open(self, address: str = "192.0.2.1", owner: str | None = None, *, busy: bool = False) -> Slot:
        """Opens a connection; with an `owner`, it is authenticated."""

        def end(send_refusal: bool) -> None:
            self.ended[slot] = send_refusal

        slot = self.table.open(address, end)
        if owner is not None:
            self.table.trust(slot, owner)
        slot.busy = busy
        return slot


def test_slot_groups_track_the_oldest_slot_of_the_largest_group() -> None:
    rng = random.Random(7)
    groups = SlotGroups()
    slots: list[Slot] = []
    for _ in range(3000):
        if slots and rng.random() < 0.48:
            removed = slots.pop(rng.randrange(len(slots)))
            groups.discard(removed)
            groups.discard(removed)
        else:
            slot = Slot(f"a{rng.randrange(12)}", lambda _: None)
            groups.add(slot)
            slots.append(slot)
        sizes = {name: sum(slot.group == name for slot in slots) for name in {s.group for s in slots}}
        oldest = groups.oldest()
        if not slots:
            assert oldest is None
            continue
        assert oldest is not None
        assert sizes[oldest.group] == max(sizes.values())
        assert oldest is next(slot for slot in slots if slot.group == oldest.group)
        assert groups.size(oldest.group) == sizes[oldest.group]


async def test_at_the_limit_the_oldest_untrusted_connection_of_the_largest_address_is_evicted() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=6))
    lone = connections.open("192.0.2.9")
    crowd = [connections.open("192.0.2.1") for _ in range(4)]
    caller = connections.open("192.0.2.1", "acme")
    connections.open("192.0.2.7")
    assert connections.ended == {crowd[0]: True}
    connections.open("192.0.2.8")
    assert connections.ended == {crowd[0]: True, crowd[1]: True}
    assert lone.open
    assert caller.open
    assert len(connections.table) == 6


async def test_with_only_trusted_connections_the_longest_idle_one_of_the_largest_owner_is_evicted() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=5))
    connections.open(owner="small")
    many = [connections.open(owner="large") for _ in range(3)]
    for age, slot in enumerate(reversed(many)):
        slot.idle_since = age
    connections.open(owner="large", busy=True)
    new = connections.open()
    assert connections.ended == {many[2]: False}
    assert not new.surplus


async def test_a_few_untrusted_connections_replace_idle_ones_and_not_each_other() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=32))
    idle = [connections.open(owner="acme") for _ in range(32)]
    new = [connections.open() for _ in range(3)]
    assert connections.ended == dict.fromkeys(idle[:3], False)
    new.append(connections.open())
    assert connections.ended == {**dict.fromkeys(idle[:3], False), new[0]: True}
    connections.table.trust(new[1], "other")
    connections.table.trust(new[2], "other")
    connections.open()
    assert connections.ended == {**dict.fromkeys(idle[:4], False), new[0]: True}
    connections.table.stop()


async def test_a_few_untrusted_connections_replace_each_other_if_all_others_are_busy() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=32))
    for _ in range(31):
        connections.open(owner="acme", busy=True)
    new = connections.open()
    connections.open()
    assert connections.ended == {new: True}
    connections.table.stop()


async def test_when_all_connections_are_busy_new_ones_are_surplus_and_the_oldest_is_evicted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=2, reserve=2))
    for _ in range(2):
        connections.open(owner="acme", busy=True)
    surplus = [connections.open() for _ in range(3)]
    assert all(slot.surplus for slot in surplus)
    assert connections.ended == {surplus[0]: True}
    assert len(connections.table) == 2
    assert caplog.messages == ["A connection was refused: all 2 of REST are in use"] * 3


async def test_an_untrusted_connection_is_closed_after_its_lifetime_and_a_trusted_one_stays() -> None:
    connections = ConnectionSet(ConnectionLimits(lifetime=0.3))
    early, caller = connections.open(), connections.open(owner="acme")
    await until(lambda: early in connections.ended)
    assert connections.ended == {early: False}
    assert caller.open
    connections.table.distrust(caller)
    await until(lambda: caller in connections.ended)


async def test_each_lifetime_starts_when_its_connection_becomes_untrusted() -> None:
    connections = ConnectionSet(ConnectionLimits(lifetime=0.6))
    loop = asyncio.get_running_loop()
    first, caller = connections.open(), connections.open(owner="acme")
    await until(lambda: first in connections.ended)
    begin = loop.time()
    later = connections.open()
    connections.table.distrust(caller)
    assert len(connections.table) == 2
    await until(lambda: later in connections.ended or caller in connections.ended)
    assert loop.time() - begin > 0.5
    await until(lambda: connections.ended.keys() >= {later, caller})
    assert len(connections.table) == 0


async def test_slow_requests_beyond_the_share_of_an_address_are_evicted_and_silent_ones_only_when_full() -> (
    None
):
    connections = ConnectionSet(
        ConnectionLimits(max_connections=100, per_address=2, grace=0.1, lifetime=60.0)
    )
    silent = [connections.open() for _ in range(5)]
    slow = [connections.open() for _ in range(5)]
    for slot in slow:
        connections.table.mark_request_started(slot)
    waiting = slow[1]
    waiting.waiting = True  # the client waits for the server
    await until(lambda: len(connections.ended) == 2)
    assert set(connections.ended) == {slow[0], slow[2]}
    others = [connections.open(f"198.51.100.{i}") for i in range(85)]
    await until(lambda: len(connections.ended) >= 6)
    assert not set(others) & set(connections.ended)
    assert all(connections.ended.values())
    assert waiting.open
    assert set(silent) & set(connections.ended)


async def test_silent_connections_beyond_the_share_are_evicted_from_seven_eighths_of_the_limit() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=16, per_address=2, grace=0.0, lifetime=60.0))
    silent = [connections.open() for _ in range(13)]
    connections.table._check_untrusted()
    assert connections.ended == {}
    silent.append(connections.open())
    connections.table._check_untrusted()
    assert connections.ended == dict.fromkeys(silent[:-2], True)
    connections.table.stop()


async def test_time_while_the_event_loop_is_blocked_does_not_count_against_clients() -> None:
    connections = ConnectionSet(ConnectionLimits(lifetime=2.0))
    slot = connections.open()
    loop = asyncio.get_running_loop()
    real = loop.time
    blocked = 0.0
    loop.time = lambda: real() + blocked  # type: ignore[method-assign]
    try:
        blocked = 30.0
        await asyncio.sleep(0.6)
        assert slot.open
    finally:
        loop.time = real  # type: ignore[method-assign]
        connections.table.stop()


async def test_of_many_idle_connections_several_are_evicted_together() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=192))
    slots = [connections.open(owner="acme") for _ in range(192)]
    connections.open()
    assert connections.ended == dict.fromkeys(slots[:3], False)


async def test_a_connection_counts_for_the_owner_of_its_last_key() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=3))
    moved = connections.open(owner="first")
    other, idle = connections.open(owner="first"), connections.open(owner="second")
    moved.idle_since, other.idle_since, idle.idle_since = 3.0, 1.0, 2.0
    connections.table.trust(moved, "second")
    connections.open()
    assert connections.ended == {idle: False}


async def test_a_client_that_waits_for_the_server_at_the_end_of_its_lifetime_is_refused() -> None:
    connections = ConnectionSet(ConnectionLimits(lifetime=0.1))
    slot = connections.open()
    slot.waiting = True
    await until(lambda: slot in connections.ended)
    assert connections.ended == {slot: True}


async def test_a_closed_surplus_connection_is_forgotten() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=1, reserve=1))
    connections.open(owner="acme", busy=True)
    connections.table.close(connections.open())
    assert len(connections.table) == 1
    assert connections.open().surplus
    assert connections.ended == {}


@pytest.mark.parametrize("max_connections", [0, 8], ids=["surplus", "untrusted"])
async def test_a_few_health_checks_are_not_evicted_until_their_lifetime_ends(max_connections: int) -> None:
    limits = ConnectionLimits(max_connections=max_connections, reserve=8, lifetime=0.3)
    connections = ConnectionSet(limits)
    checks = [connections.open() for _ in range(6)]
    for slot in checks:
        connections.table.protect_health_check(slot)
    others = [connections.open() for _ in range(20)]
    assert set(connections.ended) == {*checks[4:], *others[: 20 - 4]}
    await until(lambda: connections.ended.keys() >= set(checks))
    assert len(connections.table) == 0


async def test_a_connection_that_becomes_trusted_is_no_longer_protected_as_a_health_check() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=2, reserve=2))
    moved = connections.open()
    connections.table.protect_health_check(moved)
    connections.table.trust(moved, "acme")
    check = connections.open()
    connections.table.protect_health_check(check)
    connections.open()
    assert set(connections.ended) == {moved}


def test_the_youngest_slots_of_a_group_are_never_in_excess() -> None:
    groups = SlotGroups()
    slots = [Slot("a", lambda _: None) for _ in range(3)]
    for slot in slots:
        groups.add(slot)
    assert [groups.excess("a", count) for count in (1, 2, 3, 4, 9)] == [slots[:2], slots[:1], [], [], []]


async def test_a_connection_that_is_distrusted_makes_room_before_trusted_ones() -> None:
    connections = ConnectionSet(ConnectionLimits(max_connections=2))
    connections.open(owner="ann")
    distrusted = connections.open(owner="ann")
    connections.table.distrust(distrusted)
    assert connections.table.make_room()
    assert connections.ended == {distrusted: True}


async def test_a_request_has_started_when_its_first_bytes_came() -> None:
    connections = ConnectionSet(ConnectionLimits())
    slot = connections.open()
    connections.table.mark_request_started(slot)
    started = slot.request_started
    await asyncio.sleep(0.01)
    connections.table.mark_request_started(slot)
    assert slot.request_started == started


async def test_a_connection_that_is_no_longer_trusted_is_as_young_as_a_new_one() -> None:
    connections = ConnectionSet(ConnectionLimits())
    caller = connections.open(owner="acme")
    opened = caller.since
    await asyncio.sleep(0.01)
    connections.table.distrust(caller)
    assert caller.since > opened


async def test_nothing_is_kept_of_health_checks_and_crowds_that_have_ended() -> None:
    connections = ConnectionSet(ConnectionLimits(reserve=4, per_address=1))
    for _ in range(3):  # more than are protected at a time
        for slot in [connections.open() for _ in range(3)]:
            connections.table.protect_health_check(slot)
            connections.table.close(slot)
    assert not connections.table._health_checks
    for slot in [connections.open() for _ in range(3)]:
        connections.table.close(slot)
    connections.open("192.0.2.2")
    assert connections.table._crowded
    await until(lambda: not connections.table._crowded)


async def test_no_connection_is_checked_once_the_server_has_stopped() -> None:
    connections = ConnectionSet(ConnectionLimits(lifetime=0.0))
    connections.open()
    connections.table.stop()
    await asyncio.sleep(0.4)  # longer than the time between two checks
    assert connections.ended == {}
