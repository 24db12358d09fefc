"""`pomelo keys` and `pomelo doctor`, with a server and without one."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import typer

from pomelo.cli.keys import parse_expiry
from pomelo.cli.operator import PAGE_SIZE, call_operator, list_pages
from pomelo.gen.v1 import admin_service_pb2 as pb
from pomelo.service import Operator
from pomelo.settings import Settings
from tests.integration.commands import free_addresses, pomelo, start_command
from tests.serving import Served, serve


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


async def list_keys(folder: Path) -> dict[str, dict]:
    result = await pomelo(folder, "keys", "list", "--json")
    assert result.status == 0, result.error
    return {key["key_id"]: key for key in json.loads(result.out)}


async def status(served: Served, key: str) -> int:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.get(f"{served.url}/api/v1/models") as answer,
    ):
        return answer.status


async def test_a_key_is_created_listed_rotated_and_revoked(folder):
    created = await pomelo(
        folder, "keys", "create", "--live", "--models", "gpt-4,flux-1-pro", "--expires", "30d"
    )
    assert (created.status, created.error) == (0, "")
    secret = created.out.splitlines()[-1]
    assert secret.startswith("pml_live_")
    key_id = secret[9:21]
    key = (await list_keys(folder))[key_id]
    assert (key["account"], key["mode"], key["models"]) == ("default", "live", ["gpt-4", "flux-1-pro"])
    assert (key["state"], key["revoked"]) == ("active", None)
    assert key["expires"] > key["created"]

    rotated = json.loads((await pomelo(folder, "keys", "rotate", key_id, "--json")).out)
    assert rotated["key"].startswith("pml_live_")
    assert rotated["key"] != secret
    assert rotated["models"] == key["models"]
    assert (await list_keys(folder))[key_id]["state"] == "revoked"

    revoked = await pomelo(folder, "keys", "revoke", rotated["key_id"])
    assert (revoked.status, revoked.out) == (0, f"Revoked {rotated['key_id']} of default\n")
    assert (await list_keys(folder))[rotated["key_id"]]["state"] == "revoked"
    table = await pomelo(folder, "keys", "list")
    assert key_id in table.out
    assert secret not in table.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("create", "nobody"), "not_found: There is no account 'nobody'"),
        (("create", "--models", "gpt-4,nothing"), "'nothing' is not a model"),
        (("create", "--expires", "2020-01-01"), "must be in the future"),
        (("rotate", "nothing"), "not_found: There is no key 'nothing'"),
        (("revoke", "nothing"), "not_found: There is no key 'nothing'"),
        (("revoke", ""), "missing_parameter: "),
    ],
)
async def test_a_refused_command_prints_one_line_and_has_status_1(served, arguments, message):
    result = await pomelo(served.data.parent, "keys", *arguments)
    assert (result.status, result.out) == (1, "")
    assert message in result.error
    assert result.error.count("\n") == 1


def test_a_list_of_several_pages_opens_the_store_or_the_channel_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data=folder / "data")

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
    accounts = list_pages(
        settings, pb.ListAccountsRequest(), lambda operator, query: operator.list_accounts(query)
    )
    assert len(list(accounts)) == 1
    opened_for_one_page = opened.copy()
    assert opened_for_one_page
    opened.clear()
    keys = list_pages(settings, pb.ListKeysRequest(), lambda operator, query: operator.list_keys(query))
    pages = list(keys)
    assert len(pages) == 2
    assert len({key.key_id for page in pages for key in page.keys}) > PAGE_SIZE
    assert opened == opened_for_one_page


async def test_the_same_is_refused_without_a_server(tmp_path):
    nothing = await pomelo(tmp_path, "keys", "list")
    assert "no data folder" in nothing.error
    assert list(tmp_path.iterdir()) == []
    assert "no account 'nobody'" in (await pomelo(tmp_path, "keys", "create", "nobody")).error
    assert "no key 'x'" in (await pomelo(tmp_path, "keys", "revoke", "x")).error


async def test_a_key_works_immediately_on_the_running_server_until_it_is_revoked(served):
    created = json.loads((await pomelo(served.data.parent, "keys", "create", "--json")).out)
    assert await status(served, created["key"]) == 200
    await pomelo(served.data.parent, "keys", "revoke", created["key_id"])
    assert await status(served, created["key"]) == 401


async def test_a_key_created_without_a_server_is_valid_on_the_next_one(tmp_path):
    created = await pomelo(tmp_path, "keys", "create")
    key = created.out.splitlines()[-1]
    addresses = free_addresses()
    async with start_command(tmp_path, "serve", **addresses) as server:
        await server.read_until("data")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
            session.get(f"http://{addresses['POMELO_REST']}/api/v1/models") as answer,
        ):
            assert answer.status == 200
    # The store was not empty, so no development key was created.
    assert not (tmp_path / "data" / "test-key").exists()


def test_an_expiry_is_a_time_span_or_a_time_in_utc():
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


# --- doctor


async def findings(folder: Path, **variables: str) -> tuple[int, dict[str, tuple[str, str]]]:
    result = await pomelo(folder, "doctor", "--json", **variables)
    assert result.error == ""
    return result.status, {row["name"]: (row["state"], row["detail"]) for row in json.loads(result.out)}


def server_addresses(served: Served) -> dict[str, str]:
    return {
        "POMELO_REST": f"{served.host}:{served.port}",
        "POMELO_GRPC": f"{served.host}:{served.grpc_port}",
    }


async def test_doctor_reports_a_running_server_as_ok(served):
    status, found = await findings(served.data.parent, **server_addresses(served))
    assert status == 0
    assert {name for name, (state, _) in found.items() if state == "ok"} == {
        "program",
        "settings",
        "data",
        "store",
        "plans",
        "gRPC",
        "REST",
    }
    assert found["openai"][0] == "off"
    plain = await pomelo(served.data.parent, "doctor", **server_addresses(served))
    assert f"{server_addresses(served)['POMELO_GRPC']} serves" in plain.out


async def test_doctor_finds_nothing_broken_without_a_server(tmp_path):
    status, found = await findings(tmp_path, **free_addresses())
    assert status == 0
    assert {found[name][0] for name in ("data", "store", "gRPC", "REST", "openai")} == {"off"}
    assert list(tmp_path.iterdir()) == []


async def test_doctor_reports_a_server_at_another_address_and_another_program(served):
    status, found = await findings(
        served.data.parent,
        POMELO_GRPC=free_addresses()["POMELO_GRPC"],
        POMELO_REST=f"127.0.0.1:{served.grpc_port}",
    )
    assert status == 1
    assert found["gRPC"][0] == "broken"
    assert found["REST"][0] == "broken"


async def test_doctor_counts_usable_keys(tmp_path):
    created = [json.loads((await pomelo(tmp_path, "keys", "create", "--json")).out) for _ in range(2)]
    await pomelo(tmp_path, "keys", "revoke", created[0]["key_id"])
    soon = datetime.fromtimestamp(time.time() + 5, UTC).isoformat()
    assert (await pomelo(tmp_path, "keys", "create", "--expires", soon)).status == 0
    async with asyncio.timeout(30):
        while "active" in {k["state"] for k in (await list_keys(tmp_path)).values() if k["expires"]}:
            pass
    _, found = await findings(tmp_path, **free_addresses())
    assert found["store"] == ("ok", "SQLite, 3 keys, 1 of them usable")


async def test_doctor_reports_wrong_settings(tmp_path):
    status, found = await findings(tmp_path, POMELO_NOTHING="1")
    assert status == 1
    assert found["settings"] == ("broken", "Unknown variable POMELO_NOTHING")


async def test_doctor_reports_a_secret_that_others_can_read_or_that_is_missing(tmp_path):
    assert (await pomelo(tmp_path, "keys", "create")).status == 0
    secret = tmp_path / "data" / "secret"
    secret.chmod(0o644)
    status, found = await findings(tmp_path, **free_addresses())
    assert status == 1
    assert "chmod 600" in found["data"][1]
    secret.unlink()
    status, found = await findings(tmp_path, **free_addresses())
    assert status == 1
    assert "is missing" in found["data"][1]
    assert not secret.exists()


async def test_doctor_reports_a_damaged_store(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pomelo.db").write_bytes(b"not a database " * 400)
    (tmp_path / "data" / "pomelo.db").chmod(0o600)
    status, found = await findings(tmp_path, POMELO_SECRET="s" * 40, **free_addresses())
    assert status == 1
    assert found["store"][0] == "broken"
    assert "restore a backup" in found["store"][1]


async def test_doctor_reports_a_data_folder_that_is_open_to_others(tmp_path):
    data = tmp_path / "data"
    assert (await pomelo(tmp_path, "keys", "create")).status == 0
    data.chmod(0o755)
    status, found = await findings(tmp_path, **free_addresses())
    assert status == 1
    assert found["data"] == ("broken", f"{data} is open to other users. Run: chmod 700 {data}")


async def test_doctor_reports_whether_openai_accepts_the_key_and_never_shows_it(tmp_path, upstream):
    unreachable = f"http://{free_addresses()['POMELO_REST']}/v1"
    for base_url, states in ((upstream.openai_base_url, {"ok", "broken"}), (unreachable, {"broken"})):
        result = await pomelo(
            tmp_path,
            "doctor",
            OPENAI_API_KEY="sk-not-to-be-shown",
            OPENAI_BASE_URL=base_url,
            **free_addresses(),
        )
        (line,) = [line for line in result.out.splitlines() if line.split()[1] == "openai"]
        assert line.split()[0] in states
        assert "sk-not-to-be-shown" not in result.out + result.error
