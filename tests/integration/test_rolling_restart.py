"""Clients with a plain retry policy notice nothing of two servers that are restarted one after the other."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import uuid
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psutil
import pytest

from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from tests import node_client
from tests.calls import bearer
from tests.integration.commands import RunningCommand, free_addresses, pomelo, start_command
from tests.redis_server import RedisServer
from tests.tasks import text_body, text_task
from tests.waiting import until

PROTO = node_client.FOLDER.parents[1] / "proto"
LOOPS = 4
ENOUGH = 25
"""Calls of a loop on a machine that is too busy for more while the servers are restarted."""

POLICY = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": "pomelo.v1.TaskService"},
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "2s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)


@dataclass
class Pair:
    """Two servers on one store, each with a data folder of its own."""

    folders: list[Path]
    addresses: list[dict[str, str]]
    variables: dict[str, str]
    key: str = ""
    stacks: list[AsyncExitStack] = field(default_factory=lambda: [AsyncExitStack(), AsyncExitStack()])
    servers: list[RunningCommand] = field(default_factory=list)

    async def start(self, number: int) -> RunningCommand:
        server = await self.stacks[number].enter_async_context(
            start_command(self.folders[number], "serve", **self.addresses[number], **self.variables)
        )
        await server.read_until("No provider has a key")
        return server

    async def restart_one_after_the_other(self, *, reconnect: bool = True) -> None:
        """Restarts both. With `reconnect`, waits for the client of gRPC to connect to the first one again: after a
        failed attempt it pauses."""
        for number, server in enumerate(self.servers):
            server.process.send_signal(signal.SIGTERM)
            assert await server.wait() == 0
            self.servers[number] = await self.start(number)
            if reconnect:
                await until(partial(self.is_connected, number), 60)

    def is_connected(self, number: int) -> bool:
        port = int(self.addresses[number]["POMELO_GRPC"].rpartition(":")[2])
        sockets = psutil.Process(self.servers[number].process.pid).net_connections()
        return any(each.laddr.port == port and each.raddr for each in sockets)

    @property
    def target(self) -> str:
        return "ipv4:" + ",".join(each["POMELO_GRPC"] for each in self.addresses)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    with RedisServer() as redis:
        folders = [tmp_path / "one", tmp_path / "two"]
        for folder in folders:
            folder.mkdir()
        variables = {
            "POMELO_STORE": redis.url,
            "POMELO_ARCHIVE": f"sqlite:{tmp_path / 'usage.db'}",
            "POMELO_SECRET": "s" * 40,
        }
        opened = Pair(folders, [free_addresses(), free_addresses()], variables)
        async with opened.stacks[0], opened.stacks[1]:
            opened.servers = [await opened.start(number) for number in range(2)]
            plan = await pomelo(folders[0], "accounts", "plan", "default", "unlimited", **variables)
            assert plan.status == 0
            opened.key = (folders[0] / "data" / "test-key").read_text().strip()
            yield opened
            audited = await pomelo(folders[0], "audit", **variables)
            assert "Difference: none" in audited.out


async def repeat(call: Callable[[], Awaitable[object]], pair: Pair, *, reconnect: bool = True) -> int:
    """Calls in several loops until the servers were restarted and each loop has made ENOUGH calls; returns how many
    calls there were."""
    restarted = asyncio.Event()
    calls = itertools.count()

    async def loop() -> None:
        made = 0
        while not restarted.is_set() or made < ENOUGH:
            await call()
            made += 1
            next(calls)

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for _ in range(LOOPS):
            group.create_task(loop())
        await pair.restart_one_after_the_other(reconnect=reconnect)
        restarted.set()
    return next(calls)


async def test_a_python_client_loses_no_call(pair: Pair) -> None:
    options = [("grpc.service_config", POLICY), ("grpc.use_local_subchannel_pool", 1)]
    numbers = itertools.count()
    async with grpc.aio.insecure_channel(pair.target, options=options) as channel:
        stub, metadata = TaskServiceStub(channel), bearer(pair.key)

        async def call() -> None:
            if next(numbers) % 2:
                await stub.RunTask(RunTaskRequest(spec=text_task("Hello")), metadata=metadata)
            else:
                stream = stub.StreamTask(StreamTaskRequest(spec=text_task("Hello")), metadata=metadata)
                assert [response async for response in stream][-1].event.HasField("completed")

        await repeat(call, pair)


async def test_a_node_client_loses_no_call(pair: Pair, request: pytest.FixtureRequest) -> None:
    modules = node_client.install(Path(request.config.cache.mkdir("node")))
    argument = {
        "proto": str(PROTO),
        "address": pair.target,
        "key": pair.key,
        "policy": POLICY,
        "loops": LOOPS,
        "enough": ENOUGH,
    }
    process = await asyncio.create_subprocess_exec(
        *("node", str(node_client.FOLDER / "rolling.cjs"), json.dumps(argument)),
        stdin=PIPE,
        stdout=PIPE,
        env={**os.environ, "NODE_PATH": str(modules)},
    )
    try:
        async with asyncio.timeout(120):
            await pair.restart_one_after_the_other()
            out, _ = await process.communicate(b"")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    result = json.loads(out)
    assert result["errors"] == []
    assert result["calls"] >= LOOPS * ENOUGH


async def test_a_rest_client_that_retries_as_the_server_asks_loses_no_call_and_pays_once(
    pair: Pair, http: aiohttp.ClientSession
) -> None:
    urls = [f"http://{each['POMELO_REST']}/api/v1/task" for each in pair.addresses]
    numbers = itertools.count()
    failures: Counter[str] = Counter()

    async def call() -> None:
        first = next(numbers)
        headers = {"Authorization": f"Bearer {pair.key}", "Idempotency-Key": str(uuid.uuid4())}
        for attempt in range(6):
            url = urls[(first + attempt) % 2]
            try:
                async with http.post(url, json=text_body(), headers=headers) as answer:
                    body: Any = await answer.json()
            except aiohttp.ClientConnectionError as error:
                failures[type(error).__name__] += 1
                continue
            if answer.status == 200:
                return
            assert (answer.status, body["error"]["code"]) == (503, "shutting_down")
            failures[body["error"]["code"]] += 1
            await asyncio.sleep(int(answer.headers["Retry-After"]))
        raise AssertionError(failures)

    calls = await repeat(call, pair, reconnect=False)
    usage = await pomelo(pair.folders[0], "usage", "--by", "account", "--format", "json", **pair.variables)
    (total,) = json.loads(usage.out)
    assert total["tasks"] == calls
