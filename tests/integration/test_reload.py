"""SIGHUP: the configuration of a running server is replaced as a whole or not at all."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import signal
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest

from pomelo.configuration.reload import merge
from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from pomelo.settings import Settings
from pomelo.stores.redis.processes import read_fleet
from pomelo.testing import Answer, FaultUpstream, Gate
from tests.calls import bearer
from tests.certificates import make_certificate
from tests.integration.commands import (
    RunningCommand,
    development_key,
    environment,
    free_addresses,
    live_key,
    pomelo_json,
    start_command,
    start_server,
)
from tests.integration.test_workers import workers
from tests.redis_server import RedisServer
from tests.serving import serve
from tests.tasks import text_body
from tests.waiting import until

MODEL = """
[models.mine]
type = "text"
limits = {{ max_input_tokens = 1000, max_output_tokens = 1000 }}
price = {{ million_input_tokens = "{price}", million_output_tokens = "{price}" }}
price_version = "2026-11-26"
routes = [{{ provider = "openai", model = "one" }}]
"""

TTS = """
[models.eleven-labs-tts]
type = "text_to_speech"
limits = { max_characters = 7_654_321 }
price = { thousand_characters = "0.08" }
price_version = "2026-11-22"
routes = [{ provider = "elevenlabs", model = "eleven_multilingual_v2" }]
"""


async def hang_up(server: RunningCommand) -> str:
    """Sends SIGHUP, and returns the line that says what became of it."""
    server.process.send_signal(signal.SIGHUP)
    return await server.read_until("The configuration was")


async def task(http: aiohttp.ClientSession, address: str, key: str, **fields: Any) -> aiohttp.ClientResponse:
    """Runs a text task, and returns the answer, whose body was read."""
    headers = {"Authorization": f"Bearer {key}"}
    async with http.post(
        f"http://{address}/api/v1/task", json=text_body(**fields), headers=headers
    ) as answer:
        await answer.read()
        return answer


async def test_a_running_task_keeps_its_model_and_provider_and_new_tasks_get_the_new_ones(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    addresses, gate = free_addresses(), Gate()
    rest = addresses["POMELO_REST"]
    config, catalog = tmp_path / "pomelo.toml", tmp_path / "catalog.toml"
    catalog.write_text(MODEL.format(price=1))
    async with FaultUpstream() as upstream:
        text = f'catalog = "catalog.toml"\nopenai_base_url = "{upstream.openai_base_url}"\n'
        config.write_text(f'{text}openai_api_key = "first"\n')
        upstream.when("slow", Answer("one two three", at={1: gate}))
        async with start_server(tmp_path, **addresses) as server:
            key = await live_key(tmp_path)
            slow = asyncio.create_task(task(http, rest, key, text="slow", model="mine", stream=True))
            await gate.reached.wait()
            catalog.write_text(MODEL.format(price=10).replace('"one"', '"other"'))
            config.write_text(f'{text}openai_api_key = "second"\n[plans.new]\nrequests_per_minute = 1\n')
            line = await hang_up(server)
            assert "plans added: new; models changed: mine; credentials changed: openai" in line
            assert (await task(http, rest, key, text="fast", model="mine")).status == 200
            gate.open()
            assert (await (await slow).text()).endswith("data: [DONE]\n\n")
            first, second = upstream.requests
            assert (first.headers["Authorization"], first.body["model"]) == ("Bearer first", "one")
            assert (second.headers["Authorization"], second.body["model"]) == ("Bearer second", "other")
            records = await pomelo_json(tmp_path, "usage")
            for record, price in zip(records, (1, 10), strict=True):  # the slow task has ended last
                tokens = record["input_tokens"] + record["output_tokens"]
                assert round(float(record["cost"]) * 10**6) == tokens * price
            assert "second" not in "".join(server.lines)


async def test_a_configuration_that_can_not_be_used_is_refused_as_a_whole_and_the_old_one_stays_in_use(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    addresses, config = free_addresses(), tmp_path / "pomelo.toml"
    config.write_text("[plans.pro]\nrequests_per_minute = 77\n")
    async with start_server(tmp_path, **addresses) as server:
        key = development_key(tmp_path)
        for text, reason in (
            ("[plans.pro]\nrequests_per_minute = 0\n", "plans.pro.requests_per_minute"),
            ('[plans.pro]\nmodels = ["gtp-4"]\n', "there is no model gtp-4"),
            ("[plans.pro\n", "pomelo.toml"),
            ('catalog = "none.toml"\n[plans.pro]\nrequests_per_minute = 5\n', "POMELO_CATALOG"),
            ('opnai_api_key = "x"\n', "Did you mean openai?"),
            (None, "pomelo.toml: there is no such file"),
        ):
            if text is None:
                config.unlink()
            else:
                config.write_text(text)
            line = await hang_up(server)
            assert "was not reloaded, and the previous one stays in use" in line
            assert reason in line
            answer = await task(http, addresses["POMELO_REST"], key)
            assert answer.headers["X-RateLimit-Limit"] == "77"
        config.write_text('grace = 5\nworkers = 2\nstore = "redis://127.0.0.1:1"\n')
        assert "plans changed: pro" in await hang_up(server)
        line = json.loads(await server.read_until("Restart to apply"))
        assert line["event"] == "Restart to apply POMELO_GRACE, POMELO_STORE, POMELO_WORKERS"
        answer = await task(http, addresses["POMELO_REST"], key)
        assert answer.headers["X-RateLimit-Limit"] == "300"
        assert "nothing has changed" in await hang_up(server)


async def test_all_workers_reload_also_one_that_is_restarted_and_a_wrong_file_stops_none(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    config = tmp_path / "pomelo.toml"
    config.write_text("[plans.pro]\nrequests_per_minute = 1000\n")

    async def limits(of: Any) -> set[str]:
        headers, found = {"Authorization": f"Bearer {of.key}"}, set()
        for _ in range(12):  # each on its own connection, which the kernel gives to any worker
            async with (
                aiohttp.ClientSession(headers=headers) as session,
                session.post(f"{of.url}/api/v1/task", json=text_body()) as answer,
            ):
                found.add(answer.headers["X-RateLimit-Limit"])
        return found

    with RedisServer() as redis:

        async def processes() -> set[tuple[float, str]]:
            """When each process has started, and what its plans are."""
            return {(one.started, one.facts["plans"]) for one in (await read_fleet(redis.url))[0]}

        async with serve(tmp_path, POMELO_STORE=redis.url, POMELO_WORKERS="2") as served:
            assert await limits(served) == {"1000"}
            before = await processes()
            config.write_text("[plans.pro]\nrequests_per_minute = 2000\n")
            os.kill(served.pid, signal.SIGHUP)
            await until(lambda: "was reloaded: plans changed: pro" in served.log())
            async with asyncio.timeout(20):
                while await limits(served) != {"2000"}:
                    pass  # the second worker reports only what it refuses
            async with asyncio.timeout(20):
                while not before.isdisjoint(after := await processes()):
                    pass
            assert {started for started, _ in after} == {started for started, _ in before}
            config.write_text("[plans.pro]\nrequests_per_minute = 0\n")
            os.kill(served.pid, signal.SIGHUP)
            await until(lambda: "was not reloaded" in served.log())
            first, _ = workers(served)
            first.kill()
            async with asyncio.timeout(30):
                while first.is_running() or len(workers(served)) < 2:  # noqa: ASYNC110 (processes have no event)
                    await asyncio.sleep(0.05)
            assert await limits(served) == {"2000"}
            assert served.log().count("was reloaded") == served.log().count("was not reloaded") == 1


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two certificates of 127.0.0.1 and their keys: `old` and `new`."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("old", "new"):
        make_certificate(folder, name, name, "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    return folder


def install(pair: Path, folder: Path) -> None:
    shutil.copy(pair.with_suffix(".pem"), folder / "cert.pem")
    shutil.copy(pair.with_suffix(".key"), folder / "cert.key")


async def presented(address: str) -> str:
    """Returns the name in the certificate that a server presents to a new connection."""
    host, _, port = address.rpartition(":")
    pem = await asyncio.to_thread(ssl.get_server_certificate, (host, int(port)))
    process = await asyncio.create_subprocess_exec(
        *("openssl", "x509", "-noout", "-subject"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate(pem.encode())
    return out.decode().strip().rpartition("CN")[2].strip(" =")


async def test_new_connections_get_the_new_certificate_and_open_ones_stay(
    tmp_path: Path, pairs: Path, http: aiohttp.ClientSession
) -> None:
    addresses = free_addresses()
    rest, grpc_address = addresses["POMELO_REST"], addresses["POMELO_GRPC"]
    install(pairs / "old", tmp_path)
    (tmp_path / "pomelo.toml").write_text('tls_cert = "cert.pem"\ntls_key = "cert.key"\n')
    trusted = (pairs / "old.pem").read_bytes()
    async with (
        start_server(tmp_path, **addresses) as server,
        grpc.aio.secure_channel(grpc_address, grpc.ssl_channel_credentials(trusted)) as channel,
    ):
        models, key = ModelServiceStub(channel), development_key(tmp_path)
        await models.ListModels(ListModelsRequest(), metadata=bearer(key))
        url = f"https://{rest}/api/v1/models"
        request: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {key}"},
            "ssl": ssl.create_default_context(cafile=pairs / "old.pem"),
        }
        async with http.get(url, **request) as answer:
            assert answer.status == 200
            await answer.read()
        assert [await presented(rest), await presented(grpc_address)] == ["old", "old"]
        shutil.copy(pairs / "new.pem", tmp_path / "cert.pem")
        assert "cert.key is not the key of" in await hang_up(server)
        assert [await presented(rest), await presented(grpc_address)] == ["old", "old"]
        install(pairs / "new", tmp_path)
        assert "TLS certificate changed" in await hang_up(server)
        assert [await presented(rest), await presented(grpc_address)] == ["new", "new"]
        # These connections would not be trusted any more if they were new.
        await models.ListModels(ListModelsRequest(), metadata=bearer(key))
        async with http.get(url, **request) as answer:
            assert answer.status == 200


async def test_a_gateway_reads_its_certificate_again_and_refuses_one_that_does_not_fit(
    tmp_path: Path, pairs: Path
) -> None:
    rest = free_addresses()["POMELO_REST"]
    install(pairs / "old", tmp_path)
    (tmp_path / "pomelo.toml").write_text('tls_cert = "cert.pem"\ntls_key = "cert.key"\n')
    target = ("--target", "127.0.0.1:1", "--no-tls")
    async with start_command(tmp_path, "gateway", *target, POMELO_REST=rest) as gateway:
        await gateway.read_until("admin")
        assert await presented(rest) == "old"
        shutil.copy(pairs / "new.pem", tmp_path / "cert.pem")
        assert "cert.key is not the key of" in await hang_up(gateway)
        assert await presented(rest) == "old"
        install(pairs / "new", tmp_path)
        (tmp_path / "pomelo.toml").write_text('tls_cert = "cert.pem"\ntls_key = "cert.key"\ngrace = 5\n')
        assert "TLS certificate changed" in await hang_up(gateway)
        await gateway.read_until("Restart to apply POMELO_GRACE")
        assert await presented(rest) == "new"
        (tmp_path / "pomelo.toml").write_text('tls_cert = "nowhere.pem"\ntls_key = "cert.key"\n')
        assert "POMELO_TLS_CERT: is not a file" in await hang_up(gateway)
        assert await presented(rest) == "new"
        (tmp_path / "pomelo.toml").unlink()
        assert "pomelo.toml: there is no such file" in await hang_up(gateway)


async def test_a_gateway_reads_its_catalogue_again(tmp_path: Path, http: aiohttp.ClientSession) -> None:
    rest, catalog = free_addresses()["POMELO_REST"], tmp_path / "catalog.toml"
    catalog.write_text("")
    (tmp_path / "pomelo.toml").write_text('catalog = "catalog.toml"\n')

    async def longest_text() -> int:
        async with http.get(f"http://{rest}/openapi.json") as answer:
            described = json.dumps((await answer.json())["components"])
        return max(int(found) for found in re.findall(r'"maxLength": (\d+)', described))

    async with start_command(tmp_path, "gateway", "--target", "127.0.0.1:1", POMELO_REST=rest) as gateway:
        await gateway.read_until("admin")
        catalog.write_text(TTS)
        assert "models changed: eleven-labs-tts" in await hang_up(gateway)
        assert await longest_text() == 7_654_321
        catalog.write_text("[models]\nmine = 1\n")
        assert "catalog.toml" in await hang_up(gateway)
        assert await longest_text() == 7_654_321


def test_tls_is_not_turned_on_or_off_and_free_ports_are_no_change(tmp_path: Path, pairs: Path) -> None:
    files: dict[str, Any] = {"tls_cert": pairs / "old.pem", "tls_key": pairs / "old.key"}
    plain = Settings(rest="127.0.0.1:1", grpc="127.0.0.1:2")
    merged, fixed = merge(plain, Settings(rest="127.0.0.1:0", grpc="127.0.0.1:3", grace=9.0, **files))
    assert fixed == ["POMELO_GRACE", "POMELO_GRPC", "POMELO_TLS_CERT", "POMELO_TLS_KEY"]
    assert merged == plain
    secure = Settings(**files)
    asking = Settings(**files, tls_client_ca=pairs / "new.pem")
    assert merge(secure, asking) == (secure, ["POMELO_TLS_CLIENT_CA"])
    renewed = Settings(tls_cert=pairs / "new.pem", tls_key=pairs / "new.key")
    assert merge(secure, renewed) == (renewed, [])


async def test_a_server_ends_when_its_terminal_is_closed(tmp_path: Path) -> None:
    terminal, end = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pomelo.cli", "serve"),
        cwd=tmp_path,
        env=environment(tmp_path, **free_addresses()),
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    try:
        async with asyncio.timeout(30):
            printed = b""
            while b"curl " not in printed:
                printed += await asyncio.to_thread(os.read, terminal, 4096)
            os.close(terminal)
            process.send_signal(signal.SIGHUP)
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_sighup_while_the_server_starts_reloads_it_when_it_serves(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret"
    data.mkdir(mode=0o700)
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    os.mkfifo(data / "secret", 0o600)  # the start waits here until it is written to
    async with start_command(tmp_path, "serve", **free_addresses()) as server:
        with await asyncio.to_thread((data / "secret").open, "w") as pipe:
            server.process.send_signal(signal.SIGHUP)
            secret.replace(data / "secret")
            pipe.write("s" * 40)
        await server.read_until("The configuration was reloaded: nothing has changed")


async def test_sighup_while_the_server_drains_does_not_end_it(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    addresses = free_addresses()
    async with start_command(tmp_path, "serve", **addresses) as server:
        await server.read_until("curl ")
        key = development_key(tmp_path)
        url, headers = f"http://{addresses['POMELO_REST']}/api/v1/task", {"Authorization": f"Bearer {key}"}
        body = text_body("[[words:40]] [[pace:0.05]]", stream=True)
        async with http.post(url, json=body, headers=headers) as answer:
            await answer.content.readline()
            server.process.send_signal(signal.SIGTERM)
            await server.read_until("Ending")
            server.process.send_signal(signal.SIGHUP)
            assert (await answer.text()).endswith("data: [DONE]\n\n")
        assert await server.wait() == 0


async def test_sighup_ends_the_process_at_no_moment_of_a_drain() -> None:
    program = """
import asyncio, os, signal, subprocess
from functools import partial
from pomelo.cli.process import on_hangup

# CPython can deadlock when it reports that a flood of signals fills this buffer.
signal.set_wakeup_fd = partial(signal.set_wakeup_fd, warn_on_full_buffer=False)

async def main():
    async def reload():
        pass

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sender = subprocess.Popen(["bash", "-c", f"while kill -HUP {os.getpid()}; do :; done"])
    for _ in range(2000):
        async with on_hangup(reload, asyncio.Event()):
            await asyncio.sleep(0)
    sender.kill()
    sender.wait()

asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, start_new_session=True)
    try:
        async with asyncio.timeout(60):
            assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):  # else a test that fails would leave the sender behind
            os.killpg(process.pid, signal.SIGKILL)
