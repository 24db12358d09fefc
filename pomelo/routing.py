"""Routes in practice: who may be asked now, and what happens when one of them fails.

The engine makes one `Router` and asks it for a task's events. Until the first event nothing was delivered,
so a failure may be mended: the same route again after a wait, or the next one. After it, never.
"""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from math import ceil

from pomelo.catalog import Model, Route
from pomelo.errors import PomeloError, Replay
from pomelo.providers.base import Event, Job, JobMethod, Provider, method

RETRIES = 2
"""How often one route is asked again."""

WAIT_LEAST, WAIT_MOST = 0.25, 5.0
"""Seconds before the first retry (each later one waits twice as long), and the longest wait, also for a
vendor that asks for more: its caller is told to come back instead."""

TRIPS_AT = 5
"""Failures in a row after which a route is left alone, and"""
RESTS_FOR = 10.0
"""seconds until one task may try it again."""

_TROUBLE = frozenset({"provider_unavailable", "deadline_exceeded"})


class Breaker:
    """Whether a route may be asked. Open after `trips_at` failures in a row; then one probe at a time."""

    __slots__ = ("_failures", "_rests_until", "_trips_at")

    def __init__(self, trips_at: int = TRIPS_AT) -> None:
        self._trips_at = trips_at
        self._failures = 0
        self._rests_until = 0.0

    def allows(self, now: float) -> bool:
        """Whether a task may ask now. Of an open breaker the first to hear yes after the rest is the probe:
        for others it rests on."""
        if self._failures < self._trips_at:
            return True
        if now < self._rests_until:
            return False
        self._rests_until = now + RESTS_FOR
        return True

    def rests(self, now: float) -> float:
        """Seconds until a task may ask; 0 when one may."""
        return max(0.0, self._rests_until - now) if self._failures >= self._trips_at else 0.0

    def succeeded(self) -> None:
        """The route answers."""
        self._failures = 0

    def failed(self, now: float) -> None:
        """The route is in trouble."""
        self._failures += 1
        if self._failures >= self._trips_at:
            self._rests_until = now + RESTS_FOR


@dataclass(frozen=True, slots=True)
class Candidate:
    """A route that can serve a task, and by whom."""

    route: Route
    method: JobMethod
    breaker: Breaker | None
    """None for the sandbox, whose troubles are made to order."""


class Router:
    """Asks the routes of a model in order.

    `providers` are by name. `clock` is monotonic, as deadlines are; `sleep` and `chance` (0 to 1) time the
    retries; `trips_at` is the breakers'.
    """

    def __init__(
        self,
        providers: Mapping[str, Provider],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
        trips_at: int = TRIPS_AT,
    ) -> None:
        self._trips_at = trips_at
        self._providers = providers
        self._clock = clock
        self._sleep = sleep
        self._chance = chance
        self._breakers: dict[tuple[str, str], Breaker] = {}

    def candidates(self, model: Model, kind: str, *, live: bool) -> list[Candidate]:
        """The routes that can serve a model, in order: for a test key the sandbox alone.

        Raises:
            PomeloError: provider_not_configured; there is none.
        """
        found = []
        for route in model.routes if live else (Route("sandbox", model.name),):
            provider = self._providers.get(route.provider)
            if provider is not None and provider.configured:
                provider_method = method(provider, kind)
                if provider_method is not None:
                    found.append(Candidate(route, provider_method, self._breaker(route) if live else None))
        if not found:
            raise PomeloError("provider_not_configured", field="model")
        return found

    def _breaker(self, route: Route) -> Breaker:
        return self._breakers.setdefault((route.provider, route.model), Breaker(self._trips_at))

    def events(
        self, job: Job, candidates: list[Candidate], asked: Callable[[Route], None] = lambda route: None
    ) -> AsyncGenerator[Event, None]:
        """The events of a task, from the first candidate that gives any; to be closed by the caller. `asked`
        hears of each route before it is asked.

        Raises:
            PomeloError: what the last candidate that was asked failed with; provider_unavailable when all
                of them are left alone for now.
        """
        first = candidates[0]
        if first.breaker is None:
            asked(first.route)
            return first.method(job)
        return self._asked(job, candidates, asked)

    async def _asked(
        self, job: Job, candidates: list[Candidate], asked: Callable[[Route], None]
    ) -> AsyncGenerator[Event, None]:
        failure: PomeloError | None = None
        rest = RESTS_FOR
        for candidate in candidates:
            breaker = candidate.breaker or Breaker()
            if not breaker.allows(self._clock()):
                rest = min(rest, breaker.rests(self._clock()))
                continue
            asked(candidate.route)
            routed = job if candidate.route is job.route else replace(job, route=candidate.route)
            for retry in range(RETRIES + 1):
                begun = False
                try:
                    async with aclosing(candidate.method(routed)) as events:
                        async for event in events:
                            if not begun:
                                begun = True
                                breaker.succeeded()
                            yield event
                    return
                except PomeloError as error:
                    failure = error
                if failure.code in _TROUBLE:
                    breaker.failed(self._clock())
                if begun or failure.replay == Replay.NEVER:
                    raise failure
                if failure.replay == Replay.ELSEWHERE or retry == RETRIES:
                    break
                wait = self._wait(failure, retry)
                if wait > WAIT_MOST or self._clock() + wait >= job.deadline:
                    break
                await self._sleep(wait)
                if not breaker.allows(self._clock()):
                    break
        if failure is None:
            failure = PomeloError("provider_unavailable", retry_after=max(1, ceil(rest)))
        raise failure

    def _wait(self, failure: PomeloError, retry: int) -> float:
        """Seconds before the next retry: what the vendor asked for, else growing ones, spread by chance."""
        if failure.wait is not None:
            return failure.wait
        return WAIT_LEAST * (1 << retry) * (0.5 + self._chance() / 2)
