"""REST under attack: without a key, with a free key, and by many concurrent requests.

The server is `pomelo serve`; the attackers and the other callers are processes of their own. `make load` runs
the attacks at full size (1,300 unauthenticated connections, 3,000 concurrent requests), `make test` a fifth
of that. The time limits are for a busy machine: an idle one needs a tenth.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import aiohttp
import pytest

from pomelo.errors import TABLE
from tests.faults.other_callers import Callers, other_callers
from tests.integration.commands import pomelo
from tests.load.process_usage import MIB, peak_memory, resident
from tests.load.rest_attacks import head
from tests.serving import Served, serve_interpreter
from tests.tasks import text_body

CALLS = int(os.environ.get("LOAD_CALLS", "20"))
"""Connections of each attack; thirty times as many requests are sent concurrently."""

CALLS_WITH_KEY = max(8, CALLS // 4)
"""Connections of each attack with the free key, whose plan has 20 requests per minute."""

BODY = json.dumps(text_body("Hi")).encode()

pytestmark = pytest.mark.timeout(120)


@dataclass
class Report:
    """The measurements of the attacks and of the other callers."""

    unauthenticated: dict[str, Any]
    with_key: dict[str, Any]
    callers: Callers
    status_after_attack: int
    """The status of the next task with the free key."""
    growth: int
    """Bytes by which the server's memory grew."""


@pytest.fixture(scope="module", name="served")
async def _served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    async with serve_interpreter(tmp_path_factory.mktemp("attacked")) as process:
        yield process


async def attack(served: Served, *key: str) -> dict[str, Any]:
    """Runs the attacks to their end, and returns their report."""
    count = CALLS_WITH_KEY if key else CALLS
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.load.rest_attacks", served.host, str(served.port), str(count), *key),
        stdout=asyncio.subprocess.PIPE,
    )
    report: dict[str, Any] = json.loads((await process.communicate())[0])
    return report


async def run_task(served: Served, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{served.url}/api/v1/task", json=text_body("Hi")) as response,
    ):
        return response.status


@pytest.fixture(scope="module", name="report")
async def _report(served: Served) -> Report:
    """Makes both attacks concurrently, beside other callers with a valid key."""
    folder = served.data.parent
    assert (await pomelo(folder, "accounts", "create", "free", "--plan", "free")).status == 0
    free_key = (await pomelo(folder, "keys", "create", "free")).out.split()[-1]
    assert await run_task(served, served.key) == 200
    async with other_callers(served, "rest", "new_rest", "grpc") as callers:
        before = resident(served.pid)
        with peak_memory(served.pid) as peak:
            unauthenticated, with_key = await asyncio.gather(attack(served), attack(served, free_key))
        growth = peak.bytes - before
        status = await run_task(served, free_key)
    report = Report(unauthenticated, with_key, callers, status, growth)
    print_report(report)
    return report


def print_report(report: Report) -> None:
    lines = [
        f"{name}: {result}"
        for attacks in (report.unauthenticated, report.with_key)
        for name, result in attacks.items()
    ]
    for name, waits in report.callers.waits.items():
        lines.append(f"{name}: {len(waits)} calls, median {median(waits):.3f} s, longest {max(waits):.3f} s")
    print("", *lines, f"memory: {report.growth / MIB:+.0f} MiB", sep="\n")  # noqa: T201


def test_every_unauthenticated_connection_is_closed_within_ten_seconds_and_refused(report: Report) -> None:
    for name, result in report.unauthenticated.items():
        assert result["longest"] < 12.0, (name, result)  # 8 s, and some more on a busy machine
        assert set(result["statuses"]) <= {"400", "401", "404", "429", "503"}, (name, result)
    for name in ("slow_body", "tiny_chunks", "expecting", "preamble", "values"):
        assert set(report.unauthenticated[name]["statuses"]) <= {"401", "429", "503"}


def test_the_servers_memory_hardly_grows(report: Report) -> None:
    assert report.growth < 64 * MIB


def test_other_callers_are_never_refused_and_hardly_wait(report: Report) -> None:
    waits = report.callers.waits
    assert not report.callers.errors
    assert len(waits["rest"] + waits["new_rest"]) > 20
    assert len(waits["grpc"]) > 10
    assert max(waits["rest"] + waits["new_rest"]) < 3.0
    assert max(waits["grpc"]) < 3.0


def test_attacks_with_a_free_key_are_refused_soon_by_its_limits(report: Report) -> None:
    for name, result in report.with_key.items():
        assert result["longest"] < 15.0, (name, result)  # a body may take 10 s
        assert set(result["statuses"]) <= {"100", "400", "429", "503"}, (name, result)
    refusals = len(report.with_key) * CALLS_WITH_KEY  # each refused body counts as a request
    assert report.status_after_attack == (429 if refusals >= 20 else 200)


async def test_each_of_many_concurrent_requests_gets_a_documented_answer_and_health_answers(
    served: Served, report: Report
) -> None:
    request = head(served.key, len(BODY), Connection="close") + BODY

    async def send_request() -> str:
        reader, writer = await asyncio.open_connection(served.host, served.port)
        writer.write(request)
        answer = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        writer.close()
        return str(answer["error"]["code"]) if "error" in answer else "ok"

    async with other_callers(served, "rest_health") as callers:
        codes = Counter(await asyncio.gather(*[send_request() for _ in range(30 * CALLS)]))
    health = callers.all_waits
    print(f"\n{dict(codes)}, health: median {median(health):.3f} s, longest {max(health):.3f} s")  # noqa: T201
    assert not callers.errors
    assert sum(codes.values()) == 30 * CALLS
    assert codes.keys() <= TABLE.keys() | {"ok"}
    assert codes["ok"] > 0
    assert "Traceback" not in served.log()
    assert median(health) < 0.25
    assert max(health) < 2.5
