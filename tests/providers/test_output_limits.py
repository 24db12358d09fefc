"""The limit of output that hosts of chat completions get: what is reserved, as far as their context has room."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pomelo.catalog.catalog import Limits
from pomelo.gen.v1.text_pb2 import ContentPart, Message, Role, TextInput, Tool
from pomelo.providers.fitting import Given
from pomelo.testing import FaultUpstream
from tests.providers.rig import base_url, open_provider, read_all
from tests.providers.text_rig import COMPATIBLE, MISTRAL, OPENAI, Vendor, hi, image

CONTEXT = 3_200
LIMITS = Limits(max_input_tokens=CONTEXT, max_output_tokens=400)
LEAST = 100
"""A thirty-second of the context."""

CLAMPED = {"max_tokens": (1.0, 200.0, 0.0)}


async def limit_of(
    vendor: Vendor,
    upstream: FaultUpstream,
    given: TextInput,
    *,
    stream: bool = False,
    reserved: int | None = None,
    limits: Limits = LIMITS,
    **route: Any,
) -> Any:
    """Returns the max_tokens of the request that a job became; `reserved` is what the balance pays for."""
    job = vendor.job(given, stream=stream, route=replace(vendor.route, **route))
    model = replace(job.model, limits=limits)
    job = replace(job, model=model, given=Given(given), max_tokens=reserved)
    async with open_provider(vendor.make, base_url(upstream, vendor.server)) as provider:
        await read_all(provider, job)
    return (await upstream.received()).body.get("max_tokens")


@pytest.mark.parametrize("chat", [COMPATIBLE, MISTRAL], ids=lambda vendor: vendor.name)
async def test_without_max_tokens_a_host_gets_the_models_maximum(
    upstream: FaultUpstream, chat: Vendor, stream: bool
) -> None:
    for given, expected, more in (
        (hi(), 400, {}),
        (hi(), 200, {"clamp": CLAMPED}),
        (hi(), 50, {"reserved": 50}),
        (hi(max_tokens=7), 7, {}),
        (hi(), None, {"limits": Limits(max_input_tokens=CONTEXT)}),
        (hi(), None, {"limits": Limits(max_input_tokens=CONTEXT), "clamp": CLAMPED}),
    ):
        assert await limit_of(chat, upstream, given, stream=stream, **more) == expected


async def test_openai_has_the_maximum_itself_unless_its_route_has_a_lower_one(
    upstream: FaultUpstream,
) -> None:
    assert await limit_of(OPENAI, upstream, hi()) is None
    assert await limit_of(OPENAI, upstream, hi("x" * 9_600)) is None
    assert await limit_of(OPENAI, upstream, hi("x" * 9_600), clamp=CLAMPED) == 200


LONG = hi("x" * 9_000)
"""About 3,000 tokens, so 200 are left."""


@pytest.mark.parametrize("chat", [COMPATIBLE, MISTRAL], ids=lambda vendor: vendor.name)
async def test_a_long_prompt_leaves_the_rest_of_the_context_to_the_output(
    upstream: FaultUpstream, chat: Vendor
) -> None:
    sent = await limit_of(chat, upstream, LONG)
    assert 180 <= sent <= 200
    assert await limit_of(chat, upstream, hi("x" * 8_000)) == 400
    assert await limit_of(chat, upstream, hi("x" * 30_000)) == LEAST


async def test_what_the_balance_pays_for_leaves_room_for_the_prompt_too(upstream: FaultUpstream) -> None:
    assert 180 <= await limit_of(COMPATIBLE, upstream, LONG, reserved=300) <= 200
    assert await limit_of(COMPATIBLE, upstream, LONG, reserved=20) == 20


async def test_the_callers_own_limit_is_sent_as_it_is(upstream: FaultUpstream) -> None:
    asked = hi("x" * 30_000, max_tokens=400)
    assert await limit_of(COMPATIBLE, upstream, asked) == 400
    assert await limit_of(COMPATIBLE, upstream, asked, reserved=300) == 300


@pytest.mark.parametrize("tokens", [6_400, 1_600])
async def test_a_route_may_have_another_context_than_its_model(upstream: FaultUpstream, tokens: int) -> None:
    prompt = hi("x" * 3 * (tokens - 200))
    assert 180 <= await limit_of(COMPATIBLE, upstream, prompt, options={"context_tokens": tokens}) <= 200
    assert 180 <= await limit_of(OPENAI, upstream, prompt, clamp={"max_tokens": (1, 400, 0)}, options={"context_tokens": tokens}) <= 200  # fmt: skip


async def test_tools_count_as_part_of_the_prompt_and_images_not_by_their_bytes(
    upstream: FaultUpstream,
) -> None:
    tools = hi(tools=[Tool(name="one", description="x" * 9_000)])
    assert 180 <= await limit_of(COMPATIBLE, upstream, tools) <= 200
    photo = image("data:image/png;base64," + "A" * 90_000)
    asked = TextInput(messages=[Message(role=Role.ROLE_USER, content=[ContentPart(text="Hi"), photo])])
    assert await limit_of(COMPATIBLE, upstream, asked) == 400
