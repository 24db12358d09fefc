"""Models, routes and voices that end: told to callers of every protocol, and to the operator."""

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
from pomelo.catalog.retirement import headers, notices
from pomelo.cli.doctor import _endings
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.providers import Credentials
from pomelo.providers.elevenlabs.voices import LAST_DAY
from pomelo.providers.registry import read_registry
from pomelo.testing import Answer, error_reply
from tests.app import RunningApp, patient_router, run_app
from tests.driver import PROTOCOLS
from tests.integration.commands import addresses, pomelo
from tests.tasks import TASK_BODIES, text_body

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
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    """A server on 2026-11-26 whose catalogue has models that end."""
    folder: Path = tmp_path_factory.mktemp("ends")
    (folder / "catalog.toml").write_text(CATALOGUE)
    router = partial(patient_router, today=lambda: TODAY)
    async with run_app(folder, make_router=router, settings={"catalog": folder / "catalog.toml"}) as opened:
        opened.upstream.default = Answer("Hello there")
        yield opened


def told_dates(headers: dict[str, str]) -> tuple[str | None, str | None]:
    """What an answer says of the end of its model."""
    return headers.get("deprecation"), headers.get("sunset")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize("model", SUNSETS)
async def test_answers_say_when_their_model_ends(
    house: RunningApp, model: str, way: str, stream: bool
) -> None:
    caller = await house.account()
    for key in (caller.test, caller.live):
        told = await house.ask(way, key, text_body(model=model), stream=stream)
        assert (told.code, told_dates(told.headers)) == ("ok", SUNSETS[model])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("way", PROTOCOLS)
async def test_errors_say_it_once_the_model_is_known(house: RunningApp, way: str, stream: bool) -> None:
    rich, poor = await house.account(), await house.account(live=0)
    few = await house.account("wide")
    limited = await house.account(models=("gpt-4",))
    cases: list[tuple[str, dict[str, Any], str, bool]] = [
        (rich.live, text_body(model="gpt-ends", temperature=7), "invalid_parameter", True),
        (rich.live, {"model": "gpt-ends", "messages": []}, "missing_parameter", True),
        (poor.live, text_body(model="gpt-ends", max_tokens=1000), "insufficient_credits", True),
        (few.live, text_body(model="gpt-ends", max_tokens=1000), "token_limit_exceeded", True),
        (rich.test, text_body("[[error:provider_failed]]", model="gpt-ends"), "provider_failed", True),
        (rich.live, text_body(model="gpt-endless"), "unsupported_model", False),
        (limited.live, text_body(model="gpt-ends"), "model_not_allowed", False),
        ("pml_live_wrong", text_body(model="gpt-ends"), "invalid_api_key", False),
    ]
    for key, body, code, known in cases:
        told = await house.ask(way, key, body, stream=stream)
        assert told.code == code, (way, told)
        assert told_dates(told.headers) == (SUNSETS["gpt-ends"] if known else (None, None)), (way, told)
    house.upstream.script(error_reply(400, code="content_policy_violation"))
    told = await house.ask(way, rich.live, text_body(model="gpt-ends"), stream=stream)
    assert (told.code, told_dates(told.headers)) == ("content_policy_violation", SUNSETS["gpt-ends"])


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_a_field_that_rest_refuses_itself_is_answered_with_the_dates_too(
    house: RunningApp, way: str
) -> None:
    caller = await house.account()
    told = await house.ask(way, caller.test, text_body(model="gpt-ends", temperature="warm"))
    assert (told.code, told_dates(told.headers)) == ("invalid_parameter", SUNSETS["gpt-ends"])


@pytest.mark.parametrize("way", PROTOCOLS)
async def test_a_repeated_answer_says_it_too(house: RunningApp, way: str) -> None:
    caller = await house.account()
    for replayed in (None, "true"):
        told = await house.ask(
            way, caller.test, text_body(model="gpt-ends"), headers={"Idempotency-Key": f"repeat-{way}"}
        )
        assert told_dates(told.headers) == SUNSETS["gpt-ends"], replayed


@pytest.mark.parametrize("way", PROTOCOLS)
@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("gpt-ended", "openai"),
        ("gpt-last-day", "openai"),
        ("gpt-other-route", "mistral"),
        ("gpt-no-other-route", "openai"),
    ],
)
async def test_a_route_that_has_ended_is_skipped_where_another_one_can_serve(
    house: RunningApp, way: str, model: str, asked: str
) -> None:
    caller = await house.account()
    house.upstream.requests.clear()
    assert (await house.ask(way, caller.live, text_body(model=model))).code == "ok"
    assert len(house.upstream.requests) == 1
    (record,) = await house.records(caller)
    assert record.provider == asked


async def test_lists_of_models_have_the_dates(house: RunningApp) -> None:
    caller = await house.account()
    answer = await ModelServiceStub(house.channel).ListModels(
        ListModelsRequest(), metadata=[("authorization", f"Bearer {caller.test}")]
    )
    models = {model.name: model for model in answer.models}
    assert models["gpt-announced"].retire_time.ToDatetime(UTC) == datetime(2027, 1, 14, tzinfo=UTC)
    assert models["gpt-announced"].deprecate_time.ToDatetime(UTC) == datetime(2026, 4, 14, tzinfo=UTC)
    assert not models["gpt-4"].HasField("retire_time")
    assert not models["gpt-4"].HasField("deprecate_time")
    for way in ("rest", "remote"):
        given = {"Authorization": f"Bearer {caller.test}"}
        async with house.session.get(f"{house.urls[way]}/api/v1/models", headers=given) as listed:
            found = {row["id"]: (row["deprecated"], row["retires"]) for row in (await listed.json())["data"]}
        async with house.session.get(f"{house.urls[way]}/api/v1/models/gpt-ends", headers=given) as one:
            assert (await one.json())["retires"] == "2026-12-31"
        assert found["gpt-announced"] == ("2026-04-14", "2027-01-14")
        assert found["gpt-deprecated"] == ("2026-04-14", None)
        assert found["gpt-all-routes"] == ("2026-11-01", "2026-12-31")
        assert found["gpt-4"] == (None, None)


async def test_what_has_ended_is_logged_at_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "catalog.toml").write_text(CATALOGUE)
    now = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
    with caplog.at_level(logging.WARNING, "pomelo.app"):
        async with run_app(tmp_path, settings={"catalog": tmp_path / "catalog.toml"}, now=lambda: now):
            pass
    lines = [record.getMessage() for record in caplog.records if record.name == "pomelo.app"]
    told = [line for line in lines if " ended on " in line]
    assert sorted(line.split(" ended on 2026-11-25. ")[0] for line in told) == [
        "model gpt-ended",
        "the route of gpt-no-other-route to m at openai",
        "the route of gpt-other-route to m at openai",
    ]


# --- the rules


def catalogue(folder: Path, text: str) -> Catalog:
    """The catalogue of a file."""
    path = folder / "catalog.toml"
    path.write_text(text)
    return Catalog.load(path)


def test_the_operator_is_warned_from_60_days_before(tmp_path: Path) -> None:
    catalog = catalogue(tmp_path, text_model("a", OPENAI, more="retires = 2026-12-31"))
    told = {
        day: [(str(n), n.is_past) for n in notices(catalog, date.fromisoformat(day))]
        for day in ("2026-10-31", "2026-11-01", "2026-12-31", "2027-01-01")
    }
    soon = ("model a ends on 2026-12-31. Replace it in the catalogue of POMELO_CATALOG", False)
    assert told == {
        "2026-10-31": [],
        "2026-11-01": [soon],
        "2026-12-31": [soon],
        "2027-01-01": [(soon[0].replace("ends", "ended"), True)],
    }


def test_the_headers_are_dates_that_libraries_read_and_in_order(tmp_path: Path) -> None:
    model = catalogue(tmp_path, text_model("a", OPENAI, more="retires = 2026-12-31")).models["a"]
    made = headers(model)
    sunset = parsedate_to_datetime(made["Sunset"])
    assert sunset == datetime(2026, 12, 31, tzinfo=UTC)
    assert datetime.fromtimestamp(int(made["Deprecation"].removeprefix("@")), UTC) == sunset - timedelta(
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
def test_doctor_tells_of_the_default_voices_where_they_are_in_use(
    tmp_path: Path, today: date, key: str | None, own: str, state: str | None
) -> None:
    path = tmp_path / "catalog.toml"
    path.write_text(own)
    registry = read_registry(path, plugged=[])
    given = dict.fromkeys(registry.entries, Credentials(None)) | {"elevenlabs": Credentials(key)}
    found = {finding.name: finding for finding in _endings(registry, given, today)}
    assert (found["voices"].state if "voices" in found else None) == state
    if state is not None:
        assert str(LAST_DAY) in found["voices"].detail
        assert "[voices]" in found["voices"].detail


async def test_the_commands_tell_of_it(tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    soon, past = today + timedelta(days=30), today - timedelta(days=2)
    text = text_model("soon", OPENAI, more=f"retires = {soon}")
    (tmp_path / "catalog.toml").write_text(text)
    given = {"POMELO_CATALOG": "catalog.toml", **addresses()}
    ended = await pomelo(tmp_path, "doctor", "--json", **given)
    found = {finding["name"]: finding for finding in json.loads(ended.out)}
    assert (ended.status, found["retirement"]["state"]) == (0, "warning")
    assert found["retirement"]["detail"].startswith(f"model soon ends on {soon}. ")
    (tmp_path / "catalog.toml").write_text(text + text_model("past", OPENAI, more=f"retires = {past}"))
    ended = await pomelo(tmp_path, "doctor", **given)
    assert ended.status == 1
    assert f"broken  retirement    model past ended on {past}. " in ended.out
    assert f"model soon ends on {soon}. " in ended.out


async def test_pomelo_models_shows_it(house: RunningApp, tmp_path: Path) -> None:
    caller = await house.account()
    asked = ("models", "--target", str(house.server.grpc), "--key", caller.test)
    ended = await pomelo(tmp_path, *asked)
    assert ended.status == 0, ended.error
    header, *rows = ended.out.splitlines()
    assert header.endswith("AVAILABLE  RETIRES")
    assert {row.split()[0]: row.split()[-1] for row in rows}["gpt-ends"] == "2026-12-31"
    ended = await pomelo(tmp_path, *asked, "--json")
    found = {row["name"]: row for row in json.loads(ended.out)}
    assert (found["gpt-ends"]["deprecated"], found["gpt-ends"]["retires"]) == ("2026-11-01", "2026-12-31")
    assert found["gpt-4"]["retires"] is None
    assert "retire_time" not in found["gpt-ends"]


@pytest.mark.parametrize("way", ["rest", "remote"])
async def test_raw_sound_and_forms_say_it_too(tmp_path: Path, way: str) -> None:
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
    async with run_app(tmp_path, settings={"catalog": tmp_path / "catalog.toml"}) as house:
        caller = await house.account()
        for how in ({"accept": "audio/mpeg"}, {"form": True}, {"stream": True}):
            told = await house.ask(way, caller.test, TASK_BODIES["tts"], **how)  # type: ignore[arg-type]
            assert told_dates(told.headers) == SUNSETS["gpt-ends"]
