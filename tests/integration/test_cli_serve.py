"""`pomelo serve` and `pomelo gateway` as processes: the first start, the end, and refused settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psutil
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests.calls import bearer
from tests.integration.commands import (
    INTERPRETER,
    assert_refused,
    create_data,
    development_key,
    environment,
    free_addresses,
    names,
    pomelo,
    pomelo_json,
    start_command,
    start_interpreter,
    start_program,
    start_server,
)
from tests.ports import free_port
from tests.tasks import text_body, text_task


async def curl(line: str) -> Any:
    """Returns the JSON that the printed command prints in a shell."""
    process = await asyncio.create_subprocess_shell(line, stdout=PIPE, stderr=DEVNULL)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)


async def test_the_first_start_creates_a_key_and_prints_a_working_command_and_later_starts_create_none(
    tmp_path: Path,
) -> None:
    addresses = free_addresses()
    async with start_interpreter(tmp_path, "serve", **addresses) as server:
        assert addresses["POMELO_REST"] in await server.read_until("REST")
        line = await server.read_until("curl ")
        key_file = tmp_path / "data" / "test-key"
        key = key_file.read_text().strip()
        assert key.startswith("pml_test_")
        assert "".join(server.lines).count(key) == 2
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        assert (await curl(line))["object"] == "task.completion"
        server.process.send_signal(signal.SIGTERM)
        assert await server.wait() == 0
    async with start_interpreter(tmp_path, "serve", **addresses) as server:
        line = await server.read_until("curl ")
        assert key not in "".join(server.lines)
        assert (await curl(line))["object"] == "task.completion"
    assert key_file.read_text().strip() == key
    assert len(await pomelo_json(tmp_path, "keys", "list")) == 1


async def test_serve_raises_its_limit_of_open_files_to_the_maximum(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(256, before[0] // 2), before[1]))
    try:
        async with start_interpreter(tmp_path, "serve", **free_addresses()) as server:
            await server.read_until("curl ")
            assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_settings_of_connections_reach_the_server(tmp_path: Path) -> None:
    variables = free_addresses() | {"POMELO_MAX_CONNECTIONS": "8", "POMELO_IDLE_TIMEOUT": "1"}
    async with start_server(tmp_path, **variables):
        key = development_key(tmp_path)
        host, _, port = variables["POMELO_REST"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"GET /api/v1/account HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        )
        async with asyncio.timeout(20):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(9)]
            assert (await silent[0][0].read()).startswith(b"HTTP/1.1 503 ")
        for _, each in silent:
            each.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_running_tasks_finish_and_removes_the_socket(
    tmp_path: Path, http: aiohttp.ClientSession, number: signal.Signals
) -> None:
    addresses = free_addresses()
    async with start_interpreter(tmp_path, "serve", **addresses) as server:
        await server.read_until("curl ")
        headers = {"Authorization": f"Bearer {development_key(tmp_path)}"}
        url = f"http://{addresses['POMELO_REST']}"
        body = text_body("[[words:50]] [[pace:0.1]]", stream=True)
        async with http.post(f"{url}/api/v1/task", json=body, headers=headers) as answer:
            await answer.content.readline()
            server.process.send_signal(number)
            await server.read_until("Ending")
            async with asyncio.timeout(20):
                while (health := await http.get(f"{url}/healthz")).status == 200:
                    pass  # the signal may not have been handled yet
                assert (health.status, (await health.json())["error"]["code"]) == (503, "shutting_down")
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert await server.wait() == 0
        assert not (tmp_path / "data" / "admin.sock").exists()


async def test_calls_are_accepted_during_the_drain_delay_while_health_checks_fail(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    addresses = free_addresses() | {"POMELO_DRAIN_DELAY": "600"}
    async with start_server(tmp_path, **addresses) as server:
        headers = {"Authorization": f"Bearer {development_key(tmp_path)}"}
        url = f"http://{addresses['POMELO_REST']}"
        server.process.send_signal(signal.SIGTERM)
        await server.read_until("Ending")
        async with asyncio.timeout(20):
            while (health := await http.get(f"{url}/healthz")).status == 200:
                pass  # the signal may not have been handled yet
        assert (health.status, (await health.json())["error"]["code"]) == (503, "shutting_down")
        async with grpc.aio.insecure_channel(addresses["POMELO_GRPC"]) as channel:
            checked = await HealthStub(channel).Check(HealthCheckRequest())
            assert checked.status == HealthCheckResponse.NOT_SERVING
            request = RunTaskRequest(spec=text_task())
            key = development_key(tmp_path)
            assert (await TaskServiceStub(channel).RunTask(request, metadata=bearer(key))).result.id
        async with http.post(f"{url}/api/v1/task", json=text_body(), headers=headers) as answer:
            assert answer.status == 200
        server.process.send_signal(signal.SIGTERM)
        assert await server.wait() == -signal.SIGTERM


IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child")
"""Runs a program as the first process of a namespace, as that of a container is."""

NEEDS_ROOT = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*IN_A_CONTAINER, "true"]).returncode != 0,
    reason="needs root and its rights",
)


@pytest.mark.parametrize("runner", [(), pytest.param(IN_A_CONTAINER, marks=NEEDS_ROOT, id="in a container")])
async def test_a_second_signal_ends_the_server_immediately(
    tmp_path: Path, http: aiohttp.ClientSession, runner: tuple[str, ...]
) -> None:
    addresses = free_addresses() | {"POMELO_GRACE": "600"}
    async with start_program(tmp_path, *runner, *INTERPRETER, "serve", **addresses) as server:
        await server.read_until("curl ")
        process = psutil.Process(server.process.pid)
        (process,) = process.children() if runner else (process,)
        headers = {"Authorization": f"Bearer {development_key(tmp_path)}"}
        url = f"http://{addresses['POMELO_REST']}/api/v1/task"
        async with http.post(url, json=text_body("[[stall]]", stream=True), headers=headers) as answer:
            await answer.content.readline()
            process.terminate()
            await server.read_until("Ending")
            process.terminate()
            assert await server.wait() == (128 + signal.SIGTERM if runner else -signal.SIGTERM)
    # The files that it left, such as its socket, do not prevent another start.
    assert (await pomelo(tmp_path, "keys", "list")).status == 0
    async with start_server(tmp_path, **addresses):
        pass


async def is_healthy(http: aiohttp.ClientSession, address: str) -> bool:
    with contextlib.suppress(aiohttp.ClientConnectionError):
        async with http.get(f"http://{address}/healthz") as answer:
            return answer.status == 200
    return False


def open_full_pipe() -> tuple[int, int]:
    """Returns both ends of a pipe that nobody reads, as of a log service that waits for its disk."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    os.set_blocking(write, True)
    return read, write


@pytest.mark.parametrize("blocks", [False, True], ids=["full disk", "full pipe"])
async def test_a_greeting_that_can_not_be_written_does_not_stop_the_server(
    tmp_path: Path, http: aiohttp.ClientSession, blocks: bool
) -> None:
    addresses = free_addresses()
    unread, full = open_full_pipe() if blocks else (None, os.open("/dev/full", os.O_WRONLY))
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pomelo.cli", "serve"),
        cwd=tmp_path,
        env=environment(tmp_path, **addresses),
        stdout=full,
        stderr=DEVNULL,
    )
    os.close(full)
    try:
        async with asyncio.timeout(20):
            while not await is_healthy(http, addresses["POMELO_REST"]):
                assert server.returncode is None
                await asyncio.sleep(0.05)
            server.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
    finally:
        if unread is not None:
            os.close(unread)
        if server.returncode is None:
            server.kill()
            await server.wait()


async def test_a_second_server_on_the_same_data_is_refused(tmp_path: Path) -> None:
    async with start_server(tmp_path, **free_addresses()) as server:
        result = await pomelo(tmp_path, "serve", **free_addresses())
        assert result.status == 1
        assert f"used by another process (pid {server.process.pid})" in result.error


@pytest.mark.parametrize("variable", ["POMELO_REST", "POMELO_GRPC", "POMELO_ADMIN"])
async def test_an_address_in_use_is_refused(tmp_path: Path, variable: str) -> None:
    addresses = free_addresses() | {"POMELO_ADMIN": f"127.0.0.1:{free_port()}"}
    async with start_server(tmp_path, **addresses):
        own = free_addresses() | {variable: addresses[variable], "POMELO_DATA": str(tmp_path / "2")}
        result = await pomelo(tmp_path, "serve", **own)
        assert result.status == 1
        assert f"{variable}: {addresses[variable]}: Address already in use" in result.error
        assert "set another address" in result.error
        assert result.error.count("\n") == 1


async def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    result = await pomelo(tmp_path, "serve", POMELO_REST="nowhere.invalid:80", POMELO_INSECURE="1")
    assert_refused(result, "POMELO_REST: nowhere.invalid:80: ")
    assert "End the program" not in result.error


async def test_a_secret_other_than_that_of_the_keys_is_refused(tmp_path: Path) -> None:
    await create_data(tmp_path, secret="a" * 40)
    assert (await pomelo(tmp_path, "keys", "create", POMELO_SECRET="a" * 40)).status == 0
    for command in (("serve",), ("keys", "create")):
        result = await pomelo(tmp_path, *command, POMELO_SECRET="b" * 40, **free_addresses())
        assert_refused(result, "POMELO_SECRET is not the secret")


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        (("serve",), {"POMELO_GPRC": "x"}, "Unknown variable POMELO_GPRC. Did you mean POMELO_GRPC?"),
        (("serve",), {"POMELO_REST": "0.0.0.0:8080"}, "without TLS"),
        (("serve",), {"POMELO_ADMIN": "0.0.0.0:9090"}, "POMELO_ADMIN: 0.0.0.0:9090 shows metrics to other"),
        (("gateway", "--target", "127.0.0.1:1"), {"POMELO_STORE": "mysql://127.0.0.1"}, "POMELO_STORE: "),
        (("gateway", "--target", "127.0.0.1:1"), {"POMELO_REST": ""}, "REST is off"),
        (
            ("gateway", "--target", "127.0.0.1:1"),
            {"POMELO_REST": "127.0.0.1:8080", "POMELO_ADMIN": "127.0.0.1:8080"},
            "POMELO_REST and POMELO_ADMIN are both 127.0.0.1:8080",
        ),
        (("keys", "list"), {"POMELO_CONFIG": "none.toml"}, "none.toml: there is no such file"),
        (("keys", "list"), {"POMELO_CONFIG": "/dev/null"}, "/dev/null: this is not a regular file"),
        (("run", "x"), {"POMELO_GRACE": "long"}, "POMELO_GRACE: "),
        (("serve",), {"POMELO_REST": "", "POMELO_GRPC": ""}, "POMELO_REST and POMELO_GRPC are both empty"),
    ],
)
async def test_a_wrong_setting_is_refused_in_one_line_by_every_command(
    tmp_path: Path, command: tuple[str, ...], variables: dict[str, str], message: str
) -> None:
    assert_refused(await pomelo(tmp_path, *command, **variables), message)
    assert names(tmp_path) == []


async def test_a_config_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'rest = "127.0.0.1:{free_port()}"\ngrpc = ""\ndata = "kept"\n')
    variables = {"POMELO_DATA": ""}
    async with start_command(tmp_path, "serve", "--config", "mine.toml", **variables) as server:
        assert await server.read_until("gRPC") == "gRPC  off"
        assert (await curl(await server.read_until("curl ")))["object"] == "task.completion"
        assert (tmp_path / "kept" / "pomelo.db").exists()


async def test_a_gateway_serves_rest_for_a_remote_server(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    addresses, rest = free_addresses(), f"127.0.0.1:{free_port()}"
    options = ("--target", addresses["POMELO_GRPC"])
    settings = {"POMELO_REST": rest, "POMELO_DATA": str(tmp_path / "gateway")}
    async with (
        start_server(tmp_path, **addresses),
        start_command(tmp_path, "gateway", *options, **settings) as gateway,
    ):
        assert rest in await gateway.read_until("REST")
        headers = {"Authorization": f"Bearer {development_key(tmp_path)}"}
        async with http.get(f"http://{rest}/api/v1/models", headers=headers) as answer:
            assert answer.status == 200
            assert len((await answer.json())["data"]) == 14
        gateway.process.send_signal(signal.SIGTERM)
        assert await gateway.wait() == 0
    assert not (tmp_path / "gateway").exists()
