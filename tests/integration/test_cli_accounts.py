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

from tests.integration.commands import addresses as free_addresses
from tests.integration.commands import pomelo
from tests.serving import Served, serve
from tests.unit.accounts.audited_store import corrupt


@pytest.fixture(params=["with a server", "without one"])
async def folder(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Path]:
    """A folder whose data a server holds, or nobody."""
    if request.param == "with a server":
        async with serve(tmp_path):
            yield tmp_path
    else:
        yield tmp_path


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    """A server whose folder is that of its data."""
    async with serve(tmp_path_factory.mktemp("served")) as process:
        yield process


async def printed(folder: Path, *arguments: str, **variables: str):
    """What a command prints as JSON."""
    ended = await pomelo(folder, *arguments, "--json", **variables)
    assert (ended.status, ended.error) == (0, ""), ended.error
    return json.loads(ended.out)


async def task(served: Served, key: str, **changes) -> dict:
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


async def test_an_account_is_made_endowed_moved_and_told(folder):
    made = await pomelo(folder, "accounts", "create", "acme", "--plan", "pro", "--credits", "2.5")
    assert (made.status, made.error) == (0, "")
    assert "2.5 credits left of 2.5" in made.out
    for _ in range(2):
        given = await pomelo(
            folder, "accounts", "grant", "acme", "0.000001", "--note", "a gift", "--id", "g1"
        )
        assert given.status == 0
        assert "2.500001 credits left" in given.out
    assert (await pomelo(folder, "accounts", "grant", "acme", "7", "--test")).status == 0
    moved = await pomelo(folder, "accounts", "plan", "acme", "unlimited")
    assert "unlimited: no limits" in moved.out
    acme = await printed(folder, "accounts", "show", "acme")
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
    assert [account["name"] for account in await printed(folder, "accounts", "list")] == ["acme", "default"]
    table = (await pomelo(folder, "accounts", "list")).out.splitlines()
    assert table[0].split() == ["NAME", "PLAN", "CREDITS", "TEST_CREDITS", "CREATED"]
    assert table[1].split()[:4] == ["acme", "unlimited", "2.500001", "107"]
    assert table[2].split()[:4] == ["default", "pro", "0", "100"]
    key = await pomelo(folder, "keys", "create", "acme", "--live")
    assert key.out.splitlines()[-1].startswith("pml_live_")
    audit = await pomelo(folder, "audit")
    assert (audit.status, audit.out.splitlines()[-1]) == (0, "Difference: none")


@pytest.mark.parametrize(
    ("arguments", "says"),
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
async def test_what_can_not_be_done_is_one_line_and_status_1(served, arguments, says):
    ended = await pomelo(served.data.parent, *arguments)
    assert (ended.status, ended.out) == (1, "")
    assert ended.error.startswith(f"pomelo: {says}")
    assert ended.error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
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
async def test_what_is_typed_wrongly_is_told_and_status_2(tmp_path, arguments, says):
    ended = await pomelo(tmp_path, *arguments)
    assert (ended.status, ended.out) == (2, "")
    assert says in " ".join(ended.error.split())
    assert list(tmp_path.iterdir()) == []


async def test_nothing_is_made_by_asking_where_nothing_is(tmp_path):
    for arguments in (("accounts", "list"), ("usage",), ("audit",), ("accounts", "grant", "default", "1")):
        ended = await pomelo(tmp_path, *arguments)
        assert ended.status == 1
        assert "no data folder" in ended.error
    assert list(tmp_path.iterdir()) == []


async def test_usage_is_the_same_with_the_server_and_after_it(tmp_path):
    async with serve(tmp_path) as served:
        for name in ("acme", "other"):
            assert (await pomelo(tmp_path, "accounts", "create", name, "--plan", "pro")).status == 0
        keys = {
            name: (await pomelo(tmp_path, "keys", "create", name)).out.splitlines()[-1]
            for name in ("acme", "other")
        }
        answers = [await task(served, keys[name]) for name in ("acme", "acme", "other")]
        answers.append(
            await task(served, keys["acme"], model="flux-1-schnell", prompt="x", width=64, height=64)
        )
        assert [answer["status"] for answer in answers] == [200] * 4
        running = await everything(tmp_path)
        charged = {a["name"]: a["test"]["spent"] for a in await printed(tmp_path, "accounts", "list")}
    assert await everything(tmp_path) == running

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
            mine = [r for r in records if (r["time"][:10] if by == "day" else r[field]) == group]
            assert row["tasks"] == len(mine)
            assert Decimal(row["cost"]) == sum(Decimal(record["cost"]) for record in mine)
        assert sum(row["tasks"] for row in rows.values()) == 4
    assert list(csv.DictReader(io.StringIO(running["csv"]))) == [
        {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in row.items()}
        for row in records
    ]
    assert [line.split()[-1] for line in running["table"].splitlines()[1:]] == [r["id"] for r in records]


async def everything(folder: Path) -> dict:
    """All that the commands tell of usage."""
    return {
        "records": await printed(folder, "usage"),
        "sums": {by: await printed(folder, "usage", "--by", by) for by in ("model", "key", "day", "account")},
        "csv": (await pomelo(folder, "usage", "--format", "csv")).out,
        "table": (await pomelo(folder, "usage")).out,
        "audit": await printed(folder, "audit"),
    }


async def test_usage_is_told_of_whom_and_when_it_is_asked_for(served):
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "quiet")).status == 0
    assert (await task(served, served.key))["status"] == 200
    assert len(await printed(folder, "usage", "--account", "default", "--test")) >= 1
    for nothing in (
        ("--account", "quiet"),
        ("--live",),
        ("--to", "2020-01-01"),
        ("--from", "2100-01-01T00:00+01:00"),
        ("--model", "flux-1-dev"),
        ("--key", "nothing"),
    ):
        assert await printed(folder, "usage", *nothing) == []
        assert await printed(folder, "usage", "--by", "model", *nothing) == []
        table = await pomelo(folder, "usage", *nothing)
        assert (table.status, table.out, table.error) == (0, "", "Nothing was used.\n")
        assert (await pomelo(folder, "usage", "--format", "csv", *nothing)).out == ""


async def test_a_request_id_that_looks_like_a_formula_is_not_a_formula_in_csv(served):
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
    (record,) = await printed(folder, "usage", "--account", "formula")
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
        ended = await pomelo(folder, *arguments)
        assert ended.status == 1
        assert not set(ended.error + ended.out) & set("\x1b\x07\x9b")


async def test_a_change_of_plan_is_seen_by_the_server_at_once(served):
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


async def test_the_audit_finds_what_was_changed_in_the_file(tmp_path):
    async with serve(tmp_path) as served:
        assert (await task(served, served.key))["status"] == 200
    corrupt(tmp_path / "data" / "pomelo.db", "UPDATE usage SET cost = cost + 12")
    ended = await pomelo(tmp_path, "audit")
    assert (ended.status, ended.error) == (1, "")
    assert [line.split()[0] for line in ended.out.splitlines()[2:4]] == ["bill", "spent"]
    assert ended.out.splitlines()[-1] == "Difference: 0.000024 credits"
    ended = await pomelo(tmp_path, "audit", "--json")
    assert ended.status == 1
    found = json.loads(ended.out)
    assert found["difference"] == "0.000024"
    assert [(one["check"], one["difference"]) for one in found["findings"]] == [
        ("bill", "0.000012"),
        ("spent", "-0.000012"),
    ]


# --- plans of a file, and what doctor says


async def doctor(folder: Path) -> dict[str, tuple[str, str]]:
    ended = await pomelo(folder, "doctor", "--json", **free_addresses())
    return {row["name"]: (row["state"], row["detail"]) for row in json.loads(ended.out)}


async def test_a_plan_of_the_operator_s_own_holds_until_it_is_gone(tmp_path):
    config = tmp_path / "pomelo.toml"
    config.write_text("[plans.team]\nrequests_per_minute = 1\nmodels = ['gpt-4']\n")
    async with serve(tmp_path) as served:
        made = await pomelo(tmp_path, "accounts", "create", "acme", "--plan", "team")
        assert "team: 1 requests a minute, models gpt-4" in made.out
        key = (await pomelo(tmp_path, "keys", "create", "acme")).out.splitlines()[-1]
        refused = await task(served, key, model="gpt-4-turbo")
        assert (refused["status"], refused["error"]["code"]) == (403, "model_not_allowed")
        assert (await task(served, key))["status"] == 200
        assert (await task(served, key))["status"] == 429
    assert (await doctor(tmp_path))["plans"][0] == "ok"
    config.write_text("")
    async with serve(tmp_path) as served:
        refused = await task(served, key)
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
    assert (await printed(tmp_path, "accounts", "show", "acme"))["limits"] is None


async def test_a_wrong_plan_ends_everything_with_a_line_that_names_it(tmp_path):
    for text, says in (
        ("[plans.team]\nrequests = 5", "pomelo: plans.team.requests: there is no such key\n"),
        ("[plans.team]\nmodels = ['gpt-5']", "pomelo: plans.team.models: there is no model gpt-5\n"),
    ):
        (tmp_path / "pomelo.toml").write_text(text)
        for command in (("serve",), ("accounts", "create", "x")):
            ended = await pomelo(tmp_path, *command)
            assert (ended.status, ended.error) == (1, says)


async def test_doctor_tells_of_live_keys_without_credits(tmp_path):
    await pomelo(tmp_path, "keys", "create")
    assert (await doctor(tmp_path))["credits"][0] == "off"
    await pomelo(tmp_path, "keys", "create", "--live")
    state, detail = (await doctor(tmp_path))["credits"]
    assert state == "off"
    assert "pomelo accounts grant default" in detail
    await pomelo(tmp_path, "accounts", "grant", "default", "1")
    assert (await doctor(tmp_path))["credits"] == ("ok", "every account with a live key has live credits")
