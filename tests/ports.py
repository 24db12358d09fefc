"""Free ports of loopback."""

from __future__ import annotations

import itertools
import os
import random
import socket

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Below the system's ephemeral ports, and disjoint from the ports of the other test processes.
_PORTS = range(10_000 + _WORKER, 32_000, _WORKERS)
# In a random order of its own, whatever a test seeds. A port is not returned again soon: it may not be bound yet.
_order = itertools.cycle(random.Random().sample(_PORTS, len(_PORTS)))


def free_port() -> int:
    """Returns a free port that neither the system nor another test process will use."""
    while True:
        port = next(_order)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
