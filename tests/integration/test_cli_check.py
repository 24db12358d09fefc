"""`pomelo serve --check`: it says whether the server could start, and changes nothing."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests import s3_server
from tests.certificates import make_certificate, make_expired
from tests.integration.commands import (
    create_data,
    environment,
    free_addresses,
    names,
    pomelo,
    start_server,
)
from tests.ports import free_port
from tests.redis_server import RedisServer, any_server

OTLP = "OTEL_EXPORTER_OTLP_ENDPOINT"
SERVERS = {"POMELO_REST": "REST", "POMELO_GRPC": "gRPC", "POMELO_ADMIN": "admin"}
"""The findings of addresses."""


async def check(folder: Path, **variables: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Returns the exit status, and the findings: name -> state and detail. Asserts that nothing was changed."""
    before = names(folder)
    result = await pomelo(folder, "serve", "--check", **variables)
    assert result.error == ""
    assert names(folder) == before
    rows = [line.split(None, 2) for line in result.out.splitlines()]
    return result.status, {name: (state, detail) for state, name, detail in rows}


async def test_an_empty_folder_can_be_started_in(tmp_path: Path) -> None:
    status, found = await check(tmp_path, **free_addresses())
    assert status == 0
    assert {name: state for name, (state, _) in found.items()} == {
        "settings": "ok",
        "data": "off",
        "configuration": "ok",
        "TLS": "off",
        "store": "off",
        "REST": "ok",
        "gRPC": "ok",
        "admin": "off",
    }
    assert names(tmp_path) == []


async def test_a_running_server_passes_and_its_addresses_are_taken_for_others(tmp_path: Path) -> None:
    addresses = free_addresses() | {"POMELO_ADMIN": f"127.0.0.1:{free_port()}"}
    async with start_server(tmp_path, **addresses):
        status, found = await check(tmp_path, **addresses)
        assert status == 0
        assert found["store"] == ("ok", "SQLite, used by the running server")
        for name in SERVERS.values():
            assert "is in use; a server of this data folder runs" in found[name][1]
        for variable, name in SERVERS.items():
            used = free_addresses() | {variable: addresses[variable]}
            status, found = await check(tmp_path, **used, POMELO_DATA=str(tmp_path / "other"))
            assert (status, found[name][0]) == (1, "broken")
            assert "Address already in use" in found[name][1]
        with socket.create_server(("127.0.0.1", 0)) as other_program:
            address = f"127.0.0.1:{other_program.getsockname()[1]}"
            for variable, name in SERVERS.items():
                status, found = await check(tmp_path, **addresses | {variable: address})
                assert (status, found[name][0]) == (1, "broken")
                assert f"{variable}: {address}: Address already in use" in found[name][1]
        moved = addresses | {"POMELO_REST": addresses["POMELO_GRPC"], "POMELO_GRPC": addresses["POMELO_REST"]}
        assert (await check(tmp_path, **moved))[0] == 0, "the running server leaves both"
    status, found = await check(tmp_path, **addresses)
    assert (status, found["store"]) == (0, ("ok", "SQLite"))


@pytest.mark.parametrize(
    ("variables", "name", "message"),
    [
        ({"POMELO_GPRC": "x"}, "settings", "Did you mean POMELO_GRPC?"),
        ({"POMELO_REST": "", "POMELO_GRPC": ""}, "settings", "nothing to serve"),
        ({"POMELO_CONFIG": "plans.toml"}, "configuration", "there is no model gtp-4"),
        ({"POMELO_CATALOG": "catalog.toml"}, "configuration", "catalog.toml"),
        ({"POMELO_STORE": "redis://127.0.0.1:1"}, "store", "can't be reached"),
        ({"POMELO_DATA": "plans.toml/data"}, "data", "can't be created"),
        ({"POMELO_DATA": "d" * 110}, "data", "Too long for a socket"),
        (
            {"POMELO_MEDIA": "gs://bucket", "GOOGLE_APPLICATION_CREDENTIALS": "/no"},
            "bucket",
            "/no: No such file",
        ),
        ({OTLP: "http://127.0.0.1:9", "OTEL_BSP_SCHEDULE_DELAY": "-5"}, "traces", "must be positive"),
        (
            {OTLP: "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=a,hunter2"},
            "traces",
            "the headers in OTEL_EXPORTER_OTLP_HEADERS must be NAME=VALUE",
        ),
    ],
)
async def test_what_would_stop_the_start_is_broken(
    tmp_path: Path, variables: dict[str, str], name: str, message: str
) -> None:
    (tmp_path / "plans.toml").write_text('[plans.team]\nmodels = ["gtp-4"]\n')
    (tmp_path / "catalog.toml").write_text('[models.x]\ntype = "poem"\n')
    status, found = await check(tmp_path, **(free_addresses() | variables))
    assert (status, found[name][0]) == (1, "broken")
    assert message in found[name][1]
    refused = await pomelo(tmp_path, "serve", **(free_addresses() | variables))
    assert refused.status == 1
    assert "hunter2" not in refused.error


async def test_two_servers_at_one_address_are_broken(tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    same = free_addresses() | {"POMELO_REST": address, "POMELO_GRPC": address}
    status, found = await check(tmp_path, **same)
    message = f"POMELO_REST and POMELO_GRPC are both {address}. Set one of them to another address"
    assert (status, found["settings"]) == (1, ("broken", message))
    # Workers share their addresses with each other, so the system would not refuse it.
    redis = {"POMELO_STORE": "redis://127.0.0.1:1"}
    for options, store in (((), {}), (("--workers", "2"), redis)):
        assert (await pomelo(tmp_path, "serve", *options, **same, **store)).error == f"pomelo: {message}\n"
    overlapping = free_addresses() | {"POMELO_REST": address, "POMELO_ADMIN": f"localhost:{port}"}
    status, found = await check(tmp_path, **overlapping)
    message = f"POMELO_ADMIN: localhost:{port}: Address already in use"
    assert (status, found["REST"][0], found["admin"][0]) == (1, "ok", "broken")
    assert message in found["admin"][1]
    assert message in (await pomelo(tmp_path, "serve", **overlapping)).error


async def test_a_bucket_and_a_collector_that_can_be_used_are_ok(tmp_path: Path) -> None:
    server, bucket = s3_server.any_server(), "s3://checked/prefix"
    server.create_bucket(bucket)
    variables = {"POMELO_MEDIA": bucket, OTLP: "http://127.0.0.1:9", **server.variables}
    status, found = await check(tmp_path, **free_addresses(), **variables)
    assert (status, found["bucket"][0], found["traces"][0]) == (0, "ok", "ok")


def test_traces_without_their_extra_are_refused_and_name_the_command_that_installs_it(tmp_path: Path) -> None:
    program = "import sys; sys.modules['opentelemetry'] = None; from pomelo.cli import main; main()"
    message = f"{OTLP}: traces need another package: pip install 'pomelo-tasks[otel]'"
    for options, out, error in (
        ((), "", f"pomelo: {message}\n"),
        (("--check",), message, ""),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", program, "serve", *options],
            env=environment(tmp_path, **free_addresses(), **{OTLP: "http://127.0.0.1:9"}),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (ran.returncode, ran.stderr) == (1, error)
        assert out in ran.stdout


@pytest.mark.parametrize("variable", SERVERS)
async def test_an_address_of_every_family_is_in_use_if_it_is_in_one(tmp_path: Path, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other_program:
        address = f"[::]:{other_program.getsockname()[1]}"
        variables = free_addresses() | {variable: address, "POMELO_INSECURE": "1"}
        status, found = await check(tmp_path, **variables)
        message = f"{variable}: {address}: Address already in use"
        assert (status, found[SERVERS[variable]][0]) == (1, "broken")
        assert message in found[SERVERS[variable]][1]
        started = await pomelo(tmp_path, "serve", **variables)
        assert (started.status, started.error.count("\n")) == (1, 1)
        assert message in started.error


async def test_a_data_folder_that_the_start_closes_is_a_warning(tmp_path: Path) -> None:
    data, addresses = tmp_path / "data", free_addresses()
    data.mkdir(mode=0o755)
    status, found = await check(tmp_path, **addresses)
    assert (status, found["data"][0]) == (0, "warning")
    async with start_server(tmp_path, **addresses):
        pass
    (data / "pomelo.db").chmod(0o644)
    status, found = await check(tmp_path, **addresses)
    assert (status, found["data"][0]) == (0, "warning")
    assert f"chmod 600 {data / 'pomelo.db'}" in found["data"][1]
    async with start_server(tmp_path, **addresses):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
async def test_a_data_folder_of_another_user_can_not_be_started_in(tmp_path: Path) -> None:
    await create_data(tmp_path)
    os.chown(tmp_path / "data", 12345, -1)
    status, found = await check(tmp_path, **free_addresses())
    assert (status, found["data"][0]) == (1, "broken")
    assert "belongs to another user (uid 12345)" in found["data"][1]


async def test_another_secret_and_a_newer_database_are_broken(tmp_path: Path) -> None:
    await create_data(tmp_path)
    assert (await pomelo(tmp_path, "keys", "create")).status == 0
    addresses = free_addresses()
    _, found = await check(tmp_path, **addresses, POMELO_SECRET="b" * 40)
    assert found["data"][0] == "broken"
    assert "POMELO_SECRET is not the secret" in found["data"][1]
    old = (tmp_path / "data" / "secret").read_text().strip()
    rotated = {"POMELO_SECRET": "b" * 40, "POMELO_SECRET_PREVIOUS": old}
    assert (await check(tmp_path, **addresses, **rotated))[0] == 0
    with closing(sqlite3.connect(tmp_path / "data" / "pomelo.db")) as database, database:
        database.execute("INSERT INTO migrations VALUES (999, 0.0)")
    status, found = await check(tmp_path, **addresses)
    assert (status, found["store"][0]) == (1, "broken")
    assert "written by a newer Pomelo" in found["store"][1]


async def test_a_redis_server_is_checked_and_not_written_to(tmp_path: Path) -> None:
    with RedisServer() as redis:
        status, found = await check(tmp_path, **free_addresses(), POMELO_STORE=redis.url)
        assert (status, found["store"]) == (0, ("ok", "redis"))
        assert redis.do("DBSIZE") == 0
        archive = "postgresql://user:hidden@127.0.0.1:1/usage"
        status, found = await check(
            tmp_path, **free_addresses(), POMELO_STORE=redis.url, POMELO_ARCHIVE=archive
        )
        assert (status, found["store"][0]) == (1, "broken")
        assert "correct POMELO_ARCHIVE" in found["store"][1]
        assert "hidden" not in found["store"][1]
        archive = f"sqlite:{tmp_path}"
        status, found = await check(
            tmp_path, **free_addresses(), POMELO_STORE=redis.url, POMELO_ARCHIVE=archive
        )
        assert (status, found["store"][0]) == (1, "broken")
        assert f"The archive {tmp_path} can't be used" in found["store"][1]
    _, found = await check(tmp_path, **free_addresses(), POMELO_STORE=any_server())
    assert "Set appendonly yes" in found["store"][1]


async def test_certificates_are_checked_with_their_key_and_dates(tmp_path: Path) -> None:
    for name in ("here", "other"):
        make_certificate(tmp_path, name, "localhost")
    make_expired(tmp_path, "other")
    for cert, key, state, message in (
        ("here.pem", "here.key", "warning", "here.pem is valid until 20"),
        ("here.pem", "other.key", "broken", "other.key is not the key of"),
        ("expired.pem", "other.key", "broken", "certificate has expired"),
        ("here.key", "here.key", "broken", "no certificate and key in PEM"),
    ):
        status, found = await check(tmp_path, **free_addresses(), POMELO_TLS_CERT=cert, POMELO_TLS_KEY=key)
        finding = found.get("TLS") or found["configuration"]
        assert (status, finding[0]) == (int(state == "broken"), state)
        assert message in finding[1]
