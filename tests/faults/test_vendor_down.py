"""The circuit breaker in a running app: failing prompts of one account, and vendors that are down."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from pomelo.accounts.audit import audit
from pomelo.engine.circuit_breaker import PROBE_WAIT, PROBE_WAIT_MAX, Attempt, CircuitBreaker, State
from pomelo.engine.routing import Router
from pomelo.providers.http.client import Timeouts
from pomelo.testing import Answer, FaultUpstream, Gate, Stop, error_reply
from tests.app import Account, RunningApp, run_app
from tests.driver import PROTOCOLS
from tests.tasks import text_body
from tests.waiting import until

OPENS_WITHIN = 15.0
"""Much more than the promised maximum, for a busy machine; the circuit breaker's unit tests check 2 s on a fake
clock."""

CLOSES_WITHIN = 15.0

PAUSE = 0.02
"""Seconds between two calls of one caller."""

SILENCE = 1.0
"""Seconds after which a silent vendor has failed; a good answer must take less on a busy machine."""


class CountingCircuitBreaker(CircuitBreaker):
    """A circuit breaker that counts the calls that it lets through."""

    attempts = running = max_running = 0

    def acquire(self, account: str, now: float) -> Attempt | None:
        attempt = super().acquire(account, now)
        if attempt is not None:
            self.attempts += 1
            self.running += 1
            self.max_running = max(self.max_running, self.running)
        return attempt

    def release(self, attempt: Attempt, now: float) -> None:
        super().release(attempt, now)
        self.running -= 1


@pytest.fixture
def breakers() -> list[CountingCircuitBreaker]:
    return []


@pytest.fixture
async def app(tmp_path: Path, breakers: list[CountingCircuitBreaker]) -> AsyncIterator[RunningApp]:
    def make(provider: str, model: str) -> CountingCircuitBreaker:
        breakers.append(CountingCircuitBreaker(provider, model))
        return breakers[-1]

    limits = Timeouts(connect=SILENCE, silence=SILENCE, whole=SILENCE)
    async with run_app(tmp_path, make_router=partial(Router, breaker=make), timeouts=limits) as opened:
        yield opened


class Traffic:
    """Callers that repeat a task; `outcomes` counts the codes by account."""

    def __init__(self, app: RunningApp) -> None:
        self.app = app
        self.outcomes: dict[str, Counter[str]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, caller: Account, prompt: str, *, callers: int = 1, pause: float = PAUSE) -> None:
        """Starts so many callers of one account; each makes one call at a time."""
        for number in range(callers):
            way, stream = PROTOCOLS[number % 3], number % 2 == 0
            self._tasks.append(asyncio.create_task(self._repeat(caller, way, prompt, stream, pause)))

    async def _repeat(self, caller: Account, way: str, prompt: str, stream: bool, pause: float) -> None:
        outcomes = self.outcomes.setdefault(caller.name, Counter())
        body = text_body(prompt, max_tokens=20)
        while True:
            answer = await self.app.ask(way, caller.live, body, stream=stream)
            outcomes[answer.code] += 1
            await asyncio.sleep(pause)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def count(self, code: str) -> int:
        return sum(outcomes[code] for outcomes in self.outcomes.values())


async def check_books(app: RunningApp, *callers: Account) -> None:
    """Waits until these callers have no reservation; checks that the audit then finds no difference."""
    for caller in callers:
        await app.idle(caller, live=True)
    report = await audit(app.server.store)
    assert not report.findings
    assert (report.difference_micros, report.reservations) == (0, 0)


@pytest.mark.parametrize("failure", ["500", "silence"])
async def test_failing_prompts_of_one_account_do_not_affect_other_accounts(
    app: RunningApp, failure: str
) -> None:
    reply = error_reply(500, "boom") if failure == "500" else Answer(before=(Stop.SILENCE,))
    app.upstream.when("failing", reply)
    app.upstream.default = Answer("A good answer.")
    failing, other = await app.account(), await app.account()
    traffic = Traffic(app)
    traffic.start(other, "Hello", callers=3)
    traffic.start(failing, "failing", callers=12, pause=0.05)
    await until(lambda: traffic.outcomes.get(other.name, Counter())["ok"] >= 60, 60)
    await until(lambda: traffic.outcomes.get(failing.name, Counter()).total() >= 60, 60)
    await traffic.stop()
    outcomes = traffic.outcomes[other.name]
    assert outcomes["ok"] >= 0.99 * outcomes.total(), outcomes
    assert traffic.outcomes[failing.name].keys() <= {"provider_unavailable", "deadline_exceeded"}
    requests = [request for request in app.upstream.requests if request.prompt == "failing"]
    assert len(requests) < traffic.outcomes[failing.name].total(), "some calls did not reach the vendor"
    await check_books(app, failing, other)


@asynccontextmanager
async def vendor_down(upstream: FaultUpstream, failure: str) -> AsyncIterator[None]:
    default = upstream.default
    if failure == "no connection":
        await upstream.__aexit__(None, None, None)
    else:
        upstream.default = error_reply(503, "down") if failure == "503" else Answer(before=(Stop.SILENCE,))
    try:
        yield
    finally:
        if failure == "no connection":
            await upstream.__aenter__()
        upstream.default = default


@pytest.mark.parametrize("failure", ["503", "silence", "no connection"])
async def test_the_circuit_of_a_vendor_that_is_down_opens_and_closes_again(
    app: RunningApp, breakers: list[CountingCircuitBreaker], failure: str
) -> None:
    app.upstream.default = Answer("A good answer.")
    callers = [await app.account() for _ in range(2)]
    traffic = Traffic(app)
    for caller in callers:
        traffic.start(caller, "Hello", callers=3)
    await until(lambda: traffic.count("ok") >= 20)
    assert traffic.count("ok") == sum(outcomes.total() for outcomes in traffic.outcomes.values())
    (breaker,) = [one for one in breakers if one.attempts]

    async with vendor_down(app.upstream, failure):
        limit = OPENS_WITHIN + (SILENCE if failure == "silence" else 0)  # from the first failure
        seconds = await until(lambda: breaker.state is not State.CLOSED, limit)
        assert seconds < limit
        await until(lambda: breaker.running == 0, 20)  # calls that were running
        breaker.attempts = breaker.max_running = 0
        seconds = await until(lambda: breaker.attempts > 0, PROBE_WAIT_MAX + 10)
        assert breaker.attempts <= 1 + seconds / PROBE_WAIT, "only probes"
        assert breaker.max_running == 1

    served = traffic.count("ok")
    seconds = await until(lambda: traffic.count("ok") >= served + 20, CLOSES_WITHIN)
    assert seconds < CLOSES_WITHIN
    await traffic.stop()
    await check_books(app, *callers)


async def test_the_circuit_opens_for_an_account_that_is_alone_at_a_vendor(app: RunningApp) -> None:
    app.upstream.default = error_reply(503, "down")
    caller = await app.account()
    traffic = Traffic(app)
    traffic.start(caller, "Hello", callers=10)
    await until(lambda: traffic.count("provider_unavailable") >= 100, 60)
    assert len(app.upstream.requests) <= 10 + 10, "calls that ran when the circuit opened, and probes"
    answer = await app.ask("rest", caller.live, text_body("Hello", max_tokens=20))
    assert (answer.code, answer.status) == ("provider_unavailable", 503)
    assert 1 <= int(answer.headers["retry-after"]) <= 8
    app.upstream.default = Answer("A good answer.")
    await until(lambda: traffic.count("ok") > 0, CLOSES_WITHIN)
    await traffic.stop()
    await check_books(app, caller)


async def test_short_deadlines_of_callers_open_no_circuit(app: RunningApp) -> None:
    app.upstream.when("slow", Answer(before=(Gate(),)))
    app.upstream.default = Answer("A good answer.")
    callers = [await app.account() for _ in range(2)]
    for caller in callers:
        answers = await asyncio.gather(
            *[
                app.ask(way, caller.live, text_body("slow", max_tokens=20), stream=stream, within=0.1)
                for way in PROTOCOLS
                for stream in (False, True)
                for _ in range(3)
            ]
        )
        assert {answer.code for answer in answers} == {"deadline_exceeded"}
    for caller in callers:
        for way in PROTOCOLS:
            assert (await app.ask(way, caller.live, text_body("Hello", max_tokens=20))).code == "ok"
