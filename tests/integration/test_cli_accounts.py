"""`pomelo accounts`, `usage` and `audit` as processes, with a server and without one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest

from tests.integration.commands import free_addresses, pomelo
from tests.serving import Served, serve
from tests.unit.accounts.audited_store import corrupt


@pytest.fixture(params=["with a server", "without one"])
async def folder(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Path]:
    """A folder whose data folder a server uses, or no process."""
    if request.param == "with a server":
        async with serve(tmp_path):
            yield tmp_path
    else:
        yield tmp_path


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A running server."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


async def json_output(folder: Path, *arguments: str, **variables: str):
    """Returns the JSON that a command prints."""
    result = await pomelo(folder, *arguments, "--json", **variables)
    assert (result.status, result.error) == (0, ""), result.error
    return json.loads(result.out)


async def run_task(served: Served, key: str, **changes) -> dict:
    body = (
        changes
        if "prompt" in changes
        else {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
    )
    body = {"model": "gpt-4"} | body | changes
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.post(f"{served.url}/api/v1/task", json=body) as answer,
    ):
        return await answer.json() | {"status": answer.status}


async def test_an_account_is_created_funded_moved_to_another_plan_and_shown(folder):
    created = await pomelo(folder, "accounts", "create", "acme", "--plan", "pro", "--credits", "2.5")
    assert (created.status, created.error) == (0, "")
    assert "2.5 credits left of 2.5" in created.out
    for _ in range(2):
        granted = await pomelo(
            folder, "accounts", "grant", "acme", "0.000001", "--note", "a gift", "--id", "g1"
        )
        assert granted.status == 0
        assert "2.500001 credits left" in granted.out
    assert (await pomelo(folder, "accounts", "grant", "acme", "7", "--test")).status == 0
    moved = await pomelo(folder, "accounts", "plan", "acme", "unlimited")
    assert "unlimited: no limits" in moved.out
    acme = await json_output(folder, "accounts", "show", "acme")
    assert acme.pop("created").endswith("Z")
    assert acme == {
        "name": "acme",
        "plan": "unlimited",
        "limits": dict.fromkeys(
            ("requests_per_minute", "concurrent_requests", "tokens_per_minute", "models")
        ),
        "live": {"granted": "2.500001", "spent": "0", "held": "0", "available": "2.500001"},
        "test": {"granted": "107", "spent": "0", "held": "0", "available": "107"},
    }
    assert [account["name"] for account in await json_output(folder, "accounts", "list")] == [
        "acme",
        "default",
    ]
    table = (await pomelo(folder, "accounts", "list")).out.splitlines()
    assert table[0].split() == ["NAME", "PLAN", "CREDITS", "TEST_CREDITS", "CREATED"]
    assert table[1].split()[:4] == ["acme", "unlimited", "2.500001", "107"]
    assert table[2].split()[:4] == ["default", "pro", "0", "100"]
    key = await pomelo(folder, "keys", "create", "acme", "--live")
    assert key.out.splitlines()[-1].startswith("pml_live_")
    audit = await pomelo(folder, "audit")
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "Difference: none")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accounts", "create", "default"), "invalid_parameter: Invalid name: must be new"),
        (("accounts", "create", "a b"), "invalid_parameter: Invalid name: "),
        (("accounts", "create", "x", "--plan", "no"), "invalid_parameter: Invalid plan: must be one of free, pro"),
        (("accounts", "show", "nobody"), "not_found: There is no account 'nobody'"),
        (("accounts", "plan", "nobody", "pro"), "not_found: There is no account 'nobody'"),
        (("accounts", "plan", "default", "no"), "invalid_parameter: Invalid plan: "),
        (("accounts", "grant", "nobody", "1"), "not_found: There is no account 'nobody'"),
        (("accounts", "grant", "default", "0"), "invalid_parameter: Invalid amount_micros: "),
        (("keys", "create", "nobody"), "not_found: There is no account 'nobody'"),
        (("usage", "--account", "nobody"), "not_found: There is no account 'nobody'"),
    ],
)  # fmt: skip
async def test_a_refused_command_prints_one_line_and_has_status_1(served, arguments, message):
    result = await pomelo(served.data.parent, *arguments)
    assert (result.status, result.out) == (1, "")
    assert result.error.startswith(f"pomelo: {message}")
    assert result.error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("accounts", "grant", "default", "1.0000001"), "at most 6 places"),
        (("accounts", "grant", "default", "1e3"), "is no number of credits"),
        (("accounts", "grant", "default", "99999999999"), "is no number of credits"),
        (("accounts", "grant", "default", "1000000001"), "is more than 1,000,000,000 credits"),
        (("accounts", "create", "x", "--credits", "1,5"), "is no number of credits"),
        (("usage", "--from", "soon"), "is no date or time"),
        (("usage", "--by", "hour"), "is not one of"),
        (("usage", "--format", "xml"), "is not one of"),
    ],
)
async def test_wrong_usage_is_reported_with_status_2(tmp_path, arguments, message):
    result = await pomelo(tmp_path, *arguments)
    assert (result.status, result.out) == (2, "")
    assert message in " ".join(result.error.split())
    assert list(tmp_path.iterdir()) == []


async def test_queries_without_a_data_folder_create_nothing(tmp_path):
    for arguments in (("accounts", "list"), ("usage",), ("audit",), ("accounts", "grant", "default", "1")):
        result = await pomelo(tmp_path, *arguments)
        assert result.status == 1
        assert "no data folder" in result.error
    assert list(tmp_path.iterdir()) == []


async def test_usage_is_the_same_with_a_running_server_and_without(tmp_path):
    async with serve(tmp_path) as served:
        for name in ("acme", "other"):
            assert (await pomelo(tmp_path, "accounts", "create", name, "--plan", "pro")).status == 0
        keys = {
            name: (await pomelo(tmp_path, "keys", "create", name)).out.splitlines()[-1]
            for name in ("acme", "other")
        }
        answers = [await run_task(served, keys[name]) for name in ("acme", "acme", "other")]
        answers.append(
            await run_task(served, keys["acme"], model="flux-1-schnell", prompt="x", width=64, height=64)
        )
        assert [answer["status"] for answer in answers] == [200] * 4
        running = await usage_output(tmp_path)
        charged = {a["name"]: a["test"]["spent"] for a in await json_output(tmp_path, "accounts", "list")}
    assert await usage_output(tmp_path) == running

    records, sums = running["records"], running["sums"]
    assert [record["id"] for record in records] == [answer["id"] for answer in reversed(answers)]
    assert {record["mode"] for record in records} == {"test"}
    for name in ("acme", "other"):
        cost = sum(Decimal(record["cost"]) for record in records if record["account"] == name)
        assert cost == Decimal(charged[name]) > 0
    for by, groups in sums.items():
        field = {"key": "key_id"}.get(by, by)
        rows = {row.pop(by): row for row in groups}
        for group, row in rows.items():
            group_records = [r for r in records if (r["time"][:10] if by == "day" else r[field]) == group]
            assert row["tasks"] == len(group_records)
            assert Decimal(row["cost"]) == sum(Decimal(record["cost"]) for record in group_records)
        assert sum(row["tasks"] for row in rows.values()) == 4
    assert list(csv.DictReader(io.StringIO(running["csv"]))) == [
        {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in row.items()}
        for row in records
    ]
    assert [line.split()[-1] for line in running["table"].splitlines()[1:]] == [r["id"] for r in records]


async def usage_output(folder: Path) -> dict:
    """Returns the output of every command about usage."""
    return {
        "records": await json_output(folder, "usage"),
        "sums": {
            by: await json_output(folder, "usage", "--by", by) for by in ("model", "key", "day", "account")
        },
        "csv": (await pomelo(folder, "usage", "--format", "csv")).out,
        "table": (await pomelo(folder, "usage")).out,
        "audit": await json_output(folder, "audit"),
    }


async def test_usage_is_filtered_by_account_mode_time_model_and_key(served):
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "quiet")).status == 0
    assert (await run_task(served, served.key))["status"] == 200
    assert len(await json_output(folder, "usage", "--account", "default", "--test")) >= 1
    for filters in (
        ("--account", "quiet"),
        ("--live",),
        ("--to", "2020-01-01"),
        ("--from", "2100-01-01T00:00+01:00"),
        ("--model", "flux-1-dev"),
        ("--key", "nothing"),
    ):
        assert await json_output(folder, "usage", *filters) == []
        assert await json_output(folder, "usage", "--by", "model", *filters) == []
        table = await pomelo(folder, "usage", *filters)
        assert (table.status, table.out, table.error) == (0, "", "Nothing was used.\n")
        assert (await pomelo(folder, "usage", "--format", "csv", *filters)).out == ""


async def test_a_request_id_that_looks_like_a_formula_is_escaped_in_csv(served):
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "formula")).status == 0
    key = (await pomelo(folder, "keys", "create", "formula")).out.splitlines()[-1]
    formula = '=HYPERLINK("http://evil.example","usage")'
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": formula}
    body = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}]}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{served.url}/api/v1/task", json=body, headers=headers) as answer,
    ):
        assert answer.status == 200
    (record,) = await json_output(folder, "usage", "--account", "formula")
    assert record["request_id"] == formula
    out = (await pomelo(folder, "usage", "--account", "formula", "--format", "csv")).out
    (row,) = csv.DictReader(io.StringIO(out))
    assert row["request_id"] == "'" + formula
    assert (row["cost"], row["output_tokens"]) == (record["cost"], str(record["output_tokens"]))


async def test_control_characters_of_a_name_do_not_reach_the_terminal(served):
    folder = served.data.parent
    for arguments in (
        ("accounts", "show", "\x1b[31mred"),
        ("keys", "revoke", "\x9b2J"),
        ("run", "-m", "\x1b]0;x\x07"),
    ):
        result = await pomelo(folder, *arguments)
        assert result.status == 1
        assert not set(result.error + result.out) & set("\x1b\x07\x9b")


async def test_the_server_applies_a_change_of_plan_immediately(served):
    folder = served.data.parent
    await pomelo(folder, "accounts", "create", "moving")
    key = (await pomelo(folder, "keys", "create", "moving")).out.splitlines()[-1]
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        for plan, limit in (("free", 20), ("scale", 3000), ("unlimited", None)):
            if plan != "free":
                assert (await pomelo(folder, "accounts", "plan", "moving", plan)).status == 0
            async with session.get(f"{served.url}/api/v1/account") as answer:
                found = await answer.json()
            assert (found["plan"], found["limits"]["requests_per_minute"]) == (plan, limit)


async def test_the_audit_finds_changes_in_the_database_file(tmp_path):
    async with serve(tmp_path) as served:
        assert (await run_task(served, served.key))["status"] == 200
    corrupt(tmp_path / "data" / "pomelo.db", "UPDATE usage SET cost = cost + 12")
    result = await pomelo(tmp_path, "audit")
    assert (result.status, result.error) == (1, "")
    assert [line.split()[0] for line in result.out.splitlines()[2:4]] == ["bill", "spent"]
    assert result.out.splitlines()[-1] == "Difference: 0.000024 credits"
    result = await pomelo(tmp_path, "audit", "--json")
    assert result.status == 1
    found = json.loads(result.out)
    assert found["difference"] == "0.000024"
    assert [(one["check"], one["difference"]) for one in found["findings"]] == [
        ("bill", "0.000012"),
        ("spent", "-0.000012"),
    ]


# --- plans of a file, and their report by doctor


async def doctor(folder: Path) -> dict[str, tuple[str, str]]:
    result = await pomelo(folder, "doctor", "--json", **free_addresses())
    return {row["name"]: (row["state"], row["detail"]) for row in json.loads(result.out)}


async def test_a_plan_of_the_operator_applies_until_it_is_removed(tmp_path):
    config = tmp_path / "pomelo.toml"
    config.write_text("[plans.team]\nrequests_per_minute = 1\nmodels = ['gpt-4']\n")
    async with serve(tmp_path) as served:
        created = await pomelo(tmp_path, "accounts", "create", "acme", "--plan", "team")
        assert "team: 1 requests a minute, models gpt-4" in created.out
        key = (await pomelo(tmp_path, "keys", "create", "acme")).out.splitlines()[-1]
        refused = await run_task(served, key, model="gpt-4-turbo")
        assert (refused["status"], refused["error"]["code"]) == (403, "model_not_allowed")
        assert (await run_task(served, key))["status"] == 200
        assert (await run_task(served, key))["status"] == 429
    assert (await doctor(tmp_path))["plans"][0] == "ok"
    config.write_text("")
    async with serve(tmp_path) as served:
        refused = await run_task(served, key)
        assert (refused["status"], refused["error"]["code"]) == (403, "model_not_allowed")
        assert "team" in refused["error"]["message"]
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
            session.get(f"{served.url}/api/v1/account") as answer,
        ):
            assert answer.status == 403
    state, detail = (await doctor(tmp_path))["plans"]
    assert state == "broken"
    assert "acme" in detail
    assert "pomelo accounts plan acme" in detail
    assert "(there is no such plan)" in (await pomelo(tmp_path, "accounts", "show", "acme")).out
    assert (await json_output(tmp_path, "accounts", "show", "acme"))["limits"] is None


async def test_a_wrong_plan_ends_every_command_with_a_line_that_names_it(tmp_path):
    for text, message in (
        ("[plans.team]\nrequests = 5", "pomelo: plans.team.requests: there is no such key\n"),
        ("[plans.team]\nmodels = ['gpt-5']", "pomelo: plans.team.models: there is no model gpt-5\n"),
    ):
        (tmp_path / "pomelo.toml").write_text(text)
        for command in (("serve",), ("accounts", "create", "x")):
            result = await pomelo(tmp_path, *command)
            assert (result.status, result.error) == (1, message)


async def test_doctor_reports_live_keys_without_credits(tmp_path):
    await pomelo(tmp_path, "keys", "create")
    assert (await doctor(tmp_path))["credits"][0] == "off"
    await pomelo(tmp_path, "keys", "create", "--live")
    state, detail = (await doctor(tmp_path))["credits"]
    assert state == "off"
    assert "pomelo accounts grant default" in detail
    await pomelo(tmp_path, "accounts", "grant", "default", "1")
    assert (await doctor(tmp_path))["credits"] == ("ok", "every account with a live key has live credits")
