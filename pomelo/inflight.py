"""What is in flight: calls, and the bytes of their bodies that are buffered, of each owner and in all.

An owner is an account, or a key where the account is not known. Transport-free; one `InFlight` a process.
"""

from dataclasses import dataclass

from pomelo.errors import PomeloError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class InFlightLimits:
    """What may be in flight: calls from their admission to their end, and bytes of bodies and messages that
    are buffered. `account_*` bound one owner."""

    calls: int = 2_000
    account_calls: int = 1_000
    bytes: int = 512 * MIB
    account_bytes: int = 128 * MIB


class _Usage:
    """What one owner has in flight."""

    __slots__ = ("bytes", "calls")

    def __init__(self) -> None:
        self.calls = 0
        self.bytes = 0


class InFlight:
    """Counts calls and buffered bytes, of each owner and of all together. O(1), and bounded by what runs."""

    def __init__(self, limits: InFlightLimits | None = None) -> None:
        self.limits = limits or InFlightLimits()
        self.calls = 0
        self.bytes = 0
        self._owners: dict[str, _Usage] = {}

    def enter(self, owner: str, concurrent: int | None = None) -> "Ticket":
        """Counts one more call of `owner` until its ticket is closed. `concurrent` is how many tasks its plan
        allows at a time (None: no limit): a few times as many calls may be in flight.

        Raises:
            PomeloError: concurrency_limit_exceeded (a plan that has such a limit), overloaded.
        """
        limits = self.limits
        used = self._owners.get(owner)
        if used is not None:
            share = limits.account_calls
            if concurrent is not None and used.calls >= min(share, max(64, 4 * concurrent)):
                raise PomeloError("concurrency_limit_exceeded")
            if used.calls >= share:
                raise PomeloError("overloaded")
        if self.calls >= limits.calls:
            raise PomeloError("overloaded")
        if used is None:
            used = self._owners[owner] = _Usage()
        used.calls += 1
        self.calls += 1
        return Ticket(self, owner, used)

    def _leave(self, owner: str, used: _Usage, size: int) -> None:
        self.calls -= 1
        self.bytes -= size
        used.calls -= 1
        used.bytes -= size
        if not used.calls:
            del self._owners[owner]


class Ticket:
    """One call in flight. `size` is the bytes of it that are buffered."""

    __slots__ = ("_in_flight", "_open", "_owner", "_used", "size")

    def __init__(self, in_flight: InFlight, owner: str, used: _Usage) -> None:
        self._in_flight = in_flight
        self._owner = owner
        self._used = used
        self._open = True
        self.size = 0

    def reserve(self, size: int) -> None:
        """Counts `size` more bytes as buffered until the ticket is closed.

        Raises:
            PomeloError: overloaded; nothing was counted.
        """
        in_flight, used = self._in_flight, self._used
        limits = in_flight.limits
        if used.bytes + size > limits.account_bytes or in_flight.bytes + size > limits.bytes:
            raise PomeloError("overloaded")
        self.size += size
        used.bytes += size
        in_flight.bytes += size

    def close(self) -> None:
        """The call has ended. Idempotent."""
        if self._open:
            self._open = False
            self._in_flight._leave(self._owner, self._used, self.size)
