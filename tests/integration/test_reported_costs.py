"""Billing by the cost that OpenRouter and Black Forest Labs report: unary, streamed and truncated, on every protocol
and with every store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.gen.v1.account_service_pb2 import ListUsageRequest
from pomelo.gen.v1.account_service_pb2_grpc import AccountServiceStub
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, PriceUnit
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.testing import Answer, Stop, chunk, error_event
from pomelo.testing.bfl_protocol import Drawing, moderated
from tests.app import RunningApp, run_app
from tests.calls import bearer
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM
from tests.tasks import TASK_BODIES, text_body

CATALOGUE = """
[models.flux-drawn]
type = "image"
limits = { max_characters = 10_000 }
price = { image = "0.05", provider_dollar = "1.25" }
price_version = "2026-11-26"
[[models.flux-drawn.routes]]
provider = "bfl"
model = "flux-pro-1.1"
drop = ["num_inference_steps", "guidance_scale"]
clamp = { width = [256, 1440, 32], height = [256, 1440, 32] }

[models.mixtral-counted]
type = "text"
limits = { max_input_tokens = 10_000, max_output_tokens = 1_000 }
price = { million_input_tokens = "10", million_output_tokens = "20" }
price_version = "2026-11-26"
[[models.mixtral-counted.routes]]
provider = "openrouter"
model = "counted"
"""

DRAWN = TASK_BODIES["image"] | {"model": "flux-drawn"}


@pytest.fixture(scope="module", name="app")
async def _app(
    store_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RunningApp]:
    folder = tmp_path_factory.mktemp("reported")
    (folder / "catalog.toml").write_text(CATALOGUE)
    keys = {"mistral_api_key": None, "openrouter_api_key": "o-x"}
    settings = {"catalog": folder / "catalog.toml", **keys, **store_settings}
    async with run_app(folder, settings=settings) as opened:
        yield opened


def counts(cost: Any, **more: Any) -> dict[str, Any]:
    """Usage in the format of OpenRouter."""
    return {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500, "cost": cost, **more}


TRUNCATED = (error_event("strange"), Stop.END)
"""A failure within a stream. Unlike a broken connection, it does not discard the bytes before it."""

COST_BY_COUNTS = 810
"""The microcredits of `counts` by the prices of mixtral-8x7b at OpenRouter."""


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("cost", "micros"), [(0.00042, 420), (0.0004201, 421), (1e-9, 1), (0.0011, 1_100), (0.0123, 12_300)]
)
async def test_a_text_of_openrouter_costs_the_reported_cost(
    app: RunningApp, cost: float, micros: int, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    prompt = f"<{cost}> {protocol} {stream}"
    app.upstream.when(prompt, Answer("one two", usage=counts(cost)))
    response = await app.ask(protocol, caller.live, text_body(prompt, "mixtral-8x7b"), stream=stream)
    assert response.code == "ok"
    record = await app.only_record(caller, response)
    assert (record.cost, record.provider_micros) == (micros, micros)
    assert (record.input_tokens, record.output_tokens, record.source) == (1_000, 500, "provider")
    assert record.prices.endswith("provider_dollar=1000000")


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    "cost",
    [None, 0, 0.0, -0.01, "0.01", True, [], {}, 10**6, 1e300],
    ids=repr,
)
@pytest.mark.parametrize("model", ["mixtral-8x7b", "mixtral-counted"])
async def test_without_a_possible_cost_the_counts_are_billed(
    app: RunningApp, model: str, cost: Any, protocol: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caller = await app.account()
    prompt = f"<{model} {cost!r}> {protocol} {stream}"
    app.upstream.when(prompt, Answer("one two", usage=counts(cost)))
    with caplog.at_level(logging.WARNING, "pomelo"):
        response = await app.ask(protocol, caller.live, text_body(prompt, model), stream=stream)
    assert response.code == "ok"
    record = await app.only_record(caller, response)
    assert (record.cost, record.provider_micros) == (
        20_000 if model == "mixtral-counted" else COST_BY_COUNTS,
        0,
    )
    expected = model == "mixtral-8x7b" and cost not in (None, 0)
    assert caplog.text.count("reported an impossible cost") == expected


async def test_a_cost_that_is_only_the_fee_of_the_host_is_not_billed(app: RunningApp) -> None:
    caller = await app.account()
    app.upstream.when("own key", Answer("one two", usage=counts(0.00001, is_byok=True)))
    response = await app.ask("rest", caller.live, text_body("own key", "mixtral-8x7b"))
    assert (await app.only_record(caller, response)).cost == COST_BY_COUNTS


@PROTOCOL
async def test_a_stream_truncated_after_the_reported_cost_costs_that(app: RunningApp, protocol: str) -> None:
    caller = await app.account()
    prompt = f"cut {protocol}"
    steps = (chunk(None, usage=counts(0.0005)), *TRUNCATED)
    app.upstream.when(prompt, Answer("one two three", at={2: steps}))
    response = await app.ask(protocol, caller.live, text_body(prompt, "mixtral-8x7b"), stream=True)
    assert response.code == "provider_failed"
    record = await app.only_record(caller, response)
    assert (record.cost, record.provider_micros, record.complete) == (500, 500, False)


@PROTOCOL
async def test_a_stream_truncated_before_the_reported_cost_costs_the_delivered_part(
    app: RunningApp, protocol: str
) -> None:
    caller = await app.account()
    prompt = f"cut early {protocol}"
    app.upstream.when(prompt, Answer("one two three", at={2: TRUNCATED}, usage=counts(0.0005)))
    response = await app.ask(protocol, caller.live, text_body(prompt, "mixtral-8x7b"), stream=True)
    assert response.code == "provider_failed"
    record = await app.only_record(caller, response)
    assert (record.provider_micros, record.output_tokens, record.complete) == (0, 2, False)
    assert 0 < record.cost < 500


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize(
    ("reported_credits", "micros"),
    [(4.0, 50_000), (2.5, 31_250), (1, 12_500), (1.1, 13_750), (4.1, 50_000), (0, 50_000), ("2", 50_000)],
)
async def test_an_image_of_black_forest_labs_costs_the_reported_cost(
    app: RunningApp, reported_credits: Any, micros: int, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    app.upstream.script(Drawing(order={"cost": reported_credits}))
    response = await app.ask(protocol, caller.live, DRAWN, stream=stream)
    assert response.code == "ok"
    record = await app.only_record(caller, response)
    assert (record.cost, record.images) == (micros, 1)
    assert record.provider_micros in (0, micros * 4 // 5)


@PROTOCOL_AND_STREAM
async def test_an_image_refused_after_its_cost_was_reported_costs_nothing(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    app.upstream.script(Drawing(polls=(moderated(),), done=False))
    response = await app.ask(protocol, caller.live, DRAWN, stream=stream)
    assert response.code == "content_policy_violation"
    assert await app.records(caller) == []
    assert (await app.balance(caller, live=True)).spent == 0


async def test_an_image_with_a_fixed_price_ignores_the_reported_cost(app: RunningApp) -> None:
    caller = await app.account()
    app.upstream.script(Drawing(order={"cost": 1.0}))
    response = await app.ask("rest", caller.live, TASK_BODIES["image"])
    assert response.metadata["x-credits-charged"] == "0.04"
    record = await app.only_record(caller, response)
    assert (record.cost, record.provider_micros) == (40_000, 0)


async def test_a_test_key_pays_by_counts(app: RunningApp) -> None:
    caller = await app.account()
    response = await app.ask("rest", caller.test, DRAWN)
    assert response.metadata["x-credits-charged"] == "0.05"


async def test_reported_costs_and_their_price_are_listed(app: RunningApp) -> None:
    caller = await app.account()
    app.upstream.when("shown", Answer("one two", usage=counts(0.0123456)))
    await app.ask("rest", caller.live, text_body("shown", "mixtral-8x7b"))
    for protocol in ("rest", "remote"):
        (row,) = (await app.get_json(protocol, caller.live, "/api/v1/usage"))["data"]
        assert (row["provider_cost"], row["cost"]) == (0.012346, 0.012346)
        listed = (await app.get_json(protocol, caller.live, "/api/v1/models"))["data"]
        (model,) = [m for m in listed if m["id"] == "flux-drawn"]
        assert model["price"] == {"image": "0.05", "provider_dollar": "1.25"}
    metadata = bearer(caller.live)
    usage = await AccountServiceStub(app.channel).ListUsage(ListUsageRequest(), metadata=metadata)
    assert usage.records[0].provider_cost_micros == 12_346
    models = await ModelServiceStub(app.channel).ListModels(ListModelsRequest(), metadata=metadata)
    (draw,) = [model for model in models.models if model.id == "flux-drawn"]
    prices = {price.unit: price.amount_micros for price in draw.prices}
    assert prices[PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR] == 1_250_000
