"""Runs a task on the routes of its model: retries, fallback routes and circuit breakers.

Before the first event nothing has been delivered, so a failed call is retried on the same route after a wait,
or the next route is tried; after the first event, never. A route's circuit breaker decides whether an account
may use it now.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from math import ceil, inf
from typing import Any

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.retirement import is_past
from pomelo.engine.circuit_breaker import Attempt, CircuitBreaker, State
from pomelo.engine.upstream_calls import UpstreamCalls
from pomelo.errors import PomeloError
from pomelo.protobuf.times import today_utc
from pomelo.providers.base import (
    VENDOR_CALL,
    CompleteMethod,
    Event,
    Job,
    JobMethod,
    Provider,
    complete_method,
    fit_hook,
    fit_job,
    is_built_in,
    job_method,
)
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.fitting import Fitting, Given, Hook, fit
from pomelo.providers.guard import GuardedEvents
from pomelo.providers.http.connections import NoConnectionError
from pomelo.telemetry.events import NextStep

ATTEMPTS = 3
"""How often one route is called for a task."""

WAIT_INITIAL, WAIT_MAX = 0.25, 5.0
"""Seconds before the first retry, doubled for each later one, and the longest wait. If a vendor asks for a
longer wait, the next route is called; without one, the task fails and its caller is asked to retry."""

_STATES = State.CLOSED, State.HALF_OPEN, State.OPEN

_VENDOR_FAILURES = frozenset({"provider_unavailable", "deadline_exceeded"})
"""Codes that mean that the vendor is failing. The caller's own deadline is not among them: it cancels the
call."""

DEADLINE_MARGIN = 0.1
"""Seconds before a deadline from which a cancelled task counts as late: a gRPC client cancels at its own
deadline, which is earlier by the time that its call took to arrive."""

_LATE = UpstreamError("deadline_exceeded", reason="the vendor did not answer before the task's deadline")
_NOT_SENT = UpstreamError(
    "deadline_exceeded", reason="nothing could be sent to the vendor before the task's deadline"
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A route that can serve a task, with its provider's methods."""

    route: Route
    provider: Provider
    method: JobMethod
    complete: CompleteMethod | None
    task_type: str
    hook: Hook | None

    def fit(self, given: Given[Any], model: Model, max_tokens: int | None = None) -> Fitting:
        """Fit a valid input to the route. `max_tokens` are the tokens of output that are reserved; None: the
        model's own maximum."""
        return fit(given, model, self.route, self.hook, max_tokens)

    def take_over(self, job: Job[Any]) -> Job[Any]:
        """Return a job of another route, fitted to this one."""
        return fit_job(replace(job, route=self.route), self.hook)


@dataclass(frozen=True, slots=True)
class LiveCandidate(Candidate):
    """A route to a vendor. The sandbox has no circuit breaker: its failures are requested by callers.
    `trusted`: the provider is Pomelo's own code."""

    breaker: CircuitBreaker
    trusted: bool


Events = GuardedEvents | AsyncGenerator[Event, None]


class Router:
    """Runs tasks on the routes of a model, in order.

    `providers` are by name. `clock` is monotonic, as deadlines are; `sleep` waits before a retry; `jitter`
    returns a random number from 0 to 1; `breaker` creates the circuit breaker of a provider's model; `today`
    returns the date in UTC.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        breaker: Callable[[str, str], CircuitBreaker] = CircuitBreaker,
        today: Callable[[], date] = today_utc,
    ) -> None:
        self._providers = providers
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._make_breaker = breaker
        self._today = today
        self._breakers: dict[tuple[str, str], CircuitBreaker] = {}
        self._candidates: dict[tuple[int, str], Candidate] = {}
        """By the identity of the route, which the candidate keeps alive, and the task type."""
        self._sandbox_routes: dict[str, Route] = {}

    def configure(self, providers: Mapping[str, Provider], models: Iterable[Model]) -> None:
        """Replace the providers. Keep the circuit breakers of routes that can still be called: no call would
        close another. Candidates that were returned before keep theirs."""
        self._providers = providers
        served = {
            (route.provider, route.model)
            for model in models
            for route in model.routes
            if (provider := providers.get(route.provider)) is not None and provider.configured
        }
        self._breakers = {key: breaker for key, breaker in self._breakers.items() if key in served}
        self._candidates = {}
        self._sandbox_routes = {}

    def candidates(self, model: Model, task_type: str, *, live: bool) -> list[Candidate]:
        """Return the routes that can serve a model, in order; for a test key, only the sandbox. A retired
        route is left out, unless all are retired: the dates may be wrong.

        Raises:
            PomeloError: provider_not_configured; no route can serve the model.
        """
        routes = model.routes if live else (self._sandbox_route(model),)
        found: list[Candidate] = []
        for route in routes:
            candidate = self._candidate(route, task_type, live)
            if candidate is not None:
                found.append(candidate)
        if not found:
            raise PomeloError("provider_not_configured", field="model")
        if len(found) > 1 and any(one.route.retires for one in found):
            today = self._today()
            found = [one for one in found if not is_past(one.route.retires, today)] or found
        return found

    def _candidate(self, route: Route, task_type: str, live: bool) -> Candidate | None:
        """The candidate of a route, None if its provider is not configured or does not support the type."""
        provider = self._providers.get(route.provider)
        if provider is None or not provider.configured:
            return None
        known = self._candidates.get((id(route), task_type))
        if known is not None and known.provider is provider:
            return known
        method = job_method(provider, task_type)
        if method is None:
            return None
        complete, hook = complete_method(provider, task_type), fit_hook(provider, task_type)
        if live:
            breaker, trusted = self._breaker(route), is_built_in(provider)
            found: Candidate = LiveCandidate(
                route, provider, method, complete, task_type, hook, breaker, trusted
            )
        else:
            found = Candidate(route, provider, method, complete, task_type, hook)
        self._candidates[id(route), task_type] = found
        return found

    def _sandbox_route(self, model: Model) -> Route:
        route = self._sandbox_routes.get(model.name)
        if route is None:
            route = self._sandbox_routes[model.name] = Route("sandbox", model.name)
        return route

    def preview(self, model: Model, task_type: str, given: Given[Any]) -> Fitting:
        """Fit a valid input to the first route of a model, even if its provider is not configured."""
        route = model.routes[0]
        return fit(given, model, route, fit_hook(self._providers.get(route.provider), task_type))

    def _breaker(self, route: Route) -> CircuitBreaker:
        key = (route.provider, route.model)
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = self._make_breaker(*key)
        return breaker

    def circuit_states(self) -> dict[tuple[str, ...], int]:
        """Return the states of the circuit breakers by provider and its model: 0 closed, 1 half-open, 2
        open."""
        return {route: _STATES.index(breaker.state) for route, breaker in self._breakers.items()}

    def blocked_routes(self) -> set[tuple[str, ...]]:
        """Return the routes, as provider and its model, that are blocked for all accounts, or for each one
        that has called them; one whose first calls have failed does not count."""
        return {route for route, breaker in self._breakers.items() if _is_blocked(breaker)}

    async def start(
        self,
        job: Job[Any],
        candidates: Sequence[Candidate],
        calls: UpstreamCalls,
        on_route: Callable[[Job[Any]], None] = lambda job: None,
    ) -> Event | Events:
        """Call the candidates in order, until one answers: return its whole answer as the last event, or the
        events of its answer once the first one has arrived. The caller must close them.

        `job` is the first candidate's. `calls` counts and reports the calls, and names the account: breakers
        and connections are shared fairly between accounts. `on_route` is called with the job of each route
        before its provider is.

        Raises:
            PomeloError: the last failure that a retry may resolve, else that of the last candidate that
                was tried. A candidate that its circuit breaker skips may answer a retry:
                provider_unavailable.
        """
        failure: UpstreamError | None = None
        latest: UpstreamError | None = None
        open_for = inf
        clock, account = self._clock, calls.account
        for number, candidate in enumerate(candidates, 1):
            if not isinstance(candidate, LiveCandidate):
                calls.begin(candidate.route, number)
                on_route(job)
                if candidate.complete is not None and not job.stream:
                    return await candidate.complete(job)
                return candidate.method(job)
            breaker = candidate.breaker
            routed = job if candidate.route is job.route else candidate.take_over(job)
            for attempt_number in range(ATTEMPTS):
                attempt = breaker.acquire(account, clock())
                if attempt is None:
                    if not calls.attempts:
                        calls.skip(candidate.route, number)
                    open_for = min(open_for, breaker.retry_after(account, clock()))
                    break
                if not attempt_number:
                    on_route(routed)
                if latest is not None:
                    routed.report.reset()
                calls.begin(candidate.route, number, clock())
                answer: Event | GuardedEvents | None = None
                try:
                    answer = await self._answer(candidate, routed, attempt, calls)
                    return answer
                except PomeloError as error:
                    self._report(breaker, attempt, error)
                    if not isinstance(error, UpstreamError) or error.retry is RetryPolicy.NEVER:
                        calls.report(routed, error, clock(), "end", 0.0)
                        raise
                    latest = error
                    if failure is None or failure.retry_after is None or error.retry_after is not None:
                        failure = error
                    if isinstance(error, NoConnectionError):
                        calls.unsent += 1
                except asyncio.CancelledError:
                    calls.unsent += calls.waits
                    if is_late(clock(), job.deadline):
                        late = _NOT_SENT if calls.waits else _LATE
                        calls.report(routed, late, clock(), "end", 0.0)
                    raise
                finally:
                    if not isinstance(answer, GuardedEvents):  # these end later
                        now = clock()
                        calls.end(now)
                        breaker.release(attempt, now)
                wait = self._wait(latest, attempt_number)
                is_last = (
                    latest.retry is RetryPolicy.NEXT_ROUTE
                    or attempt_number == ATTEMPTS - 1
                    or wait > WAIT_MAX
                    or clock() + wait >= job.deadline
                )
                if is_last:
                    next_step: NextStep = "next route" if number < len(candidates) else "end"
                    calls.report(routed, latest, clock(), next_step, 0.0)
                    break
                calls.report(routed, latest, clock(), "retry", wait)
                await self._sleep(wait)
        if failure is None or (failure.retry_after is None and open_for < inf):
            skipped = "all" if failure is None else "the other"
            reason = f"the circuit breakers skip {skipped} routes, because their vendors failed before"
            failure = UpstreamError("provider_unavailable", wait=max(1, ceil(open_for)), reason=reason)
        try:
            raise failure
        finally:
            del failure, latest  # their tracebacks reference this frame

    async def _answer(
        self, candidate: LiveCandidate, job: Job[Any], attempt: Attempt, calls: UpstreamCalls
    ) -> Event | GuardedEvents:
        """Call a vendor once. Its circuit breaker learns of a success, and of the end of the events."""
        breaker = candidate.breaker
        calls.job = job
        VENDOR_CALL.set(calls)
        guarded = GuardedEvents(
            candidate.method, candidate.task_type, job, calls.account, trusted=candidate.trusted
        )
        if candidate.complete is not None and not job.stream:
            event = await guarded.complete(candidate.complete)
            breaker.succeeded(attempt, self._clock())
            return event
        await guarded.begin()
        if not guarded.ended:
            breaker.succeeded(attempt, self._clock())

        def failed(error: PomeloError) -> None:
            self._report(breaker, attempt, error)
            calls.report(job, error, self._clock(), "end", 0.0)

        def closed() -> None:
            now = self._clock()
            calls.end(now)
            breaker.release(attempt, now)

        guarded.on_failure = failed
        guarded.on_close = closed
        return guarded

    def _report(self, breaker: CircuitBreaker, attempt: Attempt, error: PomeloError) -> None:
        """Report a failure to the circuit breaker, if it is the vendor's."""
        if error.code in _VENDOR_FAILURES:
            breaker.failed(attempt, self._clock(), error.code)

    def _wait(self, failure: UpstreamError, attempt_number: int) -> float:
        """Seconds before the next attempt: the vendor's Retry-After, else exponential backoff with jitter."""
        if failure.wait is not None:
            return failure.wait
        return WAIT_INITIAL * (1 << attempt_number) * (0.5 + self._jitter() / 2)


def is_late(now: float, deadline: float) -> bool:
    """Whether a task that is cancelled now has reached its deadline."""
    return now >= deadline - DEADLINE_MARGIN


def _is_blocked(breaker: CircuitBreaker) -> bool:
    accounts = {*breaker.account_states} - {None}
    return breaker.state is not State.CLOSED or (bool(accounts) and State.CLOSED not in accounts)
