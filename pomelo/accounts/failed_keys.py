"""The limit on failed keys: an address that sends one bad key after another gets
rate_limit_exceeded.

`Keyring` counts here. A good key is never refused because of its address: behind a proxy all
callers share one address. Only the answer to a bad key changes, from invalid_api_key to
rate_limit_exceeded.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from math import ceil

from pomelo.origin import network

LIMIT = 20
"""Failures of one address in a window that are answered with invalid_api_key."""

WINDOW = 60.0
"""Seconds from the first failure of an address to the end of its window."""

MAX_ADDRESSES = 10_000
"""The most addresses remembered; beyond it, those that failed longest ago are forgotten."""


class _Failures:
    """What an address did in its window. `ends` is on the monotonic clock, `last` a digest of a key."""

    __slots__ = ("count", "ends", "last")

    def __init__(self, ends: float) -> None:
        self.ends = ends
        self.count = 0
        self.last = b""


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

    @property
    def addresses(self) -> int:
        """How many addresses are remembered."""
        return len(self._failures)

    def is_repeated(self, address: str, key: str) -> bool:
        """Whether an address that has reached the limit sends its last failed key again."""
        found = self._failures.get(network(address))
        return (
            found is not None
            and found.count >= self._limit
            and found.ends > self._monotonic()
            and found.last == _digest(key)
        )

    def count(self, address: str, key: str | None) -> int | None:
        """Counts a failed or missing key. Returns None while the address is within the limit, else
        the whole seconds until its window ends. The empty address (a unix socket) has no limit."""
        if not address:
            return None
        name = network(address)
        now = self._monotonic()
        found = self._failures.get(name)
        if found is None or found.ends <= now:
            found = self._failures[name] = _Failures(now + WINDOW)
            if len(self._failures) > self._max_addresses:
                self._failures.popitem(last=False)
        self._failures.move_to_end(name)
        if found.count < self._limit:
            found.count += 1
            wait = None
        else:
            wait = max(1, ceil(found.ends - now))
        if found.count >= self._limit:
            found.last = _digest(key) if key is not None else b""
        return wait


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=16).digest()
