"""The circuit breakers of routes, with real providers and servers that fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.engine.circuit_breaker import MINIMUM_CALLS, PROBE_WAIT_MAX, CircuitBreaker, State
from pomelo.engine.routing import Router
from pomelo.errors import PomeloError
from pomelo.gen.v1.text_pb2 import TextInput
from pomelo.providers import Credentials
from pomelo.providers.base import Event, Job
from pomelo.providers.chat.openai import OpenAI
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http, Timeouts
from pomelo.providers.http.connections import ConnectionLimiter
from pomelo.testing import Answer, Gate, Stop, error_reply
from tests.unit.engine.routing_rig import BUSY, FailingProvider, Rig
from tests.waiting import cancel

ACCOUNTS = pytest.mark.parametrize("accounts", [("a",), ("a", "b")], ids=["one account", "two accounts"])


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


@pytest.mark.parametrize("opened", ["one", "two"])
async def test_a_route_that_is_skipped_asks_for_a_retry_although_the_other_is_broken(
    rig: Rig, opened: str
) -> None:
    router = Router(
        rig.providers,
        clock=lambda: rig.now,
        sleep=rig.no_sleep,
        breaker=lambda name, model: CircuitBreaker(name, model, minimum_calls=1, probe_wait=3.0),
    )
    rig.one.default = rig.two.default = error_reply(401, code="invalid_api_key")
    getattr(rig, opened).default = error_reply(500, "boom")
    await rig.fail(router, "a")
    requests = sum(rig.request_counts())
    rig.now += 0.5
    error = await rig.fail(router, "a")
    assert (error.code, error.retry_after) == ("provider_unavailable", 3)
    assert sum(rig.request_counts()) == requests + 1, "the broken route is tried, the other is not"


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
    await cancel(probe)
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


async def test_a_stream_that_a_failing_vendor_breaks_off_counts_against_its_route(rig: Rig) -> None:
    router = rig.router()
    error = UpstreamError("provider_unavailable", retry=RetryPolicy.NEXT_ROUTE)
    for _ in range(MINIMUM_CALLS - 2):
        rig.providers["one"] = FailingProvider(error)
        assert await rig.ask(router, "a") == "from two"
    rig.providers["one"] = broken_off = FailingProvider(error, "one")  # its first event is a success
    assert await rig.fail(router, "a") is error
    assert await rig.ask(router, "a") == "from two"
    assert broken_off.calls == 1


class Silent(FailingProvider):
    """A provider whose streams end without an event."""

    async def text(self, job: Job[TextInput]) -> AsyncIterator[Event]:
        self.calls += 1
        return
        yield Event()


async def test_a_probe_without_an_event_closes_no_circuit_and_lets_another_account_probe(rig: Rig) -> None:
    router = rig.router()
    await rig.open_route(router, "a", "b")
    rig.now += PROBE_WAIT_MAX
    rig.providers["one"] = silent = Silent()
    for calls, account in enumerate("ab", 1):
        assert await rig.ask(router, account) == ""
        assert silent.calls == calls
        assert router.circuit_states()["one", "a"] != 0


async def test_a_circuit_that_just_ended_its_wait_proposes_a_second(rig: Rig) -> None:
    del rig.providers["two"]
    rig.one.default = BUSY
    router = rig.router()
    for _ in range(MINIMUM_CALLS):
        await rig.fail(router, "a")
    now = rig.now
    clock = iter((now, now + PROBE_WAIT_MAX))
    router._clock = lambda: next(clock)
    assert (await rig.fail(router, "a")).retry_after == 1
