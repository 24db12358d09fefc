"""The limits of connections are as documented, and fit into the descriptors of the process."""

from __future__ import annotations

import pytest

from pomelo.server.connection_limits import ConnectionLimits
from tests.unit.server.guard_rig import MESSAGE, Guarded


@pytest.mark.parametrize(
    ("descriptors", "connections", "hard"),
    [(10**6, 1_024, 2_048), (8_192, 1_024, 2_048), (256, 32, 64), (7, 1, 2)],
)
def test_connections_use_at_most_a_quarter_of_the_descriptors(
    descriptors: int, connections: int, hard: int
) -> None:
    limits = ConnectionLimits().within(descriptors)
    assert limits == ConnectionLimits(connections=connections, hard_connections=hard)


@pytest.mark.parametrize(
    ("calls", "allowed"),
    [(None, 256 * 1024), (0, 512 * 1024), (1, 16 * 1024 * 1024 + MESSAGE)],
)
async def test_a_connection_may_send_as_many_bytes_as_are_documented(
    guarded: Guarded, calls: int | None, allowed: int
) -> None:
    connection = guarded.connect(calls=calls)
    connection.received += allowed
    for _ in range(2):
        guarded.scan(0.0)
    assert not guarded.closed
    connection.received += 1
    for _ in range(2):
        guarded.scan(0.0)
    assert guarded.closed == [connection]


@pytest.mark.parametrize(("calls", "limit"), [(None, "unauthenticated_resets"), (0, "resets")])
async def test_resets_are_limited(guarded: Guarded, calls: int | None, limit: str) -> None:
    guarded.limit(**{"unauthenticated_resets": 0, limit: 3})
    connection = guarded.connect(calls=calls)
    for _ in range(3):
        guarded.guard.reset(connection.peer)
    guarded.scan(0.0)
    assert not guarded.closed
    guarded.guard.reset(connection.peer)
    guarded.scan(0.0)
    assert guarded.closed == [connection]


@pytest.mark.parametrize("ended", [0, 2])
async def test_messages_being_received_allow_bytes_up_to_a_limit(guarded: Guarded, ended: int) -> None:
    guarded.limit(unexplained=1_000, unexplained_rate=0, call_bytes=0, reading_bytes=5 * MESSAGE)
    connection = guarded.connect(calls=6)
    connection.received += 1_000 + 5 * MESSAGE
    guarded.scan()
    guarded.scan()
    assert not guarded.closed
    connection.received += not ended
    for _ in range(ended):
        guarded.guard.ended(connection.peer)
    guarded.scan()
    guarded.scan()
    assert guarded.closed == [connection]
