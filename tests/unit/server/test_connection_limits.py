"""The limits of connections fit into the descriptors of the process."""

from __future__ import annotations

import pytest

from pomelo.server.connection_limits import ConnectionLimits


@pytest.mark.parametrize(
    ("descriptors", "connections", "hard"),
    [(10**6, 1_024, 2_048), (8_192, 1_024, 2_048), (1_024, 128, 256), (7, 1, 2)],
)
def test_connections_use_at_most_a_quarter_of_the_descriptors(
    descriptors: int, connections: int, hard: int
) -> None:
    limits = ConnectionLimits().within(descriptors)
    assert (limits.connections, limits.hard_connections) == (connections, hard)
