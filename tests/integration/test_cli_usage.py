"""`pomelo usage` and `pomelo audit` as processes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import sqlite3
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pomelo.cli.usage import Format, usage
from pomelo.secrets import DATABASE
from tests.driver import TaskRequest
from tests.integration.commands import create_key, pomelo, pomelo_json
from tests.rest_driver import RestDriver
from tests.serving import Served, serve
from tests.tasks import text_body
from tests.unit.accounts.audited_store import corrupt


async def test_usage_is_the_same_with_a_running_server_and_without(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    keys = {}
    image = {"model": "flux-1-schnell", "prompt": "x", "width": 64, "height": 64}
    async with serve(tmp_path) as served:
        for name in ("acme", "other"):
            assert (await pomelo(tmp_path, "accounts", "create", name, "--plan", "pro")).status == 0
            keys[name] = await create_key(tmp_path, name)
        answers = [
            await RestDriver(http, served.url)(TaskRequest(body, keys[name]))
            for name, body in (*((n, text_body()) for n in ("acme", "acme", "other")), ("acme", image))
        ]
        assert [answer.status for answer in answers] == [200] * 4
        running = await usage_output(tmp_path)
        charged = {a["id"]: a["test"]["spent"] for a in await pomelo_json(tmp_path, "accounts", "list")}
    assert await usage_output(tmp_path) == running

    records, sums = running["records"], running["sums"]
    assert [record["id"] for record in records] == [answer.id for answer in reversed(answers)]
    assert {record["mode"] for record in records} == {"test"}
    for name in ("acme", "other"):
        cost = sum(Decimal(record["cost"]) for record in records if record["account"] == name)
        assert cost == Decimal(charged[name]) > 0
    for by, groups in sums.items():
        field = {"key": "key_id"}.get(by, by)
        rows = {row["group"]: row for row in groups}
        for group, row in rows.items():
            group_records = [r for r in records if (day(r["time"]) if by == "day" else r[field]) == group]
            assert row["tasks"] == len(group_records)
            assert Decimal(row["cost"]) == sum(Decimal(record["cost"]) for record in group_records)
        assert sum(row["tasks"] for row in rows.values()) == 4
    for cells, record in zip(csv.DictReader(io.StringIO(running["csv"])), records, strict=True):
        assert (cells["user"], cells["metadata"]) == ("", "")
        for name in cells.keys() & record.keys() - {"time", "code", "user", "metadata"}:
            value = record[name]
            assert cells[name] == (str(value).lower() if isinstance(value, bool) else str(value))
        assert cells["time"].startswith(day(record["time"]))
        details = record["prompt_tokens_details"]
        assert cells["cached_input_tokens"] == str(details["cached_tokens"])
    assert [line.split()[-1] for line in running["table"].splitlines()[1:]] == [r["id"] for r in records]


def add_records(data: Path, count: int, metadata: str = "") -> None:
    """Adds `count` copies of the only record, with ids of their own."""
    with closing(sqlite3.connect(data / DATABASE)) as database:
        names = [row[1] for row in database.execute("PRAGMA table_info(usage)")]
        values = ", ".join({"task_id": "'text_' || i", "metadata": "?"}.get(name, name) for name in names)
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?)"
        database.execute(f"{numbers} INSERT INTO usage SELECT {values} FROM n, usage", [count, metadata])
        database.commit()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The databases that this process opens."""
    paths: list[str] = []
    connect = sqlite3.connect

    def record(database: Any, *arguments: Any, **options: Any) -> Any:
        paths.append(str(database))
        return connect(database, *arguments, **options)

    monkeypatch.setattr(sqlite3, "connect", record)
    return paths


@pytest.mark.parametrize(
    ("count", "metadata", "openings"),
    [(2_500, "", 1), (400, json.dumps({"note": "x" * 50_000}), 2)],
    ids=["many", "large"],
)
async def test_many_records_are_read_in_few_openings_of_the_store(
    tmp_path: Path,
    http: aiohttp.ClientSession,
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int,
    metadata: str,
    openings: int,
) -> None:
    async with serve(tmp_path) as served:
        key = await create_key(tmp_path)
        answer = await RestDriver(http, served.url)(TaskRequest(text_body(), key))
    monkeypatch.setenv("POMELO_DATA", str(served.data))
    opened.clear()
    await asyncio.to_thread(usage, output_format=Format.csv)
    once = Counter(opened)
    assert len(list(csv.DictReader(io.StringIO(capsys.readouterr().out)))) == 1

    add_records(served.data, count, metadata)
    opened.clear()
    await asyncio.to_thread(usage, output_format=Format.csv)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {row["id"] for row in rows} == {answer.id, *(f"text_{i + 1}" for i in range(count))}
    assert len(rows) == count + 1
    assert {path: number / once[path] for path, number in Counter(opened).items()} == dict.fromkeys(
        once, openings
    )


@pytest.mark.parametrize("by", [(), ("--by", "day")])
async def test_a_period_that_ends_before_it_begins_is_refused(tmp_path: Path, by: tuple[str, ...]) -> None:
    assert (await pomelo(tmp_path, "accounts", "create", "acme")).status == 0
    period = ("--from", "2026-12-01", "--to", "2026-11-01")
    refused = await pomelo(tmp_path, "usage", *period, *by)
    assert (refused.status, refused.out) == (1, "")
    assert (
        refused.error == "pomelo: invalid_parameter: Invalid --to: must be the start of the period or later\n"
    )


def day(seconds: int) -> str:
    """Returns the day of Unix seconds, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


async def usage_output(folder: Path) -> dict[str, Any]:
    """Returns the output of every command about usage."""
    groups = ("model", "key", "day", "account")
    return {
        "records": await pomelo_json(folder, "usage"),
        "sums": {by: await pomelo_json(folder, "usage", "--by", by) for by in groups},
        "csv": (await pomelo(folder, "usage", "--format", "csv")).out,
        "table": (await pomelo(folder, "usage")).out,
        "audit": await pomelo_json(folder, "audit"),
    }


async def test_usage_is_filtered_by_account_mode_time_model_and_key(
    served: Served, http: aiohttp.ClientSession
) -> None:
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "quiet")).status == 0
    assert (await RestDriver(http, served.url)(TaskRequest(text_body(), served.key))).status == 200
    assert len(await pomelo_json(folder, "usage", "--account", "default", "--test")) >= 1
    for filters in (
        ("--account", "quiet"),
        ("--live",),
        ("--to", "2020-01-01"),
        ("--from", "2100-01-01T00:00+01:00"),
        ("--model", "flux-1-dev"),
        ("--key", "nothing"),
    ):
        assert await pomelo_json(folder, "usage", *filters) == []
        assert await pomelo_json(folder, "usage", "--by", "model", *filters) == []
        table = await pomelo(folder, "usage", *filters)
        assert (table.status, table.out, table.error) == (0, "", "Nothing was used.\n")
        assert (await pomelo(folder, "usage", "--format", "csv", *filters)).out == ""


async def test_failed_tasks_are_listed_by_the_command_and_over_rest(
    served: Served, http: aiohttp.ClientSession
) -> None:
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "failing", "--plan", "pro")).status == 0
    key = await create_key(folder, "failing")
    send = RestDriver(http, served.url)
    assert (await send(TaskRequest(text_body(), key))).status == 200
    answers = [
        await send(TaskRequest(text_body(text), key))
        for text in ("[[error:provider_unavailable]]", "[[error:content_policy_violation]]")
    ]
    codes = [answer.code for answer in answers]
    own = ("usage", "--account", "failing")
    listed = await pomelo_json(folder, *own, "--failed")
    assert [(record["code"], record["cost"], record["complete"]) for record in listed] == [
        (code, 0, False) for code in reversed(codes)
    ]
    assert [record["provider"] for record in listed] == ["sandbox", "sandbox"]
    (billed,) = await pomelo_json(folder, *own)
    assert billed["code"] is None
    headers = {"Authorization": f"Bearer {key}"}
    for query, expected in (("failed=true", listed), ("failed=false", [billed]), ("", [billed])):
        async with http.get(f"{served.url}/api/v1/usage?{query}", headers=headers) as answer:
            assert json.loads(await answer.text(), parse_float=Decimal)["data"] == expected
    by_code = await pomelo_json(folder, *own, "--failed", "--by", "code")
    assert {row["group"]: row["tasks"] for row in by_code} == dict.fromkeys(codes, 1)
    table = (await pomelo(folder, *own, "--failed")).out
    assert all(code in table for code in codes)
    nothing = await pomelo(folder, "usage", "--failed", "--live")
    assert (nothing.status, nothing.out, nothing.error) == (0, "", "Nothing has failed.\n")


async def test_a_text_that_looks_like_a_formula_is_escaped_in_csv(
    served: Served, http: aiohttp.ClientSession
) -> None:
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "formula")).status == 0
    formula = '=HYPERLINK("http://evil.example","usage")'
    metadata = {"team": "=1+1", "city": "Málaga"}
    body = text_body(user="@ann", metadata=metadata)
    request = TaskRequest(body, await create_key(folder, "formula"), request_id=formula)
    assert (await RestDriver(http, served.url)(request)).status == 200
    (record,) = await pomelo_json(folder, "usage", "--account", "formula")
    assert record["request_id"] == formula
    out = (await pomelo(folder, "usage", "--account", "formula", "--format", "csv")).out
    (row,) = csv.DictReader(io.StringIO(out))
    assert (row["request_id"], row["user"]) == ("'" + formula, "'@ann")
    assert json.loads(row["metadata"]) == metadata
    assert (row["cost"], row["output_tokens"]) == (str(record["cost"]), str(record["output_tokens"]))


async def test_the_audit_finds_changes_in_the_database_file(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with serve(tmp_path) as served:
        assert (await RestDriver(http, served.url)(TaskRequest(text_body(), served.key))).status == 200
    corrupt(tmp_path / "data" / "pomelo.db", "UPDATE usage SET cost = cost + 12")
    result = await pomelo(tmp_path, "audit")
    assert (result.status, result.error) == (1, "")
    assert [line.split()[0] for line in result.out.splitlines()[2:4]] == ["bill", "spent"]
    assert result.out.splitlines()[-1] == "Difference: 0.000024 credits"
    result = await pomelo(tmp_path, "audit", "--json")
    assert result.status == 1
    found = json.loads(result.out)
    assert found["difference"] == "0.000024"
    differences = [(one["check"], one["difference"]) for one in found["findings"]]
    assert differences == [("bill", "0.000012"), ("spent", "-0.000012")]


async def test_the_audit_says_that_not_all_findings_are_listed(tmp_path: Path) -> None:
    async with serve(tmp_path):
        pass
    lost = "\nOnly the first 1,000 findings are listed; the difference is that of all\n"
    wallets = "WITH RECURSIVE n (i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
    wallets += "INSERT INTO wallets (account, live, granted) SELECT 'gone{}-' || i, 1, 1 FROM n"
    corrupt(tmp_path / "data" / "pomelo.db", wallets.format(10, "a"))
    result = await pomelo(tmp_path, "audit")
    assert (result.status, lost in result.out) == (1, False)
    corrupt(tmp_path / "data" / "pomelo.db", wallets.format(1_000, "b"))
    result = await pomelo(tmp_path, "audit")
    assert result.out.count("gone") == 1_000
    assert result.out.endswith(f"{lost}Difference: 0.00101 credits\n")
