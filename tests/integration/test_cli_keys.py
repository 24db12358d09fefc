"""`pomelo keys` as a process, with a server and without one."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import typer

from pomelo.cli.keys import parse_expiry
from pomelo.cli.operator import PAGE_SIZE, call_operator, list_pages
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.service import Operator
from pomelo.settings import Settings
from tests.driver import TaskRequest
from tests.integration.commands import (
    create_data,
    create_key,
    free_addresses,
    pomelo,
    pomelo_json,
    start_command,
)
from tests.rest_driver import RestDriver
from tests.serving import Served
from tests.tasks import TASK_BODIES

IMAGE = TASK_BODIES["image"]


def utc(timestamp: float) -> str:
    return f"{datetime.fromtimestamp(timestamp, UTC):%Y-%m-%dT%H:%M:%SZ}"


async def test_a_key_is_created_listed_rotated_and_revoked(command_folder: Path) -> None:
    folder = command_folder

    async def listed(key_id: str) -> dict[str, Any]:
        (key,) = [key for key in await pomelo_json(folder, "keys", "list") if key["id"] == key_id]
        assert isinstance(key, dict)
        return key

    options = ("--live", "--models", "gpt-4,flux-1-pro", "--expires", "30d")
    labels = ("--name", "mine", "--budget", "5/day")
    created = await pomelo(folder, "keys", "create", *options, *labels)
    assert (created.status, created.error) == (0, "")
    secret = created.out.splitlines()[-1]
    assert secret.startswith("pml_live_")
    key_id = secret[9:21]
    key = await listed(key_id)
    assert (key["account"], key["mode"], key["models"]) == ("default", "live", ["gpt-4", "flux-1-pro"])
    assert (key["state"], key["revoked"]) == ("active", None)
    assert key["expires"] > key["created"]

    rotated = await pomelo_json(folder, "keys", "rotate", key_id)
    assert rotated["key"].startswith("pml_live_")
    assert rotated["key"] != secret
    assert rotated["models"] == key["models"]
    assert (await listed(key_id))["state"] == "revoked"

    revoked = await pomelo(folder, "keys", "revoke", rotated["id"])
    assert (revoked.status, revoked.out) == (0, f"Revoked {rotated['id']} of default\n")
    assert (await listed(rotated["id"]))["state"] == "revoked"
    table = await pomelo(folder, "keys", "list")
    assert secret not in table.out
    header, *rows = table.out.splitlines()
    (row,) = [row for row in rows if row.startswith(key_id)]
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert shown["STATE"] == "revoked"
    assert [shown[name] for name in ("KEY_ID", "NAME", "ACCOUNT")] == [key_id, "mine", "default"]
    assert [shown[name] for name in ("MODE", "MODELS")] == ["live", "gpt-4,flux-1-pro"]
    assert [shown[name] for name in ("BUDGET", "USED", "LAST_USE")] == ["5/day", "0", "never"]
    assert [shown[name] for name in ("CREATED", "EXPIRES")] == [utc(key["created"]), utc(key["expires"])]


@pytest.mark.parametrize("models", ["", ",", " "])
async def test_an_empty_list_of_models_creates_no_key(command_folder: Path, models: str) -> None:
    await create_key(command_folder)
    before = await pomelo_json(command_folder, "keys", "list")
    refused = await pomelo(command_folder, "keys", "create", "--models", models)
    assert refused.status == 1
    assert "Invalid --models: must be at least one model, or absent for all" in refused.error
    assert await pomelo_json(command_folder, "keys", "list") == before


def test_a_list_of_several_pages_opens_the_store_or_the_channel_once(
    command_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data=command_folder / "data")

    async def create_keys(operator: Operator) -> None:
        for _ in range(0, PAGE_SIZE, 100):
            await asyncio.gather(*[operator.create_key(pb.CreateKeyRequest()) for _ in range(100)])
        await operator.create_key(pb.CreateKeyRequest())

    call_operator(settings, create_keys, creates=True)
    opened = []

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            opened.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(sqlite3, "connect")
    count(grpc.aio, "insecure_channel")
    accounts = pb.ListAccountsRequest()
    assert len(list(list_pages(settings, accounts, lambda operator: operator.list_accounts(accounts)))) == 1
    opened_for_one_page = opened.copy()
    assert opened_for_one_page
    opened.clear()
    keys = pb.ListKeysRequest()
    pages = list(list_pages(settings, keys, lambda operator: operator.list_keys(keys)))
    assert len(pages) == 2
    assert len({key.id for page in pages for key in page.keys}) > PAGE_SIZE
    assert opened == opened_for_one_page


async def test_a_key_works_immediately_on_the_running_server_until_it_is_revoked(
    served: Served, http: aiohttp.ClientSession
) -> None:
    rest = RestDriver(http, served.url)
    created = await pomelo_json(served.data.parent, "keys", "create")
    assert (await rest.get("/api/v1/models", created["key"])).status == 200
    await pomelo(served.data.parent, "keys", "revoke", created["id"])
    assert (await rest.get("/api/v1/models", created["key"])).status == 401


async def test_a_list_of_keys_shows_what_is_used_of_a_budget(
    served: Served, http: aiohttp.ClientSession
) -> None:
    folder = served.data.parent
    created = await pomelo_json(folder, "keys", "create", "--budget", "5/total")
    answer = await RestDriver(http, served.url)(TaskRequest(IMAGE, created["key"]))
    rotated = await pomelo_json(folder, "keys", "rotate", created["id"], "--grace", "1h")
    used = {key["id"]: key["budget_used"] for key in await pomelo_json(folder, "keys", "list")}
    assert used[created["id"]] == used[rotated["id"]] == Decimal("0.04")
    assert answer.metadata["x-credits-charged"] == "0.04"
    assert None in used.values()  # the first key has no budget
    table = (await pomelo(folder, "keys", "list")).out
    (row,) = [line.split() for line in table.splitlines() if line.startswith(created["id"])]
    assert row[row.index("5/total") + 1] == "0.04"


async def test_a_key_created_without_a_server_is_valid_on_the_next_one(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    await create_data(tmp_path)
    key = await create_key(tmp_path)
    addresses = free_addresses()
    async with start_command(tmp_path, "serve", **addresses) as server:
        await server.read_until("data")
        rest = RestDriver(http, f"http://{addresses['POMELO_REST']}")
        assert (await rest.get("/api/v1/models", key)).status == 200
    # The store was not empty, so no development key was created.
    assert not (tmp_path / "data" / "test-key").exists()


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
async def test_output_is_utf_8_whatever_the_encoding_of_the_locale(tmp_path: Path, encoding: str) -> None:
    await create_data(tmp_path)
    await create_key(tmp_path, "--name", "李雷")
    for arguments in (("list",), ("list", "--json")):
        result = await pomelo(tmp_path, "keys", *arguments, PYTHONIOENCODING=encoding)
        assert (result.status, result.error, "李雷" in result.out) == (0, "", True)


def test_an_expiry_is_a_time_span_or_a_time_in_utc() -> None:
    assert parse_expiry("30d", 100.0) == 100 + 30 * 86400
    assert parse_expiry("90m", 0.0) == 5400
    assert parse_expiry("2w", 0.0) == 14 * 86400
    assert parse_expiry("1970-01-02", 0.0) == 86400
    assert parse_expiry("1970-01-01T01:00Z", 0.0) == 3600
    assert parse_expiry("1970-01-01T01:00+01:00", 0.0) == 0
    assert parse_expiry("1970-01-01T01:00", 0.0) == 3600
    for wrong in ("soon", "30", "0d", "-1d", "30y", ""):
        with pytest.raises(typer.BadParameter):
            parse_expiry(wrong, time.time())
