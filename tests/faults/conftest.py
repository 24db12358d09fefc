"""A server in a process of its own, a Redis server, and the answers of the fake vendors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pomelo.testing import FaultUpstream
from tests.faults.vendor import Vendor
from tests.redis_server import RedisServer


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A Redis server of the test's own."""
    with RedisServer() as started:
        yield started


@pytest.fixture
def vendor(upstream: FaultUpstream) -> Iterator[Vendor]:
    upstream.reset()
    upstream.default = answers = Vendor()
    yield answers
    upstream.default = None
    upstream.reset()
