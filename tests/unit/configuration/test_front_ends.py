"""What the front ends of a process get of its settings, and how long they wait for running tasks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from ipaddress import ip_network

import pytest
from pydantic import ByteSize

from gateway.options import IDLE_TIMEOUT, PROXY_IDLE_TIMEOUT
from pomelo.catalog.catalog import Catalog
from pomelo.configuration import front_ends
from pomelo.configuration.front_ends import drain, gateway_options, gateway_proof, in_flight, server_options
from pomelo.runtime.draining import Draining
from pomelo.server.server import CONNECTION_STREAMS
from pomelo.settings import Settings
from tests.unit.refusals import refused
from tests.waiting import until

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("idle_timeout", "expected"), [(None, (IDLE_TIMEOUT, PROXY_IDLE_TIMEOUT)), (30.0, (30.0, 30.0))]
)
def test_an_idle_timeout_is_that_of_all_connections(
    idle_timeout: float | None, expected: tuple[float, float]
) -> None:
    options = gateway_options(Settings(idle_timeout=idle_timeout), catalog=Catalog.load)
    assert (options.idle_timeout, options.proxy_idle_timeout) == expected


def test_the_description_of_the_api_lists_no_model_of_the_operators() -> None:
    builtin = Catalog.load()
    own = replace(builtin.models["gpt-4"], name="own", aliases=("own alias",))
    listed = gateway_options(Settings(), catalog=lambda: Catalog([*builtin.models.values(), own])).models()
    assert listed.keys() == builtin.by_any_name.keys()


@pytest.mark.parametrize(("calls", "of_account"), [(100_000, 50_000), (2, 1), (1, 1)])
def test_an_account_has_at_most_half_of_the_calls_and_a_connection_carries_them(
    calls: int, of_account: int
) -> None:
    settings = Settings(max_calls=calls)
    limits = in_flight(settings)
    assert (limits.calls, limits.account_calls) == (calls, of_account)
    assert server_options(settings, shared=False).connection_streams == max(CONNECTION_STREAMS, of_account)


@pytest.mark.parametrize(("json", "inline", "message"), [(8, 4, 9), (1, 4, 5)])
def test_a_message_may_be_as_large_as_a_body_or_inline_audio(json: int, inline: int, message: int) -> None:
    settings = Settings(json_limit=ByteSize(json * MIB), inline_limit=ByteSize(inline * MIB))
    assert server_options(settings, shared=False).limits.message == message * MIB


def test_both_front_ends_trust_the_proxies_of_the_settings() -> None:
    settings = Settings(trusted_proxies=("10.0.0.0/8", "::1"))
    expected = (ip_network("10.0.0.0/8"), ip_network("::1"))
    assert gateway_options(settings, catalog=Catalog.load).trusted_proxies == expected
    assert server_options(settings, shared=False).connections.trusted == expected


def test_a_gateway_is_recognised_by_the_same_or_a_previous_secret() -> None:
    old, new = b"o" * 32, b"n" * 32
    metadata = dict(gateway_proof(old).metadata("rest", "10.0.0.1", ""))
    for secret, previous, proven in (
        (old, (), True),
        (new, (old,), True),
        (new, (), False),
        (None, (), False),
    ):
        assert gateway_proof(secret, previous).origin(metadata, "ipv4:127.0.0.1:9").proven == proven


async def test_a_call_that_is_ended_after_the_grace_period_has_time_to_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(front_ends, "FLUSH_TIMEOUT", 60.0)
    draining = Draining()

    async def answer() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(100):
                await asyncio.sleep(0)

    running = asyncio.create_task(draining.counted(answer)())
    await until(lambda: draining.scopes)
    await drain(draining, 0.0)
    assert not draining.scopes
    with refused("shutting_down"):
        await running
