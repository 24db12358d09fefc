"""Level and form of the log, and a log that nobody reads."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import aiohttp
import pytest

from tests.calls import bearer
from tests.integration.commands import assert_refused, development_key, environment, free_addresses, pomelo
from tests.serving import Served, serve
from tests.tasks import text_body

REFUSED = 25


async def ask(served: Served, key: str | None = None) -> int:
    """Runs a task; returns the status."""
    headers = {"Authorization": f"Bearer {key or served.key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{served.url}/api/v1/task", json=text_body()) as answer,
    ):
        await answer.read()
        return answer.status


async def test_text_has_one_line_for_a_task(tmp_path: Path) -> None:
    async with serve(tmp_path, POMELO_LOG_FORMAT="text") as served:
        assert await ask(served) == 200
    (line,) = re.findall(r"^.* task .*$", served.log(), re.MULTILINE)
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 INFO +task +request_id=req_\w+ ", line)
    assert " provider=sandbox " in line


async def test_warning_leaves_out_tasks(tmp_path: Path) -> None:
    async with serve(tmp_path, POMELO_LOG_LEVEL="warning") as served:
        assert await ask(served) == 200
    assert '"event":"Ending: ' in served.log()
    assert '"event":"task"' not in served.log()


@pytest.mark.parametrize("name", ["POMELO_LOG_LEVEL", "POMELO_LOG_FORMAT"])
async def test_an_unknown_level_or_format_is_refused(tmp_path: Path, name: str) -> None:
    result = await pomelo(tmp_path, "serve", **free_addresses(), **{name: "loud"})
    assert_refused(result, f"{name}: must be ")


async def test_callers_without_a_key_can_cause_only_a_few_lines(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        assert {await ask(served, "nope") for _ in range(REFUSED)} <= {401, 429}
        assert await ask(served) == 200
    lines = [json.loads(line) for line in served.log().splitlines() if line.startswith("{")]
    refused = [line for line in lines if line["event"].startswith("refused: invalid_api_key")]
    *shown, last = refused
    assert len(shown) == 10
    assert "similar lines suppressed" in last["event"]
    assert [line["outcome"] for line in lines if line["event"] == "task"] == ["completed"]


@pytest.mark.timeout(300)
async def test_a_log_that_nobody_reads_delays_neither_requests_nor_the_end(tmp_path: Path) -> None:
    addresses = free_addresses()
    variables = environment(tmp_path, POMELO_LOG_LEVEL="debug", **addresses)
    url = f"http://{addresses['POMELO_REST']}"
    command = (sys.executable, "-m", "pomelo.cli", "serve")
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, env=variables, cwd=tmp_path) as process:  # noqa: ASYNC220
        assert process.stdout is not None
        while b"curl " not in (line := await asyncio.to_thread(process.stdout.readline)):
            assert line
        try:
            headers = dict(bearer(development_key(tmp_path)))
            async with aiohttp.ClientSession(headers=headers) as session:

                async def check() -> None:
                    async with asyncio.timeout(20), session.get(f"{url}/healthz") as answer:
                        assert answer.status == 200

                for _ in range(50):  # a line has about 170 bytes, and the pipe holds some 400
                    await asyncio.gather(*[check() for _ in range(20)])
                async with session.post(f"{url}/api/v1/task", json=text_body()) as answer:
                    assert answer.status == 200
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 30) == 0
        finally:
            process.kill()
