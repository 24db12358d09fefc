"""`pomelo serve --workers`: processes that share addresses, limits and credits, and stop together."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing import Pipe
from pathlib import Path

import aiohttp
import psutil
import pytest

from pomelo.cli.workers import _Worker, stop_without_supervisor
from pomelo.settings import load
from tests.integration.commands import free_addresses, pomelo, start_command
from tests.redis_server import RedisServer
from tests.serving import Served, serve
from tests.tasks import text_body
from tests.waiting import cancel, until

TASK = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


def workers(served: Served) -> list[psutil.Process]:
    return [process for process in psutil.Process(served.pid).children() if is_worker(process)]


def is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # also one that has just died
        return False


async def ask(served: Served, count: int) -> list[aiohttp.ClientResponse]:
    """Runs tasks concurrently, each on its own connection; returns the answers."""

    async def one() -> aiohttp.ClientResponse:
        async with (
            aiohttp.ClientSession(headers=served.headers) as session,
            session.post(f"{served.url}/api/v1/task", json=TASK) as answer,
        ):
            await answer.read()
            return answer

    return await asyncio.gather(*[one() for _ in range(count)])


async def test_workers_share_limits_and_credits_and_a_dead_one_is_restarted(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with serve(tmp_path, POMELO_STORE=redis.url, POMELO_WORKERS="2") as served:
            first = workers(served)
            assert len(first) == 2
            answers = [answer for _ in range(3) for answer in await ask(served, 18)]
            assert {answer.status for answer in answers} == {200}
            left = sorted(int(answer.headers["X-RateLimit-Remaining"]) for answer in answers)
            assert left[0] == 300 - len(answers)
            first[0].send_signal(signal.SIGKILL)
            async with asyncio.timeout(30):
                while first[0].is_running() or len(workers(served)) < 2:  # noqa: ASYNC110 (processes have no event)
                    await asyncio.sleep(0.05)
            assert [answer.status for answer in await ask(served, 5)] == [200] * 5
            store = {"POMELO_STORE": redis.url}
            audited = await pomelo(tmp_path, "audit", "--json", **store)
            assert audited.status == 0, audited.out
            usage = json.loads((await pomelo(tmp_path, "usage", "--format", "json", **store)).out)
            assert len(usage) == len(answers) + 5
            last = [p.pid for p in workers(served)]
        assert not [pid for pid in last if psutil.pid_exists(pid)]
        assert "died with status -9" in served.log()


async def test_no_file_of_the_current_folder_replaces_a_module_of_a_worker(tmp_path: Path) -> None:
    (tmp_path / "socket.py").write_text("raise SystemExit")
    with RedisServer() as redis:
        async with serve(tmp_path, POMELO_STORE=redis.url, POMELO_WORKERS="2") as served:
            assert [answer.status for answer in await ask(served, 1)] == [200]


async def test_a_worker_that_is_restarted_reloads_after_a_sighup_during_its_start(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with serve(tmp_path, POMELO_STORE=redis.url, POMELO_WORKERS="2") as served:
            before = {worker.pid for worker in workers(served)}
            os.kill(min(before), signal.SIGKILL)
            new: set[int] = set()
            async with asyncio.timeout(30):
                while not new:
                    await asyncio.sleep(0.001)
                    new = {worker.pid for worker in workers(served)} - before
            os.kill(new.pop(), signal.SIGHUP)
            await until(lambda: "was reloaded: nothing has changed" in served.log())
            assert served.log().count("died with status") == 1


async def test_a_worker_that_is_restarted_slowly_reloads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with RedisServer() as redis:
        variables = {"POMELO_STORE": redis.url, "POMELO_DATA": str(tmp_path), "POMELO_REST": "127.0.0.1:0"}
        read = partial(load, None, variables | {"POMELO_GRPC": "", "POMELO_ADMIN": ""})
        worker = _Worker(read(), read, 0)
        try:
            await worker.start()
            monkeypatch.setattr("pomelo.cli.workers.START_TIMEOUT", 0.05)  # no process starts in this time
            monkeypatch.setattr("pomelo.cli.workers.RESTART_DELAY", 0.0)
            keeping = asyncio.create_task(worker.keep_running())
            worker._process.kill()
            await until(lambda: "worker 0 does not serve yet" in caplog.text)
            await until(lambda: worker._serves)
            log = ""

            def was_reloaded() -> bool:
                nonlocal log
                log += "".join(capfd.readouterr())
                return "was reloaded" in log

            assert not was_reloaded()
            worker.reload(read())
            await until(was_reloaded)
            await cancel(keeping)
        finally:
            await worker.end(20.0)


async def test_workers_stop_when_their_parent_is_killed(tmp_path: Path) -> None:
    with RedisServer() as redis:
        async with serve(tmp_path, POMELO_STORE=redis.url, POMELO_WORKERS="2", POMELO_GRACE="1") as served:
            orphans = workers(served)
            os.kill(served.pid, signal.SIGKILL)
            await asyncio.to_thread(psutil.wait_procs, orphans, 20)
            assert not [p for p in orphans if p.is_running()]


@asynccontextmanager
async def streaming(
    folder: Path, http: aiohttp.ClientSession, prompt: str
) -> AsyncIterator[tuple[Served, aiohttp.ClientResponse]]:
    """Serves with two workers. One of them runs a stream, whose first line has arrived."""
    with RedisServer() as redis:
        variables = {"POMELO_STORE": redis.url, "POMELO_WORKERS": "2", "POMELO_GRACE": "600"}
        async with serve(folder, **variables) as served:
            body = text_body(prompt, stream=True)
            async with http.post(f"{served.url}/api/v1/task", json=body, headers=served.headers) as answer:
                await answer.content.readline()
                yield served, answer


async def test_a_second_signal_ends_the_workers_immediately(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with streaming(tmp_path, http, "[[stall]]") as (served, _):
        os.kill(served.pid, signal.SIGTERM)
        await until(lambda: len(workers(served)) == 1)  # the other one has no task
        (busy,) = workers(served)
        async with http.get(f"{served.url}/healthz") as health:
            assert health.status == 503
        os.kill(served.pid, signal.SIGTERM)
        _, running = await asyncio.to_thread(psutil.wait_procs, [busy], 20)
        assert running == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_during_the_start_ends_all_processes(tmp_path: Path, number: signal.Signals) -> None:
    with RedisServer() as redis:
        variables = free_addresses() | {"POMELO_STORE": redis.url, "POMELO_WORKERS": "3"}
        async with start_command(tmp_path, "serve", **variables) as server:
            supervisor = psutil.Process(server.process.pid)
            await until(lambda: any(map(is_worker, supervisor.children())))
            (worker,) = filter(is_worker, supervisor.children())
            server.process.send_signal(number)
            worker.send_signal(number)
            assert await server.wait() == 0
        printed = "".join(server.lines)
        assert "Ending: " in printed
        assert "Traceback" not in printed
        assert variables["POMELO_REST"] not in printed, "it has served"


async def test_a_signal_to_all_processes_lets_running_tasks_finish(
    tmp_path: Path, http: aiohttp.ClientSession
) -> None:
    async with streaming(tmp_path, http, "[[words:100]] [[pace:0.1]]") as (served, answer):
        for worker in workers(served):
            worker.terminate()
        await until(lambda: len(workers(served)) == 1)  # the other one has no task
        async with asyncio.timeout(20):
            while (await http.get(f"{served.url}/healthz")).status == 200:
                pass  # the signal may not have been handled yet
        os.kill(served.pid, signal.SIGTERM)
        assert (await answer.text()).endswith("data: [DONE]\n\n")


async def test_a_worker_whose_supervisor_is_gone_does_not_spin_while_it_drains() -> None:
    class CountedEvent(asyncio.Event):
        count = 0

        def set(self) -> None:
            self.count += 1
            super().set()

    of_supervisor, of_worker = Pipe()
    with of_worker:
        stop = CountedEvent()
        stop_without_supervisor(of_worker, stop)
        of_supervisor.close()
        async with asyncio.timeout(20):
            await stop.wait()
        for _ in range(5):
            await asyncio.sleep(0.001)
        assert stop.count == 1


async def test_workers_with_sqlite_are_refused_with_the_reason(tmp_path: Path) -> None:
    ended = await pomelo(tmp_path, "serve", "--workers", "2", **free_addresses())
    assert ended.status == 1
    assert ended.error == (
        "pomelo: POMELO_WORKERS: SQLite serves one process. For more set POMELO_STORE to a Redis server, "
        "such as redis://127.0.0.1:6379\n"
    )


@pytest.mark.parametrize("name", ["POMELO_REST", "POMELO_GRPC"])
async def test_workers_do_not_share_an_address_with_another_program(tmp_path: Path, name: str) -> None:
    with RedisServer() as redis:
        async with serve(tmp_path) as other:
            folder = tmp_path / "mine"
            folder.mkdir()
            port = other.port if name == "POMELO_REST" else other.grpc_port
            variables = free_addresses() | {
                name: f"127.0.0.1:{port}",
                "POMELO_STORE": redis.url,
                "POMELO_WORKERS": "2",
            }
            ended = await pomelo(folder, "serve", **variables)
    assert ended.status == 1
    assert ended.error.startswith(f"pomelo: {name}: 127.0.0.1:{port}: ")
