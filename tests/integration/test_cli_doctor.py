"""`pomelo doctor` as a process, with a server and without one."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import pytest

from pomelo import __version__
from pomelo.accounts.keys import Keyring
from pomelo.configuration import store_of
from pomelo.settings import Settings
from pomelo.testing import FaultUpstream
from tests import s3_server
from tests.driver import TaskRequest
from tests.integration.commands import (
    create_data,
    create_key,
    doctor,
    environment,
    free_addresses,
    names,
    pomelo,
    pomelo_json,
    start_server,
)
from tests.postgres_server import PostgresServer, programs, user
from tests.redis_server import RedisServer
from tests.rest_driver import RestDriver
from tests.serving import Served
from tests.tasks import text_body
from tests.waiting import first


async def test_a_running_server_is_ok(served: Served) -> None:
    rest, grpc = f"{served.host}:{served.port}", f"{served.host}:{served.grpc_port}"
    status, found = await doctor(served.data.parent, POMELO_REST=rest, POMELO_GRPC=grpc)
    assert status == 0
    ok = {"program", "settings", "data", "server", "store", "plans", "gRPC", "REST"}
    assert {name for name, (state, _) in found.items() if state == "ok"} == ok
    assert found["openai"][0] == "off"
    plain = await pomelo(served.data.parent, "doctor", POMELO_REST=rest, POMELO_GRPC=grpc)
    assert f"{grpc} serves" in plain.out


async def test_the_version_and_the_providers_of_the_running_server_are_reported(
    tmp_path: Path, upstream: FaultUpstream
) -> None:
    addresses = free_addresses()
    openai = {"OPENAI_API_KEY": "sk-server", "OPENAI_BASE_URL": upstream.openai_base_url}
    async with start_server(tmp_path, **addresses, **openai):
        status, found = await doctor(tmp_path, **addresses)
    assert status == 0
    assert (found["server"][0], found["openai"]) == (
        "ok",
        ("ok", "configured in the running server, not for this command"),
    )
    assert found["server"][1].startswith(f"pomelo {__version__}, since 20")
    assert found["mistral"][0] == "off"


async def test_nothing_is_broken_without_a_server(tmp_path: Path) -> None:
    status, found = await doctor(tmp_path, **free_addresses())
    assert status == 0
    assert {found[name][0] for name in ("data", "store", "gRPC", "REST", "openai")} == {"off"}
    assert names(tmp_path) == []


async def test_a_server_at_another_address_and_another_program_are_broken(served: Served) -> None:
    addresses = free_addresses() | {"POMELO_REST": f"127.0.0.1:{served.grpc_port}"}
    status, found = await doctor(served.data.parent, **addresses)
    assert (status, found["gRPC"][0], found["REST"][0]) == (1, "broken", "broken")


async def test_usable_keys_are_counted(tmp_path: Path) -> None:
    await create_data(tmp_path)
    created = [await pomelo_json(tmp_path, "keys", "create") for _ in range(2)]
    await pomelo(tmp_path, "keys", "revoke", created[0]["id"])
    settings = Settings(data=tmp_path / "data")
    async with store_of(settings) as store:
        keyring = Keyring(store, settings.root_secret())
        await keyring.create("default", expires=time.time() - 1)
    _, found = await doctor(tmp_path, **free_addresses())
    assert found["store"] == ("ok", "SQLite, 3 keys, 1 usable")


@pytest.mark.skipif(programs() is None or user() is None, reason="Postgres is not installed")
async def test_an_archive_that_is_down_is_broken_while_its_server_runs(tmp_path: Path) -> None:
    postgres = PostgresServer()
    postgres.start()
    try:
        with RedisServer() as redis:
            variables = free_addresses() | {"POMELO_STORE": redis.url, "POMELO_ARCHIVE": postgres.url}
            async with start_server(tmp_path, **variables):
                status, found = await doctor(tmp_path, **variables)
                assert (status, found["archive"]) == (0, ("ok", "usage records can be read"))
                postgres.stop()
                status, found = await doctor(tmp_path, **variables)
                assert (status, found["store"][0], found["archive"][0]) == (1, "ok", "broken")
                assert found["archive"][1].startswith(
                    "usage records can't be read from POMELO_ARCHIVE: The archive in Postgres can't be used ("
                )
                audit = await pomelo(tmp_path, "audit", **variables)
                assert audit.status == 1
                assert audit.error.startswith("pomelo: store_unavailable: ")
                assert audit.error.endswith(". See: pomelo doctor\n")
    finally:
        postgres.close()


async def test_a_redis_server_that_is_down_is_named_also_while_its_server_runs(tmp_path: Path) -> None:
    with RedisServer() as redis:
        variables = free_addresses() | {"POMELO_STORE": redis.url}
        async with start_server(tmp_path, **variables):
            redis.kill()
            _, found = await doctor(tmp_path, **variables)
            state, detail = found["store"]
            assert state == "broken"
            assert detail.startswith(f"The Redis server at 127.0.0.1:{redis.port} can't be reached: ")
            listed = await pomelo(tmp_path, "accounts", "list", **variables)
            assert listed.error.endswith(". See: pomelo doctor\n")


async def test_a_redis_server_that_can_be_read_and_not_written_is_broken(tmp_path: Path) -> None:
    with RedisServer() as redis:
        variables = free_addresses() | {"POMELO_STORE": redis.url}
        async with start_server(tmp_path, **variables):
            assert (await doctor(tmp_path, **variables))[1]["store"][0] == "ok"
            keys = redis.do("DBSIZE")
            redis.do("CONFIG", "SET", "maxmemory", "1")
            status, found = await doctor(tmp_path, **variables)
            assert (status, found["store"][0]) == (1, "broken")
            reason = f"The Redis server at 127.0.0.1:{redis.port} can't be written: command not allowed when"
            assert found["store"][1].startswith(reason)
            checked = await pomelo(tmp_path, "serve", "--check", **variables)
            assert reason in checked.out
            redis.do("CONFIG", "SET", "maxmemory", "0")
            assert (await doctor(tmp_path, **variables))[1]["store"][0] == "ok"
            assert redis.do("DBSIZE") == keys
        redis.do("CONFIG", "SET", "maxmemory", "1")
        _, found = await doctor(tmp_path, **variables)
        assert found["store"][1].startswith(reason)


async def test_a_server_that_can_not_write_its_database_says_so(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    addresses = free_addresses()
    async with start_server(tmp_path, **addresses) as server:
        key, url = await create_key(tmp_path), f"http://{addresses['POMELO_REST']}"
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        answer = await RestDriver(http, url)(TaskRequest(text_body(), key))
        assert answer.code == "store_unavailable"
        await first(lambda: http.get(f"{url}/healthz"), lambda health: health.status == 503)
        status, found = await doctor(tmp_path, **addresses)
    reason = f"{addresses['POMELO_REST']} takes no requests: the store can't be reached or written"
    assert (status, found["REST"]) == (1, ("broken", reason))


async def test_a_disk_without_space_for_media_is_reported(tmp_path: Path) -> None:
    await create_data(tmp_path)
    _, found = await doctor(tmp_path, **free_addresses(), POMELO_DISK_RESERVE="1000000GiB")
    assert found["data"][0] == "warning"
    assert found["data"][1].startswith("no media can be stored: ")
    assert "POMELO_DISK_RESERVE keeps 1,073,741,824,000,000 of them" in found["data"][1]


async def test_the_bucket_of_media_is_checked(tmp_path: Path) -> None:
    server, bucket = s3_server.any_server(), "s3://examined/prefix"
    server.create_bucket(bucket)
    async with start_server(tmp_path, **(addresses := free_addresses())):
        for media, state in ((bucket, "ok"), ("s3://missing", "broken")):
            variables = {**addresses, "POMELO_MEDIA": media, **server.variables}
            status, found = await doctor(tmp_path, **variables)
            assert (status, found["bucket"][0]) == (int(state == "broken"), state)


async def test_wrong_settings_are_broken(tmp_path: Path) -> None:
    status, found = await doctor(tmp_path, POMELO_NOTHING="1")
    assert status == 1
    assert found["settings"] == ("broken", "Unknown variable POMELO_NOTHING. Remove it, or correct its name")


async def test_a_secret_that_others_can_read_or_that_is_missing_is_broken(tmp_path: Path) -> None:
    await create_data(tmp_path)
    secret = tmp_path / "data" / "secret"
    secret.chmod(0o644)
    status, found = await doctor(tmp_path, **free_addresses())
    assert status == 1
    assert "chmod 600" in found["data"][1]
    secret.unlink()
    status, found = await doctor(tmp_path, **free_addresses())
    assert status == 1
    assert "is missing" in found["data"][1]
    assert not secret.exists()


async def test_a_damaged_store_is_broken(tmp_path: Path) -> None:
    database = tmp_path / "data" / "pomelo.db"
    database.parent.mkdir()
    database.write_bytes(b"not a database " * 400)
    database.chmod(0o600)
    status, found = await doctor(tmp_path, POMELO_SECRET="s" * 40, **free_addresses())
    assert (status, found["store"][0]) == (1, "broken")
    assert "restore a backup" in found["store"][1]


async def test_a_data_folder_that_is_open_to_others_is_broken(tmp_path: Path) -> None:
    data = tmp_path / "data"
    await create_data(tmp_path)
    data.chmod(0o755)
    status, found = await doctor(tmp_path, **free_addresses())
    assert status == 1
    assert found["data"] == ("broken", f"{data} is open to other users. Run: chmod 700 {data}")


async def test_a_folder_of_media_that_can_not_be_used_is_broken(tmp_path: Path) -> None:
    await create_data(tmp_path)
    media = tmp_path / "data" / "media"
    media.write_text("")
    for command in (("doctor",), ("serve", "--check")):
        result = await pomelo(tmp_path, *command, **free_addresses())
        assert result.status == 1
        assert f"{media} is not a folder that this user can write to" in result.out
    assert (await pomelo(tmp_path, "serve", **free_addresses())).status == 1
    media.unlink()
    assert (await doctor(tmp_path, **free_addresses()))[0] == 0


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs root without its rights")
@pytest.mark.parametrize("name", ["data", "data/in/it"])
@pytest.mark.parametrize("command", [("doctor",), ("serve", "--check")])
def test_a_data_folder_of_another_user_is_one_finding_among_all(
    tmp_path: Path, command: tuple[str, ...], name: str
) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    os.chown(data, 12345, 12345)
    as_a_user = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    result = subprocess.run(
        [*as_a_user, sys.executable, "-m", "pomelo.cli", *command],
        env=environment(tmp_path, **free_addresses(), POMELO_DATA=str(tmp_path / name)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (result.returncode, result.stderr) == (1, "")
    states = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines()}
    assert (states["data"], states["store"]) == ("broken", "broken")
    assert "REST" in states, "the findings after that one"


async def test_it_reports_whether_openai_accepts_the_key_and_never_shows_it(
    tmp_path: Path, upstream: FaultUpstream
) -> None:
    unreachable = f"http://{free_addresses()['POMELO_REST']}/v1"
    for base_url, states in ((upstream.openai_base_url, {"ok", "broken"}), (unreachable, {"broken"})):
        settings = {"OPENAI_API_KEY": "sk-not-to-be-shown", "OPENAI_BASE_URL": base_url}
        result = await pomelo(tmp_path, "doctor", **settings, **free_addresses())
        (line,) = [line for line in result.out.splitlines() if line.split()[1] == "openai"]
        assert line.split()[0] in states
        assert "sk-not-to-be-shown" not in result.out + result.error


async def test_the_login_in_a_base_url_is_not_shown(tmp_path: Path) -> None:
    address = free_addresses()["POMELO_REST"]
    url = f"http://me:secret-word@{address}/v1"
    _, found = await doctor(tmp_path, **free_addresses(), OPENAI_API_KEY="sk-x", OPENAI_BASE_URL=url)
    assert found["openai"] == ("broken", f"http://{address}/v1 can't be reached")


async def test_a_refused_base_url_is_not_shown(tmp_path: Path) -> None:
    url = "http://me:secret-word@127.0.0.1/v1?token=secret-word"
    result = await pomelo(tmp_path, "doctor", OPENAI_API_KEY="sk-x", OPENAI_BASE_URL=url)
    shown = result.out + result.error
    assert "OPENAI_BASE_URL: must have no ?" in shown
    assert "secret-word" not in shown


async def test_live_keys_without_credits_are_reported(tmp_path: Path) -> None:
    await create_data(tmp_path)
    await create_key(tmp_path)
    assert (await doctor(tmp_path, **free_addresses()))[1]["credits"][0] == "off"
    await create_key(tmp_path, "--live")
    state, detail = (await doctor(tmp_path, **free_addresses()))[1]["credits"]
    assert state == "off"
    assert "pomelo accounts grant default" in detail
    await pomelo(tmp_path, "accounts", "grant", "default", "1")
    _, found = await doctor(tmp_path, **free_addresses())
    assert found["credits"] == ("ok", "every account with a live key has live credits")
