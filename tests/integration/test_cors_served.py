"""CORS of the gateway in the app's process and of a remote one, and its setting in both commands."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest

from tests.app import RunningApp, app_fixture
from tests.driver import STREAM, Outcome
from tests.integration.commands import free_addresses, pomelo, start_command
from tests.tasks import TASK_BODIES, text_body

APP, FOREIGN = "https://app.example", "https://evil.example"
GATEWAY = pytest.mark.parametrize("gateway", ["rest", "remote"])
HEADERS = {
    "Origin": APP,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization",
}


CORS = {"cors_origins": (APP,)}
app = app_fixture(settings=CORS, gateway_settings=CORS)


def exposes_all(outcome: Outcome) -> bool:
    """Returns whether a script may read the answer and all documented headers that it has."""
    exposed = {name.strip().lower() for name in outcome.headers["access-control-expose-headers"].split(",")}
    own = ("x-", "retry-after", "idempotent-replayed")
    documented = {name for name in outcome.headers if name.startswith(own)}
    assert documented - {"x-content-type-options", "x-frame-options", "x-accel-buffering"} <= exposed
    return outcome.headers["access-control-allow-origin"] == APP


@GATEWAY
@STREAM
@pytest.mark.parametrize("task_type", TASK_BODIES)
async def test_scripts_may_read_the_answers_of_every_task_type(
    app: RunningApp, task_type: str, gateway: str, stream: bool
) -> None:
    account, headers = await app.account("all"), {"Origin": APP}
    outcome = await app.ask(gateway, account.test, TASK_BODIES[task_type], stream=stream, headers=headers)
    assert outcome.code == "ok"
    assert exposes_all(outcome)


@GATEWAY
@STREAM
async def test_only_scripts_of_an_allowed_origin_may_read_errors(
    app: RunningApp, gateway: str, stream: bool
) -> None:
    poor, five, rich = await app.account("all", test=0), await app.account("five"), await app.account("all")
    for _ in range(5):
        await app.ask(gateway, five.test, text_body())
    cases = {
        "insufficient_credits": (poor.test, text_body()),
        "rate_limit_exceeded": (five.test, text_body()),
        "unsupported_model": (poor.test, text_body(model="gpt-99")),
        "invalid_api_key": ("wrong", text_body()),
        "provider_unavailable": (rich.test, text_body("[[error:provider_unavailable]]")),
    }
    for code, (key, body) in cases.items():
        outcome = await app.ask(gateway, key, body, stream=stream, headers={"Origin": APP})
        assert outcome.code == code
        assert exposes_all(outcome)
        outcome = await app.ask(gateway, key, body, stream=stream, headers={"Origin": FOREIGN})
        assert outcome.code == code
        assert not [name for name in outcome.headers if name.startswith("access-control-")]


@GATEWAY
async def test_preflights_count_neither_as_requests_nor_as_failed_keys(app: RunningApp, gateway: str) -> None:
    account = await app.account("five")
    for _ in range(30):
        async with app.session.options(f"{app.urls[gateway]}/api/v1/task", headers=HEADERS) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, APP)
    outcome = await app.ask(gateway, account.test, text_body())
    assert (outcome.code, outcome.headers["x-ratelimit-remaining"]) == ("ok", "4")


@pytest.mark.parametrize(
    "command", [("serve",), ("gateway", "--target", "127.0.0.1:1")], ids=["serve", "gateway"]
)
async def test_both_commands_have_a_setting_for_cors_origins(
    tmp_path: Path, http: aiohttp.ClientSession, command: tuple[str, ...]
) -> None:
    variables = free_addresses() | {"POMELO_CORS_ORIGINS": APP}
    url = f"http://{variables['POMELO_REST']}/api/v1/task"
    async with start_command(tmp_path, *command, **variables) as running:
        await running.read_until("REST")
        async with http.options(url, headers=HEADERS) as answer:
            assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (204, APP)
        async with http.options(url, headers=HEADERS | {"Origin": FOREIGN}) as answer:
            assert (answer.status, "Access-Control-Allow-Origin" in answer.headers) == (204, False)
    wrong = await pomelo(tmp_path, *command, **variables | {"POMELO_CORS_ORIGINS": APP + "/"})
    assert wrong.status != 0
    assert "POMELO_CORS_ORIGINS: must be * or origins, such as https://app.example" in wrong.error
