"""A full disk and a killed process: nothing that was acknowledged is lost, and nothing is half done.

Each store runs in its own process, which is killed or whose files may not grow beyond a limit.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pomelo.stores.accounts import Wallet
from pomelo.stores.sqlite import open_sqlite
from pomelo.stores.usage import UsageQuery
from tests.limits import limits

WALLET = Wallet("default", False)

PROGRAM = """
import asyncio, json, resource, signal, sys
from pathlib import Path
from pomelo.errors import PomeloError
from pomelo.stores.accounts import Wallet
from pomelo.stores.ledger import Counter, ReserveRequest, Settlement
from pomelo.stores.usage import UsageQuery, UsageRecord
from pomelo.stores.sqlite import open_sqlite

WALLET = Wallet("default", False)

def record(task, **changes):
    return UsageRecord(task, "r" * 400, "default", False, "k", "rest", "gpt-4", "text", **changes)

def counters(tokens):
    return (Counter("requests", window=60.0), Counter("concurrency"), Counter("tokens:gpt-4", tokens, None, 60.0))

def report(**values):
    print(json.dumps(values), flush=True)

async def run_task(store, task):
    try:
        await store.reserve(ReserveRequest(record(task), 1, 10, counters(5)))
        await store.settle(Settlement(record(task, cost=3), counters(4)))
    except PomeloError as error:
        return error.code
    report(kept=task)
    return None

async def fill(store):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
    codes, number = [], 0
    while len(codes) < 5:
        tasks = [run_task(store, f"full-{number + n}") for n in range(20)]
        codes += [code for code in await asyncio.gather(*tasks) if code]
        number += 20
    # Reading still works.
    await store.balance(WALLET)
    await store.limit_status(WALLET)
    await store.list_usage(UsageQuery(), limit=5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    after = [code for n in range(20) if (code := await run_task(store, f"well-{n}"))]
    balance = await store.balance(WALLET)
    report(codes=sorted(set(codes)), after=after, spent=balance.spent, held=balance.held)

async def run(store):
    async def one(worker):
        number = 0
        while True:
            await run_task(store, f"{worker}-{number}")
            number += 1
    await asyncio.gather(*(one(worker) for worker in range(20)))

async def few(store):
    for number in range(20):
        await run_task(store, f"t{number}")

async def main():
    async with open_sqlite(Path(sys.argv[1])) as store:
        await {"fill": fill, "run": run, "few": few}[sys.argv[2]](store)

asyncio.run(main())
"""


def command(path: Path, action: str, *more: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(path), action, *map(str, more)]


async def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(
        subprocess.run, arguments, capture_output=True, text=True, timeout=100, check=False
    )


async def check_file(path: Path) -> set[str]:
    """Checks that a file is intact. Returns the tasks that have a record."""
    async with open_sqlite(path) as store:
        balance = await store.balance(WALLET)
        found, _ = await store.list_usage(UsageQuery(), limit=10**6)
        assert balance.held == 0
        assert balance.spent == sum(record.cost for record in found) == 3 * len(found)
        assert (await limits(store, WALLET)).concurrency == 0
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    return {record.task_id for record in found}


@pytest.mark.parametrize("limit", [150_000, 1_000_000, 3_000_000])
async def test_a_full_disk_is_reported_and_after_space_is_freed_nothing_is_lost(
    tmp_path: Path, limit: int
) -> None:
    path = tmp_path / "pomelo.db"
    ran = await run(*command(path, "fill", limit))
    assert ran.returncode == 0, ran.stderr
    *lines, last = map(json.loads, ran.stdout.splitlines())
    acknowledged = {line["kept"] for line in lines}
    assert last["codes"] == ["store_unavailable"]
    assert last["after"] == []
    kept = await check_file(path)
    assert acknowledged <= kept
    assert {f"well-{n}" for n in range(20)} <= acknowledged


@pytest.mark.parametrize("lines", [1, 200, 1_000])
async def test_a_killed_process_loses_nothing_that_it_acknowledged(tmp_path: Path, lines: int) -> None:
    path = tmp_path / "pomelo.db"
    process = await asyncio.create_subprocess_exec(*command(path, "run"), stdout=subprocess.PIPE)
    assert process.stdout is not None
    output = [await process.stdout.readline() for _ in range(lines)]
    process.kill()
    output += (await process.stdout.read()).splitlines(keepends=True)
    await process.wait()
    acknowledged = {json.loads(line)["kept"] for line in output if line.endswith(b"\n")}
    assert len(acknowledged) >= lines
    assert acknowledged <= await check_file(path)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
async def test_a_task_is_synced_to_disk_before_it_is_acknowledged(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    tracing = ["strace", "-f", "-o", str(trace), "-e", "trace=fdatasync,fsync,write"]
    ran = await run(*tracing, *command(tmp_path / "pomelo.db", "few"))
    if ran.returncode != 0 and "PTRACE" in ran.stderr.upper():
        pytest.skip("strace may not trace here")
    assert ran.returncode == 0, ran.stderr
    synced, acknowledged = 0, 0
    for line in trace.read_text().splitlines():
        if re.search(r"(fdatasync|fsync)(\(| resumed).*= 0$", line):
            synced += 1
        elif 'write(1, "{\\"kept\\"' in line:
            assert synced >= 1, line
            synced, acknowledged = 0, acknowledged + 1
    assert acknowledged == 20
