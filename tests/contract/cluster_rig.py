"""Clusters of real servers on loopback."""

from __future__ import annotations

import asyncio

from tests.ports import free_port
from tests.redis_server import RedisServer

SLOTS = 16_384


class ClusterNode(RedisServer):
    """A server for a cluster, whose nodes find each other on the port `bus`."""

    def __init__(self) -> None:
        # The default, the server's port plus 10,000, can be above the highest valid port.
        self.bus = free_port()
        super().__init__("--cluster-enabled", "yes", "--cluster-port", str(self.bus))


class ClusterNodes:
    """The nodes of a cluster, which must still be connected."""

    def __init__(self, number: int) -> None:
        self._nodes = [ClusterNode() for _ in range(number)]

    def __enter__(self) -> list[ClusterNode]:
        for node in self._nodes:
            node.start()
        return self._nodes

    def __exit__(self, *exc: object) -> None:
        for node in self._nodes:
            node.close()


async def connect_nodes(nodes: list[ClusterNode]) -> None:
    """Makes a cluster of the nodes, each with an equal part of the slots, in order."""
    for number, node in enumerate(nodes):
        first, end = SLOTS * number // len(nodes), SLOTS * (number + 1) // len(nodes)
        node.do("CLUSTER", "ADDSLOTS", *range(first, end))
        node.do("CLUSTER", "MEET", "127.0.0.1", nodes[0].port, nodes[0].bus)
    async with asyncio.timeout(30):
        while not all(b"cluster_state:ok" in node.do("CLUSTER", "INFO") for node in nodes):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
