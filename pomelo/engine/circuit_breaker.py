"""The circuit breaker of a route: decides whether an account may call the vendor now.

It works on two levels. Each account has its own circuit on the route: if its calls fail, only this account
is blocked. The route's circuit blocks all accounts: it opens if nearly all accounts that call fail, and at
least two do. So inputs of one account that make the vendor answer 500 never block other accounts, and a
vendor that is down gets only probes.

    closed     calls pass, and their outcomes are counted
    open       no call passes until a wait is over
    half-open  one call passes as a probe; its success closes the circuit, its failure opens it again

Outcomes are counted over a sliding window of two buckets. A bucket is complete when it is BUCKET seconds old
and has its part of `minimum_calls`, or when it is half a window old: under load a window is a second long, on
a quiet route as long as it must be. Nothing here waits, locks or reads a clock. Every method is O(1), except
that closing the route's circuit iterates over the tracked accounts.
"""

from __future__ import annotations

import logging
from dataclasses import KW_ONLY, dataclass
from enum import Enum

log = logging.getLogger("pomelo.engine")

FAILURE_RATE = 0.8
"""The share of failures at which a circuit opens: of an account's calls, or of the accounts that call."""

MINIMUM_CALLS = 5
"""The fewest calls in a window at which a circuit can open."""

MINIMUM_ACCOUNTS = 2
"""Accounts that must fail before the route's circuit opens."""

WINDOW = 60.0
"""Seconds after which outcomes no longer count."""

PROBE_WAIT, PROBE_WAIT_MAX = 1.0, 5.0
"""Seconds from a circuit's opening, or from a failed probe, to the next probe. Each probe of an account that
does not succeed doubles the account's wait, up to the maximum, so that other accounts probe in between."""

PROBE_TIMEOUT = 8.0
"""Seconds after which a probe without an outcome no longer blocks the next probe."""

MAX_ACCOUNTS = 1000
"""Accounts that are tracked on a route."""

BUCKET = 0.5
"""The minimum length of a bucket in seconds."""

_MAX_WEIGHT = 2
"""The most failures of one account that count for the route. A single failure may be chance."""

_EVICTION_TRIES = 8


class State(Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


@dataclass(slots=True, eq=False)
class Attempt:
    """One call to the vendor. Its outcome is reported to the breaker that returned it."""

    account: str
    probes_account: bool = False
    probes_route: bool = False

    @property
    def probe(self) -> bool:
        """Whether its outcome closes or opens a circuit."""
        return self.probes_account or self.probes_route


class _Window:
    """Counts of the current and the previous bucket: calls, and the `good` and `bad` units that the owner
    counts. `number` is that of the current bucket."""

    __slots__ = ("bad", "calls", "good", "number", "old_bad", "old_calls", "old_good", "since")

    def __init__(self, now: float) -> None:
        self.number = 0
        self.clear(now)

    def clear(self, now: float) -> None:
        self.number += 2  # earlier counts can't be subtracted from the new buckets
        self.calls = self.good = self.bad = 0
        self.old_calls = self.old_good = self.old_bad = 0
        self.since = now

    def roll(self, now: float, minimum_calls: int, max_length: float) -> None:
        """Start a new bucket if the current one, which is at least BUCKET seconds old, is complete. Both
        together cover about `max_length` seconds at most."""
        age = now - self.since
        if 2 * self.calls < minimum_calls and age < max_length / 2:
            return
        if age >= max_length:
            self.clear(now)
            return
        self.old_calls, self.old_good, self.old_bad = self.calls, self.good, self.bad
        self.calls = self.good = self.bad = 0
        self.number += 1
        self.since = now


class _Account:
    """An account's own circuit on a route, and its vote about the route.

    `window` decides about its own circuit: it counts the account's last calls, however far apart. The vote
    counts only calls in the route's two buckets, so that it is as recent as the votes of busier accounts.
    """

    __slots__ = (
        "bad", "bucket", "good", "old_bad", "old_good", "probe", "probe_at", "served", "state", "vote",
        "wait", "window",
    )  # fmt: skip

    def __init__(self, now: float, wait: float) -> None:
        self.window = _Window(now)
        self.state = State.CLOSED
        self.probe: Attempt | None = None
        self.probe_at = 0.0
        """When the account may probe next, its own circuit or the route's."""
        self.wait = wait
        """Seconds to wait after its next failed probe."""
        self.served = False
        """Whether a call has succeeded since its circuit was last closed together with the route's."""
        self.bucket = -1
        """The route's bucket of `good`, `bad` and the vote; `old_…` belong to the previous bucket."""
        self.good = self.bad = self.old_good = self.old_bad = 0
        self.vote = 0
        """_MAX_WEIGHT: its calls succeed; negative: the number of its failures that count."""


@dataclass(eq=False)
class CircuitBreaker:
    """The circuits of one route. All times are from one monotonic clock, which the caller reads.

    Call `acquire` before every call to the vendor, also before a retry. Report the outcome of an attempt to
    `succeeded` or `failed`, if it is evidence about the vendor, and its end to `release`.
    """

    provider: str = ""
    model: str = ""
    _: KW_ONLY
    failure_rate: float = FAILURE_RATE
    minimum_calls: int = MINIMUM_CALLS
    minimum_accounts: int = MINIMUM_ACCOUNTS
    window: float = WINDOW
    probe_wait: float = PROBE_WAIT
    max_accounts: int = MAX_ACCOUNTS

    def __post_init__(self) -> None:
        self.state = State.CLOSED
        """The state of the route's circuit."""
        self._accounts: dict[str, _Account] = {}
        self._votes = _Window(0.0)
        """Votes of the accounts, each in the bucket of the account's last call."""
        self._probe: Attempt | None = None
        self._probe_expires = 0.0
        self._since = 0.0
        """When the route's circuit opened or its last probe failed."""

    @property
    def account_states(self) -> list[State | None]:
        """The states of the tracked accounts' own circuits; None for one that is still closed although no
        call of the account has succeeded."""
        return [
            None if own.state is State.CLOSED and own.window.bad and not own.served else own.state
            for own in self._accounts.values()
        ]

    def acquire(self, account: str, now: float) -> Attempt | None:
        """Return an attempt if the account may call the vendor now, otherwise None. The first call after the
        wait of an open circuit becomes its probe."""
        own = self._accounts.get(account)
        if self.state is State.CLOSED and (own is None or own.state is State.CLOSED):
            return Attempt(account)
        if self._ready_at(own) > now:
            return None
        attempt = Attempt(account)
        own = own or self._track(account, now)
        timeout = now + PROBE_TIMEOUT
        if self.state is not State.CLOSED:
            attempt.probes_route = True
            self._probe = attempt
            self._probe_expires = timeout
            self._change(State.HALF_OPEN, logging.INFO, "one call probes it")
        if own.state is not State.CLOSED:
            attempt.probes_account = True
            own.probe = attempt
            own.state = State.HALF_OPEN
        own.probe_at = timeout + PROBE_WAIT_MAX  # if it never ends, other accounts probe first
        return attempt

    def retry_after(self, account: str, now: float) -> float:
        """Return the seconds until the account may call the vendor; 0 if it may now."""
        return max(0.0, self._ready_at(self._accounts.get(account)) - now)

    def succeeded(self, attempt: Attempt, now: float) -> None:
        """Report success: the first event of the call has arrived."""
        own = self._accounts.get(attempt.account) or self._track(attempt.account, now)
        if attempt.probes_route and self.state is not State.CLOSED:
            self._close(now)
        if attempt.probes_account and own.state is not State.CLOSED:
            self._close_account(attempt.account, own, now)
        attempt.probes_route = attempt.probes_account = False
        own.served = True
        if own.state is State.CLOSED:
            own.wait = self.probe_wait
            own.probe_at = 0.0
            if self.state is State.CLOSED:
                self._count(own, now, failed=False)

    def failed(self, attempt: Attempt, now: float, reason: str) -> None:
        """Report a failure, of the vendor or of the account's input; `reason` is the error's code."""
        own = self._accounts.get(attempt.account) or self._track(attempt.account, now)
        if attempt.probe:
            if self._end_probe(attempt, own, now, reason) and self.state is State.CLOSED:
                self._count(own, now, failed=True)
        elif self.state is State.CLOSED and own.state is State.CLOSED:
            # Failures of calls that started before the circuit opened add no information.
            self._count(own, now, failed=True)
            window = own.window
            calls, bad = window.calls + window.old_calls, window.bad + window.old_bad
            if calls >= self.minimum_calls and bad >= self.failure_rate * calls:
                own.state = State.OPEN
                self._postpone(own, now)
                log.warning(
                    "circuit open: %s, model %s, for account %s alone: %d of its last %d calls failed, "
                    "the last with %s",
                    self.provider, self.model, attempt.account, bad, calls, reason,
                    extra=self._fields(State.OPEN, account=attempt.account),
                )  # fmt: skip
        if self.state is State.CLOSED:
            self._open_if_due(now, reason)

    def release(self, attempt: Attempt, now: float) -> None:
        """Report the end of the call; idempotent. A probe without an outcome immediately allows a probe of
        another account: its caller disconnected, its deadline passed, or its failure is not evidence."""
        if attempt.probe:
            own = self._accounts.get(attempt.account) or self._track(attempt.account, now)
            self._end_probe(attempt, own, now, None)

    # --- the route

    def _ready_at(self, own: _Account | None) -> float:
        """When a call of an account may pass; in the past if it may now."""
        at = 0.0
        if self.state is State.HALF_OPEN:
            at = self._probe_expires
        elif self.state is State.OPEN:
            at = self._since + self.probe_wait
        if own is not None and (self.state is not State.CLOSED or own.state is not State.CLOSED):
            at = max(at, own.probe_at)
        return at

    def _open_if_due(self, now: float, reason: str) -> None:
        votes = self._votes
        bad, good = votes.bad + votes.old_bad, votes.good + votes.old_good
        if (
            bad >= _MAX_WEIGHT * self.minimum_accounts
            and bad >= self.failure_rate * (bad + good)
            and votes.calls + votes.old_calls >= self.minimum_calls
        ):
            self._since = now
            self._change(State.OPEN, logging.WARNING, f"nearly all accounts fail, the last with {reason}")

    def _close(self, now: float) -> None:
        self._probe = None
        self._votes.clear(now)
        for name, own in self._accounts.items():
            # Failures in the meantime were the vendor's fault. But an account without a success since then
            # may have caused them, so its own circuit stays as it is.
            if own.state is not State.CLOSED and own.served:
                self._close_account(name, own, now)
                own.served = False
            own.window.clear(now)
        self._change(State.CLOSED, logging.WARNING, "the vendor answers")

    def _change(self, state: State, level: int, reason: str) -> None:
        if state is not self.state:
            self.state = state
            values = state.value, self.provider, self.model, reason
            log.log(level, "circuit %s: %s, model %s: %s", *values, extra=self._fields(state))

    def _fields(self, state: State, **more: str) -> dict[str, dict[str, str]]:
        fields = {"circuit": state.value, "provider": self.provider, "provider_model": self.model}
        return {"fields": fields | more}

    # --- accounts

    def _count(self, own: _Account, now: float, *, failed: bool) -> None:
        """Count an outcome for the account, and update its vote about the route."""
        window, votes = own.window, self._votes
        if now - window.since >= BUCKET:
            window.roll(now, self.minimum_calls, self.window)
        if now - votes.since >= BUCKET:
            votes.roll(now, self.minimum_calls, self.window)
        window.calls += 1
        votes.calls += 1
        if not failed and own.vote > 0 and own.bucket == votes.number:
            own.good += 1
            return  # its vote does not change
        self._retract(own)
        if own.bucket != votes.number:
            follows = own.bucket == votes.number - 1
            own.old_good, own.old_bad = (own.good, own.bad) if follows else (0, 0)
            own.good = own.bad = 0
            own.bucket = votes.number
        if failed:
            window.bad += 1
            own.bad += 1
        else:
            own.good += 1
        bad = own.bad + own.old_bad
        if bad and bad >= self.failure_rate * (bad + own.good + own.old_good):
            weight = min(bad, _MAX_WEIGHT)
            votes.bad += weight
            own.vote = -weight
        else:
            votes.good += _MAX_WEIGHT
            own.vote = _MAX_WEIGHT

    def _retract(self, own: _Account) -> None:
        """Remove an account's vote, if it still counts."""
        votes = self._votes
        good, bad = max(own.vote, 0), max(-own.vote, 0)
        if own.bucket == votes.number:
            votes.good -= good
            votes.bad -= bad
        elif own.bucket == votes.number - 1:
            votes.old_good -= good
            votes.old_bad -= bad
        own.vote = 0

    def _close_account(self, name: str, own: _Account, now: float) -> None:
        own.state = State.CLOSED
        own.probe = None
        own.window.clear(now)
        extra = self._fields(own.state, account=name)
        log.info("circuit closed: %s, model %s, for account %s", self.provider, self.model, name, extra=extra)

    def _postpone(self, own: _Account, now: float) -> None:
        """Delay the account's next probe, longer each time."""
        own.probe_at = now + own.wait
        own.wait = min(2 * own.wait, PROBE_WAIT_MAX)

    def _end_probe(self, attempt: Attempt, own: _Account, now: float, reason: str | None) -> bool:
        """Open the circuits of a probe again, and return whether it opened any: an expired probe opens none.
        `reason` is None for a probe without an outcome."""
        of_route, of_account = self._probe is attempt, own.probe is attempt
        attempt.probes_route = attempt.probes_account = False
        if of_route:
            self._probe = None
            if reason is None:
                self._since = now - self.probe_wait
                cause = "the probe ended without an outcome"
            else:
                self._since = now
                cause = f"the probe failed with {reason}"
            self._change(State.OPEN, logging.INFO, cause)
        if of_account:
            own.probe = None
            own.state = State.OPEN
        if of_route or of_account:
            self._postpone(own, now)
        return of_route or of_account

    def _track(self, account: str, now: float) -> _Account:
        """Start to track an account. If too many are tracked, drop an old one with a closed circuit."""
        accounts = self._accounts
        if len(accounts) >= self.max_accounts:
            for tried in range(_EVICTION_TRIES):
                name, own = next(iter(accounts.items()))
                del accounts[name]
                if own.state is State.CLOSED or tried == _EVICTION_TRIES - 1:
                    self._retract(own)
                    break
                accounts[name] = own  # move it to the end and try the next one
        own = accounts[account] = _Account(now, self.probe_wait)
        return own
