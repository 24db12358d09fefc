"""Free ports of loopback."""

from __future__ import annotations

import os
import random
import socket

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# Below the system's ephemeral ports, and disjoint from the ports of the other test processes.
_PORTS = range(10_000 + _WORKER, 32_000, _WORKERS)


def free_port() -> int:
    """Returns a free port that neither the system nor another test process will use."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
