"""`pomelo keys` and `pomelo doctor`, with a server and without one."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
import typer

from pomelo.cli.keys import when
from tests.integration.commands import addresses as free_addresses
from tests.integration.commands import pomelo, staying
from tests.serving import Served, serve


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


async def listed(folder: Path) -> dict[str, dict]:
    ended = await pomelo(folder, "keys", "list", "--json")
    assert ended.status == 0, ended.error
    return {key["key_id"]: key for key in json.loads(ended.out)}


async def status(served: Served, key: str) -> int:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        session.get(f"{served.url}/api/v1/models") as answer,
    ):
        return answer.status


async def test_a_key_is_made_listed_rotated_and_revoked(folder):
    made = await pomelo(
        folder, "keys", "create", "--live", "--models", "gpt-4,flux-1-pro", "--expires", "30d"
    )
    assert (made.status, made.error) == (0, "")
    secret = made.out.splitlines()[-1]
    assert secret.startswith("pml_live_")
    key_id = secret[9:21]
    key = (await listed(folder))[key_id]
    assert (key["account"], key["mode"], key["models"]) == ("default", "live", ["gpt-4", "flux-1-pro"])
    assert (key["state"], key["revoked"]) == ("active", None)
    assert key["expires"] > key["created"]

    rotated = json.loads((await pomelo(folder, "keys", "rotate", key_id, "--json")).out)
    assert rotated["key"].startswith("pml_live_")
    assert rotated["key"] != secret
    assert rotated["models"] == key["models"]
    assert (await listed(folder))[key_id]["state"] == "revoked"

    revoked = await pomelo(folder, "keys", "revoke", rotated["key_id"])
    assert (revoked.status, revoked.out) == (0, f"Revoked {rotated['key_id']} of default\n")
    assert (await listed(folder))[rotated["key_id"]]["state"] == "revoked"
    table = await pomelo(folder, "keys", "list")
    assert key_id in table.out
    assert secret not in table.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("create", "nobody"), "not_found: There is no account 'nobody'"),
        (("create", "--models", "gpt-4,nothing"), "'nothing' is not a model"),
        (("create", "--expires", "2020-01-01"), "must be in the future"),
        (("rotate", "nothing"), "not_found: There is no key 'nothing'"),
        (("revoke", "nothing"), "not_found: There is no key 'nothing'"),
        (("revoke", ""), "missing_parameter: "),
    ],
)
async def test_what_can_not_be_done_is_one_line_and_status_1(served, arguments, says):
    ended = await pomelo(served.data.parent, "keys", *arguments)
    assert (ended.status, ended.out) == (1, "")
    assert says in ended.error
    assert ended.error.count("\n") == 1


async def test_the_same_is_refused_without_a_server(tmp_path):
    nothing = await pomelo(tmp_path, "keys", "list")
    assert "no data folder" in nothing.error
    assert list(tmp_path.iterdir()) == []
    assert "no account 'nobody'" in (await pomelo(tmp_path, "keys", "create", "nobody")).error
    assert "no key 'x'" in (await pomelo(tmp_path, "keys", "revoke", "x")).error


async def test_a_key_works_on_the_running_server_at_once_and_not_once_it_is_revoked(served):
    made = json.loads((await pomelo(served.data.parent, "keys", "create", "--json")).out)
    assert await status(served, made["key"]) == 200
    await pomelo(served.data.parent, "keys", "revoke", made["key_id"])
    assert await status(served, made["key"]) == 401


async def test_a_key_that_was_made_without_a_server_is_good_on_the_next_one(tmp_path):
    made = await pomelo(tmp_path, "keys", "create")
    key = made.out.splitlines()[-1]
    places = free_addresses()
    async with staying(tmp_path, "serve", **places) as server:
        await server.until("data")
        async with (
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
            session.get(f"http://{places['POMELO_REST']}/api/v1/models") as answer,
        ):
            assert answer.status == 200
    # The store was not empty, so no key was made that nobody asked for.
    assert not (tmp_path / "data" / "test-key").exists()


def test_an_end_is_a_span_or_a_moment_of_utc():
    assert when("30d", 100.0) == 100 + 30 * 86400
    assert when("90m", 0.0) == 5400
    assert when("2w", 0.0) == 14 * 86400
    assert when("1970-01-02", 0.0) == 86400
    assert when("1970-01-01T01:00Z", 0.0) == 3600
    assert when("1970-01-01T01:00+01:00", 0.0) == 0
    assert when("1970-01-01T01:00", 0.0) == 3600
    for wrong in ("soon", "30", "0d", "-1d", "30y", ""):
        with pytest.raises(typer.BadParameter):
            when(wrong, time.time())


# --- doctor


async def findings(folder: Path, **variables: str) -> tuple[int, dict[str, tuple[str, str]]]:
    ended = await pomelo(folder, "doctor", "--json", **variables)
    assert ended.error == ""
    return ended.status, {row["name"]: (row["state"], row["detail"]) for row in json.loads(ended.out)}


def doors(served: Served) -> dict[str, str]:
    return {
        "POMELO_REST": f"{served.host}:{served.port}",
        "POMELO_GRPC": f"{served.host}:{served.grpc_port}",
    }


async def test_doctor_finds_a_running_server_well(served):
    status, found = await findings(served.data.parent, **doors(served))
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
    plain = await pomelo(served.data.parent, "doctor", **doors(served))
    assert f"{doors(served)['POMELO_GRPC']} serves" in plain.out


async def test_doctor_finds_nothing_broken_where_nothing_was_started(tmp_path):
    status, found = await findings(tmp_path, **free_addresses())
    assert status == 0
    assert {found[name][0] for name in ("data", "store", "gRPC", "REST", "openai")} == {"off"}
    assert list(tmp_path.iterdir()) == []


async def test_doctor_finds_a_door_that_the_server_has_elsewhere_and_another_program(served):
    status, found = await findings(
        served.data.parent,
        POMELO_GRPC=free_addresses()["POMELO_GRPC"],
        POMELO_REST=f"127.0.0.1:{served.grpc_port}",
    )
    assert status == 1
    assert found["gRPC"][0] == "broken"
    assert found["REST"][0] == "broken"


async def test_doctor_counts_the_keys_that_can_be_used(tmp_path):
    made = [json.loads((await pomelo(tmp_path, "keys", "create", "--json")).out) for _ in range(2)]
    await pomelo(tmp_path, "keys", "revoke", made[0]["key_id"])
    soon = datetime.fromtimestamp(time.time() + 5, UTC).isoformat()
    assert (await pomelo(tmp_path, "keys", "create", "--expires", soon)).status == 0
    async with asyncio.timeout(30):
        while "active" in {k["state"] for k in (await listed(tmp_path)).values() if k["expires"]}:
            pass
    _, found = await findings(tmp_path, **free_addresses())
    assert found["store"] == ("ok", "SQLite, 3 keys, 1 of them usable")


async def test_doctor_finds_wrong_settings(tmp_path):
    status, found = await findings(tmp_path, POMELO_NOTHING="1")
    assert status == 1
    assert found["settings"] == ("broken", "Unknown variable POMELO_NOTHING")


async def test_doctor_finds_a_secret_that_others_read_or_that_is_gone(tmp_path):
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


async def test_doctor_finds_a_damaged_store(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pomelo.db").write_bytes(b"not a database " * 400)
    (tmp_path / "data" / "pomelo.db").chmod(0o600)
    status, found = await findings(tmp_path, POMELO_SECRET="s" * 40, **free_addresses())
    assert status == 1
    assert found["store"][0] == "broken"
    assert "restore a backup" in found["store"][1]


async def test_doctor_finds_a_data_folder_that_is_open_to_others(tmp_path):
    data = tmp_path / "data"
    assert (await pomelo(tmp_path, "keys", "create")).status == 0
    data.chmod(0o755)
    status, found = await findings(tmp_path, **free_addresses())
    assert status == 1
    assert found["data"] == ("broken", f"{data} is open to other users. Run: chmod 700 {data}")


async def test_doctor_tells_whether_openai_takes_the_key_and_never_shows_it(tmp_path, upstream):
    nowhere = f"http://{free_addresses()['POMELO_REST']}/v1"
    for base_url, states in ((upstream.openai_base_url, {"ok", "broken"}), (nowhere, {"broken"})):
        ended = await pomelo(
            tmp_path,
            "doctor",
            OPENAI_API_KEY="sk-not-to-be-shown",
            OPENAI_BASE_URL=base_url,
            **free_addresses(),
        )
        (line,) = [line for line in ended.out.splitlines() if line.split()[1] == "openai"]
        assert line.split()[0] in states
        assert "sk-not-to-be-shown" not in ended.out + ended.error
