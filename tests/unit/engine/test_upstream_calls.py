"""What is counted and reported of the calls to providers, and which of their outcomes are evidence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from pomelo.engine.circuit_breaker import CircuitBreaker, State
from pomelo.engine.routing import Router
from pomelo.engine.upstream_calls import UpstreamCalls
from pomelo.gen.v1.text_pb2 import ROLE_USER, ContentPart, Message, TextInput
from pomelo.providers.base import Event, Job
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.guard import GuardedEvents
from pomelo.testing import error_reply
from tests.unit.engine.routing_rig import BUSY, MODEL, FailingProvider, Rig
from tests.unit.telemetry.reports import Reports

REVOKED = error_reply(401)
INPUT = TextInput(messages=[Message(role=ROLE_USER, content=[ContentPart(text="Hi")])])


async def fail(rig: Rig, router: Router, calls: UpstreamCalls, *, backwards: bool = False) -> str:
    """Runs a task that fails on all routes; returns the code of its error."""
    candidates = router.candidates(MODEL, "text", live=True)[:: -1 if backwards else 1]
    job = Job("task_1", MODEL, candidates[0].route, INPUT, True, 2_000.0)
    with pytest.raises(UpstreamError) as failure:
        await router.start(job, candidates, calls)
    return failure.value.code


async def test_each_failed_attempt_says_what_comes_next(rig: Rig) -> None:
    rig.one.default, rig.two.default = BUSY, REVOKED
    observer = Reports()
    calls = UpstreamCalls("ann", [observer])
    assert await fail(rig, rig.router(), calls) == "provider_unavailable"
    assert [(one.route, one.attempt, one.next_step, one.wait) for one in observer.attempts] == [
        (1, 1, "retry", 0.25),
        (1, 2, "retry", 0.5),
        (1, 3, "next route", 0.0),
        (2, 4, "end", 0.0),
    ]
    assert {one.account for one in observer.attempts} == {"ann"}
    assert (calls.attempts, calls.route_number, calls.status) == (4, 2, 401)


async def test_a_route_that_is_skipped_after_a_call_is_not_the_last_one_called(rig: Rig) -> None:
    router = rig.router()
    await rig.open_route(router, "ann", "bob")
    rig.two.default = REVOKED
    calls = UpstreamCalls()
    await fail(rig, router, calls, backwards=True)
    assert (calls.route, calls.route_number, calls.attempts) == (MODEL.routes[1], 1, 1)


async def test_a_route_that_is_skipped_before_any_call_is_reported(rig: Rig) -> None:
    router = rig.router()
    await rig.open_route(router, "ann", "bob")
    rig.one.reset()
    candidates = router.candidates(MODEL, "text", live=True)[:1]
    calls = UpstreamCalls("ann")
    with pytest.raises(UpstreamError) as failure:
        await router.start(Job("t", MODEL, MODEL.routes[0], INPUT, True, 2_000.0), candidates, calls)
    assert failure.value.code == "provider_unavailable"
    assert failure.value.wait is not None
    assert failure.value.wait >= 1
    assert (calls.route, calls.route_number, calls.attempts) == (MODEL.routes[0], 1, 0)


async def test_the_time_of_a_streamed_call_lasts_until_it_is_closed(rig: Rig) -> None:
    router = rig.router()
    candidates = router.candidates(MODEL, "text", live=True)
    calls = UpstreamCalls()
    job = Job("task_1", MODEL, candidates[0].route, INPUT, True, 2_000.0)
    events = await router.start(job, candidates, calls)
    assert isinstance(events, GuardedEvents)
    assert calls.seconds == 0
    rig.now += 3
    async with aclosing(events):
        pass
    assert calls.seconds == 3


@pytest.mark.parametrize("early", [0.05, 0.2])
async def test_a_task_that_is_cancelled_shortly_before_its_deadline_was_late(rig: Rig, early: float) -> None:
    started = asyncio.Event()

    class Silent:
        configured = True

        async def text(self, job: Job[Any]) -> AsyncIterator[Event]:
            started.set()
            await asyncio.Event().wait()
            yield Event()

        async def aclose(self) -> None: ...

    rig.providers["one"] = Silent()
    router, observer = rig.router(), Reports()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, INPUT, True, rig.now + early)
    task = asyncio.create_task(_start(router, job, candidates, UpstreamCalls("", [observer])))
    await started.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert [one.code for one in observer.attempts] == (["deadline_exceeded"] if early < 0.1 else [])


async def _start(router: Router, job: Job[Any], candidates: Any, calls: UpstreamCalls) -> None:
    await router.start(job, candidates, calls)


@pytest.mark.parametrize("stream", [False, True])
async def test_successes_of_whole_and_streamed_answers_keep_the_circuit_closed(
    rig: Rig, stream: bool
) -> None:
    router = rig.router()
    for _ in range(20):
        assert await rig.ask(router, "ann", stream=stream) == "from one"
    rig.one.script(*[BUSY] * 6)
    assert [await rig.ask(router, "ann", stream=stream) for _ in range(3)] == ["from two"] * 2 + ["from one"]


async def test_answers_without_an_event_are_no_evidence_for_the_vendor(rig: Rig) -> None:
    """Else a vendor that fails after them would be asked for a long time."""

    class Empty(FailingProvider):
        ended = 20

        async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
            self.calls += 1
            if self.calls <= self.ended:
                return
            raise UpstreamError("provider_unavailable", retry=RetryPolicy.NEXT_ROUTE)
            yield Event()

    rig.providers["one"] = provider = Empty()
    router = rig.router()
    for _ in range(provider.ended):
        assert await rig.ask(router, "ann") == ""
    for _ in range(10):
        assert await rig.ask(router, "ann") == "from two"
    assert provider.calls == provider.ended + 5, "its circuit opens after five failures"


async def test_a_route_is_blocked_once_each_account_that_called_it_is(rig: Rig) -> None:
    router = rig.router()
    router.candidates(MODEL, "text", live=True)
    assert router.blocked_routes() == set()
    assert router.circuit_states() == {("one", "a"): 0, ("two", "b"): 0}
    rig.providers["one"] = FailingProvider(
        UpstreamError("provider_unavailable", retry=RetryPolicy.NEXT_ROUTE)
    )
    for _ in range(5):
        assert await rig.ask(router, "ann") == "from two"
    assert router.blocked_routes() == {("one", "a")}
    # One call of another account that fails is no answer, although its own circuit is still closed.
    assert await rig.ask(router, "bob") == "from two"
    assert router.blocked_routes() == {("one", "a")}
    rig.providers["one"] = rig.providers["two"]
    assert await rig.ask(router, "bob") == "from two"
    assert router.blocked_routes() == set()
    assert router.circuit_states() == {("one", "a"): 0, ("two", "b"): 0}


async def test_providers_that_are_configured_later_replace_those_of_known_routes(rig: Rig) -> None:
    router = rig.router()
    assert await rig.ask(router) == "from one"
    router.configure({"two": rig.providers["two"]}, [MODEL])
    assert await rig.ask(router) == "from two"
    router.configure({"one": rig.providers["two"]}, [MODEL])
    assert await rig.ask(router) == "from two"


@pytest.mark.parametrize("change", ["the route", "the model", "the provider", "the credentials"])
async def test_the_circuit_of_a_route_that_can_no_longer_be_called_is_forgotten(
    rig: Rig, change: str
) -> None:
    router = rig.router()
    await rig.open_route(router, "ann", "bob")
    assert router.circuit_states() == {("one", "a"): 2, ("two", "b"): 0}
    router.configure(rig.providers, [MODEL])
    assert router.circuit_states() == {("one", "a"): 2, ("two", "b"): 0}
    providers, models = dict(rig.providers), [MODEL]
    if change == "the route":
        models = [replace(MODEL, routes=MODEL.routes[1:])]
    elif change == "the model":
        models = []
    elif change == "the provider":
        del providers["one"]
    else:
        providers["one"] = FailingProvider()
        providers["one"].configured = False
    router.configure(providers, models)
    assert router.circuit_states() == ({} if change == "the model" else {("two", "b"): 0})
    assert router.blocked_routes() == set()


def test_the_first_bucket_is_forgotten_once_it_has_its_part_of_the_calls() -> None:
    breaker = CircuitBreaker(minimum_calls=5)
    for second, fails in ((0, False), (1, True), (2, True)):
        for _ in range(3):
            attempt = breaker.acquire("ann", float(second))
            if attempt is None:
                break
            if fails:
                breaker.failed(attempt, float(second), "provider_unavailable")
            else:
                breaker.succeeded(attempt, float(second))
    assert breaker.account_states == [State.OPEN], "the successes count no more"


async def test_the_time_of_failed_attempts_counts(rig: Rig) -> None:
    class Slow(FailingProvider):
        async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
            rig.now += 2
            raise UpstreamError("provider_unavailable", retry=RetryPolicy.SAME_ROUTE)
            yield Event()

    rig.providers["one"], rig.two.default = Slow(), REVOKED
    calls = UpstreamCalls()
    await fail(rig, rig.router(), calls)
    assert calls.seconds == 6


def test_a_call_begins_without_a_response_and_counts_its_time() -> None:
    calls = UpstreamCalls("ann")
    assert calls.token("an_error_code_of_a_vendor_that_is_long") == "an_error_code_of_a_vendor_that_is_long"
    calls.begin(MODEL.routes[0], 1, 5.0)
    calls.status = 503
    calls.end(7.5)
    calls.begin(MODEL.routes[1], 2, 10.0)
    assert (calls.status, calls.route, calls.route_number, calls.attempts) == (0, MODEL.routes[1], 2, 2)
    calls.end(11.0)
    assert calls.seconds == 3.5
