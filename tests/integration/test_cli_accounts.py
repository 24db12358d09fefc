"""`pomelo accounts` and plans of a file as processes, with a server and without one."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest

from tests.driver import TaskRequest
from tests.integration.commands import (
    assert_refused,
    create_data,
    create_key,
    doctor,
    free_addresses,
    names,
    pomelo,
    pomelo_json,
)
from tests.rest_driver import RestDriver
from tests.serving import Served, serve
from tests.tasks import text_body


async def test_an_account_is_created_funded_moved_to_another_plan_and_shown(command_folder: Path) -> None:
    created = await pomelo(command_folder, "accounts", "create", "acme", "--plan", "pro", "--credits", "2.5")
    assert (created.status, created.error) == (0, "")
    assert "2.5 credits left of 2.5" in created.out
    gift = ("accounts", "grant", "acme", "0.000001", "--note", "a gift", "--id", "g1")
    for _ in range(2):
        granted = await pomelo(command_folder, *gift)
        assert granted.status == 0
        assert "2.500001 credits left" in granted.out
    assert (await pomelo(command_folder, "accounts", "grant", "acme", "7", "--test")).status == 0
    moved = await pomelo(command_folder, "accounts", "plan", "acme", "unlimited")
    assert "unlimited: no limits" in moved.out
    acme = await pomelo_json(command_folder, "accounts", "show", "acme")
    assert 0 <= time.time() - acme.pop("created") < 60
    exact = Decimal("2.500001")
    limits = ("requests_per_minute", "concurrent_requests", "tokens_per_minute", "models")
    assert acme == {
        "id": "acme",
        "object": "account",
        "plan": "unlimited",
        "limits": dict.fromkeys(limits),
        "live": {"granted": exact, "spent": 0, "held": 0, "available": exact},
        "test": {"granted": 107, "spent": 0, "held": 0, "available": 107},
    }
    listed = await pomelo_json(command_folder, "accounts", "list")
    assert [account["id"] for account in listed] == ["acme", "default"]
    table = (await pomelo(command_folder, "accounts", "list")).out.splitlines()
    assert table[0].split() == ["NAME", "PLAN", "CREDITS", "TEST_CREDITS", "CREATED"]
    assert table[1].split()[:4] == ["acme", "unlimited", "2.500001", "107"]
    assert table[2].split()[:4] == ["default", "pro", "0", "100"]
    assert (await create_key(command_folder, "acme", "--live")).startswith("pml_live_")
    audit = await pomelo(command_folder, "audit")
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "Difference: none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("accounts create default", "pomelo: invalid_parameter: Invalid NAME: must be new"),
        ("accounts create a\tb", "pomelo: invalid_parameter: Invalid NAME: "),
        (
            "accounts create x --plan no",
            "pomelo: invalid_parameter: Invalid --plan: must be one of free, pro",
        ),
        ("accounts show nobody", "pomelo: not_found: There is no account 'nobody'"),
        ("accounts plan nobody pro", "pomelo: not_found: There is no account 'nobody'"),
        ("accounts plan default no", "pomelo: invalid_parameter: Invalid PLAN: "),
        ("accounts grant nobody 1", "pomelo: not_found: There is no account 'nobody'"),
        ("usage --account nobody", "pomelo: not_found: There is no account 'nobody'"),
        ("keys create nobody", "pomelo: not_found: There is no account 'nobody'"),
        ("keys create --models gpt-4,nothing", "'nothing' is not a model"),
        ("keys rotate nothing", "not_found: There is no key 'nothing'"),
        ("keys revoke nothing", "not_found: There is no key 'nothing'"),
        ("keys create --expires 2020-01-01", "Invalid --expires: must be in the future"),
        ("keys revoke ", "missing_parameter: Missing required field: KEY_ID"),
    ],
)
async def test_a_refused_command_prints_one_line_and_has_status_1(
    served: Served, arguments: str, message: str
) -> None:
    words = [word.replace("\t", " ") for word in arguments.split(" ")]
    assert_refused(await pomelo(served.data.parent, *words), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("accounts grant default 0", "Invalid value for CREDITS: must be more than 0"),
        ("accounts grant default 1.0000001", "at most 6 places"),
        ("accounts grant default 1e3", "is not a number of credits"),
        ("accounts grant default 99999999999", "is not a number of credits"),
        ("accounts grant default 1000000001", "is more than 1,000,000,000 credits"),
        ("accounts create x --credits 1,5", "is not a number of credits"),
        ("usage --from soon", "is not a date or time"),
        ("usage --by hour", "is not one of"),
        ("usage --format xml", "is not one of"),
    ],
)
async def test_wrong_usage_is_reported_with_status_2(tmp_path: Path, arguments: str, message: str) -> None:
    result = await pomelo(tmp_path, *arguments.split())
    assert (result.status, result.out) == (2, "")
    assert message in " ".join(result.error.split())
    assert names(tmp_path) == []


async def test_commands_that_create_nothing_report_a_missing_data_folder_or_name(tmp_path: Path) -> None:
    for command in (
        "accounts list",
        "usage",
        "audit",
        "accounts grant default 1",
        "keys list",
        "keys create",
    ):
        result = await pomelo(tmp_path, *command.split())
        assert result.status == 1
        assert "no data folder" in result.error
        (tmp_path / "data").mkdir(mode=0o700)  # as an installation makes it before the first start
        result = await pomelo(tmp_path, *command.split())
        assert result.status == 1
        assert f"There is no database in the folder {tmp_path / 'data'}" in result.error
        (tmp_path / "data").rmdir()
    assert names(tmp_path) == []
    await create_data(tmp_path)
    assert "no account 'nobody'" in (await pomelo(tmp_path, "keys", "create", "nobody")).error
    assert "no key 'x'" in (await pomelo(tmp_path, "keys", "revoke", "x")).error


async def test_control_characters_of_a_name_do_not_reach_the_terminal(served: Served) -> None:
    for arguments in (
        ("accounts", "show", "\x1b[31mred"),
        ("keys", "revoke", "\x9b2J"),
        ("run", "-m", "\x1b]0;x\x07"),
    ):
        result = await pomelo(served.data.parent, *arguments)
        assert result.status == 1
        assert not set(result.error + result.out) & set("\x1b\x07\x9b")


async def test_the_server_applies_a_change_of_plan_immediately(
    served: Served, http: aiohttp.ClientSession
) -> None:
    folder = served.data.parent
    await pomelo(folder, "accounts", "create", "moving")
    headers = {"Authorization": f"Bearer {await create_key(folder, 'moving')}"}
    for plan, limit in (("free", 20), ("scale", 3000), ("unlimited", None)):
        if plan != "free":
            assert (await pomelo(folder, "accounts", "plan", "moving", plan)).status == 0
        async with http.get(f"{served.url}/api/v1/account", headers=headers) as answer:
            found = await answer.json()
        assert (found["plan"], found["limits"]["requests_per_minute"]) == (plan, limit)


# --- plans of a file


async def test_a_plan_of_the_operator_applies_until_it_is_removed(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    config = tmp_path / "pomelo.toml"
    config.write_text("[plans.team]\nrequests_per_minute = 1\nmodels = ['gpt-4']\n")
    async with serve(tmp_path) as served:
        created = await pomelo(tmp_path, "accounts", "create", "acme", "--plan", "team")
        assert "team: 1 request a minute, models gpt-4" in created.out
        key = await create_key(tmp_path, "acme")
        ask = RestDriver(http, served.url)
        refused = await ask(TaskRequest(text_body(model="gpt-4-turbo"), key))
        assert (refused.status, refused.code) == (403, "model_not_allowed")
        assert (await ask(TaskRequest(text_body(), key))).status == 200
        assert (await ask(TaskRequest(text_body(), key))).status == 429
    assert (await doctor(tmp_path, **free_addresses()))[1]["plans"][0] == "ok"
    config.write_text("")
    async with serve(tmp_path) as served:
        ask = RestDriver(http, served.url)
        refused = await ask(TaskRequest(text_body(), key))
        assert (refused.status, refused.code) == (403, "model_not_allowed")
        assert "team" in refused.message
        assert (await ask.get("/api/v1/account", key)).status == 403
    state, detail = (await doctor(tmp_path, **free_addresses()))[1]["plans"]
    assert state == "broken"
    assert "acme" in detail
    assert "pomelo accounts plan acme" in detail
    assert "(there is no such plan)" in (await pomelo(tmp_path, "accounts", "show", "acme")).out
    assert (await pomelo_json(tmp_path, "accounts", "show", "acme"))["limits"] is None


@pytest.mark.parametrize("command", [("serve",), ("accounts", "create", "x")])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("requests = 5", "pomelo: plans.team.requests: there is no such key\n"),
        ("models = ['gpt-5']", "pomelo: plans.team.models: there is no model gpt-5\n"),
    ],
)
async def test_a_wrong_plan_ends_every_command_with_a_line_that_names_it(
    tmp_path: Path, command: tuple[str, ...], text: str, message: str
) -> None:
    (tmp_path / "pomelo.toml").write_text(f"[plans.team]\n{text}")
    result = await pomelo(tmp_path, *command)
    assert (result.status, result.error) == (1, message)
