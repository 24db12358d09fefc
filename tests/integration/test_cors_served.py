"""CORS in the whole service, in one process and through a remote gateway, and as a setting of both commands."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.app import RunningApp, run_app
from tests.driver import Outcome
from tests.integration.commands import pomelo, staying
from tests.ports import free_port
from tests.tasks import TASK_BODIES, text_body

APP, FOREIGN = "https://app.example", "https://evil.example"
WAY = pytest.mark.parametrize("way", ["rest", "remote"])
HEADERS = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningApp]:
    given = {"cors_origins": (APP,)}
    async with run_app(tmp_path_factory.mktemp("cors"), settings=given, gateway_settings=given) as opened:
        yield opened


def exposes_all(told: Outcome) -> bool:
    """Whether a script may read the answer and each of its headers that the documentation names."""
    exposed = {name.strip().lower() for name in told.headers["access-control-expose-headers"].split(",")}
    ours = {
        name
        for name in told.headers
        if name.startswith("x-") or name in ("retry-after", "idempotent-replayed")
    }
    assert ours - {"x-content-type-options", "x-frame-options", "x-accel-buffering"} <= exposed
    return told.headers["access-control-allow-origin"] == APP


@WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", TASK_BODIES)
async def test_an_answer_of_every_kind_may_be_read(
    house: RunningApp, kind: str, way: str, stream: bool
) -> None:
    caller = await house.account("all")
    told = await house.ask(way, caller.test, TASK_BODIES[kind], stream=stream, headers={"Origin": APP})
    assert told.code == "ok"
    assert exposes_all(told)


@WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_refusals_may_be_read_by_an_allowed_origin_alone(
    house: RunningApp, way: str, stream: bool
) -> None:
    poor, five = await house.account("all", test=0), await house.account("five")
    for _ in range(5):
        await house.ask(way, five.test, text_body())
    asked = {
        "insufficient_credits": (poor.test, text_body()),
        "rate_limit_exceeded": (five.test, text_body()),
        "unsupported_model": (poor.test, text_body(model="gpt-99")),
        "invalid_api_key": ("wrong", text_body()),
        "provider_unavailable": (
            (await house.account("all")).test,
            text_body("[[error:provider_unavailable]]"),
        ),
    }
    for code, (key, body) in asked.items():
        told = await house.ask(way, key, body, stream=stream, headers={"Origin": APP})
        assert told.code == code
        assert exposes_all(told)
        told = await house.ask(way, key, body, stream=stream, headers={"Origin": FOREIGN})
        assert told.code == code
        assert not [name for name in told.headers if name.startswith("access-control-")]


@WAY
async def test_preflights_cost_no_request_and_are_no_failed_keys(house: RunningApp, way: str) -> None:
    caller = await house.account("five")
    for _ in range(30):
        async with house.session.options(f"{house.urls[way]}/api/v1/task", headers=HEADERS) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, APP)
    told = await house.ask(way, caller.test, text_body())
    assert (told.code, told.headers["x-ratelimit-remaining"]) == ("ok", "4")


@pytest.mark.parametrize(
    "command", [("serve",), ("gateway", "--target", "127.0.0.1:1")], ids=["serve", "gateway"]
)
async def test_cors_origins_are_a_setting_of_each_command(tmp_path, command) -> None:
    rest = f"127.0.0.1:{free_port()}"
    variables = {"POMELO_REST": rest, "POMELO_GRPC": f"127.0.0.1:{free_port()}", "POMELO_CORS_ORIGINS": APP}
    async with staying(tmp_path, *command, **variables) as running, aiohttp.ClientSession() as session:
        await running.until("REST")
        async with session.options(f"http://{rest}/api/v1/task", headers=HEADERS) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, APP)
        async with session.options(
            f"http://{rest}/api/v1/task", headers=HEADERS | {"Origin": FOREIGN}
        ) as answer:
            assert (answer.status, "Access-Control-Allow-Origin" in answer.headers) == (204, False)
    wrong = await pomelo(tmp_path, *command, **(variables | {"POMELO_CORS_ORIGINS": APP + "/"}))
    assert wrong.status != 0
    assert "POMELO_CORS_ORIGINS: must be * or origins, such as https://app.example" in wrong.error
