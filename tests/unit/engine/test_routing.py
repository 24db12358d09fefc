"""Routes, retries and breakers, with real providers before servers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
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
class House:
    """Two providers, each before a server of its own, and a clock that sleeping moves."""

    one: FaultUpstream
    two: FaultUpstream
    providers: dict[str, Any]
    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def router(self) -> Router:
        """A router that has seen nothing."""
        return Router(self.providers, clock=lambda: self.now, sleep=self.no_sleep, jitter=lambda: 1.0)

    async def no_sleep(self, seconds: float) -> None:
        """Lets time pass."""
        self.slept.append(seconds)
        self.now += seconds

    async def ask(
        self,
        router: Router,
        account: str = "",
        *,
        stream: bool = True,
        deadline: float = 2000.0,
        say: str = "Hi",
    ) -> str:
        """The text of an answer."""
        given = TextInput(messages=[Message(role=Role.ROLE_USER, content=say)])
        candidates = router.candidates(MODEL, "text", live=True)
        job = Job("task_1", MODEL, candidates[0].route, given, stream, deadline)
        async with aclosing(router.events(job, candidates, account=account)) as events:
            return "".join([event.text_delta.content async for event in events])

    async def fail(self, router: Router, account: str = "", **how: Any) -> PomeloError:
        """The error of an answer that there is none of."""
        with pytest.raises(PomeloError) as raised:
            await self.ask(router, account, **how)
        return raised.value

    async def open_route(self, router: Router, *accounts: str) -> None:
        """Makes the first vendor busy, and the accounts ask until its route is left alone."""
        self.one.default = BUSY
        while self.asked()[0] < MINIMUM_CALLS:
            for account in accounts:
                assert await self.ask(router, account) == "from two"

    def asked(self) -> tuple[int, int]:
        """How many requests each server got."""
        return len(self.one.requests), len(self.two.requests)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """Two providers that answer."""
    async with FaultUpstream() as one, FaultUpstream() as two, Http() as http:
        one.default, two.default = Answer("from one"), Answer("from two")
        providers = {
            name: OpenAI(Credentials("sk-x", server.openai_base_url), http)
            for name, server in (("one", one), ("two", two))
        }
        yield House(one, two, providers)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_busy_route_is_asked_again_with_growing_waits(house: House, stream: bool) -> None:
    house.one.script(BUSY, BUSY)
    assert await house.ask(house.router(), stream=stream) == "from one"
    assert house.slept == [0.25, 0.5]
    assert house.asked() == (3, 0)


async def test_a_route_that_stays_busy_gives_way_to_the_next(house: House) -> None:
    house.one.default = BUSY
    assert await house.ask(house.router()) == "from two"
    assert house.asked() == (ATTEMPTS, 1)


async def test_a_connection_that_breaks_ahead_of_the_answer_is_made_again(house: House) -> None:
    house.one.script(Answer(before=(Stop.RESET,)))
    assert await house.ask(house.router()) == "from one"


async def test_nothing_is_asked_twice_once_a_byte_was_delivered(house: House) -> None:
    house.one.script(Answer("one two three", at={2: Stop.CLOSE}))
    assert (await house.fail(house.router())).code == "provider_failed"
    assert house.asked() == (1, 0)


@pytest.mark.parametrize(
    "reply",
    [error_reply(400, code="context_length_exceeded"), error_reply(400, code="content_policy_violation")],
    ids=["too long", "policy"],
)
async def test_what_is_the_callers_fault_is_told_at_once(house: House, reply: Any) -> None:
    house.one.script(reply)
    await house.fail(house.router())
    assert house.asked() == (1, 0)
    assert house.slept == []


@pytest.mark.parametrize(
    "reply",
    [error_reply(401, code="invalid_api_key"), error_reply(429, code="credit_balance_exhausted"), error_reply(404, code="model_not_found")],
    ids=["key", "money", "model"],
)  # fmt: skip
async def test_what_is_our_own_fault_with_one_vendor_is_tried_at_the_next_without_a_wait(
    house: House, reply: Any
) -> None:
    house.one.script(reply)
    assert await house.ask(house.router()) == "from two"
    assert house.slept == []


async def test_a_vendors_wait_is_kept_and_a_long_one_goes_elsewhere(house: House) -> None:
    house.one.script(error_reply(429, code="slow_down", headers={"Retry-After": "3"}))
    assert await house.ask(house.router()) == "from one"
    assert house.slept == [3]
    house.one.script(error_reply(429, code="slow_down", headers={"Retry-After": str(int(WAIT_MAX) + 1)}))
    assert await house.ask(house.router()) == "from two"
    assert house.slept == [3]


async def test_the_last_failure_is_told_with_the_vendors_wait(house: House) -> None:
    house.one.default = BUSY
    house.two.default = error_reply(429, code="slow_down", headers={"Retry-After": "40"})
    error = await house.fail(house.router())
    assert (error.code, error.retry_after) == ("provider_unavailable", 40)


async def test_no_wait_goes_beyond_the_deadline(house: House) -> None:
    house.one.default = house.two.default = BUSY
    assert (await house.fail(house.router(), deadline=house.now + 0.3)).code == "provider_unavailable"
    assert house.slept == [0.25]


@ACCOUNTS
async def test_a_route_in_trouble_is_left_alone_and_then_probed_by_one_task(
    house: House, accounts: tuple[str, ...]
) -> None:
    router = house.router()
    await house.open_route(router, *accounts)
    tried = house.asked()[0]
    for account in accounts * 3:
        assert await house.ask(router, account) == "from two"
    assert house.asked()[0] == tried, "an open breaker lets nothing through"

    house.now += PROBE_WAIT_MAX
    for account in accounts:
        assert await house.ask(router, account) == "from two"
    assert house.asked()[0] == tried + 1, "one probe, and no retry of it"

    house.now += PROBE_WAIT_MAX
    house.one.default = Answer("well again")
    for account in accounts * 2:
        assert await house.ask(router, account) == "well again"


@ACCOUNTS
async def test_while_the_probe_runs_others_go_elsewhere(house: House, accounts: tuple[str, ...]) -> None:
    router = house.router()
    await house.open_route(router, *accounts)
    house.now += PROBE_WAIT_MAX
    house.one.default = Answer("well again")
    both = await asyncio.gather(house.ask(router, accounts[0]), house.ask(router, accounts[-1]))
    assert sorted(both) == ["from two", "well again"]


async def test_one_accounts_failures_leave_the_route_to_others(house: House) -> None:
    router = house.router()
    house.one.when("poison", error_reply(500, "boom"))
    for _ in range(10):
        assert await house.ask(router, "poisoner", say="poison") == "from two"
        assert await house.ask(router, "other") == "from one"
    assert house.asked()[0] == MINIMUM_CALLS + 10, "the account alone is kept from the route"


@pytest.mark.parametrize("vendors", [1, 2])
async def test_when_all_circuits_are_open_no_vendor_is_asked_and_the_wait_is_returned(
    house: House, vendors: int
) -> None:
    router = house.router()
    house.one.default = house.two.default = BUSY
    if vendors == 1:
        del house.providers["two"]
    for _ in range(MINIMUM_CALLS):
        await house.fail(router, "a")
        await house.fail(router, "b")
    asked = house.asked()
    for account in ("a", "b", "c"):
        error = await house.fail(router, account)
        assert error.code == "provider_unavailable"
        assert 1 <= (error.retry_after or 0) <= PROBE_WAIT_MAX
    assert house.asked() == asked


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
async def test_invalid_requests_open_no_circuit(house: House, reply: Any) -> None:
    router = house.router()
    house.one.default = reply
    for account in ("a", "b", "c") * MINIMUM_CALLS:
        assert (await house.fail(router, account)).row.http in (400, 413)
    assert house.asked() == (3 * MINIMUM_CALLS, 0)
    house.one.default = Answer("from one")
    assert await house.ask(router, "a") == "from one"


async def test_our_own_fault_with_a_vendor_does_not_count_as_the_vendors_trouble(house: House) -> None:
    router = house.router()
    house.one.default = error_reply(401, code="invalid_api_key")
    for account in ("a", "b") * MINIMUM_CALLS:
        assert await house.ask(router, account) == "from two"
    house.one.default = Answer("from one")
    assert await house.ask(router, "a") == "from one"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_callers_own_deadline_or_leaving_does_not_count_as_the_vendors_trouble(
    house: House, stream: bool
) -> None:
    router = house.router()
    house.one.default = Answer("too late", before=(Gate(),))
    for account in ("a", "b") * MINIMUM_CALLS:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await house.ask(router, account, stream=stream)
    house.one.default = Answer("from one")
    assert await house.ask(router, "a") == "from one"
    assert await house.ask(router, "b") == "from one"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_vendor_that_stays_silent_is_left_alone(house: House, stream: bool) -> None:
    async with Http(Timeouts(silence=0.02, whole=0.02)) as http:
        house.providers["one"] = OpenAI(Credentials("sk-x", house.one.openai_base_url), http)
        router = house.router()
        house.one.default = Answer(before=(Stop.SILENCE,))
        for account in ("a", "b") * 2:
            assert (await house.fail(router, account, stream=stream)).code == "deadline_exceeded"
        assert (await house.fail(router, "a", stream=stream)).code == "deadline_exceeded"
        assert await house.ask(router, "c", stream=stream) == "from two"
        house.now += PROBE_WAIT_MAX
        house.one.default = Answer("well again")
        assert await house.ask(router, "c", stream=stream) == "well again"


async def test_a_cancelled_probe_lets_another_account_probe_immediately(house: House) -> None:
    router = house.router()
    await house.open_route(router, "a", "b")
    house.now += PROBE_WAIT_MAX
    gate = Gate()
    house.one.default = Answer(before=(gate,))
    probe = asyncio.create_task(house.ask(router, "a"))
    await gate.reached.wait()
    assert await house.ask(router, "b") == "from two"
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    house.one.default = Answer("well again")
    assert await house.ask(router, "b") == "well again"


async def test_a_provider_that_breaks_leaves_no_probe_behind(house: House) -> None:
    router = house.router()
    await house.open_route(router, "a", "b")
    house.now += PROBE_WAIT_MAX
    sound = house.providers["one"]
    house.providers["one"] = Breaking()
    with pytest.raises(PomeloError, match="did not give a usable answer"):
        await house.ask(router, "a")
    house.providers["one"] = sound
    house.one.default = Answer("well again")
    assert await house.ask(router, "b") == "well again"


class Breaking:
    """A provider that yields `words` and then raises `error`. `calls` is the number of calls;
    `callers` has the account of each word."""

    configured = True

    def __init__(self, error: Exception | None = None, *words: str) -> None:
        self._error = error or KeyError("a fault of its own")
        self._words = words
        self.calls = 0
        self.callers: list[str] = []

    async def text(self, job: Job) -> AsyncIterator[Event]:
        """See JobMethod."""
        self.calls += 1
        for word in self._words:
            self.callers.append(CALLER.get())
            yield Event(text_delta=TextDelta(content=word))
        raise self._error

    async def aclose(self) -> None:
        """See Provider."""


@pytest.mark.parametrize("retry", [RetryPolicy.SAME_ROUTE, RetryPolicy.NEXT_ROUTE], ids=["same", "next"])
@pytest.mark.parametrize("code", ["provider_unavailable", "provider_failed", "overloaded"])
async def test_a_call_that_fails_after_its_first_event_is_never_repeated(
    house: House, code: str, retry: RetryPolicy
) -> None:
    error_class = NoConnectionError if code == "overloaded" else UpstreamError
    error = error_class(code, retry=retry)
    broken = house.providers["one"] = Breaking(error, "Hello")
    assert (await house.fail(house.router())).code == code
    assert broken.calls == 1
    assert house.asked() == (0, 0)
    assert not house.slept


@pytest.mark.parametrize("retry", list(RetryPolicy), ids=["never", "next", "same"])
async def test_a_call_that_fails_before_its_first_event_is_repeated_as_its_error_allows(
    house: House, retry: RetryPolicy
) -> None:
    broken = house.providers["one"] = Breaking(UpstreamError("provider_unavailable", retry=retry))
    if retry == RetryPolicy.NEVER:
        await house.fail(house.router())
    else:
        assert await house.ask(house.router()) == "from two"
    assert broken.calls == (ATTEMPTS if retry == RetryPolicy.SAME_ROUTE else 1)
    assert house.asked() == (0, 0 if retry == RetryPolicy.NEVER else 1)


async def test_a_provider_is_called_for_the_account_of_the_task_whoever_reads_the_next_event(
    house: House,
) -> None:
    broken = house.providers["one"] = Breaking(PomeloError("provider_failed"), "one ", "two ", "three")
    router = house.router()
    candidates = router.candidates(MODEL, "text", live=True)
    job = Job("task_1", MODEL, candidates[0].route, TextInput(), True, 2000.0)
    async with aclosing(router.events(job, candidates, account="acme")) as events:
        for _ in range(3):
            await asyncio.create_task(anext(events))
    assert broken.callers == ["acme"] * 3
    assert CALLER.get() == ""


async def test_without_a_free_connection_the_next_route_is_asked_and_no_circuit_opens(house: House) -> None:
    limiter = ConnectionLimiter(1, max_wait=0.01)
    async with Http(connections=limiter) as http:
        house.providers["one"] = OpenAI(Credentials("sk-x", house.one.openai_base_url), http)
        router = house.router()
        host = house.one.url.removeprefix("http://")
        await limiter.acquire(host, "other")
        for account in ("a", "b") * MINIMUM_CALLS:
            assert await house.ask(router, account) == "from two"
        assert house.asked() == (0, 2 * MINIMUM_CALLS)
        assert not house.slept
        del house.providers["two"]
        error = await house.fail(router, "a")
        assert (error.code, error.retry_after) == ("overloaded", 1)
        limiter.release(host, "other")
        assert await house.ask(router, "a") == "from one"


async def test_each_model_of_each_provider_has_a_circuit_of_its_own(house: House) -> None:
    made: dict[tuple[str, str], CircuitBreaker] = {}

    def make(provider: str, model: str) -> CircuitBreaker:
        return made.setdefault((provider, model), CircuitBreaker(provider, model))

    router = Router(house.providers, clock=lambda: house.now, sleep=house.no_sleep, breaker=make)
    await house.open_route(router, "a", "b")
    assert {key: breaker.state for key, breaker in made.items()} == {
        ("one", "a"): State.OPEN,
        ("two", "b"): State.CLOSED,
    }


async def test_a_route_without_credentials_is_skipped(house: House) -> None:
    async with Http() as http:
        house.providers["one"] = OpenAI(Credentials(None, house.one.openai_base_url), http)
        assert await house.ask(house.router()) == "from two"
        house.providers["two"] = house.providers["one"]
        assert (await house.fail(house.router())).code == "provider_not_configured"
