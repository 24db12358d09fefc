"""Callers with a key who come while others attack, and what the attack costs the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median

import aiohttp
import grpc
import psutil

from pomelo.gen.v1.model_service_pb2 import ListModelsRequest
from pomelo.gen.v1.model_service_pb2_grpc import ModelServiceStub
from tests.calls import bearer
from tests.serving import Served

ANSWERED_WITHIN = 1.0
"""Seconds; the promised maximum. On a busy machine a single call may take twice as long."""


@dataclass
class Callers:
    """Good callers that repeat a free request, and the seconds that each answer took."""

    rest: list[float] = field(default_factory=list)
    grpc: list[float] = field(default_factory=list)
    newcomers: list[float] = field(default_factory=list)
    """The same for callers that open a connection for each call."""

    def check(self) -> None:
        """Asserts that all were answered, in time and at their usual pace."""
        for times in (self.rest, self.grpc, self.newcomers):
            assert len(times) > 3
            assert max(times) < 2 * ANSWERED_WITHIN
            assert median(times) < ANSWERED_WITHIN / 4


@asynccontextmanager
async def good_callers(served: Served) -> AsyncIterator[Callers]:
    """Callers with a key who ask while the body runs; every call must be answered well."""
    times, done = Callers(), asyncio.Event()
    target = f"127.0.0.1:{served.grpc_port}"

    async def by_rest() -> None:
        async with aiohttp.ClientSession(headers=served.headers) as http:
            while not done.is_set():
                began = time.perf_counter()
                async with http.get(f"{served.url}/api/v1/models") as answer:
                    assert answer.status == 200
                    await answer.read()
                times.rest.append(time.perf_counter() - began)
                await asyncio.sleep(0.02)

    async def by_grpc() -> None:
        async with grpc.aio.insecure_channel(target) as channel:
            while not done.is_set():
                began = time.perf_counter()
                await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(served.key))
                times.grpc.append(time.perf_counter() - began)
                await asyncio.sleep(0.02)

    async def as_newcomers() -> None:
        while not done.is_set():
            began = time.perf_counter()
            alone = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(target, options=alone) as channel:
                await ModelServiceStub(channel).ListModels(ListModelsRequest(), metadata=bearer(served.key))
            times.newcomers.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)

    async with asyncio.TaskGroup() as group:
        for caller in (by_rest, by_grpc, as_newcomers):
            group.create_task(caller())
        try:
            yield times
        finally:
            done.set()


def cpu(served: Served) -> float:
    """Seconds of CPU that the server has used."""
    used = psutil.Process(served.pid).cpu_times()
    return float(used.user + used.system)


def connections(pid: int, port: int) -> int:
    """How many connections a process has open at a port of its own."""
    found = psutil.Process(pid).net_connections("tcp")
    return sum(1 for one in found if one.laddr.port == port and one.raddr)
