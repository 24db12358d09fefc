"""Routes, retries and circuit breakers, with real providers and servers that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Any

import pytest

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.engine.circuit_breaker import MINIMUM_CALLS, PROBE_WAIT_MAX, CircuitBreaker, State
from pomelo.engine.routing import ATTEMPTS, WAIT_MAX, Router
from pomelo.errors import PomeloError
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import Message, Role, TextDelta, TextInput
from pomelo.providers import Credentials
from pomelo.providers.base import CALLER, Event, Job
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter, NoConnectionError
from pomelo.testing import Answer, FaultUpstream, Gate, Stop, error_reply

BUSY = error_reply(503, "busy")
MODEL = Model(
    name="m",
    task_type=TaskType.TASK_TYPE_TEXT,
    routes=(Route("one", "a"), Route("two", "b")),
    limits=Limits(),
    prices=Prices({PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: 1}),
    price_version="test",
)


ACCOUNTS = pytest.mark.parametrize("accounts", [("a",), ("a", "b")], ids=["one account", "two accounts"])


@dataclass
class Rig:
    """Two providers, each with its own server, and a clock that sleeping advances."""

    one: FaultUpstream
    two: FaultUpstream
    providers: dict[str, Any]
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def router(self) -> Router:
        """A new router."""
        return Router(self.providers, clock=lambda: self.now, sleep=self.no_sleep, jitter=lambda: 1.0)

    async def no_sleep(self, seconds: float) -> None:
        """Advances the clock."""
        self.slept.append(seconds)
        self.now += seconds

    async def ask(
        self,
        router: Router,
        account: str = "",
        *,
        stream: bool = True,
        deadline: float = 2000.0,
        prompt: str = "Hi",
        model: Model = MODEL,
    ) -> str:
        """Runs a task; returns its text."""
        text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content=prompt)])
        candidates = router.candidates(model, "text", live=True)
        job = Job("task_1", model, candidates[0].route, text_input, stream, deadline)
        async with aclosing(router.events(job, candidates, account=account)) as events:
            return "".join([event.text_delta.content async for event in events])

    async def fail(self, router: Router, account: str = "", **options: Any) -> PomeloError:
        """Runs a task that fails; returns its error."""
        with pytest.raises(PomeloError) as raised:
            await self.ask(router, account, **options)
        return raised.value

    async def open_route(self, router: Router, *accounts: str) -> None:
        """Makes the first vendor busy, and runs tasks of the accounts until its circuit is open."""
        self.one.default = BUSY
        while self.request_counts()[0] < MINIMUM_CALLS:
            for account in accounts:
                assert await self.ask(router, account) == "from two"

    def request_counts(self) -> tuple[int, int]:
        """The number of requests to each server."""
        return len(self.one.requests), len(self.two.requests)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Two providers that answer."""
    async with FaultUpstream() as one, FaultUpstream() as two, Http() as http:
        one.default, two.default = Answer("from one"), Answer("from two")
        providers = {
            name: OpenAI(Credentials("sk-x", server.openai_base_url), http)
            for name, server in (("one", one), ("two", two))
        }
        yield Rig(one, two, providers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_route_is_retried_with_growing_waits(rig: Rig, stream: bool) -> None:
    rig.one.script(BUSY, BUSY)
    assert await rig.ask(rig.router(), stream=stream) == "from one"
    assert rig.slept == [0.25, 0.5]
    assert rig.request_counts() == (3, 0)


async def test_a_route_that_stays_busy_gives_way_to_the_next(rig: Rig) -> None:
    rig.one.default = BUSY
    assert await rig.ask(rig.router()) == "from two"
    assert rig.request_counts() == (ATTEMPTS, 1)


async def test_each_route_is_asked_for_its_own_model_and_announced_once(rig: Rig) -> None:
    rig.one.default = BUSY
    router = rig.router()
    given = TextInput(messages=[Message(role=Role.ROLE_USER, content="Hi")])
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, given, True, 2000.0)
    announced: list[Job[TextInput]] = []
    async with aclosing(router.events(job, candidates, announced.append)) as events:
        assert "".join([event.text_delta.content async for event in events]) == "from two"
    assert [one.route for one in announced] == list(MODEL.routes)
    for server, model in ((rig.one, "a"), (rig.two, "b")):
        assert {request.body["model"] for request in server.requests} == {model}


@pytest.mark.parametrize(("jitter", "waits"), [(0.0, [0.125, 0.25]), (0.5, [0.1875, 0.375])])
async def test_waits_vary_between_half_and_all_of_their_length(
    rig: Rig, jitter: float, waits: list[float]
) -> None:
    rig.one.script(BUSY, BUSY)
    router = Router(rig.providers, clock=lambda: rig.now, sleep=rig.no_sleep, jitter=lambda: jitter)
    assert await rig.ask(router) == "from one"
    assert rig.slept == waits


@pytest.mark.parametrize(
    ("days", "answer"),
    [((1, 1), "from one"), ((0, 1), "from one"), ((-1, 1), "from two"), ((-1, None), "from two"), ((-1, -1), "from one")],
)  # fmt: skip
async def test_a_retired_route_is_used_only_if_no_other_route_is_available(
    rig: Rig, days: tuple[int | None, ...], answer: str
) -> None:
    today = date(2030, 1, 10)
    routes = tuple(
        replace(route, retires=None if day is None else today + timedelta(day))
        for route, day in zip(MODEL.routes, days, strict=True)
    )
    router = Router(rig.providers, clock=lambda: rig.now, sleep=rig.no_sleep, today=lambda: today)
    assert await rig.ask(router, model=replace(MODEL, routes=routes)) == answer


async def test_a_call_whose_connection_fails_before_the_response_is_retried(rig: Rig) -> None:
    rig.one.script(Answer(before=(Stop.RESET,)))
    assert await rig.ask(rig.router()) == "from one"


async def test_nothing_is_retried_after_the_first_byte(rig: Rig) -> None:
    rig.one.script(Answer("one two three", at={2: Stop.CLOSE}))
    assert (await rig.fail(rig.router())).code == "provider_failed"
    assert rig.request_counts() == (1, 0)


@pytest.mark.parametrize(
    "reply",
    [error_reply(400, code="context_length_exceeded"), error_reply(400, code="content_policy_violation")],
    ids=["too long", "policy"],
)
async def test_an_error_of_the_caller_is_returned_immediately(rig: Rig, reply: Any) -> None:
    rig.one.script(reply)
    await rig.fail(rig.router())
    assert rig.request_counts() == (1, 0)
    assert rig.slept == []


@pytest.mark.parametrize(
    "reply",
    [error_reply(401, code="invalid_api_key"), error_reply(429, code="credit_balance_exhausted"), error_reply(404, code="model_not_found")],
    ids=["key", "money", "model"],
)  # fmt: skip
async def test_an_error_of_our_account_is_retried_on_the_next_route_without_a_wait(
    rig: Rig, reply: Any
) -> None:
    rig.one.script(reply)
    assert await rig.ask(rig.router()) == "from two"
    assert rig.slept == []


async def test_a_vendors_wait_is_respected_and_a_long_one_leads_to_the_next_route(rig: Rig) -> None:
    rig.one.script(error_reply(429, code="slow_down", headers={"Retry-After": "3"}))
    assert await rig.ask(rig.router()) == "from one"
    assert rig.slept == [3]
    rig.one.script(error_reply(429, code="slow_down", headers={"Retry-After": str(int(WAIT_MAX) + 1)}))
    assert await rig.ask(rig.router()) == "from two"
    assert rig.slept == [3]
    rig.one.script(error_reply(429, code="slow_down", headers={"Retry-After": str(int(WAIT_MAX))}))
    assert await rig.ask(rig.router()) == "from one"
    assert rig.slept == [3, WAIT_MAX]


async def test_the_last_failure_is_returned_with_the_vendors_wait(rig: Rig) -> None:
    rig.one.default = BUSY
    rig.two.default = error_reply(429, code="slow_down", headers={"Retry-After": "40"})
    error = await rig.fail(rig.router())
    assert (error.code, error.retry_after) == ("provider_unavailable", 40)


async def test_no_wait_exceeds_the_deadline(rig: Rig) -> None:
    rig.one.default = rig.two.default = BUSY
    assert (await rig.fail(rig.router(), deadline=rig.now + 0.3)).code == "provider_unavailable"
    assert rig.slept == [0.25]
    # A wait that ends at the deadline leaves no time for a call.
    assert (await rig.fail(rig.router(), deadline=rig.now + 0.25)).code == "provider_unavailable"
    assert rig.slept == [0.25]


@ACCOUNTS
async def test_a_failing_route_is_skipped_and_then_probed_by_one_task(
    rig: Rig, accounts: tuple[str, ...]
) -> None:
    router = rig.router()
    await rig.open_route(router, *accounts)
    tried = rig.request_counts()[0]
    for account in accounts * 3:
        assert await rig.ask(router, account) == "from two"
    assert rig.request_counts()[0] == tried, "an open circuit admits no call"

    rig.now += PROBE_WAIT_MAX
    for account in accounts:
        assert await rig.ask(router, account) == "from two"
    assert rig.request_counts()[0] == tried + 1, "one probe, and no retry of it"

    rig.now += PROBE_WAIT_MAX
    rig.one.default = Answer("recovered")
    for account in accounts * 2:
        assert await rig.ask(router, account) == "recovered"


@ACCOUNTS
async def test_during_the_probe_other_tasks_use_the_next_route(rig: Rig, accounts: tuple[str, ...]) -> None:
    router = rig.router()
    await rig.open_route(router, *accounts)
    rig.now += PROBE_WAIT_MAX
    rig.one.default = Answer("recovered")
    both = await asyncio.gather(rig.ask(router, accounts[0]), rig.ask(router, accounts[-1]))
    assert sorted(both) == ["from two", "recovered"]


async def test_failures_of_one_account_do_not_block_the_route_for_others(rig: Rig) -> None:
    router = rig.router()
    rig.one.when("poison", error_reply(500, "boom"))
    for _ in range(10):
        assert await rig.ask(router, "poisoner", prompt="poison") == "from two"
        assert await rig.ask(router, "other") == "from one"
    assert rig.request_counts()[0] == MINIMUM_CALLS + 10, "only the failing account is blocked from the route"


@pytest.mark.parametrize("vendors", [1, 2])
async def test_when_all_circuits_are_open_no_vendor_is_called_and_the_wait_is_returned(
    rig: Rig, vendors: int
) -> None:
    router = rig.router()
    rig.one.default = rig.two.default = BUSY
    if vendors == 1:
        del rig.providers["two"]
    for _ in range(MINIMUM_CALLS):
        await rig.fail(router, "a")
        await rig.fail(router, "b")
    request_counts = rig.request_counts()
    for account in ("a", "b", "c"):
        error = await rig.fail(router, account)
        assert error.code == "provider_unavailable"
        assert 1 <= (error.retry_after or 0) <= PROBE_WAIT_MAX
    assert rig.request_counts() == request_counts


@pytest.mark.parametrize("waits", [(2.0, 4.0), (4.0, 2.0)], ids=["first", "last"])
async def test_the_shortest_wait_of_several_open_circuits_is_returned(
    rig: Rig, waits: tuple[float, ...]
) -> None:
    longest = dict(zip(rig.providers, waits, strict=True))
    router = Router(
        rig.providers,
        clock=lambda: rig.now,
        sleep=rig.no_sleep,
        breaker=lambda name, model: CircuitBreaker(name, model, minimum_calls=1, probe_wait=longest[name]),
    )
    rig.one.default = rig.two.default = error_reply(500, "boom")
    await rig.fail(router, "a")
    rig.now += 0.5
    assert (await rig.fail(router, "a")).retry_after == 2


@pytest.mark.parametrize(
    "reply",
    [
        error_reply(400, code="context_length_exceeded"),
        error_reply(400, code="content_policy_violation"),
        error_reply(400, param="temperature"),
        error_reply(413, "large"),
    ],
    ids=["too long", "policy", "a value", "too large"],
)
async def test_invalid_requests_open_no_circuit(rig: Rig, reply: Any) -> None:
    router = rig.router()
    rig.one.default = reply
    for account in ("a", "b", "c") * MINIMUM_CALLS:
        assert (await rig.fail(router, account)).row.http in (400, 413)
    assert rig.request_counts() == (3 * MINIMUM_CALLS, 0)
    rig.one.default = Answer("from one")
    assert await rig.ask(router, "a") == "from one"


async def test_an_error_of_our_account_does_not_count_as_a_failure_of_the_vendor(rig: Rig) -> None:
    router = rig.router()
    rig.one.default = error_reply(401, code="invalid_api_key")
    for account in ("a", "b") * MINIMUM_CALLS:
        assert await rig.ask(router, account) == "from two"
    rig.one.default = Answer("from one")
    assert await rig.ask(router, "a") == "from one"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_callers_deadline_or_disconnect_does_not_count_as_a_failure_of_the_vendor(
    rig: Rig, stream: bool
) -> None:
    router = rig.router()
    rig.one.default = Answer("too late", before=(Gate(),))
    for account in ("a", "b") * MINIMUM_CALLS:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await rig.ask(router, account, stream=stream)
    rig.one.default = Answer("from one")
    assert await rig.ask(router, "a") == "from one"
    assert await rig.ask(router, "b") == "from one"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_vendor_that_stays_silent_is_skipped(rig: Rig, stream: bool) -> None:
    async with Http(Timeouts(silence=0.02, whole=0.02)) as http:
        rig.providers["one"] = OpenAI(Credentials("sk-x", rig.one.openai_base_url), http)
        router = rig.router()
        rig.one.default = Answer(before=(Stop.SILENCE,))
        for account in ("a", "b") * 2:
            assert (await rig.fail(router, account, stream=stream)).code == "deadline_exceeded"
        assert (await rig.fail(router, "a", stream=stream)).code == "deadline_exceeded"
        assert await rig.ask(router, "c", stream=stream) == "from two"
        rig.now += PROBE_WAIT_MAX
        rig.one.default = Answer("recovered")
        assert await rig.ask(router, "c", stream=stream) == "recovered"


async def test_a_cancelled_probe_lets_another_account_probe_immediately(rig: Rig) -> None:
    router = rig.router()
    await rig.open_route(router, "a", "b")
    rig.now += PROBE_WAIT_MAX
    gate = Gate()
    rig.one.default = Answer(before=(gate,))
    probe = asyncio.create_task(rig.ask(router, "a"))
    await gate.reached.wait()
    assert await rig.ask(router, "b") == "from two"
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    rig.one.default = Answer("recovered")
    assert await rig.ask(router, "b") == "recovered"


async def test_a_provider_that_fails_unexpectedly_ends_its_probe(rig: Rig) -> None:
    router = rig.router()
    await rig.open_route(router, "a", "b")
    rig.now += PROBE_WAIT_MAX
    working = rig.providers["one"]
    rig.providers["one"] = FailingProvider()
    with pytest.raises(PomeloError, match="did not give a usable answer"):
        await rig.ask(router, "a")
    rig.providers["one"] = working
    rig.one.default = Answer("recovered")
    assert await rig.ask(router, "b") == "recovered"


class FailingProvider:
    """A provider that yields `words` and then raises `error`. `calls` is the number of calls;
    `callers` has the account of each word."""

    configured = True

    def __init__(self, error: Exception | None = None, *words: str) -> None:
        self._error = error or KeyError("a bug")
        self._words = words
        self.calls = 0
        self.callers: list[str] = []

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        """Yields the words, then raises the error."""
        self.calls += 1
        for word in self._words:
            self.callers.append(CALLER.get())
            yield Event(text_delta=TextDelta(content=word))
        raise self._error

    async def aclose(self) -> None:
        pass


class WaitingProvider:
    """A provider that yields a word and waits. It keeps its events, so nothing closes them but their caller."""

    configured = True
    closed = False
    events: AsyncIterator[Event]

    def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        self.events = self._events()
        return self.events

    async def _events(self) -> AsyncIterator[Event]:
        try:
            yield Event(text_delta=TextDelta(content="Hello"))
            await asyncio.Event().wait()
        finally:
            self.closed = True

    async def aclose(self) -> None:
        pass


async def test_a_provider_is_closed_with_the_events_of_its_task(rig: Rig) -> None:
    provider = rig.providers["one"] = WaitingProvider()
    router = rig.router()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, TextInput(), True, 2000.0)
    async with aclosing(router.events(job, candidates)) as events:
        await anext(events)
        assert not provider.closed
    assert provider.closed


@pytest.mark.parametrize("retry", [RetryPolicy.SAME_ROUTE, RetryPolicy.NEXT_ROUTE], ids=["same", "next"])
@pytest.mark.parametrize("code", ["provider_unavailable", "provider_failed", "overloaded"])
async def test_a_call_that_fails_after_its_first_event_is_never_retried(
    rig: Rig, code: str, retry: RetryPolicy
) -> None:
    error_class = NoConnectionError if code == "overloaded" else UpstreamError
    error = error_class(code, retry=retry)
    failing = rig.providers["one"] = FailingProvider(error, "Hello")
    assert (await rig.fail(rig.router())).code == code
    assert failing.calls == 1
    assert rig.request_counts() == (0, 0)
    assert not rig.slept


@pytest.mark.parametrize("retry", list(RetryPolicy), ids=["never", "next", "same"])
async def test_a_call_that_fails_before_its_first_event_is_retried_as_its_error_allows(
    rig: Rig, retry: RetryPolicy
) -> None:
    failing = rig.providers["one"] = FailingProvider(UpstreamError("provider_unavailable", retry=retry))
    if retry == RetryPolicy.NEVER:
        await rig.fail(rig.router())
    else:
        assert await rig.ask(rig.router()) == "from two"
    assert failing.calls == (ATTEMPTS if retry == RetryPolicy.SAME_ROUTE else 1)
    assert rig.request_counts() == (0, 0 if retry == RetryPolicy.NEVER else 1)


async def test_an_error_without_a_retry_policy_is_never_retried(rig: Rig) -> None:
    failing = rig.providers["one"] = FailingProvider(PomeloError("provider_unavailable"))
    assert (await rig.fail(rig.router())).code == "provider_unavailable"
    assert failing.calls == 1
    assert rig.request_counts() == (0, 0)


async def test_a_provider_sees_the_account_of_the_task_in_whichever_asyncio_task_its_events_are_read(
    rig: Rig,
) -> None:
    failing = rig.providers["one"] = FailingProvider(PomeloError("provider_failed"), "one ", "two ", "three")
    router = rig.router()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, TextInput(), True, 2000.0)
    async with aclosing(router.events(job, candidates, account="acme")) as events:
        for _ in range(3):
            await asyncio.create_task(anext(events))
    assert failing.callers == ["acme"] * 3
    assert CALLER.get() == ""


async def test_without_a_free_connection_the_next_route_is_used_and_no_circuit_opens(rig: Rig) -> None:
    limiter = ConnectionLimiter(1, max_wait=0.01)
    async with Http(connections=limiter) as http:
        rig.providers["one"] = OpenAI(Credentials("sk-x", rig.one.openai_base_url), http)
        router = rig.router()
        host = rig.one.url.removeprefix("http://")
        await limiter.acquire(host, "other")
        for account in ("a", "b") * MINIMUM_CALLS:
            assert await rig.ask(router, account) == "from two"
        assert rig.request_counts() == (0, 2 * MINIMUM_CALLS)
        assert not rig.slept
        del rig.providers["two"]
        error = await rig.fail(router, "a")
        assert (error.code, error.retry_after) == ("overloaded", 1)
        limiter.release(host, "other")
        assert await rig.ask(router, "a") == "from one"


async def test_each_model_of_each_provider_has_its_own_circuit(rig: Rig) -> None:
    breakers: dict[tuple[str, str], CircuitBreaker] = {}

    def breaker_of(provider: str, model: str) -> CircuitBreaker:
        return breakers.setdefault((provider, model), CircuitBreaker(provider, model))

    router = Router(rig.providers, clock=lambda: rig.now, sleep=rig.no_sleep, breaker=breaker_of)
    await rig.open_route(router, "a", "b")
    assert {key: breaker.state for key, breaker in breakers.items()} == {
        ("one", "a"): State.OPEN,
        ("two", "b"): State.CLOSED,
    }


async def test_a_route_without_credentials_is_skipped(rig: Rig) -> None:
    async with Http() as http:
        rig.providers["one"] = OpenAI(Credentials(None, rig.one.openai_base_url), http)
        assert await rig.ask(rig.router()) == "from two"
        rig.providers["two"] = rig.providers["one"]
        assert (await rig.fail(rig.router())).code == "provider_not_configured"
