"""The guard of connections, scan by scan, with connections that the test lists in place of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_network
from itertools import pairwise

import pytest

from pomelo.server import connection_guard
from pomelo.server.accepted_sockets import AcceptedSocket
from pomelo.server.connection_guard import ConnectionGuard
from pomelo.server.connection_limits import ConnectionLimits
from tests.unit.server.guard_rig import MESSAGE, Guarded, Kernel
from tests.waiting import until

# --- received bytes


def send(guarded: Guarded, connection: AcceptedSocket) -> None:
    """Sends data to the caller, who acknowledges them."""
    connection.sent += 800


def receive(guarded: Guarded, connection: AcceptedSocket) -> None:
    """Receives a message."""
    guarded.guard.received(connection.peer, 800)


def call(guarded: Guarded, connection: AcceptedSocket) -> None:
    """Runs a call."""
    guarded.call(connection)


@pytest.mark.parametrize(
    ("work", "explained"),
    [(send, 800 // 8), (receive, 800 + 800 // 8 + 256), (call, 72 * 1024)],
)
async def test_calls_messages_and_sent_data_explain_received_bytes(
    guarded: Guarded, work: Callable[[Guarded, AcceptedSocket], None], explained: int
) -> None:
    guarded.limit(unexplained=1_000, unexplained_rate=0, idle_bytes=10**6)
    connection = guarded.connect(calls=0)
    work(guarded, connection)
    connection.received += explained + 1_000
    guarded.scan()
    guarded.scan()
    assert not guarded.closed
    connection.received += 1
    guarded.scan()
    assert not guarded.closed
    guarded.scan()
    assert guarded.closed == [connection]


async def test_unexplained_bytes_are_forgotten_at_their_rate(guarded: Guarded) -> None:
    guarded.limit(unexplained=1_000, unexplained_rate=100, idle_bytes=10**6)
    connection = guarded.connect(calls=0)
    connection.received += 1_000
    guarded.scan(0.0)
    guarded.scan(1.0)
    for more, closed in ((100, []), (1, [connection])):
        connection.received += more
        guarded.scan(0.0)
        guarded.scan(0.0)
        assert guarded.closed == closed


async def test_sent_data_do_not_allow_frames_without_a_call_later(guarded: Guarded) -> None:
    guarded.limit(idle_bytes=1_000)
    connection = guarded.connect(calls=0)
    for sent, received, closes in ((80_000, 0, False), (0, 1_000, False), (0, 1, False), (0, 0, True)):
        connection.sent += sent
        connection.received += received
        guarded.scan()
        assert guarded.closed == [connection] * closes


@pytest.mark.parametrize("limit", ["idle_bytes", "unexplained"])
async def test_bytes_of_calls_that_the_event_loop_has_not_seen_yet_are_no_flood(
    guarded: Guarded, limit: str
) -> None:
    guarded.limit(**{"idle_bytes": 10**6, "unexplained": 10**6, limit: 1_000}, unexplained_rate=0)
    connection = guarded.connect(calls=0)
    for _ in range(2):
        connection.received += 5_000
        assert guarded.scan() == 0.25, "the next scan is early"
        guarded.call(connection)
        guarded.scan()
    connection.received += 5_000
    guarded.scan()
    assert not guarded.closed
    guarded.scan()
    assert guarded.closed == [connection]


async def test_resets_are_forgotten_within_their_window(guarded: Guarded) -> None:
    guarded.limit(resets=10, reset_window=5.0)
    connection = guarded.connect(calls=0)
    for count in (10, 2):
        for _ in range(count):
            guarded.guard.reset(connection.peer)
        guarded.scan(0.0)
        guarded.scan(1.0)
    assert not guarded.closed
    for _ in range(3):
        guarded.guard.reset(connection.peer)
    guarded.scan(0.0)
    assert guarded.closed == [connection]


async def test_a_connection_without_a_key_is_closed_at_the_second_scan_with_too_many_bytes(
    guarded: Guarded,
) -> None:
    guarded.limit(unauthenticated_bytes=1_000)
    connection = guarded.connect()
    connection.received = 1_001
    for closed in ([], [connection]):
        guarded.scan()
        assert guarded.closed == closed


# --- look-ups and floods


def flood(guarded: Guarded, host: str) -> None:
    """Makes the guard close a connection of an address for flooding."""
    connection = guarded.connect(host)
    guarded.guard.reset(connection.peer)
    guarded.scan(0.0)
    assert guarded.closed.pop() is connection


@pytest.mark.parametrize("flooding", [False, True])
async def test_a_look_up_protects_a_connection_unless_its_address_has_flooded(
    guarded: Guarded, flooding: bool
) -> None:
    guarded.limit(unauthenticated_bytes=1_000, unauthenticated_resets=0, floods=1)
    if flooding:
        flood(guarded, "192.0.2.1")
    connection = guarded.connect()
    guarded.guard.checked(connection.peer)  # of a look-up that began before the guard
    for _ in range(2):
        guarded.guard.checking(connection.peer)
    guarded.guard.checked(connection.peer)  # one of the two goes on
    connection.received = 1_001
    for _ in range(20):  # each scan forgets some
        guarded.guard.reset(connection.peer)
    guarded.scan()
    guarded.scan()
    assert guarded.closed == [connection] * flooding
    guarded.guard.checked(connection.peer)
    guarded.scan()
    guarded.scan()
    assert guarded.closed == [connection]


async def test_a_look_up_protects_a_connection_within_the_grace(guarded: Guarded) -> None:
    guarded.limit(unauthenticated_bytes=1_000, grace=0.5)
    connection = guarded.connect()
    guarded.guard.checking(connection.peer)
    connection.received = 1_001
    for closed in ([], [], [], [connection]):
        guarded.scan(0.25)
        assert guarded.closed == closed


@pytest.mark.parametrize("later", [0.0, 60.0, 60.1])
async def test_an_address_that_has_flooded_is_remembered_for_the_penalty(
    guarded: Guarded, later: float
) -> None:
    guarded.limit(unauthenticated_bytes=1_000, unauthenticated_resets=0, floods=2, penalty=60.0)
    for _ in range(150):  # the clock of connections advances by two seconds at a time at most
        guarded.scan(2.0)
    for _ in range(2):
        flood(guarded, "192.0.2.1")
    for _ in range(40):
        guarded.scan(later / 40)
    connection = guarded.connect()
    connection.received = 1_001
    guarded.scan(0.0)
    assert guarded.closed == [connection] * (later <= 60.0)


async def test_floods_are_counted_anew_after_the_penalty(guarded: Guarded) -> None:
    guarded.limit(unauthenticated_resets=0, penalty=1.0)
    for pause, count in ((0.0, 1), (0.5, 2), (1.0, 1), (0.0, 2)):
        guarded.scan(pause)
        flood(guarded, "192.0.2.1")
        assert guarded.guard._floods["192.0.2.1"][0] == count


async def test_a_limited_number_of_flooding_addresses_is_remembered(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_guard, "_MAX_FLOODING", 2)
    guarded.limit(unauthenticated_resets=0)
    for host in ("192.0.2.1", "192.0.2.2", "192.0.2.1", "192.0.2.3"):
        flood(guarded, host)
    assert list(guarded.guard._floods) == ["192.0.2.1", "192.0.2.3"]


@pytest.mark.parametrize("trusted", [False, True])
async def test_no_limit_of_one_connection_applies_to_a_gateway(guarded: Guarded, trusted: bool) -> None:
    guarded.limit(resets=1, idle_bytes=1_000)
    connection = guarded.connect(calls=0)
    guarded.guard.trust("ipv4:192.0.2.9:9")  # a peer that is not known
    if trusted:
        guarded.guard.trust(connection.peer)
    for _ in range(3):
        guarded.guard.reset(connection.peer)
    connection.received += 5_000
    guarded.scan(0.0)
    assert guarded.closed == [connection] * (not trusted)


async def test_each_message_explains_bytes_of_its_own(guarded: Guarded) -> None:
    guarded.limit(unexplained=0, reading_bytes=0)
    connection = guarded.connect(calls=0)
    for _ in range(9):
        guarded.guard.received(connection.peer, 0)
        connection.received += 256
        guarded.scan(0.0)
    assert guarded.closed == []


# --- shares and totals


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::2"])
async def test_the_older_connection_above_the_share_of_a_network_is_closed_after_the_grace(
    guarded: Guarded, host: str
) -> None:
    guarded.limit(per_address=1, grace=3.0)
    older = guarded.connect("192.0.2.1" if host == "192.0.2.1" else "2001:db8::1")
    guarded.scan(1.0)
    guarded.connect(host)
    guarded.scan(2.0)
    assert (guarded.closed, guarded.guard.count) == ([], 2)
    guarded.scan(0.1)
    assert (guarded.closed, guarded.guard.count) == ([older], 1)


async def test_connections_without_a_key_are_closed_first_and_then_the_least_used_of_the_largest_address(
    guarded: Guarded,
) -> None:
    first, second = [guarded.connect("192.0.2.1", calls=0) for _ in range(2)]
    other = guarded.connect("192.0.2.2", calls=0)
    busy = guarded.connect("192.0.2.3", calls=1)
    guarded.scan()
    call(guarded, first)  # so that the second one has not been used for longer
    guarded.scan()
    new = guarded.connect("192.0.2.4")
    for closed in ([new], [new, second], [new, second, first]):
        guarded.limit(connections=guarded.guard.count - 1)
        guarded.scan()
        assert (guarded.closed, guarded.guard.count) == (closed, 5 - len(closed))
    guarded.limit(connections=0)
    guarded.scan()
    guarded.scan()
    assert guarded.closed == [new, second, first, other]
    assert busy not in guarded.closed, "a call runs on it"


async def test_the_connection_of_a_gateway_is_not_closed_because_there_are_too_many(guarded: Guarded) -> None:
    gateway, other = [guarded.connect(calls=0) for _ in range(2)]
    guarded.guard.trust(gateway.peer)
    guarded.limit(connections=0)
    guarded.scan()
    assert guarded.closed == [other]


async def test_a_few_new_connections_replace_those_without_a_call(guarded: Guarded) -> None:
    unused = [guarded.connect(calls=0) for _ in range(30)]
    old = guarded.connect("192.0.2.2")
    for _ in range(4):  # longer than the grace
        guarded.scan(1.0)
    guarded.limit(connections=32)
    new = [guarded.connect("192.0.2.3") for _ in range(2)]
    assert guarded.closed == [old]
    new.append(guarded.connect(calls=0))
    assert guarded.closed == [old, unused[0]]
    new.append(guarded.connect("192.0.2.3"))
    assert guarded.closed == [old, unused[0], new[0]], "more than a sixteenth are new"


async def test_a_trusted_network_has_no_share(guarded: Guarded) -> None:
    guarded.limit(per_address=1, grace=0.0, trusted=(ip_network("192.0.2.0/24"),))
    _, _, other, _ = [guarded.connect(host) for host in ["192.0.2.1"] * 2 + ["198.51.100.1"] * 2]
    guarded.scan()
    assert guarded.closed == [other]


async def test_connections_above_the_share_of_an_address_leave_room_for_the_others(guarded: Guarded) -> None:
    guarded.connect(calls=0)
    new = [guarded.connect("192.0.2.2") for _ in range(3)]
    guarded.limit(per_address=1, connections=2, grace=0.0)
    guarded.scan()
    assert guarded.closed == new[:2]


async def test_the_next_scan_is_early_when_there_are_many_connections(guarded: Guarded) -> None:
    guarded.limit(per_address=1, connections=3)
    guarded.connect(calls=0)
    guarded.connect()
    assert guarded.scan() == 1.0
    guarded.connect()
    assert guarded.scan() == 0.25, "one address has more than its share"
    guarded.connect()
    guarded.limit(connections=2)
    assert guarded.scan() == 0.05, "there were too many in all"
    guarded.limit(per_address=4, key_timeout=0.0)
    assert guarded.scan() == 0.25, "connections were closed"
    assert guarded.scan() == 1.0


async def test_every_64_resets_of_a_connection_start_the_next_scan(guarded: Guarded) -> None:
    connection = guarded.connect()
    for count in range(1, 65):
        guarded.guard.reset(connection.peer)
        assert guarded.guard._wake.is_set() == (count == 64)


async def test_a_quiet_server_is_scanned_four_times_a_second_at_most(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[float] = []

    def scan(now: float) -> float:
        scans.append(now)
        return 1.0

    monkeypatch.setattr(guarded.guard, "scan", scan)
    await until(lambda: len(scans) == 3)
    assert all(later - earlier > 0.2 for earlier, later in pairwise(scans))


# --- the log, and the end


async def test_a_log_line_counts_the_connections_that_were_closed_since_the_last_one(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded.limit(unauthenticated_resets=0)
    for _ in range(2):
        flood(guarded, "192.0.2.1")
    assert len(caplog.records) == 1
    ended = guarded.connect("192.0.2.2")
    guarded.guard.reset(ended.peer)
    with monkeypatch.context() as patch:  # its caller leaves before it is closed
        patch.setattr(guarded.kernel, "disconnect", lambda connection: False)
        guarded.scan(0.0)
    guarded.scan(10.0)
    flood(guarded, "192.0.2.3")
    guarded.scan(10.0)
    assert [record.getMessage() for record in caplog.records] == [
        "1 gRPC connections were closed: 1 flooding. The most from one address, 1, from 192.0.2.1",
        "1 gRPC connections were closed: 1 flooding. The most from one address, 1, from 192.0.2.1",
        "1 gRPC connections were closed: 1 flooding. The most from one address, 1, from 192.0.2.3",
    ]


async def test_nothing_is_counted_before_a_guard_watches_and_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection_guard, "AcceptedSockets", lambda ports: Kernel())
    guard = ConnectionGuard(ConnectionLimits(), MESSAGE)
    guard.authenticated("ipv4:192.0.2.1:1")
    assert not guard._calls
    async with guard.watch(1):
        guard.authenticated("ipv4:192.0.2.1:1")
        assert guard._calls
    for report in (guard.authenticated, guard.checking, guard.reset):
        report("ipv4:192.0.2.1:1")
    assert not guard._calls


# --- draining


async def test_a_drain_ends_the_connections_without_a_running_call(guarded: Guarded) -> None:
    busy, unused = guarded.connect(calls=1), guarded.connect(calls=0)
    for _ in range(3):
        guarded.scan()
    assert not guarded.kernel.ended
    guarded.guard.drain()
    for _ in range(3):
        guarded.scan()
    assert guarded.kernel.ended == [unused]
    guarded.guard.ended(busy.peer)
    guarded.scan()
    assert guarded.kernel.ended == [unused], "the response to the last call may not be written yet"
    for _ in range(2):
        guarded.scan()
    assert guarded.kernel.ended == [unused, busy]
    guarded.limit(resets=0)  # until its client has closed it, it is guarded
    guarded.guard.reset(busy.peer)
    guarded.scan(0.0)
    assert guarded.closed == [busy]
