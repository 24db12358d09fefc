"""Servers of several machines with one Redis store: what they must share, at start and in `pomelo doctor`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pomelo.cli.fleet import check_fleet
from pomelo.configuration import read_configuration
from pomelo.configuration.fleet import check_command, check_server, describe_process
from pomelo.settings import Settings, SettingsError
from pomelo.stores.fleet import Process
from pomelo.stores.redis import Timing, open_redis
from pomelo.stores.redis.key_names import PROCESSES, WORKERS
from tests.integration.commands import assert_refused, free_addresses, names, pomelo
from tests.integration.commands import doctor as cli_doctor
from tests.redis_server import RedisServer
from tests.s3_server import any_server
from tests.serving import serve
from tests.waiting import first

SECRET = "the root secret of all of the machines"
BUCKET = "s3://fleet/prefix"
SHARED = {
    "POMELO_SECRET": SECRET,
    "POMELO_MEDIA": BUCKET,
    "POMELO_ARCHIVE": "postgresql://pomelo:hunter2@db.internal/usage",
    "POMELO_PUBLIC_URL": "https://api.example",
}


@pytest.fixture(name="redis", scope="module")
def _redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(autouse=True, scope="module")
def _bucket() -> Iterator[None]:
    server = any_server()
    server.create_bucket(BUCKET)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.variables.items():
            patch.setenv(name, value)
        yield


@asynccontextmanager
async def another_machine(redis: RedisServer, folder: Path, **changes: str) -> AsyncIterator[Process]:
    """Lists a process of the host web-2 that has the shared settings, and these."""
    variables = {**SHARED, **changes}
    settings = Settings(
        data=folder / "web-2",
        store=redis.url,
        **{name.removeprefix("POMELO_").lower(): value for name, value in variables.items()},  # type: ignore[arg-type]
    )
    timing = Timing(heartbeat=0.1)  # what is refused waits for a heartbeat
    async with open_redis(redis.url, f"sqlite:{folder / 'usage.db'}", timing=timing) as store:
        process = describe_process(
            settings, read_configuration(settings), settings.secret.encode(), time.time(), 0.0
        )
        await store.register(process := replace(process, host="web-2"))  # type: ignore[attr-defined]
        yield process


async def doctor(folder: Path, redis: RedisServer, **changes: str) -> tuple[int, dict[str, tuple[str, str]]]:
    variables = {**SHARED, "POMELO_STORE": redis.url, **changes}
    result = await pomelo(folder, "doctor", "--fleet", "--json", **variables)
    assert result.error == ""
    assert "hunter2" not in result.out
    assert SECRET not in result.out
    return result.status, {row["name"]: (row["state"], row["detail"]) for row in json.loads(result.out)}


async def test_machines_that_share_everything_are_ok(redis: RedisServer, tmp_path: Path) -> None:
    async with another_machine(redis, tmp_path):
        status, found = await doctor(tmp_path, redis)
    assert status == 0
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["processes"][1].startswith("1 on 1 host\nweb-2: 1, since 20")
    assert found["media"][1] == BUCKET
    assert found["bucket"][1] == f"{BUCKET} can be read and written from here"
    assert found["archive"][1] == "postgresql://db.internal/usage"
    assert found["secret"][1] == "the same everywhere"


@pytest.mark.parametrize(
    ("name", "state", "change"),
    [
        ("secret", "broken", {"POMELO_SECRET": "another root secret of one machine"}),
        ("media", "broken", {"POMELO_MEDIA": ""}),
        ("archive", "broken", {"POMELO_ARCHIVE": "postgresql://db2.internal/usage"}),
        ("public URL", "warning", {"POMELO_PUBLIC_URL": "https://web-1.example"}),
        ("providers", "warning", {"OPENAI_API_KEY": "sk-hunter2"}),
        ("alerts", "warning", {"POMELO_ALERT_URL": "https://hooks.example/hunter2"}),
    ],
)
async def test_what_machines_do_not_share_is_named_with_both_values(
    redis: RedisServer, tmp_path: Path, name: str, state: str, change: dict[str, str]
) -> None:
    async with another_machine(redis, tmp_path):
        status, found = await doctor(tmp_path, redis, **change)
    assert status == (1 if state == "broken" else 0)
    assert {key for key, (each, _) in found.items() if each != "ok"} == {name}
    assert found[name][0] == state
    _, *lines = found[name][1].split("\n")
    assert [line.rpartition(": ")[2] for line in lines] == ["web-2", "these settings"]


async def test_a_bucket_that_cannot_be_used_is_broken_and_refused_at_start(
    redis: RedisServer, tmp_path: Path
) -> None:
    missing = "s3://no-such-bucket/prefix"
    reason = f"POMELO_MEDIA: {missing} can't be used: there is no such bucket (status 404, NoSuchBucket)"
    async with another_machine(redis, tmp_path, POMELO_MEDIA=missing):
        status, found = await doctor(tmp_path, redis, POMELO_MEDIA=missing)
    assert (status, found["bucket"]) == (1, ("broken", reason))
    result = await pomelo(tmp_path, "serve", POMELO_MEDIA=missing)
    assert (result.status, result.error) == (1, f"pomelo: {reason}\n")


def test_a_bucket_without_its_extra_names_the_command_that_installs_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['obstore'] = None; from pomelo.cli import main; main()"
    ports = {"POMELO_REST": "127.0.0.1:0", "POMELO_GRPC": "127.0.0.1:0", "POMELO_ADMIN": ""}
    ran = subprocess.run(
        [sys.executable, "-c", program, "serve"],
        env={**os.environ, **ports, "POMELO_DATA": str(tmp_path / "data"), "POMELO_MEDIA": BUCKET},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stderr) == (
        1,
        "pomelo: POMELO_MEDIA: a bucket needs another package: pip install 'pomelo-tasks[s3]'\n",
    )


async def test_no_server_and_no_secret_are_not_broken(redis: RedisServer, tmp_path: Path) -> None:
    status, found = await doctor(tmp_path, redis, POMELO_SECRET="")
    assert status == 0
    assert found["processes"] == (
        "off",
        "no server runs with this store. Start one with: pomelo serve",
    )
    assert found["secret here"][0] == "off"
    plain = await pomelo(tmp_path, "doctor", "--fleet")
    assert plain.out.startswith("off     fleet         SQLite serves one process")


async def test_a_server_with_another_secret_refuses_to_start(redis: RedisServer, tmp_path: Path) -> None:
    async with another_machine(redis, tmp_path, POMELO_SECRET="another root secret of one machine"):
        result = await pomelo(tmp_path, "serve", POMELO_STORE=redis.url, POMELO_SECRET=SECRET)
    assert result.status == 1
    assert result.error == (
        "pomelo: The server on web-2 has the same store and another root secret. Set the same POMELO_SECRET on all "
        "machines\n"
    )
    status, found = await doctor(tmp_path, redis)
    assert (status, found["processes"][0]) == (0, "off")  # the refused one is not listed


async def test_servers_that_were_all_killed_refuse_no_other_secret_or_archive(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Timing(heartbeat=0.05, dead_after=0.5, timeout=20.0, attempt_timeout=5.0)
    monkeypatch.setattr("pomelo.stores.redis.processes.Timing", lambda: quick)
    new = {"secret": "another root secret of one machine", "archive": f"sqlite:{tmp_path / 'new.db'}"}
    for check in (check_server, check_command):
        async with another_machine(redis, tmp_path) as killed:
            listed, workers = redis.do("HGETALL", PROCESSES), redis.do("HGETALL", WORKERS)
            settings = Settings(data=tmp_path / "data", store=redis.url, **new)  # type: ignore[arg-type]
            with pytest.raises(SettingsError, match=f"The server on {killed.host} has the same store"):
                await check(settings)
        list_again(redis, listed, workers)
        await check(settings)
        assert redis.do("EXISTS", PROCESSES, WORKERS) == 0


def list_again(redis: RedisServer, processes: dict[bytes, bytes], workers: dict[bytes, bytes]) -> None:
    """Lists processes as if they had been killed instead of ended."""
    for key, entries in ((PROCESSES, processes), (WORKERS, workers)):
        redis.do("HSET", key, *[part for entry in entries.items() for part in entry])


async def test_a_server_that_was_killed_is_not_reported(
    redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = Timing(heartbeat=0.05, dead_after=0.5, timeout=20.0, attempt_timeout=5.0)
    monkeypatch.setattr("pomelo.stores.redis.processes.Timing", lambda: quick)
    for name, value in {**SHARED, "POMELO_STORE": redis.url}.items():
        monkeypatch.setenv(name, value)
    async with another_machine(redis, tmp_path, POMELO_MEDIA=""):
        listed, workers = redis.do("HGETALL", PROCESSES), redis.do("HGETALL", WORKERS)
    list_again(redis, listed, workers)
    found = await asyncio.to_thread(lambda: {each.name: each for each in check_fleet(None)})
    assert found["processes"].detail == "no server runs with this store. Start one with: pomelo serve"
    assert {each.state for name, each in found.items() if name != "processes"} == {"ok"}


async def test_a_server_that_differs_from_another_says_in_what(redis: RedisServer, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "data").mkdir(mode=0o700, parents=True)
    (own / "data" / "test-key").touch(0o600)
    (own / "pomelo.toml").write_text("[plans.tiny]\nrequests_per_minute = 1\n")
    async with another_machine(redis, tmp_path, POMELO_MEDIA=""):
        variables = {**SHARED, "POMELO_ARCHIVE": f"sqlite:{own / 'usage.db'}", "POMELO_MEDIA": ""}
        async with serve(own, POMELO_STORE=redis.url, **variables) as served:
            lines = [line for line in served.log().splitlines() if "differ in" in line]
            status, found = await doctor(own, redis, POMELO_STORE=redis.url, **variables)
    (line,) = lines
    assert "and the one on web-2 differ in: plans, media, archive. That is normal during a change" in line
    assert found["processes"][1].startswith("2 on 2 hosts")
    assert (status, found["plans"][0]) == (1, "warning")
    shutil.rmtree(own)


async def test_servers_with_their_own_data_folders_share_a_folder_of_media_and_a_file_of_sqlite(
    redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir(mode=0o700)
    for name in ("web-1", "web-2"):
        (tmp_path / name / "data").mkdir(mode=0o700, parents=True)
        (tmp_path / name / "data" / "media").symlink_to(tmp_path / "volume")
        (tmp_path / name / "data" / "test-key").touch(0o600)
    variables = {**SHARED, "POMELO_ARCHIVE": f"sqlite:{tmp_path / 'volume' / 'usage.db'}", "POMELO_MEDIA": ""}
    async with serve(tmp_path / "web-1", POMELO_STORE=redis.url, **variables):
        status, found = await doctor(tmp_path / "web-2", redis, **variables)
        (tmp_path / "web-2" / "data" / "media").unlink()
        _, own = await doctor(tmp_path / "web-2", redis, **variables)
    assert (status, found["media"][0], found["archive"][0]) == (0, "ok", "ok")
    assert (own["media"][0], own["archive"][0]) == ("broken", "ok")


async def test_servers_notice_that_they_share_a_folder_of_media_again_when_they_are_reloaded(
    redis: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "volume").mkdir(mode=0o700)
    archive = f"sqlite:{tmp_path / 'volume' / 'usage.db'}"
    variables = {**SHARED, "POMELO_STORE": redis.url, "POMELO_ARCHIVE": archive, "POMELO_MEDIA": ""}
    for name in ("web-1", "web-2"):
        (tmp_path / name / "data").mkdir(mode=0o700, parents=True)
        (tmp_path / name / "data" / "media").symlink_to(tmp_path / "volume")
        (tmp_path / name / "data" / "test-key").touch(0o600)
    async with serve(tmp_path / "web-1", **variables) as one, serve(tmp_path / "web-2", **variables) as two:

        async def media() -> str:
            return (await doctor(tmp_path / "web-2", redis, **variables))[1]["media"][0]

        assert await media() == "ok"
        (tmp_path / "volume" / ".folder").unlink()
        assert await media() == "broken"
        for server in (one, two):
            os.kill(server.pid, signal.SIGHUP)
        await first(media, lambda state: state == "ok")


COMMANDS = (
    ("accounts", "list"),
    ("keys", "create", "--live"),
    ("usage",),
    ("audit",),
    ("log",),
    ("accounts", "grant", "default", "1"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda each: each[0])
async def test_a_command_makes_no_root_secret(
    redis: RedisServer, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Its keys would be wrong for the servers."""
    for url in ("redis://127.0.0.1:1", redis.url):
        result = await pomelo(tmp_path, *command, POMELO_STORE=url)
        assert_refused(
            result, f"There is no data folder {tmp_path / 'data'}. Set POMELO_DATA to the folder of a "
        )
        assert names(tmp_path) == []
    (tmp_path / "data").mkdir(mode=0o700)
    result = await pomelo(tmp_path, *command, POMELO_STORE=redis.url)
    assert_refused(
        result, f"There is no root secret in the folder {tmp_path / 'data'}. Set POMELO_DATA to the "
    )
    assert names(tmp_path) == ["data"]
    status, found = await cli_doctor(tmp_path, POMELO_STORE=redis.url)
    assert found["store"][0] == "off"
    assert found["store"][1].startswith("redis can be reached, and was not read. There is no root secret in ")
    assert (status, names(tmp_path)) == (0, ["data"])


async def test_a_command_is_refused_with_another_secret_or_archive_than_a_server(
    redis: RedisServer, tmp_path: Path
) -> None:
    archive = {"POMELO_ARCHIVE": f"sqlite:{tmp_path / 'usage.db'}"}
    right = {"POMELO_STORE": redis.url, "POMELO_SECRET": SECRET, **archive}
    wrong = {
        "the same store and another root secret. Set": {
            "POMELO_SECRET": "another root secret of one machine"
        },
        "keeps usage records in a file on a disk (": {"POMELO_ARCHIVE": f"sqlite:{tmp_path / 'own.db'}"},
    }
    async with another_machine(redis, tmp_path, **archive):
        before = names(tmp_path)
        for message, change in wrong.items():
            for command in (*COMMANDS, ("accounts", "create", "acme")):
                result = await pomelo(tmp_path, *command, **{**right, **change})
                assert_refused(result, message)
                assert names(tmp_path) == before
        result = await pomelo(tmp_path, "accounts", "create", "acme", POMELO_STORE=redis.url, **archive)
        assert_refused(result, "another root secret. Set the same POMELO_SECRET on all machines")
        assert names(tmp_path) == before
        for command in COMMANDS:
            result = await pomelo(tmp_path, *command, **right)
            assert (result.status, result.error.startswith("pomelo: ")) == (0, False)
        # The secret is that of the settings: nothing else of a data folder is needed.
        assert names(tmp_path) == before


async def test_the_first_account_of_a_store_may_be_created_before_the_first_start(
    redis: RedisServer, tmp_path: Path
) -> None:
    assert (await pomelo(tmp_path, "accounts", "create", "first", POMELO_STORE=redis.url)).status == 0
    assert "data/secret" in names(tmp_path)
    assert (await pomelo(tmp_path, "keys", "create", "first", POMELO_STORE=redis.url)).status == 0


async def test_a_server_that_is_refused_has_made_no_secret_and_moved_no_record(
    redis: RedisServer, tmp_path: Path
) -> None:
    async with another_machine(redis, tmp_path):
        before = names(tmp_path)
        for options in ((), ("--check",)):
            result = await pomelo(tmp_path, "serve", *options, POMELO_STORE=redis.url, **free_addresses())
            assert result.status == 1
            assert (
                "The server on web-2 has the same store and another root secret" in result.error + result.out
            )
            assert names(tmp_path) == before


async def test_a_rotated_secret_can_be_checked_beside_the_server_that_has_the_former_one(
    redis: RedisServer, tmp_path: Path
) -> None:
    rotated = {"POMELO_SECRET": "another root secret of one machine", "POMELO_SECRET_PREVIOUS": SECRET}
    (tmp_path / "data").mkdir(mode=0o700)
    (tmp_path / "data" / "test-key").touch(0o600)
    async with serve(tmp_path, POMELO_STORE=redis.url, POMELO_SECRET=SECRET):
        for data, status in (("data", 0), ("other", 1)):
            folder = {"POMELO_DATA": str(tmp_path / data)}
            result = await pomelo(
                tmp_path, "serve", "--check", POMELO_STORE=redis.url, **free_addresses(), **rotated, **folder
            )
            assert (result.status, "another root secret" in result.out) == (status, bool(status)), result.out
