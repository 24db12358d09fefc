"""The limit on failed keys: an address that sends one bad key after another gets rate_limit_exceeded.

A valid key is never refused because of its address: behind a proxy all callers share one address. Only the
error for a bad key changes, from invalid_api_key to rate_limit_exceeded.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from pomelo.network.origin import network

LIMIT = 20
"""The number of failures of an address in a window that get invalid_api_key."""

WINDOW = 60.0
"""Seconds from the first failure of an address to the end of its window."""

MAX_ADDRESSES = 10_000
"""The maximum number of stored addresses; the address that failed least recently is dropped first."""


@dataclass(slots=True, eq=False)
class _Failures:
    """The failures of an address in its window, which ends at `window_end` on the monotonic clock."""

    window_end: float
    count: int = 0
    last_digest: bytes = b""


class FailedKeys:
    """Counts failed keys by address. Each operation is O(1), and memory is bounded."""

    def __init__(
        self,
        limit: int = LIMIT,
        max_addresses: int = MAX_ADDRESSES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._max_addresses = max_addresses
        self._monotonic = monotonic
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def is_repeated(self, address: str, key: str) -> bool:
        """Whether an address that has reached the limit sends its last failed key again."""
        failures = self._failures.get(network(address))
        return (
            failures is not None
            and failures.count >= self._limit
            and failures.window_end > self._monotonic()
            and failures.last_digest == _digest(key)
        )

    def count(self, address: str, key: str | None) -> int | None:
        """Counts a failed or missing key. Returns None while the address is within the limit, else the
        seconds until its window ends, rounded up. The empty address (a unix socket) has no limit."""
        if not address:
            return None
        name = network(address)
        now = self._monotonic()
        failures = self._failures.get(name)
        if failures is None or failures.window_end <= now:
            failures = self._failures[name] = _Failures(now + WINDOW)
            if len(self._failures) > self._max_addresses:
                self._failures.popitem(last=False)
        self._failures.move_to_end(name)
        if failures.count < self._limit:
            failures.count += 1
            wait = None
        else:
            wait = max(1, ceil(failures.window_end - now))
        if failures.count >= self._limit:
            failures.last_digest = _digest(key) if key is not None else b""
        return wait


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=16).digest()
