"""Which models a key is shown, in which pages, at which prices, and whether they are available."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.engine.models import _time
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest, Model
from tests.calls import call_of
from tests.unit.catalog.entries import entry
from tests.unit.engine.apps import Account, EngineApp, open_engine
from tests.unit.refusals import refused

NAMES = sorted(Catalog.load().models)


@pytest.fixture(scope="module", name="opened_engine")
async def _opened_engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EngineApp]:
    async with open_engine(tmp_path_factory.mktemp("models"), mistral_api_key=None) as opened:
        yield opened


async def listed(engine: EngineApp, account: Account, page_size: int) -> list[str]:
    """The names of all models that the key is shown, page by page."""
    names: list[str] = []
    request = ListModelsRequest(page_size=page_size)
    while True:
        response = await engine.app.services.models.list_models(request, call_of(account.key))
        assert len(response.models) <= page_size
        names += [model.id for model in response.models]
        if not response.next_page_token:
            return names
        request.page_token = response.next_page_token


async def one(engine: EngineApp, account: Account, name: str) -> Model:
    return await engine.app.services.models.get_model(name, call_of(account.key))


@pytest.mark.parametrize("page_size", [1, 7, len(NAMES), 1_000])
async def test_pages_have_each_model_once(engine: EngineApp, page_size: int) -> None:
    assert await listed(engine, await engine.account(), page_size) == NAMES


async def test_a_key_is_shown_only_the_models_that_it_may_use(engine: EngineApp) -> None:
    by_key = await engine.account(models=("gpt-4", "flux-1-pro"))
    by_plan = await engine.account("images")
    assert await listed(engine, by_key, 1) == ["flux-1-pro", "gpt-4"]
    assert await listed(engine, by_plan, 1) == ["flux-1-pro"]
    with refused("model_not_allowed"):
        await one(engine, by_plan, "gpt-4")


async def test_a_model_has_the_limits_of_its_task_type(engine: EngineApp) -> None:
    account = await engine.account()
    for name in ("gpt-4", "eleven-labs-tts", "eleven-labs-sts", "flux-1-pro"):
        shown, limits = (await one(engine, account, name)).limits, Catalog.load().models[name].limits
        for field in ("max_input_tokens", "max_output_tokens", "max_characters", "max_audio_seconds"):
            assert (getattr(shown, field) if shown.HasField(field) else None) == (
                getattr(limits, field) or None
            )


async def test_a_model_is_available_if_one_of_its_providers_is_configured(engine: EngineApp) -> None:
    account = await engine.account()
    found = {name: (await one(engine, account, name)).available for name in ("gpt-4", "claude-3-opus")}
    assert found == {"gpt-4": True, "claude-3-opus": False}
    assert (await one(engine, await engine.account(live=False), "claude-3-opus")).available


async def test_a_live_key_pays_the_first_configured_route_and_a_test_key_the_first(engine: EngineApp) -> None:
    model = Catalog.load().models["mixtral-8x7b"]
    for live, route in ((False, model.routes[0]), (True, model.routes[1])):
        shown = await one(engine, await engine.account(live=live), model.name)
        prices, version = model.prices_for(route)
        assert {line.unit: line.amount_micros for line in shown.prices} == dict(prices.units)
        assert shown.price_version == version


async def test_a_test_key_is_shown_and_pays_the_price_of_a_first_route_with_its_own(tmp_path: Path) -> None:
    own = """price = { million_output_tokens = "3" }
price_version = "own" """
    row = entry("dear", "text", own)
    (tmp_path / "catalog.toml").write_text(row.replace('provider = "p"', 'provider = "openai"'))
    async with open_engine(tmp_path, catalog=tmp_path / "catalog.toml") as engine:
        for live in (False, True):
            account = await engine.account(live=live)
            shown = await one(engine, account, "dear")
            assert ([price.amount_micros for price in shown.prices], shown.price_version) == (
                [3_000_000],
                "own",
            )
            asked = await engine.ask(
                account, {"model": "dear", "messages": [{"role": "user", "content": "Hi"}]}
            )
            (record,) = await engine.records(account)
            assert (asked.code, record.price_version, record.cost) == ("ok", "own", 3 * record.output_tokens)


async def test_a_model_is_shown_with_the_price_of_its_first_route_and_the_days_of_its_end(
    tmp_path: Path,
) -> None:
    row = entry("old", "text", more="deprecated = 2027-01-02\nretires = 2027-03-04")
    other = """
[[models.old.routes]]
provider = "openai"
model = "n"
price = { million_output_tokens = "3" }
price_version = "own"
"""
    (tmp_path / "catalog.toml").write_text(row.replace('provider = "p"', 'provider = "openai"') + other)
    async with open_engine(tmp_path, catalog=tmp_path / "catalog.toml") as engine:
        shown = await one(engine, await engine.account(), "old")
    assert ([price.amount_micros for price in shown.prices], shown.price_version) == ([10**6], "2026-11-22")
    assert [time.ToJsonString()[:10] for time in (shown.deprecate_time, shown.retire_time)] == [
        "2027-01-02",
        "2027-03-04",
    ]


async def test_a_task_and_its_result_have_the_name_by_which_the_model_was_asked_for(
    engine: EngineApp,
) -> None:
    account = await engine.account()
    for name in ("gpt-6-luna", "gpt-4"):
        body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
        assert (await engine.ask(account, body)).events[0].model == name
        assert (await engine.ask(account, body, stream=True)).events[0].started.model == name


async def test_a_model_is_shown_with_all_that_the_catalogue_says(engine: EngineApp) -> None:
    catalog = Catalog.load()
    account, tiers = await engine.account(), 0
    for model in catalog.models.values():
        shown = await one(engine, account, model.name)
        assert (shown.id, shown.task_type) == (model.name, model.task_type)
        prices = model.prices_for(model.routes[0])[0]
        tiers += len(prices.tiers)
        if not any(route.prices.units for route in model.routes[1:]):
            assert [
                (tier.min_input_tokens, {price.unit: price.amount_micros for price in tier.prices})
                for tier in shown.price_tiers
            ] == [(least, dict(units)) for least, units in prices.tiers]
        deprecated = shown.deprecate_time if shown.HasField("deprecate_time") else None
        retires = shown.retire_time if shown.HasField("retire_time") else None
        assert (deprecated, retires) == (_time(model.deprecated), _time(model.retires))
    assert tiers


def test_the_days_of_a_models_end_are_its_first_moments() -> None:
    found = _time(date(2027, 1, 2))
    assert found is not None
    assert found.seconds == datetime(2027, 1, 2, tzinfo=UTC).timestamp()
    assert _time(None) is None
