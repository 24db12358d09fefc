"""Routes in practice: who may be asked now, and what happens when one of them fails.

The engine makes one `Router` and asks it for a task's events. Before the first event nothing has
been delivered, so after a failure the same route is retried after a wait, or the next route is
tried; after the first event, never. A route's circuit breaker decides whether an account may use it
now.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import date
from math import ceil, inf
from typing import Any, TypeVar

from pomelo.catalog.catalog import Model, Route
from pomelo.catalog.retirement import is_past
from pomelo.engine.circuit_breaker import CircuitBreaker
from pomelo.errors import PomeloError, Replay
from pomelo.providers.base import CALLER, Event, Job, JobMethod, Provider, fit_hook, fitted, method
from pomelo.providers.fitting import Fitting, Hook, fit
from pomelo.providers.guard import GuardedEvents
from pomelo.times import today_utc

J = TypeVar("J", bound=Job)

RETRIES = 2
"""How often one route is asked again."""

WAIT_LEAST, WAIT_MOST = 0.25, 5.0
"""Seconds before the first retry (each later one waits twice as long), and the longest wait, also for a
vendor that asks for more: its caller is told to come back instead."""

_TROUBLE = frozenset({"provider_unavailable", "deadline_exceeded"})
"""Codes that mean the vendor is failing. The caller's own deadline is not among them: it cancels
the call."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A route that can serve a task, and by whom."""

    route: Route
    method: JobMethod
    kind: str
    """The task type."""
    breaker: CircuitBreaker | None
    """None for the sandbox, whose troubles are made to order."""
    hook: Hook | None = None

    def fit(self, given: Any, model: Model, most_tokens: int | None = None) -> Fitting:
        """A valid input as the route takes it; see `pomelo.fitting.fit`."""
        return fit(given, model, self.route, self.hook, most_tokens)

    def take_over(self, job: J) -> J:
        """A job of another route, as this one takes it."""
        return fitted(replace(job, route=self.route), self.hook)


class Router:
    """Asks the routes of a model in order.

    `providers` are by name. `clock` is monotonic, as deadlines are; `sleep` and `chance` (0 to 1) time the
    retries; `breaker` makes the circuit breaker of a provider's model; `today` is the date in UTC.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
        breaker: Callable[[str, str], CircuitBreaker] = CircuitBreaker,
        today: Callable[[], date] = today_utc,
    ) -> None:
        self._providers = providers
        self._clock = clock
        self._sleep = sleep
        self._chance = chance
        self._make_breaker = breaker
        self._today = today
        self._breakers: dict[tuple[str, str], CircuitBreaker] = {}

    def candidates(self, model: Model, kind: str, *, live: bool) -> list[Candidate]:
        """The routes that can serve a model, in order: for a test key the sandbox alone. A route that has
        ended is left out, unless no other one is there: its date may be wrong.

        Raises:
            PomeloError: provider_not_configured; there is none.
        """
        found = []
        for route in model.routes if live else (Route("sandbox", model.name),):
            provider = self._providers.get(route.provider)
            if provider is not None and provider.configured:
                provider_method = method(provider, kind)
                if provider_method is not None:
                    breaker = self._breaker(route) if live else None
                    hook = fit_hook(provider, kind)
                    found.append(Candidate(route, provider_method, kind, breaker, hook))
        if not found:
            raise PomeloError("provider_not_configured", field="model")
        if len(found) > 1 and any(candidate.route.retires for candidate in found):
            today = self._today()
            found = [one for one in found if not is_past(one.route.retires, today)] or found
        return found

    def preview(self, model: Model, kind: str, given: Any) -> Fitting:
        """A valid input as the first route of a model takes it, configured or not."""
        route = model.routes[0]
        return fit(given, model, route, fit_hook(self._providers.get(route.provider), kind))

    def _breaker(self, route: Route) -> CircuitBreaker:
        key = (route.provider, route.model)
        breaker = self._breakers.get(key)
        if breaker is None:
            breaker = self._breakers[key] = self._make_breaker(*key)
        return breaker

    def events(
        self,
        job: J,
        candidates: Sequence[Candidate],
        asked: Callable[[J], None] = lambda job: None,
        *,
        account: str = "",
    ) -> AsyncGenerator[Event, None]:
        """The events of a task, from the first candidate that gives any; to be closed by the caller. `job` is
        the first candidate's. `asked` is called with each route's job before the provider is. `account` owns
        the task: breakers and connections are shared fairly between accounts.

        Raises:
            PomeloError: the failure of the last candidate that was tried; provider_unavailable when
                the circuit breakers skip all of them.
        """
        first = candidates[0]
        if first.breaker is None:
            asked(job)
            return first.method(job)
        return self._asked(job, candidates, asked, account)

    async def _asked(
        self, job: J, candidates: Sequence[Candidate], asked: Callable[[J], None], account: str
    ) -> AsyncGenerator[Event, None]:
        failure: PomeloError | None = None
        left_alone = inf
        clock = self._clock
        for candidate in candidates:
            breaker = candidate.breaker or CircuitBreaker()
            routed = job if candidate.route is job.route else candidate.take_over(job)
            for retry in range(RETRIES + 1):
                attempt = breaker.acquire(account, clock())
                if attempt is None:
                    left_alone = min(left_alone, breaker.retry_after(account, clock()))
                    break
                if not retry:
                    asked(routed)
                begun = False
                routed.report.cost = None  # what an earlier attempt cost is not billed
                try:
                    CALLER.set(account)
                    async with aclosing(GuardedEvents(candidate.method, candidate.kind, routed)) as events:
                        async for event in events:
                            if not begun:
                                begun = True
                                breaker.succeeded(attempt, clock())
                            yield event
                            CALLER.set(account)  # another asyncio task may read the next event
                    return
                except PomeloError as error:
                    failure = error
                    if error.code in _TROUBLE:
                        breaker.failed(attempt, clock(), error.code)
                finally:
                    breaker.release(attempt, clock())
                if begun or failure.replay == Replay.NEVER:
                    raise failure
                if failure.replay == Replay.ELSEWHERE or retry == RETRIES:
                    break
                wait = self._wait(failure, retry)
                if wait > WAIT_MOST or clock() + wait >= job.deadline:
                    break
                await self._sleep(wait)
        if failure is None:
            failure = PomeloError("provider_unavailable", retry_after=max(1, ceil(left_alone)))
        raise failure

    def _wait(self, failure: PomeloError, retry: int) -> float:
        """Seconds before the next retry: what the vendor asked for, else growing ones, spread by chance."""
        if failure.wait is not None:
            return failure.wait
        return WAIT_LEAST * (1 << retry) * (0.5 + self._chance() / 2)
