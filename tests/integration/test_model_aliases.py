"""A model has the vendor's own id as an alias: it works on every protocol, and counts as the model."""

from __future__ import annotations

from pathlib import Path

from pomelo.telemetry.exposition import Exposition
from pomelo.telemetry.metrics import Metrics
from tests.app import RunningApp, app_fixture, run_app
from tests.driver import PROTOCOL_AND_STREAM, REST_PROTOCOL

app = app_fixture()
HI = {"model": "gpt-5.6-sol", "messages": [{"role": "user", "content": "Hi"}]}


@PROTOCOL_AND_STREAM
async def test_an_answer_has_the_alias_and_its_record_the_model(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    account = await app.account()
    for key in (account.test, account.live):
        answer = await app.ask(protocol, key, HI, stream=stream)
        assert answer.code == "ok"
        assert stream or answer.output["model"] == "gpt-5.6-sol"
    assert [record.model for record in await app.records(account)] == ["gpt-4", "gpt-4"]


@PROTOCOL_AND_STREAM
async def test_a_key_may_use_a_model_by_its_alias_only_if_it_may_use_the_model(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    haiku = await app.account(models=("claude-3-haiku",))
    assert (await app.ask(protocol, haiku.test, HI, stream=stream)).code == "model_not_allowed"
    allowed = {**HI, "model": "claude-haiku-4-5"}
    assert (await app.ask(protocol, haiku.test, allowed, stream=stream)).code == "ok"


@REST_PROTOCOL
async def test_a_model_is_described_by_its_alias(app: RunningApp, protocol: str) -> None:
    account = await app.account()
    by_name = await app.get_json(protocol, account.test, "/api/v1/models/gpt-4")
    assert await app.get_json(protocol, account.test, "/api/v1/models/gpt-5.6-sol") == by_name
    described = await app.get_json(protocol, account.test, "/v1/models/black-forest-labs%2FFLUX.1-schnell")
    assert described["id"] == "flux-1-schnell"
    listed = await app.get_json(protocol, account.test, "/v1/models")
    assert "gpt-5.6-sol" not in {model["id"] for model in listed["data"]}


async def test_limits_count_the_model_whatever_name_it_was_asked_by(app: RunningApp) -> None:
    account = await app.account("all")
    body = {**HI, "max_tokens": 1000}
    headers = [
        (await app.ask("rest", account.test, {**body, "model": name})).headers
        for name in ("gpt-4", "gpt-5.6-sol")
    ]
    first, second = [int(each["x-ratelimit-remaining-tokens"]) for each in headers]
    assert second < first < 100_000


async def test_metrics_have_the_name_of_the_model(tmp_path: Path) -> None:
    metrics = Metrics()
    async with run_app(tmp_path, metrics=metrics) as app:
        account = await app.account()
        assert (await app.ask("grpc", account.live, HI)).code == "ok"
    text = await Exposition(metrics).own()
    assert ',model="gpt-4"' in text
    assert ',model="gpt-5.6-sol"' not in text
