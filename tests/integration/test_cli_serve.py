"""`pomelo serve` and `pomelo gateway` as processes: the first start, the end, and what is refused."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import stat

import aiohttp
import psutil
import pytest

from tests.integration.commands import addresses, pomelo, staying
from tests.ports import free_port

BODY = {
    "model": "gpt-4",
    "messages": [{"role": "user", "content": "[[words:40]] [[pace:0.05]]"}],
    "stream": True,
}


async def curl(line: str) -> dict:
    """What the printed line prints, run by a shell as it stands."""
    process = await asyncio.create_subprocess_shell(
        line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return json.loads(out)


async def test_the_first_start_makes_one_key_and_prints_a_line_that_works_and_later_ones_none(tmp_path):
    places = addresses()
    async with staying(tmp_path, "serve", **places) as server:
        assert places["POMELO_REST"] in await server.until("REST")
        line = await server.until("curl ")
        key_file = tmp_path / "data" / "test-key"
        key = key_file.read_text().strip()
        assert key.startswith("pml_test_")
        assert "".join(server.lines).count(key) == 2
        assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
        assert (await curl(line))["object"] == "task.completion"
        server.process.send_signal(signal.SIGTERM)
        assert await server.ends() == 0
    async with staying(tmp_path, "serve", **places) as server:
        line = await server.until("curl ")
        assert key not in "".join(server.lines)
        assert (await curl(line))["object"] == "task.completion"
    assert key_file.read_text().strip() == key
    assert len(json.loads((await pomelo(tmp_path, "keys", "list", "--json")).out)) == 1


async def test_serve_raises_its_limit_of_open_files_to_the_maximum(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(256, before[0] // 2), before[1]))
    try:
        async with staying(tmp_path, "serve", **addresses()) as server:
            await server.until("curl ")
            assert psutil.Process(server.process.pid).rlimit(psutil.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_settings_of_connections_reach_the_server(tmp_path):
    variables = addresses() | {"POMELO_MAX_CONNECTIONS": "8", "POMELO_IDLE_TIMEOUT": "1"}
    async with staying(tmp_path, "serve", **variables) as server:
        await server.until("curl ")
        key = (tmp_path / "data" / "test-key").read_text().strip()
        host, _, port = variables["POMELO_REST"].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            f"GET /api/v1/account HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        )
        async with asyncio.timeout(15):
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            silent = [await asyncio.open_connection(host, int(port)) for _ in range(9)]
            assert (await silent[0][0].read()).startswith(b"HTTP/1.1 503 ")
        for _, each in silent:
            each.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_running_tasks_end_and_takes_the_socket_away(tmp_path, number):
    places = addresses()
    async with staying(tmp_path, "serve", **places) as server, aiohttp.ClientSession() as session:
        await server.until("curl ")
        headers = {"Authorization": f"Bearer {(tmp_path / 'data' / 'test-key').read_text().strip()}"}
        url = f"http://{places['POMELO_REST']}/api/v1/task"
        async with session.post(url, json=BODY, headers=headers) as answer:
            await answer.content.readline()
            server.process.send_signal(number)
            await server.until("Ending")
            async with asyncio.timeout(1.5), session.get(f"http://{places['POMELO_REST']}/healthz") as health:
                while health.status == 200:  # the signal is a moment ahead
                    health = await session.get(health.url)
                assert (health.status, (await health.json())["error"]["code"]) == (503, "shutting_down")
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert await server.ends() == 0
        assert not (tmp_path / "data" / "admin.sock").exists()


async def test_a_second_signal_ends_at_once(tmp_path):
    places = addresses() | {"POMELO_GRACE": "600"}
    async with staying(tmp_path, "serve", **places) as server, aiohttp.ClientSession() as session:
        await server.until("curl ")
        headers = {"Authorization": f"Bearer {(tmp_path / 'data' / 'test-key').read_text().strip()}"}
        body = BODY | {"messages": [{"role": "user", "content": "[[stall]]"}]}
        async with session.post(
            f"http://{places['POMELO_REST']}/api/v1/task", json=body, headers=headers
        ) as answer:
            await answer.content.readline()
            server.process.send_signal(signal.SIGTERM)
            await server.until("Ending")
            server.process.send_signal(signal.SIGTERM)
            assert await server.ends() == -signal.SIGTERM
    # What it left behind, its socket among it, is in nobody's way.
    assert (await pomelo(tmp_path, "keys", "list")).status == 0
    async with staying(tmp_path, "serve", **places) as server:
        await server.until("curl ")


async def test_a_second_server_on_the_same_data_is_refused(tmp_path):
    async with staying(tmp_path, "serve", **addresses()) as server:
        await server.until("curl ")
        ended = await pomelo(tmp_path, "serve", **addresses())
        assert ended.status == 1
        assert f"used by another process (pid {server.process.pid})" in ended.error


@pytest.mark.parametrize("door", ["POMELO_REST", "POMELO_GRPC"])
async def test_an_address_that_is_taken_is_refused(tmp_path, door):
    async with staying(tmp_path, "serve", **(places := addresses())) as server:
        await server.until("curl ")
        ended = await pomelo(
            tmp_path, "serve", **addresses() | {door: places[door], "POMELO_DATA": str(tmp_path / "2")}
        )
        assert ended.status == 1
        assert f"{door}: {places[door]}: Address already in use" in ended.error
        assert "set another address" in ended.error
        assert ended.error.count("\n") == 1


async def test_another_secret_than_the_one_of_the_keys_is_refused(tmp_path):
    first = await pomelo(tmp_path, "keys", "create", POMELO_SECRET="a" * 40)
    assert first.status == 0
    for command in (("serve",), ("keys", "create")):
        ended = await pomelo(tmp_path, *command, POMELO_SECRET="b" * 40, **addresses())
        assert (ended.status, ended.out, ended.error.count("\n")) == (1, "", 1)
        assert "POMELO_SECRET is not the secret" in ended.error


@pytest.mark.parametrize(
    ("command", "variables", "says"),
    [
        (("serve",), {"POMELO_GPRC": "x"}, "Unknown variable POMELO_GPRC. Did you mean POMELO_GRPC?"),
        (("serve",), {"POMELO_REST": "0.0.0.0:8080"}, "without TLS"),
        (("gateway", "--target", "127.0.0.1:1"), {"POMELO_STORE": "mysql://127.0.0.1"}, "POMELO_STORE: "),
        (("gateway", "--target", "127.0.0.1:1"), {"POMELO_REST": ""}, "REST is off"),
        (("keys", "list"), {"POMELO_CONFIG": "none.toml"}, "none.toml: there is no such file"),
        (("run", "x"), {"POMELO_GRACE": "long"}, "POMELO_GRACE: "),
        (("serve",), {"POMELO_REST": "", "POMELO_GRPC": ""}, "POMELO_REST and POMELO_GRPC are both empty"),
    ],
)
async def test_a_wrong_setting_is_refused_in_one_line_by_every_command(tmp_path, command, variables, says):
    ended = await pomelo(tmp_path, *command, **variables)
    assert (ended.status, ended.out) == (1, "")
    assert says in ended.error
    assert ended.error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


async def test_a_config_file_is_read(tmp_path):
    (tmp_path / "mine.toml").write_text(f'rest = "127.0.0.1:{free_port()}"\ngrpc = ""\ndata = "kept"\n')
    variables = {"POMELO_DATA": ""}
    async with staying(tmp_path, "serve", "--config", "mine.toml", **variables) as server:
        assert await server.until("gRPC") == "gRPC  off"
        assert (await curl(await server.until("curl ")))["object"] == "task.completion"
        assert (tmp_path / "kept" / "pomelo.db").exists()


async def test_a_gateway_serves_rest_for_a_server_elsewhere(tmp_path):
    places = addresses()
    rest = f"127.0.0.1:{free_port()}"
    async with staying(tmp_path, "serve", **places) as server:
        await server.until("curl ")
        key = (tmp_path / "data" / "test-key").read_text().strip()
        target = places["POMELO_GRPC"]
        away = {"POMELO_REST": rest, "POMELO_DATA": str(tmp_path / "away")}
        async with (
            staying(tmp_path, "gateway", "--target", target, **away) as gateway,
            aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as session,
        ):
            assert rest in await gateway.until("REST")
            async with session.get(f"http://{rest}/api/v1/models") as answer:
                assert answer.status == 200
                assert len((await answer.json())["data"]) == 14
            gateway.process.send_signal(signal.SIGTERM)
            assert await gateway.ends() == 0
    assert not (tmp_path / "away").exists()
