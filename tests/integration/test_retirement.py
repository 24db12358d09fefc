"""Retired models, routes and voices are reported to callers of every protocol and to the operator."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog
from pomelo.catalog.retirement import headers, log_ended, notices
from pomelo.cli.doctor import _retirements
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.providers import Credentials
from pomelo.providers.elevenlabs.voices import LAST_DAY
from pomelo.providers.registry import read_registry
from pomelo.runtime.process import in_background
from pomelo.testing import Answer, error_reply
from tests.app import RunningApp, patient_router, run_app
from tests.calls import bearer
from tests.driver import PROTOCOL, PROTOCOL_AND_STREAM, REST_PROTOCOL
from tests.integration.commands import free_addresses, pomelo
from tests.tasks import TASK_BODIES, text_body
from tests.waiting import until

TODAY = date(2026, 11, 26)


def text_model(name: str, *routes: str, more: str = "") -> str:
    """A row of a text model; `routes` are lines of its routes."""
    row = f"""
[models.{name}]
type = "text"
limits = {{ max_input_tokens = 10_000, max_output_tokens = 1_000 }}
price = {{ million_input_tokens = "4", million_output_tokens = "20" }}
price_version = "2026-11-22"
{more}
"""
    return row + "".join(f'[[models.{name}.routes]]\nmodel = "m"\n{route}\n' for route in routes)


OPENAI, MISTRAL, ANTHROPIC = (f'provider = "{name}"' for name in ("openai", "mistral", "anthropic"))
CATALOGUE = (
    text_model("gpt-ends", OPENAI, more="retires = 2026-12-31")
    + text_model("gpt-announced", OPENAI, more='retires = "2027-01-14"\ndeprecated = 2026-04-14')
    + text_model("gpt-deprecated", OPENAI, more="deprecated = 2026-04-14")
    + text_model("gpt-ended", OPENAI, more="retires = 2026-11-25")
    + text_model("gpt-last-day", f"{OPENAI}\nretires = 2026-11-26", MISTRAL)
    + text_model("gpt-other-route", f"{OPENAI}\nretires = 2026-11-25", MISTRAL)
    + text_model("gpt-no-other-route", f"{OPENAI}\nretires = 2026-11-25", ANTHROPIC)
    + text_model("gpt-all-routes", f"{OPENAI}\nretires = 2026-12-11", f"{MISTRAL}\nretires = 2026-12-31")
)  # fmt: skip
SUNSETS = {
    "gpt-ends": ("@1793491200", "Thu, 31 Dec 2026 00:00:00 GMT"),
    "gpt-announced": ("@1776124800", "Thu, 14 Jan 2027 00:00:00 GMT"),
    "gpt-deprecated": ("@1776124800", None),
    "gpt-all-routes": ("@1793491200", "Thu, 31 Dec 2026 00:00:00 GMT"),
    "gpt-other-route": (None, None),
    "gpt-4": (None, None),
}


@pytest.fixture(scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    """A server on 2026-11-26 whose catalogue has models that end."""
    folder: Path = tmp_path_factory.mktemp("ends")
    (folder / "catalog.toml").write_text(CATALOGUE)
    router = partial(patient_router, today=lambda: TODAY)
    async with run_app(folder, make_router=router, settings={"catalog": folder / "catalog.toml"}) as app:
        app.upstream.default = Answer("Hello there")
        yield app


def retirement_headers(headers: dict[str, str]) -> tuple[str | None, str | None]:
    """The Deprecation and Sunset headers of an answer."""
    return headers.get("deprecation"), headers.get("sunset")


@PROTOCOL_AND_STREAM
@pytest.mark.parametrize("model", SUNSETS)
async def test_answers_have_the_retirement_headers_of_their_model(
    app: RunningApp, model: str, protocol: str, stream: bool
) -> None:
    caller = await app.account()
    for key in (caller.test, caller.live):
        response = await app.ask(protocol, key, text_body(model=model), stream=stream)
        assert (response.code, retirement_headers(response.headers)) == ("ok", SUNSETS[model])


@PROTOCOL_AND_STREAM
async def test_errors_have_the_retirement_headers_once_the_model_is_known(
    app: RunningApp, protocol: str, stream: bool
) -> None:
    rich, poor = await app.account(), await app.account(live=0)
    few_tokens = await app.account("wide")
    limited = await app.account(models=("gpt-4",))
    cases: list[tuple[str, dict[str, Any], str, bool]] = [
        (rich.live, text_body(model="gpt-ends", temperature=7), "invalid_parameter", True),
        (rich.live, {"model": "gpt-ends", "messages": []}, "missing_parameter", True),
        (poor.live, text_body(model="gpt-ends", max_tokens=1000), "insufficient_credits", True),
        (few_tokens.live, text_body(model="gpt-ends", max_tokens=1000), "token_limit_exceeded", True),
        (rich.test, text_body("[[error:provider_failed]]", model="gpt-ends"), "provider_failed", True),
        (rich.live, text_body(model="gpt-endless"), "unsupported_model", False),
        (limited.live, text_body(model="gpt-ends"), "model_not_allowed", False),
        ("pml_live_wrong", text_body(model="gpt-ends"), "invalid_api_key", False),
    ]
    for key, body, code, known in cases:
        response = await app.ask(protocol, key, body, stream=stream)
        assert response.code == code, (protocol, response)
        expected = SUNSETS["gpt-ends"] if known else (None, None)
        assert retirement_headers(response.headers) == expected, (protocol, response)
    app.upstream.script(error_reply(400, code="content_policy_violation"))
    response = await app.ask(protocol, rich.live, text_body(model="gpt-ends"), stream=stream)
    assert response.code == "content_policy_violation"
    assert retirement_headers(response.headers) == SUNSETS["gpt-ends"]


@REST_PROTOCOL
async def test_an_error_of_the_rest_gateway_has_the_retirement_headers(
    app: RunningApp, protocol: str
) -> None:
    caller = await app.account()
    response = await app.ask(protocol, caller.test, text_body(model="gpt-ends", temperature="warm"))
    assert (response.code, retirement_headers(response.headers)) == ("invalid_parameter", SUNSETS["gpt-ends"])


@PROTOCOL
async def test_a_replayed_answer_has_the_retirement_headers(app: RunningApp, protocol: str) -> None:
    caller = await app.account()
    for replayed in (None, "true"):
        headers = {"Idempotency-Key": f"repeat-{protocol}"}
        response = await app.ask(protocol, caller.test, text_body(model="gpt-ends"), headers=headers)
        assert retirement_headers(response.headers) == SUNSETS["gpt-ends"], replayed


@PROTOCOL
@pytest.mark.parametrize(
    ("model", "provider"),
    [
        ("gpt-ended", "openai"),
        ("gpt-last-day", "openai"),
        ("gpt-other-route", "mistral"),
        ("gpt-no-other-route", "openai"),
    ],
)
async def test_a_retired_route_is_skipped_if_another_route_can_serve(
    app: RunningApp, protocol: str, model: str, provider: str
) -> None:
    caller = await app.account()
    app.upstream.requests.clear()
    assert (await app.ask(protocol, caller.live, text_body(model=model))).code == "ok"
    assert len(app.upstream.requests) == 1
    (record,) = await app.records(caller)
    assert record.provider == provider


async def test_model_lists_have_the_retirement_dates(app: RunningApp) -> None:
    caller = await app.account()
    answer = await ModelServiceStub(app.channel).ListModels(ListModelsRequest(), metadata=bearer(caller.test))
    models = {model.id: model for model in answer.models}
    assert models["gpt-announced"].retire_time.ToDatetime(UTC) == datetime(2027, 1, 14, tzinfo=UTC)
    assert models["gpt-announced"].deprecate_time.ToDatetime(UTC) == datetime(2026, 4, 14, tzinfo=UTC)
    assert not models["gpt-4"].HasField("retire_time")
    assert not models["gpt-4"].HasField("deprecate_time")
    for protocol in ("rest", "remote"):
        listed = await app.get_json(protocol, caller.test, "/api/v1/models")
        items = {row["id"]: (row["deprecated"], row["retires"]) for row in listed["data"]}
        one = await app.get_json(protocol, caller.test, "/api/v1/models/gpt-ends")
        assert one["retires"] == "2026-12-31"
        assert items["gpt-announced"] == ("2026-04-14", "2027-01-14")
        assert items["gpt-deprecated"] == ("2026-04-14", None)
        assert items["gpt-all-routes"] == ("2026-11-01", "2026-12-31")
        assert items["gpt-4"] == (None, None)


async def test_retired_models_and_routes_are_logged_at_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "catalog.toml").write_text(CATALOGUE)
    now = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
    with caplog.at_level(logging.WARNING, "pomelo.catalog"):
        async with run_app(tmp_path, settings={"catalog": tmp_path / "catalog.toml"}, now=lambda: now):
            pass
    retired = [r.getMessage() for r in caplog.records if " ended on " in r.getMessage()]
    assert sorted(line.split(" ended on 2026-11-25. ")[0] for line in retired) == [
        "model gpt-ended",
        "the route of gpt-no-other-route to m at openai",
        "the route of gpt-other-route to m at openai",
    ]


async def test_a_model_that_ends_while_the_server_runs_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pomelo.catalog.retirement._INTERVAL", 0.01)
    catalog, day, searches = catalogue(tmp_path, text_model("a", OPENAI, more="retires = 2026-12-31")), 31, 0

    def now() -> float:
        nonlocal searches
        searches += 1
        return datetime(2026, 12, 31, tzinfo=UTC).timestamp() + 86_400 * (day - 31)

    async with in_background(log_ended(lambda: catalog, now)):
        await until(lambda: searches > 2)
        assert caplog.messages == []
        day = 32
        await until(lambda: caplog.messages)
        seen = searches
        await until(lambda: searches > seen + 2)
    (message,) = caplog.messages
    assert message.startswith("model a ended on 2026-12-31. ")


# --- dates and notices


def catalogue(folder: Path, text: str) -> Catalog:
    """The catalogue of a file."""
    path = folder / "catalog.toml"
    path.write_text(text)
    return Catalog.load(path)


def test_the_operator_is_warned_60_days_before_the_end(tmp_path: Path) -> None:
    catalog = catalogue(tmp_path, text_model("a", OPENAI, more="retires = 2026-12-31"))
    reported = {
        day: [(str(n), n.is_past) for n in notices(catalog, date.fromisoformat(day))]
        for day in ("2026-10-31", "2026-11-01", "2026-12-31", "2027-01-01")
    }
    soon = ("model a ends on 2026-12-31. Replace it in the catalogue of POMELO_CATALOG", False)
    assert reported == {
        "2026-10-31": [],
        "2026-11-01": [soon],
        "2026-12-31": [soon],
        "2027-01-01": [(soon[0].replace("ends", "ended"), True)],
    }


def test_the_headers_are_valid_dates_in_order(tmp_path: Path) -> None:
    model = catalogue(tmp_path, text_model("a", OPENAI, more="retires = 2026-12-31")).models["a"]
    values = headers(model)
    sunset = parsedate_to_datetime(values["Sunset"])
    assert sunset == datetime(2026, 12, 31, tzinfo=UTC)
    assert datetime.fromtimestamp(int(values["Deprecation"].removeprefix("@")), UTC) == sunset - timedelta(
        days=60
    )


def test_the_built_in_catalogue_has_no_invented_dates() -> None:
    assert [m.name for m in Catalog.load().models.values() if m.retires or m.deprecated] == []


@pytest.mark.parametrize(
    ("today", "key", "own", "state"),
    [
        (date(2026, 10, 31), "k", "", None),
        (date(2026, 11, 1), "k", "", "warning"),
        (date(2026, 12, 31), "k", "", "warning"),
        (date(2027, 1, 1), "k", "", "warning"),
        (date(2027, 1, 1), "k", '[voices]\nadam = "abc"\n', None),
        (date(2027, 1, 1), None, "", None),
    ],
)
def test_doctor_reports_the_default_voices_if_they_are_in_use(
    tmp_path: Path, today: date, key: str | None, own: str, state: str | None
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(own)
    registry = read_registry(path, plugins=[])
    credentials = dict.fromkeys(registry.entries, Credentials(None)) | {"elevenlabs": Credentials(key)}
    items = {finding.name: finding for finding in _retirements(registry, credentials, today)}
    assert (items["voices"].state if "voices" in items else None) == state
    if state is not None:
        assert str(LAST_DAY) in items["voices"].detail
        assert "[voices]" in items["voices"].detail


async def test_doctor_reports_retired_models(tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    soon, past = today + timedelta(days=30), today - timedelta(days=2)
    text = text_model("soon", OPENAI, more=f"retires = {soon}")
    (tmp_path / "catalog.toml").write_text(text)
    environment = {"POMELO_CATALOG": "catalog.toml", **free_addresses()}
    result = await pomelo(tmp_path, "doctor", "--json", **environment)
    items = {finding["name"]: finding for finding in json.loads(result.out)}
    assert (result.status, items["retirement"]["state"]) == (0, "warning")
    assert items["retirement"]["detail"].startswith(f"model soon ends on {soon}. ")
    (tmp_path / "catalog.toml").write_text(text + text_model("past", OPENAI, more=f"retires = {past}"))
    result = await pomelo(tmp_path, "doctor", **environment)
    assert result.status == 1
    assert f"broken  retirement    model past ended on {past}. " in result.out
    assert f"model soon ends on {soon}. " in result.out


async def test_pomelo_models_shows_the_retirement_date(app: RunningApp, tmp_path: Path) -> None:
    caller = await app.account()
    command = ("models", "--target", str(app.server.grpc), "--key", caller.test)
    result = await pomelo(tmp_path, *command)
    assert result.status == 0, result.error
    header, *rows = result.out.splitlines()
    assert header.endswith("AVAILABLE  RETIRES")
    assert {row.split()[0]: row.split()[-1] for row in rows}["gpt-ends"] == "2026-12-31"
    result = await pomelo(tmp_path, *command, "--json")
    items = {row["id"]: row for row in json.loads(result.out)}
    assert (items["gpt-ends"]["deprecated"], items["gpt-ends"]["retires"]) == ("2026-11-01", "2026-12-31")
    assert items["gpt-4"]["retires"] is None
    assert "retire_time" not in items["gpt-ends"]


@REST_PROTOCOL
async def test_raw_audio_and_forms_have_the_retirement_headers(tmp_path: Path, protocol: str) -> None:
    row = """
[models.eleven-labs-tts]
type = "text_to_speech"
limits = { max_characters = 1000 }
price = { thousand_characters = "0.08" }
price_version = "2026-11-22"
retires = 2026-12-31
[[models.eleven-labs-tts.routes]]
provider = "elevenlabs"
model = "m"
"""
    (tmp_path / "catalog.toml").write_text(row)
    async with run_app(tmp_path, settings={"catalog": tmp_path / "catalog.toml"}) as app:
        caller = await app.account()
        for options in ({"accept": "audio/mpeg"}, {"form": True}, {"stream": True}):
            response = await app.ask(protocol, caller.test, TASK_BODIES["tts"], **options)
            assert retirement_headers(response.headers) == SUNSETS["gpt-ends"]
