"""CORS in the whole service, in one process and through a remote gateway, and as a setting of both commands."""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.integration.commands import pomelo, start_command
from tests.integration.house import KINDS, House, Told, open_house, say
from tests.ports import free_port

APP, FOREIGN = "https://app.example", "https://evil.example"
WAY = pytest.mark.parametrize("way", ["rest", "remote"])
HEADERS = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


@pytest.fixture(scope="module", name="house")
async def _house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    given = {"cors_origins": (APP,)}
    async with open_house(tmp_path_factory.mktemp("cors"), settings=given, gateway_settings=given) as opened:
        yield opened


def exposes_all(told: Told) -> bool:
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
@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_of_every_kind_may_be_read(house: House, kind: str, way: str, stream: bool) -> None:
    caller = await house.caller("all")
    told = await house.ask(way, caller.test, KINDS[kind], stream=stream, headers={"Origin": APP})
    assert told.code == "ok"
    assert exposes_all(told)


@WAY
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_refusals_may_be_read_by_an_allowed_origin_alone(house: House, way: str, stream: bool) -> None:
    poor, five = await house.caller("all", test=0), await house.caller("five")
    for _ in range(5):
        await house.ask(way, five.test, say())
    asked = {
        "insufficient_credits": (poor.test, say()),
        "rate_limit_exceeded": (five.test, say()),
        "unsupported_model": (poor.test, say(model="gpt-99")),
        "invalid_api_key": ("wrong", say()),
        "provider_unavailable": ((await house.caller("all")).test, say("[[error:provider_unavailable]]")),
    }
    for code, (key, body) in asked.items():
        told = await house.ask(way, key, body, stream=stream, headers={"Origin": APP})
        assert told.code == code
        assert exposes_all(told)
        told = await house.ask(way, key, body, stream=stream, headers={"Origin": FOREIGN})
        assert told.code == code
        assert not [name for name in told.headers if name.startswith("access-control-")]


@WAY
async def test_preflights_cost_no_request_and_are_no_failed_keys(house: House, way: str) -> None:
    caller = await house.caller("five")
    for _ in range(30):
        async with house.session.options(f"{house.urls[way]}/api/v1/task", headers=HEADERS) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, APP)
    told = await house.ask(way, caller.test, say())
    assert (told.code, told.headers["x-ratelimit-remaining"]) == ("ok", "4")


@pytest.mark.parametrize(
    "command", [("serve",), ("gateway", "--target", "127.0.0.1:1")], ids=["serve", "gateway"]
)
async def test_cors_origins_are_a_setting_of_each_command(tmp_path, command) -> None:
    rest = f"127.0.0.1:{free_port()}"
    variables = {"POMELO_REST": rest, "POMELO_GRPC": f"127.0.0.1:{free_port()}", "POMELO_CORS_ORIGINS": APP}
    async with start_command(tmp_path, *command, **variables) as running, aiohttp.ClientSession() as session:
        await running.read_until("REST")
        async with session.options(f"http://{rest}/api/v1/task", headers=HEADERS) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, APP)
        async with session.options(
            f"http://{rest}/api/v1/task", headers=HEADERS | {"Origin": FOREIGN}
        ) as answer:
            assert (answer.status, "Access-Control-Allow-Origin" in answer.headers) == (204, False)
    wrong = await pomelo(tmp_path, *command, **(variables | {"POMELO_CORS_ORIGINS": APP + "/"}))
    assert wrong.status != 0
    assert "POMELO_CORS_ORIGINS: must be * or origins, such as https://app.example" in wrong.error
